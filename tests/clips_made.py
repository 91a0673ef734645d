"""Clips and pictures to read, made with PyAV and imageio: small, and each with one thing that is special."""

import struct
import zlib
from collections.abc import Callable
from fractions import Fraction
from pathlib import Path

import av
import imageio.v3 as iio
import numpy as np
from av.stream import Disposition

TICKS = Fraction(1, 30000)


def picture(height=32, width=48, seed=0):
    """A smooth picture whose four corners differ, so that every flip and turn shows."""
    y, x = np.mgrid[:height, :width]
    red, green = 40 + 170 * x / width, 40 + 170 * y / height
    return np.stack([red, green, np.full_like(red, 20 * seed % 256)], -1).astype(np.uint8)


def write_video(path, images, *, pts=None, rotation=None, aspect=None, audio=None, codec="libx264", pix_fmt="yuv444p"):
    """A BT.601 video, lossless for libx264; `audio` is its length in seconds (AAC, mono)."""
    exact = {"movie_timescale": "30000"} if path.suffix == ".mp4" else {}  # else a late start is kept in milliseconds
    with av.open(str(path), "w", container_options=exact) as out:
        stream = out.add_stream(codec, rate=30, options={"qp": "0"} if codec == "libx264" else {}, time_base=TICKS)
        stream.height, stream.width, stream.pix_fmt = *images[0].shape[:2], pix_fmt
        if aspect:
            stream.codec_context.sample_aspect_ratio = aspect
        if rotation:
            stream.set_display_rotation(*rotation)
        sound = out.add_stream("aac", rate=48000, layout="mono") if audio else None
        if sound:
            sound.metadata["language"], sound.disposition = "deu", Disposition.comment
        for i, image in enumerate(images):
            frame = av.VideoFrame.from_ndarray(image, format="rgb24")
            frame.pts, frame.time_base = pts[i] if pts else i * 1000, TICKS
            out.mux(stream.encode(frame))
        out.mux(stream.encode(None))
        if sound:
            wave = np.sin(np.arange(int(48000 * audio)) / 20, dtype=np.float32)[None] * 0.3
            frame = av.AudioFrame.from_ndarray(wave, format="fltp", layout="mono")
            frame.sample_rate, frame.pts, frame.time_base = 48000, 0, Fraction(1, 48000)
            out.mux(sound.encode(frame))
            out.mux(sound.encode(None))
    return path


def flat_video(path, yuv, height, matrix, full):
    """One frame of one exact YUV colour, tagged with `matrix` (FFmpeg's number) and range."""
    with av.open(str(path), "w") as out:
        stream = out.add_stream("libx264", rate=25, options={"qp": "0", "preset": "ultrafast"})
        stream.height, stream.width, stream.pix_fmt = height, 32, "yuv420p"
        stream.codec_context.colorspace, stream.codec_context.color_range = (
            matrix,
            2 if full else 1 if matrix != 2 else 0,
        )
        frame = av.VideoFrame(32, height, "yuv420p")
        for plane, value in zip(frame.planes, yuv, strict=True):
            plane.update(bytes([value]) * plane.buffer_size)
        frame.color_range = stream.codec_context.color_range
        out.mux(stream.encode(frame))
        out.mux(stream.encode(None))
    return path


def deep_image(path, image, codec, source_format, pix_fmt):
    context = av.CodecContext.create(codec, "w")
    context.height, context.width, context.pix_fmt, context.time_base = *image.shape[:2], pix_fmt, Fraction(1)
    frame = av.VideoFrame.from_ndarray(image, format=source_format)
    path.write_bytes(b"".join(bytes(p) for p in context.encode(frame) + context.encode(None)))


