"""Devices that are not here, imitated: what CUDA and MPS lack or do differently."""

import subprocess
import sys
from collections.abc import Callable

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from models import TINY, offloaded, random_model
from torch import Tensor, nn

from stablevsr import runtime, sample_video
from stablevsr.errors import UserError
from stablevsr.metrics.evaluate import means
from stablevsr.metrics.fidelity import psnr, ssim
from stablevsr.model import StableVSR
from stablevsr.nn import attention
from stablevsr.nn.layers import double_and_convolve
from stablevsr.nn.warp import warp
from stablevsr.sampling import tiles
from stablevsr.sampling.tiles import PictureDecoder


class OnMPS(Tensor):
    """A CPU tensor that poses as one of MPS: no float64, no bicubic grid_sample."""

    @property
    def device(self) -> torch.device:
        return torch.device("mps")

    @classmethod
    def __torch_function__(
        cls, function: Callable, types: object, args: tuple = (), kwargs: dict | None = None
    ) -> object:
        kwargs = kwargs or {}
        if function is Tensor.cpu:
            return args[0].as_subclass(Tensor)
        if function is Tensor.to and isinstance(args[1], OnMPS):
            return args[0].as_subclass(OnMPS)
        if function is F.grid_sample and kwargs["mode"] == "bicubic":
            raise RuntimeError("MPS: Unsupported Bicubic interpolation")
        result = super().__torch_function__(function, types, args, kwargs)
        if isinstance(result, OnMPS) and result.dtype == torch.float64:
            raise TypeError(
                "Cannot convert a MPS Tensor to float64 dtype as the MPS framework doesn't support float64."
            )
        return result


def on_mps(tensor: Tensor) -> Tensor:
    return tensor.as_subclass(OnMPS)


