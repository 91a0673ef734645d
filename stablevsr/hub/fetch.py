"""From a name to a weights file: look up, ask, download, convert, keep."""

import contextlib
import logging
import shutil
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.parse import urlparse

import torch

from stablevsr.atomic import remove
from stablevsr.convert.assemble import Sources, convert
from stablevsr.convert.checkpoint import read_json
from stablevsr.convert.diffusers_folder import read_configs
from stablevsr.errors import OptionsError, ResourceError, WeightsError
from stablevsr.hub import client
from stablevsr.hub.cache import cache_folder, download_folder, weights_file
from stablevsr.hub.names import Name, parse_name
from stablevsr.hub.repository import Repository
from stablevsr.weights import read_header

log = logging.getLogger(__name__)
SPARE = 2**30  # bytes to leave free on the disk
FLOW_LICENSE = "BSD-3-Clause"  # of torchvision, which publishes RAFT


@dataclass(frozen=True)
class Offer:
    """What a download would bring, for the user to agree to."""

    name: Name
    commit: str
    license: str
    bytes: int  # of the model
    flow_bytes: int  # of RAFT, which torchvision publishes

    def __str__(self) -> str:
        flow = f", and {_size(self.flow_bytes)} of RAFT from torchvision (license: {FLOW_LICENSE})"
        return (
            f"{self.name} from the Hugging Face hub (commit {self.commit[:12]}, license: {self.license}): "
            f"{_size(self.bytes)} to download{flow if self.flow_bytes else ''}; the cache is {cache_folder()}"
        )


Confirm = Callable[[Offer], bool]  # whether to go on


def agree(offer: Offer) -> bool:
    """For callers who have decided: says what is downloaded, and goes on."""
    log.info("%s", offer)
    return True


def weights_by_name(text: str, confirm: Confirm = agree) -> Path:
    """The weights file that `text` names: a file, or a model on the hub, which is downloaded and converted once.

    Args:
        text: a path, or OWNER/NAME[@REVISION], with or without "hub:" before it.
        confirm: asked before anything large is downloaded.

    Raises:
        WeightsError: for a model that does not exist, may not be read, or is of another kind.
        ResourceError: when the hub cannot be reached, the disk is too small, or a package is missing.
        OptionsError: for a name that is none, and when `confirm` declines.
    """
    name = parse_name(text)
    if name is None:
        return Path(text)
    file = weights_file(name)
    if not _is_whole(file):
        with published(name, confirm=confirm) as sources:
            make_place(file)
            convert(sources, file)
    return file


def _is_whole(file: Path) -> bool:
    """Whether converted weights are there and can be read; damaged ones are made again."""
    try:
        if not file.is_file():
            return False
        read_header(file)
    except WeightsError as error:
        log.warning("%s; it is made again", error)
        return False
    except OSError as error:
        raise ResourceError(f"{file} cannot be read ({error.strerror}): check the cache's permissions") from error
    return True


def make_place(file: Path) -> None:
    """Create the folder of converted weights in the cache, without what a killed process has left there.

    Raises:
        ResourceError: when that is not possible.
    """
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        for left in file.parent.glob(".stablevsr-*.part"):
            remove(left)
    except OSError as error:
        raise _not_writable(file.parent, error) from error


def _not_writable(folder: Path, error: OSError) -> ResourceError:
    return ResourceError(
        f"the cache {folder} cannot be written ({error.strerror}): set XDG_CACHE_HOME to another folder"
    )


@contextlib.contextmanager
def published(
    name: Name, variant: str | None = None, flow: Path | None = None, confirm: Confirm = agree
) -> Iterator[Sources]:
    """The published files of a model, for `convert`; downloads are removed when the block succeeds.

    Args:
        variant: of the weights, such as "fp16".
        flow: RAFT, if it is not to be torchvision's.
        confirm: asked before anything large is downloaded.
    """
    client.require_client()
    if client.is_offline():
        yield _from_hub_cache(name, variant, flow)
        return
    repository = client.look_up(name)
    folder = download_folder(name, repository.commit)
    with _only_one(folder, name):
        hashes = _fetch(repository, repository.configs(), folder)
        _check_kind(repository, folder)
        wanted = repository.weights(variant)
        missing, flow_bytes = _missing(repository, wanted, folder), 0 if flow else _missing_flow()
        offer = Offer(name, repository.commit, repository.license, missing, flow_bytes)
        _check_room(offer, repository.bytes(wanted), folder)
        if missing + flow_bytes and not confirm(offer):
            raise OptionsError(f"{name} was not downloaded")
        flow = flow or flow_weights()
        hashes |= _fetch(repository, wanted, folder)
        origin = _origin(name, repository.commit, flow) | {"license": repository.license}
        origin |= {f"sha256 of {path}": digest for path, digest in hashes.items()}
        yield Sources(folder, flow, variant=variant, origin=origin)
    remove(folder)


