"""The page of the app: its parts, and what happens when they are used. The only room that imports Gradio."""

import re
from collections.abc import Callable
from dataclasses import dataclass
from importlib import resources
from pathlib import Path
from typing import Any

import gradio as gr
import numpy as np

from stablevsr.app import texts
from stablevsr.app.clips import ClipFacts, look_at, read_frame
from stablevsr.app.studio import FORMATS, WEIGHTS_OWN, Studio
from stablevsr.engine import plan
from stablevsr.engine.progress import Progress
from stablevsr.errors import OptionsError, UserError
from stablevsr.sampling.config import COLOR_FIXES, SamplingConfig

TITLE = "StableVSR"
REFRESH = 1.0  # seconds
MAX_SEED = 2**32 - 1  # numbers in a browser are exact up to 2^53
MAX_STEPS = 1000
PRESET_NAMES = {
    WEIGHTS_OWN: "Recommended for these weights",
    "exact": "Exact, as published",
    "balanced": "Balanced",
    "fast": "Fast",
    "streaming": "Streaming",
}
SIZES = ["4×", "3×", "2×", "2160 lines", "1080 lines", "720 lines"]  # others can be typed, as 1280x720
# Both are younger than the app.
HAS_SIZE = "scale" in SamplingConfig.__dataclass_fields__
HAS_STRENGTH = "strength" in SamplingConfig.__dataclass_fields__
COLORS = {"None": None, "Wavelet": "wavelet", "AdaIN": "adain"}
DISCARD = {"stopped": "Discard its work", "failed": "Discard its work", "done": "Remove from the list"}
ASK = """(number) => [number, document.querySelector("#discard").innerText.includes("Remove") ||
    confirm("Discard this run and what it has done so far?")]"""


def asset(name: str) -> str:
    """The text of a file beside this one."""
    return (resources.files("stablevsr.app") / name).read_text(encoding="utf-8")


@dataclass(frozen=True)
class Settings:
    """The options of a run."""

    preset: gr.Radio
    steps: gr.Number
    seed: gr.Number
    strength: gr.Slider
    size: gr.Dropdown
    color: gr.Dropdown
    format: gr.Dropdown

    def sampling(self) -> list[Any]:
        """The arguments of `options_of`."""
        return [self.preset, self.steps, self.seed, self.strength, self.size, self.color]


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
        html_template=asset("handles.html"),
        js_on_load=asset("handles.js"),
        visible=False,
        elem_id="part",
    )


def settings_of(studio: Studio) -> Settings:
    """The options of a run."""
    presets = studio.presets()
    own = presets[WEIGHTS_OWN]
    choices = [(f"{PRESET_NAMES[name]}: {config.steps} steps", name) for name, config in presets.items()]
    preset = gr.Radio(choices, value=WEIGHTS_OWN, label="Preset", elem_id="preset")
    with gr.Row():
        limits = {"precision": 0, "min_width": 120}
        steps = gr.Number(own.steps, label="Steps", minimum=1, maximum=MAX_STEPS, elem_id="steps", **limits)
        seed = gr.Number(own.seed, label="Seed", minimum=0, maximum=MAX_SEED, elem_id="seed", **limits)
    named = {value: name for name, value in COLORS.items()}
    strength = gr.Slider(
        0.05, 1, value=1, step=0.05, label="Strength: 1 invents most", visible=HAS_STRENGTH, elem_id="strength"
    )
    with gr.Row():
        size = gr.Dropdown(
            SIZES,
            value=SIZES[0],
            label="Size",
            allow_custom_value=True,
            visible=HAS_SIZE,
            min_width=120,
            elem_id="size",
        )
        color = gr.Dropdown(list(COLORS), value=named[own.color_fix], label="Color match", min_width=120)
        format = gr.Dropdown(list(FORMATS), value=next(iter(FORMATS)), label="Format", min_width=120)

    def follow(name: str) -> tuple[int, str]:
        return presets[name].steps, named[presets[name].color_fix]

    preset.change(follow, preset, [steps, color], show_progress="hidden", api_visibility="private")
    assert set(named) == {None, *COLOR_FIXES}
    return Settings(preset, steps, seed, strength, size, color, format)


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


def options_of(
    studio: Studio, preset: str, steps: float | None, seed: float | None, strength: float, size: str, color: str
) -> SamplingConfig:
    """The options that the page shows.

    Raises:
        OptionsError: for values out of range.
    """
    fields: dict[str, Any] = {"color_fix": COLORS[color]}
    if HAS_STRENGTH:
        fields["strength"] = strength
    if HAS_SIZE:
        fields |= size_fields(size)
    if steps is not None:  # emptied fields are the preset's
        fields["steps"] = int(steps)
    if seed is not None:
        fields["seed"] = int(seed)
    return studio.config(preset, fields)


