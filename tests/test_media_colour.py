"""Primaries, transfer functions and profiles: said as they are in the source, or the pixels are converted."""

import os
import subprocess
import sys
from pathlib import Path

import av
import imageio.v3 as iio
import numpy as np
import pytest
from av.filter import Graph
from clips_made import deep_image, picture
from media_tools import as_wanted, doubled, refused
from PIL import Image, ImageCms

from stablevsr.errors import UserError
from stablevsr.media import CODECS, Encoding, PartReader, open_reader, open_writer
from stablevsr.media.colour import Mastering
from stablevsr.media.profiles import with_png_profile

PATCHES = [(32, 160, 96), (200, 40, 60), (128, 128, 128), (20, 60, 220), (235, 220, 30)]
# FFmpeg's numbers for primaries and transfer function, and its names of them.
LABELS = {
    "BT.709": (1, 1, 1),
    "BT.601 625": (5, 6, 5),
    "BT.601 525": (6, 6, 6),
    "BT.2020": (9, 14, 9),
    "sRGB": (1, 13, 1),
    "Display P3": (12, 13, 1),
}


def patches():
    return np.concatenate([np.full((32, 16, 3), rgb, np.uint8) for rgb in PATCHES], axis=1)


def labelled(path, primaries, transfer, matrix, codec="libx264", pix_fmt="yuv444p"):
    """A clip of two frames with patches of colour and these labels."""
    with av.open(str(path), "w") as out:
        options = {"qp": "0"} if codec == "libx264" else {}
        stream = out.add_stream(codec, rate=25, height=32, width=80, pix_fmt=pix_fmt, options=options)
        context = stream.codec_context
        context.color_primaries, context.color_trc, context.colorspace, context.color_range = (
            primaries,
            transfer,
            matrix,
            1,
        )
        for _ in range(2):
            frame = av.VideoFrame.from_ndarray(patches(), format="rgb24")
            frame = frame.reformat(format=pix_fmt, dst_colorspace=matrix, dst_color_range=1)
            out.mux(stream.encode(frame))
        out.mux(stream.encode(None))
    return path


def as_srgb(path):
    """The first frame's patches as FFmpeg's own filter shows them on an sRGB screen."""
    with av.open(str(path)) as file:
        stream = file.streams.video[0]
        frame = next(file.decode(stream))
        if frame.format.is_rgb:
            frame = frame.reformat(format="yuv444p", dst_colorspace=1, dst_color_range=1)
        graph = Graph()
        source = graph.add_buffer(
            width=frame.width, height=frame.height, format=frame.format, time_base=stream.time_base
        )
        labels = f"iprimaries={NAMES[int(frame.color_primaries)]}:itrc={TRANSFERS[int(frame.color_trc)]}"
        matrix = MATRICES[int(frame.colorspace)]
        convert = graph.add(
            "colorspace", f"{labels}:ispace={matrix}:irange=tv:all=bt709:trc=srgb:range=tv:format=yuv444p"
        )
        graph.link_nodes(source, convert, graph.add("buffersink")).configure()
        graph.push(frame)
        shown = graph.pull()
        shown.colorspace, shown.color_range = 1, 1
        image = shown.reformat(format="rgb24", dst_color_range=2).to_ndarray()
    step = image.shape[1] // len(PATCHES)
    return np.array([image[8:-8, i * step + 4 : (i + 1) * step - 4].mean(axis=(0, 1)) for i in range(len(PATCHES))])


NAMES = {1: "bt709", 5: "bt470bg", 6: "smpte170m", 9: "bt2020", 12: "smpte432"}
TRANSFERS = {1: "bt709", 6: "smpte170m", 13: "srgb", 14: "bt2020-10"}
MATRICES = {1: "bt709", 5: "bt470bg", 6: "smpte170m", 9: "bt2020nc"}


@pytest.mark.parametrize("name", LABELS)
@pytest.mark.parametrize(
    ("target", "codec"),
    [
        ("out.mp4", None),
        ("out.mov", None),
        ("out.mkv", None),
        ("out.webm", None),
        ("out.mov", "prores"),
        ("out.mkv", "ffv1"),
        ("out.mp4", "hevc10"),
        ("out.mkv", "av1"),
    ],
)
def test_labels_and_colours_stay(tmp_path, name, target, codec):
    if codec == "av1" and "libsvtav1" not in av.codecs_available:
        pytest.skip("this PyAV cannot encode AV1")
    primaries, transfer, matrix = LABELS[name]
    clip = labelled(tmp_path / "in.mp4", primaries, transfer, matrix)
    _, failures = doubled(clip, tmp_path / target, Encoding(codec))
    assert failures == []
    with av.open(str(tmp_path / target)) as file:
        frame = next(file.decode(video=0))
        assert (frame.color_primaries, frame.color_trc) == (primaries, transfer)
    assert np.abs(as_srgb(tmp_path / target) - as_srgb(clip)).max() <= 2


