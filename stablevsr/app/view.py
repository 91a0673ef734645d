"""The frame on the page, the part of it that a preview takes, and the preview."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import gradio as gr
import numpy as np
from gradio.processing_utils import save_pil_to_cache
from PIL import Image, ImageDraw

from stablevsr.app import texts
from stablevsr.app.clips import ClipFacts, read_frame
from stablevsr.app.settings import FOURFOLD, Settings, options_of
from stablevsr.app.studio import Box, Studio, writing_to
from stablevsr.engine.progress import Progress
from stablevsr.errors import UserError

WHOLE = "the whole frame"
AREAS = {WHOLE: None, "320×240 pixels": (320, 240), "160×120 pixels": (160, 120)}
LARGE = 480 * 270  # pixels of a frame above which only a part of it is previewed, unless asked
MAX_SHOWN = 1280  # pixels of the longer side of the frame on the page
MIDDLE = (0.5, 0.5)
OUTLINE = (99, 102, 241)  # the page's accent


@dataclass(frozen=True)
class View:
    """A frame of the clip, and its preview."""

    number: gr.Slider
    frame: gr.Image
    pair: gr.ImageSlider
    area: gr.Dropdown
    spot: gr.State  # the middle of the part, as shares of width and height
    button: gr.Button
    stop: gr.Button
    back: gr.Button
    told: gr.HTML

    @classmethod
    def make(cls) -> "View":
        shared = {"height": 420, "interactive": False, "buttons": ["fullscreen"]}
        frame = gr.Image(label="Frame", format="png", elem_id="frame", **shared)
        pair = gr.ImageSlider(
            label="Bicubic left, upscaled right", format="png", visible=False, elem_id="pair", max_height=420, **shared
        )
        number = gr.Slider(0, 1, step=1, value=0, label="Frame to show", visible=False, elem_id="number")
        area = gr.Dropdown(
            list(AREAS),
            value=WHOLE,
            label="Preview of (click into the frame to move it)",
            visible=False,
            elem_id="area",
        )
        with gr.Row():
            button = gr.Button("Preview", interactive=False, elem_id="preview")
            stop = gr.Button("Stop the preview", visible=False, variant="stop", elem_id="stop-preview")
            back = gr.Button("Back to the frame", visible=False, elem_id="back")
        return cls(number, frame, pair, area, gr.State(MIDDLE), button, stop, back, gr.HTML(elem_id="preview-told"))

    def of_clip(self) -> list[Any]:
        """The outputs of `with_clip` and `without_clip`."""
        return [self.number, self.frame, self.pair, self.area, self.spot, self.button, self.back, self.told]

    @staticmethod
    def with_clip(studio: Studio, facts: ClipFacts) -> list[Any]:
        """Show the first frame of a new clip.

        Raises:
            InputError: when it cannot be read.
            ResourceError: when there is no room for its picture.
        """
        area, last = first_area(facts), facts.frame_count - 1
        return [
            gr.update(maximum=max(1, last), value=0, visible=facts.is_video),
            gr.update(value=file_of(studio, picture_of(facts, 0, area, MIDDLE)), visible=True),
            gr.update(visible=False),
            gr.update(value=area, visible=True),
            MIDDLE,
            gr.update(interactive=True),
            gr.update(visible=False),
            "",
        ]

    @staticmethod
    def without_clip() -> list[Any]:
        hidden, empty = gr.update(visible=False), gr.update(value=None, visible=True)
        return [hidden, empty, hidden, hidden, MIDDLE, gr.update(interactive=False), hidden, ""]

    def connect(self, studio: Studio, facts: gr.State, settings: Settings) -> None:
        quiet = {"show_progress": "hidden", "api_visibility": "private"}
        place, shown = [facts, self.number, self.area, self.spot], [self.frame, self.pair, self.back, self.told]
        show_frame = showing(studio)
        for event in (self.number.change, self.area.input, self.back.click):
            event(show_frame, place, shown, trigger_mode="always_last", **quiet)
        self.frame.select(move, self.frame, self.spot, **quiet).then(show_frame, place, shown, **quiet)
        running = self.button.click(
            lambda: (gr.update(visible=False), gr.update(visible=True), ""),
            outputs=[self.button, self.stop, self.told],
            **quiet,
        ).then(
            previewing(studio),
            [*place, *settings.sampling()],
            shown,
            show_progress_on=[self.frame, self.pair],
            api_visibility="private",
        )
        running.then(
            lambda: (gr.update(visible=True), gr.update(visible=False)), outputs=[self.button, self.stop], **quiet
        )
        self.stop.click(studio.stop_preview, queue=False, **quiet)


def first_area(facts: ClipFacts) -> str:
    """What is previewed of a new clip."""
    return WHOLE if facts.width * facts.height <= LARGE else next(name for name, size in AREAS.items() if size)


def box_of(facts: ClipFacts, area: str, spot: tuple[float, float]) -> Box | None:
    """The part of a frame, moved inside; None for all of it."""
    size = AREAS[area]
    if size is None or (size[0] >= facts.width and size[1] >= facts.height):
        return None
    sides = (facts.width, facts.height)
    lengths = [min(length, side) for length, side in zip(size, sides, strict=True)]
    starts = [
        min(max(0, round(share * side - length / 2)), side - length)
        for share, side, length in zip(spot, sides, lengths, strict=True)
    ]
    return Box(starts[0], starts[1], lengths[0], lengths[1])


def picture_of(facts: ClipFacts, index: int, area: str, spot: tuple[float, float]) -> Image.Image:
    """A frame for the page, not larger than it needs, with an outline around the part that a preview takes."""
    image = Image.fromarray(read_frame(facts.path, index))
    image.thumbnail((MAX_SHOWN, MAX_SHOWN))
    box, scale = box_of(facts, area, spot), image.width / facts.width
    if box is not None:
        corners = [scale * each for each in (box.left, box.top, box.left + box.width, box.top + box.height)]
        ImageDraw.Draw(image).rectangle(corners, outline=OUTLINE, width=max(1, round(image.width / 320)))
    return image


def file_of(studio: Studio, picture: Image.Image) -> str:
    """The file of a picture for the page, where Gradio itself would put it.

    Raises:
        ResourceError: when it cannot be written, which Gradio would not say in a sentence.
    """
    with writing_to(studio.folders.uploads):
        return save_pil_to_cache(picture, cache_dir=str(studio.folders.uploads), format="png")


def showing(studio: Studio) -> Callable[..., tuple[Any, ...]]:
    """The handler that shows a frame of the clip in place of the preview of another one."""

    def show_frame(facts: ClipFacts | None, index: float, area: str, spot: tuple[float, float]) -> tuple[Any, ...]:
        if facts is None:
            return gr.skip(), gr.skip(), gr.skip(), gr.skip()
        hidden = gr.update(visible=False)
        try:
            picture = file_of(studio, picture_of(facts, min(int(index), facts.frame_count - 1), area, spot))
        except UserError as error:
            return gr.update(value=None, visible=True), hidden, hidden, texts.problem(error)
        return gr.update(value=picture, visible=True), hidden, hidden, ""

    return show_frame


def move(shown: np.ndarray, event: gr.SelectData) -> tuple[float, float]:
    """The place of a click, as shares of width and height."""
    return event.index[0] / shown.shape[1], event.index[1] / shown.shape[0]


def previewing(studio: Studio) -> Callable[..., tuple[Any, ...]]:
    """The handler that upscales one frame, or a part of it."""

    # Gradio puts the bar where it stands among the parameters; first, for any number of values can follow.
    def preview(bar: gr.Progress = gr.Progress(), *values: Any) -> tuple[Any, ...]:  # noqa: B008
        facts, index, area, spot, preset, steps, seed, strength, _, color = values

        def show(now: Progress) -> None:
            what, unit, _ = texts.phase(now)
            bar((now.done, now.total), desc=what, unit=unit)

        try:
            config = options_of(studio, preset, steps, seed, strength, FOURFOLD, color)
            found = studio.preview(facts.path, int(index), box_of(facts, area, spot), config, show)
            pair = found and tuple(file_of(studio, Image.fromarray(picture)) for picture in found)
        except UserError as error:
            return gr.skip(), gr.skip(), gr.skip(), texts.problem(error)
        if pair is None:
            return gr.skip(), gr.skip(), gr.skip(), texts.note("The preview was stopped.")
        alone = "The frame on its own, four times as large; a run also uses its neighbors."
        told = texts.note(alone if facts.is_video else "")
        return gr.update(visible=False), gr.update(value=pair, visible=True), gr.update(visible=True), told

    return preview
