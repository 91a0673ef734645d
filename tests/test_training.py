"""The loop: it resumes to the bit, runs in several processes, and writes files that upscale."""

import csv
import os
import random
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path

import imageio.v3 as iio
import numpy as np
import pytest
import torch
from models import TINY, random_model
from safetensors.torch import load_file, save_file
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from stablevsr import build_model, sample_video
from stablevsr.architectures import ARCHITECTURES
from stablevsr.cli import main
from stablevsr.convert.assemble import to_diffusers
from stablevsr.errors import UserError
from stablevsr.model import BUNDLED, bundled_weights
from stablevsr.sampling.flow import estimate_flow
from stablevsr.training import losses as losses_module
from stablevsr.training import samples
from stablevsr.training.loop import NUM_SAMPLES, Trainer, checkpoint_blocks, learning_rate
from stablevsr.training.recipe import CLIP_ROLLOUTS, ROLLOUTS, OptimiserRecipe, Recipe, read_recipe
from stablevsr.training.samples import sample_picture
from stablevsr.training.stages import STAGES, TRAINED, StageLoss, stage_of
from stablevsr.training.train import open_windows, starting_model, train
from stablevsr.weights import read_header

CPU = torch.device("cpu")
RUN = f"""
import sys
sys.path.insert(0, {str(Path(__file__).parent)!r})
from models import TINY
from stablevsr.architectures import ARCHITECTURES
from stablevsr.cli import main
ARCHITECTURES["tiny"] = TINY
sys.exit(main(sys.argv[1:]))
"""
RECIPE = """
stage = "{stage}"
preset = "tiny"
output = "{output}"
steps = {steps}
batch = 2
accumulate = {accumulate}
log_every = 1
checkpoint_every = 3
[data]
crop = {crop}
side = {crop}
pool = 2
[optimiser]
lr = 1e-3
warmup = 2
decay = "cosine"
ema = {ema}
"""
ROLLOUT = """
[rollout]
steps = 2
features = 0.0
"""
SIDES = {
    "vae": 16,
    "unet": 16,
    "flow": 128,
    "tcm": 32,
    "tiny": 16,
    "rollout": 16,
    "vae-rollout": 16,
    "joint-rollout": 16,
    "tcm-rollout": 32,
}  # of crops