def tagged_video(path, color_trc, height=16, width=24):
    """One frame of 10 bits with the transfer function of that number: 16 is PQ, 18 HLG."""
    with av.open(str(path), "w") as out:
        stream = out.add_stream("ffv1", rate=25, height=height, width=width, pix_fmt="yuv420p10le")
        stream.codec_context.color_trc = color_trc
        out.mux(stream.encode(av.VideoFrame.from_ndarray(picture(height, width), format="rgb24")))
        out.mux(stream.encode(None))
    return path


def interlaced_video(path, images, rotation=None):
    """Each of the images as two fields."""
    with av.open(str(path), "w") as out:
        stream = out.add_stream("libx264", rate=25, options={"x264-params": "interlaced=1", "qp": "0", "bf": "0"})
        stream.height, stream.width, stream.pix_fmt = *images[0].shape[:2], "yuv444p"
        if rotation:
            stream.set_display_rotation(*rotation)
        for image in images:
            out.mux(stream.encode(av.VideoFrame.from_ndarray(image, format="rgb24")))
        out.mux(stream.encode(None))
    return path


def transparent_video(path):
    """One frame of VP9 with alpha."""
    with av.open(str(path), "w") as out:
        stream = out.add_stream("libvpx-vp9", rate=25, height=16, width=24, pix_fmt="yuva420p")
        image = np.dstack([picture(16, 24), np.full((16, 24), 90, np.uint8)])
        out.mux(stream.encode(av.VideoFrame.from_ndarray(image, format="rgba")))
        out.mux(stream.encode(None))
    return path


def sound(path, codec, cover=False):
    """A file of sound, with a picture on its cover if wished."""
    with av.open(str(path), "w") as out:
        stream = out.add_stream(codec, rate=48000, layout="mono")
        if cover:
            art = out.add_stream("png", rate=1, height=16, width=24, pix_fmt="rgb24")
            art.disposition = Disposition.attached_pic
            out.mux(art.encode(av.VideoFrame.from_ndarray(picture(16, 24), format="rgb24")))
        frame = av.AudioFrame.from_ndarray(np.zeros((1, 1152), np.float32), format="fltp", layout="mono")
        frame.sample_rate = 48000
        out.mux(stream.encode(frame))
        out.mux(stream.encode(None))
    return path


def film(path, frames=3):
    """Video, sound in two languages, and subtitles."""
    with av.open(str(path), "w") as out:
        video = out.add_stream("libx264", rate=25, height=16, width=24, pix_fmt="yuv420p")
        tracks = [out.add_stream("aac", rate=48000, layout="mono") for _ in range(2)]
        text = out.add_mux_stream("subrip")
        out.start_encoding()
        for i in range(frames):
            out.mux(video.encode(av.VideoFrame.from_ndarray(picture(16, 24, i), format="rgb24")))
        words = av.Packet(b"Bonjour")
        words.stream, words.pts, words.dts, words.duration, words.time_base = text, 20, 20, 60, Fraction(1, 1000)
        out.mux(words)
        for track in tracks:
            frame = av.AudioFrame.from_ndarray(np.zeros((1, 4096), np.float32), format="fltp", layout="mono")
            frame.sample_rate, frame.pts = 48000, 0
            out.mux(track.encode(frame))
            out.mux(track.encode(None))
        out.mux(video.encode(None))
    return path


def joined_sizes(path):
    """Raw H.264 whose picture changes its size behind three frames."""
    parts = []
    for i, size in enumerate([(16, 24), (24, 32)]):
        part = write_video(path.with_name(f".part{i}.h264"), [picture(*size)] * 3)
        parts.append(part.read_bytes())
        part.unlink()
    path.write_bytes(b"".join(parts))
    return path


def damaged(path):
    """A video with rubbish in the middle of its fifth packet."""
    write_video(path, [np.roll(picture(64, 64, seed=i), 9 * i, axis=(0, 1)) for i in range(9)])
    data = bytearray(path.read_bytes())
    with av.open(str(path)) as file:
        start = [packet.pos for packet in file.demux(video=0) if packet.size][4]
    data[start + 40 : start + 50] = b"\x00\xff" * 5
    path.write_bytes(data)
    return path


