"""One clip from a file or folder to another, by way of a workspace: it can be killed and gone on with."""

import time
from collections.abc import Callable, Collection, Iterator
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from stablevsr.atomic import restore
from stablevsr.config import SCALE
from stablevsr.errors import UserError
from stablevsr.jobs.fallback import Fallback
from stablevsr.jobs.fingerprint import fingerprint
from stablevsr.jobs.plan import Clock, Output, Plan
from stablevsr.jobs.stores import EstimatedFlows, StoredFlows, StoredFrames, StoredLatents
from stablevsr.jobs.workspace import Workspace, open_workspace
from stablevsr.media import Encoding, Frame, Reader, Writer, check_output, open_writer
from stablevsr.model import StableVSR
from stablevsr.sampling.bidirectional import START, OverflowWatch, SamplingState
from stablevsr.sampling.colour_fix import fix_colours
from stablevsr.sampling.cuts import changes, find_cuts
from stablevsr.sampling.flow import FlowSource
from stablevsr.sampling.guidance import PUBLISHED, Guidance
from stablevsr.sampling.noise import SeededNoise
from stablevsr.sampling.pictures import bicubic, normalise, to_uint8, to_uint16
from stablevsr.sampling.samplers import sampler_by_name
from stablevsr.sampling.tiles import PictureDecoder
from stablevsr.sampling.video import (
    DEFAULTS,
    OnProgress,
    check_options,
    decode_frame,
    flow_between,
    report,
    sampling_steps,
    seeded_noise,
)

Tell = Callable[[str], None]
SAVE_EVERY = 1.0  # seconds of work that a crash may cost


def upscale(
    model: StableVSR,
    clip: Reader,
    output: Path,
    *,
    seed: int = 0,
    steps: int = 50,
    scene_cuts: bool = True,
    guidance: Guidance = PUBLISHED,
    tile: int | str = "auto",
    color_fix: str | None = None,
    side_by_side: Path | None = None,
    encoding: Encoding | None = None,
    force: bool = False,
    restart: bool = False,
    keep_workspace: bool = False,
    weights: Callable[[], str] | None = None,
    progress: OnProgress | None = None,
    tell: Tell = lambda sentence: None,
    **options: object,
) -> int:
    """Upscale `clip` four times into `output`, which appears under its name only when it is whole.

    What is done so far lies in a folder beside the output; the same call goes on from there after a crash and ends
    with the same bits. Memory does not grow with the number of frames. All options are checked before a frame is read.

    Args:
        output: a video, an image (for one frame), or a folder; the name decides.
        steps, seed, guidance, tile, color_fix, progress, options: as in `sampling.video.sample_video`.
        scene_cuts: look for cuts, and fetch nothing across them; the published pipeline does not.
        side_by_side: a second output, with bicubic interpolation on the left and the result on the right.
        encoding: codec and quality of a video.
        force: replace an output that exists.
        restart: throw away an unfinished run instead of going on with it.
        keep_workspace: leave the workspace there at the end.
        weights: gives `jobs.fingerprint.hash_weights` of `model`, for callers that upscale several clips; None computes
            it.
        tell: called with sentences about the run.

    Returns:
        The number of frames written.

    Raises:
        UserError: for options that make no sense, input that cannot be read, output that cannot be written, an
            unfinished run of other settings, and a disk that is too small.
    """
    options = DEFAULTS | options | {"steps": steps, "guidance": guidance}
    check_options(model, clip.frame_count, seed=seed, tile=tile, color_fix=color_fix, **options)
    settings = {"seed": seed, "scene_cuts": scene_cuts, "tile": tile, "color_fix": color_fix, **options}
    for path in filter(None, (output, side_by_side)):
        restore(path)
        check_output(path, clip.path, force)
    decode = PictureDecoder(model, tile)
    with open_workspace(output, tell) as workspace:
        try:
            with ExitStack() as stack:
                # Opened first: what they refuse, they refuse before hours of work.
                writers = Writers.open(stack, workspace, clip, output, side_by_side, encoding, force)
                for notice in writers.result.notices:
                    tell(f"note: {notice}")
                workspace.begin(fingerprint(model, clip, settings, weights), restart)
                frames, cuts = take_in(workspace, clip, scene_cuts, progress)
                noise = seeded_noise(model, seed, clip.height, clip.width)
                fallback = Fallback(workspace, decode)
                bounds = writers.bounds
                latents = sample(
                    model, workspace, frames, cuts, noise, decode, fallback, progress, tell, options, bounds
                )
                for i, frame in enumerate(clip):
                    fallback.before(steps * len(frames) + i)
                    picture = decode_frame(decode, latents[i])[None]
                    fallback.after(steps * len(frames) + i)
                    picture = fix_colours(picture, frames[i][None] / 2 + 0.5, color_fix)
                    writers.write(picture, frames[i], frame)
                    report(progress, "decode", i + 1, len(frames))
        except BaseException as error:
            # Nothing is worth keeping of a run that was refused, or that has not even read its input.
            refused = isinstance(error, UserError) and not workspace.has_state()
            if workspace.is_ours and (refused or workspace.noted("clip") is None):
                workspace.remove()
            raise
        if not keep_workspace:
            workspace.remove()
        return len(frames)


