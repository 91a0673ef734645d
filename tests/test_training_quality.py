"""What `benchmarks/quality.py` measures, and the footage that it is measured on."""

import sys
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace

import imageio.v3 as iio
import numpy as np
import pytest
import torch
from models import random_model
from stream_models import random_stream_model
from torch import Tensor

from stablevsr import PRESETS, SamplingConfig, UserError, sample_video
from stablevsr.training.features import VARIANTS, FeatureNetwork

MODULES = ("clips", "footage", "measures", "quality")


@pytest.fixture
def benchmarks(monkeypatch: pytest.MonkeyPatch) -> Iterator[SimpleNamespace]:
    pytest.importorskip("piq")
    monkeypatch.syspath_prepend(Path(__file__).parents[1] / "benchmarks")
    import footage
    import measures
    import quality

    yield SimpleNamespace(footage=footage, measures=measures, quality=quality)
    for name in MODULES:
        sys.modules.pop(name)


@pytest.fixture
def network() -> FeatureNetwork:
    torch.manual_seed(0)
    return FeatureNetwork(VARIANTS["lite2"]).requires_grad_(False).eval()


def clip_of(frames: Tensor, flow: Tensor | None = None) -> SimpleNamespace:
    count = len(frames) - 1 if flow is not None else 0
    flow = torch.empty(0, 2, *frames.shape[-2:]) if flow is None else flow
    hidden = torch.zeros(count, *frames.shape[-2:], dtype=torch.bool)
    return SimpleNamespace(truth=SimpleNamespace(frames=frames, forward=flow, forward_occluded=hidden))


def test_a_perfect_result_has_no_error(benchmarks: SimpleNamespace, network: FeatureNetwork) -> None:
    frames = (torch.rand(2, 3, 176, 176, generator=torch.Generator().manual_seed(0)) * 255).round() / 255
    row = benchmarks.measures.measure(random_model(), network, frames, clip_of(frames))
    assert row == {
        "PSNR": 100, "SSIM": 1, "HaarPSI": pytest.approx(1, abs=1e-5), "GMSD": pytest.approx(0, abs=1e-3),
        "features": 0, "tfeatures": 0, "tbias": 0, "tOF": 0,
    }  # fmt: skip
    still = benchmarks.measures.measure(random_model(), network, frames, clip_of(frames, torch.zeros(1, 2, 176, 176)))
    assert still["warp"] == pytest.approx(1000 * (frames[1] - frames[0]).square().mean().item(), rel=1e-3)


def test_temporal_features_are_of_flicker(benchmarks: SimpleNamespace, network: FeatureNetwork) -> None:
    """An error that stays the same in every frame of a still clip is none of theirs."""
    truth = torch.rand(1, 3, 64, 64, generator=torch.Generator().manual_seed(0)).expand(3, -1, -1, -1)
    noise = 0.2 * torch.randn(3, 3, 64, 64, generator=torch.Generator().manual_seed(1))
    same = benchmarks.measures.feature_errors(network, truth + noise[:1], truth)
    flicker = benchmarks.measures.feature_errors(network, truth + noise, truth)
    assert same["tfeatures"] == pytest.approx(0, abs=1e-4)
    assert flicker["tfeatures"] > 0.5 * same["features"] > 0
    assert flicker["tbias"] == flicker["tfeatures"]
    assert benchmarks.measures.feature_errors(network, truth, truth + noise)["tbias"] == -flicker["tfeatures"]


def test_pans_have_exact_flow(benchmarks: SimpleNamespace, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    picture = np.random.default_rng(0).integers(0, 256, (300, 360, 3), dtype=np.uint8)
    iio.imwrite(tmp_path / "photograph.png", picture)
    monkeypatch.setattr(benchmarks.footage, "_folder", lambda package, distribution, *inside: tmp_path / inside[-1])
    clip = benchmarks.footage.pan_clip("photograph.png", 3)
    assert clip.frames.shape == (3, 3, 256, 320)
    assert benchmarks.measures.warping_error(clip.frames, SimpleNamespace(truth=clip)) < 1e-6
    hidden = clip.forward_occluded.float().mean().item()
    assert hidden == pytest.approx(1 - 254 / 256 * 317 / 320)


def test_lr_frames_go_through_the_encoder_where_asked(benchmarks: SimpleNamespace) -> None:
    truth = torch.rand(2, 3, 64, 64, generator=torch.Generator().manual_seed(0))
    clean, light, strong = (benchmarks.quality.low_resolution(truth, crf) for crf in (None, 10, 40))
    assert clean.shape == light.shape == strong.shape == (2, 3, 16, 16)
    assert 0 < (light - clean).abs().mean() < (strong - clean).abs().mean()
    assert benchmarks.measures.lanczos(clean).shape == truth.shape


def test_means_are_over_the_clips_that_have_a_figure(benchmarks: SimpleNamespace) -> None:
    rows = benchmarks.quality.mean_rows([{"ours": {"PSNR": 1.0}}, {"ours": {"PSNR": 3.0, "warp": 5.0}}])
    assert rows == {"ours": {"PSNR": 2.0, "warp": 5.0}}
    benchmarks.quality.show("a table with an empty cell", {"ours": {"PSNR": 2.0}})


def test_streaming_weights_run_guided_and_alone(benchmarks: SimpleNamespace) -> None:
    model = random_stream_model()
    model.sampling = SamplingConfig(mode="streaming", steps=1, sampler="ddim")
    low_res = torch.rand(3, 3, 8, 8, generator=torch.Generator().manual_seed(0))
    runs = {name: run() for name, run in benchmarks.quality.whole_runs(model, low_res).items()}
    assert set(runs) == set(benchmarks.quality.FOR_STREAMING)
    guided, alone = runs["default"], runs["default per frame"]
    assert torch.equal(guided, sample_video(model, low_res, scene_cuts="off"))
    assert torch.equal(guided[0], alone[0])
    assert not torch.equal(guided[1], alone[1])
    torch.testing.assert_close(alone[1:2], sample_video(model, low_res, scene_cuts=(1, 2))[1:2])


def test_presets_run_as_they_are(benchmarks: SimpleNamespace) -> None:
    model, low_res = random_model(), torch.rand(2, 3, 4, 4, generator=torch.Generator().manual_seed(0))
    fast = benchmarks.quality.whole_runs(model, low_res)["fast"]()
    assert torch.equal(fast, sample_video(model, low_res, PRESETS["fast"], scene_cuts="off"))


def test_variants_that_the_weights_do_not_have_are_refused(benchmarks: SimpleNamespace) -> None:
    quality, options = benchmarks.quality, SimpleNamespace(variants=None)
    quality.check_variants(options, is_streaming=True)
    assert options.variants == quality.DEFAULTS
    with pytest.raises(UserError, match="got variant two-way for streaming weights, expected some of default"):
        quality.check_variants(SimpleNamespace(variants=["two-way"]), is_streaming=True)
    with pytest.raises(UserError, match="got variant full flow for StableVSR weights, expected some of default"):
        quality.check_variants(SimpleNamespace(variants=["full flow"]), is_streaming=False)
