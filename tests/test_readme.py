"""The README does what it says: its commands run as they stand, its tables are measured, its links lead somewhere."""

import hashlib
import importlib.util
import os
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import av
import imageio.v3 as iio
import numpy as np
import pytest
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
    """The arguments of every command in blocks without a language, one a line; pipes are split."""
    lines = [line for block in code(text) for line in block.splitlines()]
    return [shlex.split(part, comments=True) for line in lines for part in line.split(" | ") if part.strip()]


def video_size(path: Path) -> tuple[int, int]:
    with av.open(str(path)) as container:
        frame = next(container.decode(video=0))
        return frame.width, frame.height


@pytest.fixture
def reader_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """What somebody who follows the README has: a clip, a folder of frames, the downloads (the golden checkpoint)."""
    rng = np.random.default_rng(0)
    clip = rng.integers(0, 256, (2, 16, 16, 3), dtype=np.uint8)
    iio.imwrite(tmp_path / "in.mp4", clip, plugin="pyav", codec="libx264", fps=25)
    (tmp_path / "frames").mkdir()
    for index, frame in enumerate(clip):
        iio.imwrite(tmp_path / f"frames/{index}.png", frame)
    (tmp_path / "StableVSR").symlink_to(DATA / "checkpoint", target_is_directory=True)
    shutil.copy(DATA / "golden/raft_small.pth", tmp_path / RAFT)
    monkeypatch.chdir(tmp_path)
    return tmp_path


def test_the_commands_run_as_written(reader_folder: Path) -> None:
    """All `stablevsr` commands in their order, then the Python that follows them."""
    commands = [line for line in command_lines(README) if line[0] == "stablevsr"]
    assert [line[1] for line in commands] == ["upscale", "convert", "upscale", "upscale"]
    for _, *arguments in commands:
        for result in ("out.mp4", "out_frames"):
            shutil.rmtree(result, ignore_errors=True)
            Path(result).unlink(missing_ok=True)
        assert main(arguments) == 0
        if arguments[0] == "upscale" and arguments[2] == "out.mp4":
            assert video_size(Path("out.mp4")) == (64, 64)
    assert [iio.imread(path).shape for path in sorted(Path("out_frames").iterdir())] == [(64, 64, 3)] * 2

    Path("out.mp4").unlink(missing_ok=True)
    (script,) = code(README, "python")
    names = {"lr": np.stack([iio.imread(f"frames/{index}.png") for index in range(2)])}
    exec(script, names)
    assert names["hr"].shape == (2, 64, 64, 3)
    assert video_size(Path("out.mp4")) == (64, 64)


def test_make_demo_runs_with_the_bundled_model(tmp_path: Path) -> None:
    """The command as the Makefile has it, on two frames; the installation before it is a stand-in."""
    for name in ("stablevsr", "setup.cfg", "pyproject.toml", "README.md", "LICENSE"):
        (tmp_path / name).symlink_to(ROOT / name)
    venv = tmp_path / ".venv"
    (venv / "bin").mkdir(parents=True)
    (venv / "installed").touch()
    command = venv / "bin/stablevsr"
    command.write_text(
        f"#!{sys.executable}\nimport sys\nfrom stablevsr.cli import main\n"
        "sys.exit(main([*sys.argv[1:], '--frames', '0:2']))\n"
    )
    command.chmod(0o755)
    assert "make demo" in README
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    subprocess.run(["make", "-f", str(ROOT / "Makefile"), "demo"], cwd=tmp_path, env=environment, check=True)
    assert video_size(tmp_path / "demo/demo_x4.mp4") == (320, 240)
    assert video_size(tmp_path / "demo/side_by_side.mp4") == (640, 240)


TEXTS = [ROOT / name for name in ("README.md", "CONTRIBUTING.md", "recipes/README.md", "benchmarks/README.md")]
TEXTS += sorted((ROOT / "docs").glob("*.md"))
SCRIPTS = sorted((ROOT / "examples").glob("*.py"))


@pytest.mark.parametrize("path", TEXTS + SCRIPTS, ids=lambda path: str(path.relative_to(ROOT)))
def test_every_quoted_command_parses(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    text = path.read_text()
    if path.suffix == ".py":
        text = "```\n" + re.sub(r"^ {4}(?= *stablevsr )", "", text.split('"""')[1], flags=re.M) + "```"
    lines = re.findall(r"^ *(stablevsr [a-z]+ .*)$", "\n".join(code(text)), re.M)
    lines += re.findall(r"`(stablevsr (?:upscale|convert|train|evaluate|compare|inspect) [^`\[]* [^`\[]*)`", text)
    for line in lines:
        for part in line.split(" | "):
            words = shlex.split(part, comments=True)
            if words[:1] == ["stablevsr"] and "..." not in words and words[1:] != ["COMMAND", "--help"]:
                build_parser().parse_args(words[1:])  # SystemExit for an option that does not exist


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
