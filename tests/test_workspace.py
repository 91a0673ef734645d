"""The workspace: whose it is, what it agrees to go on with, and how the errors of the disk are told."""

import errno
import json
import os
import stat
import threading
from pathlib import Path

import numpy as np
import pytest
import torch

from stablevsr.engine import workspace as room
from stablevsr.engine.state import RunState
from stablevsr.engine.workspace import ArrayFile, Workspace, open_workspace, workspace_path
from stablevsr.errors import UserError

fcntl = pytest.importorskip("fcntl")


@pytest.fixture
def output(tmp_path: Path) -> Path:
    return tmp_path / "out.mp4"


def begin(output: Path, fingerprint: dict[str, object], **options: bool) -> None:
    with open_workspace(output) as workspace:
        workspace.begin(fingerprint, **options)


@pytest.mark.parametrize(
    ("then", "now", "words"),
    [
        ({"seed": 1}, {"seed": 2}, r"another seed \(1, now 2\)"),
        ({"seed": 1, "eta": 0.5}, {"seed": 1}, r"another eta \(0.5, now None\)"),
        ({"seed": 1}, {"seed": 1, "eta": 0.5}, r"another eta \(None, now 0.5\)"),
        ({"eta": None}, {}, r"another eta \(None, now None\)"),
    ],
)
def test_a_run_of_other_settings_is_refused_in_both_directions(output: Path, then: dict, now: dict, words: str) -> None:
    begin(output, then)
    with pytest.raises(UserError, match=words):
        begin(output, now)
    begin(output, then)
    begin(output, now, restart=True)
    begin(output, now)


def test_numbers_of_numpy_are_numbers(output: Path) -> None:
    begin(output, {"steps": np.int64(5), "eta": np.float32(0.5)})
    begin(output, {"steps": 5, "eta": 0.5})


@pytest.mark.parametrize("change", [{"workspace format": 1}, {"workspace format": None}, {"version of stablevsr": "0"}])
def test_a_workspace_of_another_version_says_how_to_get_out(output: Path, change: dict[str, object]) -> None:
    ours = {"version of stablevsr": "0.1.0", "seed": 1}
    begin(output, ours)
    job = workspace_path(output) / "job.json"
    theirs = {name: value for name, value in (json.loads(job.read_text()) | change).items() if value is not None}
    job.write_text(json.dumps(theirs))
    with pytest.raises(UserError, match=r"started by another version of stablevsr \(0.*start again with --restart"):
        begin(output, {**ours, "more": 1})
    begin(output, ours, restart=True)


@pytest.mark.parametrize("content", ["[]", "3", "{"])
def test_a_damaged_note_is_told(output: Path, content: str) -> None:
    begin(output, {})
    (workspace_path(output) / "job.json").write_text(content)
    with pytest.raises(UserError, match=r"job.json is damaged: start again with --restart"):
        begin(output, {})
    begin(output, {}, restart=True)


def test_a_workspace_in_which_nothing_began_goes_away(output: Path) -> None:
    with pytest.raises(ZeroDivisionError), open_workspace(output):
        raise ZeroDivisionError
    assert not workspace_path(output).exists()


def test_a_link_is_refused_and_what_it_leads_to_is_left_alone(output: Path, tmp_path: Path) -> None:
    victim = tmp_path / "victim"
    victim.mkdir()
    workspace_path(output).symlink_to(victim)
    with pytest.raises(UserError, match="is a link, expected a folder"):
        begin(output, {}, restart=True)
    assert list(victim.iterdir()) == []


def test_a_file_is_refused(output: Path) -> None:
    workspace_path(output).write_text("mine")
    with pytest.raises(UserError, match="is a file, expected a folder"):
        begin(output, {}, restart=True)


