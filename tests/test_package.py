"""The sdist and the wheel hold what they should, and the wheel works without the checkout."""

import os
import shutil
import site
import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path

import av
import pytest

pytest.importorskip("setuptools", minversion="77", reason="setuptools 77 builds the package: pip install setuptools")
ROOT = Path(__file__).parent.parent
LEFT_OUT = shutil.ignore_patterns(
    ".git", ".venv*", "*.egg-info", "__pycache__", "build", "dist", "runs", "site", ".*_cache"
)
BUILD = "import sys; from setuptools import build_meta; print(getattr(build_meta, sys.argv[1])(sys.argv[2]))"


def build(kind: str, source: Path, target: Path) -> Path:
    """Build a wheel or sdist of the source tree `source`, as pip does."""
    command = [sys.executable, "-c", BUILD, f"build_{kind}", str(target)]
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    ended = subprocess.run(command, cwd=source, env=environment, capture_output=True, text=True, check=True)
    return target / ended.stdout.splitlines()[-1]


@pytest.fixture(scope="module")
def sdist(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("sdist")
    shutil.copytree(ROOT, folder / "source", ignore=LEFT_OUT)
    return build("sdist", folder / "source", folder)


@pytest.fixture(scope="module")
def wheel(sdist: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Built from the sdist, so that this is complete."""
    folder = tmp_path_factory.mktemp("wheel")
    with tarfile.open(sdist) as archive:
        archive.extractall(folder, filter="data")
    return build("wheel", folder / sdist.name.removesuffix(".tar.gz"), folder)


def test_the_sdist_can_be_built_tested_and_read(sdist: Path) -> None:
    with tarfile.open(sdist) as archive:
        names = {name.partition("/")[2] for name in archive.getnames()}
    for name in ("README.md", "LICENSE", "tests/models.py", "tests/data/golden/raft_small.pth", "docs/index.md"):
        assert name in names
    assert {"stablevsr/assets/small.safetensors", "examples/quickstart.ipynb", "Makefile", "mkdocs.yml"} <= names
    assert not [name for name in names if "__pycache__" in name or name.startswith((".git/", "runs"))]
    assert sdist.stat().st_size < 100e6


def test_the_wheel_holds_the_package_and_nothing_else(wheel: Path) -> None:
    names = {info.filename for info in zipfile.ZipFile(wheel).infolist()}
    assert {name.split("/")[0] for name in names} == {"stablevsr", wheel.name.split("-py3")[0] + ".dist-info"}
    here = {str(path.relative_to(ROOT)) for path in (ROOT / "stablevsr").rglob("*") if path.is_file()}
    here = {name for name in here if "__pycache__" not in name and not name.startswith("stablevsr/.")}
    assert here - names == set()
    assert wheel.stat().st_size < 50e6


def test_the_demo_clip_is_upscaled_from_the_wheel_alone(wheel: Path, tmp_path: Path) -> None:
    """In a fresh environment that shares nothing but the dependencies."""
    environment = tmp_path / "environment"
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", str(environment)], check=True)
    (libraries,) = (environment / "lib").glob("python*/site-packages")
    (libraries / "dependencies.pth").write_text("\n".join(site.getsitepackages()))
    pip = [sys.executable, "-m", "pip", "--python", str(environment / "bin/python"), "--disable-pip-version-check"]
    subprocess.run([*pip, "install", "--quiet", "--no-deps", "--no-index", str(wheel)], check=True)
    clean = {name: value for name, value in os.environ.items() if not name.startswith("PYTHON")}
    clip = libraries / "stablevsr/assets/demo.mp4"
    command = [environment / "bin/stablevsr", "upscale", clip, "out.mp4", "--frames", "0:2", "--device", "cpu"]
    subprocess.run(list(map(str, command)), cwd=tmp_path, env=clean, check=True)
    with av.open(str(tmp_path / "out.mp4")) as container:
        assert [(frame.width, frame.height) for frame in container.decode(video=0)] == [(320, 240)] * 2
    where = [environment / "bin/python", "-c", "import stablevsr; print(stablevsr.__file__)"]
    found = subprocess.run(list(map(str, where)), cwd=tmp_path, env=clean, capture_output=True, text=True, check=True)
    assert Path(found.stdout.strip()).is_relative_to(libraries)