def without_index(path):
    """An MP4 of whole boxes whose `moov` was never written."""
    data, kept, position = write_video(path, [picture(16, 24)] * 3).read_bytes(), b"", 0
    while position < len(data):
        size, kind = struct.unpack_from(">I4s", data, position)
        kept += b"" if kind == b"moov" else data[position : position + size]
        position += size
    path.write_bytes(kept)
    return path


def cut(path, count=100):
    """A video that lacks its last bytes."""
    path.write_bytes(write_video(path, [picture(16, 24, i) for i in range(9)]).read_bytes()[:-count])
    return path


def png_header(path, height, width):
    """A PNG that promises a size and holds next to nothing."""
    chunks = [(b"IHDR", struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)), (b"IDAT", zlib.compress(b"0"))]
    data = b"".join(
        struct.pack(">I", len(body)) + name + body + struct.pack(">I", zlib.crc32(name + body))
        for name, body in [*chunks, (b"IEND", b"")]
    )
    path.write_bytes(b"\x89PNG\r\n\x1a\n" + data)
    return path


def exif_turned(path):
    """A picture of 16 x 24 stored lying on its side."""
    exif = b"Exif\0\0MM\0*\0\0\0\x08\0\x01\x01\x12\0\x03\0\0\0\x01\0\x06\0\0\0\0\0\0"
    iio.imwrite(path, np.ascontiguousarray(np.rot90(picture(16, 24))), plugin="pillow", exif=exif)
    return path


def image(path, pixels=None, **options):
    """A picture by imageio."""
    iio.imwrite(path, picture(16, 24) if pixels is None else pixels, plugin="pillow", **options)
    return path


def folder_of(path, names, make: Callable[[Path, int], object] = lambda path, i: image(path)):
    """A folder of pictures, or of whatever else `make` makes of the n-th name."""
    path.mkdir()
    for i, name in enumerate(names):
        make(path / name, i)
    return path


FLASHES = (4, 9, 17)  # the frames of `flashing` that are white, each with a burst of sound; no two distances are equal
RATE = 25


def flashing(
    path,
    video="libx264",
    audio="aac",
    *,
    frames=25,
    rate=48000,
    layout="mono",
    late=0.0,
    form=None,
    options=None,
    flashes=FLASHES,
):
    """Black frames with white ones, and noise at the same times; the sound begins `late` seconds after the picture."""
    with av.open(str(path), "w", format=form, container_options=options or {}) as out:
        stream = out.add_stream(video, rate=RATE, height=32, width=48, pix_fmt="yuv420p")
        stream.codec_context.gop_size, stream.codec_context.max_b_frames = 10, 2 if video == "libx264" else 0
        sound = out.add_stream(audio, rate=rate, layout=layout, **({"bit_rate": 128000} if audio == "wmav2" else {}))
        out.start_encoding()
        packets = []
        for i in range(frames):
            image = np.full((32, 48, 3), 255 if i in flashes else 0, np.uint8)
            frame = av.VideoFrame.from_ndarray(image, format="rgb24")
            frame.pts, frame.time_base = i, Fraction(1, RATE)
            packets += stream.encode(frame)
        packets += stream.encode(None)
        packets += noise(sound, frames / RATE, late, flashes)
        for packet in sorted(packets, key=lambda packet: packet.dts * packet.time_base):
            out.mux(packet)
    return path


