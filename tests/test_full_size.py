"""The released model's size: convert and load without ever holding it twice."""

import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from models import DATA

from stablevsr.architectures import STABLEVSR
from stablevsr.config import TextConfig
from stablevsr.convert.diffusers_folder import write_folder
from stablevsr.convert.keys import TORCHVISION_RAFT, rename
from stablevsr.model import empty_model
from stablevsr.prompt import VOCABULARY_FILES
from stablevsr.weights import Header

pytestmark = pytest.mark.slow

# Prints by how many bytes a piece of work raises the process's resident memory at its peak: all of it, and the part
# that no file stands behind.
MEASURE = """
import sys, threading, time, torch
from stablevsr import build_model
from stablevsr.convert.assemble import Sources, convert
from pathlib import Path

def resident(name):
    return next(int(line.split()[1]) * 1024 for line in open("/proc/self/status") if line.startswith(name))

def watch():
    while not done:
        for name in peaks:
            peaks[name] = max(peaks[name], resident(name))
        time.sleep(0.005)

start = {name: resident(name) for name in ("VmRSS", "RssAnon")}
peaks, done = dict(start), False
watcher = threading.Thread(target=watch, daemon=True)
watcher.start()
kept = WORK
done = True
watcher.join()
print(*(peaks[name] - start[name] for name in start))
"""


def growth(work: str) -> tuple[int, int]:
    code = MEASURE.replace("WORK", work)
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    everything, anonymous = result.stdout.split()
    return int(everything), int(anonymous)


@pytest.fixture(scope="module")
def published(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The published folder and RAFT at full size in half precision; the values do not matter here."""
    folder = tmp_path_factory.mktemp("full") / "StableVSR"
    texts = {name: (DATA / "checkpoint/tokenizer" / name).read_text() for name in VOCABULARY_FILES}
    header = Header(replace(STABLEVSR, text=TextConfig(vocab_size=530)), tokenizer=texts)
    expected = empty_model(header).state_dict()
    half = {name: torch.half if tensor.is_floating_point() else None for name, tensor in expected.items()}
    tensors = {name: torch.full_like(tensor, 0.01, dtype=half[name], device="cpu") for name, tensor in expected.items()}
    write_folder(folder, header, tensors)
    flow = {rename(name[5:], TORCHVISION_RAFT): tensors[name] for name in tensors if name.startswith("flow.")}
    torch.save(flow, folder.parent / "raft_large.pth")
    return folder


def test_convert_and_load_at_full_size(published: Path) -> None:
    path, flow = published.parent / "full.safetensors", published.parent / "raft_large.pth"
    _, anonymous = growth(f"convert(Sources(Path({str(published)!r}), Path({str(flow)!r})), Path({str(path)!r}))")
    size = path.stat().st_size
    assert size == pytest.approx(2 * 740_656_747, rel=0.01)
    # All that is ever copied is the text tower, in float32 (1.16 GB), for the empty prompt; the files are mapped.
    assert anonymous < 1.3e9, f"converting a file of {size} bytes took {anonymous} bytes of memory"

    cast = published.parent / "cast.safetensors"
    _, anonymous = growth(f"convert(Sources(Path({str(path)!r})), Path({str(cast)!r}), torch.bfloat16)")
    assert cast.stat().st_size == pytest.approx(size, rel=0.01)
    assert anonymous < 0.2e9, f"casting a file of {size} bytes took {anonymous} bytes of memory"

    everything, _ = growth(f"build_model({str(cast)!r}, device='cpu', dtype='bf16')")
    # The flow network runs in float32 whatever the file holds: 21 MB.
    assert everything < 1.15 * size, f"loading a file of {size} bytes took {everything} bytes of memory"
    print(f"file {size / 1e9:.3f} GB, convert {anonymous / 1e9:.3f} GB anonymous, load {everything / 1e9:.3f} GB")
