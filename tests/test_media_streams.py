"""What else is in other people's files: several videos, covers, attachments, subtitles, tags, unknown things."""

import io
from fractions import Fraction

import av
import numpy as np
import pytest
from av.stream import Disposition
from clips_made import deep_image, flashing, noise, picture, with_extras, write_video
from media_tools import doubled, picture_times
from PIL import Image

from stablevsr.media import Encoding, open_reader, open_writer

FONT = ("f.ttf", "application/x-truetype-font", b"not a real font")


@pytest.fixture
def cover():
    file = io.BytesIO()
    Image.fromarray(picture()).save(file, "JPEG")
    return file.getvalue()


def two_videos(path, sizes, default):
    with av.open(str(path), "w") as out:
        streams = [out.add_stream("libx264", rate=25, height=h, width=w, pix_fmt="yuv420p") for h, w in sizes]
        for i, stream in enumerate(streams):
            stream.disposition = Disposition.default if i == default else Disposition(0)
        out.start_encoding()
        for i in range(3):
            for stream, size in zip(streams, sizes, strict=True):
                out.mux(stream.encode(av.VideoFrame.from_ndarray(picture(*size, i), format="rgb24")))
        for stream in streams:
            out.mux(stream.encode(None))
    return path


@pytest.mark.parametrize(
    ("sizes", "default", "chosen"),
    [
        ([(16, 16), (32, 48)], 1, (32, 48)),  # a preview comes first
        ([(16, 16), (32, 48)], None, (32, 48)),  # nothing is said, so the largest
        ([(32, 48), (16, 16)], 0, (32, 48)),
        ([(32, 48), (16, 24)], 1, (16, 24)),  # who says what is right is believed
    ],
)
def test_the_right_one_of_several_videos(tmp_path, sizes, default, chosen):
    clip = two_videos(tmp_path / "in.mkv", sizes, default)
    with open_reader(clip) as reader:
        assert (reader.height, reader.width) == chosen
        other = next(size for size in sizes if size != chosen)
        assert f"not stream {sizes.index(other)} (h264, {other[1]}x{other[0]})" in reader.notices[0]
    doubled(clip, tmp_path / "out.mp4")
    with av.open(str(tmp_path / "out.mp4")) as file:
        (video,) = file.streams.video
        assert (video.height, video.width) == (2 * chosen[0], 2 * chosen[1])


def test_a_cover_is_never_the_picture_and_is_kept(tmp_path, cover):
    clip = with_extras(tmp_path / "in.mp4", cover=cover)
    for target in ("out.mp4", "out.mkv"):
        assert doubled(clip, tmp_path / target) == ([], [])
        with av.open(str(tmp_path / target)) as file:
            art = file.streams.video[1]
            assert art.disposition & Disposition.attached_pic
            assert bytes(next(file.demux(art))) == cover
    notices, _ = doubled(clip, tmp_path / "out.mov")
    assert notices == [".mov cannot hold a picture on the cover of in.mp4, so it is left out"]


def test_attached_files(tmp_path, cover):
    clip = with_extras(tmp_path / "in.mkv", attachments=[FONT, ("cover.jpg", "image/jpeg", cover)])
    assert doubled(clip, tmp_path / "out.mkv") == ([], [])
    with av.open(str(tmp_path / "out.mkv")) as file:
        (font,) = file.streams.attachments
        assert (font.metadata["filename"], font.mimetype, bytes(font.data)) == FONT
        art = file.streams.video[1]
        assert bytes(next(file.demux(art))) == cover
    notices, _ = doubled(clip, tmp_path / "out.mp4")
    assert notices == [".mp4 cannot hold the attached file f.ttf of in.mkv, so it is left out"]
    with av.open(str(tmp_path / "out.mp4")) as file:
        assert bytes(next(file.demux(file.streams.video[1]))) == cover


WORDS = {  # what "Hello" is in each codec, in the container where it is at home
    "mov_text": (".mp4", b"\x00\x05Hello"),
    "subrip": (".mkv", b"Hello"),
    "ass": (".mkv", b"0,0,Default,,0,0,0,,Hello"),
    "webvtt": (".webm", b"Hello"),
}


