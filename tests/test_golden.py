"""The recorded cases of the public pipeline, at every step."""

import json
from dataclasses import replace
from pathlib import Path

import pytest
from models import DATA, memory_run
from reference_loop import ReferenceLoop
from safetensors import safe_open
from torch import Tensor

from stablevsr import PRESETS, sample_video
from stablevsr.convert.published_config import read_schedule
from stablevsr.engine.run import decode_frame
from stablevsr.model import StableVSR, build_model
from stablevsr.sampling.flow import EstimatedFlows
from stablevsr.sampling.noise import RecordedNoise
from stablevsr.sampling.pictures import normalise
from stablevsr.sampling.tiles import PictureDecoder


class Case:
    """One recorded run: tensors by name, and how it was made."""

    def __init__(self, name: str, weights: Path) -> None:
        with safe_open(DATA / f"golden/{name}.safetensors", framework="pt") as file:
            metadata = file.metadata()
            self.tensors: dict[str, Tensor] = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118
        self.model: StableVSR = build_model(weights, device="cpu")
        self.model.sampling = PRESETS["exact"]
        schedule = read_schedule(json.loads(metadata["scheduler"]), name)
        self.model.config = replace(self.model.config, schedule=schedule)
        self.frames = self.tensors["input"].permute(0, 2, 3, 1)
        self.noise = RecordedNoise(self.tensors["init_noise"], self.tensors["step_noise"])
        self.options = {
            "steps": int(metadata["steps"]),
            "prompt": metadata["prompt"],
            "tcm_scale": float(metadata["conditioning_scale"]),
        }


@pytest.fixture(scope="module", params=["case_default", "case_odd_size", "case_epsilon"])
def case(request: pytest.FixtureRequest, golden_weights: Path) -> Case:
    return Case(request.param, golden_weights)


def largest_difference(a: Tensor, b: Tensor) -> float:
    assert a.shape == b.shape
    return (a - b).abs().max().item()


def test_prompt_embedding(case: Case) -> None:
    assert largest_difference(case.model.encode_prompt(case.options["prompt"]), case.tensors["prompt_embeds"]) < 1e-5


def test_every_step(case: Case) -> None:
    recorded = case.tensors
    run, _ = memory_run(case.model, case.frames, case.noise, **case.options)
    low_res = normalise(case.frames)
    assert len(list(run.estimate_flows())) == len(low_res) - 1
    estimated = EstimatedFlows(case.model.flow, low_res, case.model.device)
    for pair, (forward, backward) in enumerate(zip(recorded["flow_forward"], recorded["flow_backward"], strict=True)):
        assert largest_difference(estimated.between(pair + 1, pair)[0], forward) < 5e-4
        assert largest_difference(estimated.between(pair, pair + 1)[0], backward) < 5e-4

    seen = 0
    for result in run.frame_steps():
        step, frame = result.step.index, result.frame
        assert result.step.timestep == recorded["timesteps"][step]
        assert largest_difference(result.prediction, recorded["model_output"][step, frame]) < 1e-4
        assert largest_difference(result.x0, recorded["x0"][step, frame]) < 1e-4
        assert largest_difference(result.latent, recorded["latents"][step, frame]) < 1e-4
        if step == 0 and frame > 0:
            assert largest_difference(result.condition, recorded["guidance_first_step"][frame - 1]) < 1e-4
        if result.step.index == case.options["steps"] - 1:
            assert (
                largest_difference(decode_frame(PictureDecoder(case.model), result.latent), recorded["output"][frame])
                < 1e-4
            )
        seen += 1
    assert seen == case.options["steps"] * len(low_res)


def test_the_loop_that_speed_is_measured_against(case: Case) -> None:
    """The libraries' modules in the published loop replay the recorded cases, so the baseline is the real thing."""
    options = dict(case.options)
    context = case.model.encode_prompt(options.pop("prompt"))
    frames = ReferenceLoop(case.model).run(normalise(case.frames), case.noise, context=context, **options)
    assert largest_difference(frames, case.tensors["output"]) < 1e-4


def test_sample_video_end_to_end(golden_weights: Path) -> None:
    case = Case("case_odd_size", golden_weights)
    frames = case.frames.permute(0, 3, 1, 2) / 255.0
    result = sample_video(case.model, frames, noise=case.noise, **case.options)
    assert largest_difference(result, case.tensors["output"]) < 1e-4
