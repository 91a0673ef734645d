"""Metrics against the libraries that define them, and the command `evaluate`."""

import csv
import json
import math
import os
import sys
from collections.abc import Iterator
from pathlib import Path

import clips_made as made
import imageio.v3 as iio
import numpy as np
import piq
import pytest
import torch
import torchvision
from torchmetrics.functional.image import peak_signal_noise_ratio, structural_similarity_index_measure

from stablevsr.cli import main
from stablevsr.metrics import perceptual
from stablevsr.metrics.evaluate import Report
from stablevsr.metrics.fidelity import psnr, ssim, tof
from stablevsr.metrics.report import as_csv, as_json, table
from stablevsr.model import StableVSR

CPU = torch.device("cpu")


def clips(count: int = 3, height: int = 40, width: int = 48) -> tuple[np.ndarray, np.ndarray]:
    """A result and the smooth moving truth that it is near, (n, h, w, 3) uint8."""
    y, x = np.mgrid[:height, :width][..., None]
    truth = np.stack([128 + 100 * np.sin((x + 2 * i) / 5 + y / 9 + np.arange(3)) for i in range(count)])
    noise = np.random.default_rng(0).normal(0, 12, truth.shape)
    return (truth + noise).clip(0, 255).astype(np.uint8), truth.astype(np.uint8)


def tensors(*arrays: np.ndarray) -> list[torch.Tensor]:
    return [torch.from_numpy(array).permute(0, 3, 1, 2).float() / 255 for array in arrays]


def write(folder: Path, frames: np.ndarray) -> Path:
    folder.mkdir(parents=True)
    for i, frame in enumerate(frames):
        iio.imwrite(folder / f"{i}.png", frame)
    return folder


@pytest.fixture(autouse=True)
def _tiny_model(monkeypatch: pytest.MonkeyPatch, tiny_weights: Path) -> Iterator[None]:
    monkeypatch.setattr("stablevsr.model.bundled_weights", lambda: tiny_weights)
    before = torch.hub.get_dir()
    yield
    torch.hub.set_dir(before)


