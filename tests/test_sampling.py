"""The loop, the noise, and `sample_video` with networks that are lambdas or tiny."""

from dataclasses import replace
from itertools import pairwise

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from models import TINY, random_model, with_noise_levels

from stablevsr import Progress, Stopped, sample_video
from stablevsr.architectures import RAFT_LARGE, RAFT_SMALL, STABLEVSR_SCHEDULE
from stablevsr.config import SCALE, FlowConfig
from stablevsr.errors import UserError
from stablevsr.model import StableVSR
from stablevsr.nn.raft import RAFT
from stablevsr.nn.warp import warp_published
from stablevsr.sampling.bidirectional import bidirectional_sampling, pass_order
from stablevsr.sampling.config import FlowOptions, SamplingConfig, TemporalGuidance
from stablevsr.sampling.cuts import changes, find_cuts
from stablevsr.sampling.ddpm import ddpm_step
from stablevsr.sampling.denoiser import Denoiser, decode_at_half_size, noisy_low_res
from stablevsr.sampling.flow import MIN_SIDE, EstimatedFlows, Padding, estimate_flow
from stablevsr.sampling.noise import RecordedNoise, SeededNoise
from stablevsr.sampling.schedule import Step, run_steps
from stablevsr.sampling.tiles import PictureDecoder, decode_in_tiles, starts

SHAPE = (4, 3, 5)


def clip(n: int, height: int, width: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, (n, height, width, 3), dtype=np.uint8)


def test_passes_go_to_and_fro_and_guidance_comes_from_the_neighbour_of_the_same_pass() -> None:
    noise, guided = SeededNoise(0, SHAPE), []

    def guide(x0: torch.Tensor, source: int, target: int, step: Step) -> torch.Tensor:
        guided.append((source, target))
        return x0

    latents = torch.stack([noise.initial(i) for i in range(3)])
    seen = list(
        bidirectional_sampling(
            latents,
            run_steps(STABLEVSR_SCHEDULE, 3),
            STABLEVSR_SCHEDULE,
            noise,
            lambda frame, x, step, guidance: 0.1 * x if guidance is None else 0.1 * x + guidance,
            guide,
        )
    )
    assert [result.frame for result in seen] == [0, 1, 2, 2, 1, 0, 0, 1, 2]
    assert guided == [(0, 1), (1, 2), (2, 1), (1, 0), (0, 1), (1, 2)]
    for before, result in zip(seen, seen[1:], strict=False):
        if result.condition is not None:
            assert torch.equal(result.condition, before.x0)
    assert torch.equal(torch.stack([seen[i].latent for i in (6, 7, 8)]), latents)


def test_one_frame_is_plain_ddpm() -> None:
    noise = SeededNoise(3, SHAPE)
    x = noise.initial(0)
    latents, steps = x[None].clone(), run_steps(STABLEVSR_SCHEDULE, 4)
    predict = lambda frame, x, step, guidance: x * 0.5  # noqa: E731
    for _ in bidirectional_sampling(latents, steps, STABLEVSR_SCHEDULE, noise, predict, guide=None):
        pass
    for step in steps:
        _, x = ddpm_step(x, 0.5 * x, noise.step(step.index, 0), step, STABLEVSR_SCHEDULE)
    assert torch.equal(latents[0], x)


def test_pass_order() -> None:
    assert list(pass_order(0, 3)) == [0, 1, 2]
    assert list(pass_order(1, 3)) == [2, 1, 0]


def test_seeded_noise_is_a_function_of_seed_frame_and_step() -> None:
    a, b = SeededNoise(7, SHAPE), SeededNoise(7, SHAPE)
    backwards = {(i, frame): a.step(i, frame) for i in (2, 1, 0) for frame in (1, 0)}
    assert all(torch.equal(b.step(i, frame), draw) for (i, frame), draw in backwards.items())
    draws = [b.initial(0), b.initial(1), SeededNoise(8, SHAPE).initial(0), *backwards.values()]
    draws += [b.low_res(0)[:3].expand(3, 3, 5)]
    flat = [draw.flatten()[:45] for draw in draws]
    assert all(not torch.equal(p, q) for i, p in enumerate(flat) for q in flat[:i])


