"""Decides for each stream of a source whether the output copies, re-encodes, attaches or drops it."""

import io
from collections import defaultdict
from dataclasses import dataclass, field
from fractions import Fraction
from itertools import islice
from pathlib import Path
from typing import Literal

import av
from av.stream import AttachmentStream

from stablevsr.media.demuxing import codec_name, decoded_at, is_cover, open_input, picture_streams
from stablevsr.media.sound import TOLERANCE, SoundFormat, can_decode, default_layout, sound_format
from stablevsr.media.subtitles import ENCODERS as TEXT_ENCODERS
from stablevsr.media.subtitles import can_convert
from stablevsr.media.timeline import Timeline

_SAMPLE = 400  # packets read for trying what a container takes
_TRIED = 4  # packets tried of each stream
_MAX_PADDING = Fraction(1, 10)  # seconds that decoders need to start; more was cut off by an editor
_IMAGE_NAMES = {"mjpeg": ("cover.jpg", "image/jpeg"), "png": ("cover.png", "image/png")}


@dataclass(frozen=True)
class Choice:
    """How the output takes one stream.

    index: of the stream in the source.
    how: copied; re-encoded sound or text; a cover, as a stream of one picture; an attached file.
    sound: the format of re-encoded sound.
    origin: the second at which that sound has to start; None keeps the start of the source.
    attachment: name, MIME type and content of an attached file.
    """

    index: int
    how: Literal["copy", "sound", "text", "cover", "attach"]
    sound: SoundFormat | None = None
    origin: Fraction | None = None
    attachment: tuple[str, str, bytes] | None = None


@dataclass
class Choices:
    """Choices for all streams but the picture; `notices` reports what is changed or dropped."""

    streams: list[Choice] = field(default_factory=list)
    notices: list[str] = field(default_factory=list)


def choose(source: Path, form: str, target: Path, timeline: Timeline) -> Choices:
    """Try which streams of `source` the container `form` (FFmpeg's name) takes; the file will be `target`."""
    with open_input(source) as container:
        return _Chooser(container, source, form, target, timeline).choices


class _Chooser:
    def __init__(
        self, container: av.container.InputContainer, source: Path, form: str, target: Path, timeline: Timeline
    ) -> None:
        self._container, self._source, self._form, self._target = container, source, form, target
        self._timeline = timeline
        self.choices = Choices()
        self._picture = picture_streams(container, source)[0]
        self._first = _first_packets(container)
        for stream in container.streams:
            if stream.index != self._picture.index:
                self._add(stream)

    @property
    def _suffix(self) -> str:
        return self._target.suffix

    def _add(self, stream: av.stream.Stream) -> None:
        if is_cover(stream):
            self._add_cover(stream)
        elif isinstance(stream, av.AudioStream):
            self._add_sound(stream)
        elif stream.type == "subtitle":
            self._add_subtitles(stream)
        elif isinstance(stream, AttachmentStream):
            self._add_attachment(stream)
        elif stream.type in ("data", "unknown") and not _is_kept_otherwise(stream, self._container):
            self._leave_out(f"a stream of data ({_data_name(stream)})")
        # The reader reports other videos.

    def _add_sound(self, stream: av.AudioStream) -> None:
        trouble, origin = self._trouble(stream)
        if trouble is None:
            self._keep(Choice(stream.index, "copy"))
            return
        how = sound_format(stream, self._form)
        if how and can_decode(stream, self._first[stream.index]):
            self._keep(Choice(stream.index, "sound", how, origin))
            ending = "nothing else is changed" if self._form == "matroska" else "a .mkv file would keep it"
            self.choices.notices.append(
                f"{self._suffix} cannot hold {trouble}, so it is encoded again as {how.encoder}; {ending}"
            )
        else:
            others = len(self._container.streams.audio) > 1
            self.choices.notices.append(
                f"{self._suffix} cannot hold the {codec_name(stream)} audio of {self._source.name} (stream "
                f"{stream.index}) and it cannot be decoded, so it is left out"
                f"{'' if others else '; the result has no sound'}"
            )

    def _trouble(self, stream: av.AudioStream) -> tuple[str | None, Fraction | None]:
        """Return why a sound cannot be copied, None if it can; and the second at which it has to start, if any."""
        name = codec_name(stream)
        if stream.codec_context is None:  # FFmpeg has no decoder
            return f"{name} audio", None
        start = (stream.start_time or 0) * (stream.time_base or 0) + self._timeline.start
        # The AVI muxer fills the gap before a late picture, but not before late sound.
        if self._form == "avi" and abs(start) > TOLERANCE:
            return f"{name} audio that begins at another time than the picture", Fraction(0)
        # PyAV before 19 neither reads nor writes it.
        hidden = getattr(stream.codec_context, "initial_padding", 0)
        if self._form in ("matroska", "webm") and hidden > _MAX_PADDING * stream.codec_context.sample_rate:
            return f"{name} audio of which the beginning was cut off", None
        return (None if self._takes(stream) else f"{name} audio"), None

    def _add_subtitles(self, stream: av.stream.Stream) -> None:
        name = codec_name(stream)
        if self._timeline.seams:
            self._leave_out(f"{name} subtitles (their times start again)")
        elif self._takes(stream):
            self._keep(Choice(stream.index, "copy"))
        elif can_convert(stream, self._form):
            self._keep(Choice(stream.index, "text"))
            self.choices.notices.append(
                f"{self._suffix} cannot hold {name} subtitles, so they are converted to {TEXT_ENCODERS[self._form]}"
            )
        else:
            self.choices.notices.append(f"{self._suffix} cannot hold {name} subtitles, so they are left out")

    def _add_cover(self, stream: av.stream.Stream) -> None:
        first = next(iter(self._first[stream.index]), None)
        name, kind = _IMAGE_NAMES.get(codec_name(stream), ("", ""))
        if first is None or not name or self._form not in ("mp4", "matroska"):
            self._leave_out("a picture on the cover")
        elif self._form == "mp4":
            self._keep(Choice(stream.index, "cover"))
        else:
            file = (stream.metadata.get("filename", name), stream.metadata.get("mimetype", kind), bytes(first))
            self._keep(Choice(stream.index, "attach", attachment=file))

    def _add_attachment(self, stream: AttachmentStream) -> None:
        name = stream.metadata.get("filename", f"attachment {stream.index}")
        if self._form != "matroska":
            self._leave_out(f"the attached file {name}")
            return
        kind = stream.metadata.get("mimetype", "application/octet-stream")
        self._keep(Choice(stream.index, "attach", attachment=(name, kind, bytes(stream.data))))

    def _keep(self, choice: Choice) -> None:
        self.choices.streams.append(choice)

    def _leave_out(self, what: str) -> None:
        self.choices.notices.append(f"{self._suffix} cannot hold {what} of {self._source.name}, so it is left out")

    def _takes(self, stream: av.stream.Stream) -> bool:
        """Whether a file in this container can be written with just the first packets of this stream."""
        if stream.codec_context is None:
            return False
        packets, file = self._first[stream.index] if stream.type == "audio" else [], io.BytesIO()
        try:
            with av.open(file, "w", format=self._form) as trial:
                copy = add_copy(trial, stream)
                trial.start_encoding()
                for packet in packets:
                    trial.mux_one(_cloned(packet, copy))
            return self._form != "avi" or not packets or _lasts_as_long(file, packets)
        except (av.FFmpegError, ValueError):
            return False


