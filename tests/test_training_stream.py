"""Stages of streaming models: the stream that is trained is the one that is sampled, and each stage trains its part."""

from collections.abc import Callable
from dataclasses import replace
from itertools import product
from pathlib import Path

import numpy as np
import pytest
import torch
from models import TINY, random_model
from safetensors.torch import load_file
from stream_models import TINY_STREAM, random_stream_model
from torch import Tensor

from stablevsr import SamplingConfig, build_model, sample_video
from stablevsr.architectures import ARCHITECTURES, SMALL, SMALL_STREAMING
from stablevsr.config import TemporalTinyConfig
from stablevsr.errors import UserError
from stablevsr.fields import to_dict
from stablevsr.model import StableVSR
from stablevsr.nn.warp import warp_published
from stablevsr.sampling.color_fix import correction
from stablevsr.sampling.schedule import run_steps
from stablevsr.sampling.streaming import stream_steps
from stablevsr.training.recipe import RolloutRecipe, read_recipe
from stablevsr.training.rollout import Objective, latent_of
from stablevsr.training.stream_rollout import roll_out_stream, stream_tcm_loss, stream_vae_loss
from stablevsr.training.train import starting_model, teacher_of, train
from stablevsr.weights import Header, write

STEPS = 2
STREAM = replace(TINY_STREAM, vae=TemporalTinyConfig(width=12, num_blocks=TINY.tiny.num_blocks))
RECIPE = """
stage = "{stage}"
preset = "tiny_stream"
output = "run"
steps = 2
batch = 1
sample_every = 2
{more}
[data]
crop = 32
side = 32
pool = 1
[rollout]
steps = 2
latent = {latent}
features = 0.0
temporal = 0.5
"""