def noise(stream, seconds, late=0.0, flashes=FLASHES):
    """Packets of `stream` with bursts at the flashes, silence between."""
    rate, channels = stream.codec_context.sample_rate, len(stream.codec_context.layout.channels)
    samples = np.zeros(round(seconds * rate), np.float32)
    for flash in flashes:
        start, end = (round(i * rate / RATE) for i in (flash, flash + 1))
        samples[start:end] = np.random.default_rng(flash).uniform(-0.8, 0.8, len(samples[start:end]))
    first = round(late * rate)
    # One array whatever the layout: a resampler brings it into the encoder's own form.
    frame = av.AudioFrame.from_ndarray(
        np.ascontiguousarray(np.tile(samples[first:], (channels, 1))), format="fltp", layout=stream.codec_context.layout
    )
    frame.sample_rate, frame.time_base, frame.pts = rate, Fraction(1, rate), first
    resampler = av.AudioResampler(
        stream.codec_context.format, stream.codec_context.layout, rate, stream.codec_context.frame_size or 1024
    )
    parts = [*resampler.resample(frame), *resampler.resample(None)]
    return [packet for part in [*parts, None] for packet in stream.encode(part)]


def remuxed(path, source, change=lambda packet: [packet], keep=lambda stream: True):
    """The packets of a clip in another container, after `change` has made a list of each."""
    with av.open(str(source)) as file, av.open(str(path), "w") as out:
        copies = {s.index: out.add_stream_from_template(s, opaque=True) for s in file.streams if keep(s)}
        for packet in file.demux(*[file.streams[index] for index in copies]):
            if packet.size:
                for changed in change(packet):
                    changed.stream = copies[packet.stream_index]
                    out.mux(changed)
    return path


def with_extras(path, *, cover=None, attachments=(), tags=None, timecode=None, subtitles=None, audio=True):
    """A second of picture and perhaps sound, and things that only some containers hold.

    cover: bytes of a JPEG file; attachments: (name, type, content) each; subtitles: (codec, words).
    """
    with av.open(str(path), "w", container_options={"movflags": "use_metadata_tags"} if tags else {}) as out:
        video = out.add_stream("libx264", rate=RATE, height=32, width=48, pix_fmt="yuv420p")
        sound = out.add_stream("aac", rate=48000, layout="mono") if audio else None
        art = out.add_stream("mjpeg", rate=1, height=32, width=48, pix_fmt="yuvj420p") if cover else None
        text = out.add_stream(subtitles[0]) if subtitles else None
        for attachment in attachments:
            out.add_attachment(*attachment)
        out.metadata.update(tags or {})
        if timecode:
            video.metadata["timecode"] = timecode
        if art:
            art.disposition = Disposition.attached_pic
        if text:
            text.codec_context.subtitle_header, text.time_base = ASS_HEADER, Fraction(1, 1000)
            text.codec_context.time_base = Fraction(1, 1000)
        out.start_encoding()
        if art:
            packet = av.Packet(cover)
            packet.pts = packet.dts = 0
            packet.stream, packet.is_keyframe = art, True
            out.mux(packet)
        if text:
            words = av.subtitles.subtitle.SubtitleSet.create(b"0,0,Default,,0,0,0,," + subtitles[1], 0, 800, 100)
            packet = text.codec_context.encode_subtitle(words)
            packet.pts = packet.dts = 100
            packet.duration, packet.time_base, packet.stream = 800, Fraction(1, 1000), text
            out.mux(packet)
        for i in range(RATE):
            out.mux(video.encode(av.VideoFrame.from_ndarray(picture(seed=i), format="rgb24")))
        out.mux(video.encode(None))
        out.mux(noise(sound, 1) if sound else [])
    return path


ASS_HEADER = b"""[Script Info]
ScriptType: v4.00+

[V4+ Styles]
Format: Name, Fontname, Fontsize, PrimaryColour, SecondaryColour, OutlineColour, BackColour, Bold, Italic, Underline, \
StrikeOut, ScaleX, ScaleY, Spacing, Angle, BorderStyle, Outline, Shadow, Alignment, MarginL, MarginR, MarginV, Encoding
Style: Default,Arial,16,&Hffffff,&Hffffff,&H0,&H0,0,0,0,0,100,100,0,0,1,1,0,2,10,10,10,1

[Events]
Format: Layer, Start, End, Style, Name, MarginL, MarginR, MarginV, Effect, Text
"""
