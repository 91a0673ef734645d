"""Fixtures for all tests."""

import os
from pathlib import Path

import pytest

if "PYTEST_XDIST_WORKER" in os.environ:  # processes share the cores; read when torch is first imported, just below
    os.environ.setdefault("OMP_NUM_THREADS", "1")

from models import DATA, TINY, random_model

from stablevsr import PRESETS
from stablevsr.convert.assemble import Sources, convert
from stablevsr.model import StableVSR
from stablevsr.weights import Header, write


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
