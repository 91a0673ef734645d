"""Procedural clips with their exact flow, folders of clips, and windows cut from both."""

import pickle
from pathlib import Path

import imageio.v3 as iio
import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from stablevsr.errors import UserError
from stablevsr.nn.warp import pixel_grid
from stablevsr.training.data import ProceduralWindows, Windows, downscale
from stablevsr.training.folders import FolderWindows
from stablevsr.training.procedural import RenderedClip, render_clip


def fetch(picture: Tensor, flow: Tensor) -> Tensor:
    """Exact backward warping, corners aligned (not the published one)."""
    size = torch.tensor([picture.shape[-1] - 1, picture.shape[-2] - 1])[:, None, None]
    grid = 2 * (pixel_grid(flow) + flow) / size - 1
    return F.grid_sample(picture, grid.permute(0, 2, 3, 1), align_corners=True)


@pytest.fixture(scope="module")
def clips() -> list[RenderedClip]:
    return [render_clip(seed=0, index=i, num_frames=3, height=64, width=80) for i in range(6)]


def test_clips_are_a_function_of_seed_and_index(clips: list[RenderedClip]) -> None:
    again = render_clip(seed=0, index=2, num_frames=3, height=64, width=80)
    assert torch.equal(again.frames, clips[2].frames)
    assert torch.equal(again.forward, clips[2].forward)
    assert not torch.equal(clips[1].frames, clips[2].frames)
    assert not torch.equal(render_clip(1, 2, 1, 64, 80).frames[0], clips[2].frames[0])
    without = render_clip(seed=0, index=2, num_frames=3, height=64, width=80, with_flow=False)
    assert torch.equal(without.frames, clips[2].frames)
    assert without.forward.shape == (0, 2, 64, 80)


def test_shapes_and_ranges(clips: list[RenderedClip]) -> None:
    for clip in clips:
        assert clip.frames.shape == (3, 3, 64, 80)
        assert clip.forward.shape == clip.backward.shape == (2, 2, 64, 80)
        assert clip.forward_occluded.shape == (2, 64, 80)
        assert clip.frames.min() >= 0
        assert clip.frames.max() <= 1


def test_flow_fetches_the_neighbour_outside_of_occlusions(clips: list[RenderedClip]) -> None:
    still, moved, wrong = [], [], []
    for clip in clips:
        for flow, hidden, source, target in (
            (clip.forward, clip.forward_occluded, clip.frames[:2], clip.frames[1:]),
            (clip.backward, clip.backward_occluded, clip.frames[1:], clip.frames[:2]),
        ):
            seen = ~hidden
            moved.append((fetch(source, flow) - target).abs().mean(1)[seen].mean())
            wrong.append((fetch(source, -flow) - target).abs().mean(1)[seen].mean())
            still.append((source - target).abs().mean(1)[seen].mean())
    assert torch.stack(moved).mean() < 0.35 * torch.stack(still).mean()
    assert torch.stack(moved).mean() < 0.25 * torch.stack(wrong).mean()


def test_hidden_pixels_are_worse_than_seen_ones(clips: list[RenderedClip]) -> None:
    error = torch.cat([(fetch(c.frames[:2], c.forward) - c.frames[1:]).abs().mean(1).flatten() for c in clips])
    hidden = torch.cat([c.forward_occluded.flatten() for c in clips])
    assert 0.005 < hidden.float().mean() < 0.4
    assert error[hidden].mean() > 3 * error[~hidden].mean()


def test_pictures_are_like_natural_ones() -> None:
    """Muted colours, and amplitudes that fall with frequency about as 1/f."""
    frames = torch.cat([render_clip(3, i, 1, 64, 64).frames for i in range(12)])
    chroma = frames.max(1).values - frames.min(1).values
    assert 0.03 < chroma.mean() < 0.35
    spectrum = torch.fft.fft2(frames.mean(1) - frames.mean((1, 2, 3))[:, None, None]).abs().mean(0)
    radius = torch.fft.fftfreq(64)[:, None].hypot(torch.fft.fftfreq(64)[None])
    bands = [spectrum[(radius > low) & (radius <= 2 * low)].mean().log2() for low in (0.03, 0.06, 0.12, 0.24)]
    slopes = [float(b - a) for a, b in zip(bands, bands[1:], strict=False)]
    assert all(-2.2 < slope < -0.4 for slope in slopes), slopes


@pytest.fixture(scope="module")
def windows() -> Windows:
    return ProceduralWindows(seed=4, crop=32, pool=2, side=48, num_frames=2, speed=3.0, with_flow=True)