@pytest.mark.parametrize("target", [".mp4", ".mov", ".mkv", ".webm"])
@pytest.mark.parametrize("codec", WORDS)
def test_text_subtitles_are_converted(tmp_path, codec, target):
    home = ".mkv" if codec == "webvtt" else WORDS[codec][0]  # H.264 does not go into WebM
    clip = with_extras(tmp_path / f"in{home}", subtitles=(codec, b"Hello"), audio=False)
    out = tmp_path / f"out{target}"
    notices, failures = doubled(clip, out)
    assert failures == []
    with av.open(str(out)) as file:
        (stream,) = file.streams.subtitles
        copied = stream.codec_context.codec.canonical_name == codec
        assert copied or "converted" in notices[0]
        lines = [packet for packet in file.demux(stream) if packet.size and b"Hello" in bytes(packet)]
        assert len(lines) == 1
        assert lines[0].pts * lines[0].time_base == pytest.approx(0.1, abs=0.002)
        assert lines[0].duration * lines[0].time_base == pytest.approx(0.8, abs=0.002)


def test_lines_that_overlap(tmp_path):
    """MP4 shows one thing at a time: lines of one time are joined, longer ones end where the next one begins."""
    clip = tmp_path / "in.mkv"
    with av.open(str(clip), "w") as out:
        video = out.add_stream("libx264", rate=25, height=32, width=48, pix_fmt="yuv420p")
        text = out.add_mux_stream("subrip")
        out.start_encoding()
        for i in range(50):
            out.mux(video.encode(av.VideoFrame.from_ndarray(picture(seed=i), format="rgb24")))
        out.mux(video.encode(None))
        for start, duration, words in [
            (100, 400, b"One"),
            (300, 600, b"Two"),
            (300, 500, b"Three"),
            (1200, 300, b"Four"),
        ]:
            packet = av.Packet(words)
            packet.stream, packet.pts, packet.dts, packet.duration = text, start, start, duration
            packet.time_base = Fraction(1, 1000)
            out.mux(packet)
    doubled(clip, tmp_path / "out.mp4")
    with av.open(str(tmp_path / "out.mp4")) as file:
        lines = [
            (float(packet.pts * packet.time_base), float(packet.duration * packet.time_base), bytes(packet)[2:])
            for packet in file.demux(subtitles=0)
            if packet.size > 2
        ]
    assert lines == [(0.1, 0.2, b"One"), (0.3, 0.6, b"Two\nThree"), (1.2, 0.3, b"Four")]
    doubled(clip, tmp_path / "out.webm")
    with av.open(str(tmp_path / "out.webm")) as file:
        lines = [bytes(packet) for packet in file.demux(subtitles=0) if packet.size]
    assert lines == [b"One", b"Two", b"Three", b"Four"]


def test_pictures_as_subtitles_are_left_out_with_a_note(tmp_path):
    with av.open(str(tmp_path / "in.mkv"), "w") as out:
        video = out.add_stream("libx264", rate=25, height=32, width=48, pix_fmt="yuv420p")
        text = out.add_mux_stream("dvb_subtitle")
        out.start_encoding()
        for i in range(3):
            out.mux(video.encode(av.VideoFrame.from_ndarray(picture(seed=i), format="rgb24")))
        packet = av.Packet(b"\x20\x00\x0f\x10\x00\x01\x00\x00\xff")
        packet.stream, packet.pts, packet.dts, packet.duration = text, 0, 0, 40
        packet.time_base = Fraction(1, 1000)
        out.mux(packet)
        out.mux(video.encode(None))
    notices, failures = doubled(tmp_path / "in.mkv", tmp_path / "out.webm")
    assert notices == [".webm cannot hold dvbsub subtitles, so they are left out"]
    assert failures == []


def test_one_unknown_sound_beside_a_known_one(tmp_path):
    """As iPhones write: the second one is in a codec of Apple's that FFmpeg does not know."""
    clip = tmp_path / "in.mov"
    with av.open(str(clip), "w") as out:
        video = out.add_stream("libx264", rate=25, height=32, width=48, pix_fmt="yuv420p")
        sounds = [out.add_stream(codec, rate=48000, layout="mono") for codec in ("aac", "alac")]
        out.start_encoding()
        out.mux(video.encode(av.VideoFrame.from_ndarray(picture(), format="rgb24")))
        out.mux(video.encode(None))
        for sound in sounds:
            out.mux(noise(sound, 0.2))
    clip.write_bytes(clip.read_bytes().replace(b"alac", b"apac"))
    notices, failures = doubled(clip, tmp_path / "out.mov")
    assert notices == [
        ".mov cannot hold the unknown audio of in.mov (stream 2) and it cannot be decoded, so it is left out"
    ]
    assert failures == []
    with av.open(str(tmp_path / "out.mov")) as file:
        assert [stream.name for stream in file.streams.audio] == ["aac"]


