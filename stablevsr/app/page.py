"""The page of the app: its parts, and what happens when they are used."""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import gradio as gr
import numpy as np

from stablevsr.app import texts
from stablevsr.app.clips import ClipFacts, look_at, read_frame
from stablevsr.app.runs import Runs
from stablevsr.app.settings import Settings, options_of, settings_of
from stablevsr.app.studio import Studio
from stablevsr.engine import plan
from stablevsr.engine.progress import Progress
from stablevsr.errors import UserError

TITLE = "StableVSR"


def build_page(studio: Studio, max_upload: int) -> gr.Blocks:
    """The page, not served yet.

    Args:
        max_upload: bytes of a file that it may send.
    """
    with gr.Blocks(title=TITLE, analytics_enabled=False) as page:
        gr.HTML(texts.heading(studio), elem_id="head")
        facts = gr.State(None)
        with gr.Row(equal_height=False):
            with gr.Column(scale=5, min_width=340):
                clip = gr.File(
                    label=f"A video, an animation or an image, up to {plan.size(max_upload)}",
                    elem_id="clip",
                    height=130,
                )
                about = gr.HTML(elem_id="about")
                part = handles()
                settings = settings_of(studio)
                start = gr.Button("Upscale", variant="primary", interactive=False, elem_id="start")
                told = gr.HTML(elem_id="told")
            with gr.Column(scale=7, min_width=340):
                view = View.make()
        runs = Runs.make(studio)
        clip.change(take_clip, clip, [facts, about, part, start, view.number, view.button, view.frame, view.pair])
        part.change(lambda value: value["moved"], part, view.number, show_progress="hidden", api_visibility="private")
        view.connect(studio, facts, settings)
        start.click(
            submitting(studio),
            [facts, part, settings.format, *settings.sampling()],
            [told, runs.chosen],
            api_visibility="private",
        ).then(runs.refresh, [runs.chosen, runs.shown], runs.parts(), show_progress="hidden", api_visibility="private")
        runs.connect(page)
    return page


def handles() -> gr.HTML:
    """The part of the clip, with two handles. Its value is {first, last, count, rate, moved}; see handles.js."""
    return gr.HTML(
        None,
        html_template=texts.asset("handles.html"),
        js_on_load=texts.asset("handles.js"),
        visible=False,
        elem_id="part",
    )


def take_clip(path: str | None) -> list[Any]:
    """A new clip, or none: what is known of it, its handles and its first frame."""
    nothing = [gr.update(visible=False), gr.update(interactive=False), gr.update(visible=False)]
    nothing += [gr.update(interactive=False), gr.update(value=None), gr.update(visible=False)]
    if path is None:
        return [None, "", *nothing]
    try:
        facts = look_at(Path(path))
        picture = read_frame(facts.path, 0)
    except UserError as error:
        return [None, texts.problem(error), *nothing]
    last = facts.frame_count - 1
    part = {"first": 0, "last": last, "count": facts.frame_count, "rate": facts.frame_rate, "moved": 0}
    return [
        facts,
        texts.about_clip(facts),
        gr.update(value=part, visible=facts.is_video),
        gr.update(interactive=True),
        gr.update(maximum=max(1, last), value=0, visible=facts.is_video),
        gr.update(interactive=True),
        gr.update(value=picture, visible=True),
        gr.update(visible=False),
    ]


def submitting(studio: Studio) -> Callable[..., tuple[str, Any]]:
    """The handler of the button that starts a run."""

    def submit(facts: ClipFacts, part: dict[str, Any], format: str, *options: Any) -> tuple[str, Any]:
        try:
            config = options_of(studio, *options)
            job = studio.submit(facts, int(part["first"]), int(part["last"]), config, format)
        except UserError as error:
            return texts.problem(error), gr.skip()
        ahead = studio.jobs.ahead_of(job.number)
        waits = f" It waits for {ahead[-1].name}, which is {ahead[-1].state}." if ahead else ""
        return texts.note(f"{job.name} is in the list of runs.{waits}"), job.number

    return submit


@dataclass(frozen=True)
class View:
    """A frame of the clip, and its preview."""

    number: gr.Slider
    frame: gr.Image
    pair: gr.ImageSlider
    button: gr.Button
    stop: gr.Button
    told: gr.HTML

    @classmethod
    def make(cls) -> "View":
        shared = {"height": 420, "interactive": False, "buttons": ["fullscreen"]}
        frame = gr.Image(label="Frame", format="png", elem_id="frame", **shared)
        pair = gr.ImageSlider(
            label="Bicubic left, upscaled right", format="png", visible=False, elem_id="pair", max_height=420, **shared
        )
        number = gr.Slider(0, 1, step=1, value=0, label="Frame to show", visible=False, elem_id="number")
        with gr.Row():
            button = gr.Button("Preview this frame", interactive=False, elem_id="preview")
            stop = gr.Button("Stop the preview", visible=False, variant="stop", elem_id="stop-preview")
        return cls(number, frame, pair, button, stop, gr.HTML(elem_id="preview-told"))

    def connect(self, studio: Studio, facts: gr.State, settings: Settings) -> None:
        quiet = {"show_progress": "hidden", "api_visibility": "private"}
        self.number.change(
            show_frame, [facts, self.number], [self.frame, self.pair, self.told], trigger_mode="always_last", **quiet
        )
        running = self.button.click(
            lambda: (gr.update(visible=False), gr.update(visible=True), ""),
            outputs=[self.button, self.stop, self.told],
            **quiet,
        ).then(
            previewing(studio),
            [facts, self.number, *settings.sampling()],
            [self.frame, self.pair, self.told],
            show_progress_on=[self.frame, self.pair],
            api_visibility="private",
        )
        running.then(
            lambda: (gr.update(visible=True), gr.update(visible=False)), outputs=[self.button, self.stop], **quiet
        )
        self.stop.click(studio.stop_preview, queue=False, **quiet)


def show_frame(facts: ClipFacts | None, index: float) -> tuple[Any, Any, Any]:
    """Show a frame of the clip in place of the preview of another one."""
    if facts is None or not facts.is_video:
        return gr.skip(), gr.skip(), gr.skip()
    try:
        picture = read_frame(facts.path, min(int(index), facts.frame_count - 1))
    except UserError as error:
        return gr.update(value=None, visible=True), gr.update(visible=False), texts.problem(error)
    return gr.update(value=picture, visible=True), gr.update(visible=False), ""


def previewing(studio: Studio) -> Callable[..., tuple[Any, Any, Any]]:
    """The handler that upscales one frame."""

    def preview(
        facts: ClipFacts,
        index: float,
        preset: str,
        steps: float | None,
        seed: float | None,
        strength: float,
        size: str,
        color: str,
        bar: gr.Progress = gr.Progress(),  # noqa: B008  # how Gradio asks for it
    ) -> tuple[Any, Any, Any]:
        def show(now: Progress) -> None:
            what, unit, _ = texts.phase(now)
            bar((now.done, now.total), desc=what, unit=unit)

        try:
            config = options_of(studio, preset, steps, seed, strength, size, color)
            pair: tuple[np.ndarray, np.ndarray] | None = studio.preview(facts.path, int(index), config, show)
        except UserError as error:
            return gr.skip(), gr.skip(), texts.problem(error)
        if pair is None:
            return gr.skip(), gr.skip(), texts.note("The preview was stopped.")
        alone = "The frame on its own; a run also uses its neighbors." if facts.is_video else ""
        return gr.update(visible=False), gr.update(value=pair, visible=True), texts.note(alone)

    return preview
