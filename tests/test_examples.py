"""The examples run, on small data and small networks."""

import importlib.util
import json
import os
import threading
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from types import ModuleType

import av
import imageio.v3 as iio
import numpy as np
import pytest
from models import TINY

from stablevsr import PRESETS
from stablevsr.model import StableVSR
from stablevsr.weights import Header, read_header, write

EXAMPLES = Path(__file__).parent.parent / "examples"


def example(name: str) -> ModuleType:
    """A script of examples/ as a module."""
    spec = importlib.util.spec_from_file_location(name, EXAMPLES / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def quick_weights(tmp_path_factory: pytest.TempPathFactory, tiny_model: StableVSR) -> Path:
    """A random model that takes one step."""
    path = tmp_path_factory.mktemp("quick") / "quick.safetensors"
    config = replace(PRESETS["exact"], steps=1)
    write(path, Header(TINY, {"flow": "random"}, sampling=config), tiny_model.state_dict())
    return path


def make_clip(path: Path, frames: int = 3, size: tuple[int, int] = (16, 24)) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    clip = np.random.default_rng(0).integers(0, 256, (frames, *size, 3), dtype=np.uint8)
    iio.imwrite(path, clip, plugin="pyav", codec="libx264", fps=25)


def make_frames(folder: Path, frames: int, size: tuple[int, int], seed: int = 0) -> None:
    folder.mkdir(parents=True)
    for index, frame in enumerate(np.random.default_rng(seed).integers(0, 256, (frames, *size, 3), dtype=np.uint8)):
        iio.imwrite(folder / f"{index:08}.png", frame)


def pictures_of(path: Path) -> list[tuple[float, int, int]]:
    """Time, width and height of every frame of a video."""
    with av.open(str(path)) as container:
        return [(frame.time, frame.width, frame.height) for frame in container.decode(video=0)]


def test_a_folder_of_clips(tmp_path: Path, quick_weights: Path, capsys: pytest.CaptureFixture) -> None:
    make_clip(tmp_path / "in/a.mp4")
    make_clip(tmp_path / "in/deeper/b.mkv", frames=1)
    (tmp_path / "in/deeper/broken.mp4").write_bytes(b"no video")
    arguments = [str(tmp_path / "in"), str(tmp_path / "in/out"), "--weights", str(quick_weights)]
    script = example("folder_of_clips")
    assert script.main(arguments) == 1
    told = capsys.readouterr()
    assert "broken.mp4: FAILED" in told.err
    assert sorted(path.name for path in (tmp_path / "in/out").rglob("*.m*")) == ["a.mp4", "b.mkv"]
    assert [frame[1:] for frame in pictures_of(tmp_path / "in/out/a.mp4")] == [(96, 64)] * 3
    assert script.main(arguments) == 1
    told = capsys.readouterr().out  # results in a folder inside the input are no input
    assert told.splitlines() == ["a.mp4: there already", "deeper/b.mkv: there already"]


def test_a_camera_that_is_a_file(tmp_path: Path, quick_weights: Path) -> None:
    make_clip(tmp_path / "in.mp4", frames=3)
    weights = ["--weights", str(quick_weights), "--size", "24x16"]
    assert example("camera").main([str(tmp_path / "in.mp4"), str(tmp_path / "live.mp4"), *weights]) == 0
    frames = pictures_of(tmp_path / "live.mp4")
    assert [frame[1:] for frame in frames] == [(96, 64)] * 3
    assert [frame[0] for frame in frames] == pytest.approx([0, 0.04, 0.08])


def test_a_camera_for_a_pipe(
    tmp_path: Path, quick_weights: Path, monkeypatch: pytest.MonkeyPatch, capfdbinary: pytest.CaptureFixture
) -> None:
    make_clip(tmp_path / "in.mp4", frames=2)
    weights = ["--weights", str(quick_weights), "--size", "24x16"]
    with os.fdopen(os.dup(1), "w") as stdout:
        monkeypatch.setattr("sys.stdout", stdout)
        assert example("camera").main([str(tmp_path / "in.mp4"), "-", *weights]) == 0
        stdout.flush()
    (tmp_path / "live.y4m").write_bytes(capfdbinary.readouterr().out)
    assert [frame[1:] for frame in pictures_of(tmp_path / "live.y4m")] == [(96, 64)] * 2


def test_a_camera_does_not_wait() -> None:
    """Frames that come while one is being worked on are dropped, except the newest."""
    filmed, first_taken = threading.Event(), threading.Event()

    def filming() -> Iterator[int]:
        yield 1
        first_taken.wait(timeout=30)
        yield from (2, 3, 4)
        filmed.set()

    frames = example("camera").newest(filming())
    assert next(frames) == 1
    first_taken.set()
    assert filmed.wait(timeout=30)
    assert list(frames) == [4]


def test_a_camera_that_fails_says_so() -> None:
    def unplugged() -> Iterator[int]:
        yield 1
        raise OSError("unplugged")

    frames = example("camera").newest(unplugged())
    with pytest.raises(OSError, match="unplugged"):
        list(frames)


def test_training_on_reds(tmp_path: Path, tiny_weights: Path) -> None:
    for clip in ("000", "001"):  # 000 is in REDS4
        make_frames(tmp_path / f"REDS/train/train_sharp/{clip}", 3, (144, 144))
        make_frames(tmp_path / f"REDS/train/train_sharp_bicubic/X4/{clip}", 3, (36, 36))
    options = ["--steps=1", "--batch=1", "--accumulate=1", "--crop=128", "--dtype=fp32", "--workers=0", "--device=cpu"]
    places = [str(tmp_path / "REDS/train"), str(tiny_weights), str(tmp_path / "runs/tcm")]
    assert example("train_tcm_on_reds").main([*places, *options]) == 0
    header = read_header(tmp_path / "runs/tcm/model.safetensors")
    assert header.provenance["tcm"] == "trained by recipe.toml, 1 steps"
    assert len((tmp_path / "runs/tcm/log.csv").read_text().splitlines()) == 2


def test_training_without_reds_is_refused(tmp_path: Path, tiny_weights: Path) -> None:
    with pytest.raises(SystemExit, match="has no folder train_sharp"):
        example("train_tcm_on_reds").main([str(tmp_path), str(tiny_weights), str(tmp_path / "out")])


def test_the_papers_table(tmp_path: Path, quick_weights: Path, capsys: pytest.CaptureFixture) -> None:
    for clip in ("000", "011"):
        make_frames(tmp_path / f"results/{clip}", 2, (32, 32), seed=1)
        make_frames(tmp_path / f"truth/{clip}", 2, (32, 32), seed=2)
    places = [str(tmp_path / "results"), str(tmp_path / "truth"), "--weights", str(quick_weights)]
    assert example("paper_table").main(places) == 0
    told = capsys.readouterr().out
    assert "2 clips, 4 frames; tOF by flows of: random" in told
    rows = {line.split()[0]: line.split()[1:] for line in told.splitlines() if line[:4] in ("PSNR", "SSIM", "tOF ")}
    pair = [iio.imread(tmp_path / name / "000/00000000.png") / 255 for name in ("results", "truth")]
    assert float(rows["PSNR"][1]) == pytest.approx(-10 * np.log10(((pair[0] - pair[1]) ** 2).mean()), abs=0.2)
    for name, paper in (("PSNR", 27.97), ("SSIM", 0.795), ("tOF", 2.68)):
        theirs, ours, difference = map(float, rows[name])
        assert theirs == paper
        assert difference == pytest.approx(ours - theirs, abs=2e-3)


def test_the_notebook_runs_and_shows_its_outputs(
    tmp_path: Path, quick_weights: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    notebook = json.loads((EXAMPLES / "quickstart.ipynb").read_text())
    cells = [cell for cell in notebook["cells"] if cell["cell_type"] == "code"]
    assert [cell["execution_count"] for cell in cells] == list(range(1, len(cells) + 1)), "run it from top to bottom"
    outputs = [output for cell in cells for output in cell["outputs"]]
    assert not [output for output in outputs if output["output_type"] == "error"]
    assert sum("image/png" in output.get("data", {}) for output in outputs) == 2

    monkeypatch.setattr("stablevsr.model.bundled_weights", lambda: quick_weights)
    monkeypatch.chdir(tmp_path)
    make_clip(tmp_path / "small.mp4", frames=4)
    source = "\n".join("".join(cell["source"]) for cell in cells)
    demo = 'files("stablevsr") / "assets/demo.mp4"'
    assert demo in source
    names: dict[str, object] = {}
    exec(source.replace(demo, '"small.mp4"'), names)
    assert names["hr"].shape == (4, 64, 96, 3)
    assert names["count"] == 4
    assert [frame[1:] for frame in pictures_of(tmp_path / "demo_x4.mp4")] == [(96, 64)] * 4