@dataclass(frozen=True)
class Writers:
    """The outputs of a run, open."""

    result: Writer
    pair: Writer | None  # bicubic interpolation beside the result
    bounds: list[Output]  # what they can need of the disk

    @classmethod
    def open(
        cls,
        stack: ExitStack,
        workspace: Workspace,
        clip: Reader,
        output: Path,
        side_by_side: Path | None,
        encoding: Encoding | None,
        force: bool,
    ) -> "Writers":
        """Open them on `stack`; the last one opened, the result, is the first that is put in place."""

        def open_one(path: Path, part: Path, width: int) -> Writer:
            size = {"height": SCALE * clip.height, "width": width}
            writer = stack.enter_context(open_writer(path, clip, force=force, part=part, encoding=encoding, **size))
            bounds.append(Output.of(writer, clip, encoding, size["height"] * width, part.parent))
            return writer

        bounds, pair = [], None
        if side_by_side:  # not in the workspace: its name may be on another disk
            pair = open_one(side_by_side, workspace.outside(side_by_side), 2 * SCALE * clip.width)
        return cls(open_one(output, workspace.folder / "output", SCALE * clip.width), pair, bounds)

    def write(self, picture: Tensor, low_res: Tensor, frame: Frame) -> None:
        """Append the result `picture`, (1, 3, 4h, 4w) in [0, 1], for `low_res`, (3, h, w) in [-1, 1]."""
        self.result.write(quantise(with_alpha(picture, frame, self.result), self.result), frame)
        if self.pair:
            self.pair.write(quantise(torch.cat([enlarged(low_res[None]), picture], dim=-1), self.pair), frame)


def take_in(
    workspace: Workspace, clip: Reader, scene_cuts: bool, progress: OnProgress | None
) -> tuple[StoredFrames, list[int]]:
    """Copy the frames of a clip to the workspace, once; returns them, and the frames that begin a new scene."""
    dtype = torch.uint16 if clip.is_deep else torch.uint8
    array = workspace.arrays("frames", (clip.height, clip.width, 3), dtype)
    known = workspace.noted("clip")
    if known is None:
        count = 0

        def copied() -> Iterator[np.ndarray]:
            nonlocal count
            for frame in clip:
                array.write(count, torch.from_numpy(frame.image))
                count += 1
                report(progress, "read", count, max(count, clip.frame_count or 0))
                yield frame.image

        found = changes(copied())
        if not count:
            raise UserError(f"{clip.path} holds no frame")
        known = {"frames": count, "cuts": find_cuts(found) if scene_cuts else []}
        array.sync()
        workspace.note("clip", known)
    return StoredFrames(array, known["frames"]), known["cuts"]