def test_seeded_noise_is_unit_gaussian() -> None:
    draw = SeededNoise(0, (4, 180, 320)).step(3, 2)
    assert draw.dtype == torch.float32
    assert abs(draw.mean().item()) < 0.01
    assert abs(draw.std().item() - 1) < 0.01


def test_seeded_noise_has_not_changed() -> None:
    """A new numpy that draws otherwise would change every user's results: it must not pass unseen."""
    expected = [0.0599110, 0.0155596, -1.1644385, -0.1326471]
    assert SeededNoise(0, SHAPE).initial(0).flatten()[:4].tolist() == pytest.approx(expected, abs=1e-6)


@pytest.mark.parametrize("seed", [-1, 2**64])
def test_refuses_a_seed_out_of_range(seed: int) -> None:
    with pytest.raises(UserError, match="expected 0 to"):
        SeededNoise(seed, SHAPE)


def test_padding_and_its_inverse() -> None:
    for height, width in ((4, 4), (128, 136), (129, 300), (720, 1280)):
        picture = torch.rand(1, 3, height, width)
        padding = Padding.for_size(height, width)
        padded = padding.pad(picture)
        assert all(side % 8 == 0 and side >= MIN_SIDE for side in padded.shape[-2:])
        assert torch.equal(padding.crop(padded), picture)
    assert Padding.for_size(720, 1280) == Padding(0, 0)