@pytest.fixture
def backbones(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A weights folder with random AlexNet and VGG16 in the place of the trained ones."""
    folder = tmp_path / "hub"
    (folder / "checkpoints").mkdir(parents=True)
    torch.manual_seed(0)
    torch.save(torchvision.models.alexnet().state_dict(), folder / "checkpoints/alexnet-owt-7be5be79.pth")
    torch.save(torchvision.models.vgg16().state_dict(), folder / "checkpoints/vgg16-397923af.pth")
    monkeypatch.setattr("torch.hub.download_url_to_file", lambda *_, **__: pytest.fail("something was fetched"))
    return folder


def test_psnr_and_ssim() -> None:
    for result, truth in zip(*tensors(*clips()), strict=True):
        pair = result[None], truth[None]
        assert psnr(*pair).item() == pytest.approx(peak_signal_noise_ratio(*pair, data_range=1.0).item(), abs=1e-5)
        expected = structural_similarity_index_measure(*pair, data_range=1.0)
        assert ssim(*pair).item() == pytest.approx(expected.item(), abs=1e-5)


def test_haarpsi_and_gmsd() -> None:
    result, truth = tensors(*clips())
    for name, function in (("HaarPSI", piq.haarpsi), ("GMSD", piq.gmsd)):
        ours = perceptual.LOADERS[name](CPU)(result, truth)
        assert ours.shape == (3,)
        assert ours.mean().item() == pytest.approx(function(result, truth).item(), abs=1e-5)


def test_tof_is_its_definition(tiny_model: StableVSR) -> None:
    """Mean over pixels and components of |RAFT(sr_i, sr_i-1) - RAFT(gt_i, gt_i-1)|, times 10, frames in [0, 1]."""
    result, truth = tensors(*clips(3, 128, 136))
    expected = []
    with torch.no_grad():
        for i in (1, 2):
            flows = [tiny_model.flow(frames[i : i + 1], frames[i - 1 : i]) for frames in (result, truth)]
            expected.append(10 * (flows[0] - flows[1]).abs().mean().item())
    assert min(expected) > 0.1
    assert tof(tiny_model.flow, result, truth).tolist() == pytest.approx(expected, abs=1e-5)


def test_lpips_dists_and_tlp_with_random_backbones(tmp_path: Path, backbones: Path) -> None:
    import DISTS_pytorch
    import lpips

    result, truth = clips(3, 64, 64)
    paths = [write(tmp_path / "sr", result), write(tmp_path / "gt", truth), tmp_path / "out.json"]
    arguments = [str(paths[0]), str(paths[1]), "--weights-dir", str(backbones), "--json", str(paths[2])]
    assert main(["evaluate", *arguments, "--device", "cpu"]) == 0
    frames = json.loads(paths[2].read_text())["clips"]["sr"]["frames"]
    sr, gt = tensors(result, truth)
    network = lpips.LPIPS(net="alex", verbose=False)
    with torch.no_grad():
        expected = network(sr, gt, normalize=True).flatten().tolist()
        assert [row["LPIPS"] for row in frames] == pytest.approx(expected, abs=1e-5)
        assert [row["DISTS"] for row in frames] == pytest.approx(DISTS_pytorch.DISTS()(sr, gt).tolist(), abs=1e-5)
        moved = [network(clip[1:], clip[:-1], normalize=True).flatten() for clip in (sr, gt)]
    assert "tLP" not in frames[0]
    assert [row["tLP"] for row in frames[1:]] == pytest.approx((1000 * (moved[0] - moved[1]).abs()).tolist(), abs=1e-3)


def test_means_are_taken_per_clip_and_then_over_clips(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    """A clip of one frame has no temporal figures and does not spoil the mean; missing weights are said, never 0."""
    result, truth = clips(4)
    for name, part in (("a", slice(0, 3)), ("b", slice(3, 4))):
        write(tmp_path / "sr" / name, result[part])
        write(tmp_path / "gt" / name, truth[part])
    paths = [str(tmp_path / name) for name in ("sr", "gt", "out.json", "out.csv")]
    arguments = ["evaluate", *paths[:2], "--json", paths[2], "--csv", paths[3], "--weights-dir", str(tmp_path)]
    assert main([*arguments, "--device", "cpu"]) == 0
    printed = capsys.readouterr().out
    assert "mean of clips" in printed
    assert "LPIPS skipped: weights missing: alexnet-owt-7be5be79.pth" in printed
    assert "tLP skipped" in printed
    report = json.loads((tmp_path / "out.json").read_text())
    values = psnr(*tensors(result, truth)).tolist()
    assert report["clips"]["a"]["mean"]["PSNR"] == pytest.approx(np.mean(values[:3]))
    assert report["mean"]["PSNR"] == pytest.approx((np.mean(values[:3]) + values[3]) / 2)
    assert "tOF" not in report["clips"]["b"]["mean"]
    assert report["mean"]["tOF"] == report["clips"]["a"]["mean"]["tOF"]
    assert "LPIPS" not in report["mean"]
    rows = list(csv.DictReader((tmp_path / "out.csv").open()))
    assert [(row["clip"], row["frame"]) for row in rows] == [("a", "0"), ("a", "1"), ("a", "2"), ("b", "0")]
    assert rows[0]["tOF"] == ""


def test_equal_clips(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    clip, out = str(write(tmp_path / "a", clips()[1])), tmp_path / "out.json"
    assert main(["evaluate", clip, clip, "--json", str(out), "--device", "cpu"]) == 0
    assert "inf" in capsys.readouterr().out
    means = json.loads(out.read_text())["mean"]
    assert means["PSNR"] is None
    assert means["SSIM"] == pytest.approx(1)
    assert means["tOF"] == 0


def test_reports_keep_infinity_and_nan_apart() -> None:
    """NaN is not passed off as perfect; JSON, which has neither, says null."""
    report = Report("none")
    report.clips = {"equal": [{"PSNR": math.inf}, {"PSNR": 30.0}], "broken": [{"PSNR": math.nan}, {"PSNR": 30.0}]}
    means = report.clip_means()
    assert means["equal"]["PSNR"] == math.inf
    assert math.isnan(means["broken"]["PSNR"])
    assert math.isnan(report.overall()["PSNR"])
    assert [line.split()[-1] for line in table(report).splitlines()[1:]] == ["inf", "nan", "nan"]
    assert [row["PSNR"] for row in csv.DictReader(as_csv(report).splitlines())] == ["inf", "30.0", "nan", "30.0"]
    written = json.loads(as_json(report))
    assert written["mean"]["PSNR"] is None
    assert [frame["PSNR"] for frame in written["clips"]["broken"]["frames"]] == [None, 30.0]


def test_depth_does_not_matter(tmp_path: Path) -> None:
    gray = clips()[1][..., 0]
    arguments = [str(write(tmp_path / "8", gray)), str(write(tmp_path / "16", gray.astype(np.uint16) * 257))]
    assert main(["evaluate", *arguments, "--json", str(tmp_path / "out.json"), "--device", "cpu"]) == 0
    frames = json.loads((tmp_path / "out.json").read_text())["clips"]["8"]["frames"]
    assert all(row["PSNR"] is None or row["PSNR"] > 120 for row in frames)


def test_clips_that_do_not_match_are_named(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    result, truth = clips()
    write(tmp_path / "sr", result)
    write(tmp_path / "short", truth[:2])
    write(tmp_path / "small", truth[:, :20])
    write(tmp_path / "many/a", truth)
    write(tmp_path / "other/b", truth)
    for a, b, words in [
        ("sr", "short", "has 3 frames and"),
        ("sr", "small", "is 48x40 and"),
        ("sr", "many", "sr lacks the clip a"),
        ("many", "other", "lacks the clip"),
        ("sr", "missing", "does not exist"),
    ]:
        assert main(["evaluate", str(tmp_path / a), str(tmp_path / b), "--device", "cpu"]) == 2
        assert words in capsys.readouterr().err.splitlines()[-1]


@pytest.mark.parametrize("several", [True, False])
def test_names_that_are_not_utf_8_are_escaped_in_every_report(
    tmp_path: Path, capsys: pytest.CaptureFixture, several: bool
) -> None:
    name = os.fsdecode(b"caf\xe9 \xc3\xa9")
    result, truth = clips(2)
    inside = Path(name) if several else Path()
    paths = [tmp_path / kind / (Path() if several else name) for kind in ("sr", "gt")]
    for path, frames in zip(paths, (result, truth), strict=True):
        try:
            write(path / inside, frames)
        except OSError:
            pytest.skip("this file system takes UTF-8 names only")
    reports = [tmp_path / "out.csv", tmp_path / "out.json"]
    options = ["--csv", str(reports[0]), "--json", str(reports[1]), "--device", "cpu"]
    assert main(["evaluate", *map(str, paths), *options]) == 0
    shown = "caf\\xe9 \u00e9"
    assert shown in capsys.readouterr().out
    texts = [path.read_bytes().decode("utf-8") for path in reports]
    assert [row["clip"] for row in csv.DictReader(texts[0].splitlines())] == [shown] * 2
    assert list(json.loads(texts[1])["clips"]) == [shown]


@pytest.mark.parametrize("command", ["evaluate", "compare"])
def test_videos_that_upscale_takes_when_asked_are_taken(
    tmp_path: Path, capsys: pytest.CaptureFixture, command: str
) -> None:
    paths = [str(made.tagged_video(tmp_path / name, 16)) for name in ("sr.mkv", "gt.mkv")]
    page = ["--gt", paths[1], "-o", str(tmp_path / "page.html"), "--no-flow"]
    arguments = {"evaluate": ["evaluate", *paths], "compare": ["compare", str(tmp_path / "lr.mkv"), paths[0], *page]}
    made.tagged_video(tmp_path / "lr.mkv", 16, 4, 6)
    assert main([*arguments[command], "--device", "cpu"]) == 2
    assert "pass --allow-hdr" in capsys.readouterr().err
    assert main([*arguments[command], "--device", "cpu", "--allow-hdr"]) == 0
    assert "HDR is read as if it were not" in capsys.readouterr().err


def test_metrics_without_their_package_are_skipped(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(perceptual, "find_spec", lambda name: None)
    for load in perceptual.LOADERS.values():
        with pytest.raises(perceptual.Unavailable, match="is not installed: pip install"):
            load(CPU)


def test_metrics_of_pyiqa_look_at_the_result_where_the_user_has_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    """pyiqa itself is not for everyone to install: a stand-in shows what it is asked for."""
    monkeypatch.setattr("torch.hub.get_dir", lambda: str(tmp_path / "hub"))
    load = perceptual.LOADERS["MUSIQ"]
    with pytest.raises(perceptual.Unavailable, match="pyiqa is not installed"):
        load(CPU)
    (tmp_path / "site").mkdir()
    (tmp_path / "site/pyiqa.py").write_text(
        "def create_metric(name, device):\n    return {'musiq': lambda x: 100 * x.mean((1, 2, 3))[:, None]}[name]\n"
    )
    monkeypatch.syspath_prepend(tmp_path / "site")
    with pytest.raises(perceptual.Unavailable, match="weights missing: musiq_koniq"):
        load(CPU)
    (tmp_path / "hub/pyiqa").mkdir(parents=True)
    (tmp_path / "hub/pyiqa/musiq_koniq_ckpt-e95806b9.pth").touch()
    result, truth = tensors(*clips())
    expected = 100 * result.mean((1, 2, 3))
    torch.testing.assert_close(load(CPU)(result, truth), expected)
    paths = [str(write(tmp_path / name, frames)) for name, frames in zip(("sr", "gt"), clips(), strict=True)]
    table_and_csv = [*paths, "--csv", str(tmp_path / "out.csv"), "--device", "cpu"]
    assert main(["evaluate", *table_and_csv, "--weights-dir", str(tmp_path / "hub")]) == 0
    assert "MUSIQ" in capsys.readouterr().out.splitlines()[0]
    rows = csv.DictReader((tmp_path / "out.csv").open())
    assert [float(row["MUSIQ"]) for row in rows] == pytest.approx(expected.tolist(), abs=1e-3)
    monkeypatch.delitem(sys.modules, "pyiqa")
