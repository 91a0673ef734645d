"""The page of the app: its parts, and what happens when they are used."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import gradio as gr

from stablevsr.app import texts
from stablevsr.app.clips import ClipFacts, look_at
from stablevsr.app.runs import Runs
from stablevsr.app.settings import options_of, settings_of
from stablevsr.app.studio import Studio
from stablevsr.app.view import View
from stablevsr.engine import plan
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
        clip.change(taking(studio), clip, [facts, about, part, start, *view.of_clip()])
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


def taking(studio: Studio) -> Callable[[str | None], list[Any]]:
    """The handler of a new clip, or none: what is known of it, its handles and its first frame."""

    def take_clip(path: str | None) -> list[Any]:
        nothing = [gr.update(visible=False), gr.update(interactive=False), *View.without_clip()]
        if path is None:
            return [None, "", *nothing]
        try:
            facts = look_at(Path(path))
            view = View.with_clip(studio, facts)
        except UserError as error:
            return [None, texts.problem(error), *nothing]
        last = facts.frame_count - 1
        part = {"first": 0, "last": last, "count": facts.frame_count, "rate": facts.frame_rate, "moved": 0}
        return [
            facts,
            texts.about_clip(facts),
            gr.update(value=part, visible=facts.is_video),
            gr.update(interactive=True),
            *view,
        ]

    return take_clip


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