def size_fields(text: str) -> dict[str, Any]:
    """The field of `SamplingConfig` for a size such as "2×", "1080 lines" or "1280x720"; none for four times.

    Raises:
        OptionsError: for another text.
    """
    plain = text.lower().replace("×", "x").replace("lines", "").replace("p", "").replace(" ", "")
    if plain in ("", "4", "4x"):
        return {}
    if re.fullmatch(r"\d+x\d+", plain):
        return {"size": plain}
    if re.fullmatch(r"\d+(\.\d+)?x", plain):
        return {"scale": float(plain[:-1])}
    if plain.isdecimal():
        return {"height": int(plain)}
    raise OptionsError(f"got the size {text!r}, expected one such as 2×, 1080 lines or 1280x720")


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
        return texts.note(f"{job.name} is in the list of runs.{waits}", tuple(config.notices(studio.model.config))), (
            job.number
        )

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
            bar((now.done, now.total), desc=texts.PHASES[now.phase][0], unit=texts.PHASES[now.phase][1])

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


@dataclass(frozen=True)
class Runs:
    """The list of jobs, and the one that is chosen."""

    studio: Studio
    list: gr.Radio
    about: gr.HTML
    stop: gr.Button
    resume: gr.Button
    discard: gr.Button
    result: gr.HTML
    chosen: gr.State  # number of the job
    shown: gr.State  # what the page shows of it, so that only changes are sent

    @classmethod
    def make(cls, studio: Studio) -> "Runs":
        gr.HTML("<h2>Runs</h2>")
        with gr.Row(equal_height=False):
            with gr.Column(scale=5, min_width=340):
                jobs = gr.Radio([], label="Newest first", visible=False, elem_id="runs")
                about = gr.HTML(elem_id="job")
                with gr.Row():
                    stop = gr.Button("Stop", variant="stop", visible=False, elem_id="stop", min_width=90)
                    resume = gr.Button("Go on", variant="primary", visible=False, elem_id="resume", min_width=90)
                    discard = gr.Button("Discard", visible=False, elem_id="discard", min_width=90)
            with gr.Column(scale=7, min_width=340):
                result = gr.HTML(js_on_load=asset("result.js"), elem_id="result")
        return cls(studio, jobs, about, stop, resume, discard, result, gr.State(None), gr.State({}))

    def parts(self) -> list[Any]:
        """The outputs of `refresh`."""
        return [self.chosen, self.shown, self.list, self.about, self.stop, self.resume, self.discard, self.result]

    def connect(self, page: gr.Blocks) -> None:
        jobs, quiet = self.studio.jobs, {"show_progress": "hidden", "api_visibility": "private", "queue": False}
        refresh = [self.refresh, [self.chosen, self.shown], self.parts()]
        # On loading, the page knows nothing yet, whatever its session had been shown.
        page.load(lambda: self.refresh(None, {}), None, self.parts(), **quiet)
        gr.Timer(REFRESH).tick(*refresh, **quiet)
        self.list.input(lambda number: number, self.list, self.chosen, **quiet).then(*refresh, **quiet)
        self.stop.click(jobs.stop, self.chosen, **quiet).then(*refresh, **quiet)
        self.resume.click(jobs.resume, self.chosen, **quiet).then(*refresh, **quiet)
        sure = gr.Checkbox(visible=False)  # filled in by the browser; a gr.State never leaves the server
        self.discard.click(self._discard, [self.chosen, sure], self.chosen, js=ASK, **quiet).then(*refresh, **quiet)

    def refresh(self, chosen: int | None, shown: dict[str, Any]) -> list[Any]:
        """What has changed since `shown`."""
        jobs = self.studio.jobs.all()[::-1]
        job = next((job for job in jobs if job.number == chosen), jobs[0] if jobs else None)
        now: dict[str, Any] = {
            "list": ([(texts.label_of(each), each.number) for each in jobs], job and job.number),
            "about": texts.about_job(job, self.studio.jobs.ahead_of(job.number)) if job else texts.note("None yet."),
            "stop": job is not None and job.state in ("waiting", "running"),
            "resume": job is not None and job.state in ("stopped", "failed"),
            "discard": DISCARD.get(job.state) if job else None,
            "result": texts.result_of(job) if job else "",
        }
        updates = {
            "list": lambda value: gr.update(choices=value[0], value=value[1], visible=len(value[0]) > 1),
            "about": lambda value: value,
            "result": lambda value: value,
            "discard": lambda label: gr.update(value=label, visible=True) if label else gr.update(visible=False),
        }
        changes = [
            gr.skip() if shown.get(name) == value else updates.get(name, lambda is_on: gr.update(visible=is_on))(value)
            for name, value in now.items()
        ]
        return [job.number if job else None, now if now != shown else gr.skip(), *changes]

    def _discard(self, chosen: int, sure: bool) -> Any:
        if not sure:
            return gr.skip()
        try:
            self.studio.discard(chosen)
        except UserError as error:
            raise gr.Error(str(error), print_exception=False) from error
        return None