def test_flow_takes_the_target_first() -> None:
    """The flow lives on the target's grid: RAFT(current, neighbour), not the reverse."""
    given = []

    def raft(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
        given.extend([a, b])
        return torch.zeros(1, 2, *a.shape[-2:])

    dark, bright = torch.full((1, 3, 9, 7), -1.0), torch.full((1, 3, 9, 7), 1.0)
    assert estimate_flow(raft, target=dark, source=bright).shape == (1, 2, 36, 28)
    assert given[0].mean().item() == pytest.approx(-1)
    assert given[1].mean().item() == pytest.approx(1)
    assert given[0].shape[-2:] == (128, 128)


def test_flow_of_half_the_size_is_enlarged() -> None:
    def raft(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
        assert a.shape == (1, 3, 128, 136)
        return torch.arange(136.0).expand(1, 2, 128, 136)

    flow = estimate_flow(raft, *torch.zeros(2, 1, 3, 62, 66), half=True)
    assert flow.shape == (1, 2, 248, 264)
    torch.testing.assert_close(flow[0, 0, 0, 1:-1], torch.arange(1.0, 263.0) - 0.5)  # in pixels of the full size


@pytest.mark.parametrize(
    ("size", "expected"),
    [((40, 40), (160, 160)), ((40, 44), (160, 176)), ((46, 46), (128, 128)), ((60, 80), (128, 160))],
)
def test_flow_of_half_the_size_where_it_saves_half_the_work(size: tuple[int, int], expected: tuple[int, int]) -> None:
    """Half of 160x160 is 80x80, padded to 128x128: 1.6 times less."""
    given = []

    def raft(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
        given.append(tuple(a.shape[2:]))
        return torch.zeros(1, 2, *a.shape[2:])

    frames = torch.zeros(2, 1, 3, *size)
    assert estimate_flow(raft, *frames, half=True).shape == (1, 2, 4 * size[0], 4 * size[1])
    assert given == [expected]


def smooth(n: int, height: int, width: int) -> torch.Tensor:
    """LR frames that flow can be estimated for, (n, 3, h, w) in [-1, 1]."""
    noise = torch.rand(n, 3, 4, 5, generator=torch.Generator().manual_seed(0))
    return F.interpolate(noise, (height, width), mode="bicubic").clamp(0, 1) * 2 - 1


@pytest.mark.parametrize("half", [False, True])
@pytest.mark.parametrize("config", [RAFT_SMALL, RAFT_LARGE], ids=["small", "large"])
@pytest.mark.parametrize(("height", "width"), [(6, 5), (46, 51)])
def test_flows_kept_small_have_the_bits_of_estimate_flow(config: FlowConfig, half: bool, height, width) -> None:
    torch.manual_seed(0)
    raft = RAFT(replace(config, num_updates=2)).eval().requires_grad_(False)
    frames = smooth(4, height, width)
    estimated = EstimatedFlows(raft, frames, torch.device("cpu"), half)
    for i in range(3):
        for way in ((i + 1, i), (i, i + 1)):
            expected = estimate_flow(raft, frames[way[0]][None], frames[way[1]][None], half)
            assert torch.equal(estimated.between(*way), expected)
            assert estimated.estimate(*way).shape == estimated.shape
            assert estimated.enlarge(estimated.estimate(*way)[None]).shape == (1, 2, 4 * height, 4 * width)
    again = EstimatedFlows(raft, frames, torch.device("cpu"), half)
    assert torch.equal(again.estimate(2, 3), estimated.estimate(2, 3))  # in other company


def test_each_frame_is_encoded_once_for_all_its_flows() -> None:
    raft, encoded, contexts = RAFT(replace(RAFT_SMALL, num_updates=1)).eval(), [], []
    raft.fnet.register_forward_pre_hook(lambda module, inputs: encoded.append(len(inputs[0])))
    raft.cnet.register_forward_pre_hook(lambda module, inputs: contexts.append(len(inputs[0])))
    estimated = EstimatedFlows(raft, smooth(6, 5, 6), torch.device("cpu"))
    for i in range(5):
        estimated.estimate(i + 1, i)
        estimated.estimate(i, i + 1)
    assert encoded == [2, 2, 2]
    assert contexts == [1] * 6


def test_flows_take_little_room() -> None:
    """Ten seconds of 640x272 with RAFT small."""
    frames = torch.zeros(1, 3, 272, 640).expand(250, -1, -1, -1)
    shape = EstimatedFlows(RAFT(RAFT_SMALL), frames, torch.device("cpu")).shape
    assert 249 * 2 * 4 * int(np.prod(shape)) < 0.3e9


class OneFlow:
    """The same flow between all frames."""

    def __init__(self, flow: torch.Tensor) -> None:
        self.flow = flow

    def between(self, target: int, source: int) -> torch.Tensor:
        return self.flow


def denoiser_of(model: StableVSR, context: torch.Tensor | None = None, flow=None, low_res=None, **fields) -> Denoiser:
    low_res = torch.rand(2, 3, 6, 5) if low_res is None else low_res
    flows = OneFlow(torch.zeros(1, 2, 24, 20) if flow is None else flow)
    context = model.encode_prompt(None) if context is None else context
    return Denoiser(model, low_res, flows, model.sampling.with_fields(fields), context)


def test_guidance_is_the_decoded_estimate_warped(tiny_model: StableVSR) -> None:
    flow = torch.randn(1, 2, 24, 20, generator=torch.Generator().manual_seed(0))
    denoiser = denoiser_of(tiny_model, flow=flow)
    x0 = torch.randn(4, 6, 5)
    expected = warp_published(tiny_model.vae.decode(x0[None] / 0.08333), flow)
    assert torch.equal(denoiser.guide(x0, 0, 1, run_steps(STABLEVSR_SCHEDULE, 1)[0]), expected[0])


def test_guided_steps_still_go_both_ways() -> None:
    guided = lambda temporal: [step for step in range(9) if temporal.applies_to(step)]  # noqa: E731
    assert guided(TemporalGuidance()) == list(range(9))
    assert guided(TemporalGuidance(every=2)) == [0, 3, 4, 7, 8]
    assert guided(TemporalGuidance(every=3)) == [0, 3, 6]
    assert guided(TemporalGuidance(every=2, first_step=4)) == [4, 7, 8]


def test_unguided_steps_cost_no_decode(tiny_model: StableVSR, monkeypatch: pytest.MonkeyPatch) -> None:
    decoded, real = [], tiny_model.vae.decode
    monkeypatch.setattr(tiny_model.vae, "decode", lambda latent: decoded.append(latent.shape[-2:]) or real(latent))
    for temporal, count in (
        (TemporalGuidance(), 4),
        (TemporalGuidance(every=2), 2),
        (TemporalGuidance(first_step=1), 3),
    ):
        decoded.clear()
        sample_video(tiny_model, clip(2, 5, 6), steps=4, temporal=temporal)
        assert len(decoded) == count + 2
    decoded.clear()
    half = {"temporal": TemporalGuidance(half_size=True), "flow": FlowOptions(half_size=True)}
    sample_video(tiny_model, clip(2, 5, 6), steps=4, **half)
    assert decoded == [(3, 3)] * 4 + [(5, 6)] * 2
    decoded.clear()
    sample_video(tiny_model, clip(2, 5, 6), steps=4, temporal=TemporalGuidance(tiny=True))
    assert decoded == [(5, 6)] * 2  # the final ones


def test_a_tiny_decoder_must_be_there() -> None:
    model = random_model(replace(TINY, tiny=None))
    with pytest.raises(
        UserError, match=r"got temporal\.tiny, but these weights hold no tiny decoder: convert with --tiny"
    ):
        sample_video(model, clip(2, 4, 4), steps=1, temporal=TemporalGuidance(tiny=True))


def test_half_size_guidance_shows_the_same_picture() -> None:
    decode = lambda latent: F.interpolate(latent[:, :3], scale_factor=4, mode="bilinear")  # noqa: E731
    y, x = torch.meshgrid(torch.linspace(-1, 1, 9), torch.linspace(-1, 1, 12), indexing="ij")
    latent = torch.stack([y, x, x * y, y])[None]
    whole, half = decode(latent), decode_at_half_size(decode, latent)
    assert whole.shape == half.shape == (1, 3, 36, 48)
    torch.testing.assert_close(whole[..., 5:-9, 5:-5], half[..., 5:-9, 5:-5])  # but for the borders


def test_warp_keeps_float_positions_for_half_precision_pictures() -> None:
    picture, flow = torch.rand(1, 1, 64, 2048), torch.zeros(1, 2, 64, 2048)
    warped = warp_published(picture.bfloat16(), flow)
    assert (warped.float() - warp_published(picture, flow)).abs().max() < 0.02


def test_classifier_free_guidance(tiny_model: StableVSR) -> None:
    """negative + scale (positive - negative), TCM and UNet alike, with both contexts in one batch."""
    step = run_steps(STABLEVSR_SCHEDULE, 10)[4]
    x, guidance = torch.randn(4, 6, 5), torch.randn(3, 24, 20)
    low_res = torch.rand(1, 3, 6, 5)
    contexts = torch.randn(2, 77, 32)

    def predict(context: torch.Tensor, scale: float) -> torch.Tensor:
        denoiser = denoiser_of(tiny_model, context, low_res=low_res, tcm_scale=0.7, cfg_scale=scale)
        return denoiser.predict(0, x, step, guidance)

    negative, positive = (predict(context[None], 1.0) for context in contexts)
    together = predict(contexts, 3.0)
    torch.testing.assert_close(together, negative + 3.0 * (positive - negative), rtol=1e-4, atol=1e-5)
    assert not torch.allclose(together, positive, atol=1e-3)


def test_tcm_scale_zero_leaves_the_unet_alone(tiny_model: StableVSR) -> None:
    step = run_steps(STABLEVSR_SCHEDULE, 10)[4]
    x, guidance = torch.randn(4, 6, 5), torch.randn(3, 24, 20)
    low_res = torch.rand(1, 3, 6, 5)
    without, with_tcm = (denoiser_of(tiny_model, low_res=low_res, tcm_scale=scale) for scale in (0.0, 1.0))
    alone = without.predict(0, x, step, None)
    assert torch.equal(without.predict(0, x, step, guidance), alone)
    assert not torch.allclose(with_tcm.predict(0, x, step, guidance), alone)


@pytest.mark.parametrize(("n", "height", "width"), [(1, 1, 1), (2, 1, 3), (3, 5, 8), (5, 3, 2), (2, 37, 53)])
def test_any_size_and_any_number_of_frames(tiny_model: StableVSR, n: int, height: int, width: int) -> None:
    result = sample_video(tiny_model, clip(n, height, width), steps=2)
    assert result.shape == (n, SCALE * height, SCALE * width, 3)
    assert result.dtype == np.uint8


def test_same_seed_same_bits_other_seed_other_bits(tiny_model: StableVSR) -> None:
    frames = clip(3, 6, 7)
    first, again, other = (sample_video(tiny_model, frames, steps=2, seed=seed) for seed in (1, 1, 2))
    assert np.array_equal(first, again)
    assert not np.array_equal(first, other)


def test_every_kind_of_clip_gives_the_same_picture(tiny_model: StableVSR) -> None:
    frames = clip(2, 6, 7)
    as_float = torch.from_numpy(frames).permute(0, 3, 1, 2) / 255
    uint8 = sample_video(tiny_model, torch.from_numpy(frames), steps=2)
    floats = sample_video(tiny_model, as_float, steps=2)
    assert np.array_equal(uint8.numpy(), sample_video(tiny_model, frames, steps=2))
    assert torch.equal(floats, torch.from_numpy(sample_video(tiny_model, as_float.numpy(), steps=2)))
    assert floats.dtype == torch.float32
    assert (floats.permute(0, 2, 3, 1) * 255 - uint8).abs().max() <= 0.51


def test_injected_noise_replaces_the_seed(tiny_model: StableVSR) -> None:
    seeded = SeededNoise(5, (4, 6, 7))
    recorded = RecordedNoise(
        torch.stack([seeded.initial(i) for i in range(2)]),
        torch.stack([torch.stack([seeded.step(t, i) for i in range(2)]) for t in range(2)]),
    )
    frames = clip(2, 6, 7)
    replayed = sample_video(tiny_model, frames, steps=2, noise=recorded)
    assert np.array_equal(replayed, sample_video(tiny_model, frames, steps=2, seed=5))


def test_noise_of_the_wrong_shape_is_refused(tiny_model: StableVSR) -> None:
    with pytest.raises(UserError, match=r"noise of shape \(4, 3, 5\) for frame 0, expected \(4, 6, 7\)"):
        sample_video(tiny_model, clip(1, 6, 7), steps=1, noise=SeededNoise(0, SHAPE))


def test_encoder_batched_over_frames_equals_frame_by_frame(tiny_model: StableVSR) -> None:
    x, time, context = torch.randn(5, 7, 9, 6), torch.full((5,), 321), tiny_model.encode_prompt(None)
    together = tiny_model.unet.encoder(x, time, context.expand(5, -1, -1))
    for i in range(5):
        alone = tiny_model.unet.encoder(x[i : i + 1], time[:1], context)
        for a, b in zip([*together.skips, together.middle], [*alone.skips, alone.middle], strict=True):
            torch.testing.assert_close(a[i : i + 1], b, rtol=0, atol=1e-5)


def test_progress_counts_every_unit_and_can_stop(tiny_model: StableVSR) -> None:
    seen: list[Progress] = []
    sample_video(tiny_model, clip(3, 4, 4), steps=2, progress=seen.append)
    assert [(p.phase, p.done, p.total) for p in seen] == (
        [("flow", i, 2) for i in (1, 2)]
        + [("denoise", i, 6) for i in range(1, 7)]
        + [("decode", i, 3) for i in (1, 2, 3)]
    )
    with pytest.raises(Stopped, match="phase denoise, 2 of 6"):
        sample_video(tiny_model, clip(3, 4, 4), steps=2, progress=lambda p: p.phase == "flow" or p.done < 2)


def test_noise_level_models_noise_the_frame() -> None:
    model = random_model(with_noise_levels(TINY))
    frames = clip(2, 6, 7)
    results = [sample_video(model, frames, steps=2, noise_level=level) for level in (0, 350)]
    assert not np.array_equal(*results)
    low_res = torch.zeros(2, 3, 6, 7)
    noisy = torch.stack(list(noisy_low_res(model, low_res, SamplingConfig(noise_level=350), SeededNoise(0, (4, 6, 7)))))
    # squaredcos at t = 350 keeps abar = 0.7266 (cos^2 of Nichol and Dhariwal): the rest is noise
    assert noisy.std().item() == pytest.approx((1 - 0.7266) ** 0.5, rel=0.1)
    with pytest.raises(UserError, match="got noise_level 351, expected 0 to 350"):
        sample_video(model, frames, steps=2, noise_level=351)


@pytest.mark.parametrize(
    ("frames", "message"),
    [
        ([1, 2], "got frames of type list"),
        (np.zeros((2, 4, 4, 4), np.uint8), r"got frames of shape \(2, 4, 4, 4\)"),
        (np.zeros((0, 4, 4, 3), np.uint8), "got frames of shape"),
        (np.zeros((2, 4, 4, 3), np.float32), "got frames of shape"),
        (np.zeros((2, 3, 4, 4), np.int32), "type torch.int32"),
        (np.full((1, 3, 4, 4), 255.0), r"between 255 and 255, expected \[0, 1\]"),
        (np.full((1, 3, 4, 4), np.nan), "between nan and nan"),
    ],
)
def test_frames_that_make_no_sense(tiny_model: StableVSR, frames: object, message: str) -> None:
    with pytest.raises(UserError, match=message):
        sample_video(tiny_model, frames, steps=1)


def test_bad_options_are_refused_before_any_work(tiny_model: StableVSR) -> None:
    def no_work(progress: Progress) -> None:
        raise AssertionError(progress)

    for options, message in (
        ({"steps": 0}, "got steps 0, expected 1 or more"),
        ({"prompt": "a cat"}, "hold no text encoder"),
        ({"negative_prompt": "blur"}, "with cfg_scale 1, where it has no effect"),
    ):
        with pytest.raises(UserError, match=message):
            sample_video(tiny_model, clip(2, 4, 4), progress=no_work, **options)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"tcm_scale": float("nan")}, "tcm_scale is nan, expected a finite number"),
        ({"cfg_scale": float("inf")}, "cfg_scale is inf"),
        ({"steps": 2.5}, "steps is 2.5, expected int"),
        ({"seed": None}, "seed is None, expected int"),
    ],
)
def test_numbers_that_make_no_sense(tiny_model: StableVSR, options: dict, message: str) -> None:
    with pytest.raises(UserError, match=message):
        sample_video(tiny_model, clip(1, 4, 4), **{"steps": 1, **options})


