"""Frames in and out. Every file is made here with PyAV or imageio, a dozen tiny frames at most."""

import os
import resource
import subprocess
import sys
from fractions import Fraction
from itertools import pairwise
from pathlib import Path

import av
import imageio.v3 as iio
import numpy as np
import pytest
from av.sidedata.sidedata import Type as SideData
from av.stream import Disposition
from av.video.frame import PictureType
from clips_made import (
    TICKS,
    deep_image,
    flashing,
    flat_video,
    interlaced_video,
    picture,
    transparent_video,
    write_video,
)

from stablevsr.errors import UserError
from stablevsr.media import Encoding, Frame, PartReader, check_output, natural_key, open_reader, open_writer
from stablevsr.media.alpha import split_alpha
from stablevsr.media.colour import Colours, to_frame
from stablevsr.media.picture_file import PictureFile, PictureFormat


def upscale(source, target, force=False):
    """What the product does, with a model that repeats pixels."""
    with (
        open_reader(source) as reader,
        open_writer(target, reader, height=4 * reader.height, width=4 * reader.width, force=force) as writer,
    ):
        for frame in reader:
            image = frame.image if reader.is_deep == writer.is_deep else (frame.image // 257).astype(np.uint8)
            writer.write(image.repeat(4, 0).repeat(4, 1), frame)
    return target


def packets(path, kind):
    with av.open(str(path)) as file:
        return [(p.pts * p.time_base, bytes(p)) for p in file.demux(**{kind: 0}) if p.size]


def times(path):
    with open_reader(path) as reader:
        return [frame.pts * frame.time_base for frame in reader]


def refusal(call, *args, **kwargs):
    """The message of the UserError that the call raises; it must be a single sentence."""
    with pytest.raises(UserError) as caught:
        call(*args, **kwargs)
    message = str(caught.value)
    assert "\n" not in message
    assert ". " not in message
    assert not message.endswith(".")
    assert not message.startswith(("Input", "Output", "Frame", "Folder", "Codec", "Quality", "The"))
    return message


def read_all(path):
    with open_reader(path) as reader:
        return list(reader)


def close_to(got, expected, tolerance):
    assert got.shape == expected.shape
    assert got.dtype == np.uint8
    assert np.abs(got.astype(int) - expected).max() <= tolerance


# Video in


def test_reads_a_video_frame_by_frame(tmp_path):
    images = [picture(seed=i) for i in range(12)]
    path = write_video(tmp_path / "a.mp4", images)
    with open_reader(path) as reader:
        assert (reader.height, reader.width, reader.frame_rate, reader.frame_count) == (32, 48, 30, 12)
        assert reader.notices == []
        frames = list(reader)
        assert len(list(reader)) == 12  # a second pass starts over
    assert [f.pts * f.time_base for f in frames] == [Fraction(i, 30) for i in range(12)]
    assert frames[0].name is None
    for frame, image in zip(frames, images, strict=True):
        close_to(frame.image, image, 2)


@pytest.mark.parametrize("pix_fmt", ["yuv420p", "yuv444p"])
def test_odd_sizes(tmp_path, pix_fmt):
    # x264 wants even sizes for 4:2:0, FFV1 takes any.
    codec = "ffv1" if pix_fmt == "yuv420p" else "libx264"
    path = write_video(tmp_path / "odd.mkv", [picture(53, 37)] * 2, pix_fmt=pix_fmt, codec=codec)
    frames = read_all(path)
    assert len(frames) == 2
    close_to(frames[1].image, picture(53, 37), 6)


@pytest.mark.parametrize("mirrored", [False, True])
@pytest.mark.parametrize("degrees", [0, 90, 180, 270])
def test_rotation_is_applied_and_not_written_again(tmp_path, degrees, mirrored):
    path = write_video(tmp_path / "r.mp4", [picture()], rotation=(degrees, mirrored), aspect=Fraction(4, 3))
    expected = np.rot90(picture(), degrees // 90)
    expected = expected[:, ::-1] if mirrored else expected
    with open_reader(path) as reader:
        assert (reader.height, reader.width) == expected.shape[:2]
        assert reader.sample_aspect_ratio == (Fraction(3, 4) if degrees % 180 else Fraction(4, 3))
        (frame,) = reader
    close_to(frame.image, expected, 2)
    with av.open(str(upscale(path, tmp_path / "out.mp4"))) as out:
        decoded = next(out.decode(video=0))
        assert decoded.side_data.get(SideData.DISPLAYMATRIX) is None
        assert (decoded.height, decoded.width) == (4 * expected.shape[0], 4 * expected.shape[1])
        assert out.streams.video[0].sample_aspect_ratio == reader.sample_aspect_ratio


def yuv_of(rgb, kr, kb, full):
    """The textbook conversion, in floating point."""
    r, g, b = (value / 255 for value in rgb)
    y = kr * r + (1 - kr - kb) * g + kb * b
    cb, cr = (b - y) / 2 / (1 - kb), (r - y) / 2 / (1 - kr)
    return (
        [round(255 * y), round(128 + 255 * cb), round(128 + 255 * cr)]
        if full
        else [round(16 + 219 * y), round(128 + 224 * cb), round(128 + 224 * cr)]
    )


BT601, BT709, BT2020 = (0.299, 0.114), (0.2126, 0.0722), (0.2627, 0.0593)


@pytest.mark.parametrize(
    ("tag", "height", "weights", "full"),
    [
        (1, 32, BT709, False),
        (6, 32, BT601, False),
        (5, 32, BT601, True),
        (9, 32, BT2020, False),
        (1, 32, BT709, True),
        (2, 718, BT601, False),  # untagged
        (2, 720, BT709, False),
    ],
)
def test_yuv_is_read_with_its_own_matrix_and_range(tmp_path, tag, height, weights, full):
    rgb = (51, 102, 204)  # swscale's short cuts miss it by 3
    path = flat_video(tmp_path / "flat.mkv", yuv_of(rgb, *weights, full), height, tag, full)
    (frame,) = read_all(path)
    close_to(frame.image, np.full((height, 32, 3), rgb), 1)


@pytest.mark.parametrize("suffix", [".mp4", ".webm"])
def test_colours_survive_and_are_tagged(tmp_path, suffix):
    for i, rgb in enumerate([(255, 0, 0), (0, 255, 0), (0, 0, 255), (128, 128, 128), (255, 255, 255), (12, 200, 90)]):
        folder = tmp_path / f"in{i}"
        folder.mkdir()
        iio.imwrite(folder / "0.png", np.full((16, 16, 3), rgb, np.uint8))
        out = upscale(folder, tmp_path / f"out{i}{suffix}")
        (frame,) = read_all(out)
        close_to(frame.image, np.full((64, 64, 3), rgb), 2)
    with av.open(str(out)) as file:
        context = file.streams.video[0].codec_context
        assert [context.colorspace, context.color_primaries, context.color_trc, context.color_range] == [1, 1, 1, 1]
        assert context.pix_fmt == "yuv420p"
        # Pure BT.709 in the file itself, not merely the inverse of what the reader does.
        decoded = next(file.decode(video=0))
        got = [np.frombuffer(plane, np.uint8)[0] for plane in decoded.planes]
        assert np.abs(np.subtract(got, yuv_of((12, 200, 90), *BT709, False), dtype=int)).max() <= 1


# Video out


@pytest.mark.parametrize("suffix", [".mp4", ".mov", ".m4v"])
def test_variable_rate_offset_and_audio_survive(tmp_path, suffix):
    # Starts late by no whole number of milliseconds; the audio starts before and ends after the video.
    pts = [15001 + 1001 * k for k in (0, 1, 2, 5, 6, 9, 20, 21)]
    source = write_video(tmp_path / "a.mp4", [picture(seed=i) for i in range(8)], pts=pts, audio=1.8)
    assert times(source) == [p * TICKS for p in pts]
    out = upscale(source, tmp_path / f"out{suffix}")
    assert times(out) == times(source)
    assert packets(out, "audio") == packets(source, "audio")
    for got, frame in zip(read_all(out), read_all(source), strict=True):
        close_to(got.image[2::4, 2::4], frame.image, 12)


def test_matroska_keeps_times_to_its_millisecond_and_audio_in_step(tmp_path):
    pts = [1001 * k for k in (0, 1, 2, 5, 6)]
    source = write_video(tmp_path / "a.mp4", [picture()] * 5, pts=pts, audio=0.5)
    out = upscale(source, tmp_path / "out.mkv")
    assert [data for _, data in packets(out, "audio")] == [data for _, data in packets(source, "audio")]
    shift = packets(out, "audio")[0][0] - packets(source, "audio")[0][0]
    assert times(out) == pytest.approx([time + shift for time in times(source)], abs=0.0011)


def test_avi_in_and_out(tmp_path):
    # AVI stores times of decoding only, here with frames out of order; a guess would shuffle or delay them.
    source = tmp_path / "a.avi"
    with av.open(str(source), "w") as out:
        stream = out.add_stream("libx264", rate=25, options={"bf": "2", "b-pyramid": "none"}, time_base=Fraction(1, 25))
        stream.height, stream.width = 32, 48
        for i in range(12):
            out.mux(stream.encode(av.VideoFrame.from_ndarray(picture(seed=i), format="rgb24")))
        out.mux(stream.encode(None))
    assert times(source) == [Fraction(i, 25) for i in range(12)]
    out = upscale(source, tmp_path / "out.avi")
    assert times(out) == times(source)
    assert [round(f.image[..., 2].mean() / 20) for f in read_all(out)] == list(range(12))
    with av.open(str(out)) as file:
        assert PictureType.B not in [frame.pict_type for frame in file.decode(video=0)]
    with_audio = write_video(tmp_path / "b.mp4", [picture()] * 5, audio=0.3)
    assert times(upscale(with_audio, tmp_path / "b.avi")) == times(with_audio)
    uneven = write_video(tmp_path / "uneven.mp4", [picture()] * 3, pts=[0, 100, 9000])
    assert ".mkv" in refusal(upscale, uneven, tmp_path / "uneven.avi")


def test_short_audio(tmp_path):
    source = write_video(tmp_path / "a.mp4", [picture()] * 60, audio=0.5)
    out = upscale(source, tmp_path / "out.mp4")
    assert packets(out, "audio") == packets(source, "audio")
    assert len(times(out)) == 60


def test_audio_and_video_lie_side_by_side_in_the_file(tmp_path):
    pts = [15000 * i for i in range(50)]  # longer than the 10 s for which FFmpeg waits for the other stream
    source = write_video(tmp_path / "a.mp4", [picture()] * 50, pts=pts, audio=25)
    out = upscale(source, tmp_path / "out.mp4")
    with av.open(str(out)) as file:
        by_position = sorted((p.pos, p.dts * p.time_base) for p in file.demux() if p.size)
    in_order = [time for _, time in by_position]
    assert all(later - earlier > -1.5 for earlier, later in pairwise(in_order))


def test_container_that_cannot_hold_the_audio(tmp_path):
    source = write_video(tmp_path / "a.mp4", [picture()], audio=1)
    with open_reader(source) as reader, open_writer(tmp_path / "out.webm", reader, height=128, width=192) as writer:
        assert "cannot hold aac audio, so it is encoded again as libopus" in writer.notices[0]
        for frame in reader:
            writer.write(frame.image.repeat(4, 0).repeat(4, 1), frame)
    heard = []
    for path in (source, tmp_path / "out.webm"):
        with av.open(str(path)) as file:
            frames = [frame.to_ndarray() for frame in file.decode(audio=0)]
            assert file.streams.audio[0].language == "deu"
            heard.append(np.concatenate(frames, axis=-1)[0])
    n = 30000
    assert len(heard[1]) >= n
    # Coders shift and add a little; the tone is the same one
    spectra = [np.abs(np.fft.rfft(sound[4000:n])) for sound in heard]
    assert spectra[0].argmax() == pytest.approx(spectra[1].argmax(), abs=1)


def test_subtitles_chapters_and_titles_come_along(tmp_path):
    source = tmp_path / "a.mkv"
    with av.open(str(source), "w") as out:
        video = out.add_stream("libx264", rate=25, height=32, width=48, pix_fmt="yuv420p")
        text = out.add_mux_stream("subrip")
        text.metadata["language"] = "fra"
        out.metadata["title"] = "A film"
        out.set_chapters(
            [{"id": 1, "start": 0, "end": 400, "time_base": Fraction(1, 1000), "metadata": {"title": "One"}}]
        )
        out.start_encoding()
        for i in range(10):
            out.mux(video.encode(av.VideoFrame.from_ndarray(picture(), format="rgb24")))
            if i == 3:
                words = av.Packet(b"Bonjour")
                words.stream, words.pts, words.dts, words.duration = text, 120, 120, 200
                words.time_base = Fraction(1, 1000)
                out.mux(words)
        out.mux(video.encode(None))
    upscale(source, tmp_path / "out.mkv")
    with av.open(str(tmp_path / "out.mkv")) as file:
        assert file.metadata["title"] == "A film"
        assert file.chapters()[0]["metadata"]["title"] == "One"
        assert file.streams.subtitles[0].language == "fra"
        assert [bytes(packet) for packet in file.demux(subtitles=0) if packet.size] == [b"Bonjour"]
    with open_reader(source) as reader, open_writer(tmp_path / "out.mp4", reader, height=32, width=48) as writer:
        assert writer.notices == [".mp4 cannot hold srt subtitles, so they are converted to mov_text"]
        writer.write(picture(), next(iter(reader)))


def test_sound_left_out_of_a_folder_is_told(tmp_path):
    source = write_video(tmp_path / "a.mp4", [picture()], audio=0.1)
    with open_reader(source) as reader, open_writer(tmp_path / "out", reader, height=32, width=48) as writer:
        assert "holds no sound" in writer.notices[0]
        writer.write(picture(), next(iter(reader)))


@pytest.mark.parametrize("suffix", [".mkv", ".avi", ".h264", ".mp4"])
@pytest.mark.parametrize("count", [1, 5])
def test_interlaced_video_is_deinterlaced_frame_by_frame(tmp_path, suffix, count):
    """A bar that moves between the fields leaves no comb; a still picture stays as it is."""
    moving, still = [], [picture(64, 64)] * count
    for i in range(count):
        image = np.zeros((64, 64, 3), np.uint8)
        for field in (0, 1):
            left = 8 * i + 4 * field
            image[field::2, left : left + 16] = 255
        moving.append(image)
    for name, images in (("moving", moving), ("still", still)):
        path = tmp_path / f"{name}{suffix}"
        interlaced_video(path, images, (90, False) if suffix == ".mp4" else None)
        with open_reader(path) as reader:
            assert reader.notices == [f"{path} is interlaced; each of its frames becomes one whole picture (bwdif)"]
            frames = list(reader)
        with av.open(str(path)) as file:
            raw = [frame.time for frame in file.decode(video=0)]
        assert len(frames) == count
        if suffix in (".mkv", ".mp4"):
            assert [float(frame.pts * frame.time_base) for frame in frames] == pytest.approx(raw)
        assert [frame.pts - frames[0].pts for frame in frames] == [
            round(i / 25 / frames[0].time_base) for i in range(count)
        ]
        for i, frame in enumerate(frames):
            image = np.rot90(frame.image, -1) if suffix == ".mp4" else frame.image
            if name == "still":
                close_to(image[8:-8], picture(64, 64)[8:-8], 4)
            elif 0 < i < count - 1:  # at the ends there is nothing before or behind to see the motion by
                comb = [np.abs(np.diff(x[8:-8].astype(int), axis=0)).mean() for x in (image, moving[i])]
                assert comb[0] < comb[1] / 10


def test_video_that_becomes_interlaced_on_the_way(tmp_path, caplog):
    path = tmp_path / "a.h264"
    for interlaced in (0, 1):
        with av.open(str(tmp_path / f"{interlaced}.h264"), "w") as out:
            stream = out.add_stream("libx264", rate=25, options={"x264-params": f"interlaced={interlaced}", "qp": "0"})
            stream.height, stream.width, stream.pix_fmt = 64, 64, "yuv444p"
            for i in range(3):
                out.mux(stream.encode(av.VideoFrame.from_ndarray(picture(64, 64, seed=i), format="rgb24")))
            out.mux(stream.encode(None))
    path.write_bytes((tmp_path / "0.h264").read_bytes() + (tmp_path / "1.h264").read_bytes())
    with open_reader(path) as reader:
        frames = list(reader)
    assert [message.split(" is ")[1] for message in caplog.messages] == [
        "interlaced from frame 4 on: such frames are deinterlaced"
    ]
    assert len(frames) == 6
    for i, frame in enumerate(frames):
        close_to(frame.image[8:-8], picture(64, 64, seed=i % 3)[8:-8], 30 if i > 2 else 2)


def test_one_frame_of_video_becomes_one_image(tmp_path):
    source = write_video(tmp_path / "a.mkv", [picture()])  # Matroska does not say how many frames it holds
    assert iio.imread(upscale(source, tmp_path / "out.png")).shape == (128, 192, 3)
    source = write_video(tmp_path / "b.mkv", [picture()] * 2)
    assert "more than one frame" in refusal(upscale, source, tmp_path / "b.png")


def test_frames_at_one_time_are_kept(tmp_path):
    source = write_video(tmp_path / "a.mkv", [picture()] * 3)
    with open_reader(source) as reader, open_writer(tmp_path / "o.mp4", reader, height=32, width=48) as writer:
        for _ in range(3):
            writer.write(picture(), Frame(picture(), pts=7, time_base=reader.time_base))
    assert len(times(tmp_path / "o.mp4")) == 3


def test_last_frame_keeps_its_length(tmp_path):
    source = write_video(tmp_path / "a.mkv", [picture()])
    with open_reader(source) as reader, open_writer(tmp_path / "o.mp4", reader, height=32, width=48) as writer:
        for pts, duration in ((0, 40), (40, 3000)):
            writer.write(picture(), Frame(picture(), pts, Fraction(1, 1000), duration))
    with av.open(str(tmp_path / "o.mp4")) as out:
        assert out.duration == 3_040_000  # microseconds


def test_missing_encoder(tmp_path, monkeypatch):
    iio.imwrite(tmp_path / "a.png", picture())
    monkeypatch.setattr(av, "codecs_available", set())
    assert "libx264" in refusal(upscale, tmp_path / "a.png", tmp_path / "o.mp4")
    assert os.listdir(tmp_path) == ["a.png"]


def test_wrong_pictures_are_the_programmers_fault(tmp_path):
    source = write_video(tmp_path / "a.mkv", [picture()])
    with open_reader(source) as reader:
        with pytest.raises(ValueError, match="even"):
            open_writer(tmp_path / "o.mp4", reader, height=33, width=48)
        with (
            pytest.raises(ValueError, match="uint8"),
            open_writer(tmp_path / "o.mp4", reader, height=32, width=48) as writer,
        ):
            writer.write(picture().astype(np.float32), Frame(picture()))
    assert os.listdir(tmp_path) == ["a.mkv"]


# What is not a video


def test_odd_names_and_tags(tmp_path, monkeypatch):
    write_video(tmp_path / "12:30 %d.mkv", [picture()], audio=0.1)
    data = (tmp_path / "12:30 %d.mkv").read_bytes()
    assert b"DURATION" in data
    (tmp_path / "12:30 %d.mkv").write_bytes(data.replace(b"DURATION", b"DURAT\xc8ON"))
    monkeypatch.chdir(tmp_path)
    out = upscale("12:30 %d.mkv", "12:31 %d.mkv")
    assert len(times(out)) == 1
    with av.open(str(tmp_path / out)) as file:
        assert file.streams.audio[0].language == "deu"
        assert file.streams.audio[0].disposition & Disposition.comment


# A damaged packet makes the H.264 decoder stop; the MPEG-4 decoder fills the hole and only marks the frame.
@pytest.mark.parametrize(("codec", "pix_fmt"), [("libx264", "yuv444p"), ("mpeg4", "yuv420p")])
def test_damage_is_told_by_frame_number(tmp_path, codec, pix_fmt):
    images = [np.roll(picture(64, 64, seed=i), 9 * i, axis=(0, 1)) for i in range(9)]
    path = write_video(tmp_path / "a.mkv", images, codec=codec, pix_fmt=pix_fmt)
    whole = read_all(path)
    data = bytearray(path.read_bytes())
    with av.open(str(path)) as file:
        start = [p.pos for p in file.demux(video=0) if p.size][4]
    data[start + 40 : start + 50] = b"\x00\xff" * 5
    path.write_bytes(data)
    frames = []
    with open_reader(path) as reader, pytest.raises(UserError, match=r"frame \d of .*a.mkv") as caught:
        frames.extend(reader)
    assert len(frames) <= 5
    assert f"--frames 0:{len(frames)}" in str(caught.value)
    with open_reader(path) as reader, PartReader(reader, 0, len(frames)) as part:
        assert len(list(part)) == len(frames)
    for got, expected in zip(frames, whole, strict=False):
        assert np.array_equal(got.image, expected.image)


@pytest.mark.parametrize("cut", [1, 100])
@pytest.mark.parametrize(
    ("suffix", "codec"),
    [(".mp4", "libx264"), (".mov", "libx264"), (".mkv", "libx264"), (".webm", "libvpx-vp9"), (".avi", "mpeg4")],
)
def test_a_file_that_ends_early_is_refused(tmp_path, suffix, codec, cut):
    images = [picture(64, 64, seed=i) for i in range(9)]
    path = write_video(tmp_path / f"a{suffix}", images, codec=codec, pix_fmt="yuv420p")
    assert len(read_all(path)) == 9
    if suffix == ".mp4":  # its index in front, as on the web, so that FFmpeg would play what is there
        with (
            av.open(str(path)) as source,
            av.open(str(tmp_path / "b.mp4"), "w", options={"movflags": "faststart"}) as out,
        ):
            stream = out.add_stream_from_template(source.streams.video[0])
            for packet in source.demux(video=0):
                if packet.size:
                    packet.stream = stream
                    out.mux(packet)
        path = tmp_path / "b.mp4"
        assert len(read_all(path)) == 9
    whole = path.read_bytes()
    path.write_bytes(whole[:-cut])
    assert f"{cut} bytes are missing" in refusal(open_reader, path)
    if suffix in (".mp4", ".mkv", ".webm"):
        with open_reader(path, allow_truncated=True) as reader:
            assert "cut short" in reader.notices[0]
    path.write_bytes(whole + b"appended by somebody")
    assert len(read_all(path)) == 9


def chunks_of(content, name=b"00dc"):
    """Where the pictures of a small AVI file begin, or its sounds ("01wb")."""
    movi, index = content.index(b"movi"), content.index(b"idx1")
    return [i for i in range(movi, index) if content[i : i + 4] == name]


@pytest.mark.parametrize("indexed", [True, False])
@pytest.mark.parametrize("damage", ["name", "long", "short", "sector"])
def test_an_avi_whose_chunks_are_broken_is_refused(tmp_path, damage, indexed):
    """FFmpeg finds the next chunk that makes sense and reads on, with a frame or two less."""
    path = flashing(tmp_path / "a.avi", "mpeg4", "mp3")
    content = bytearray(path.read_bytes())
    start, end = chunks_of(content)[5:7]
    size = int.from_bytes(content[start + 4 : start + 8], "little")
    if damage == "name":
        content[start : start + 8] = b"\xff" * 8
    elif damage == "sector":
        content[start : end + 20] = bytes(end + 20 - start)
    else:
        content[start + 4 : start + 8] = (size // 2 if damage == "short" else 1 << 30).to_bytes(4, "little")
    if not indexed:
        content = content.replace(b"idx1", b"JUNK")
    path.write_bytes(content)
    message = refusal(open_reader, path)
    assert f"{path} is damaged at byte " in message
    byte = int(message.split("at byte ")[1].split(",")[0])
    assert start <= byte <= end
    assert "--allow-truncated" in message
    with open_reader(path, allow_truncated=True) as reader:
        assert reader.notices == [f"{path} is damaged at byte {byte}, so frames or sound are lost there"]


def test_an_avi_with_room_at_its_end_is_whole(tmp_path):
    path = flashing(tmp_path / "a.avi", "mpeg4", "mp3")
    path.write_bytes(path.read_bytes() + bytes(5000))
    with open_reader(path) as reader:
        assert reader.notices == []
        assert len(list(reader)) == 25


def test_an_avi_without_padding_is_whole(tmp_path):
    """Some programs write chunks of odd length without the byte that makes them even."""
    path = flashing(tmp_path / "a.avi", "mpeg4", "pcm_u8", rate=22051)  # 547 bytes in the last chunk of sound
    whole = content = path.read_bytes().replace(b"idx1", b"JUNK")  # whose places would be wrong
    for start in reversed(chunks_of(path.read_bytes(), b"01wb")):
        end = start + 8 + int.from_bytes(content[start + 4 : start + 8], "little")
        content = content[:end] + content[end + end % 2 :]
    assert len(content) < len(whole)
    path.write_bytes(content + bytes(len(whole) - len(content)))
    with open_reader(path) as reader:
        assert reader.notices == []
        assert len(list(reader)) == 25


def test_leaving_early_closes_the_file(tmp_path):
    path = write_video(tmp_path / "a.mkv", [picture()] * 5)
    with open_reader(path) as reader:
        frames = iter(reader)
        next(frames)
        assert any(path.samefile(f"/proc/self/fd/{fd}") for fd in open_files())
    assert not any(path.samefile(f"/proc/self/fd/{fd}") for fd in open_files())


def open_files():
    return [fd for fd in os.listdir("/proc/self/fd") if os.path.exists(f"/proc/self/fd/{fd}")]


# Images in


@pytest.fixture
def folder(tmp_path):
    path = tmp_path / "in"
    path.mkdir()
    return path


def test_natural_order():
    names = ["frame10", "frame9", "Frame1", "frame09", "a2b10", "a2b9", "10", "9"]
    assert sorted(names, key=natural_key) == ["9", "10", "a2b9", "a2b10", "Frame1", "frame09", "frame9", "frame10"]


def test_folder_in_folder_out(tmp_path, folder):
    for i in (10, 9, 1):
        iio.imwrite(folder / f"frame{i}.png", picture(seed=i))
    (folder / ".hidden").touch()
    (folder / "notes.txt").touch()
    (folder / "sub").mkdir()
    with open_reader(folder) as reader:
        assert (reader.height, reader.width, reader.frame_rate, reader.frame_count) == (32, 48, 25, 3)
        assert reader.notices[:2] == ["skipped notes.txt: not an image", "skipped sub: a folder"]
        assert "jump from frame1 to frame9; 7 frames may be missing" in reader.notices[2]
        assert [f.name for f in reader] == ["frame1", "frame9", "frame10"]
    out = upscale(folder, tmp_path / "out")
    assert sorted(os.listdir(out)) == ["frame1.png", "frame10.png", "frame9.png"]
    assert np.array_equal(iio.imread(out / "frame9.png"), picture(seed=9).repeat(4, 0).repeat(4, 1))
    assert sorted(os.listdir(tmp_path)) == ["in", "out"]


def test_folder_to_video_and_back(tmp_path, folder):
    for i in range(3):
        iio.imwrite(folder / f"{i}.png", picture(seed=i))
    video = upscale(folder, tmp_path / "out.mp4")
    assert times(video) == [0, Fraction(1, 25), Fraction(2, 25)]
    out = upscale(video, tmp_path / "back/")
    assert sorted(os.listdir(out)) == ["frame_000001.png", "frame_000002.png", "frame_000003.png"]


def test_one_stem_twice_keeps_both(tmp_path, folder):
    iio.imwrite(folder / "a.png", picture())
    iio.imwrite(folder / "a.bmp", picture(seed=5))
    out = upscale(folder, tmp_path / "out")
    assert sorted(os.listdir(out)) == ["a.bmp.png", "a.png.png"]


def read_one(path):
    with open_reader(path) as reader:
        (frame,) = reader
        assert frame.image.shape == (reader.height, reader.width, 3)
        return frame.image, reader.notices


def test_pixel_types_become_rgb(folder):
    image = picture(6, 8)
    gray = image[..., 0]
    alpha = np.dstack([image, np.zeros_like(gray)])
    iio.imwrite(folder / "gray.png", gray)
    iio.imwrite(folder / "bits.png", gray > 100)
    iio.imwrite(folder / "palette.png", image, bits=4)
    iio.imwrite(folder / "alpha.png", alpha)
    iio.imwrite(folder / "grayalpha.png", np.dstack([gray, 0 * gray]))
    assert read_one(folder / "gray.png")[0].tolist() == np.dstack([gray] * 3).tolist()
    assert read_one(folder / "bits.png")[0].tolist() == np.dstack([255 * (gray > 100)] * 3).tolist()
    assert read_one(folder / "alpha.png")[0].tolist() == image.tolist()
    assert read_one(folder / "grayalpha.png")[0].tolist() == np.dstack([gray] * 3).tolist()
    assert iio.immeta(folder / "palette.png")["mode"] == "P"
    close_to(read_one(folder / "palette.png")[0], image, 60)
    assert read_one(folder / "gray.png")[1] == []
    with open_reader(folder) as reader:
        assert reader.has_alpha
        assert reader.notices == []
        assert [frame.alpha is not None for frame in reader] == [True, False, False, True, False]


@pytest.mark.parametrize("deep", [False, True])
@pytest.mark.parametrize(("suffix", "kept"), [(".png", True), (".tif", True), (".webp", True), (".jpg", False)])
def test_alpha_in_and_out(tmp_path, suffix, kept, deep):
    alpha = np.tile(np.arange(0, 256, 32, dtype=np.uint8), (6, 1))
    image = np.dstack([picture(6, 8), alpha])
    if deep:
        deep_image(tmp_path / "in.png", image.astype(np.uint16) * 257, "png", "rgba64le", "rgba64be")
    else:
        iio.imwrite(tmp_path / "in.png", image)
    out = tmp_path / f"out{suffix}"
    with open_reader(tmp_path / "in.png") as reader, open_writer(out, reader, height=6, width=8) as writer:
        assert writer.takes_alpha == kept
        assert any("cannot hold transparency" in notice for notice in writer.notices) != kept
        (frame,) = reader
        assert np.array_equal(frame.alpha, alpha.astype(np.uint16) * 257 if deep else alpha)
        whole = np.dstack([frame.image, frame.alpha]) if kept else frame.image
        writer.write(whole if deep == writer.is_deep else (whole // 257).astype(np.uint8), frame)
    if not kept:
        return
    with open_reader(out) as reader:
        (again,) = reader
        assert reader.is_deep == (deep and suffix != ".webp")
    scale = np.uint16(1 if reader.is_deep == deep else 257)
    assert np.array_equal(again.alpha * scale, frame.alpha)
    assert np.array_equal(again.image[:, 1:] * scale, frame.image[:, 1:])  # the first column is hidden


def test_what_nobody_sees_takes_the_colours_next_to_it():
    rng = np.random.default_rng(0)
    image = rng.integers(0, 256, (13, 10, 4), dtype=np.uint8)  # a green disc in random rubbish
    y, x = np.mgrid[:13, :10]
    disc = (y - 6) ** 2 + (x - 5) ** 2 < 9
    image[disc], image[~disc, 3] = (10, 200, 30, 255), 0
    colours, alpha = split_alpha(image)
    assert np.array_equal(colours, np.full((13, 10, 3), (10, 200, 30)))
    assert np.array_equal(alpha, 255 * disc)
    image[..., 3] = 0
    assert np.array_equal(split_alpha(image)[0], image[..., :3])
    opaque = rng.integers(0, 65536, (3, 4, 4), dtype=np.uint16)
    opaque[..., 3] = 65535
    assert np.array_equal(split_alpha(opaque)[0], opaque[..., :3])


def test_transparency_of_video_is_told(tmp_path):
    transparent_video(tmp_path / "a.webm")
    iio.imwrite(tmp_path / "b.gif", np.dstack([picture(), 0 * picture()[..., :1]]))
    for name in ("a.webm", "b.gif"):
        with open_reader(tmp_path / name) as reader:
            assert reader.notices == [f"{tmp_path / name}: the transparency of a video is dropped"]
            assert read_all(tmp_path / name)[0].image.shape[2] == 3


def test_16_bits_are_kept(tmp_path, folder):
    image = np.random.default_rng(0).integers(0, 65536, (6, 8, 3), dtype=np.uint16)
    deep_image(folder / "1.png", image, "png", "rgb48le", "rgb48be")
    deep_image(folder / "2.tif", image, "tiff", "rgb48le", "rgb48le")
    deep_image(folder / "3.png", np.dstack([image, image[..., :1]]), "png", "rgba64le", "rgba64be")
    iio.imwrite(folder / "4.png", image[..., 0])
    deep_image(folder / "5.tif", image[..., 0], "tiff", "gray16le", "gray16le")
    frames = read_all(folder)
    for frame in frames[:3]:
        assert np.array_equal(frame.image, image)
    for frame in frames[3:]:
        assert np.array_equal(frame.image, np.dstack([image[..., 0]] * 3))
    upscale(folder, tmp_path / "out")
    for got, frame in zip(read_all(tmp_path / "out"), frames, strict=True):
        assert np.array_equal(got.image[::4, ::4], frame.image)
    iio.imwrite(folder / "6.png", (image // 257).astype(np.uint8))  # among deep ones a plain one becomes deep, too
    assert np.array_equal(read_all(folder)[5].image, image // 257 * 257)


@pytest.mark.parametrize("suffix", [".png", ".tif", ".jpg"])
def test_a_deep_image_becomes_a_deep_image_where_the_format_allows(tmp_path, suffix):
    image = np.random.default_rng(0).integers(0, 65536, (6, 8), dtype=np.uint16)
    iio.imwrite(tmp_path / "in.png", image)
    with open_reader(tmp_path / "in.png") as reader:
        writer = open_writer(tmp_path / f"out{suffix}", reader, height=24, width=32)
        with writer:
            assert writer.is_deep == (suffix != ".jpg")
            assert any("gets 8 bits" in notice for notice in writer.notices) == (suffix == ".jpg")
            writer.write(np.zeros((24, 32, 3), np.uint16 if writer.is_deep else np.uint8), next(iter(reader)))
    assert read_one(tmp_path / f"out{suffix}")[0].dtype == (np.uint8 if suffix == ".jpg" else np.uint16)


@pytest.mark.parametrize("pix_fmt", ["yuv444p10le", "yuv444p12le", "gbrp10le", "yuv444p16le"])
def test_deep_video_keeps_its_depth_and_its_white(tmp_path, pix_fmt):
    ramp = np.broadcast_to(np.linspace(0, 65535, 1024)[None, :, None], (4, 1024, 3)).astype(np.uint16)
    path = tmp_path / "a.mkv"
    with av.open(str(path), "w") as out:
        stream = out.add_stream("ffv1", rate=25, height=4, width=1024, pix_fmt=pix_fmt)
        frame = to_frame(ramp, pix_fmt)
        stream.codec_context.colorspace = 1 if pix_fmt.startswith("yuv") else 0
        out.mux(stream.encode(frame))
        out.mux(stream.encode(None))
    with open_reader(path) as reader:
        assert reader.is_deep
        assert reader.notices == []
        (frame,) = reader
        with open_writer(tmp_path / "out.mp4", reader, height=16, width=4096) as writer:
            assert "--codec hevc10 keeps 10" in writer.notices[0]
            writer.write(np.zeros((16, 4096, 3), np.uint8), frame)
    assert frame.image.dtype == np.uint16
    assert len(np.unique(frame.image[0, :, 1])) > 850  # of 876 or 1023 levels, 256 in eight bits
    # In eight bits white and black are met exactly; so they must be in sixteen.
    assert np.abs(frame.image[0, [0, -1]].astype(int) - [[0], [65535]]).max() < 30
    assert np.abs(frame.image.astype(int) - ramp).max() < 150


@pytest.mark.parametrize("suffix", [".png", ".jpg", ".tif"])
def test_exif_orientation(folder, suffix):
    undo = {  # how an upright picture is stored under each tag
        1: lambda x: x,
        2: lambda x: x[:, ::-1],
        3: lambda x: x[::-1, ::-1],
        4: lambda x: x[::-1],
        5: lambda x: x.swapaxes(0, 1),
        6: lambda x: np.rot90(x, 1),
        7: lambda x: x[::-1, ::-1].swapaxes(0, 1),
        8: lambda x: np.rot90(x, -1),
    }
    lossless = {".jpg": {"quality": 100, "subsampling": 0}}.get(suffix, {})
    for tag, store in undo.items():
        exif = b"Exif\0\0MM\0*\0\0\0\x08\0\x01\x01\x12\0\x03\0\0\0\x01\0" + bytes([tag]) + b"\0\0\0\0\0\0"
        stored = np.ascontiguousarray(store(picture(16, 24)))
        iio.imwrite(folder / f"{tag}{suffix}", stored, plugin="pillow", exif=exif, **lossless)
        if suffix == ".tif":  # 16-bit images take a path of their own
            gray = stored[..., 0].astype(np.uint16) * 257
            iio.imwrite(folder / f"deep{tag}.tif", gray, plugin="pillow", exif=exif)
    with open_reader(folder) as reader:
        step = 257 if reader.is_deep else 1
        images = [(frame.image // step).astype(np.uint8) for frame in reader]  # the sizes agree only upright
    assert len(images) == (16 if suffix == ".tif" else 8)
    for image in images[8:]:
        close_to(image, np.dstack([picture(16, 24)[..., 0]] * 3), 0)
    for image in images[:8]:
        close_to(image, picture(16, 24), 6)


def test_folders_that_are_refused(folder):
    assert "holds no image" in refusal(open_reader, folder)
    iio.imwrite(folder / "1.png", picture())
    iio.imwrite(folder / "2.png", picture(16, 16))
    message = refusal(open_reader, folder)
    assert "2.png is 16x16" in message
    assert "1.png is 48x32" in message
    (folder / "2.png").write_text("this is text")
    assert "2.png" in refusal(open_reader, folder)
    whole = iio.imwrite("<bytes>", picture(), extension=".png")
    (folder / "2.png").write_bytes(whole[:-30])
    assert "2.png" in refusal(open_reader, folder)
    (folder / "2.png").write_bytes(whole[:60] + bytes(20) + whole[80:])  # only decoding finds this
    assert "2.png" in refusal(read_all, folder)


# Images out


@pytest.mark.parametrize("suffix", [".png", ".jpg", ".tif", ".bmp", ".webp"])
def test_single_image_out(tmp_path, suffix):
    iio.imwrite(tmp_path / "a.png", picture())
    out = upscale(tmp_path / "a.png", tmp_path / f"out{suffix}")
    close_to(iio.imread(out, plugin="pillow"), picture().repeat(4, 0).repeat(4, 1), 8 if suffix == ".jpg" else 0)
    mask = os.umask(0)
    os.umask(mask)
    assert out.stat().st_mode & 0o777 == 0o666 & ~mask


def test_single_image_needs_a_single_frame(tmp_path):
    source = write_video(tmp_path / "a.mp4", [picture()] * 2)
    with open_reader(source) as reader:
        assert "folder" in refusal(open_writer, tmp_path / "out.png", reader, height=32, width=48)
    assert os.listdir(tmp_path) == ["a.mp4"]


# Which outputs are allowed, and what is left behind


def test_check_output(tmp_path, folder):
    clip = tmp_path / "clip.mp4"
    clip.touch()
    (tmp_path / "link.mp4").symlink_to(clip)
    os.link(clip, tmp_path / "hard.mp4")
    (tmp_path / "old.mp4").touch()
    (tmp_path / "file").touch()
    (folder / "1.png").touch()

    for good in ["new.mp4", "new.MKV", "new", "new/", "new.png", ".new", "in/out.mp4"]:
        check_output(f"{tmp_path}/{good}", clip, False)
    check_output(tmp_path / "old.mp4", clip, True)
    check_output(folder, clip, True)
    (tmp_path / "void").mkdir()
    check_output(tmp_path / "void", clip, False)

    def refused(name, source=clip, force=False):
        return refusal(check_output, f"{tmp_path}/{name}", source, force)

    assert "--force" in refused("old.mp4")
    assert "--force" in refused("in")
    assert "input itself" in refused("clip.mp4", force=True)
    assert "input itself" in refused("link.mp4", force=True)
    assert "input itself" in refused("hard.mp4", force=True)
    assert "input itself" in refused("in", source=folder, force=True)
    assert "holds the input" in refused("in", source=folder / "1.png", force=True)
    assert "is not a folder" in refused("missing/new.mp4")
    assert "is not a folder" in refused("file/new.mp4")
    assert "is a file" in refused("file", force=True)
    assert ".mkv" in refused("new.xyz")
    os.mkfifo(tmp_path / "pipe.mp4")
    assert "ordinary" in refused("pipe.mp4", force=True)


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write anywhere")
def test_check_output_needs_permission(tmp_path):
    (tmp_path / "locked").mkdir(mode=0o500)
    assert "permission" in refusal(check_output, tmp_path / "locked" / "new.mp4", tmp_path / "in.mp4", False)


def write_and_raise(writer, frames, error):
    with writer:
        for frame in frames:
            writer.write(frame.image, frame)
        if error:
            raise error


@pytest.mark.parametrize("error", [KeyboardInterrupt, RuntimeError])
@pytest.mark.parametrize("name", ["out.mp4", "out", "out.png"])
def test_failure_leaves_the_old_output_and_nothing_else(tmp_path, name, error):
    iio.imwrite(tmp_path / "a.png", picture())
    old = tmp_path / name
    if name == "out":
        old.mkdir()
        old = old / "old.png"
    old.write_text("precious")
    before = sorted(os.listdir(tmp_path))
    with open_reader(tmp_path / "a.png") as reader:
        frames = list(reader)
        writer = open_writer(tmp_path / name, reader, height=32, width=48, force=True)
        with pytest.raises(error):
            write_and_raise(writer, frames, error)
        assert "no frame" in refusal(
            write_and_raise, open_writer(tmp_path / name, reader, height=32, width=48, force=True), [], None
        )
    assert sorted(os.listdir(tmp_path)) == before
    links = [os.readlink(f"/proc/self/fd/{fd}") for fd in open_files()]
    assert not any(link.startswith(str(tmp_path)) and ".part" in link for link in links)  # would still fill the disk
    assert old.read_text() == "precious"


@pytest.mark.parametrize("name", ["out.mp4", "out", "out.png"])
def test_force_replaces(tmp_path, name):
    iio.imwrite(tmp_path / "a.png", picture())
    upscale(tmp_path / "a.png", tmp_path / name)
    if name == "out":
        (tmp_path / "out" / "stale.png").touch()
    assert "--force" in refusal(upscale, tmp_path / "a.png", tmp_path / name)
    upscale(tmp_path / "a.png", tmp_path / name, force=True)
    assert sorted(os.listdir(tmp_path)) == ["a.png", name]
    if name == "out":
        assert os.listdir(tmp_path / "out") == ["a.png"]


@pytest.mark.parametrize("name", ["out.mp4", "out.mkv", "out", "out.png"])
def test_full_disk(tmp_path, name):
    noise = np.random.default_rng(0).integers(0, 256, (32, 48, 3), dtype=np.uint8)
    iio.imwrite(tmp_path / "a.png", noise)
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (4000, limits[1]))
    try:
        message = refusal(upscale, tmp_path / "a.png", tmp_path / name)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert name in message
    assert os.listdir(tmp_path) == ["a.png"]


def test_old_folder_comes_back_when_the_swap_fails(tmp_path, monkeypatch):
    iio.imwrite(tmp_path / "a.png", picture())
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "old.png").touch()
    rename = type(tmp_path).rename

    def failing(self, target):
        if target == tmp_path / "out" and (self / "a.png").exists():
            raise OSError(5, "disk on fire")
        return rename(self, target)

    monkeypatch.setattr(type(tmp_path), "rename", failing)
    assert "disk on fire" in refusal(upscale, tmp_path / "a.png", tmp_path / "out", force=True)
    assert sorted(os.listdir(tmp_path)) == ["a.png", "out"]
    assert os.listdir(tmp_path / "out") == ["old.png"]


def test_output_is_written_through_a_link(tmp_path):
    iio.imwrite(tmp_path / "a.png", picture())
    (tmp_path / "real").mkdir()
    (tmp_path / "link").symlink_to(tmp_path / "real")
    upscale(tmp_path / "a.png", tmp_path / "link")
    assert (tmp_path / "link").is_symlink()
    assert os.listdir(tmp_path / "real") == ["a.png"]


def test_a_forced_folder_must_hold_nothing_but_images(tmp_path, monkeypatch):
    (tmp_path / "in").mkdir()
    iio.imwrite(tmp_path / "in/a.png", np.zeros((4, 4, 3), np.uint8))
    (tmp_path / "out").mkdir()
    (tmp_path / "out/thesis.txt").write_text("years")
    with pytest.raises(UserError, match=r"holds thesis.txt, which is no image and would be lost"):
        check_output(tmp_path / "out", tmp_path / "in", force=True)
    monkeypatch.chdir(tmp_path / "out")
    for name in ("", "."):
        with pytest.raises(UserError, match=r"empty name|the folder you are in"):
            check_output(name, tmp_path / "in", force=True)


def test_a_gap_in_the_numbers_is_told(tmp_path):
    for name in ("f1", "f2", "f5", "g1", "f0010"):
        iio.imwrite(tmp_path / f"{name}.png", picture())
    with open_reader(tmp_path) as reader:
        assert [notice.split(": ")[1] for notice in reader.notices] == [
            "the numbers jump from f2 to f5; 2 frames may be missing",
            "the numbers jump from f5 to f0010; 4 frames may be missing",
        ]


def write_with(path, source, image, encoding):
    with open_reader(source) as reader, open_writer(path, reader, height=64, width=96, encoding=encoding) as writer:
        for frame in reader:
            writer.write(image, frame)
    return path


def test_lossless_video_gives_back_the_same_bits(tmp_path):
    source = write_video(tmp_path / "a.mp4", [picture()] * 3)
    noise = np.random.default_rng(0).integers(0, 256, (64, 96, 3), np.uint8)
    for suffix in (".mkv", ".avi"):
        out = write_with(tmp_path / f"out{suffix}", source, noise, Encoding("ffv1"))
        assert all(np.array_equal(frame.image, noise) for frame in read_all(out))
        assert len(read_all(out)) == 3


@pytest.mark.parametrize("codec", ["h264", "hevc", "vp9"])
def test_codecs(tmp_path, codec):
    source = write_video(tmp_path / "a.mp4", [picture()] * 3)
    smooth = picture(64, 96)
    best, worst = (write_with(tmp_path / f"{crf}.mkv", source, smooth, Encoding(codec, crf)) for crf in (None, 50))
    with av.open(str(best)) as file:
        assert file.streams.video[0].codec_context.codec.canonical_name == codec
    assert np.abs(read_all(best)[1].image.astype(int) - smooth).mean() < 1
    assert best.stat().st_size > worst.stat().st_size


DIRTY_MEMORY = """
import sys
from fractions import Fraction
from pathlib import Path
import av
from test_media import picture, read_all, write_video, write_with
from stablevsr.media.codecs import Encoding
folder, codec, suffix = Path(sys.argv[1]), sys.argv[2], sys.argv[3]
for count in (1, 2, 3, 4):
    source = write_video(folder / f"{count}.mp4", [picture()] * count)
    out = write_with(folder / f"out{count}{suffix}", source, picture(64, 96), Encoding(codec))
    with av.open(str(out)) as file:
        packets = [packet for packet in file.demux(video=0) if packet.size]
    assert all(packet.dts is None or packet.dts <= packet.pts for packet in packets), packets  # Matroska has no dts
    for ours, theirs in zip(read_all(out), read_all(source), strict=True):
        gap = abs(ours.pts * ours.time_base - theirs.pts * theirs.time_base)
        assert gap <= Fraction(1, 2000), gap  # Matroska counts in milliseconds
"""


@pytest.mark.parametrize("value", ["37", "200"])
@pytest.mark.parametrize(
    ("codec", "suffix"), [("hevc", ".mp4"), ("hevc", ".mkv"), ("hevc", ".mov"), ("h264", ".avi"), ("vp9", ".webm")]
)
def test_clips_of_a_few_frames_whatever_was_in_memory(tmp_path, codec, suffix, value):
    # glibc fills what it hands out with a byte made of this value. For one or two frames x265 took a time from there:
    # with 37 far after the frame, with 200 far before it (no matter to Matroska, which stores none).
    environment = {**os.environ, "MALLOC_PERTURB_": value, "PYTHONPATH": str(Path(__file__).parent)}
    command = [sys.executable, "-c", DIRTY_MEMORY, str(tmp_path), codec, suffix]
    result = subprocess.run(command, capture_output=True, text=True, env=environment)
    assert result.returncode == 0, result.stderr


def test_the_same_frames_give_the_same_bits(tmp_path):
    """x264's code for AVX-512 made another file of them in every other run."""
    y, x = np.mgrid[:192, :320]
    images = [np.stack([(3 * x + 7 * i) % 256, (5 * y + 11 * i) % 256, (x * y + i) % 256], -1) for i in range(12)]
    codec, options = Encoding().choose(".mkv")
    how = PictureFormat("matroska", codec, options, 192, 320, Fraction(25), Fraction(1, 25), Fraction(1), Colours())
    found = set()
    for _ in range(30):
        written = PictureFile(tmp_path / "out.mkv", how)
        for i, image in enumerate(images):
            written.write(image.astype(np.uint8), i, 1)
        written.finish()
        found.add((tmp_path / "out.mkv").read_bytes())
    assert len(found) == 1


def test_ten_bits_keep_what_eight_cannot(tmp_path):
    source = write_video(tmp_path / "a.mp4", [picture()])
    ramp = np.broadcast_to(np.linspace(20000, 22000, 96)[None, :, None], (64, 96, 3)).astype(np.uint16)
    out = write_with(tmp_path / "out.mp4", source, ramp, Encoding("hevc10", 0))
    with av.open(str(out)) as file:
        frame = next(file.decode(video=0))
        assert frame.format.name == "yuv420p10le"
        seen = frame.reformat(format="rgb48le").to_ndarray()
    assert len(np.unique(seen[32, :, 1])) > 20  # of 2000 / 257 = 8 levels of eight bits
    (again,) = read_all(out)
    assert again.image.dtype == np.uint16
    assert np.abs(again.image.astype(int) - ramp).max() < 100  # of 65535; one step of ten bits is 75


@pytest.mark.parametrize(
    ("name", "encoding", "words"),
    [
        ("o.mp4", Encoding("ffv1"), ".mp4 cannot hold ffv1 video"),
        ("o.webm", Encoding("h264"), ".webm cannot hold h264 video"),
        ("o.mkv", Encoding("ffv1", 3), "ffv1 is lossless"),
        ("o.mkv", Encoding("h264", 52), "quality 52 is out of range"),
        ("o.mkv", Encoding("mpeg2"), "codec mpeg2 is unknown"),
        ("folder", Encoding("h264"), "is not a video"),
    ],
)
def test_encodings_that_make_no_sense(tmp_path, name, encoding, words):
    source = write_video(tmp_path / "a.mp4", [picture()])
    with open_reader(source) as reader:
        assert words in refusal(open_writer, tmp_path / name, reader, height=32, width=48, encoding=encoding)
    assert os.listdir(tmp_path) == ["a.mp4"]


def test_tags_that_are_not_utf_8_do_no_harm(tmp_path: Path) -> None:
    """As old files have them; PyAV 19 tells their bytes, older ones replace them."""
    clip, output = tmp_path / "in.avi", tmp_path / "out.mkv"
    with av.open(str(clip), "w") as container:
        container.metadata["title"] = "Cafe Muller"
        stream = container.add_stream("mpeg4", rate=25, width=32, height=32)
        for packet in [*stream.encode(av.VideoFrame(32, 32, "yuv420p")), *stream.encode(None)]:
            container.mux(packet)
    content = clip.read_bytes()
    assert content.count(b"Cafe Muller") == 1
    clip.write_bytes(content.replace(b"Cafe Muller", b"Caf\xe9 M\xfcller"))
    with open_reader(clip) as reader, open_writer(output, reader, height=32, width=32) as writer:
        for frame in reader:
            writer.write(frame.image, frame)
    with open_reader(output) as reader:
        assert len(list(reader)) == 1


def test_a_video_that_claims_too_many_pixels_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    """A file of a few bytes could ask for all memory there is."""
    monkeypatch.setattr("stablevsr.media.video_reader.MAX_PIXELS", 80 * 60 - 1)
    with pytest.raises(UserError, match=r"demo\.mp4 is 80x60, but at most 4799 pixels can be read"):
        open_reader(Path(__file__).parent.parent / "stablevsr/assets/demo.mp4")


def test_the_list_of_codecs_needs_neither_ffmpeg_nor_pillow() -> None:
    """It is part of a command's help, which should come at once."""
    code = "import sys; from stablevsr.media import CODECS; sys.exit(any(x in sys.modules for x in ('av', 'PIL')))"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
