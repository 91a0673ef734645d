"""The README does what it says: its commands run as they stand, its tables are measured, its links lead somewhere."""

import argparse
import hashlib
import importlib.util
import io
import re
import shlex
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path

import av
import imageio.v3 as iio
import numpy as np
import pytest
from hub_server import FakeHub, serving
from models import DATA

from stablevsr.cli import main
from stablevsr.cli.parser import build_parser

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text()
RAFT = "raft_large_C_T_SKHT_V2-ff5fadd5.pth"
FENCE = re.compile(r"^ *```(\w*)\n(.*?)^ *```$", re.M | re.S)


def code(text: str, language: str = "") -> list[str]:
    """The blocks of code in this language."""
    return [block for name, block in FENCE.findall(text) if name == language]


def command_lines(text: str) -> list[list[str]]:
    """The words of every `stablevsr` command in blocks without a language, one a line or a part of a pipe."""
    lines = [line.strip() for block in code(text) for line in block.splitlines()]
    parts = [part for line in lines for part in line.split(" | ") if part.startswith("stablevsr ")]
    return [shlex.split(part, comments=True) for part in parts]


def video_size(path: Path) -> tuple[int, int]:
    with av.open(str(path)) as container:
        frame = next(container.decode(video=0))
        return frame.width, frame.height


@pytest.fixture
def reader_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """What somebody who follows the README has: a clip, a folder of frames, the downloads.

    All as small as they go: one frame, and the golden checkpoint.
    """
    rng = np.random.default_rng(0)
    clip = rng.integers(0, 256, (1, 16, 16, 3), dtype=np.uint8)
    iio.imwrite(tmp_path / "in.mp4", clip, plugin="pyav", codec="libx264", fps=25)
    (tmp_path / "frames").mkdir()
    for index, frame in enumerate(clip):
        iio.imwrite(tmp_path / f"frames/{index}.png", frame)
    (tmp_path / "StableVSR").symlink_to(DATA / "checkpoint", target_is_directory=True)
    shutil.copy(DATA / "golden/raft_small.pth", tmp_path / RAFT)
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[FakeHub]:
    """A hub that serves the golden checkpoint under the name in the README, to somebody who answers yes."""
    (tmp_path / "torch/hub/checkpoints").mkdir(parents=True)
    shutil.copy(DATA / "golden/raft_small.pth", tmp_path / "torch/hub/checkpoints" / RAFT)
    monkeypatch.setenv("TORCH_HOME", str(tmp_path / "torch"))
    monkeypatch.setattr("torch.hub._hub_dir", None)  # other tests set it
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    constants = "huggingface_hub.constants."
    monkeypatch.setattr(constants + "HF_HUB_CACHE", str(tmp_path / "hf"))
    monkeypatch.setattr(constants + "HF_HUB_OFFLINE", False)
    with serving(FakeHub(DATA / "checkpoint", repo="claudiom4sir/StableVSR")) as hub:
        monkeypatch.setattr(constants + "ENDPOINT", hub.url)
        template = f"{hub.url}/{{repo_id}}/resolve/{{revision}}/{{filename}}"
        monkeypatch.setattr(constants + "HUGGINGFACE_CO_URL_TEMPLATE", template)
        terminal = io.StringIO("y\n")
        monkeypatch.setattr(terminal, "isatty", lambda: True, raising=False)
        monkeypatch.setattr("sys.stdin", terminal)
        yield hub


def test_the_commands_run_as_written(reader_folder: Path, hub: FakeHub) -> None:
    """All `stablevsr` commands in their order, then the Python that follows them."""
    commands = command_lines(README)
    assert [line[1] for line in commands] == ["upscale", "upscale", "convert", "upscale"]
    for _, *arguments in commands:
        for result in ("out.mp4", "out_frames"):
            shutil.rmtree(result, ignore_errors=True)
            Path(result).unlink(missing_ok=True)
        assert main(arguments) == 0
        if arguments[2] == "out.mp4":
            assert video_size(Path("out.mp4")) == (64, 64)
    assert "unet/config.json" in hub.downloaded()
    assert [iio.imread(path).shape for path in sorted(Path("out_frames").iterdir())] == [(64, 64, 3)]

    Path("out.mp4").unlink(missing_ok=True)
    (script,) = code(README, "python")
    names = {"lr": iio.imread("frames/0.png")[None]}
    exec(script, names)
    assert names["hr"].shape == (1, 64, 64, 3)
    assert video_size(Path("out.mp4")) == (64, 64)