def test_a_part_keeps_its_labels(tmp_path):
    clip = labelled(tmp_path / "in.mkv", 12, 13, 1)
    with (
        open_reader(clip) as whole,
        PartReader(whole, 0, 1) as reader,
        open_writer(tmp_path / "out.mkv", reader, height=32, width=80) as writer,
    ):
        for frame in reader:
            writer.write(frame.image, frame)
    with av.open(str(tmp_path / "out.mkv")) as file:
        assert next(file.decode(video=0)).color_primaries == 12


@pytest.mark.parametrize(("codec", "pix_fmt"), [("libx264", "gray"), ("ffv1", "gray"), ("ffv1", "gray10le")])
@pytest.mark.parametrize("limited", [True, False])
def test_gray_with_its_own_range(tmp_path, codec, pix_fmt, limited):
    deep = pix_fmt == "gray10le"
    levels = np.linspace(16, 235, 64) if limited else np.linspace(0, 255, 64)
    stored = np.tile(np.round(levels * (4 if deep else 1)), (32, 1)).astype(np.uint16 if deep else np.uint8)
    with av.open(str(tmp_path / "in.mkv"), "w") as out:
        options = {"qp": "0"} if codec == "libx264" else {}
        stream = out.add_stream(codec, rate=25, height=32, width=64, pix_fmt=pix_fmt, options=options)
        stream.codec_context.color_range = 1 if limited else 2
        frame = av.VideoFrame.from_ndarray(stored, format=pix_fmt)
        frame.color_range = 1 if limited else 2
        out.mux(stream.encode(frame))
        out.mux(stream.encode(None))
    with open_reader(tmp_path / "in.mkv") as reader:
        image = next(iter(reader)).image
    top = 65535 if reader.is_deep else 255
    assert np.abs(image[0, :, 0] - np.linspace(0, top, 64)).max() <= 1.1 * top / 255  # a step
    assert np.array_equal(image[..., 0], image[..., 2])


@pytest.fixture
def swapped():
    """A profile whose numbers mean something else than sRGB's: red and green change places."""
    profile = bytearray(ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes())
    red, green = profile.index(b"rXYZ"), profile.index(b"gXYZ")
    profile[red : red + 4], profile[green : green + 4] = b"gXYZ", b"rXYZ"
    return bytes(profile)


@pytest.mark.parametrize("target", ["out.png", "out.jpg", "out.tif", "out.tiff", "out.webp", "out"])
@pytest.mark.parametrize("deep", [False, True])
def test_profiles_of_stills_are_kept(tmp_path, swapped, target, deep):
    image = picture(16, 24)
    if deep:
        deep_image(tmp_path / "plain.png", image.astype(np.uint16) * 257, "png", "rgb48le", "rgb48be")
        (tmp_path / "in.png").write_bytes(with_png_profile((tmp_path / "plain.png").read_bytes(), swapped))
    else:
        Image.fromarray(image).save(tmp_path / "in.png", icc_profile=swapped)
    doubled(tmp_path / "in.png", tmp_path / target)
    out = tmp_path / target / "in.png" if target == "out" else tmp_path / target
    with Image.open(out) as still:
        assert still.info["icc_profile"] == swapped
    with open_reader(out) as reader:
        frame = next(iter(reader))
        assert frame.profile == swapped
        assert reader.is_deep == (deep and target not in ("out.jpg", "out.webp"))
    seen = frame.image[::2, ::2].astype(int) // (257 if reader.is_deep else 1)
    assert np.abs(seen - image).max() <= (8 if target == "out.jpg" else 1)


@pytest.mark.parametrize("target", ["out.bmp", "out.mkv"])
def test_where_no_profile_fits_the_pixels_are_converted(tmp_path, swapped, target):
    image = np.full((16, 24, 3), (200, 50, 90), np.uint8)
    Image.fromarray(image).save(tmp_path / "in.png", icc_profile=swapped)
    doubled(tmp_path / "in.png", tmp_path / target, Encoding("ffv1") if target == "out.mkv" else None)
    with open_reader(tmp_path / target) as reader:
        seen = next(iter(reader)).image[8, 8].astype(int)
    assert np.abs(seen - [50, 200, 90]).max() <= 2


