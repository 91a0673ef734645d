"""Wide convolutions at few positions, which a CPU computes as matrix products."""

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from models import TINY, random_model
from torch import Tensor, nn

from stablevsr.nn import layers
from stablevsr.nn.layers import convolve, double_and_convolve


@pytest.fixture
def products(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """All convolutions count as wide; says which were computed as products."""
    used: list[str] = []

    def noting(name: str) -> Callable:
        real = getattr(F, name)
        return lambda *arguments, **options: used.append(name) or real(*arguments, **options)

    monkeypatch.setattr(layers, "WIDE_BYTES", 0)
    for name in ("unfold", "fold"):
        monkeypatch.setattr(layers.F, name, noting(name))
    return used


@pytest.mark.parametrize("size", [(1, 1), (1, 5), (3, 4), (16, 20)])
@pytest.mark.parametrize("count", [1, 2])
def test_a_product_is_the_convolution(count: int, size: tuple[int, int], products: list[str]) -> None:
    torch.manual_seed(0)
    conv, x = nn.Conv2d(6, 5, 3, padding=1), torch.randn(count, 6, *size)
    with torch.no_grad():
        torch.testing.assert_close(convolve(conv, x), conv(x), rtol=0, atol=1e-5)
        assert products == ["unfold"]


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("size", [(1, 1), (1, 5), (3, 4)])
def test_a_product_is_the_upsampling(size: tuple[int, int], bias: bool, products: list[str]) -> None:
    torch.manual_seed(0)
    conv, x = nn.Conv2d(6, 5, 3, padding=1, bias=bias), torch.randn(2, 6, *size)
    expected = conv(F.interpolate(x, scale_factor=2.0, mode="nearest"))
    with torch.no_grad():
        torch.testing.assert_close(double_and_convolve(x, conv), expected, rtol=0, atol=1e-5)
    assert products == ["fold"]


def test_a_network_of_products_predicts_the_same(products: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    model, x = random_model(), torch.randn(2, 7, 8, 12, generator=torch.Generator().manual_seed(0))
    time, context = torch.tensor([300, 301]), model.encode_prompt(None).expand(2, -1, -1)
    with torch.no_grad():
        found = model.unet(x, time, context)
        assert {"unfold", "fold"} <= set(products)
        monkeypatch.setattr(layers, "WIDE_BYTES", 2**62)
        torch.testing.assert_close(found, model.unet(x, time, context), rtol=0, atol=1e-4)


def test_elsewhere_it_stays_a_convolution(products: list[str]) -> None:
    def ask(conv: nn.Conv2d, x: Tensor) -> None:
        assert torch.equal(convolve(conv, x), conv(x))
        assert products == []

    conv = nn.Conv2d(6, 5, 3, padding=1)
    ask(conv, torch.randn(1, 6, 4, 4))  # with gradients
    with torch.no_grad():
        ask(conv, torch.randn(1, 6, 18, 18))  # many positions
        ask(nn.Conv2d(6, 5, 3, padding=1).to(memory_format=torch.channels_last), torch.randn(1, 6, 4, 4))
        ask(nn.Conv2d(6, 5, 3, padding=1).bfloat16(), torch.randn(1, 6, 4, 4).bfloat16())
        layers.WIDE_BYTES = 4 * 6 * 5 * 9
        ask(conv, torch.randn(1, 6, 4, 4))  # not wide


def test_the_released_widths_are_wide_and_the_bundled_are_not() -> None:
    assert 4 * 1024 * 1024 * 9 > layers.WIDE_BYTES > 4 * 1536 * 512 * 9
    assert 4 * 9 * 2 * max(TINY.unet.encoder.channels) ** 2 < layers.WIDE_BYTES