def test_make_demo_runs_with_the_bundled_model(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The command that the Makefile has, on two frames; the environment that it would make first is a stand-in."""
    for name in ("stablevsr", "setup.cfg", "pyproject.toml"):
        (tmp_path / name).symlink_to(ROOT / name)
    command = tmp_path / ".venv/bin/stablevsr"
    command.parent.mkdir(parents=True)
    command.write_text("#!/bin/sh\nprintf '%s\\n' \"$@\" > arguments\n")
    command.chmod(0o755)
    (tmp_path / ".venv/installed").touch()
    monkeypatch.chdir(tmp_path)
    assert "make demo" in README
    subprocess.run(["make", "--no-print-directory", "-f", ROOT / "Makefile", "demo"], check=True)
    assert main([*Path("arguments").read_text().splitlines(), "--frames", "0:2"]) == 0
    assert video_size(Path("demo/demo_x4.mp4")) == (320, 240)
    assert video_size(Path("demo/side_by_side.mp4")) == (640, 240)


TEXTS = [ROOT / name for name in ("README.md", "CONTRIBUTING.md", "recipes/README.md", "benchmarks/README.md")]
TEXTS += [ROOT / "integrations/comfyui/README.md"]
TEXTS += sorted((ROOT / "docs").glob("*.md"))
OTHERS = {"--gpus"}  # of Docker
MANUAL = [path for path in TEXTS if path.parent.name not in ("benchmarks", "recipes")]  # these have their own options
SCRIPTS = sorted((ROOT / "examples").glob("*.py"))


def parsers() -> dict[str, argparse.ArgumentParser]:
    """The parser of each command."""
    (commands,) = (action for action in build_parser()._actions if isinstance(action, argparse._SubParsersAction))
    return commands.choices


@pytest.mark.parametrize("path", TEXTS + SCRIPTS, ids=lambda path: str(path.relative_to(ROOT)))
def test_every_quoted_command_parses(path: Path) -> None:
    text = path.read_text()
    if path.suffix == ".py":
        text = "```\n" + re.sub(r"^ {4}", "", text.split('"""')[1], flags=re.M) + "```"
    commands = parsers()
    for words in command_lines(text):
        if words[1] in commands and "..." not in words:
            build_parser().parse_args(words[1:])  # SystemExit for an option that does not exist


@pytest.mark.parametrize("path", MANUAL, ids=lambda path: str(path.relative_to(ROOT)))
def test_every_option_in_the_text_exists(path: Path) -> None:
    known = {name: set(parser._option_string_actions) for name, parser in parsers().items()}
    every = set().union(*known.values()) | {"--version", "--help"}
    for span in re.findall(r"`([^`\n]+)`", FENCE.sub("", path.read_text())):
        options = re.findall(r"(?<!\S)--[a-z][a-z-]*", span)
        if match := re.match(r"stablevsr ([a-z]+) ", span):
            assert set(options) <= known[match[1]] | {"--help"}, span
        elif span.startswith("--"):
            assert set(options) <= every | OTHERS, span


def test_the_readme_is_short() -> None:
    assert README.count("\n") <= 150


def test_tables_are_made_of_measured_results() -> None:
    spec = importlib.util.spec_from_file_location("readme", ROOT / "benchmarks/readme.py")
    readme = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(readme)
    texts = {page: page.read_text() for page in readme.PAGES}
    for name, (file, _) in readme.TABLES.items():
        assert any(f"<!-- table: {name} -->" in text for text in texts.values())
        assert (readme.RESULTS / file).exists()
    for page, text in texts.items():
        assert readme.with_tables(text) == text, f"{page}: run python benchmarks/readme.py"


def test_the_plot_is_of_the_same_results() -> None:
    results = (ROOT / "benchmarks/results/quality_photos.json").read_bytes()
    plot = (ROOT / "docs/images/quality.svg").read_text()
    assert hashlib.sha256(results).hexdigest() in plot, "run python benchmarks/plots.py"


def anchors(text: str) -> set[str]:
    """The anchors of a page's headings, as GitHub and the manual make them."""
    found = set(re.findall(r"\{ #([\w.]+) \}", text))
    for title in re.findall(r"^#+ (.*)$", FENCE.sub("", text), re.M):
        title = re.sub(r"[^\w\- ]", "", title.replace("`", "").lower())
        found.add(re.sub(r"[ -]+", "-", title.strip()))
    return found


@pytest.mark.parametrize(
    "path",
    [*TEXTS, ROOT / "CHANGELOG.md", ROOT / "SECURITY.md", *sorted((ROOT / "examples").glob("*.ipynb"))],
    ids=lambda path: str(path.relative_to(ROOT)),
)
def test_local_links_lead_somewhere(path: Path) -> None:
    for target, anchor in re.findall(r"\]\((?!\w+:)([^)#\s]*)(?:#([^)\s]*))?\)", FENCE.sub("", path.read_text())):
        page = path.parent / target if target else path
        assert page.exists(), f"{path.name} links to {target}, which is not there"
        made_when_built = page.name in ("commands.md", "api.md")
        assert not anchor or made_when_built or anchor in anchors(page.read_text()), f"{path.name}: {target}#{anchor}"
