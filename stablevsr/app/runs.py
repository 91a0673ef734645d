"""The list of runs on the page, and the one that is chosen: progress, stop and go on, the result."""

from dataclasses import dataclass
from typing import Any

import gradio as gr

from stablevsr.app import texts
from stablevsr.app.studio import Studio
from stablevsr.errors import UserError

REFRESH = 1.0  # seconds
DISCARD = {"stopped": "Discard its work", "failed": "Discard its work", "done": "Remove from the list"}
ASK = """(number) => [number, document.querySelector("#discard").innerText.includes("Remove") ||
    confirm("Discard this run and what it has done so far?")]"""


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
                result = gr.HTML(js_on_load=texts.asset("result.js"), elem_id="result")
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
