"""The settings of a run: what they refuse, how they travel, and that presets and options come from the same fields."""

import dataclasses
import json
from pathlib import Path

import numpy as np
import pytest
from models import TINY, with_noise_levels
from stream_models import TINY_STREAM

from stablevsr import PRESETS, FlowOptions, SamplingConfig, TemporalGuidance, UserError, build_model, sample_video
from stablevsr.cli.parser import build_parser
from stablevsr.cli.upscale import sampling_config
from stablevsr.config import ModelConfig
from stablevsr.fields import from_dict, to_dict
from stablevsr.model import StableVSR
from stablevsr.sampling.config import STREAMING
from stablevsr.sampling.schedule import timesteps

DISTILLED = {"mode": "streaming", "steps": 4, "sampler": "ddim"}


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"steps": 0}, "got steps 0, expected 1 or more"),
        ({"steps": True}, "steps is True, expected int"),
        ({"steps": "5"}, "steps is '5', expected int"),
        ({"mode": "live"}, "got mode 'live', expected one of bidirectional, streaming"),
        ({"spacing": "even"}, "got spacing 'even', expected one of leading, trailing, linspace"),
        ({"sampler": "euler"}, "got sampler 'euler', expected one of ddpm, ddim, dpm"),
        ({"sampler": "ddim", "eta": 2.0}, "got eta 2.0, expected 0 to 1"),
        ({"eta": 0.5}, "got eta 0.5 with sampler ddpm, which takes none: use sampler ddim"),
        ({"seed": -1}, "got seed -1, expected 0 to"),
        ({"cfg_scale": float("nan")}, "cfg_scale is nan, expected a finite number"),
        ({"tcm_scale": float("inf")}, "tcm_scale is inf, expected a finite number"),
        (
            {"negative_prompt": "blur"},
            "negative_prompt with cfg_scale 1, where it has no effect: set cfg_scale above 1",
        ),
        ({"noise_level": -1}, "got noise_level -1"),
        ({"scene_cuts": "some"}, "got scene_cuts 'some', expected auto, off or frame numbers above 0"),
        ({"scene_cuts": (0, 3)}, r"got scene_cuts \(0, 3\)"),
        ({"scene_cuts": [3, "a"]}, r"scene_cuts is \(3, 'a'\), expected"),
        ({"segments": 1}, "got segments 1, expected 2 or more"),
        ({"segments": 8, "mode": "streaming"}, "got segments 8 in mode streaming, where each frame needs the one"),
        ({"tile": 8}, "got tile 8, expected auto, off or a number of at least 16"),
        ({"tile": "big"}, "got tile 'big', expected auto"),
        ({"color_fix": "sepia"}, "got color_fix 'sepia', expected one of none, wavelet, adain, backprojection"),
        ({"temporal.every": 0}, "got temporal.every 0, expected 1 or more"),
        ({"temporal.first_step": -1}, "got temporal.first_step -1"),
        ({"temporal": 3}, "temporal is 3, expected TemporalGuidance"),
        ({"stepz": 3}, "got stepz, which is not a sampling option: expected one of mode, steps, strength, spacing"),
        ({"temporal.evry": 3}, "got temporal.evry, which is not .* expected one of temporal.every"),
        ({"steps.x": 3}, "got steps.x, which is not a sampling option"),
    ],
)
def test_fields_that_make_no_sense_are_refused_by_name(fields: dict, message: str) -> None:
    with pytest.raises(UserError, match=message):
        SamplingConfig().with_fields(fields)


@pytest.mark.parametrize(
    ("fields", "num_frames", "message"),
    [
        ({"steps": 1001}, None, "got 1001 steps, expected 1 to 1000"),
        ({"prompt": "a cat"}, None, "got the prompt 'a cat', but these weights hold no text encoder"),
        ({"cfg_scale": 2.0, "negative_prompt": "x"}, None, "got the negative_prompt 'x', but these weights"),
        (
            {"temporal.tiny": True},
            None,
            "got temporal.tiny, but these weights hold no tiny decoder: convert with --tiny",
        ),
        ({"noise_level": 20}, None, "got noise_level 20, but these weights have no noise levels"),
        ({}, 2, "hold no flow network, which a clip of several frames needs: convert with --flow"),
        ({}, 0, "got no frame"),
    ],
)
def test_fields_are_checked_against_weights_and_clip(fields: dict, num_frames: int | None, message: str) -> None:
    poor = dataclasses.replace(TINY, tiny=None, flow=None)
    with pytest.raises(UserError, match=message):
        SamplingConfig().with_fields(fields).check(poor, num_frames)


