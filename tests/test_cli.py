"""The commands as their users meet them: files in, files out, one sentence for bad input."""

import json
import logging
import os
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import av
import imageio.v3 as iio
import numpy as np
import pytest
import torch
from models import TINY, random_model

import stablevsr
import stablevsr.cli
from stablevsr import PRESETS, SamplingConfig, build_model, sample_video, upscale
from stablevsr.cli import main
from stablevsr.cli.parser import build_parser
from stablevsr.cli.upscale import sampling_config
from stablevsr.engine import fingerprint
from stablevsr.errors import UserError
from stablevsr.media import PartReader, open_reader
from stablevsr.media.alpha import split_alpha
from stablevsr.model import bundled_weights
from stablevsr.weights import Header, write

ROOT = Path(__file__).parent.parent
CONVERT = ROOT / "tools/convert_weights.py"


def make_video(path: Path, frames: int = 12, rate: int = 24) -> None:
    """H.264 with AAC audio, 24x16."""
    with av.open(str(path), "w") as container:
        video = container.add_stream("libx264", rate=rate)
        video.width, video.height, video.pix_fmt = 24, 16, "yuv420p"
        audio = container.add_stream("aac", rate=48000)
        rng = np.random.default_rng(0)
        for i in range(frames):
            picture = rng.integers(0, 256, (16, 24, 3), dtype=np.uint8)
            container.mux(video.encode(av.VideoFrame.from_ndarray(picture)))
            samples = av.AudioFrame.from_ndarray(np.zeros((1, 2000), np.float32), format="fltp", layout="mono")
            samples.sample_rate, samples.pts = 48000, 2000 * i
            container.mux(audio.encode(samples))
        container.mux(video.encode())
        container.mux(audio.encode())


def audio_packets(path: Path) -> list[bytes]:
    with av.open(str(path)) as container:
        return [bytes(packet) for packet in container.demux(audio=0) if packet.size]


def video_times(path: Path) -> tuple[list[float], tuple[int, int]]:
    with av.open(str(path)) as container:
        stream = container.streams.video[0]
        return [frame.time for frame in container.decode(stream)], (stream.width, stream.height)


def run(*arguments: object) -> int:
    return main(["upscale", *map(str, arguments), "--steps", "1", "--device", "cpu"])


@pytest.fixture(autouse=True)
def _tiny_model(monkeypatch: pytest.MonkeyPatch, tiny_weights: Path) -> None:
    """What is tested here is the command; the bundled model would only take longer."""
    monkeypatch.setattr("stablevsr.model.bundled_weights", lambda: tiny_weights)


@pytest.fixture
def video(tmp_path: Path) -> Path:
    make_video(tmp_path / "in.mp4")
    return tmp_path / "in.mp4"


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    (tmp_path / "frames").mkdir()
    for i in range(2):
        iio.imwrite(tmp_path / f"frames/{i}.png", np.full((4, 6, 3), 100 * i, np.uint8))
    return tmp_path / "frames"


def test_side_by_side_holds_bicubic_and_the_result(folder: Path, tmp_path: Path) -> None:
    assert run(folder, tmp_path / "out", "--side-by-side", tmp_path / "pair") == 0
    for path in (tmp_path / "out").iterdir():
        pair, result = iio.imread(tmp_path / "pair" / path.name), iio.imread(path)
        assert np.array_equal(pair[:, result.shape[1] :], result)
        frame = torch.from_numpy(iio.imread(folder / path.name)).permute(2, 0, 1)[None] / 255
        expected = torch.nn.functional.interpolate(frame, scale_factor=4, mode="bicubic").clamp(0, 1) * 255
        left = torch.from_numpy(pair[:, : result.shape[1]]).permute(2, 0, 1)
        assert (left - expected[0]).abs().max() <= 1


