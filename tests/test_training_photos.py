"""Clips made from photographs: their motion, flow and occlusion, and the degradations of their LR frames."""

import pickle
import subprocess
import sys
from pathlib import Path

import imageio.v3 as iio
import numpy as np
import pytest
import torch
import torch.nn.functional as F

from stablevsr.errors import UserError
from stablevsr.nn.warp import warp
from stablevsr.training import degradations, photos
from stablevsr.training.data import MixedWindows, ProceduralWindows, Window, downscale
from stablevsr.training.folders import FolderWindows
from stablevsr.training.photos import STILL, PhotoClips, PhotoWindows, Plane, project
from stablevsr.training.procedural import SUPERSAMPLING, pixel_centres


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two pictures with structure on all scales, one wide and one high."""
    root = tmp_path_factory.mktemp("photographs")
    for name, size in (("one", (150, 260)), ("two", (240, 160))):
        random = np.random.default_rng(len(name) + size[0])
        picture = torch.zeros(1, 3, *size)
        for cell in (4, 8, 32):
            coarse = torch.from_numpy(random.random((1, 3, size[0] // cell + 2, size[1] // cell + 2))).float()
            picture += F.interpolate(coarse, size=size, mode="bicubic") / 3
        iio.imwrite(root / f"{name}.png", (picture[0].clamp(0, 1) * 255).byte().permute(1, 2, 0).numpy())
    return root


def open_photos(
    folder: Path, num_frames: int = 3, degraded: float = 0.0, seed: int = 0, **more: object
) -> PhotoWindows:
    return PhotoWindows(seed, 48, 40, PhotoClips(num_frames, 64, 2.0, num_frames > 1, degraded), folder, **more)


def assert_same(a: Window, b: Window) -> None:
    assert a.keys() == b.keys()
    assert all(torch.equal(a[name], b[name]) for name in a)


def test_windows_are_a_function_of_seed_and_number(folder: Path) -> None:
    windows, again = open_photos(folder, degraded=0.5), open_photos(folder, degraded=0.5)
    later = windows[7]
    for number in (3, 7):  # in another order, and with other photographs decoded before
        assert_same(windows[number], again[number])
    assert_same(pickle.loads(pickle.dumps(windows))[7], later)
    assert not torch.equal(windows[3]["hr"], later["hr"])
    assert not torch.equal(open_photos(folder, seed=1)[7]["hr"], later["hr"])


def test_shapes_and_ranges(folder: Path) -> None:
    window = open_photos(folder)[0]
    assert window["hr"].shape == (3, 3, 48, 48)
    assert window["lr"].shape == (3, 3, 12, 12)
    assert window["flow"].shape == (2, 2, 48, 48)
    assert window["valid"].shape == (2, 48, 48)
    assert window["hr"].min() >= -1
    assert window["hr"].max() <= 1
    assert window["hr"].std() > 0.1
    assert set(open_photos(folder, num_frames=1)[0]) == {"hr", "lr"}


def test_the_flow_fetches_the_frame_before(folder: Path) -> None:
    windows = open_photos(folder)
    right, wrong, still, occluded = [], [], [], []
    for number in range(16):
        window = windows[number]
        source, target, valid = window["hr"][:2], window["hr"][1:], window["valid"]
        right.append((warp(source, window["flow"]) - target).abs().mean(1)[valid].mean())
        wrong.append((warp(source, -window["flow"]) - target).abs().mean(1)[valid].mean())
        still.append((source - target).abs().mean(1)[valid].mean())
        occluded.append((~valid).float().mean())
    assert torch.stack(right).mean() < 0.35 * torch.stack(still).mean()
    assert torch.stack(right).mean() < 0.25 * torch.stack(wrong).mean()
    assert 0.005 < torch.stack(occluded).mean() < 0.4


def test_planes_turn_out_of_the_picture() -> None:
    """A tilted plane shrinks with distance from one side to the other, and its points find their way back."""
    plane = Plane(STILL, STILL, np.array([1e-3, 0.0]), np.zeros(2), None, np.eye(2))
    points = np.array([[-30.0, 5.0], [0.0, 5.0], [30.0, 5.0]])
    there = project(plane.matrix(4), points)
    left, right = np.diff(there[:, 0])
    assert right < 0.9 * left
    assert np.allclose(plane.on_plane(there, 4), points)


def test_lr_frames_of_degraded_windows_differ_mildly(folder: Path) -> None:
    degraded = open_photos(folder, degraded=1.0)
    differ = 0
    for number in range(6):
        window = degraded[number]
        difference = (window["lr"] / 2 - downscale(window["hr"] / 2 + 0.5) + 0.5).abs().mean()
        assert difference < 0.08  # mild
        differ += bool(difference > 0.002)
    assert differ >= 4


def test_degraded_clips_begin_before_their_window(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Most frames of a compressed video are predicted from earlier ones, so single ones are not like it."""
    lengths, changes = [], []

    def degrade(frames: torch.Tensor, random: np.random.Generator) -> torch.Tensor:
        lengths.append(len(frames))
        changes.append(frames.diff(dim=0).abs().mean((1, 2, 3)))
        return downscale(frames)

    monkeypatch.setattr(photos, "degrade", degrade)
    for num_frames in (1, 3):
        lengths.clear()
        windows = open_photos(folder, num_frames, degraded=1.0)
        for index in range(12):
            clip = windows.render(index)
            assert len(clip["hr"]) == len(clip["lr"]) == num_frames
            assert (downscale(clip["hr"] / 255) - clip["lr"] / 255).abs().max() < 0.01
            assert num_frames == 1 or len(clip["flow"]) == 2
        assert set(lengths) == set(range(num_frames, num_frames + photos.LEAD))
    for change in changes:  # the motion goes on from before the window into it
        assert change.numel() < 2 or change.max() < 3 * change.min()


