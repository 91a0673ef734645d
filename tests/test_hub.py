"""Weights by name, against a hub on the loopback address: what is fetched, what is kept, and what happens when the
network, the disk or the model is not as it should be."""

import errno
import hashlib
import io
import json
import os
import shutil
import subprocess
import sys
import time
from collections import namedtuple
from collections.abc import Iterator
from pathlib import Path

import imageio.v3 as iio
import numpy as np
import pytest
import torch
from hub_server import COMMIT, FakeHub, serving
from models import DATA
from safetensors.torch import load_file, save_file

from stablevsr import OptionsError, ResourceError, UserError, WeightsError, build_model
from stablevsr.cli import main
from stablevsr.convert.assemble import Sources
from stablevsr.hub import client
from stablevsr.hub.cache import cache_folder, download_folder, weights_file
from stablevsr.hub.fetch import weights_by_name
from stablevsr.hub.names import KNOWN, Name, parse_name
from stablevsr.model import bundled_weights
from stablevsr.training.train import located
from stablevsr.weights import read, read_header

NAME = "owner/StableVSR"
UNET = "unet/diffusion_pytorch_model.safetensors"
RAFT = "raft_large_C_T_SKHT_V2-ff5fadd5.pth"
ROOT = Path(__file__).parents[1]


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """The golden checkpoint as people publish it: with pickles, half-precision files and a page beside what is read."""
    target = tmp_path / "published"
    shutil.copytree(DATA / "checkpoint", target)
    (target / "README.md").write_text("a model")
    for part in ("unet", "vae", "controlnet"):
        for name in ("diffusion_pytorch_model.bin", "diffusion_pytorch_model.fp16.safetensors"):
            (target / part / name).write_bytes(b"never to be read")
    return target


@pytest.fixture
def hub(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[FakeHub]:
    """The hub, and a home without anything but RAFT."""
    (tmp_path / "torch/hub/checkpoints").mkdir(parents=True)
    shutil.copy(DATA / "golden/raft_small.pth", tmp_path / "torch/hub/checkpoints" / RAFT)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setenv("TORCH_HOME", str(tmp_path / "torch"))
    monkeypatch.setattr(torch.hub, "_hub_dir", None)  # other tests set it
    monkeypatch.setenv("HF_TOKEN", "secret")
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "hf"))
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", False)
    monkeypatch.setattr("huggingface_hub.file_download.time.sleep", lambda _: None)  # between attempts
    monkeypatch.setattr("huggingface_hub.constants.DOWNLOAD_CHUNK_SIZE", 100_000)  # what a break may cost
    with serving(FakeHub(folder)) as hub:
        point_to(hub.url, monkeypatch)
        yield hub