def add_copy(output: av.container.OutputContainer, stream: av.stream.Stream) -> av.stream.Stream:
    """Add a stream to `output` for the unchanged packets of `stream`. Raises ValueError if it cannot hold them."""
    copy = output.add_stream_from_template(stream, opaque=True)
    layout = default_layout(stream) if isinstance(stream, av.AudioStream) else None
    if layout and isinstance(copy, av.AudioStream):  # some containers insist on a layout
        copy.codec_context.layout = layout
    return copy


def _lasts_as_long(file: io.BytesIO, packets: list[av.Packet]) -> bool:
    """Whether packets read back from `file` last as long as those written: AVI stores rates, not times."""
    file.seek(0)
    with av.open(file, "r") as written:
        spans = [_length(packets), _length([packet for packet in written.demux(audio=0) if packet.size])]
    return abs(spans[0] - spans[1]) <= spans[0] / 2  # the granularity may be a packet


def _length(packets: list[av.Packet]) -> Fraction:
    first, last = packets[0], packets[-1]
    return decoded_at(last) + (last.duration or 0) * last.time_base - decoded_at(first)


def _cloned(packet: av.Packet, stream: av.stream.Stream) -> av.Packet:
    # Muxing changes the times of a packet.
    clone = av.Packet(bytes(packet))
    clone.pts, clone.dts, clone.duration, clone.time_base = packet.pts, packet.dts, packet.duration, packet.time_base
    clone.is_keyframe, clone.stream = packet.is_keyframe, stream
    if clone.dts is None:
        clone.dts = clone.pts
    return clone


def _first_packets(container: av.container.InputContainer) -> dict[int, list[av.Packet]]:
    """The first packets of each stream, if they come early in the file."""
    found: dict[int, list[av.Packet]] = defaultdict(list)
    latest: dict[int, Fraction] = {}
    try:
        for packet in islice(container.demux(), _SAMPLE):
            index, time = packet.stream_index, packet.dts if packet.dts is not None else packet.pts
            seconds = (time or 0) * packet.time_base  # cover art has no time
            rises = index not in latest or seconds > latest[index]  # others are corrected when copied
            if packet.size and rises and len(found[index]) < _TRIED:
                found[index].append(packet)
                latest[index] = seconds
    except av.FFmpegError:
        pass  # damaged; reading reports it
    return found


def _is_kept_otherwise(stream: av.stream.Stream, container: av.container.InputContainer) -> bool:
    """Time codes are kept as metadata, chapter titles with the chapters."""
    return "timecode" in stream.metadata or (bool(container.chapters()) and codec_name(stream) == "bin_data")


def _data_name(stream: av.stream.Stream) -> str:
    return stream.metadata.get("handler_name") or codec_name(stream)