@pytest.mark.parametrize(
    ("config", "fields", "message"),
    [
        (TINY_STREAM, {}, "got mode bidirectional for streaming weights, which were trained .* use preset streaming"),
        (
            TINY_STREAM,
            {"mode": "streaming", "tile": 64},
            "got tile 64, but streaming weights decode whole frames",
        ),
        (dataclasses.replace(TINY, flow=None), {"mode": "streaming"}, "no flow network, which a stream needs: convert"),
        (
            with_noise_levels(TINY),
            {"mode": "streaming"},
            r"add noise to the LR frames \(stock SD x4\), which",
        ),
    ],
)
def test_what_streams_and_what_does_not(config: ModelConfig, fields: dict, message: str) -> None:
    with pytest.raises(UserError, match=message):
        SamplingConfig().with_fields(fields).check(config)
    PRESETS["streaming"].check(TINY_STREAM)
    PRESETS["streaming"].check(TINY)


@pytest.mark.parametrize(
    ("config", "fields", "notice"),
    [
        (TINY, {"steps": 5}, "5 steps start at timestep 801, where 14% of the picture should remain"),
        (TINY, {"steps": 1}, "1 steps start at timestep 1, where 100% of the picture"),
        (TINY, {"steps": 5, "spacing": "trailing"}, None),
        (TINY, {}, None),
        (TINY, {"cfg_scale": 0.5}, "cfg_scale 0.5 means no classifier-free guidance"),
        (TINY, {"mode": "streaming"}, "were not trained for streaming"),
        (TINY_STREAM, {**DISTILLED}, None),
        (TINY_STREAM, {**DISTILLED, "spacing": "trailing", "temporal.tiny": True}, None),
        (TINY_STREAM, {**DISTILLED, "steps": 6}, "trailing spacing, their default, not for 6 ddim steps with trailing"),
        (TINY_STREAM, {**DISTILLED, "temporal.every": 2}, "temporal options have no effect"),
    ],
)
def test_what_works_but_should_be_known(config: ModelConfig, fields: dict, notice: str | None) -> None:
    own = STREAMING if config.is_streaming else SamplingConfig()
    found = SamplingConfig().with_fields(fields).notices(config, own)
    assert len(found) == (notice is not None)
    assert not found or notice in found[0]


@pytest.mark.parametrize(
    ("config", "other"),
    [
        (PRESETS["balanced"], "20 ddpm steps with trailing spacing"),
        (PRESETS["fast"], "10 ddpm steps with trailing spacing"),
        (SamplingConfig(steps=4), "4 ddpm steps with trailing spacing"),
        (SamplingConfig(steps=4, sampler="ddim", eta=0.5), "4 ddim steps with trailing spacing, eta 0.5"),
        (SamplingConfig(steps=4, sampler="ddim", spacing="linspace"), "4 ddim steps with linspace spacing"),
        (SamplingConfig(steps=4, sampler="ddim", strength=0.5, seed=3), None),
        (PRESETS["streaming"], None),
    ],
)
def test_steps_that_distilled_weights_have_not_learned_are_told_once(config: SamplingConfig, other: str | None) -> None:
    trailing = dataclasses.replace(TINY, schedule=dataclasses.replace(TINY.schedule, timestep_spacing="trailing"))
    own = SamplingConfig(steps=4, sampler="ddim")
    found = [notice for notice in config.notices(trailing, own) if "distilled" in notice]
    learned = "these weights were distilled for 4 ddim steps with trailing spacing, their default, not for "
    assert found == ([] if other is None else [learned + other])
    assert not any("distilled" in notice for notice in config.notices(trailing, SamplingConfig()))


