"""Fixtures for all tests."""

import os
from collections.abc import Generator
from pathlib import Path

import pytest

if "PYTEST_XDIST_WORKER" in os.environ:  # processes share the cores; read when torch is first imported, just below
    os.environ.setdefault("OMP_NUM_THREADS", "1")

from models import DATA, TINY, random_model

from stablevsr import PRESETS
from stablevsr.convert.assemble import Sources, convert
from stablevsr.model import StableVSR
from stablevsr.weights import Header, write


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport() -> Generator[None, pytest.TestReport, pytest.TestReport]:
    """Escape what is not Unicode in captured output, such as names of files: processes of xdist cannot send it."""
    report = yield
    report.sections = [(name, text.encode(errors="backslashreplace").decode()) for name, text in report.sections]
    return report


@pytest.fixture(scope="session")
def tiny_model() -> StableVSR:
    """Not to be changed: all tests share it."""
    return random_model()


@pytest.fixture(scope="session")
def tiny_weights(tmp_path_factory: pytest.TempPathFactory, tiny_model: StableVSR) -> Path:
    """The same model as a file."""
    path = tmp_path_factory.mktemp("weights") / "tiny.safetensors"
    write(path, Header(TINY, {"note": "random"}, sampling=PRESETS["exact"]), tiny_model.state_dict())
    return path


@pytest.fixture(scope="session")
def golden_weights(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The golden checkpoint, converted with its text encoder."""
    path = tmp_path_factory.mktemp("golden") / "golden.safetensors"
    convert(Sources(DATA / "checkpoint", DATA / "golden/raft_small.pth", with_text=True), path)
    return path