def test_windows_are_pure_functions_of_their_number(windows: Windows) -> None:
    other = ProceduralWindows(seed=4, crop=32, pool=2, side=48, num_frames=2, speed=3.0, with_flow=True)
    for number in (7, 3):
        for name, value in other[number].items():
            assert torch.equal(value, windows[number][name])
    assert not torch.equal(windows[3]["hr"], windows[7]["hr"])


def test_crops_of_lr_hr_and_flow_belong_together(windows: Windows) -> None:
    for number in range(8):  # flips among them
        window = windows[number]
        assert window["hr"].shape == (2, 3, 32, 32)
        assert window["lr"].shape == (2, 3, 8, 8)
        inside = (slice(None), slice(None), slice(2, -2), slice(2, -2))
        again = downscale((window["hr"] + 1) / 2) * 2 - 1
        assert (again - window["lr"])[inside].abs().max() < 0.1
        seen = window["valid"]
        moved = fetch(window["hr"][:1], window["flow"]) - window["hr"][1:]
        backwards = fetch(window["hr"][:1], -window["flow"]) - window["hr"][1:]
        assert moved.abs().mean(1)[seen].mean() < backwards.abs().mean(1)[seen].mean()


def write_clip(folder: Path, count: int, size: tuple[int, int], seed: int = 0) -> None:
    folder.mkdir(parents=True)
    for i in range(count):
        picture = np.random.default_rng((seed, i)).integers(0, 256, (*size, 3), dtype=np.uint8)
        iio.imwrite(folder / f"{i:08}.png", picture)


def test_folders_with_and_without_lr(tmp_path: Path) -> None:
    for name in ("000", "001", "002"):
        write_clip(tmp_path / "hr" / name, 4, (32, 40), seed=int(name))
        (tmp_path / "hr" / name / "._00000000.png").write_bytes(b"macOS keeps attributes here")
    windows = FolderWindows(0, 16, tmp_path, (), ("000",), 3)
    assert [high[0].parent.name for high, _ in windows.clips] == ["001", "002"]
    window = windows[5]
    assert window["hr"].shape == (3, 3, 16, 16)
    assert window["lr"].shape == (3, 3, 4, 4)
    assert torch.equal(window["hr"], windows[5]["hr"])
    for name in ("000", "001", "002"):
        write_clip(tmp_path / "lr" / name, 4, (8, 10))
    from_disk = FolderWindows(0, 16, tmp_path, (), ("000",), 3)[5]
    assert torch.equal(from_disk["hr"], window["hr"])
    assert not torch.equal(from_disk["lr"], window["lr"])
    assert len(FolderWindows(0, 16, tmp_path, ("000",), ("000",), 3).clips) == 1


def test_bad_folders_are_named(tmp_path: Path) -> None:
    def windows(*include: str, crop: int = 16) -> FolderWindows:
        return FolderWindows(0, crop, tmp_path, include, (), 3)

    with pytest.raises(UserError, match="has no folder hr"):
        windows()
    (tmp_path / "hr").mkdir()
    with pytest.raises(UserError, match="has no selected clip of at least 3 frames"):
        windows()
    write_clip(tmp_path / "hr/a", 4, (32, 40))
    with pytest.raises(UserError, match=r"has no clip b: check data\.include"):
        windows("b")
    with pytest.raises(UserError, match=r"is 40x32, expected sides of at least 64: lower data.crop"):
        windows(crop=64)[0]
    write_clip(tmp_path / "lr/a", 3, (8, 10))
    with pytest.raises(UserError, match=r"clip a has 4 frames in .* and 3 in"):
        windows()
    write_clip(tmp_path / "hr/c", 3, (32, 40))
    write_clip(tmp_path / "lr/c", 3, (9, 10))
    with pytest.raises(UserError, match=r"is 40x32, expected 40x36, four times the size of its LR frame"):
        windows("c")[0]
    (tmp_path / "hr/c/00000000.png").write_text("no picture")
    with pytest.raises(UserError, match=r"00000000.png cannot be read"):
        [windows("c")[i] for i in range(2)]


def test_procedural_windows_can_be_sent_to_other_processes() -> None:
    """As data workers are started on macOS and Windows."""
    windows = ProceduralWindows(seed=0, crop=16, pool=1, side=16, num_frames=1, speed=1.0, with_flow=False)
    sent = pickle.loads(pickle.dumps(windows))
    assert torch.equal(sent[3]["hr"], windows[3]["hr"])