def test_when_and_where_it_was_filmed(tmp_path):
    def said(file):
        # FFmpeg 9 joins the dates of several boxes.
        kept = {key.lower(): value.split(";")[0] for key, value in file.metadata.items()}
        return {key: kept.get(key) for key in tags}

    tags = {
        "creation_time": "2023-05-06T07:08:09.000000Z",
        "location": "+10.0000+020.0000/",
        "com.apple.quicktime.make": "Apple",
        "com.apple.quicktime.model": "iPhone 4",
        "title": "A walk",
    }
    clip = with_extras(tmp_path / "in.mov", tags=tags, timecode="10:20:30:12")
    with av.open(str(clip)) as file:
        assert said(file) == tags
    for target in ("out.mov", "out.mp4", "out.mkv"):
        assert doubled(clip, tmp_path / target) == ([], [])
        with av.open(str(tmp_path / target)) as file:
            assert said(file) == tags
            named = {key.lower(): value for key, value in file.streams.video[0].metadata.items()}
            assert named["timecode"] == "10:20:30:12"


@pytest.mark.parametrize("codec", ["hevc", "hevc10"])
@pytest.mark.parametrize("target", ["out.mp4", "out.mov", "out.m4v"])
def test_hevc_that_apples_players_show(tmp_path, codec, target):
    for clip in (with_extras(tmp_path / "in.mkv"), write_video(tmp_path / "in.avi", [picture()] * 3)):
        out = tmp_path / f"{clip.suffix[1:]}-{target}"
        doubled(clip, out, Encoding(codec))
        with av.open(str(out)) as file:
            assert file.streams.video[0].codec_context.codec_tag == "hvc1"
        assert len(picture_times(out)) == (25 if clip.suffix == ".mkv" else 3)


@pytest.mark.parametrize(
    ("codec", "suffix", "pix_fmt", "tag"),
    [
        ("prores", ".mov", "yuv422p10le", "apch"),
        ("prores", ".mkv", "yuv422p10le", None),
        ("av1", ".mp4", "yuv420p10le", "av01"),
        ("av1", ".webm", "yuv420p10le", None),
        ("av1", ".mkv", "yuv420p10le", None),
    ],
)
def test_more_codecs(tmp_path, codec, suffix, pix_fmt, tag):
    if codec == "av1" and "libsvtav1" not in av.codecs_available:
        pytest.skip("this PyAV cannot encode AV1")
    clip = flashing(tmp_path / "in.mp4", frames=25)
    out = tmp_path / f"out{suffix}"
    _, failures = doubled(clip, out, Encoding(codec))
    assert failures == []
    with av.open(str(out)) as file:
        context = file.streams.video[0].codec_context
        assert context.codec.canonical_name == codec
        assert context.pix_fmt == pix_fmt
        assert tag is None or context.codec_tag == tag
        assert len(file.streams.audio) == 1
    times = picture_times(out)
    assert len(times) == 25
    # Matroska and WebM move everything to where the sound begins, 21 ms earlier.
    assert [time - times[0] for time in times] == pytest.approx([i / 25 for i in range(25)], abs=0.0011)


def test_ffv1_keeps_sixteen_bits(tmp_path):
    ramp = np.random.default_rng(0).integers(0, 65536, (6, 8, 3), dtype=np.uint16)
    (tmp_path / "in").mkdir()
    deep_image(tmp_path / "in" / "1.png", ramp, "png", "rgb48le", "rgb48be")
    for suffix in (".mkv", ".avi"):
        out = tmp_path / f"out{suffix}"
        with open_reader(tmp_path / "in") as reader:
            writer = open_writer(out, reader, height=6, width=8, encoding=Encoding("ffv1"))
            assert writer.is_deep
            with writer:
                for frame in reader:
                    writer.write(frame.image, frame)
        with open_reader(out) as reader:
            assert reader.is_deep
            assert np.array_equal(next(iter(reader)).image, ramp)


@pytest.mark.parametrize("target", ["out.mp4", "out.mov", "out.m4v"])
@pytest.mark.parametrize("audio", [True, False])
def test_players_may_begin_before_the_file_is_there(tmp_path, target, audio):
    clip = with_extras(tmp_path / "in.mkv", audio=audio)
    doubled(clip, tmp_path / target)
    content = (tmp_path / target).read_bytes()
    assert content.index(b"moov") < content.index(b"mdat")


def test_data_streams_are_told(tmp_path):
    clip = tmp_path / "in.ts"
    with av.open(str(clip), "w") as out:
        video = out.add_stream("libx264", rate=25, height=32, width=48, pix_fmt="yuv420p")
        data = out.add_data_stream("klv")
        out.start_encoding()
        for i in range(3):
            out.mux(video.encode(av.VideoFrame.from_ndarray(picture(seed=i), format="rgb24")))
        packet = av.Packet(b"\x06\x0e\x2b\x34" + bytes(20))
        packet.stream, packet.pts, packet.dts, packet.time_base = data, 0, 0, Fraction(1, 90000)
        out.mux(packet)
        out.mux(video.encode(None))
    notices, _ = doubled(clip, tmp_path / "out.mp4")
    assert notices == [".mp4 cannot hold a stream of data (klv) of in.ts, so it is left out"]