def test_flipped_and_read_only_arrays_are_clips_too(tiny_model: StableVSR) -> None:
    frames = clip(2, 6, 7)
    frames.flags.writeable = False
    flipped = sample_video(tiny_model, frames[..., ::-1], steps=1)
    assert np.array_equal(flipped, sample_video(tiny_model, frames[..., ::-1].copy(), steps=1))


def test_noise_sources_may_give_numpy_arrays_and_must_give_the_right_shape(tiny_model: StableVSR) -> None:
    class Numpy(SeededNoise):
        def step(self, index: int, frame: int) -> np.ndarray:
            return super().step(index, frame).numpy().astype(np.float64)

    class Flat(SeededNoise):
        def step(self, index: int, frame: int) -> torch.Tensor:
            return torch.zeros(4, 1, 1)

    frames = clip(2, 6, 7)
    result = sample_video(tiny_model, frames, steps=2, noise=Numpy(0, (4, 6, 7)))
    assert np.array_equal(result, sample_video(tiny_model, frames, steps=2))
    with pytest.raises(UserError, match=r"noise of shape \(4, 1, 1\) for step 0 of frame 0"):
        sample_video(tiny_model, frames, steps=2, noise=Flat(0, (4, 6, 7)))


def test_numbers_that_overflow_are_an_error_not_a_black_frame() -> None:
    model = random_model()
    model.vae.decoder.conv_out.weight.fill_(torch.inf)
    with pytest.raises(UserError, match="a decoded frame overflowed"):
        sample_video(model, clip(1, 4, 4), steps=1)