def test_the_folder_of_another_user_is_refused(output: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    begin(output, {})
    monkeypatch.setattr(os, "getuid", lambda: os.stat(output.parent).st_uid + 1)
    monkeypatch.setattr(room, "_owner_of_new_files", lambda folder: os.getuid())
    with pytest.raises(UserError, match="belongs to another user"):
        begin(output, {}, restart=True)


def test_a_mount_that_maps_owners_takes_a_run_and_its_continuation(output: Path, monkeypatch) -> None:
    """As CIFS, FUSE, NFS with squashed owners and Windows drives in WSL do: everything belongs to one other user."""
    monkeypatch.setattr(os, "getuid", lambda: os.stat(output.parent).st_uid + 1)
    begin(output, {"seed": 1})
    begin(output, {"seed": 1})
    assert [path.name for path in output.parent.iterdir()] == [workspace_path(output).name]


def test_nobody_else_can_read_prompts_and_paths(output: Path) -> None:
    def rights() -> int:
        return stat.S_IMODE(workspace_path(output).stat().st_mode)

    begin(output, {"prompt": "secret"})
    assert rights() == 0o700
    workspace_path(output).chmod(0o755)  # as older versions made them
    begin(output, {"prompt": "secret"})
    assert rights() == 0o700


@pytest.mark.parametrize("code", [errno.ENOLCK, errno.ENOSYS, errno.ENOTSUP, errno.EOPNOTSUPP])
def test_a_file_system_without_locks_is_noted(output: Path, monkeypatch, caplog, code: int) -> None:
    def flock(*_: object) -> None:
        raise OSError(code, os.strerror(code))

    monkeypatch.setattr(fcntl, "flock", flock)
    with open_workspace(output) as workspace:
        workspace.begin({})
    assert len(caplog.messages) == 1
    assert "file system without locks" in caplog.messages[0]


@pytest.mark.skipif(not Path("/proc/self/fd").exists(), reason="the system does not tell open files")
def test_no_file_is_open_where_open_files_cannot_be_deleted(output: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As on Windows, which has no fcntl either: the workspace could not be removed."""
    monkeypatch.setattr(room, "fcntl", None)
    with open_workspace(output) as workspace:
        workspace.begin({})
        opened = [os.path.realpath(handle) for handle in Path("/proc/self/fd").iterdir()]
        assert not [path for path in opened if path.startswith(str(workspace.folder))]
        workspace.remove()


@pytest.mark.parametrize(
    "error",
    [
        FileNotFoundError(errno.ENOENT, os.strerror(errno.ENOENT), "in/001.png"),
        BrokenPipeError(errno.EPIPE, os.strerror(errno.EPIPE)),
        BlockingIOError(errno.EAGAIN, os.strerror(errno.EAGAIN)),
        OSError(errno.ENOSPC, os.strerror(errno.ENOSPC)),
    ],
)
def test_errors_of_the_block_pass_through_as_they_are(output: Path, error: OSError) -> None:
    def run() -> None:
        with open_workspace(output) as workspace:
            workspace.begin({})
            raise error

    with pytest.raises(type(error)) as caught:
        run()
    assert caught.value is error


@pytest.mark.parametrize(("code", "advice"), [(errno.ENOSPC, "make room"), (errno.EIO, "check the disk")])
@pytest.mark.parametrize("method", ["write", "read", "sync"])
def test_errors_of_the_disk_name_the_file_and_the_cause(tmp_path, monkeypatch, method, code, advice) -> None:
    array = ArrayFile(tmp_path / "latents.raw", (2,), torch.float32)

    def fail(*_: object) -> None:
        raise OSError(code, os.strerror(code))

    monkeypatch.setattr(ArrayFile, "_put", fail)
    monkeypatch.setattr(ArrayFile, "_get", fail)
    monkeypatch.setattr(os, "fsync", fail)
    with pytest.raises(UserError, match=rf"latents.raw, part of .*\({os.strerror(code)}\): {advice}"):
        getattr(array, method)(*{"write": (0, torch.zeros(2)), "read": (0,), "sync": ()}[method])


def test_a_mount_that_cannot_flush_is_no_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    array = ArrayFile(tmp_path / "latents.raw", (2,), torch.float32)
    array.write(0, torch.ones(2))

    def cannot(handle: int) -> None:
        raise OSError(errno.EINVAL, os.strerror(errno.EINVAL))

    monkeypatch.setattr(os, "fsync", cannot)
    array.sync()
    assert array.read(0).tolist() == [1, 1]


def test_the_estimate_comes_back_on_the_device_that_is_asked_for(tmp_path: Path) -> None:
    """On a GPU the loop mixes it with tensors there. The meta device stands in for one."""
    workspace = Workspace(tmp_path)
    assert workspace.state(torch.device("meta")) == RunState("flow", 0, None)
    x0 = torch.arange(3.0)
    workspace.save_state(RunState("denoise", 7, x0))
    found = workspace.state(torch.device("meta"))
    assert (found.phase, found.done, found.x0.device.type) == ("denoise", 7, "meta")
    assert torch.equal(workspace.state(torch.device("cpu")).x0, x0)


def test_temporaries_elsewhere_cannot_be_guessed_and_go_with_the_next_run(output: Path, tmp_path: Path) -> None:
    (tmp_path / "elsewhere").mkdir()
    pair = tmp_path / "elsewhere/pair.mp4"
    with open_workspace(output) as workspace:
        first = workspace.outside(pair)
        workspace.begin({})
        first.write_text("what a killed run left")
    with open_workspace(output) as workspace:
        assert not first.exists()
        second = workspace.outside(pair)
        workspace.begin({}, restart=True)
        second.write_text("as before")
    assert first.parent == second.parent == pair.parent
    assert first != second
    with open_workspace(output):
        assert not second.exists()


def test_only_temporaries_of_ours_are_removed_elsewhere(output: Path, tmp_path: Path) -> None:
    begin(output, {})
    (tmp_path / "thesis.part").write_text("years")
    for listed in ({"part": str(tmp_path / "thesis.part")}, {"part": 3}, {}):
        (workspace_path(output) / "outside.json").write_text(json.dumps(listed))
        begin(output, {})
    assert (tmp_path / "thesis.part").read_text() == "years"


def test_the_list_of_files_is_complete(output: Path) -> None:
    """What a run leaves must be known, or the next one takes it for somebody else's."""
    with open_workspace(output) as workspace:
        workspace.begin({})
        for name in ("frames", "alpha", "flows", "latents", "estimates", "borders", "pictures"):
            workspace.arrays(name, (1,))
        for name in ("clip", "plan", "units", "probe"):
            workspace.note(name, {})
        workspace.outside(output)
        workspace.save_state(RunState())
        workspace.first_pass()
        for name in ("output", "output.joined", "output.rehearsal", "written", "written.pair", "units", "turn.lock"):
            (workspace.folder / name).touch()
    assert sorted(os.listdir(workspace_path(output))) == sorted(room.FILES)


def test_processes_that_say_so_share_a_workspace(output: Path) -> None:
    with open_workspace(output, shared=True) as first:
        first.begin({})
        begun = first.folder / ".stablevsr-0123456789ab.part"
        begun.touch()
        with open_workspace(output, shared=True) as second, room.turn(second) as is_there:
            assert is_there
            assert begun.exists()  # it belongs to the other one
        with pytest.raises(room.Busy, match="another run is writing"):
            begin(output, {})
    with open_workspace(output), pytest.raises(room.Busy), open_workspace(output, shared=True):
        pass
    assert not begun.exists()


def test_one_process_at_a_time_has_its_turn(output: Path) -> None:
    order: list[str] = []

    def wait() -> None:
        with open_workspace(output, shared=True) as workspace, room.turn(workspace) as is_there:
            order.append(f"second, {is_there}")

    with open_workspace(output, shared=True) as workspace:
        workspace.begin({})
        with room.turn(workspace):
            other = threading.Thread(target=wait)
            other.start()
            other.join(0.2)
            order.append("first")
            workspace.remove()  # as the one that joins does
        other.join(10)
        assert order == ["first", "second, False"]
        with room.turn(workspace) as is_there:
            assert not is_there