def test_a_profile_for_gray_becomes_srgb(tmp_path):
    linear = ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes()
    gray = bytearray(linear)
    gray[16:20] = b"GRAY"
    gray[gray.index(b"gTRC") : gray.index(b"gTRC") + 4] = b"kTRC"
    Image.fromarray(np.full((16, 24), 100, np.uint8)).save(tmp_path / "in.png", icc_profile=bytes(gray))
    with open_reader(tmp_path / "in.png") as reader:
        frame = next(iter(reader))
    assert frame.profile is None
    assert np.ptp(frame.image[8, 8].astype(int)) <= 1


def test_a_profile_that_makes_no_sense_does_no_harm(tmp_path):
    nonsense = ImageCms.ImageCmsProfile(ImageCms.createProfile("LAB")).tobytes()
    Image.fromarray(picture()).save(tmp_path / "in.png", icc_profile=nonsense)
    for target in ("out.png", "out.mp4", "out.bmp"):
        doubled(tmp_path / "in.png", tmp_path / target)
    assert iio.imread(tmp_path / "out.bmp").shape == (64, 96, 3)


def test_a_lossless_video_and_a_folder_hold_the_same_frames(tmp_path):
    clip = labelled(tmp_path / "in.mkv", 1, 1, 1, "ffv1", "yuv420p")
    doubled(clip, tmp_path / "out.mkv", Encoding("ffv1"))
    doubled(clip, tmp_path / "out")
    with open_reader(tmp_path / "out.mkv") as video, open_reader(tmp_path / "out") as stills:
        for one, other in zip(video, stills, strict=True):
            assert np.array_equal(one.image, other.image)


def animation(path, durations, mode="RGB"):
    """A square that moves."""
    frames = []
    for i in range(len(durations)):
        frame = Image.new(mode, (48, 32))
        frame.paste((255, 0, 0, 255)[: len(mode)], (4 + 16 * i, 8, 12 + 16 * i, 24))
        frames.append(frame)
    frames[0].save(path, save_all=True, append_images=frames[1:], duration=durations, loop=0)
    return path


@pytest.mark.parametrize("suffix", [".webp", ".png"])
@pytest.mark.parametrize("mode", ["RGB", "RGBA"])
@pytest.mark.parametrize("target", ["out.mp4", "out.mkv", "out.webm"])
def test_animations_are_clips(tmp_path, suffix, mode, target):
    clip = animation(tmp_path / f"in{suffix}", [100, 700, 300], mode)
    doubled(clip, tmp_path / target)
    with open_reader(tmp_path / target) as reader:
        frames = list(reader)
    assert [float(f.pts * f.time_base) for f in frames] == pytest.approx([0, 0.1, 0.8], abs=0.001)
    with av.open(str(tmp_path / target)) as file:
        assert file.duration / 1e6 == pytest.approx(1.1, abs=0.002)
    for i, frame in enumerate(frames):
        square = frame.image[32, 2 * (8 + 16 * i)].astype(int)
        assert square[0] > 200
        assert square[1] < 60


