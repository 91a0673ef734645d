"""The app's messages as HTML. Everything that comes from a file name or an error is escaped."""

from html import escape
from importlib import resources
from pathlib import Path
from urllib.parse import quote

from stablevsr.app.clips import ClipFacts
from stablevsr.app.jobs import Job
from stablevsr.app.studio import SHOWN_BY_BROWSERS, Studio
from stablevsr.engine.plan import duration, size
from stablevsr.engine.progress import Progress

PHASES = {
    "read": ("reading the clip", "frames", "1 of 5"),
    "flow": ("estimating motion", "pairs of frames", "2 of 5"),
    "denoise": ("denoising", "frame-steps", "3 of 5"),
    "decode": ("decoding", "frames", "4 of 5"),
    "write": ("writing", "frames", "5 of 5"),
    "stream": ("upscaling frame by frame", "frames", ""),
}


def asset(name: str) -> str:
    """The text of a file beside this one."""
    return (resources.files("stablevsr.app") / name).read_text(encoding="utf-8")


def phase(progress: Progress) -> tuple[str, str, str]:
    """What is being done, its unit, and which part of the whole it is."""
    what, unit, part = PHASES.get(progress.phase, (progress.phase, "units", ""))
    if progress.model_passes > 1:
        part += f" of pass {progress.model_pass} of {progress.model_passes}"
    return what, unit, part


def heading(studio: Studio) -> str:
    model = studio.model
    weights = f"{studio.weights} on {model.device}, {str(model.dtype).removeprefix('torch.')}"
    return (
        f"<h1>StableVSR</h1><p>Video super-resolution with {escape(weights)}. "
        f"Results are kept in {escape(str(studio.folders.outputs))}.</p>"
    )


def note(text: str, details: tuple[str, ...] = ()) -> str:
    """A line of text with smaller lines below."""
    lines = "".join(f"<small>{escape(line)}</small>" for line in details)
    return f'<p class="note">{escape(text)}{lines}</p>' if text else ""


def problem(error: Exception | str) -> str:
    return f'<p class="note error" role="alert">{escape(_sentence(str(error)))}</p>'


def about_clip(facts: ClipFacts) -> str:
    return note(facts.sentence, facts.notices)


def label_of(job: Job) -> str:
    """The job as an entry in the list."""
    if job.state == "running" and job.progress:
        return f"{job.name}: {phase(job.progress)[0]}, {_percent(job)} %"
    return f"{job.name}: {job.state}"


def about_job(job: Job, ahead: list[Job]) -> str:
    """Where the job is, with a progress bar while it is not finished."""
    lines = [_where(job, ahead)]
    if job.note and job.state != "failed":
        lines.append(job.note)
    lines += [f"Note: {text}." for text in job.warnings]
    bar = ""
    if job.progress and job.state in ("running", "stopping", "stopped"):
        bar = (
            f'<div class="progress" role="progressbar" aria-valuenow="{_percent(job)}" aria-label="progress">'
            f'<div style="width: {_percent(job)}%"></div></div>'
        )
    text = "".join(f"<p>{escape(line)}</p>" for line in lines)
    error = problem(job.note) if job.state == "failed" else ""
    return f'<div class="job"><h3>{escape(job.name)}</h3>{bar}{text}{error}</div>'


def result_of(job: Job) -> str:
    """The result over its input, to look at and to download; empty unless the job is done. See result.js."""
    path = Path(job.output)
    if job.state != "done":
        return ""
    if not path.exists():
        return note(f"{path} is no longer there")
    shown = note("Browsers do not play this format: download it.")
    if path.suffix == ".png":
        shown = f'''<div class="stage"><img class="after" src="{_url(path)}" alt="the result">
            <img class="before" src="{_url(Path(job.input))}" alt=""></div>{_CUT}'''
    elif path.suffix in SHOWN_BY_BROWSERS and job.codec != "hevc10":
        more = "muted playsinline preload=auto"
        shown = f'''<div class="stage"><video class="after" src="{_url(path)}" loop {more}></video>
            <video class="before" src="{_url(Path(job.input))}" data-start="{job.start}" {more}></video></div>{_CUT}
            <div class="controls"><button class="play">Play</button>
            <input class="time" type="range" min="0" max="1" step="0.001" value="0" aria-label="time"></div>'''
    link = f'<a class="download" href="{_url(path)}" download="{escape(job.name)}">Download {escape(job.name)}'
    return f'<div class="result">{shown}{link} ({size(path.stat().st_size)})</a></div>'


_CUT = """<input class="cut" type="range" min="0" max="100" value="50" aria-label="input or result">
    <div class="sides"><span>input</span><span>result</span></div>"""


def _url(path: Path) -> str:
    """Where Gradio serves a file. With its time: a browser keeps what it has seen under an address."""
    time = int(path.stat().st_mtime) if path.exists() else 0
    return f"gradio_api/file={quote(str(path))}?{time}"


def time_left(seconds: float) -> str:
    """A human-readable estimate: "about 40 s", "about 3 h 20 min"."""
    return f"about {max(5, 5 * round(seconds / 5))} s" if seconds < 90 else duration(seconds)


def _where(job: Job, ahead: list[Job]) -> str:
    if job.state == "waiting":
        if not ahead:
            return "Starting."
        others = "another run" if len(ahead) == 1 else f"{len(ahead)} other runs"
        return f"Waiting for {others}: {', '.join(each.name for each in ahead)}. It starts by itself."
    if job.state == "done":
        return f"Done in {_took(job.seconds)}."
    if job.state == "failed":
        return "Failed."
    if job.state == "stopping":
        return "Stopping after the frame in progress. What is done is kept."
    if job.state == "stopped":
        return "Stopped. What is done is kept: go on at any time, even after a restart of the app."
    if job.progress is None:
        return "Starting."
    what, unit, part = phase(job.progress)
    text = f"{what.capitalize()}: {job.progress.done} of {job.progress.total} {unit}"
    if job.seconds_left is not None and job.progress.done < job.progress.total:
        text += f", {time_left(job.seconds_left)} left"
    return text + (f" in phase {part}." if part else ".")


def _took(seconds: float) -> str:
    return f"{seconds:.0f} s" if seconds < 90 else duration(seconds).removeprefix("about ")


def _percent(job: Job) -> int:
    return round(100 * job.progress.done / max(1, job.progress.total)) if job.progress else 0


def _sentence(text: str) -> str:
    return f"{text[:1].upper()}{text[1:]}" if text[:2].islower() else text