@pytest.fixture(autouse=True)
def _architectures(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(ARCHITECTURES, "tiny_stream", STREAM)
    monkeypatch.setitem(ARCHITECTURES, "tiny", TINY)


def write_recipe(folder: Path, stage: str, more: str = "", latent: float = 1.0) -> Path:
    path = folder / "run.toml"
    path.write_text(RECIPE.format(stage=stage, more=more, latent=latent))
    return path


@pytest.fixture
def teacher(tmp_path: Path) -> StableVSR:
    model = random_model(seed=1)
    write(tmp_path / "teacher.safetensors", Header(TINY), model.state_dict())
    return model


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


class Given:
    """Noise from a tensor (frames, c, h, w)."""

    def __init__(self, noise: Tensor) -> None:
        self.noise = noise

    def initial(self, frame: int) -> Tensor:
        return self.noise[frame]


def test_the_stream_that_is_trained_is_the_stream_that_is_sampled() -> None:
    model = random_stream_model()
    model.sampling = SamplingConfig(mode="streaming", steps=STEPS, sampler="ddim", scene_cuts="off")
    low_res = torch.rand(2, 3, 3, 8, 12, generator=torch.Generator().manual_seed(0))
    noise, context = normal(2, 3, 4, 8, 12), model.encode_prompt(None).expand(2, -1, -1)
    steps = stream_steps(model.config.schedule, STEPS)
    _, pictures = roll_out_stream(model, low_res * 2 - 1, noise, context, steps)
    for number in range(2):
        theirs = sample_video(model, low_res[number], noise=Given(noise[number]))
        assert ((pictures[number] / 2 + 0.5).clamp(0, 1) - theirs).abs().max() < 2e-3
        assert theirs.std() > 0.05


def test_gradients_run_through_the_steps_of_a_frame_but_not_between_frames() -> None:
    model, noise = random_stream_model(), normal(1, 2, 4, 8, 8).requires_grad_()
    steps = stream_steps(model.config.schedule, STEPS)
    _, pictures = roll_out_stream(model, normal(1, 2, 3, 8, 8), noise, model.encode_prompt(None), steps)
    pictures[:, 1].square().mean().backward()
    assert noise.grad[:, 1].abs().max() > 1e-7
    assert noise.grad[:, 0].abs().max() == 0


def losses_while_learning(model: StableVSR, part: str, loss: object, objective: Objective) -> list[float]:
    getattr(model, part).requires_grad_(True)
    optimiser = torch.optim.Adam(getattr(model, part).parameters(), lr=3e-3)
    truth, low_res, noise = normal(1, 2, 3, 1, 1).clamp(-1, 1), normal(1, 2, 3, 8, 8), normal(1, 2, 4, 8, 8)
    truth = truth.expand(-1, -1, -1, 32, 32)  # of one color each, which eight steps can learn
    motion = torch.zeros(1, 1, 2, 32, 32), torch.ones(1, 1, 32, 32, dtype=torch.bool)
    found = []
    for _ in range(8):
        value = loss(model, truth, low_res, noise, model.encode_prompt(None), objective, motion)
        optimiser.zero_grad()
        value.backward()
        optimiser.step()
        found.append(value.item())
    return found


@pytest.mark.parametrize(
    ("part", "loss", "encoded"),
    [("vae", stream_vae_loss, False), ("vae", stream_vae_loss, True), ("tcm", stream_tcm_loss, False)],
)
def test_each_part_learns(part: str, loss: object, encoded: bool) -> None:
    recipe = RolloutRecipe(steps=STEPS, encoded=encoded, latent=0.1, features=0.0, temporal=0.5)
    objective = Objective(recipe, None, random_model(seed=1).vae)
    found = losses_while_learning(random_stream_model(), part, loss, objective)
    assert found[-1] < 0.97 * found[0]


@pytest.mark.parametrize(("loss", "first"), [(stream_vae_loss, 0), (stream_tcm_loss, 1)])
def test_each_frame_is_corrected_by_its_own_lr_frame(loss: Callable[..., Tensor], first: int) -> None:
    model = random_stream_model()
    model.sampling = replace(model.sampling, color_fix="backprojection")
    truth, low_res, noise = normal(2, 3, 3, 32, 32).clamp(-1, 1), normal(2, 3, 3, 8, 8), normal(2, 3, 4, 8, 8)
    objective = Objective(RolloutRecipe(steps=STEPS, latent=0.0, picture=2.0, features=0.0), None)
    context = model.encode_prompt(None).expand(2, -1, -1)
    _, pictures = roll_out_stream(model, low_res, noise, context, objective.steps(model))
    errors = []
    for clip, frame in product(range(2), range(first, 3)):
        picture = pictures[clip, frame][None]
        fixed = picture + correction(picture, low_res[clip, frame][None], "backprojection")
        errors.append((fixed - truth[clip, frame]).abs().mean().item())
    found = loss(model, truth, low_res, noise, context, objective, None)
    assert found.item() == pytest.approx(np.mean(errors), rel=1e-4)


def test_the_encoder_learns_the_latents_of_the_teacher() -> None:
    model, teacher = random_stream_model(), random_model(seed=1).vae
    objective = Objective(RolloutRecipe(steps=1, latent=1.0, picture=0.0, features=0.0), None, teacher)
    truth = normal(1, 2, 3, 1, 1).clamp(-1, 1)[:, 0].expand(-1, -1, 32, 32)
    expected = (model.vae.encode(truth) - latent_of(teacher, truth)).square().mean()
    found = losses_while_learning(model, "vae", stream_vae_loss, objective)
    assert found[0] == pytest.approx(expected.item(), rel=1e-4)
    assert found[-1] < 0.9 * found[0]


def test_the_truth_is_decoded_with_the_features_of_the_true_previous_frame() -> None:
    """As at inference, but for the latents and the picture that moves: exactly, where nothing moves."""
    model, teacher = random_stream_model(), random_model(seed=1).vae
    truth = normal(1, 2, 3, 32, 32).clamp(-1, 1)
    objective = Objective(RolloutRecipe(encoded=True, latent=0.0, picture=2.0, features=0.0), None, teacher)
    still = torch.zeros(1, 1, 2, 32, 32)
    latents = latent_of(teacher, truth[0])
    features = model.vae.features(warp_published(truth[:, 0], still[:, 0]))
    pictures = torch.cat([model.vae.decode(latents[:1]), model.vae.decode(latents[1:], features)])
    for motion in (None, (still, torch.ones(1, 1, 32, 32, dtype=torch.bool))):
        loss = stream_vae_loss(model, truth, normal(1, 2, 3, 8, 8), None, None, objective, motion)
        if motion is None:
            alone = torch.cat([pictures[:1], model.vae.decode(latents[1:], model.vae.features(truth[:, 0]))])
            assert loss.item() == pytest.approx((alone - truth[0]).abs().mean().item(), rel=1e-4)
        else:
            assert loss.item() == pytest.approx((pictures - truth[0]).abs().mean().item(), rel=1e-4)


@pytest.mark.parametrize("stage", ["stream-vae", "stream-tcm"])
def test_every_stage_trains_its_part_and_nothing_else(tmp_path: Path, teacher: StableVSR, stage: str) -> None:
    more = 'teacher = "teacher.safetensors"\nvae_from_tiny = true' if stage == "stream-vae" else "tcm_from_unet = true"
    recipe = write_recipe(tmp_path, stage, more)
    output, start = train(recipe, torch.device("cpu")), starting_model(read_recipe(recipe), tmp_path)[1].state_dict()
    after, part = load_file(output), stage.removeprefix("stream-")
    assert {name.split(".")[0] for name in after if not torch.equal(after[name], start[name])} == {part}
    model = build_model(output, device="cpu")
    assert model.provenance[part] == "trained by run.toml, 2 steps"
    assert (model.sampling.mode, model.sampling.steps, model.sampling.sampler) == ("streaming", 2, "ddim")
    assert sample_video(model, torch.rand(2, 3, 8, 8)).shape == (2, 3, 32, 32)
    assert (tmp_path / "run/samples/0000002.png").exists()


def test_the_decoder_starts_as_the_tiny_decoder_of_the_teacher(tmp_path: Path, teacher: StableVSR) -> None:
    recipe = write_recipe(tmp_path, "stream-vae", 'teacher = "teacher.safetensors"\nvae_from_tiny = true')
    header, model = starting_model(read_recipe(recipe), tmp_path)
    latent, features = normal(1, 4, 8, 8), model.vae.features(normal(1, 3, 32, 32))
    for given in ((), features):  # the TPMs add nothing yet
        torch.testing.assert_close(model.vae.decode(latent, given), teacher.tiny(latent), atol=1e-4, rtol=1e-4)
    assert "tiny decoder of teacher.safetensors" in header.provenance["vae"]


def test_a_wider_tiny_decoder_is_refused(tmp_path: Path, teacher: StableVSR, monkeypatch: pytest.MonkeyPatch) -> None:
    recipe = write_recipe(tmp_path, "stream-vae", 'teacher = "teacher.safetensors"\nvae_from_tiny = true')
    for narrow in (replace(STREAM.vae, width=4), replace(STREAM.vae, num_blocks=(1, 1, 2))):
        monkeypatch.setitem(ARCHITECTURES, "tiny_stream", replace(STREAM, vae=narrow))
        with pytest.raises(UserError, match=r"expected TemporalTinyConfig\(.* or narrower"):
            starting_model(read_recipe(recipe), tmp_path)


@pytest.mark.parametrize(
    ("stage", "more", "message"),
    [
        ("stream-vae", "", "teacher is missing, which rollout.latent needs"),
        ("stream-vae", "vae_from_tiny = true", "teacher is missing, which vae_from_tiny needs"),
        ("stream-tcm", 'teacher = "x"', "teacher is for stage stream-vae, got stage stream-tcm"),
        ("tcm-rollout", "", "preset tiny_stream has streaming weights, but stage tcm-rollout trains StableVSR weights"),
    ],
)
def test_stages_and_weights_that_do_not_fit_are_refused(tmp_path: Path, stage: str, more: str, message: str) -> None:
    with pytest.raises(UserError, match=message):
        starting_model(read_recipe(write_recipe(tmp_path, stage, more)), tmp_path)


def test_stream_stages_refuse_stablevsr_weights(tmp_path: Path) -> None:
    recipe = write_recipe(tmp_path, "stream-tcm")
    recipe.write_text(recipe.read_text().replace("tiny_stream", "tiny"))
    with pytest.raises(UserError, match=r"has StableVSR weights, .* stages for these are vae, unet"):
        starting_model(read_recipe(recipe), tmp_path)


def test_teachers_that_do_not_fit_are_refused(tmp_path: Path, teacher: StableVSR) -> None:
    recipe = read_recipe(write_recipe(tmp_path, "stream-vae", 'teacher = "teacher.safetensors"\nvae_from_tiny = true'))
    with pytest.raises(UserError, match="has latents of 4 channels, expected 8"):
        teacher_of(recipe, tmp_path, SMALL)
    write(tmp_path / "teacher.safetensors", Header(STREAM), random_stream_model(STREAM).state_dict())
    with pytest.raises(UserError, match="has streaming weights, expected StableVSR weights"):
        teacher_of(recipe, tmp_path, STREAM)
    config = replace(TINY, tiny=None)
    write(tmp_path / "teacher.safetensors", Header(config), random_model(config).state_dict())
    with pytest.raises(UserError, match="has no tiny decoder: omit vae_from_tiny"):
        starting_model(recipe, tmp_path)


def test_the_streaming_model_shares_everything_but_the_autoencoder() -> None:
    """Same networks, same latents, and the same four steps: what was distilled for one works for the other."""
    ours, theirs = to_dict(SMALL_STREAMING), to_dict(SMALL)
    assert {name for name in ours if ours[name] != theirs[name]} == {"vae", "tiny", "schedule"}
    trailing = replace(SMALL.schedule, timestep_spacing="trailing")
    for one, other in zip(stream_steps(SMALL_STREAMING.schedule, 4), run_steps(trailing, 4), strict=True):
        assert (one.timestep, one.alpha_bar, one.alpha_bar_next) == (
            other.timestep,
            other.alpha_bar,
            other.alpha_bar_next,
        )
