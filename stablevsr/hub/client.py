"""The hub: what it says of a model, and its files, through the package huggingface_hub."""

import contextlib
import errno
import hashlib
import logging
import os
import shutil
from collections.abc import Iterator
from pathlib import Path

from stablevsr.errors import OptionsError, ResourceError, UserError, WeightsError
from stablevsr.hub.names import Name
from stablevsr.hub.repository import RemoteFile, Repository

log = logging.getLogger(__name__)
TIMEOUT = 30.0  # seconds, for what the hub says of a model
INSTALL = "weights by name need the package huggingface_hub: pip install 'stablevsr[hub]'"


def require_client() -> None:
    """`ResourceError` unless the package is installed."""
    try:
        import huggingface_hub  # noqa: F401
    except ImportError as error:
        raise ResourceError(INSTALL) from error


def is_offline() -> bool:
    """Whether the user has asked the hub's package to stay offline (HF_HUB_OFFLINE)."""
    from huggingface_hub import constants

    return constants.HF_HUB_OFFLINE


@contextlib.contextmanager
def explained(name: Name) -> Iterator[None]:
    """Turn every failure of the hub into one sentence."""
    from huggingface_hub import errors

    try:
        with _quietly():
            yield
    except UserError:
        raise
    except errors.GatedRepoError as error:
        raise WeightsError(
            f"{name} asks for its terms to be accepted: do that on its page on the hub, then run hf auth login"
        ) from error
    except errors.RevisionNotFoundError as error:
        raise WeightsError(f"{name.repo} has no revision {name.revision}: check the name, or omit it") from error
    except errors.RepositoryNotFoundError as error:
        raise WeightsError(
            f"{name.repo} is neither a file here nor a model on the hub that you may read: check the name, or run "
            "hf auth login if it is private"
        ) from error
    except errors.EntryNotFoundError as error:
        raise WeightsError(f"{name} lacks a file that its list has: try again, or another revision") from error
    except errors.HFValidationError as error:
        raise OptionsError(f"{name} is no name that the hub allows ({reason_of(error)}): check it") from error
    except errors.OfflineModeIsEnabled as error:
        raise ResourceError(
            f"{name} is not in the cache, and HF_HUB_OFFLINE forbids to download it: unset it"
        ) from error
    except errors.HfHubHTTPError as error:
        status = error.response.status_code
        advice = "check your token with hf auth whoami" if status in (401, 403) else "try again later"
        raise ResourceError(f"the hub refused {name} (HTTP status {status}): {advice}") from error
    except errors.HTTPError as error:  # of the connection
        raise ResourceError(
            f"the hub could not be reached for {name} ({reason_of(error)}): run the same command again to go on"
        ) from error
    except OSError as error:
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            raise ResourceError(
                f"the disk is full, {name} is not complete: make room and run the same command again to go on"
            ) from error
        reason = " ".join(str(error.strerror or error).split())
        raise ResourceError(
            f"{name} could not be downloaded ({reason}): run the same command again to go on"
        ) from error


@contextlib.contextmanager
def _quietly() -> Iterator[None]:
    """Without the package's own messages, of which ours are the short form."""
    from huggingface_hub.utils import logging as hub_logging

    before = hub_logging.get_verbosity()
    hub_logging.set_verbosity_error()
    try:
        yield
    finally:
        hub_logging.set_verbosity(before)


def offline(what: str) -> ResourceError:
    return ResourceError(f"{what} is not in the cache, and HF_HUB_OFFLINE forbids to download it: unset it")


def reason_of(error: Exception) -> str:
    """What an error of another package says, on one line."""
    return " ".join(str(getattr(error, "strerror", None) or error).split()) or type(error).__name__