def point_to(url: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """As HF_ENDPOINT does, which the package reads when it is imported."""
    monkeypatch.setattr("huggingface_hub.constants.ENDPOINT", url)
    template = f"{url}/{{repo_id}}/resolve/{{revision}}/{{filename}}"
    monkeypatch.setattr("huggingface_hub.constants.HUGGINGFACE_CO_URL_TEMPLATE", template)


@pytest.fixture
def unconverted(monkeypatch: pytest.MonkeyPatch) -> None:
    """For tests of downloads: conversion takes seconds, and only looks for the largest file here."""

    def convert(sources: Sources, output: Path) -> None:
        assert (sources.base / UNET).read_bytes() == (DATA / "checkpoint" / UNET).read_bytes()
        output.touch()

    monkeypatch.setattr("stablevsr.hub.fetch.convert", convert)


def test_the_model_is_fetched_converted_and_kept(hub: FakeHub, golden_weights: Path) -> None:
    file = weights_by_name(NAME)
    header, tensors = read(file)
    expected = {name: t for name, t in load_file(golden_weights).items() if not name.startswith("text.")}
    assert tensors.keys() == expected.keys()
    assert all(torch.equal(tensors[name], expected[name]) for name in expected)
    # Only what is read, and nothing twice.
    contents = hub.contents()
    needed = [path for path in contents if "README" not in path and "fp16" not in path and not path.endswith(".bin")]
    assert sorted(hub.downloaded()) == sorted(needed)
    # What was read is in the provenance, to the bit.
    assert header.provenance["source"] == f"{NAME} on the Hugging Face hub, commit {COMMIT}"
    assert header.provenance["license"] == "openrail++"
    for path in needed:
        assert header.provenance[f"sha256 of {path}"] == hashlib.sha256(contents[path]).hexdigest()
    raft = hashlib.sha256((DATA / "golden/raft_small.pth").read_bytes()).hexdigest()
    assert header.provenance[f"sha256 of {RAFT}"] == raft
    # The token goes to the hub only, not to the storage behind it.
    assert {token for kind, _, _, token in hub.requests if kind != "file"} == {"Bearer secret"}
    assert {token for kind, path, _, token in hub.requests if kind == "file" and path.endswith("tensors")} == {None}
    # The downloads are gone; the second time nothing is asked for.
    assert not download_folder(Name(NAME), COMMIT).exists()
    hub.requests.clear()
    assert weights_by_name(f"hub:{NAME}") == file
    assert build_model(f"hub:{NAME}", device="cpu").provenance == header.provenance
    assert hub.requests == []


@pytest.mark.usefixtures("unconverted")
def test_a_connection_that_breaks_is_taken_up_again(hub: FakeHub) -> None:
    hub.cuts = {UNET: 2_000_000}
    weights_by_name(NAME)
    assert hub.ranges(UNET) == [None, "bytes=2000000-"]


@pytest.mark.usefixtures("unconverted")
@pytest.mark.parametrize("ignores_ranges", [False, True])
def test_an_interrupted_download_goes_on_in_the_next_run(hub: FakeHub, ignores_ranges: bool) -> None:
    hub.stops_at = {UNET: 2_000_000}
    with pytest.raises(ResourceError, match=r"^the hub could not be reached for owner/StableVSR \(.*again to go on$"):
        weights_by_name(NAME)
    part = client.part_of(download_folder(Name(NAME), COMMIT) / UNET)
    assert part.stat().st_size == 2_000_000
    before = hub.downloaded()
    hub.stops_at, hub.ignores_ranges = {}, ignores_ranges
    hub.requests.clear()
    weights_by_name(NAME)  # which checks the whole file, so that the pieces must fit
    assert hub.ranges(UNET) == ["bytes=2000000-"]
    assert set(hub.downloaded()) & set(before) == {UNET}  # what was complete is not fetched again


@pytest.mark.usefixtures("unconverted")
def test_a_wrong_hash_is_found_and_repaired_by_the_next_run(hub: FakeHub) -> None:
    for path in ("scheduler/scheduler_config.json", UNET):
        hub.damaged = {path}
        with pytest.raises(WeightsError, match=f"{path} is not the file that the hub describes .* so it was removed"):
            weights_by_name(NAME)
        assert not (download_folder(Name(NAME), COMMIT) / path).exists()
    hub.damaged = set()
    assert weights_by_name(NAME).is_file()


@pytest.mark.parametrize(
    ("refused", "kind", "words"),
    [
        (
            (401, "RepoNotFound"),
            WeightsError,
            "neither a file here nor a model on the hub that you may read: check the",
        ),
        ((404, "RepoNotFound"), WeightsError, "neither a file here nor a model on the hub"),
        ((403, "GatedRepo"), WeightsError, "asks for its terms to be accepted: do that on its page"),
        ((403, ""), ResourceError, r"the hub refused owner/StableVSR \(HTTP status 403\): check your token"),
        ((500, ""), ResourceError, r"\(HTTP status 500\): try again later"),
    ],
)
def test_refusals_are_one_sentence(hub: FakeHub, refused: tuple[int, str], kind: type, words: str) -> None:
    hub.refused = refused
    with pytest.raises(kind, match=words) as caught:
        weights_by_name(NAME)
    assert "\n" not in str(caught.value)


def test_other_failures_are_one_sentence(hub: FakeHub, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(WeightsError, match=r"^owner/StableVSR has no revision v9: check the name, or omit it$"):
        weights_by_name(f"{NAME}@v9")
    with pytest.raises(WeightsError, match=r"^other/model is neither a file here nor a model on the hub"):
        weights_by_name("other/model")
    hub.lost = {UNET}
    with pytest.raises(WeightsError, match=r"^owner/StableVSR lacks a file that its list has"):
        weights_by_name(NAME)
    hub.unlisted = {path for path in hub.contents() if path.startswith("vae/diff")}
    with pytest.raises(WeightsError, match=r"^owner/StableVSR: vae holds no weights: expected"):
        weights_by_name(NAME)
    point_to("http://127.0.0.1:9", monkeypatch)  # where nobody listens
    with pytest.raises(ResourceError, match=r"^the hub could not be reached for owner/StableVSR \(.*refused.*\)"):
        weights_by_name(NAME)


@pytest.mark.usefixtures("unconverted")
def test_a_pinned_revision_is_another_entry(hub: FakeHub) -> None:
    pinned = weights_by_name(f"{NAME}@v1")
    assert ("list", f"{NAME}/revision/v1", None, "Bearer secret") in hub.requests
    assert pinned != weights_file(Name(NAME))
    assert weights_by_name(f"{NAME}@{COMMIT}").parent.name == f"owner--StableVSR@{COMMIT}"


@pytest.mark.usefixtures("unconverted")
def test_a_full_disk_costs_no_byte_that_has_come(hub: FakeHub, monkeypatch: pytest.MonkeyPatch) -> None:
    usage = namedtuple("usage", "total used free")
    with monkeypatch.context() as context:
        context.setattr("stablevsr.hub.fetch.shutil.disk_usage", lambda _: usage(10**12, 0, 10**9))
        with pytest.raises(ResourceError, match=r"needs 1.1 GB in .* the disk has 1.0 GB: make room, or set XDG_CACHE"):
            weights_by_name(NAME)
    assert not any(path.endswith(".safetensors") for path in hub.downloaded())

    def full(_: int) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    with monkeypatch.context() as context:
        context.setattr("stablevsr.hub.client.os.fsync", full)
        with pytest.raises(
            ResourceError, match=r"^the disk is full, owner/StableVSR is not complete: make room and run"
        ):
            weights_by_name(NAME)
    hub.requests.clear()
    weights_by_name(NAME)
    first = next(path for path in hub.contents() if path.startswith("tokenizer/vocab"))
    assert first not in hub.downloaded()  # it was whole


def in_hub_cache(hub: FakeHub, tmp_path: Path) -> None:
    """As `hf download` leaves a model."""
    storage = tmp_path / "hf/models--owner--StableVSR"
    shutil.copytree(hub.folder, storage / "snapshots" / COMMIT)
    (storage / "refs").mkdir()
    (storage / "refs/main").write_text(COMMIT)


def test_offline(hub: FakeHub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    with pytest.raises(ResourceError, match=r"^owner/StableVSR is not in the cache, and HF_HUB_OFFLINE forbids"):
        weights_by_name(NAME)
    in_hub_cache(hub, tmp_path)
    raft = tmp_path / "torch/hub/checkpoints" / RAFT
    raft.rename(tmp_path / "raft.pth")
    with pytest.raises(ResourceError, match=r"^RAFT \(.*ff5fadd5.pth\) is not in the cache, and HF_HUB_OFFLINE"):
        weights_by_name(NAME)
    (tmp_path / "raft.pth").rename(raft)
    file = weights_by_name(NAME)
    assert read_header(file).provenance["source"].endswith(f"commit {COMMIT}")
    shutil.rmtree(tmp_path / "hf")
    assert weights_by_name(NAME) == file
    assert hub.requests == []


@pytest.mark.usefixtures("unconverted")
def test_files_of_the_hubs_own_cache_are_not_fetched_again(hub: FakeHub, tmp_path: Path) -> None:
    in_hub_cache(hub, tmp_path)
    weights_by_name(NAME, lambda _: pytest.fail("there is nothing to ask for"))
    assert hub.downloaded() == []
    assert (tmp_path / "hf/models--owner--StableVSR/snapshots" / COMMIT / UNET).is_file()  # it stays


def test_raft_that_cannot_be_downloaded(hub: FakeHub, tmp_path: Path, monkeypatch, capsys) -> None:
    from urllib.error import URLError

    def fail(*_: object, **__: object) -> None:
        print("Downloading: as torch says it")
        raise URLError("no route")

    shutil.rmtree(tmp_path / "torch")
    offers = []
    monkeypatch.setattr("torchvision.models._api.load_state_dict_from_url", fail)
    with pytest.raises(ResourceError, match=r"^RAFT could not be downloaded from .*no route.*or put the file into"):
        weights_by_name(NAME, lambda offer: offers.append(str(offer)) or True)
    assert "10.0 MB to download, and 21.1 MB of RAFT from torchvision (license: BSD-3-Clause); the cache" in offers[0]
    assert capsys.readouterr().out == ""
    assert UNET not in hub.downloaded()  # the small one first


def test_variants_and_shards(hub: FakeHub, folder: Path, tmp_path: Path) -> None:
    for part in ("unet", "vae", "controlnet", "text_encoder"):
        (weights,) = (p for p in (folder / part).glob("*.safetensors") if "fp16" not in p.name)
        tensors = {name: t.half() for name, t in load_file(weights).items()}
        save_file(tensors, weights.with_suffix(".fp16.safetensors"), metadata={"format": "pt"})
    names = sorted(tensors := load_file(folder / "controlnet/diffusion_pytorch_model.fp16.safetensors"))
    shards = {"00001": names[:50], "00002": names[50:]}
    (folder / "controlnet/diffusion_pytorch_model.fp16.safetensors").unlink()
    for number, part in shards.items():
        shard = folder / f"controlnet/diffusion_pytorch_model-{number}-of-00002.fp16.safetensors"
        save_file({name: tensors[name] for name in part}, shard, metadata={"format": "pt"})
    where = {n: f"diffusion_pytorch_model-{k}-of-00002.fp16.safetensors" for k, part in shards.items() for n in part}
    index = folder / "controlnet/diffusion_pytorch_model.safetensors.index.fp16.json"
    index.write_text(json.dumps({"weight_map": where}))
    output = tmp_path / "half.safetensors"
    assert main(["convert", f"hub:{NAME}", "-o", str(output), "--variant", "fp16", "--yes"]) == 0
    large = [path for path in hub.downloaded() if path.endswith((".safetensors", ".bin"))]
    assert len(large) == 5
    assert all("fp16" in path for path in large)
    assert read(output)[1]["unet.encoder.conv_in.weight"].dtype == torch.float16


def test_a_model_of_another_kind_is_named_before_its_weights_are_fetched(hub: FakeHub, folder: Path) -> None:
    config = json.loads((folder / "unet/config.json").read_text())
    (folder / "unet/config.json").write_text(json.dumps(config | {"_class_name": "UNet3DConditionModel"}))
    (folder / "model_index.json").write_text('{"_class_name": "TextToVideoSDPipeline"}')
    with pytest.raises(WeightsError, match=r"is of a kind that is not read \(TextToVideoSDPipeline; unet/config.json"):
        weights_by_name(NAME)
    shutil.rmtree(folder / "unet")
    hub.kind = "WhisperForConditionalGeneration"
    with pytest.raises(WeightsError, match=r"not read \(WhisperForConditionalGeneration\): expected the folders of St"):
        weights_by_name(NAME)
    assert not any(path.endswith(".safetensors") for path in hub.downloaded())


def test_the_question(hub: FakeHub, tmp_path: Path, monkeypatch, capsys: pytest.CaptureFixture) -> None:
    hub.license = None
    iio.imwrite(tmp_path / "in.png", np.zeros((8, 8, 3), np.uint8))
    line = ["upscale", str(tmp_path / "in.png"), str(tmp_path / "out.png"), "--weights", NAME, "--device", "cpu"]
    assert main([*line, "--steps", "1"]) == 2
    told = capsys.readouterr().err
    assert told.count("\n") == 1
    assert "license: not stated): " in told
    assert "pass --yes to download without a question" in told
    assert main([line[0], str(tmp_path / "none.png"), *line[2:]]) == 2  # the input is looked at first
    assert "does not exist" in capsys.readouterr().err

    class Terminal(io.StringIO):
        def isatty(self) -> bool:
            return True

    monkeypatch.setattr("sys.stdin", Terminal("n\n"))
    assert main(line) == 2
    told = capsys.readouterr().err
    assert "download? [y/N]" in told
    assert "owner/StableVSR was not downloaded" in told
    assert not any(path.endswith(".safetensors") for path in hub.downloaded())
    monkeypatch.setattr("sys.stdin", Terminal("y\n"))
    assert main([*line, "--steps", "1"]) == 0  # from nothing to a result
    assert iio.imread(tmp_path / "out.png").shape == (32, 32, 3)


def test_convert_fills_the_cache_that_is_listed_and_cleared(hub: FakeHub, capsys: pytest.CaptureFixture) -> None:
    assert main(["cache"]) == 0
    assert capsys.readouterr().out == f"{cache_folder()}: nothing is kept\n"
    assert main(["convert", f"hub:{NAME}", "--with-text", "--dtype", "fp16", "--yes"]) == 0
    told = capsys.readouterr().out
    assert f"source: {NAME} on the Hugging Face hub, commit {COMMIT}" in told
    assert "license: openrail++" in told
    assert read_header(weights_by_name(NAME)).config.text is not None  # --weights takes what was converted
    assert main(["convert", f"hub:{NAME}", "--yes"]) == 2
    assert "exists already" in capsys.readouterr().err
    hub.stops_at = {UNET: 1_000_000}
    assert main(["convert", f"hub:{NAME}@v1", "--yes"]) == 2
    capsys.readouterr()
    assert main(["cache"]) == 0
    unfinished, kept, total = capsys.readouterr().out.splitlines()
    assert unfinished.startswith(f"{NAME}@{COMMIT}: unfinished download, ")
    assert kept.startswith(f"{NAME}@latest: weights, ")
    assert "MB" in total
    assert main(["models"]) == 0
    assert all(known.repo in capsys.readouterr().out for known in KNOWN[:1])
    assert main(["cache", "--clear", "other/model"]) == 2
    assert f"the cache has {NAME}@{COMMIT}, {NAME}@latest" in capsys.readouterr().err
    assert main(["cache", "--clear", f"{NAME}@latest"]) == 0
    assert not weights_file(Name(NAME)).exists()
    assert download_folder(Name(NAME), COMMIT).exists()
    (cache_folder() / "notes.txt").write_text("mine")
    assert main(["cache", "--clear"]) == 0
    assert not download_folder(Name(NAME), COMMIT).exists()
    assert (cache_folder() / "notes.txt").exists()


def test_every_command_takes_names(hub: FakeHub, tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    assert main(["inspect", NAME]) == 2
    assert "pass --yes to download without a question" in capsys.readouterr().err
    assert main(["inspect", NAME, "--yes"]) == 0
    assert f"source: {NAME} on the Hugging Face hub" in capsys.readouterr().out
    hub.requests.clear()
    assert main(["convert", "--inspect", NAME]) == 0
    assert main(["convert", "--to-diffusers", str(tmp_path / "back"), f"hub:{NAME}"]) == 0
    assert (tmp_path / "back/unet/config.json").exists()
    assert main(["convert", "--base", NAME, "-o", str(tmp_path / "mine.safetensors")]) == 0
    pictures = tmp_path / "pictures"
    pictures.mkdir()
    for name in "ab":
        iio.imwrite(pictures / f"{name}.png", np.random.default_rng(0).integers(0, 256, (32, 32, 3), dtype=np.uint8))
    capsys.readouterr()
    assert main(["evaluate", str(pictures), str(pictures), "--weights", NAME, "--device", "cpu"]) == 0
    page = ["-o", str(tmp_path / "page.html"), "--weights", NAME, "--device", "cpu"]
    small = tmp_path / "small"
    small.mkdir()
    for name in "ab":
        iio.imwrite(small / f"{name}.png", np.zeros((8, 8, 3), np.uint8))
    assert main(["compare", str(small), str(pictures), *page]) == 0
    assert NAME in (tmp_path / "page.html").read_text()
    assert main(["evaluate", str(pictures), str(pictures), "--weights", "small-streaming", "--device", "cpu"]) == 0
    assert hub.requests == []


def test_a_recipe_takes_names(hub: FakeHub, tmp_path: Path) -> None:
    assert located(tmp_path, "small") == bundled_weights("small")
    assert located(tmp_path, "owner/StableVSR") == tmp_path / "owner/StableVSR"  # a path, as without the prefix
    assert located(tmp_path, f"hub:{NAME}") == weights_file(Name(NAME))
    (tmp_path / "small").touch()
    assert located(tmp_path, "small") == tmp_path / "small"


@pytest.mark.usefixtures("unconverted")
def test_two_processes_do_not_download_the_same(hub: FakeHub) -> None:
    from filelock import FileLock

    folder = download_folder(Name(NAME), COMMIT)
    folder.mkdir(parents=True)
    said = r"^another process is downloading owner/StableVSR: wait for it$"
    with FileLock(folder.with_name(f".{folder.name}.lock")), pytest.raises(ResourceError, match=said):
        weights_by_name(NAME)
    assert weights_by_name(NAME).is_file()


@pytest.mark.usefixtures("unconverted")
def test_a_cache_that_cannot_be_written_is_one_sentence(hub: FakeHub, monkeypatch: pytest.MonkeyPatch, capsys) -> None:
    cache_folder().mkdir(parents=True)
    said = (
        r"^the cache .*/{} cannot be written \((Not a directory|File exists)\): set XDG_CACHE_HOME to another folder$"
    )
    for kind in ("downloads", "weights"):
        (cache_folder() / kind).touch()
        with pytest.raises(ResourceError, match=said.format(f"{kind}.*")):
            weights_by_name(NAME)
        assert main(["convert", f"hub:{NAME}", "--yes"]) == 2
        assert "cannot be written" in capsys.readouterr().err
        (cache_folder() / kind).unlink()
    weights_file(Name(NAME)).parent.mkdir(parents=True)
    monkeypatch.setattr(Path, "is_file", lambda self: (_ for _ in ()).throw(PermissionError(13, "Permission denied")))
    with pytest.raises(ResourceError, match=r"stablevsr.safetensors cannot be read \(Permission denied\): check"):
        weights_by_name(NAME)


def test_what_a_killed_process_left_in_the_cache(hub: FakeHub, tiny_weights: Path, capsys, caplog) -> None:
    file = weights_file(Name(NAME))
    file.parent.mkdir(parents=True)
    (file.parent / ".stablevsr-0123456789ab.part").write_bytes(b"half")
    assert main(["cache"]) == 0
    assert f"{NAME}@latest: unfinished" in capsys.readouterr().out
    file.write_bytes(tiny_weights.read_bytes()[:-100])  # as after a crash of the machine
    weights_by_name(NAME)
    assert "is truncated or not a safetensors file" in caplog.text
    assert "it is made again" in caplog.text
    assert [path.name for path in file.parent.iterdir()] == [file.name]
    hub.requests.clear()
    assert read(weights_by_name(NAME))[1]
    assert hub.requests == []


def test_clearing_says_what_it_did(hub: FakeHub, monkeypatch: pytest.MonkeyPatch, capsys) -> None:
    for name in (Name(NAME), Name(NAME, "refs/pr/1")):
        weights_file(name).parent.mkdir(parents=True)
        weights_file(name).write_bytes(bytes(1_000_000))
    with monkeypatch.context() as read_only:
        read_only.setattr("stablevsr.atomic.shutil.rmtree", lambda *_, **__: None)
        assert main(["cache", "--clear"]) == 2
    assert "could not be deleted: check its permissions" in capsys.readouterr().err
    assert main(["cache", "--clear", f"hub:{NAME}@refs/pr/1", f"{NAME}@refs/pr/1"]) == 0
    assert ": 1.0 MB freed" in capsys.readouterr().out
    assert main(["cache", "--clear", NAME]) == 0
    assert not list((cache_folder() / "weights").iterdir())


@pytest.mark.usefixtures("unconverted")
def test_a_file_system_without_locks(hub: FakeHub, monkeypatch: pytest.MonkeyPatch, caplog) -> None:
    def acquire(*_: object, **__: object) -> None:
        raise NotImplementedError("no flock here")

    monkeypatch.setattr("filelock.FileLock.acquire", acquire)
    assert weights_by_name(NAME).is_file()
    assert "on a file system without locks" in caplog.text


def test_without_the_package_one_sentence_says_how_to_get_it(hub: FakeHub, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "huggingface_hub", None)
    with pytest.raises(ResourceError, match=r"^weights by name need .*: pip install 'stablevsr\[hub\]'$"):
        weights_by_name(NAME)


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("claudiom4sir/StableVSR", Name("claudiom4sir/StableVSR")),
        ("hub:a/b.c-d_e", Name("a/b.c-d_e")),
        ("a/b@v1.0", Name("a/b", "v1.0")),
        ("hub:a/b@refs/pr/1", Name("a/b", "refs/pr/1")),
        ("a/b.safetensors", None),
        ("weights.safetensors", None),
        ("/a/b", None),
        ("./a/b", None),
        ("a/b/c", None),
        ("../b", None),
        ("hub:a", "expected hub:OWNER/NAME"),
        ("hub:a/b@..", "expected hub:OWNER/NAME"),
        ("hub:../b", "expected hub:OWNER/NAME"),
        ("hub:", "expected hub:OWNER/NAME"),
        ("hub:a/b ", "expected hub:OWNER/NAME"),
        ("hub:a/b@v1@v2", "expected hub:OWNER/NAME"),
        ("hub:a--b/c", "expected hub:OWNER/NAME"),
        ("hub:a/b.git", "expected hub:OWNER/NAME"),
        ("hub:a/-b", "expected hub:OWNER/NAME"),
        ("hub:a/" + "b" * 95, "expected hub:OWNER/NAME"),
        ("https://example.com/a/b", "got the web address https://example.com/a/b, expected OWNER/NAME"),
        ("a/b/", Name("a/b")),
        ("hub:a/b/", Name("a/b")),
        ("a/b@", None),
        ("a--b/c", None),
        ("a/b.", None),
        ("a/b\n", None),
    ],
)
def test_names(text: str, expected: Name | str | None) -> None:
    if isinstance(expected, str):
        with pytest.raises(OptionsError, match=expected):
            parse_name(text)
    else:
        assert parse_name(text) == expected


def test_an_empty_name_is_not_the_bundled_model(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    iio.imwrite(tmp_path / "in.png", np.zeros((8, 8, 3), np.uint8))
    assert main(["upscale", str(tmp_path / "in.png"), str(tmp_path / "out.png"), "--weights", ""]) == 2
    assert "got an empty name for the weights" in capsys.readouterr().err


def test_a_file_comes_before_a_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, tiny_weights: Path) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "owner").mkdir()
    shutil.copy(tiny_weights, tmp_path / "owner/StableVSR")
    assert parse_name(NAME) is None
    assert parse_name(f"hub:{NAME}") == Name(NAME)
    assert build_model(NAME, device="cpu").provenance == {"note": "random"}


def test_the_caches_place(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
    for platform, expected in (
        ("linux", Path.home() / ".cache/stablevsr"),
        ("darwin", Path.home() / "Library/Caches/stablevsr"),
    ):
        monkeypatch.setattr("sys.platform", platform)
        assert cache_folder() == expected


def test_the_lists_need_no_torch(tmp_path: Path) -> None:
    code = (
        "import sys\nfrom stablevsr.cli import main\nmain(['models']); main(['cache'])\nprint('torch' in sys.modules)"
    )
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "XDG_CACHE_HOME": str(tmp_path)}
    start = time.monotonic()
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=environment, check=True)
    assert time.monotonic() - start < 10
    assert done.stdout.splitlines()[-1] == "False"
    assert "claudiom4sir/StableVSR" in done.stdout


def test_errors_of_ours_pass_unchanged(hub: FakeHub) -> None:
    with pytest.raises(UserError, match=r"^mine$"), client.explained(Name(NAME)):
        raise WeightsError("mine")