def test_strong_reductions_do_not_alias(tmp_path: Path) -> None:
    noise = np.random.default_rng(0).integers(0, 256, (700, 700, 3), np.uint8)
    iio.imwrite(tmp_path / "noise.png", noise)
    windows = open_photos(tmp_path)
    points = pixel_centres(64, 64, SUPERSAMPLING)
    (colors,) = windows._colors(0, [points], 8.0 * np.eye(2), np.random.default_rng(0))
    reduced = F.avg_pool2d(colors, SUPERSAMPLING)
    assert reduced.shape == (3, 64, 64)
    assert reduced.std() < 1.5 * (noise / 255).std() / 8  # of the mean of 8x8 pixels: an eighth


def test_places_with_detail_are_preferred(tmp_path: Path) -> None:
    """Otherwise most clips of a landscape show its sky."""
    picture = np.full((400, 1600, 3), 100, np.uint8)
    picture[:, 1200:] = np.random.default_rng(0).integers(0, 256, (400, 400, 3), np.uint8)
    iio.imwrite(tmp_path / "landscape.png", picture)
    windows = open_photos(tmp_path)
    points = pixel_centres(64, 64, SUPERSAMPLING)
    random = np.random.default_rng(0)
    found = [bool(windows._colors(0, [points], 2.0 * np.eye(2), random)[0].std() > 0.1) for _ in range(200)]
    assert 0.4 < np.mean(found) < 0.65  # of 30% of all places, 1 - 0.7^2 = 51% of those chosen from two


def test_a_share_of_the_windows_is_procedural(folder: Path) -> None:
    moving = open_photos(folder, num_frames=1)
    procedural = ProceduralWindows(0, 48, 3, 64, 1, 2.0, False)
    mixed = MixedWindows(moving, procedural, 0.3)
    for number in range(30):
        mixed[number]
    assert len(procedural.rendered) == 3
    assert 10 < len(moving.rendered) < 30