@pytest.fixture(autouse=True)
def _tiny_architecture(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(ARCHITECTURES, "tiny", TINY)


def write_recipe(path: Path, more: str = "", **values: object) -> Path:
    settings = {"stage": "vae", "output": path.stem, "steps": 4, "accumulate": 1, "crop": 16, "ema": 0.9, **values}
    rollout = ROLLOUT if settings["stage"] in ROLLOUTS else ""
    temporal = "temporal = 0.5\n" if settings["stage"] in CLIP_ROLLOUTS else ""
    path.write_text(more + RECIPE.format(**settings) + rollout + temporal)
    return path


def weights_of(folder: Path) -> dict[str, torch.Tensor]:
    return load_file(folder / "model.safetensors")


def assert_same_weights(a: Path, b: Path) -> None:
    ours, theirs = weights_of(a), weights_of(b)
    assert set(ours) == set(theirs)
    assert all(torch.equal(ours[name], theirs[name]) for name in theirs)


def losses(folder: Path) -> list[tuple[str, str]]:
    with (folder / "log.csv").open() as file:
        return [(row["step"], row["loss"]) for row in csv.DictReader(file)]


@pytest.mark.parametrize(("stage", "crop"), SIDES.items())
def test_every_stage_trains_its_parts_and_nothing_else(tmp_path: Path, stage: str, crop: int) -> None:
    recipe = write_recipe(tmp_path / "run.toml", stage=stage, crop=crop, steps=2)
    output = train(recipe, CPU)
    after, start = load_file(output), starting_model(read_recipe(recipe), tmp_path)[1].state_dict()
    parts = STAGES[stage].parts
    assert {name.split(".")[0] for name in after if not torch.equal(after[name], start[name])} == set(parts)
    provenance = build_model(output, device="cpu").provenance
    for part in parts:
        assert provenance[part] == "trained by run.toml, 2 steps"
        alone = load_file(output.parent / f"{part}.safetensors")
        assert {name.split(".")[0] for name in alone} == {part, *(["empty_prompt"] if part == "unet" else [])}
        assert all(torch.equal(tensor, after[name]) for name, tensor in alone.items())


@pytest.mark.parametrize(("stage", "crop"), SIDES.items())
def test_sample_pictures_change_nothing(tmp_path: Path, stage: str, crop: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """A picture every second step, of the weights that would be written, and the same training."""
    monkeypatch.setattr(samples, "EXACT", samples.EXACT.with_fields({"steps": 2}))
    plain = train(write_recipe(tmp_path / "plain.toml", stage=stage, crop=crop, steps=2), CPU)
    drawn = train(write_recipe(tmp_path / "drawn.toml", "sample_every = 2\n", stage=stage, crop=crop, steps=2), CPU)
    assert_same_weights(plain.parent, drawn.parent)
    assert [path.name for path in (drawn.parent / "samples").iterdir()] == ["0000002.png"]
    picture = torch.from_numpy(iio.imread(drawn.parent / "samples/0000002.png"))
    assert picture.shape == (NUM_SAMPLES * crop, (2 if stage == "vae" else 3) * crop, 3)
    windows = open_windows(read_recipe(tmp_path / "drawn.toml"), STAGES[stage], tmp_path)
    expected = sample_picture(build_model(drawn, device="cpu"), stage, [windows[i] for i in range(NUM_SAMPLES)])
    # Weights of a mapped file lie elsewhere in memory, which kernels may answer with other last bits.
    assert (picture.int() - expected.int()).abs().max() <= 1


def test_a_trained_file_upscales_and_goes_back_to_diffusers(tmp_path: Path) -> None:
    output = train(write_recipe(tmp_path / "run.toml", "tcm_from_unet = true\n", stage="tcm", crop=32, steps=2), CPU)
    model = build_model(output, device="cpu")
    assert model.tcm.zero_conv_middle.weight.abs().sum() > 0
    assert sample_video(model, np.zeros((2, 4, 4, 3), np.uint8), steps=1).shape == (2, 16, 16, 3)
    assert "controlnet" in to_diffusers(output, tmp_path / "folder")


def test_a_recipe_takes_parts_from_other_runs(tmp_path: Path) -> None:
    train(write_recipe(tmp_path / "vae.toml", steps=1), CPU)
    for file in ("vae/vae.safetensors", "vae/model.safetensors"):
        recipe = write_recipe(tmp_path / "unet.toml", stage="unet", steps=1, output=f"from-{Path(file).stem}")
        recipe.write_text(recipe.read_text() + f'[parts]\nvae = "{file}"\n')
        output = train(recipe, CPU)
        ours, theirs = load_file(output), load_file(tmp_path / "vae/model.safetensors")
        assert all(torch.equal(ours[name], theirs[name]) for name in theirs if name.startswith("vae."))
        assert build_model(output, device="cpu").provenance["vae"] == f"from {Path(file).name}"
    recipe.write_text(recipe.read_text().replace("vae/model.safetensors", "none.safetensors"))
    with pytest.raises(UserError, match=r"none.safetensors does not exist"):
        train(recipe, CPU)
    recipe.write_text(recipe.read_text().replace("none.safetensors", "from-vae/unet.safetensors"))
    with pytest.raises(UserError, match=r"unet.safetensors lacks vae\."):
        train(recipe, CPU)


@pytest.mark.parametrize("file", ["unet/unet.safetensors", "unet/model.safetensors"])
@pytest.mark.parametrize("start", ["preset", "init"])
def test_a_unet_brings_the_context_it_has_learned_with(
    tmp_path: Path, tiny_weights: Path, start: str, file: str
) -> None:
    teacher = write_recipe(tmp_path / "unet.toml", more="seed = 7\n", stage="unet", steps=1)
    learned = load_file(train(teacher, CPU))["empty_prompt"]
    recipe = write_recipe(tmp_path / "vae.toml", steps=1)
    if start == "init":
        recipe.write_text(recipe.read_text().replace('preset = "tiny"', f'init = "{tiny_weights}"'))
    assert not torch.equal(starting_model(read_recipe(recipe), tmp_path)[1].empty_prompt, learned)
    recipe.write_text(recipe.read_text() + f'[parts]\nunet = "{file}"\n')
    assert torch.equal(load_file(train(recipe, CPU))["empty_prompt"], learned)
    alone = {name: tensor for name, tensor in load_file(tmp_path / file).items() if name != "empty_prompt"}
    save_file(alone, tmp_path / file)
    with pytest.raises(UserError, match=r"safetensors lacks empty_prompt"):
        train(recipe, CPU)


@pytest.mark.parametrize("name", BUNDLED)
def test_the_bundled_file_is_made_of_its_parts(tmp_path: Path, name: str) -> None:
    bundle, source = Path(__file__).parents[1] / "recipes/bundle.py", bundled_weights(name)
    theirs, header = load_file(source), read_header(source)
    held = [part for part in TRAINED if any(key.startswith(f"{part}.") for key in theirs)]
    parts = [word for part in held for word in (f"--{part}", str(source), f"recipes/small/{part}.toml")]
    command = [sys.executable, str(bundle), str(tmp_path / "file.safetensors"), *parts]
    subprocess.run([*command, "--architecture", name.replace("-", "_")], check=True)
    ours, copy = load_file(tmp_path / "file.safetensors"), read_header(tmp_path / "file.safetensors")
    assert set(ours) == set(theirs)
    assert all(torch.equal(ours[name], theirs[name]) for name in theirs)
    assert (copy.config, copy.sampling) == (header.config, header.sampling)
    assert copy.provenance == {part: f"recipes/small/{part}.toml" for part in held}


def test_a_trained_file_keeps_what_it_did_not_train(tmp_path: Path, golden_weights: Path) -> None:
    """Bits, dtypes, published names and vocabulary of the weights that a run started from."""
    start = write_recipe(tmp_path / "run.toml", stage="tcm", crop=32, steps=1)
    start.write_text(start.read_text().replace('preset = "tiny"', f'init = "{golden_weights}"'))
    output = train(start, CPU)
    ours, theirs = load_file(output), load_file(golden_weights)
    for name, tensor in theirs.items():
        if not name.startswith("tcm."):
            assert ours[name].dtype == tensor.dtype
            assert torch.equal(ours[name], tensor)
    header, before = read_header(output), read_header(golden_weights)
    assert (header.naming, header.tokenizer, header.config) == (before.naming, before.tokenizer, before.config)
    assert build_model(output, device="cpu").encode_prompt("a cat").shape == (1, 77, 32)


def test_half_precision_training_keeps_flow_and_warp_in_float32(monkeypatch: pytest.MonkeyPatch) -> None:
    seen = []
    monkeypatch.setattr(losses_module, "warp_published", lambda picture, flow: seen.append((picture, flow)) or picture)
    model = random_model()
    frames, low_res = torch.rand(1, 3, 32, 32), torch.rand(1, 3, 8, 8)
    draws = losses_module.Draws(torch.tensor([5]), torch.randn(1, 4, 8, 8), torch.randn(1, 4, 8, 8))
    with torch.autocast("cpu", torch.bfloat16):
        losses_module.training_guidance(model, frames, low_res, low_res, model.encode_prompt(None), draws)
    (picture, flow), expected = seen[0], estimate_flow(model.flow, low_res, low_res)
    assert picture.dtype == flow.dtype == torch.float32
    assert torch.equal(flow, expected)


@pytest.mark.parametrize(
    ("place", "kept", "old"), [("one_step", 2, False), ("one_step", 2, True), ("update_average", 0, False)]
)
def test_an_interrupted_run_saves_its_last_whole_step(
    tmp_path: Path, place: str, kept: int, old: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Between two steps; within an update of the weights there is nothing whole to save. Old checkpoints go on too."""
    whole, stopped = (write_recipe(tmp_path / f"{name}.toml", steps=5) for name in ("whole", "stopped"))
    train(whole, CPU)
    go_on, calls = getattr(Trainer, place), []

    def interrupted(trainer: Trainer, *arguments: object) -> object:
        calls.append(place)
        if len(calls) == 3:
            raise KeyboardInterrupt
        return go_on(trainer, *arguments)

    with monkeypatch.context() as patch:
        patch.setattr(Trainer, place, interrupted)
        with pytest.raises(KeyboardInterrupt):
            train(stopped, CPU)
    checkpoint = tmp_path / "stopped/checkpoint.pt"
    assert (torch.load(checkpoint)["step"] if checkpoint.exists() else 0) == kept
    if old:  # version 0.1 left the part out of the names
        state = torch.load(checkpoint)
        for kind in ("weights", "average"):
            state[kind] = {name.removeprefix("vae."): value for name, value in state[kind].items()}
        torch.save(state, checkpoint)
    train(stopped, CPU)
    assert_same_weights(tmp_path / "stopped", tmp_path / "whole")
    assert losses(tmp_path / "stopped") == losses(tmp_path / "whole")


def test_killed_runs_end_with_the_same_bits(tmp_path: Path) -> None:
    """kill -9 at five random moments; weights and logged losses equal those of a run that was left alone."""
    whole = write_recipe(tmp_path / "whole.toml", steps=150)
    train(whole, CPU)
    killed = write_recipe(tmp_path / "killed.toml", steps=150)
    command = [sys.executable, "-c", RUN, "train", str(killed), "--device", "cpu"]
    log = tmp_path / "killed/log.csv"
    moments = random.Random(0)
    for _ in range(5):
        process = subprocess.Popen(command, stderr=subprocess.DEVNULL)
        deadline = time.monotonic() + 60
        enough = (log.stat().st_size if log.exists() else 0) + moments.randrange(100, 900)
        while process.poll() is None and time.monotonic() < deadline:
            if log.exists() and log.stat().st_size > enough:
                break
            time.sleep(moments.random() * 0.02)
        process.send_signal(signal.SIGKILL)
        assert process.wait() == -signal.SIGKILL
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert_same_weights(tmp_path / "killed", tmp_path / "whole")
    assert losses(tmp_path / "killed") == losses(tmp_path / "whole")
    assert {path.name for path in (tmp_path / "killed").glob("*")} >= {"checkpoint.pt", "log.csv", "model.safetensors"}


def test_two_processes_equal_one_that_accumulates(tmp_path: Path) -> None:
    one = write_recipe(tmp_path / "one.toml", accumulate=2, steps=3, ema=0.0)
    two = write_recipe(tmp_path / "two.toml", accumulate=1, steps=3, ema=0.0)
    train(one, CPU)
    (tmp_path / "run.py").write_text(RUN)
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node=2", "--standalone"]
    command += [str(tmp_path / "run.py"), "train", str(two), "--device", "cpu"]
    done = subprocess.run(command, capture_output=True, text=True, env={**os.environ, "OMP_NUM_THREADS": "1"})
    assert done.returncode == 0, done.stderr
    ours, theirs = weights_of(tmp_path / "two"), weights_of(tmp_path / "one")
    start = starting_model(read_recipe(one), tmp_path)[1].state_dict()
    wrong = sum((ours[name] - theirs[name]).float().square().sum() for name in theirs)
    change = sum((start[name] - theirs[name]).float().square().sum() for name in theirs)
    assert change > 0
    assert wrong < 0.05**2 * change  # Adam makes steps of its own size from the rounding of gradients near zero


def test_gradient_checkpointing_gives_the_same_gradients() -> None:
    gradients = []
    for wrap in (False, True):
        model = random_model()
        model.unet.requires_grad_(True)
        if wrap:
            checkpoint_blocks(model.unet)
        generator = torch.Generator().manual_seed(0)
        x = torch.randn(1, 7, 6, 5, generator=generator)
        model.unet(x, torch.tensor([9]), model.encode_prompt(None)).square().sum().backward()
        gradients.append([parameter.grad for parameter in model.unet.parameters()])
    assert all(torch.equal(a, b) for a, b in zip(*gradients, strict=True))


def test_learning_rate_rises_and_falls() -> None:
    recipe = OptimiserRecipe(lr=1.0, warmup=4, decay="cosine")
    rates = [learning_rate(recipe, step, 100) for step in range(100)]
    assert rates[0] == pytest.approx(0.2)
    assert max(rates) == rates[4] == pytest.approx(1, abs=0.01)
    assert rates[50] == pytest.approx(0.5, abs=0.01)
    assert rates[99] < 0.001
    assert learning_rate(replace(recipe, decay="constant"), 99, 100) == 1


def test_the_moving_average_is_what_is_written(tmp_path: Path) -> None:
    for ema in (0.0, 0.999):
        train(write_recipe(tmp_path / f"run{ema}.toml", ema=ema, steps=3), CPU)
    state = torch.load(tmp_path / "run0.999/checkpoint.pt", weights_only=True)
    written = weights_of(tmp_path / "run0.999")
    for name, value in state["average"].items():
        assert torch.equal(written[name], value)
    last = "vae.decoder.conv_out.weight"
    assert not torch.equal(state["average"][last], state["weights"][last])
    plain = weights_of(tmp_path / "run0.0")
    assert all(torch.equal(plain[name], value) for name, value in state["weights"].items())


def test_a_full_disk_leaves_the_checkpoint_before(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    recipe = write_recipe(tmp_path / "run.toml", steps=3)
    train(recipe, CPU)
    checkpoint = tmp_path / "run/checkpoint.pt"
    state = torch.load(checkpoint, weights_only=True)
    torch.save({**state, "step": 2}, checkpoint)
    before = checkpoint.read_bytes()

    def full(state: object, path: Path) -> None:
        path.write_bytes(b"half a file")
        raise RuntimeError("No space left on device")

    monkeypatch.setattr("torch.save", full)
    with pytest.raises(UserError, match=r"cannot be written \(No space left on device\): run again to resume"):
        train(recipe, CPU)
    assert checkpoint.read_bytes() == before
    assert not list((tmp_path / "run").glob(".*"))


def test_a_checkpoint_of_another_recipe_is_refused_by_name(tmp_path: Path) -> None:
    recipe = write_recipe(tmp_path / "run.toml", steps=3)
    train(recipe, CPU)
    recipe.write_text(recipe.read_text().replace("batch = 2", "batch = 3"))
    with pytest.raises(UserError, match=r"has batch = 2, expected 3 as in the recipe"):
        train(recipe, CPU)
    (tmp_path / "run/checkpoint.pt").write_bytes(b"damaged")
    with pytest.raises(UserError, match=r"checkpoint .* is damaged"):
        train(recipe, CPU)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (('stage = "vae"', 'stage = "gan"'), "stage is 'gan', expected one of vae, unet, flow, tcm"),
        (("batch = 2", "batch = 2\ngizmo = 1"), "Recipe has no field gizmo"),
        (("lr = 1e-3", "lr = 1e-3\nbeta = 1"), "OptimiserRecipe has no field beta"),
        (("batch = 2", "batch = 0"), "batch is 0, expected at least 1"),
        (("batch = 2", 'batch = "two"'), "batch is 'two'"),
        (("steps = 4", ""), "lacks steps"),
        (("crop = 16", "crop = 15"), "data.crop is 15"),
        (
            ('stage = "vae"', 'stage = "flow"'),
            "data.crop is 16, expected a multiple of 8 of at least 128 for stage flow",
        ),
        (("lr = 1e-3", "lr = 1e-3\nclip = -1.0"), "optimiser.clip is -1.0"),
        (("lr = 1e-3", "lr = 1e-3\nbetas = [{a = 1}, 0.9]"), "has a value of the wrong type"),
        (("pool = 2", 'kind = "folders"'), "data.root is missing: name the folder that holds hr/ (and lr/)"),
        (("pool = 2", 'kind = "photos"'), "data.root is missing: name the folder that holds the photographs"),
        (("pool = 2", 'kind = "photo"'), "data.kind is 'photo', expected one of procedural, folders, photos"),
        (("pool = 2", "degraded = 0.5"), "data.degraded is 0.5, which needs data.kind photos"),
        (("[optim", "[rollout]\nsteps = 0\n[optim"), "rollout.steps is 0, expected 1 to 50"),
        (("[optim", '[rollout]\nspacing = "even"\n[optim'), "rollout.spacing is 'even', expected one of leading"),
        (("[optim", '[rollout]\ncolor_fix = "sepia"\n[optim'), "rollout.color_fix is 'sepia', expected one of none,"),
        (
            ("[optim", "[rollout]\nfeatures = 0.0\nlatent = 0.0\npicture = 0.0\n[optim"),
            "rollout.latent, picture and features are all 0",
        ),
        (("[optim", "[rollout]\nlatent = 0.0\n[optim"), "rollout is for stages rollout, vae-rollout, joint-rollout, "),
        (
            ('stage = "vae"', 'stage = "rollout"\nrollout.temporal = 0.5'),
            "rollout.temporal is for stages tcm-rollout, stream-vae, stream-tcm, got stage rollout",
        ),
        (('preset = "tiny"', ""), "got neither of preset and init, expected one"),
        (('preset = "tiny"', 'preset = "huge"'), "preset is 'huge', expected one of"),
        (
            ('preset = "tiny"', 'preset = "tiny"\ninit = "none.safetensors"'),
            "got both of preset and init, expected one",
        ),
        (
            ("[optim", "[parts]\nclock = 'none.safetensors'\n[optim"),
            "parts has 'clock', expected a part of the model",
        ),
        (("batch = 2", "batch = "), "is not valid TOML"),
        (('preset = "tiny"', 'init = "none.safetensors"'), "none.safetensors does not exist"),
    ],
)
def test_bad_recipes_are_one_sentence(tmp_path: Path, change: tuple[str, str], message: str, capsys) -> None:
    recipe = write_recipe(tmp_path / "run.toml")
    recipe.write_text(recipe.read_text().replace(*change))
    assert main(["train", str(recipe), "--device", "cpu"]) == 2
    told = capsys.readouterr().err.splitlines()
    assert len(told) == 1
    assert message in told[0]
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(("stage", "part", "name"), [("tcm", "flow", "flow network"), ("tiny", "tiny", "tiny decoder")])
def test_a_preset_without_the_network_that_a_stage_needs_is_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, stage: str, part: str, name: str
) -> None:
    monkeypatch.setitem(ARCHITECTURES, "tiny", replace(TINY, **{part: None}))
    with pytest.raises(
        UserError, match=f"^preset tiny has no {name}, which stage {stage} needs: use weights converted with --{part}"
    ):
        train(write_recipe(tmp_path / "run.toml", stage=stage), CPU)


def test_shipped_recipes_and_the_example_of_the_manual_are_valid(tmp_path: Path) -> None:
    root = Path(__file__).parent.parent
    example = tmp_path / "example.toml"
    example.write_text((root / "docs/training.md").read_text().split("```toml")[1].split("```")[0])
    recipes = [example, *root.glob("recipes/**/*.toml")]
    assert len(recipes) > 1
    assert all(isinstance(read_recipe(path), Recipe) for path in recipes)


def test_without_a_moving_average_no_copy_of_the_weights_is_kept(tmp_path: Path) -> None:
    recipe = write_recipe(tmp_path / "run.toml", ema=0.0, steps=3)
    train(recipe, CPU)
    checkpoint = tmp_path / "run/checkpoint.pt"
    state = torch.load(checkpoint, weights_only=True)
    assert state["average"] == {}
    # Version 0.1 kept one all the same: its checkpoints go on.
    torch.save(state | {"average": {name: value + 1 for name, value in state["weights"].items()}}, checkpoint)
    assert_same_weights(train(recipe, CPU).parent, tmp_path / "run")


def test_pictures_are_drawn_in_evaluation_mode(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """And training goes on in training mode."""
    modes, forward = [], StageLoss.forward

    def sample(model: torch.nn.Module, stage: str, windows: list) -> torch.Tensor:
        modes.append(("picture", model.vae.training))
        return torch.zeros(1, 1, 3, dtype=torch.uint8)

    def learn(loss: StageLoss, *batch: object) -> torch.Tensor:
        modes.append(("step", loss.learner.training))
        return forward(loss, *batch)

    monkeypatch.setattr("stablevsr.training.loop.sample_picture", sample)
    monkeypatch.setattr(StageLoss, "forward", learn)
    train(write_recipe(tmp_path / "run.toml", "sample_every = 1\n", steps=2), CPU)
    assert modes == 2 * [("step", True), ("picture", False)]


def make_trainer(folder: Path, more: str = "", **values: object) -> Trainer:
    recipe = read_recipe(write_recipe(folder / "run.toml", more, **values))
    stage, (_, model) = stage_of(recipe, CPU), starting_model(recipe, folder)
    (folder / "run").mkdir(exist_ok=True)
    return Trainer(recipe, StageLoss(model, stage), open_windows(recipe, stage, folder), folder / "run", CPU)


class NoFloat64(TorchDispatchMode):
    """Refuses float64, as MPS does."""

    def __torch_dispatch__(
        self, function: Callable, types: object, args: tuple = (), kwargs: dict | None = None
    ) -> object:
        result = function(*args, **(kwargs or {}))
        if any(isinstance(each, torch.Tensor) and each.dtype == torch.float64 for each in tree_leaves(result)):
            raise TypeError(f"the MPS framework doesn't support float64, which {function} gave")
        return result


@pytest.mark.parametrize(("stage", "crop"), SIDES.items())
def test_a_step_needs_no_float64(tmp_path: Path, stage: str, crop: int) -> None:
    """Neither do loss, gradients, optimiser and moving average, nor the batches, which are sent as they are."""
    trainer = make_trainer(tmp_path, stage=stage, crop=crop)
    batch = next(trainer.batches())
    assert all(value.dtype in (torch.float32, torch.bool) for value in batch.values())
    with NoFloat64():
        trainer.one_step(iter([batch]))
    assert trainer.step == 1


@pytest.mark.parametrize(("device", "pinned"), [("cpu", False), ("mps", False), ("cuda", True)])
def test_only_pinned_batches_are_sent_without_waiting(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, device: str, pinned: bool
) -> None:
    loaders, sent = [], []

    class Batch:
        def to(self, device: torch.device, non_blocking: bool) -> "Batch":
            sent.append((device.type, non_blocking))
            return self

    def loader(windows: object, **options: object) -> list:
        loaders.append(options)
        return [{"hr": Batch()}]

    monkeypatch.setattr("stablevsr.training.loop.DataLoader", loader)
    trainer = make_trainer(tmp_path)
    trainer.device = torch.device(device)
    trainer.to_device(next(trainer.batches()))
    assert loaders[0]["pin_memory"] is pinned
    assert sent == [(device, pinned)]


def test_the_batches_of_a_long_run_are_not_counted_out_before(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    taken = []
    monkeypatch.setattr(
        "stablevsr.training.loop.DataLoader",
        lambda windows, batch_sampler, **options: taken.append(batch_sampler) or batch_sampler,
    )
    trainer = make_trainer(tmp_path, steps=1000, accumulate=2)
    trainer.step = 5
    batches = trainer.batches()
    assert [next(batches) for _ in range(3)] == [[20, 21], [22, 23], [24, 25]]
    assert isinstance(taken[0], Iterator)
    assert len(list(taken[0])) == 2 * 995 - 3


def test_batches_are_the_same_with_workers_and_from_any_step(tmp_path: Path) -> None:
    whole = list(make_trainer(tmp_path).batches())
    trainer = make_trainer(tmp_path, "workers = 2\n")
    trainer.step = 1
    assert len(whole) == 4
    for ours, theirs in zip(trainer.batches(), whole[1:], strict=True):
        assert all(torch.equal(ours[name], theirs[name]) for name in theirs)


def as_process(monkeypatch: pytest.MonkeyPatch, rank: int) -> None:
    """Pose as one of two processes."""
    monkeypatch.setattr(torch.distributed, "is_initialized", lambda: True)
    monkeypatch.setattr(torch.distributed, "get_rank", lambda: rank)
    monkeypatch.setattr(torch.distributed, "get_world_size", lambda: 2)
    monkeypatch.setattr("stablevsr.training.loop.DistributedDataParallel", lambda loss, find_unused_parameters: loss)


@pytest.mark.parametrize("rank", [0, 1])
def test_process_0_alone_removes_what_a_killed_one_left(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, rank: int
) -> None:
    """Two that both do so race: the slower one finds nothing to remove."""
    (tmp_path / "run").mkdir()
    stale = tmp_path / "run/.stablevsr-0123.part"
    stale.touch()
    as_process(monkeypatch, rank)
    make_trainer(tmp_path)
    assert stale.exists() == (rank == 1)


@pytest.mark.parametrize(
    ("steps", "message"),
    [
        ([3, 0], r"process 1 finds no checkpoint at .*checkpoint.pt, process 0 finds a checkpoint of step 3: put"),
        ([0, 3], r"process 1 finds a checkpoint of step 3 at .*checkpoint.pt, process 0 finds no checkpoint: put"),
        ([6, 3], r"process 1 finds a checkpoint of step 3 at .*, process 0 finds a checkpoint of step 6: put"),
        ([3, 3], None),
    ],
)
@pytest.mark.parametrize("rank", [0, 1])
def test_processes_that_find_different_checkpoints_stop_together(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, steps: list[int], message: str | None, rank: int
) -> None:
    as_process(monkeypatch, rank)
    trainer, asked = make_trainer(tmp_path), []

    def gather(found: list[int], mine: int) -> None:
        asked.append(mine)
        found[:] = steps

    monkeypatch.setattr(torch.distributed, "all_gather_object", gather)
    with pytest.raises(UserError, match=message) if message else nullcontext():
        trainer.resume()
    assert asked == [0]  # this folder holds no checkpoint


def test_two_processes_without_a_shared_disk_do_not_hang(tmp_path: Path) -> None:
    """Each in a folder of its own; process 0 alone finds a checkpoint, and both what a killed run left."""
    for rank in ("0", "1"):
        (tmp_path / rank / "run").mkdir(parents=True)
        (tmp_path / rank / "run/.stablevsr-0123.part").touch()
        recipe = write_recipe(tmp_path / rank / "run.toml", steps=3)
    train(tmp_path / "0/run.toml", CPU)
    checkpoint = tmp_path / "0/run/checkpoint.pt"
    state = torch.load(checkpoint, weights_only=True)
    torch.save(state | {"recipe": state["recipe"] | {"processes": "2"}}, checkpoint)
    (tmp_path / "run.py").write_text("import os; os.chdir(os.environ['RANK'])\n" + RUN)
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node=2", "--standalone"]
    command += [str(tmp_path / "run.py"), "train", recipe.name, "--device", "cpu"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path, env=environment, timeout=300)
    assert done.returncode != 0
    assert "process 1 finds no checkpoint at run/checkpoint.pt, process 0 finds a checkpoint of step 3" in done.stderr


def test_bfloat16_is_refused_before_the_work_by_a_gpu_without_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(device: torch.device, dtype: torch.dtype) -> None:
        raise UserError(f"{device} has no {dtype}")

    monkeypatch.setattr("stablevsr.training.train.check_dtype", refuse)
    with pytest.raises(UserError, match=r"cpu has no torch.bfloat16"):
        train(write_recipe(tmp_path / "run.toml", 'dtype = "bf16"\n'), CPU)
    assert not (tmp_path / "run").exists()
    train(write_recipe(tmp_path / "run.toml", steps=1), CPU)