def _from_hub_cache(name: Name, variant: str | None, flow: Path | None) -> Sources:
    """A model as the hub's own cache has it, for users who are offline."""
    index = client.in_hub_cache(name, "model_index.json")
    if index is None:
        raise client.offline(str(name))
    flow = flow or flow_weights(offline=True)
    return Sources(index.parent, flow, variant=variant, origin=_origin(name, index.parent.name, flow))


def _origin(name: Name, commit: str, flow: Path) -> dict[str, str]:
    """For the provenance: where the files came from."""
    return {
        "source": f"{name.repo} on the Hugging Face hub, commit {commit}",
        f"sha256 of {flow.name}": client.sha256(flow),
    }


def _fetch(repository: Repository, paths: list[str], folder: Path) -> dict[str, str]:
    return {path: client.fetch_file(repository, path, folder / path) for path in paths}


def _missing(repository: Repository, paths: list[str], folder: Path) -> int:
    """How many bytes of these files are yet to be downloaded."""
    left = 0
    for path in paths:
        if not (folder / path).exists() and not client.in_hub_cache(repository.name, path, repository.commit):
            part = client.part_of(folder / path)
            left += repository.files[path].size - (part.stat().st_size if part.exists() else 0)
    return left


def _check_kind(repository: Repository, folder: Path) -> None:
    """`WeightsError` for a model of another kind, from its configuration alone."""
    try:
        read_configs(folder)
    except WeightsError as error:
        index = folder / "model_index.json"
        kind = read_json(index).get("_class_name") if index.exists() else None
        problem = str(error).removeprefix(f"{folder}/")
        raise WeightsError(
            f"{repository.name} is of a kind that is not read ({kind or repository.kind}; {problem})"
        ) from error


def _check_room(offer: Offer, converted: int, folder: Path) -> None:
    """`ResourceError` unless download and converted file fit on the disk of the cache."""
    needed, free = offer.bytes + converted + SPARE, shutil.disk_usage(folder).free
    if needed > free:
        raise ResourceError(
            f"{offer.name} needs {_size(needed)} in {cache_folder()} while it is converted, the disk has "
            f"{_size(free)}: make room, or set XDG_CACHE_HOME to another disk"
        )


@contextlib.contextmanager
def _only_one(folder: Path, name: Name) -> Iterator[None]:
    """Keep other processes from downloading the same."""
    from filelock import FileLock, Timeout  # comes with huggingface_hub

    lock = FileLock(folder.with_name(f".{folder.name}.lock"), timeout=0)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        lock.acquire()
    except Timeout as error:
        raise ResourceError(f"another process is downloading {name}: wait for it") from error
    except NotImplementedError:  # a file system without locks: the same may be downloaded twice
        log.warning("%s is on a file system without locks: do not download the same model twice at once", folder.parent)
    except OSError as error:
        raise _not_writable(folder.parent, error) from error
    try:
        yield
    finally:
        lock.release()


def _flow() -> tuple[Any, Path]:
    """RAFT as StableVSR uses it, in torchvision's words, and its place in torchvision's cache."""
    from torchvision.models.optical_flow import Raft_Large_Weights

    weights = Raft_Large_Weights.C_T_SKHT_V2
    return weights, Path(torch.hub.get_dir()) / "checkpoints" / Path(urlparse(weights.url).path).name


def _missing_flow() -> int:
    """How many bytes of RAFT are yet to be downloaded."""
    weights, path = _flow()
    return 0 if path.is_file() else int(weights.meta.get("_file_size", 0) * 2**20)


def flow_weights(offline: bool = False) -> Path:
    """RAFT from torchvision's cache; torchvision downloads it if it is not there."""
    weights, path = _flow()
    if path.is_file():
        return path
    if offline:
        raise client.offline(f"RAFT ({path})")
    try:
        with contextlib.redirect_stdout(sys.stderr):  # torch says there what it downloads
            weights.get_state_dict(progress=log.isEnabledFor(logging.INFO), check_hash=True)
    except Exception as error:  # torch passes on what the network, the disk and its check of the hash raise
        raise ResourceError(
            f"RAFT could not be downloaded from {weights.url} ({client.reason_of(error)}): try again, or put the file "
            f"into {path.parent}"
        ) from error
    return path


def _size(count: float) -> str:
    """A number of bytes for a reader."""
    unit, text = (10**9, "GB") if count >= 10**9 else (10**6, "MB")
    return f"{count / unit:.1f} {text}"
