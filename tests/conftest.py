"""Fixtures for all tests."""

import os
import shutil
import signal
from collections.abc import Generator, Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

if "PYTEST_XDIST_WORKER" in os.environ:  # processes share the cores; read when torch is first imported, just below
    os.environ.setdefault("OMP_NUM_THREADS", "1")

if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:  # in the background of a shell, and so in every child
    signal.signal(signal.SIGINT, signal.default_int_handler)

from models import DATA, TINY, random_model

from stablevsr import PRESETS
from stablevsr.convert.assemble import Sources, convert
from stablevsr.model import StableVSR
from stablevsr.weights import Header, write

if TYPE_CHECKING:
    from playwright.sync_api import Browser


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


@pytest.fixture(scope="module")
def browser() -> Iterator["Browser"]:
    """Chromium without a window; skips where there is none."""
    driver = pytest.importorskip("playwright.sync_api", reason="playwright is not installed: pip install playwright")
    path = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
    if path is None:
        pytest.skip("no chromium or google-chrome on this machine")
    with driver.sync_playwright() as playwright:
        # Root may not use the sandbox.
        arguments = ["--no-sandbox"] if hasattr(os, "geteuid") and os.geteuid() == 0 else []
        browser = playwright.chromium.launch(executable_path=path, args=arguments)
        yield browser
        browser.close()


@pytest.fixture(scope="session")
def golden_weights(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The golden checkpoint, converted with its text encoder."""
    path = tmp_path_factory.mktemp("golden") / "golden.safetensors"
    convert(Sources(DATA / "checkpoint", DATA / "golden/raft_small.pth", with_text=True), path)
    return path