def test_tiles_cover_everything_and_blend() -> None:
    """A decoder that looks at one position at a time gives the same in tiles."""
    latent = torch.randn(1, 4, 21, 50)
    plain = lambda part: part[:, :3].repeat_interleave(4, -1).repeat_interleave(4, -2)  # noqa: E731
    torch.testing.assert_close(decode_in_tiles(plain, latent, 16), plain(latent))
    for size, tile in [(21, 16), (50, 16), (100, 64), (64, 64), (65, 64)]:
        begin = starts(size, tile)
        assert begin[0] == 0
        assert begin[-1] + min(tile, size) == size
        assert all(b - a <= tile - tile // 4 for a, b in pairwise(begin))


def test_running_out_of_memory_falls_back_to_tiles_once(tiny_model: StableVSR, monkeypatch, caplog) -> None:
    latent = torch.randn(1, 4, 10, 80)
    whole, sizes = PictureDecoder(tiny_model, "off")(latent), []
    real = tiny_model.vae.decode

    def small_memory(part: torch.Tensor) -> torch.Tensor:
        sizes.append(part.shape[-1])
        if part.shape[-1] > 64:
            raise torch.OutOfMemoryError("out of memory")
        return real(part)

    monkeypatch.setattr(tiny_model.vae, "decode", small_memory)
    decode = PictureDecoder(tiny_model)
    assert decode(latent).shape == whole.shape
    assert "decoding in tiles of 64x64 from here on" in caplog.text
    assert decode(latent).shape == whole.shape
    assert sizes == [80, 64, 64, 64, 64]
    with pytest.raises(torch.OutOfMemoryError):
        PictureDecoder(tiny_model, "off")(latent)


def test_nothing_is_fetched_across_a_cut(tiny_model: StableVSR) -> None:
    """The frames behind a cut are those of a clip that begins there, with the same noise."""
    frames, shape = clip(5, 4, 4), (4, 4, 4)
    noise = SeededNoise(0, shape)

    class Later:
        def initial(self, frame: int) -> torch.Tensor:
            return noise.initial(frame + 2)

        def step(self, index: int, frame: int) -> torch.Tensor:
            return noise.step(index, frame + 2)

    whole = sample_video(tiny_model, frames, steps=3, noise=noise, scene_cuts=(2,))
    assert np.array_equal(whole[:2], sample_video(tiny_model, frames[:2], steps=3, noise=noise))
    assert np.array_equal(whole[2:], sample_video(tiny_model, frames[2:], steps=3, noise=Later()))


def test_cuts_are_found_and_fast_pans_are_not() -> None:
    rng = np.random.default_rng(0)
    scenes = [
        F.interpolate(torch.from_numpy(rng.random((1, 3, 12, 60))).float(), size=(64, 600), mode="bicubic")
        for _ in range(3)
    ]
    scenes = [scene[0].clamp(0, 1) * 2 - 1 for scene in scenes]

    def pan(scene: torch.Tensor, count: int, speed: int) -> list[torch.Tensor]:
        return [scene[:, :, i * speed : i * speed + 96] for i in range(count)]

    assert find_cuts(changes(pan(scenes[0], 20, 24))) == []  # a quarter of the picture each frame
    slow = pan(scenes[0], 7, 2) + pan(scenes[1], 9, 2) + pan(scenes[2], 5, 2)
    assert find_cuts(changes(slow)) == [7, 16]
    assert find_cuts(changes(pan(scenes[0], 8, 2) + pan(scenes[0][:, :, 14:], 10, 24))) == []  # a pan that begins
    dark = [torch.full((3, 8, 8), -0.85)] * 4
    assert find_cuts(changes(dark + [frame + 0.03 for frame in dark])) == []
    assert changes([torch.full((3, 8, 8), -1.0), torch.full((3, 8, 8), 1.0)]) == [1.0]
    assert find_cuts(changes(dark[:1])) == find_cuts([]) == []