def sample(
    model: StableVSR,
    workspace: Workspace,
    frames: StoredFrames,
    cuts: Collection[int],
    noise: SeededNoise,
    decode: PictureDecoder,
    fallback: Fallback,
    progress: OnProgress | None,
    tell: Tell,
    options: dict[str, object],
    outputs: list[Output],
) -> StoredLatents:
    """Flows and all frame-steps, from where the workspace stands; returns the final latents."""
    n, (_, height, width) = len(frames), frames[0].shape
    steps, half_flow = options["steps"], options["guidance"].half_flow
    phase, done, x0 = workspace.state(model.device)
    if done or phase == "denoise":
        tell(f"going on: {done} of {n - 1 if phase == 'flow' else n * steps} in phase {phase} are done")
    elif cuts:
        tell(f"{len(cuts)} scene cuts found, at frames {', '.join(str(cut) for cut in cuts)}")
    shape = (model.config.vae.latent_channels, height, width)
    keeps_x0 = sampler_by_name(options["sampler"], options["eta"]).keeps_x0
    plan = Plan.make(workspace, n, shape, keeps_x0, phase == "flow" and done == 0, outputs)
    state = SamplingState(done, x0) if phase == "denoise" else START

    def stored(name: str) -> StoredLatents:
        return StoredLatents(workspace.arrays(name, shape), n, noise, model.device, state.done)

    latents, estimates = stored("latents"), stored("estimates") if keeps_x0 else None
    flow_array = workspace.arrays("flows", (2, 2, SCALE * height, SCALE * width)) if plan.keeps_flows else None
    flows: FlowSource = StoredFlows(flow_array) if flow_array else EstimatedFlows(model, frames, half_flow)
    frame_steps = sampling_steps(model, frames, flows, noise, latents, state, decode, estimates, cuts=cuts, **options)
    tell(plan.sentence(steps))
    saved = time.monotonic()

    def save(phase: str, done: int, x0: Tensor | None, now: bool) -> None:
        nonlocal saved
        if now or time.monotonic() - saved > SAVE_EVERY:
            workspace.sync()  # first what is done, then the word that it is
            workspace.save_state(phase, done, x0)
            saved = time.monotonic()

    if phase == "flow":
        for i in range(done, n - 1 if flow_array else 0):
            if i + 1 not in cuts:
                pair = [flow_between(model, frames, *way, half_flow) for way in ((i + 1, i), (i, i + 1))]
                flow_array.write(i, torch.cat(pair))
            save("flow", i + 1, None, now=False)
            report(progress, "flow", i + 1, n - 1)
        save("denoise", 0, None, now=True)
    clock, watch = Clock(n * steps - state.done), OverflowWatch(n)
    fallback.before(state.done)
    for i, result in enumerate(frame_steps, start=state.done + 1):
        watch.check(i, result)
        fallback.after(i - 1)
        # At the end of a pass always: the next one overwrites what this one started from.
        save("denoise", i, result.x0, now=i % n == 0)
        report(progress, "denoise", i, n * steps)
        if sentence := clock.after_a_step():
            tell(sentence)
        fallback.before(i)
    return latents


def quantise(picture: Tensor, writer: Writer) -> np.ndarray:
    """(1, c, h, w) in [0, 1] to (h, w, c), in the depth that a writer takes."""
    return (to_uint16 if writer.is_deep else to_uint8)(picture)[0].numpy()


def enlarged(low_res: Tensor) -> Tensor:
    """(1, c, h, w) in [-1, 1] to (1, c, 4h, 4w) in [0, 1], by bicubic interpolation."""
    return (bicubic(low_res) / 2 + 0.5).clamp(0, 1)


def with_alpha(picture: Tensor, frame: Frame, writer: Writer) -> Tensor:
    """`picture` (1, 3, 4h, 4w) with the alpha of its frame as a fourth channel, where there is one and it is taken."""
    if frame.alpha is None or not writer.takes_alpha:
        return picture
    alpha = torch.from_numpy(frame.alpha)[None, ..., None]
    return torch.cat([picture, enlarged(normalise(alpha))], dim=1)