def look_up(name: Name) -> Repository:
    """What the hub says of a model.

    Raises:
        WeightsError: for one that does not exist or may not be read.
        ResourceError: when the hub cannot be reached.
    """
    from huggingface_hub import HfApi

    with explained(name):
        api = HfApi(library_name="stablevsr")
        info = api.model_info(name.repo, revision=name.revision, files_metadata=True, timeout=TIMEOUT)
    files = {
        each.rfilename: RemoteFile(each.size or 0, each.lfs.sha256 if each.lfs else None, each.blob_id)
        for each in info.siblings or ()
    }
    card = info.card_data.to_dict() if info.card_data else {}
    stated = card.get("license_name") or card.get("license")
    kind = (info.config or {}).get("diffusers", {}).get("_class_name") or info.library_name
    assert info.sha is not None
    return Repository(name, info.sha, str(stated or "not stated"), kind or "no known pipeline", files)


def in_hub_cache(name: Name, path: str, commit: str | None = None) -> Path | None:
    """A file of a model in the hub's own cache; None if it is not there."""
    from huggingface_hub import try_to_load_from_cache

    found = try_to_load_from_cache(name.repo, path, revision=commit or name.revision)
    return Path(found) if isinstance(found, str) else None


def fetch_file(repository: Repository, path: str, target: Path) -> str:
    """Bring one file to `target`, unless it is there; goes on with what an interrupted download has left.

    A file that the hub's own cache has is linked to. The content is checked against what the hub says of it.

    Returns:
        Its SHA-256.

    Raises:
        WeightsError: for content that is not what the hub says.
        ResourceError: when the connection breaks, or the disk is full; what has come stays for the next time.
    """
    name, file = repository.name, repository.files[path]
    if not target.exists():
        with explained(name):
            target.parent.mkdir(parents=True, exist_ok=True)
            cached = in_hub_cache(name, path, repository.commit)
            if cached is not None:
                target.unlink(missing_ok=True)  # a link to what was deleted
                _link(target, cached.resolve())
            else:
                _download(repository, path, target)
    digest = sha256(target)
    if file.sha256 not in (None, digest) or (file.sha256 is None and file.blob not in (None, _git_blob(target))):
        target.unlink()
        raise WeightsError(
            f"{name}: {path} is not the file that the hub describes (its checksum differs), so it was removed: run the "
            "same command again"
        )
    return digest


def _link(target: Path, source: Path) -> None:
    try:
        target.symlink_to(source)
    except OSError:  # Windows allows links to few
        shutil.copyfile(source, target)


def part_of(target: Path) -> Path:
    """What there is of a file while it is downloaded."""
    return target.with_name(target.name + ".part")


def _download(repository: Repository, path: str, target: Path) -> None:
    from huggingface_hub import HfApi, hf_hub_url
    from huggingface_hub.file_download import http_get  # which the package's own cache cannot resume after a kill
    from huggingface_hub.utils import build_hf_headers

    part, size = part_of(target), repository.files[path].size
    with part.open("a+b") as file:
        if file.tell() > size:
            file.truncate(0)
        url = hf_hub_url(repository.name.repo, path, revision=repository.commit, endpoint=HfApi().endpoint)
        if done := file.tell():
            log.info("%s: going on at %d of %d bytes", path, done, size)
        # Uncompressed, so that a range of it means what it says.
        headers = build_hf_headers(library_name="stablevsr") | {"Accept-Encoding": "identity"}
        with _progress():
            http_get(url, file, resume_size=done, headers=headers, expected_size=size, displayed_filename=path)
        file.flush()
        os.fsync(file.fileno())
    part.rename(target)


@contextlib.contextmanager
def _progress() -> Iterator[None]:
    """Progress bars where our own messages are shown, and nowhere else."""
    from huggingface_hub.utils import are_progress_bars_disabled, disable_progress_bars, enable_progress_bars

    if log.isEnabledFor(logging.INFO) or are_progress_bars_disabled():
        yield
        return
    disable_progress_bars()
    try:
        yield
    finally:
        enable_progress_bars()


def sha256(path: Path) -> str:
    """Of a file's content, in hexadecimal."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _git_blob(path: Path) -> str:
    """As git names a file's content."""
    content = path.read_bytes()
    return hashlib.sha1(b"blob %d\0" % len(content) + content, usedforsecurity=False).hexdigest()
