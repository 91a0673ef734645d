"""Streaming: the recorded cases, the loop with lambdas for networks, and its schedule."""

import gc
import weakref
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from diffusers import DDIMScheduler
from reference_stream_loop import ReferenceStreamLoop
from stream_models import STREAM_DIFFVSR, Transcript, convert_recorded, random_stream_model, recorded
from torch import Tensor

from stablevsr import sample_video
from stablevsr.config import ScheduleConfig
from stablevsr.convert.keys import diffusers_temporal_tiny, rename_all
from stablevsr.errors import UserError
from stablevsr.model import StableVSR, build_model
from stablevsr.nn.attention import Attention, CachedContext
from stablevsr.nn.warp import warp_published
from stablevsr.sampling.config import DISTILLED_STEPS
from stablevsr.sampling.flow import StreamFlows, estimate_flow
from stablevsr.sampling.noise import RecordedNoise, SeededNoise
from stablevsr.sampling.pictures import normalise
from stablevsr.sampling.schedule import Step, alphas_cumprod
from stablevsr.sampling.stream_denoiser import StreamDenoiser
from stablevsr.sampling.streaming import (
    StreamFrame,
    StreamState,
    StreamStep,
    cuts_at,
    ddim_steps,
    streaming_sampling,
)

SCHEDULE = STREAM_DIFFVSR.schedule