def noise(*shape: int) -> Tensor:
    return torch.rand(shape, generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize("metric", [psnr, ssim])
def test_metrics_on_mps(metric: Callable) -> None:
    a, b = noise(2, 2, 3, 16, 16)
    assert torch.equal(metric(on_mps(a), on_mps(b)), metric(a, b))


def test_warping_on_mps() -> None:
    picture, flow = noise(1, 3, 8, 8), 3 * noise(1, 2, 8, 8)
    fetched = warp(on_mps(picture), on_mps(flow), "bicubic")
    assert isinstance(fetched, OnMPS)
    assert torch.equal(fetched.cpu(), warp(picture, flow, "bicubic"))


def test_attention_over_many_positions_is_chunked_on_mps(monkeypatch: pytest.MonkeyPatch) -> None:
    q, k, v = noise(3, 1, 1, 40, 8)
    monkeypatch.setattr(attention, "MAX_MPS_SCORES", 40 * 40 - 1)
    monkeypatch.setattr(F, "scaled_dot_product_attention", lambda *_: pytest.fail("all scores at once"))
    chunked = attention.attend(on_mps(q), on_mps(k), on_mps(v)).cpu()
    monkeypatch.undo()
    assert torch.allclose(chunked, attention.attend(q, k, v), atol=1e-6)


MEMORY = [
    torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 MiB"),
    RuntimeError("MPS backend out of memory (MPS allocated: 8.00 GB). Tried to allocate 12.11 GB on private pool."),
    RuntimeError("Invalid buffer size: 12.36 GiB"),
    RuntimeError("[enforce fail at alloc_cpu.cpp:118] err == 0. DefaultCPUAllocator: can't allocate memory"),
    MemoryError(),
]


@pytest.mark.parametrize("error", MEMORY, ids=lambda error: str(error)[:20])
def test_decoding_falls_back_to_tiles_on_every_device(
    tiny_model: StableVSR, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, error: Exception
) -> None:
    real = tiny_model.vae.decode

    def decode(latent: Tensor) -> Tensor:
        if latent.shape[-1] > 16:
            raise error
        return real(latent)

    monkeypatch.setattr(tiny_model.vae, "decode", decode)
    monkeypatch.setattr(tiles, "AUTO_TILE", 16)
    decoder = PictureDecoder(tiny_model)
    assert decoder(noise(1, 4, 20, 24)).shape == (1, 3, 80, 96)
    assert "decoding in tiles" in caplog.text
    assert decoder.has_fallen_back


def test_other_errors_are_no_lack_of_memory(tiny_model: StableVSR, monkeypatch: pytest.MonkeyPatch) -> None:
    def decode(latent: Tensor) -> Tensor:
        raise RuntimeError("mat1 and mat2 shapes cannot be multiplied")

    monkeypatch.setattr(tiny_model.vae, "decode", decode)
    with pytest.raises(RuntimeError, match="mat1"):
        PictureDecoder(tiny_model)(noise(1, 4, 20, 24))


def test_numerics_hold_within_a_step_and_nowhere_else() -> None:
    cudnn = torch.backends.cudnn

    def settings() -> tuple[bool, bool, bool]:
        return cudnn.deterministic, cudnn.benchmark, cudnn.allow_tf32

    before = settings()

    def work() -> object:
        yield settings()
        yield settings()

    for inside in runtime.under_numerics(work()):
        assert inside == (True, False, False)
        assert settings() == before


@pytest.mark.skipif(not hasattr(torch.backends.cudnn, "conv"), reason="this PyTorch has the older interface only")
@pytest.mark.parametrize("used", ["conv.fp32_precision = 'ieee'", "rnn.fp32_precision = 'ieee'", "allow_tf32 = False"])
def test_numerics_hold_in_a_program_that_has_set_its_own(used: str) -> None:
    """In a process of its own, because what the newer interface has set cannot all be set back."""
    code = f"""
import numpy as np, torch
torch.backends.cudnn.{used}
torch.backends.cuda.matmul.fp32_precision = "tf32"
from stablevsr import build_model, runtime, sample_video
conv = torch.backends.cudnn.conv
before, rnn = conv.fp32_precision, torch.backends.cudnn.rnn.fp32_precision
with runtime.numerics():
    assert conv.fp32_precision == "ieee" and torch.backends.cudnn.allow_tf32 is False
assert (conv.fp32_precision, torch.backends.cudnn.rnn.fp32_precision) == (before, rnn)
model = build_model(device="cpu")
assert runtime.describe(model)["float32 matmul precision"]
sample_video(model, np.zeros((2, 4, 4, 3), np.uint8), steps=1)
"""
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert result.returncode == 0, result.stderr


def test_an_offloaded_network_is_brought_before_it_is_asked_for_its_device() -> None:
    model, loaded = offloaded(random_model()), []
    model.load = loaded.append
    assert next(model.flow.parameters()).device.type == "cpu"
    assert model.vae.scaling_factor == TINY.vae.scaling_factor
    assert loaded == [model._model.flow]


def test_every_network_of_a_run_works_under_the_numerics() -> None:
    model, seen = random_model(), set()
    for name, part in (("unet", model.unet), ("tcm", model.tcm), ("vae", model.vae.decoder), ("flow", model.flow.fnet)):
        part.register_forward_pre_hook(lambda *_, name=name: seen.add((name, torch.backends.cudnn.deterministic)))
    sample_video(model, np.zeros((2, 8, 8, 3), np.uint8), steps=2)
    assert {("unet", True), ("tcm", True), ("flow", True)} <= seen
    assert all(deterministic for _, deterministic in seen)


def test_a_compiled_network_goes_on_at_sizes_beyond_the_limit(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(runtime, "MAX_GRAPHS", 1)
    conv = nn.Conv2d(1, 1, 3)
    expected = [conv(noise(1, 1, side, side)) for side in (4, 5, 6)]
    limit = torch._dynamo.config.recompile_limit
    conv.compile(backend="eager", dynamic=False)
    for side, result in zip((4, 5, 6), expected, strict=True):
        with runtime.numerics():
            assert torch.equal(conv(noise(1, 1, side, side)), result)
    assert torch._dynamo.config.recompile_limit == limit


def test_a_run_is_described_by_what_its_bits_depend_on(monkeypatch: pytest.MonkeyPatch) -> None:
    model = random_model()
    plain = runtime.describe(model)
    assert plain["compilation"] == "none"
    assert plain["version of torch"] == torch.__version__
    assert runtime.describe(offloaded(model)) == plain
    model.compile_parts()
    assert runtime.describe(model)["compilation"].startswith("unet.encoder, unet.decoder, tcm")

    class OnGPU(nn.Module):
        device, dtype = torch.device("cuda"), torch.bfloat16

    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "a GPU")
    monkeypatch.setattr(torch.backends.cudnn, "version", lambda: 91002)
    found = runtime.describe(OnGPU())
    assert (found["device"], found["GPU"], found["version of cuDNN"]) == ("cuda", "a GPU", "91002")
    assert found["dtype"] == "bfloat16"


def test_bfloat16_is_refused_by_a_gpu_without_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (7, 5))
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "Turing")
    with pytest.raises(UserError, match="Turing does not support bfloat16"):
        runtime.check_dtype(torch.device("cuda"), torch.bfloat16)
    runtime.check_dtype(torch.device("cuda"), torch.float16)


