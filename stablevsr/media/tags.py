"""Metadata (title, date, place, camera, time code) carried over to another container."""

from dataclasses import dataclass
from fractions import Fraction
from typing import TYPE_CHECKING

import av

if TYPE_CHECKING:
    from av.container.core import Chapter  # which is in PyAV's stubs only

_OF_THE_FILE = ("encoder", "major_brand", "minor_version", "compatible_brands", "duration", "timecode", "software")
_OF_THE_STREAM = ("language", "title", "creation_time", "handler_name")
# Tags with boxes of their own in MP4 and MOV; others need Apple's free-form keys.
_IN_BOXES = (
    "title", "artist", "album_artist", "composer", "album", "date", "comment", "genre", "copyright", "grouping",
    "lyrics", "description", "synopsis", "show", "episode_id", "network", "keywords", "episode_sort",
    "season_number", "media_type", "hd_video", "gapless_playback", "compilation", "track", "disc", "location",
    "creation_time",
)  # fmt: skip


@dataclass(frozen=True)
class Tags:
    """Metadata and chapters of a file; `timecode` belongs to its picture."""

    metadata: dict[str, str]
    chapters: "list[Chapter]"
    timecode: str | None

    @classmethod
    def of(cls, container: av.container.InputContainer) -> "Tags":
        """The metadata that also applies to the copy."""
        tags = container.metadata
        timecodes = [tags.get("timecode"), *(stream.metadata.get("timecode") for stream in container.streams)]
        # FFmpeg adds "location-eng" beside a location in English.
        again = [key for key in tags if "-" in key and key.split("-")[0] in tags]
        kept = {key: value for key, value in tags.items() if key.lower() not in _OF_THE_FILE and key not in again}
        if "creation_time" in kept:  # FFmpeg 9 joins the dates of several boxes
            kept["creation_time"] = kept["creation_time"].split(";")[0]
        return cls(kept, container.chapters(), next(filter(None, timecodes), None))

    @property
    def need_free_names(self) -> bool:
        """Whether MP4 and MOV can keep them all only under free-form keys."""
        return any(key.lower().split("-")[0] not in _IN_BOXES for key in self.metadata)


def describe(copy: av.stream.Stream, stream: av.stream.Stream) -> None:
    """Copy the disposition and tags of one stream."""
    copy.disposition = stream.disposition
    copy.metadata.update({key: value for key, value in stream.metadata.items() if key.lower() in _OF_THE_STREAM})


def write_tags(tags: Tags, output: av.container.OutputContainer, picture: av.VideoStream, later: Fraction) -> None:
    """Write a source's metadata to an output that has not been started; chapters move by `later` seconds."""
    output.metadata.update(tags.metadata)
    output.set_chapters([_moved(chapter, later) for chapter in tags.chapters])
    if tags.timecode:
        picture.metadata["timecode"] = tags.timecode


def _moved(chapter: "Chapter", later: Fraction) -> "Chapter":
    base = chapter["time_base"]
    ticks = round(later / base) if base else 0
    return {**chapter, "start": max(0, chapter["start"] + ticks), "end": max(0, chapter["end"] + ticks)}
