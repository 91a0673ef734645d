"""The command for a day with a GPU: what fails or hangs costs its own part, and nothing that was measured is lost."""

import importlib.util
import json
import sys
import time
from pathlib import Path
from types import ModuleType

import pytest

ROOT = Path(__file__).parents[1]


@pytest.fixture(scope="module")
def gpu_day() -> ModuleType:
    spec = importlib.util.spec_from_file_location("gpu_day", ROOT / "benchmarks/gpu_day.py")
    module = sys.modules["gpu_day"] = importlib.util.module_from_spec(spec)  # dataclasses look themselves up
    spec.loader.exec_module(module)
    yield module
    del sys.modules["gpu_day"]


def run(gpu_day: ModuleType, monkeypatch, folder: Path, parts: dict[str, tuple[float, str]], **more) -> tuple:
    """Parts by name, a limit and Python code each; `result` there is the file to write to."""
    code = "import pathlib, sys; result = pathlib.Path(sys.argv[1])\n"
    made = [
        gpu_day.Part(name, limit, ("-c", code + text, "{result}"), more.get(name, ()))
        for name, (limit, text) in parts.items()
    ]
    monkeypatch.setattr(gpu_day, "PARTS", made)
    monkeypatch.setattr(gpu_day, "GRACE", 0.5)
    monkeypatch.setattr(gpu_day, "ENDED", 0.5)
    monkeypatch.setattr(sys, "argv", ["gpu_day.py", "-o", str(folder), "--budget", str(more.get("budget", 60))])
    failed = gpu_day.main()
    return failed, json.loads((folder / "gpu_day.json").read_text())["parts"], (folder / "gpu_day.log").read_text()


def test_a_part_that_fails_or_hangs_does_not_stop_the_others(gpu_day, monkeypatch, tmp_path, capsys) -> None:
    child = "import subprocess; subprocess.run([sys.executable, '-c', 'import time; time.sleep(60)'])"
    deaf = "import signal; signal.signal(signal.SIGINT, signal.SIG_IGN); " + child
    parts = {
        "raises": (20, "result.write_text('{\"half\": 1}'); print('seen'); raise ValueError('broken')"),
        "killed": (20, "import os; os.kill(os.getpid(), 9)"),
        "hangs": (1, "result.write_text('{\"before\": 2}'); print('started', flush=True); " + deaf),
        "absent": (20, "print('never')"),
        "torn": (20, "result.write_text('{')"),
        "works": (20, "result.write_text('{\"value\": 3}')"),
    }
    started = time.monotonic()
    failed, rows, log = run(gpu_day, monkeypatch, tmp_path, parts, absent=("a_package_that_is_not_there",))
    assert time.monotonic() - started < 30
    assert failed
    assert list(rows) == list(parts)
    assert (rows["raises"]["rc"], rows["raises"]["result"]) == (1, {"half": 1})
    assert rows["killed"]["rc"] == -9
    assert (rows["hangs"]["timed out"], rows["hangs"]["result"]) == (True, {"before": 2})
    assert rows["absent"] == {"skipped": "a_package_that_is_not_there is not installed"}
    assert "damaged" in rows["torn"]["result"]
    assert (rows["works"]["rc"], rows["works"]["result"]) == (0, {"value": 3})
    assert all(word in log for word in ("seen", "ValueError: broken", "started", "=== works"))
    assert "hangs" in capsys.readouterr().out


def test_no_part_begins_when_the_time_is_up(gpu_day, monkeypatch, tmp_path) -> None:
    parts = {"long": (60, "import time; time.sleep(60)"), "late": (60, "result.write_text('1')")}
    _, rows, _ = run(gpu_day, monkeypatch, tmp_path, parts, budget=2)
    assert rows["long"]["timed out"]
    assert rows["late"] == {"skipped": "the time was up"}


def test_every_test_is_a_row(gpu_day, tmp_path) -> None:
    report = """<testsuites><testsuite>
        <testcase classname="tests.test_a" name="good" time="1.5"/>
        <testcase classname="tests.test_a" name="left_out" time="0.0"><skipped message="no device"/></testcase>
        <testcase classname="tests.test_b" name="bad" time="0.1"><failure message="assert 1 == 2"/></testcase>
        <testcase classname="tests.test_b" name="worse" time="0.1"><error message="no fixture"/></testcase>
        </testsuite></testsuites>"""
    (tmp_path / "tests.xml").write_text(report)
    assert gpu_day.found_in(tmp_path / "tests.xml") == {
        "counts": {"passed": 1, "failed": 2, "skipped": 1},
        "passed": {"test_a::good": 1.5},
        "failed": {"test_b::bad": "assert 1 == 2", "test_b::worse": "no fixture"},
        "skipped": {"test_a::left_out": 0.0},
    }


def test_both_days_have_parts_that_exist(gpu_day) -> None:
    """What is tried on the CPU is what runs on the GPU."""
    names = [part.name for part in gpu_day.PARTS]
    only_there = {"compiled_tests", "memory_480x270", "memory_offloaded"}
    assert [part.name for part in gpu_day.SMALL] == [name for name in names if name not in only_there]
    assert len(set(names)) == len(names)
    assert "tests/test_gpu.py" in gpu_day.gpu_tests()
    for part in (*gpu_day.PARTS, *gpu_day.SMALL):
        script = part.command[0]
        assert script == "-m" or (ROOT / script).exists()