def test_a_preset_with_the_bundled_weights_is_told(caplog: pytest.LogCaptureFixture) -> None:
    model, frame = build_model(device="cpu"), np.zeros((1, 4, 4, 3), np.uint8)
    sample_video(model, frame)
    assert "distilled" not in caplog.text
    sample_video(model, frame, PRESETS["fast"])
    assert caplog.text.count("distilled for 4 ddim steps with trailing spacing, their default, not for 10 ddpm") == 1


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--cfg-scale", "nan"], "--cfg-scale is nan"),
        (["--temporal-every", "0"], "got --temporal-every 0, expected 1 or more"),
        (["--negative-prompt", "x"], "got a --negative-prompt with --cfg-scale 1, where it has no effect: set --cfg"),
        (["--noise-level", "3"], "got --noise-level 3, but these weights have no noise levels: omit it"),
        (["--strength", "2"], "got strength 2, expected above 0"),
    ],
)
def test_the_command_names_options_as_they_are_typed(words: list[str], message: str, tiny_weights: Path) -> None:
    options = build_parser().parse_args(["upscale", "in.mp4", "out.mp4", "--weights", str(tiny_weights), *words])
    with pytest.raises(UserError, match=message):
        sampling_config(options)


def test_spacing_of_ones_own() -> None:
    config = SamplingConfig(steps=4, spacing="trailing")
    assert timesteps(config.schedule_for(TINY), 4) == [999, 749, 499, 249]
    assert SamplingConfig().schedule_for(TINY) == TINY.schedule


def test_more_checks_against_weights_and_clip() -> None:
    SamplingConfig(scene_cuts=(2,)).check(TINY, 3)
    with pytest.raises(UserError, match="got a scene cut at frame 3, but the clip has 3 frames"):
        SamplingConfig(scene_cuts=(1, 3)).check(TINY, 3)
    leveled = with_noise_levels(TINY)
    assert SamplingConfig().noise_level_for(leveled) == 20
    with pytest.raises(UserError, match="got noise_level 351, expected 0 to 350"):
        SamplingConfig(noise_level=351).check(leveled)


def test_what_means_the_same_is_the_same() -> None:
    assert SamplingConfig(steps=np.int64(5), cfg_scale=np.float32(2.0)) == SamplingConfig(steps=5, cfg_scale=2.0)
    assert SamplingConfig(prompt="", color_fix="none") == SamplingConfig()
    assert SamplingConfig(scene_cuts=np.array([7, 3])) == SamplingConfig(scene_cuts={3, 7})
    assert SamplingConfig(scene_cuts=[7, 3]) == SamplingConfig(scene_cuts=(3, 7))


def test_configs_travel_as_json() -> None:
    config = SamplingConfig(scene_cuts=(3, 9), temporal=TemporalGuidance(every=2), flow=FlowOptions(half_size=True))
    assert from_dict(SamplingConfig, json.loads(json.dumps(to_dict(config)))) == config
    with pytest.raises(UserError, match="SamplingConfig has no field later; the file may come from a newer version"):
        from_dict(SamplingConfig, {"later": 0.5})
    with pytest.raises(UserError, match="TemporalGuidance has no field late"):
        from_dict(SamplingConfig, {"temporal": {"late": True}})


def test_every_field_is_flat_and_has_help() -> None:
    flat = SamplingConfig().flat()
    assert {"steps", "temporal.every", "flow.half_size", "scene_cuts"} <= flat.keys()
    assert json.loads(json.dumps(flat)) == flat
    for owner in (SamplingConfig, TemporalGuidance, FlowOptions):
        for field in dataclasses.fields(owner):
            assert dataclasses.is_dataclass(field.default_factory) or field.metadata["help"]


def test_a_number_is_no_config(tiny_model: StableVSR) -> None:
    with pytest.raises(UserError, match="got config 50, expected a SamplingConfig: pass single options by name"):
        sample_video(tiny_model, np.zeros((1, 4, 4, 3), np.uint8), 50)


def test_the_exact_preset_is_the_published_algorithm() -> None:
    assert PRESETS["exact"].flat() == {**SamplingConfig().flat(), "steps": 50, "scene_cuts": "off"}
    assert PRESETS["exact"].sampler == "ddpm"