def test_side_by_side_needs_a_name_of_its_own(folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    assert run(folder, tmp_path / "out", "--side-by-side", tmp_path / "out") == 2
    assert "is named twice" in capsys.readouterr().err


def test_a_video_keeps_its_frames_times_and_audio(video: Path, capsys: pytest.CaptureFixture) -> None:
    out = video.parent / "out.mp4"
    assert run(video, out) == 0
    times, size = video_times(out)
    assert size == (96, 64)
    assert times == video_times(video)[0]
    assert len(times) == 12
    assert audio_packets(out) == audio_packets(video)
    told = capsys.readouterr().err
    assert "note: random" in told
    assert "denoise" in told
    assert "12 frames" in told


def test_a_folder_to_a_folder_and_to_a_video(folder: Path, tmp_path: Path) -> None:
    assert run(folder, tmp_path / "out") == 0
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == ["0.png", "1.png"]
    assert iio.imread(tmp_path / "out/1.png").shape == (16, 24, 3)
    assert run(folder, tmp_path / "out.mkv") == 0
    assert len(video_times(tmp_path / "out.mkv")[0]) == 2


@pytest.mark.parametrize(
    ("shape", "dtype"), [((5, 7), np.uint8), ((5, 7), np.uint16), ((5, 7, 4), np.uint8), ((1, 1, 3), np.uint8)]
)
def test_stills_of_every_kind(tmp_path: Path, shape: tuple[int, ...], dtype: type) -> None:
    iio.imwrite(tmp_path / "in.png", np.full(shape, np.iinfo(dtype).max // 2, dtype))
    assert run(tmp_path / "in.png", tmp_path / "out.png") == 0
    channels = 4 if shape[-1] == 4 else 3
    with open_reader(tmp_path / "out.png") as reader:
        assert (reader.height, reader.width) == (4 * shape[0], 4 * shape[1])
        assert reader.is_deep == (dtype == np.uint16)
    assert iio.imread(tmp_path / "out.png").shape[2] == channels


def test_alpha_is_enlarged_by_itself(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    image = np.dstack([rng.integers(0, 256, (6, 8, 3)), np.repeat([[0, 0, 0, 0, 90, 255, 255, 255]], 6, 0)])
    iio.imwrite(tmp_path / "in.png", image.astype(np.uint8))
    iio.imwrite(tmp_path / "plain.png", split_alpha(image.astype(np.uint8))[0])
    for name in ("in", "plain"):
        assert run(tmp_path / f"{name}.png", tmp_path / f"{name}_out.png") == 0
    out = iio.imread(tmp_path / "in_out.png")
    assert np.array_equal(out[..., :3], iio.imread(tmp_path / "plain_out.png"))
    alpha = torch.from_numpy(image[None, None, :, :, 3] / 255)
    expected = torch.nn.functional.interpolate(alpha, scale_factor=4, mode="bicubic").clamp(0, 1)[0, 0] * 255
    assert np.abs(out[..., 3] - expected.numpy()).max() <= 0.51


def test_sixteen_bits_go_through_to_the_png(tmp_path: Path) -> None:
    """A still of 16 bits gives what its frames in [0, 1] give `sample_video`, and not what 8 bits would."""
    gray = np.linspace(20000, 21000, 48).astype(np.uint16).reshape(6, 8)
    iio.imwrite(tmp_path / "in.png", gray)
    assert run(tmp_path / "in.png", tmp_path / "out.png") == 0
    with open_reader(tmp_path / "out.png") as reader:
        (frame,) = reader
    clip = np.broadcast_to(gray / 65535, (1, 3, 6, 8)).astype(np.float32)
    expected = sample_video(build_model(device="cpu"), clip, steps=1)[0].transpose(1, 2, 0)
    assert frame.image.dtype == np.uint16
    assert np.abs(frame.image / 65535 - expected).max() < 1e-4


def test_the_same_seed_gives_the_same_file(folder: Path, tmp_path: Path) -> None:
    for name, seed in (("a", 3), ("b", 3), ("c", 4)):
        assert run(folder, tmp_path / name, "--seed", seed) == 0
    a, b, c = ((tmp_path / name / "1.png").read_bytes() for name in "abc")
    assert a == b
    assert a != c


def test_an_existing_output_needs_force(folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    out = tmp_path / "out.mp4"
    out.write_text("precious")
    assert run(folder, out) == 2
    assert out.read_text() == "precious"
    assert "--force" in capsys.readouterr().err
    assert run(folder, out, "--force") == 0
    assert len(video_times(out)[0]) == 2


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (["--device", "cuda:99"], "device 'cuda:99' is not available"),
        (["--weights", "none.safetensors"], "none.safetensors does not exist"),
        (["--weights", __file__], "truncated or not a safetensors file"),
        (["--steps", "0"], "got steps 0, expected 1 or more"),
        (["--seed", "-1"], "got seed -1"),
        (["--prompt", "a cat"], "hold no text encoder"),
        (["--noise-level", "20"], "got --noise-level 20, but these weights have no noise levels"),
        (["--eta", "0.5"], "got eta 0.5 with sampler ddpm"),
        (["--negative-prompt", "blur"], "got a --negative-prompt with --cfg-scale 1"),
    ],
)
def test_bad_options(folder: Path, tmp_path: Path, options: list[str], words: str, capsys) -> None:
    assert main(["upscale", str(folder), str(tmp_path / "out"), "--steps", "1", "--device", "cpu", *options]) == 2
    last = capsys.readouterr().err.splitlines()[-1]
    assert words in last
    assert [path.name for path in tmp_path.iterdir()] == ["frames"]


def test_interrupted_runs_say_how_to_go_on(folder: Path, tmp_path: Path, monkeypatch, capsys) -> None:
    def interrupt(*_: object) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as context:
        context.setattr("stablevsr.engine.run.decode_frame", interrupt)
        assert run(folder, tmp_path / "out.mp4") == 130
    told = capsys.readouterr().err
    assert "run the same command again to continue" in told
    assert "interrupted" in told
    assert sorted(path.name for path in tmp_path.iterdir()) == ["frames", "out.mp4.unfinished"]
    assert run(folder, tmp_path / "out.mp4") == 0
    assert "continuing: 0 of 2 in phase decode are done" in capsys.readouterr().err
    assert sorted(path.name for path in tmp_path.iterdir()) == ["frames", "out.mp4"]


def test_options_without_effect_are_told(folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    assert run(folder / "0.png", tmp_path / "o.png", "--tcm-scale", "0.5", "--cfg-scale", "0.5") == 0
    told = capsys.readouterr().err
    assert "note: tcm_scale has no effect on a single frame" in told
    assert "note: cfg_scale 0.5 means no classifier-free guidance" in told


INTERRUPTED_IN_AN_IMPORT = """
import os, signal, sys
from importlib.abc import MetaPathFinder

class Finder(MetaPathFinder):
    def find_spec(self, name, path, target=None):
        if name == "torch":
            os.kill(os.getpid(), signal.SIGINT)

sys.meta_path.insert(0, Finder())
from stablevsr.cli import main
main(["inspect"])
"""


def test_an_interrupt_before_the_command_has_begun_is_one_line() -> None:
    result = subprocess.run([sys.executable, "-c", INTERRUPTED_IN_AN_IMPORT], capture_output=True, text=True)
    assert (result.returncode, result.stderr) == (130, "stablevsr: interrupted\n")


def test_python_m_stablevsr_is_the_command() -> None:
    result = subprocess.run([sys.executable, "-m", "stablevsr", "--version"], capture_output=True, text=True)
    assert (result.returncode, result.stdout) == (0, f"stablevsr {stablevsr.__version__}\n")


def test_an_unexpected_error_is_one_line_without_debug(folder: Path, tmp_path: Path, monkeypatch, capsys) -> None:
    def fail(*_: object) -> None:
        raise torch.OutOfMemoryError("no room")

    monkeypatch.setattr("stablevsr.engine.run.decode_frame", fail)
    assert run(folder, tmp_path / "out.mp4") == 1
    assert "no room" in capsys.readouterr().err.splitlines()[-1]
    with pytest.raises(torch.OutOfMemoryError):
        run(folder, tmp_path / "out.mp4", "--debug")


def convert(*arguments: object) -> subprocess.CompletedProcess:
    return subprocess.run([sys.executable, CONVERT, *map(str, arguments)], capture_output=True, text=True)


def test_convert_tool_end_to_end(tmp_path: Path, golden_weights: Path) -> None:
    inspected = convert("--inspect", bundled_weights())
    assert inspected.returncode == 0
    assert "990,162" in inspected.stdout
    out = tmp_path / "out.safetensors"
    data = ROOT / "tests/data"
    made = convert("--stablevsr", data / "checkpoint", "--flow", data / "golden/raft_small.pth", "-o", out)
    assert made.returncode == 0, made.stderr
    assert "2,747,972" in made.stdout
    refused = convert("--stablevsr", data / "checkpoint", "-o", out)
    assert (refused.returncode, refused.stderr.count("\n")) == (2, 1)
    assert "--force" in refused.stderr
    back = convert("--to-diffusers", tmp_path / "back", out)
    assert back.returncode == 0, back.stderr
    assert (tmp_path / "back/unet/config.json").is_file()


def test_convert_tool_says_what_is_wrong(tmp_path: Path) -> None:
    for arguments, words in (
        (("--stablevsr", tmp_path / "none", "-o", tmp_path / "a"), "none has no controlnet folder"),
        (("--base", tmp_path / "none", "-o", tmp_path / "a"), "none does not exist"),
        (("--inspect", __file__), "truncated or not a safetensors"),
        (("--base", tmp_path, "-o", tmp_path / "no/a"), "is not a folder: create it first"),
    ):
        result = convert(*arguments)
        assert result.returncode == 2
        assert words in result.stderr
        assert result.stderr.count("\n") == 1, result.stderr


def test_several_inputs_go_to_a_folder_and_one_failure_stops_nothing(
    video: Path, folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    (tmp_path / "broken.mp4").write_bytes(b"nothing")
    (tmp_path / "out").mkdir()
    assert run(video, tmp_path / "broken.mp4", folder, folder / "1.png", "-o", tmp_path / "out", "--json") == 1
    printed = capsys.readouterr()
    table = printed.err.splitlines()[-4:]
    assert "12 frames" in table[0]
    assert "FAILED: " in table[1]
    assert "broken.mp4 cannot be opened" in table[1]
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == ["1.png", "frames", "in.mp4"]
    summary = json.loads(printed.out)
    assert [task["frames"] for task in summary] == [12, 0, 2, 1]
    assert summary[2]["output"] == str(tmp_path / "out/frames")
    assert printed.err.count("note: random") == 1  # loaded once


def test_weights_that_cannot_be_loaded_stop_a_batch_at_once(
    video: Path, folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    tried = 0

    def fail(*_: object) -> None:
        nonlocal tried
        tried += 1
        raise UserError("the weights are damaged")

    monkeypatch.setattr("stablevsr.cli.upscale.build_model", fail)
    (tmp_path / "broken.mp4").write_bytes(b"nothing")
    (tmp_path / "out").mkdir()
    assert run(tmp_path / "broken.mp4", video, folder, "-o", tmp_path / "out") == 2
    assert tried == 1
    assert capsys.readouterr().err.splitlines()[-1] == "stablevsr: the weights are damaged"


def test_the_weights_are_hashed_once_for_a_batch(
    video: Path, folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    hashed = []
    real = fingerprint._hash
    monkeypatch.setattr(fingerprint, "_hash", lambda *of: hashed.append(of) or real(*of))
    (tmp_path / "out").mkdir()
    assert run(video, folder, "-o", tmp_path / "out") == 0
    assert len(hashed) == 1


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (["--steps", "5000"], "got 5000 steps"),
        (["--eta", "0.5"], "got eta 0.5 with sampler ddpm"),
        (["--temporal-tiny"], "hold no tiny decoder"),
        (["--prompt", "a cat"], "hold no text encoder"),
        (["--noise-level", "20"], "got --noise-level 20"),
        (["--tile", "3"], "got tile 3"),
    ],
)
def test_options_are_refused_before_a_long_video_is_read(
    tmp_path: Path, options: list[str], words: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    """In less than the 3 seconds that reading it would take many times over."""
    make_video(tmp_path / "in.mp4", frames=2000)
    (tmp_path / "none").mkdir()
    weights = tmp_path / "none/none.safetensors"
    write(weights, Header(replace(TINY, tiny=None)), random_model(replace(TINY, tiny=None)).state_dict())
    monkeypatch.setattr("stablevsr.engine.upscale.fingerprint", None)
    monkeypatch.setattr("stablevsr.engine.upscale.ingest", None)
    start = time.monotonic()
    arguments = ["upscale", str(tmp_path / "in.mp4"), str(tmp_path / "out.mp4"), "--device", "cpu"]
    assert main([*arguments, "--weights", str(weights), *options]) == 2
    assert time.monotonic() - start < 3
    assert words in capsys.readouterr().err.splitlines()[-1]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["in.mp4", "none"]


def test_a_pipe_that_nobody_reads_ends_the_run_quietly(folder: Path, tmp_path: Path, monkeypatch) -> None:
    """`stablevsr ... 2>&1 | head`: no traceback, no word of a workspace; the same command goes on."""
    read, write = os.pipe()
    os.close(read)
    with open(write, "w", buffering=1) as pipe, monkeypatch.context() as context:
        context.setattr(sys, "stderr", pipe)
        assert run(folder, tmp_path / "out") == 1
        pipe.write("what Python itself says at the end goes to nowhere\n")
    assert run(folder, tmp_path / "out") == 0


def test_a_single_input_with_o_is_the_same_as_in_out(folder: Path, tmp_path: Path) -> None:
    assert run(folder, tmp_path / "a") == run(folder, "-o", tmp_path / "b") == 0
    for path in (tmp_path / "a").iterdir():
        assert path.read_bytes() == (tmp_path / "b" / path.name).read_bytes()


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["{folder}"], "got 1 paths, expected IN OUT"),
        (["{folder}", "{folder}", "{tmp}/x", "{tmp}/y"], "got 4 paths"),
        (["{folder}", "{folder}/1.png", "-o", "{tmp}/missing"], "missing is not a folder"),
        (["{folder}/1.png", "{folder}/1.png", "-o", "{tmp}"], "two inputs would both be written to"),
        (
            ["{folder}", "{folder}/1.png", "-o", "{tmp}", "--side-by-side", "{tmp}/p.mp4"],
            "got --side-by-side with several inputs",
        ),
        (["{folder}", "{tmp}/out", "--frames", "2:1"], "frames 2:1 are none"),
        (["{folder}", "{tmp}/out", "--frames", "9:"], "has 2 frames, so there is no frame 9"),
        (["{folder}", "{tmp}/out", "--tile", "3"], "got tile 3, expected auto, off or a number of at least 16"),
    ],
)
def test_paths_that_make_no_sense(folder: Path, tmp_path: Path, arguments: list[str], words: str, capsys) -> None:
    filled = [argument.format(folder=folder, tmp=tmp_path) for argument in arguments]
    assert run(*filled) == 2
    assert words in capsys.readouterr().err.splitlines()[-1]
    assert [path.name for path in tmp_path.iterdir()] == ["frames"]


def test_a_part_of_a_video(video: Path, tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    assert run(video, tmp_path / "part.mp4", "--frames", "3:8") == 0
    whole = video_times(video)[0]
    assert video_times(tmp_path / "part.mp4")[0] == pytest.approx([time - whole[3] for time in whole[3:8]])
    assert "without its audio" in capsys.readouterr().err
    with av.open(str(tmp_path / "part.mp4")) as container:
        assert not container.streams.audio


def test_a_part_behind_the_end_of_a_source_that_does_not_say_its_length(folder: Path) -> None:
    source = open_reader(folder)
    source.frame_count = None
    with pytest.raises(UserError, match="ends before frame 5; give a part inside"):
        list(PartReader(source, 5, None))


def test_what_is_asked_for_counts_more_than_the_preset() -> None:
    parse = lambda *words: sampling_config(build_parser().parse_args(["upscale", "a", "b", *words]))  # noqa: E731
    assert parse() == PRESETS["exact"]  # what the weights of the tests were made for
    assert parse("--preset", "fast") == PRESETS["fast"]
    words = "--steps 7 --sampler ddim --eta 0.5 --no-temporal-tiny --temporal-every 3 --tile 32 --scene-cuts 3,9"
    asked = parse("--preset", "fast", *words.split())
    fields = {"temporal.tiny": False, "temporal.every": 3, "tile": 32, "scene_cuts": (3, 9)}
    assert parse("--color-fix", "wavelet").color_fix == "wavelet"
    assert parse("--color-fix", "none").color_fix is None
    assert asked == PRESETS["fast"].with_fields({"steps": 7, "sampler": "ddim", "eta": 0.5, **fields})


def test_every_sampling_option_is_an_option_of_the_command() -> None:
    help_text = " ".join(build_parser()._subparsers._group_actions[0].choices["upscale"].format_help().split())
    for name in SamplingConfig().flat():
        assert f"--{name.replace('.', '-').replace('_', '-')}" in help_text


def test_help_loads_no_torch_and_is_quick() -> None:
    code = "import sys; sys.argv = ['stablevsr', '--help']\nfrom stablevsr.cli import main\n"
    code += "try: main()\nexcept SystemExit: print(*sys.modules)"
    best = min(timed([sys.executable, "-c", code]) for _ in range(3))
    printed = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    assert not {"torch", "numpy", "av", "imageio"} & set(printed.split())
    assert "inspect" in printed
    assert best < 0.5


def timed(command: list[str]) -> float:
    before = os.times().children_user + os.times().children_system
    subprocess.run(command, capture_output=True, check=True)
    return os.times().children_user + os.times().children_system - before


@pytest.mark.parametrize(("words", "said"), [(["-q", "--spacing", "trailing"], "note: random"), (["-qq"], None)])
def test_a_quiet_command(folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture, words, said) -> None:
    assert run(folder, tmp_path / "out", *words) == 0
    told = capsys.readouterr().err
    assert told == (f"stablevsr: {said}\n" if said else "")


def test_a_library_user_is_told_nothing_unless_asked(folder: Path, tmp_path: Path, capsys, caplog) -> None:
    upscale(build_model(device="cpu"), folder, tmp_path / "out", steps=1)
    assert capsys.readouterr().err == ""
    caplog.set_level(logging.INFO, "stablevsr")
    upscale(build_model(device="cpu"), folder, tmp_path / "again", steps=1)
    assert "2 frames, 2 frame-steps" in caplog.text


def test_inspect(tiny_weights: Path, capsys: pytest.CaptureFixture) -> None:
    assert main(["inspect", str(tiny_weights)]) == 0
    printed = capsys.readouterr().out
    assert "sampling: steps 50, scene_cuts off" in printed
    assert main(["inspect", "none"]) == 2


def test_a_frame_range_is_two_numbers(video: Path, capsys: pytest.CaptureFixture) -> None:
    with pytest.raises(SystemExit) as caught:
        run(video, "out.mp4", "--frames", "five")
    assert caught.value.code == 2
    assert "got 'five', expected A:B" in capsys.readouterr().err