@pytest.fixture(scope="module")
def stream_weights(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return convert_recorded(tmp_path_factory.mktemp("stream"))


@pytest.fixture(scope="module")
def stream_model() -> StableVSR:
    return random_stream_model()


def difference(a: Tensor, b: Tensor) -> float:
    assert a.shape == b.shape
    return (a - b).abs().max().item()


# ---------------------------------------------------------------------------------------------------------------------
# Recorded cases


@pytest.mark.parametrize("name", ["case_stream", "case_stream_odd"])
def test_every_frame_and_step_as_recorded(name: str, stream_weights: Path) -> None:
    expected, options = recorded(name)
    model = build_model(stream_weights, device="cpu")
    assert model.config.schedule == SCHEDULE
    context = model.encode_prompt(options["prompt"])
    assert difference(context, expected["prompt_embeds"]) < 1e-5
    steps = ddim_steps(SCHEDULE, int(options["steps"]))
    assert [step.timestep for step in steps] == expected["timesteps"].tolist()
    networks = StreamDenoiser(model, context, float(options["conditioning_scale"]))
    noise = RecordedNoise(expected["init_noise"], expected["init_noise"][None])
    low_res, seen = normalise(expected["input"].permute(0, 2, 3, 1)), []

    def check(step: StreamStep) -> None:
        place = step.step.index, step.frame
        assert difference(step.prediction, expected["model_output"][place]) < 1e-4
        assert difference(step.x0, expected["x0"][place]) < 1e-4
        assert difference(step.latent, expected["latents"][place]) < 1e-4
        seen.append(place)

    for i, frame in enumerate(streaming_sampling(low_res, steps, SCHEDULE, noise, networks, on_step=check)):
        assert frame.state.frame == i
        assert difference(frame.state.picture, expected["decoded"][i]) < 1e-4
        picture = (255 * (frame.state.picture / 2 + 0.5).clamp(0, 1)).round()
        assert difference(picture, expected["output_u8"][i].float()) <= 1
        if i == 0:
            assert frame.condition is None
            continue
        # The warp is exact, but a flow that is 1e-5 px off moves a picture of random weights, which jumps by its whole
        # range from pixel to pixel, by more: the recorded guidance is itself 1.08e-4 from a run in float64.
        guidance, previous = expected["guidance"][i - 1], expected["decoded"][i - 1]
        assert difference(networks.guide(previous, expected["flow_forward"][i - 1]), guidance) < 1e-5
        assert difference(frame.condition, guidance) < 1e-4 * previous.abs().max()
        features = model.vae.features(frame.condition[None])
        for place, feature in enumerate(reversed(features)):  # recorded in the encoder's order
            assert difference(feature[0], expected[f"feature_{place}"][i - 1].float()) < 3e-3
        flow = networks.flow(low_res[i], low_res[i - 1])
        assert difference(flow, expected["flow_forward"][i - 1]) < 1e-4
    assert len(seen) == len(low_res) * len(steps)


@pytest.mark.parametrize("name", ["case_stream", "case_stream_odd"])
def test_the_loop_that_speed_is_measured_against(name: str, stream_weights: Path) -> None:
    """The libraries' modules in the published loop replay the recorded cases, so the baseline is the real thing."""
    expected, options = recorded(name)
    model = build_model(stream_weights, device="cpu")
    found = ReferenceStreamLoop(model).run(
        normalise(expected["input"].permute(0, 2, 3, 1)),
        RecordedNoise(expected["init_noise"], expected["init_noise"][None]),
        int(options["steps"]),
        model.encode_prompt(options["prompt"]),
        float(options["conditioning_scale"]),
    )
    assert difference(found, expected["decoded"]) < 1e-4


# ---------------------------------------------------------------------------------------------------------------------
# In float64, against what reference_stream.md says


def transcript(model: StableVSR, frames: Tensor, noise: Tensor, context: Tensor, num_steps: int) -> list[Tensor]:
    """The decoded frames, by the text: equations in plain numbers, the VAE of `Transcript`."""
    names = rename_all(model.vae.state_dict(), diffusers_temporal_tiny(model.config.vae))
    vae = Transcript({names[ours]: tensor for ours, tensor in model.vae.state_dict().items()})
    a = alphas_cumprod(model.config.schedule).double()
    decoded = []
    for i, low_res in enumerate(frames):
        w, x = None, noise[i][None]
        if decoded:
            high = [torch.nn.functional.interpolate(f[None], scale_factor=4, mode="bicubic") for f in frames]
            padded = [
                torch.nn.functional.pad(f, (0, 128 - f.shape[3], 0, 128 - f.shape[2]), mode="replicate")
                for f in (high[i], high[i - 1])
            ]
            flow = model.flow(*padded)[..., : high[0].shape[2], : high[0].shape[3]]
            w = warp_published(decoded[-1], flow)
        for k in range(num_steps):
            t = round(1000 - k * 1000 / num_steps) - 1
            time, stacked = torch.tensor([t]), torch.cat([x, low_res[None]], 1)
            residuals = None if w is None else model.tcm(stacked, time, context, w, 0.7)
            v = model.unet(stacked, time, context, residuals=residuals)
            x0 = a[t] ** 0.5 * x - (1 - a[t]) ** 0.5 * v
            e = a[t] ** 0.5 * v + (1 - a[t]) ** 0.5 * x
            next_t = t - 1000 // num_steps
            a_next = a[next_t] if next_t >= 0 else a[0]
            x = a_next**0.5 * x0 + (1 - a_next) ** 0.5 * e
        decoded.append(vae.decode(x, None if w is None else vae.features(w)))
    return decoded


@pytest.mark.parametrize("num_steps", [4, 3])
def test_in_float64_as_the_text_says(num_steps: int, stream_model: StableVSR) -> None:
    model = random_stream_model().double()
    torch.manual_seed(1)
    frames, noise = torch.rand(3, 3, 9, 14).double() * 2 - 1, torch.randn(3, 4, 9, 14)
    context = model.encode_prompt(None)
    steps = [
        Step(s.index, s.timestep, s.alpha_bar.double(), s.alpha_bar_next.double())
        for s in ddim_steps(SCHEDULE, num_steps)
    ]
    networks = StreamDenoiser(model, context, 0.7)
    ours = streaming_sampling(frames, steps, SCHEDULE, RecordedNoise(noise, noise[None]), networks)
    with torch.no_grad():
        theirs = transcript(model, frames, noise.double(), context, num_steps)
    for frame, picture in zip(ours, theirs, strict=True):
        assert frame.state.picture.dtype == torch.float64
        assert difference(frame.state.picture, picture[0]) < 1e-10


# ---------------------------------------------------------------------------------------------------------------------
# The schedule


@pytest.mark.parametrize("spacing", ["trailing", "leading", "linspace"])
@pytest.mark.parametrize("to_one", [False, True])
@pytest.mark.parametrize("num_steps", [1, 2, 3, 4, 7, 50])
def test_steps_are_those_of_the_library(spacing: str, to_one: bool, num_steps: int) -> None:
    config = replace(SCHEDULE, timestep_spacing=spacing, set_alpha_to_one=to_one)
    library = DDIMScheduler(
        beta_start=config.beta_start,
        beta_end=config.beta_end,
        beta_schedule="scaled_linear",
        prediction_type="v_prediction",
        clip_sample=False,
        set_alpha_to_one=to_one,
        steps_offset=config.steps_offset,
        timestep_spacing=spacing,
    )
    library.set_timesteps(num_steps)
    steps = ddim_steps(config, num_steps)
    assert [step.timestep for step in steps] == library.timesteps.tolist()
    torch.manual_seed(0)
    networks = Lambdas(predict=lambda x, low_res, step, embedding, features: x.cos())
    seen: list[StreamStep] = []
    low_res, noise = torch.zeros(1, 3, 4, 4), SeededNoise(0, (4, 4, 4))
    list(streaming_sampling(low_res, steps, config, noise, networks, on_step=seen.append))
    x = noise.initial(0)
    for step, ours in zip(library.timesteps, seen, strict=True):
        theirs = library.step(x.cos(), step, x)
        torch.testing.assert_close(ours.x0, theirs.pred_original_sample, rtol=1e-6, atol=1e-6)
        torch.testing.assert_close(ours.latent, theirs.prev_sample, rtol=1e-6, atol=1e-6)
        x = ours.latent


def test_the_published_times_and_end() -> None:
    steps = ddim_steps(SCHEDULE, DISTILLED_STEPS)
    assert [step.timestep for step in steps] == [999, 749, 499, 249]
    found = [step.alpha_bar.item() for step in steps]
    assert found == pytest.approx([0.000733, 0.038606, 0.333188, 0.821521], rel=1e-3)
    assert steps[-1].alpha_bar_next.item() == pytest.approx(0.9999, abs=1e-6)
    assert ddim_steps(replace(SCHEDULE, set_alpha_to_one=True), 4)[-1].alpha_bar_next == 1
    with pytest.raises(UserError, match="got 0 steps"):
        ddim_steps(SCHEDULE, 0)


# ---------------------------------------------------------------------------------------------------------------------
# The loop, with lambdas for networks


class Lambdas:
    """`StreamNetworks` that leave a trace: a picture is the mean of its LR frame and of the picture before."""

    def __init__(self, predict: object = None) -> None:
        self.asked: list[str] = []
        if predict is not None:
            self.predict = predict

    def encode(self, low_res: Tensor) -> None:
        self.asked.append("encode")

    def flow(self, low_res: Tensor, previous_low_res: Tensor) -> Tensor:
        self.asked.append("flow")
        return (low_res - previous_low_res).mean()

    def guide(self, picture: Tensor, flow: Tensor) -> Tensor:
        self.asked.append("guide")
        return picture + flow

    def embed(self, condition: Tensor) -> Tensor:
        self.asked.append("embed")
        return condition.mean()

    def predict(self, x: Tensor, low_res: Tensor, step: Step, embedding: Tensor | None, features: None) -> Tensor:
        self.asked.append("predict")
        return 0.1 * x + low_res.mean() + (0 if embedding is None else embedding)

    def decode(self, latent: Tensor, condition: Tensor | None) -> Tensor:
        self.asked.append("decode")
        return latent[:3].repeat_interleave(4, -1).repeat_interleave(4, -2)


def clip(n: int = 5, height: int = 3, width: int = 2) -> Tensor:
    return torch.rand(n, 3, height, width, generator=torch.Generator().manual_seed(0)) * 2 - 1


def run(frames: object, networks: object = None, num_steps: int = 2, **options: object) -> Iterator[StreamFrame]:
    noise = options.pop("noise", SeededNoise(3, (4, 3, 2)))
    return streaming_sampling(
        frames, ddim_steps(SCHEDULE, num_steps), SCHEDULE, noise, networks or Lambdas(), **options
    )


def pictures(frames: Iterator[StreamFrame]) -> list[Tensor]:
    return [frame.state.picture for frame in frames]


def test_the_order_of_work() -> None:
    networks = Lambdas()
    list(run(clip(2), networks))
    first = ["encode", "predict", "predict", "decode"]
    later = ["flow", "encode", "guide", "embed", "predict", "predict", "decode"]
    assert networks.asked == first + later


def test_a_frame_goes_out_before_the_next_is_asked_for() -> None:
    asked = []

    def source() -> Iterator[Tensor]:
        for i, frame in enumerate(clip(4)):
            asked.append(i)
            yield frame

    for i, frame in enumerate(run(source())):
        assert frame.state.frame == i
        assert asked == list(range(i + 1))


def test_nothing_but_the_last_state_is_held_while_the_stream_pauses() -> None:
    alive: list[weakref.ref] = []
    held = []

    class Watched(Lambdas):
        def decode(self, latent: Tensor, condition: Tensor | None) -> Tensor:
            picture = super().decode(latent, condition)
            alive.extend(weakref.ref(tensor) for tensor in (latent, picture, condition) if tensor is not None)
            return picture

    def source() -> Iterator[Tensor]:
        for frame in clip(6):
            own = frame.clone()
            alive.append(weakref.ref(own))
            yield own
            del own
            gc.collect()
            held.append(sum(tensor() is not None for tensor in alive))

    frames = run(source(), Watched())
    while next(frames, None) is not None:  # a for loop would hold the frame itself
        pass
    assert held == [2] * 6  # the last LR frame, and its picture


def test_a_cut_starts_anew() -> None:
    frames = clip(5)
    whole = pictures(run(frames, is_cut=cuts_at({2})))

    class Later:
        def initial(self, frame: int) -> Tensor:
            return SeededNoise(3, (4, 3, 2)).initial(frame + 2)

    alone = pictures(run(frames[2:], noise=Later()))
    assert all(torch.equal(a, b) for a, b in zip(whole[2:], alone, strict=True))
    assert not torch.equal(whole[2], pictures(run(frames))[2])


def test_a_cut_may_be_seen_in_the_frames() -> None:
    asked = []

    def changed(frame: int, low_res: Tensor, previous: Tensor) -> bool:
        asked.append((frame, torch.equal(low_res, frames[frame]), torch.equal(previous, frames[frame - 1])))
        return frame == 2

    frames = clip(4)
    found = list(run(frames, is_cut=changed))
    assert asked == [(1, True, True), (2, True, True), (3, True, True)]
    assert [frame.condition is None for frame in found] == [True, False, True, False]


@pytest.mark.parametrize("done", [1, 3])
def test_a_run_goes_on_from_its_last_frame(done: int) -> None:
    frames = clip(5)
    whole = list(run(frames))
    state = StreamState(*whole[done - 1].state)
    rest = list(run(frames[done:], start=state))
    assert [frame.state.frame for frame in rest] == list(range(done, 5))
    for again, frame in zip(rest, whole[done:], strict=True):
        assert torch.equal(again.state.picture, frame.state.picture)


def test_no_frames_no_pictures() -> None:
    assert list(run(iter(()))) == []


def test_a_change_of_size_is_refused() -> None:
    frames = run([*clip(2), clip(1, 4, 2)[0]], noise=SeededNoise(3, (4, 3, 2)))
    next(frames), next(frames)
    with pytest.raises(UserError, match="got size 2x4 for frame 2, expected 2x3 as before: a stream keeps one size"):
        next(frames)


def test_noise_of_the_wrong_shape_is_refused() -> None:
    with pytest.raises(UserError, match=r"noise of shape \(4, 9, 9\) for frame 0, expected \(4, 3, 2\)"):
        next(run(clip(1), noise=SeededNoise(3, (4, 9, 9))))


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_numbers_that_overflow_stop_the_stream(value: float) -> None:
    """Also where the decoder's tanh would make a picture of them."""

    class Saturated(Lambdas):
        def decode(self, latent: Tensor, condition: Tensor | None) -> Tensor:
            return super().decode(latent.tanh().nan_to_num(), condition)

    networks = Saturated(predict=lambda x, low_res, step, embedding, features: x + value)
    with pytest.raises(UserError, match="frame 0 overflowed: use bf16 or fp32"):
        next(run(clip(1), networks))


# ---------------------------------------------------------------------------------------------------------------------
# The model bound to a run


def stream(model: StableVSR, frames: Tensor, num_steps: int = 2, **options: object) -> list[Tensor]:
    noise = SeededNoise(0, (model.config.vae.latent_channels, *frames.shape[2:]))
    schedule = model.config.schedule
    networks = StreamDenoiser(model, model.encode_prompt(None), **options)
    return pictures(streaming_sampling(frames, ddim_steps(schedule, num_steps), schedule, noise, networks))


@pytest.mark.parametrize("size", [(1, 1), (3, 9), (13, 6)])
def test_any_size(size: tuple[int, int], stream_model: StableVSR) -> None:
    """Below 4 pixels a level has no position for the temporal modules."""
    found = stream(stream_model, clip(3, *size))
    assert [tuple(picture.shape) for picture in found] == [(3, 4 * size[0], 4 * size[1])] * 3


def test_weights_of_the_bidirectional_model_stream_too(tiny_model: StableVSR) -> None:
    frames = clip(3, 6, 5)
    whole = stream(tiny_model, frames, 5)
    assert len(whole) == 3
    decoder = lambda latent: tiny_model.vae.decode(latent / tiny_model.vae.scaling_factor)  # noqa: E731
    given = stream(tiny_model, frames, 5, picture_decoder=decoder)
    assert all(torch.equal(a, b) for a, b in zip(whole, given, strict=True))


def test_the_tcms_convolutions_once_a_frame_give_the_same_bits(stream_model: StableVSR) -> None:
    x, time, context = torch.randn(1, 7, 6, 5), torch.tensor([499]), stream_model.encode_prompt(None)
    picture, tcm = torch.randn(1, 3, 24, 20), stream_model.tcm
    whole, halves = tcm(x, time, context, picture), tcm(x, time, context, None, embedding=tcm.embed(picture))
    for a, b in zip((*whole.skips, whole.middle), (*halves.skips, halves.middle), strict=True):
        assert torch.equal(a, b)


def test_the_texts_keys_and_values_once_a_run_give_the_same_bits(stream_model: StableVSR) -> None:
    x, time, context = torch.randn(1, 7, 6, 5), torch.tensor([499]), torch.randn(1, 77, 32)
    picture, cached = torch.randn(1, 3, 24, 20), CachedContext(context)
    asked = []
    hooks = [
        module.to_k.register_forward_hook(lambda module, inputs, _: asked.append(inputs[0].shape[1]))
        for network in (stream_model.unet, stream_model.tcm)
        for module in network.modules()
        if isinstance(module, Attention)
    ]
    found = []
    for text in (context, cached, cached):
        asked.clear()
        found.append(stream_model.unet(x, time, text, None, stream_model.tcm(x, time, text, picture)))
        of_text = asked.count(77)
        assert bool(of_text) == (len(found) < 3)  # the second call fills the cache, the third finds all of it
    for hook in hooks:
        hook.remove()
    assert torch.equal(found[0], found[1])
    assert torch.equal(found[0], found[2])


def test_classifier_free_guidance(stream_model: StableVSR) -> None:
    contexts = torch.randn(2, 77, 32)
    x, low_res, step = torch.randn(4, 6, 5), torch.randn(3, 6, 5), ddim_steps(SCHEDULE, 4)[1]

    def predict(context: Tensor, scale: float = 1.0) -> Tensor:
        networks = StreamDenoiser(stream_model, context, cfg_scale=scale)
        return networks.predict(x, low_res, step, networks.embed(torch.ones(3, 24, 20)))

    negative, positive = predict(contexts[:1]), predict(contexts[1:])
    expected = negative + 2.5 * (positive - negative)
    torch.testing.assert_close(predict(contexts, 2.5), expected, rtol=1e-4, atol=1e-5)


def test_half_precision_keeps_the_autoencoder_in_float32(stream_weights: Path) -> None:
    frames = clip(3, 12, 10)
    full = stream(build_model(stream_weights, "cpu"), frames)
    for dtype in ("fp16", "bf16"):
        model = build_model(stream_weights, "cpu", dtype)
        assert model.vae.dtype == (torch.float32 if dtype == "fp16" else torch.bfloat16)
        for ours, theirs in zip(stream(model, frames), full, strict=True):
            assert ours.dtype == torch.float32
            assert (ours - theirs).abs().mean() < (0.01 if dtype == "fp16" else 0.1)


def test_a_compiled_model_gives_the_same_pictures(stream_model: StableVSR) -> None:
    model, frames = random_stream_model(), clip(2, 6, 5)
    for part in (model.tcm, model.tcm.conditioning, model.vae.decoder, model.vae.encoder):
        part.compile(backend="eager", dynamic=False, fullgraph=True)
    for a, b in zip(stream(model, frames), stream(stream_model, frames), strict=True):
        torch.testing.assert_close(a, b)


@pytest.mark.parametrize("sampler", ["ddpm", "ddim", "dpm++"])
def test_all_samplers_agree_with_the_bidirectional_loop_on_a_single_frame(sampler: str, tiny_model: StableVSR) -> None:
    """Where there is nothing to be guided by, both loops do the same."""
    options = {"sampler": sampler, "steps": 4, "eta": 0.7 if sampler == "ddim" else 0.0, "seed": 5}
    frame = clip(1, 6, 5) / 2 + 0.5
    expected = sample_video(tiny_model, frame, **options)
    assert torch.equal(sample_video(tiny_model, frame, mode="streaming", **options), expected)


def test_weights_of_the_bidirectional_model_end_in_x0(tiny_model: StableVSR) -> None:
    assert type(tiny_model.config.schedule) is ScheduleConfig
    assert ddim_steps(tiny_model.config.schedule, 5)[-1].alpha_bar_next == 1


@pytest.mark.parametrize("half", [False, True])
def test_a_streams_flows_are_those_of_pairs(half: bool, stream_model: StableVSR) -> None:
    """Each frame's features are computed once, and kept for the next."""
    frames, flows, encoded = list(clip(4, 46, 50)), StreamFlows(stream_model.flow, half), []
    hook = stream_model.flow.fnet.register_forward_hook(lambda module, inputs, _: encoded.append(len(inputs[0])))
    found = [flows.to_previous(frames[i], frames[i - 1]) for i in (1, 2, 3)]
    hook.remove()
    assert encoded == [1] * 4
    for i, flow in enumerate(found, 1):
        expected = estimate_flow(stream_model.flow, frames[i][None], frames[i - 1][None], half)[0]
        torch.testing.assert_close(flow, expected, atol=1e-4, rtol=1e-4)