def test_bad_folders_are_named(folder: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"nowhere does not exist, expected a folder of photographs"):
        open_photos(tmp_path / "nowhere")
    with pytest.raises(UserError, match=r"has no selected photograph, expected .png"):
        open_photos(folder, exclude=("one", "two"))
    with pytest.raises(UserError, match=r"has no photograph three: check data.include"):
        open_photos(folder, include=("three",))
    for name in ("one.png", "one.jpg", "._one.png"):
        (tmp_path / "two").mkdir(exist_ok=True)
        (tmp_path / "two" / name).touch()
    with pytest.raises(UserError, match=r"two has one.jpg and one.png: rename one of them"):
        open_photos(tmp_path / "two")
    iio.imwrite(tmp_path / "small.png", np.zeros((40, 200, 3), np.uint8))
    with pytest.raises(UserError, match=r"small.png is 200x40, expected sides of at least 74: use larger ones"):
        open_photos(tmp_path)[0]
    (tmp_path / "small.png").write_text("no picture")
    with pytest.raises(UserError, match=r"photograph .*small.png cannot be read"):
        open_photos(tmp_path)[0]


def test_degradations_are_a_function_of_the_random_state() -> None:
    frames = torch.rand(2, 3, 40, 56, generator=torch.Generator().manual_seed(0))
    found = [degradations.degrade(frames, np.random.default_rng(seed)) for seed in range(12)]
    for seed, result in enumerate(found):
        assert result.shape == (2, 3, 10, 14)
        assert result.min() >= 0
        assert result.max() <= 1
        assert torch.equal(result, degradations.degrade(frames, np.random.default_rng(seed)))
    assert all((a - b).abs().max() > 0.004 for a, b in zip(found, found[1:], strict=False))


def test_compression_loses_more_the_stronger_it_is() -> None:
    picture = torch.rand(1, 3, 9, 13, generator=torch.Generator().manual_seed(0))
    smooth = F.interpolate(picture, size=(37, 51), mode="bicubic").clamp(0, 1)
    pictures = (smooth * 255).byte().permute(0, 2, 3, 1).numpy()  # of odd sides
    for through, levels in ((degradations.through_jpeg, (95, 30)), (degradations.through_h264, (18, 40))):
        errors = [np.abs(through(pictures, level).astype(float) - pictures).mean() for level in levels]
        assert 0 < errors[0] < errors[1] < 40


def test_h264_gives_the_same_bits_every_time() -> None:
    """Training is a function of its seed: x264 alone is not, on some processors."""
    pictures = np.random.default_rng(0).integers(0, 256, (4, 96, 96, 3), dtype=np.uint8)
    assert len({degradations.through_h264(pictures, 24).tobytes() for _ in range(12)}) == 1


def test_blur_keeps_the_mean_and_lowers_contrast() -> None:
    picture = torch.rand(1, 3, 64, 64, generator=torch.Generator().manual_seed(0))
    blurred = degradations.gaussian_blur(picture, 1.0)
    assert blurred.mean().item() == pytest.approx(picture.mean().item(), abs=0.01)
    assert blurred.std() < 0.4 * picture.std()
    assert downscale(blurred).shape == (1, 3, 16, 16)


def test_tiles_are_cut_from_two_sizes_and_plain_ones_left_out(tmp_path: Path) -> None:
    """As recipes/small/9-unet.toml takes them."""
    picture = np.full((1100, 1100, 3), 200, np.uint8)
    picture[:512] = np.random.default_rng(0).integers(0, 256, (512, 1100, 3), np.uint8)
    iio.imwrite(tmp_path / "photograph.png", picture)
    script = Path(__file__).parents[1] / "recipes/photo_tiles.py"
    command = [sys.executable, str(script), str(tmp_path / "tiles"), str(tmp_path / "photograph.png")]
    told = subprocess.run(command, check=True, capture_output=True, text=True).stdout
    assert told == f"3 tiles in {tmp_path / 'tiles'}\n"  # the upper two of four, and the one of the smaller size
    windows = FolderWindows(0, 96, tmp_path / "tiles", (), (), 1)
    assert windows[0]["hr"].shape == (1, 3, 96, 96)
    (tmp_path / "photograph.png").write_text("no picture")
    failed = subprocess.run(command, capture_output=True, text=True)
    assert failed.returncode == 2
    assert "expected an image file" in failed.stderr
    assert "Traceback" not in failed.stderr