def test_animations_elsewhere(tmp_path):
    clip = animation(tmp_path / "in.webp", [100, 700, 300])
    assert ".avi has a constant frame rate" not in (doubled(clip, tmp_path / "out")[0] or [""])[0]
    assert len(list((tmp_path / "out").iterdir())) == 3
    assert "more than one frame" in refused(clip, tmp_path / "out.png")
    still = animation(tmp_path / "still.webp", [100])
    with open_reader(still) as reader:
        assert reader.frame_count == 1
    content = clip.read_bytes()
    clip.write_bytes(content[: len(content) // 2])
    with pytest.raises(Exception, match=r"in\.webp"):
        list(open_reader(clip))


GRADED = "master-display=G(13250,34500)B(7500,3000)R(34000,16000)WP(15635,16450)L(10000000,50):max-cll=1000,400"


def hdr_video(path, transfer=16, params=GRADED):
    """Ten bits of BT.2020 with PQ (16) or HLG (18), and what x265 says of the screen it was graded on."""
    options = {"x265-params": f"log-level=0:{params}", "crf": "1"}
    with av.open(str(path), "w") as out:
        stream = out.add_stream("libx265", rate=25, height=32, width=80, pix_fmt="yuv420p10le", options=options)
        context = stream.codec_context
        context.color_primaries, context.color_trc, context.colorspace, context.color_range = 9, transfer, 9, 1
        for _ in range(3):
            frame = av.VideoFrame.from_ndarray(patches(), format="rgb24")
            out.mux(stream.encode(frame.reformat(format="yuv420p10le", dst_colorspace=9, dst_color_range=1)))
        out.mux(stream.encode(None))
    return path


def upscaled_hdr(source, target, encoding=None):
    """As `doubled`, with HDR allowed; returns the notices."""
    with open_reader(source, allow_hdr=True) as reader:
        size = {"height": 2 * reader.height, "width": 2 * reader.width}
        with open_writer(target, reader, encoding=encoding, **size) as writer:
            for frame in reader:
                writer.write(as_wanted(frame.image, writer).repeat(2, 0).repeat(2, 1), frame)
    return [*reader.notices, *writer.notices]


@pytest.mark.parametrize(("transfer", "name"), [(16, "PQ"), (18, "HLG")])
def test_hdr_is_refused_unless_it_is_allowed(tmp_path, transfer, name):
    clip = hdr_video(tmp_path / "in.mkv", transfer)
    with pytest.raises(UserError, match=rf"in\.mkv is HDR video \({name}\).* pass --allow-hdr"):
        open_reader(clip)
    with open_reader(clip, allow_hdr=True) as reader:
        assert f"labelled {name} again" in reader.notices[0]
        assert len(reader.notices) == 1


@pytest.mark.parametrize(
    ("codec", "suffix"), [(codec, suffix) for codec, kind in CODECS.items() for suffix in kind.containers]
)
@pytest.mark.parametrize("transfer", [16, 18])
def test_hdr_keeps_its_labels_or_says_so(tmp_path, codec, suffix, transfer):
    if CODECS[codec].encoder not in av.codecs_available:
        pytest.skip("this PyAV has no such encoder")
    clip = hdr_video(tmp_path / "in.mkv", transfer)
    notices = upscaled_hdr(clip, tmp_path / f"out{suffix}", Encoding(codec))
    assert any("gets 8 bits a channel" in notice for notice in notices) == (codec in ("h264", "hevc", "vp9"))
    with av.open(str(tmp_path / f"out{suffix}")) as file:
        written = next(file.decode(video=0))
    if (codec, suffix) == ("ffv1", ".avi"):
        assert any("cannot say that its colours are not BT.709's" in notice for notice in notices)
    else:
        assert (written.color_primaries, written.color_trc) == (9, transfer)
    with av.open(str(clip)) as file:
        read = next(file.decode(video=0))
    if "hevc" in codec:
        assert Mastering.of(written) == Mastering.of(read)
        assert not any("mastering metadata" in notice for notice in notices)
    else:
        assert any("gets no HDR mastering metadata" in notice for notice in notices)


def test_hdr_without_mastering_metadata(tmp_path):
    clip = hdr_video(tmp_path / "in.mkv", params="repeat-headers=1")
    assert not any("mastering metadata" in notice for notice in upscaled_hdr(clip, tmp_path / "out.mp4"))
    clip = hdr_video(tmp_path / "light.mkv", params="max-cll=900,300")
    upscaled_hdr(clip, tmp_path / "light.mp4", Encoding("hevc10"))
    with av.open(str(tmp_path / "light.mp4")) as file:
        assert Mastering.of(next(file.decode(video=0))) == Mastering(light=(900, 300))


def test_hdr_in_ten_bits_has_the_same_levels(tmp_path):
    clip = hdr_video(tmp_path / "in.mkv")
    upscaled_hdr(clip, tmp_path / "out.mkv", Encoding("hevc10", 1))
    with (
        open_reader(clip, allow_hdr=True) as before,
        open_reader(tmp_path / "out.mkv", allow_hdr=True) as after,
    ):
        one, two = (next(iter(reader)).image.astype(int) for reader in (before, after))
    assert np.abs(two[::2, ::2] - one).mean() < 2 * 257


def test_clips_narrower_than_x265_can_stand(tmp_path):
    """In a process of its own, because the encoder's vector code used to end it."""
    code = (
        "import sys; from pathlib import Path; from clips_made import *; from media_tools import *\n"
        "from stablevsr.media import Encoding\n"
        "clip = write_video(Path(sys.argv[1]) / 'in.mkv', [picture(16, 24, i) for i in range(4)])\n"
        "for i in range(12): doubled(clip, clip.with_name(f'{i}.mp4'), Encoding('hevc'))\n"
    )
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(Path(__file__).parent), *sys.path])}
    ended = subprocess.run([sys.executable, "-c", code, str(tmp_path)], env=environment, check=False)
    assert ended.returncode == 0
    assert len(list(tmp_path.glob("*.mp4"))) == 12