@pytest.mark.parametrize(
    ("capability", "dtype", "warns"),
    [
        ("AVX2", torch.bfloat16, True),
        ("AVX2", torch.float16, True),
        ("AVX2", torch.float32, False),
        ("AVX512", torch.bfloat16, False),
    ],
)
def test_a_processor_without_half_precision_is_named(
    capability: str, dtype: torch.dtype, warns: bool, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda: capability)
    runtime.check_dtype(torch.device("cpu"), dtype)
    assert ("fp32 is many times faster" in caplog.text) == warns


@pytest.mark.parametrize(("device", "language"), [("cpu", r"C\+\+"), ("cuda", "C")])
def test_compiling_needs_a_compiler_on_every_device(
    monkeypatch: pytest.MonkeyPatch, device: str, language: str
) -> None:
    monkeypatch.setattr(runtime.shutil, "which", lambda name: None)
    with pytest.raises(UserError, match=f"needs a {language} compiler on the {device.upper()}"):
        runtime.require_compiler(torch.device(device))


def test_half_precision_upsampling_sums_its_weights_in_float32() -> None:
    conv = nn.Conv2d(1, 1, 3, padding=1, bias=False).bfloat16().requires_grad_(False)
    conv.weight.fill_(1.0)
    conv.weight[..., 0, 0] = 2.0**-8  # lost when it is added to 1 in bfloat16, and 2 with another rounding
    wide = nn.Conv2d(1, 1, 3, padding=1, bias=False).requires_grad_(False)
    wide.weight.copy_(conv.weight)
    x = torch.eye(4)[None, None]
    exact = double_and_convolve(x, wide)
    assert torch.equal(double_and_convolve(x.bfloat16(), conv).float(), exact.bfloat16().float())


def test_overflow_is_told_at_the_frame_step_that_it_happens_in() -> None:
    model, calls = random_model(), 0

    def overflow(module: nn.Module, inputs: object, output: Tensor) -> Tensor:
        nonlocal calls
        calls += 1
        return output * torch.inf if calls == 5 else output  # the second frame of the way back

    model.unet.register_forward_hook(overflow)
    with pytest.raises(UserError, match="frame 1 overflowed in step 1: use bf16 or fp32"):
        sample_video(model, np.zeros((3, 8, 8, 3), np.uint8), steps=3)
    assert calls == 5


def test_means_keep_infinity_and_nan_apart() -> None:
    assert means([{"PSNR": np.inf}, {"PSNR": 30.0}])["PSNR"] == np.inf
    assert np.isnan(means([{"PSNR": np.nan}, {"PSNR": 30.0}])["PSNR"])