def test_chapters_are_told_where_there_are_none(tmp_path):
    clip = tmp_path / "in.mkv"
    with av.open(str(clip), "w") as out:
        video = out.add_stream("libx264", rate=25, height=32, width=48, pix_fmt="yuv420p")
        out.set_chapters(
            [{"id": 1, "start": 0, "end": 40, "time_base": Fraction(1, 1000), "metadata": {"title": "One"}}]
        )
        out.mux(video.encode(av.VideoFrame.from_ndarray(picture(), format="rgb24")))
        out.mux(video.encode(None))
    assert doubled(clip, tmp_path / "out.avi")[0] == [".avi cannot hold chapters, so they are left out"]
    for target in ("out.mp4", "out.mov", "out.mkv", "out.webm"):
        assert doubled(clip, tmp_path / target) == ([], [])
        assert doubled(tmp_path / target, tmp_path / f"again{target[3:]}") == ([], [])  # MP4 has a stream for them
        with av.open(str(tmp_path / f"again{target[3:]}")) as file:
            assert [chapter["metadata"]["title"] for chapter in file.chapters()] == ["One"]


def test_chapters_of_a_clip_that_begins_late(tmp_path):
    clip = tmp_path / "in.mkv"
    with av.open(str(clip), "w") as out:
        video = out.add_stream("libx264", rate=25, height=32, width=48, pix_fmt="yuv420p")
        span = {"start": 3_600_000, "end": 3_600_400, "time_base": Fraction(1, 1000)}
        out.set_chapters([{"id": 1, **span, "metadata": {"title": "A"}}])
        for i in range(10):
            frame = av.VideoFrame.from_ndarray(picture(seed=i), format="rgb24")
            frame.pts, frame.time_base = 90_000 + i, Fraction(1, 25)
            out.mux(video.encode(frame))
        out.mux(video.encode(None))
    doubled(clip, tmp_path / "out.mp4")
    with av.open(str(tmp_path / "out.mp4")) as file:
        (chapter,) = file.chapters()
        assert chapter["start"] * chapter["time_base"] == 0
    assert picture_times(tmp_path / "out.mp4")[0] == 0


def test_digital_video_from_tape(tmp_path):
    """FFmpeg gives the rate of its clock for that of its frames, and it has a time code."""
    clip = tmp_path / "in.dv"
    with av.open(str(clip), "w") as out:
        video = out.add_stream("dvvideo", rate=25, height=576, width=720, pix_fmt="yuv420p")
        sound = out.add_stream("pcm_s16le", rate=48000, layout="stereo")
        out.start_encoding()
        packets = noise(sound, 0.2)
        for i in range(5):
            frame = av.VideoFrame.from_ndarray(picture(576, 720, i), format="rgb24").reformat(format="yuv420p")
            frame.pts, frame.time_base = i, Fraction(1, 25)
            packets += video.encode(frame)
        for packet in sorted(packets, key=lambda packet: packet.dts * packet.time_base):
            out.mux(packet)
    with open_reader(clip) as reader:
        assert reader.frame_rate == 25
        with open_writer(tmp_path / "out.mov", reader, height=576, width=720) as writer:
            for frame in reader:
                writer.write(frame.image, frame)
    assert writer.failures == []
    with av.open(str(tmp_path / "out.mov")) as file:
        assert file.streams.video[0].average_rate == 25
    assert len(picture_times(tmp_path / "out.mov")) == 5


def test_frames_that_stay_as_they_were(tmp_path):
    """Theora stores nothing for them, which no decoder understands."""
    clip = with_extras(tmp_path / "whole.mkv", audio=False)
    count = 0

    def emptied(packet):
        nonlocal count
        count += 1
        if count not in (5, 6):
            return [packet]
        empty = av.Packet(0)
        empty.pts, empty.dts, empty.time_base = packet.pts, packet.dts, packet.time_base
        return [empty]

    # FFmpeg's writers leave empty packets out, so the reader gets them from a stand-in.
    with open_reader(clip) as reader, reader._open() as (container, stream):
        whole = list(container.demux(stream))

        class Container:
            def demux(self, stream):
                return iter([changed for packet in whole for changed in emptied(packet)])

        kept = [packet for packet in reader._packets(Container(), stream) if packet.size]
    assert len(kept) == 23
