"""The final mux: the finished picture and the source's other streams in one file."""

from collections.abc import Iterable, Iterator, Sequence
from contextlib import closing
from dataclasses import dataclass, replace
from fractions import Fraction
from pathlib import Path

import av

from stablevsr.media.copies import StreamCopies
from stablevsr.media.demuxing import decoded_at, exact, open_input
from stablevsr.media.tags import Tags, write_tags
from stablevsr.media.timeline import Timeline
from stablevsr.media.tracks import Choice

_FAST_START = "+faststart"  # index in front, so that playback can start before the download ends
_FREE_NAMES = "+use_metadata_tags"


@dataclass(frozen=True)
class PacketTimes:
    """Presentation time, decoding time and duration of a picture packet, in units of time_base seconds."""

    shown: int
    decoded: int
    duration: int
    time_base: Fraction


@dataclass(frozen=True)
class Companions:
    """What accompanies the picture: streams chosen from the file at `source`, and its metadata."""

    source: Path
    timeline: Timeline
    streams: list[Choice]
    tags: Tags


def muxer_options(form: str, tags: Tags | None = None, covers: bool = False) -> dict[str, str]:
    """FFmpeg's muxer options for the container `form`.

    `covers`: whether cover art is kept, which MP4 does not allow together with free-form tag names.
    """
    options = {"fflags": "+bitexact"}  # no random IDs: the same run gives the same file
    if form in ("mp4", "mov"):
        free = _FREE_NAMES if tags and tags.need_free_names and not covers else ""
        # The default time scale of 1000 would round the late start of a stream to milliseconds.
        options |= {"movie_timescale": "90000", "movflags": _FAST_START + free}
    elif form == "avi":
        # FFmpeg shifts the whole file when audio starts before 0 (AAC always does), which AVI would round to a frame.
        options |= {"avoid_negative_ts": "disabled"}
    return options


def join(
    picture: Path,
    times: list[PacketTimes],
    companions: Companions,
    target: Path,
    form: str,
    until: Fraction | None = None,
) -> list[str]:
    """Write `picture` (a file with one stream, whose packets have `times`) and `companions` to `target`.

    `until`: seconds of the source after which nothing more is copied, for a rehearsal. Returns messages about damaged
    streams. Raises TrackError for a stream that cannot be written, av.FFmpegError or OSError for the file as a whole.
    """
    covers = any(choice.how == "cover" for choice in companions.streams)
    options = muxer_options(form, companions.tags, covers)
    with open_input(picture) as finished, av.open(str(target), "w", format=form, container_options=options) as output:
        template = finished.streams.video[0]
        copy = _add_picture(output, template, times[0].time_base)
        copies = StreamCopies(companions.source, output, companions.streams, companions.timeline, until)
        with closing(copies):
            write_tags(companions.tags, output, copy, companions.timeline.start)
            output.start_encoding()
            for packet in _timed(finished, template, times):
                time = decoded_at(packet)
                packet.stream = copy
                output.mux_one(packet)
                copies.copy_until(time)
            copies.copy_until(None)
    return copies.failures


def concatenate(pieces: Sequence[tuple[Path, Iterable[PacketTimes]]], target: Path, form: str) -> list[PacketTimes]:
    """Write files with one stream, all of one encoder, each with the times of its packets, to `target` end to end.

    Returns the times of all packets. Raises av.FFmpegError or OSError.
    """
    found: list[PacketTimes] = []
    with av.open(str(target), "w", format=form, container_options=muxer_options(form)) as output:
        copy = None
        for path, times in pieces:
            times = _rising(list(times), found[-1].decoded if found else None)
            with open_input(path) as piece:
                template = piece.streams.video[0]
                if copy is None:
                    copy = _add_picture(output, template, times[0].time_base)
                    output.start_encoding()
                for packet in _timed(piece, template, times):
                    packet.stream = copy
                    output.mux_one(packet)
            found += times
    return found


def _rising(times: list[PacketTimes], last: int | None) -> list[PacketTimes]:
    """Times of decoding after `last`: where frames come irregularly, an encoder may begin too early for its piece."""
    found = []
    for time in times:
        if last is not None and time.decoded <= last:
            time = replace(time, decoded=last + 1)
        last = time.decoded
        found.append(time)
    return found


def _add_picture(output: av.container.OutputContainer, template: av.VideoStream, base: Fraction) -> av.VideoStream:
    copy = output.add_stream_from_template(template, opaque=True)
    copy.time_base = base
    if template.average_rate:
        copy.codec_context.framerate = template.average_rate
    if template.sample_aspect_ratio:  # which the container may say without the codec
        copy.codec_context.sample_aspect_ratio = exact(template.sample_aspect_ratio)
    if output.format.name in ("mp4", "mov", "avi"):  # Matroska has no tags; FFmpeg's demuxer makes one up
        copy.codec_context.codec_tag = template.codec_context.codec_tag
    return copy


def _timed(
    finished: av.container.InputContainer, stream: av.VideoStream, times: list[PacketTimes]
) -> Iterator[av.Packet]:
    # Containers round times and drop some; the encoder's are exact.
    packets = (packet for packet in finished.demux(stream) if packet.size)
    for packet, time in zip(packets, times, strict=True):
        packet.pts, packet.dts, packet.duration, packet.time_base = (
            time.shown,
            time.decoded,
            time.duration,
            time.time_base,
        )
        yield packet
