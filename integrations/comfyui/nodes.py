"""The nodes Load StableVSR, Upscale Video and Stream Upscale."""

import hashlib
import os
from collections.abc import Callable
from dataclasses import replace
from itertools import accumulate
from pathlib import Path
from typing import Any

import comfy.model_management as management
import comfy.utils
import folder_paths
import torch
from comfy_api.input_impl import VideoFromFile

from stablevsr import PRESETS, Progress, sample_video, upscale
from stablevsr.config import SCALE
from stablevsr.engine.fingerprint import hash_weights
from stablevsr.errors import InputError
from stablevsr.media import Encoding, open_reader
from stablevsr.sampling.config import COLOR_FIXES, DISTILLED_STEPS
from stablevsr.sampling.resizing import MAX_PASSES, output_size, passes_for

from .loading import BUNDLED, DTYPES, LoadedModel, load, to_frames, to_images, weights_names

CATEGORY = "video/StableVSR"
MODEL = "STABLEVSR_MODEL"
WEIGHTS_OWN = "as the weights recommend"
DEFAULT = "default"
CODECS = ("h264", "hevc", "av1")  # that an MP4 takes and ComfyUI can copy

STRENGTH = (
    "FLOAT",
    {"default": 1.0, "min": 0.05, "max": 1.0, "step": 0.05, "tooltip": "How much may be invented: 1 is all."},
)
SCALES = {"default": float(SCALE), "min": 0.25, "max": float(SCALE), "step": 0.25}
RESIZED = "The result is resized to this"
IN_BOTH: dict[str, Any] = {  # nodes that upscale
    "seed": (
        "INT",
        {"default": 0, "min": 0, "max": 2**64 - 1, "control_after_generate": True, "tooltip": "Seed of the noise."},
    ),
    "color_fix": (
        [DEFAULT, *COLOR_FIXES],
        {"default": DEFAULT, "tooltip": "Match the result to the input; default: as the preset or the weights do."},
    ),
    "scene_cuts": (
        "STRING",
        {
            "default": "auto",
            "tooltip": "Frames that start a new scene, which guidance does not cross: auto detects them, off has "
            "none, or numbers as in 48,120.",
        },
    ),
}
TILE = (
    "STRING",
    {"default": "auto", "tooltip": "Decode in tiles of so many LR pixels; auto: only after running out of memory."},
)


class LoadStableVSR:
    """Loads weights; ComfyUI keeps them until another choice is made."""

    CATEGORY = CATEGORY
    DESCRIPTION = "Load StableVSR or Stream-DiffVSR weights made by `stablevsr convert`, from models/stablevsr."
    RETURN_TYPES = (MODEL,)
    RETURN_NAMES = ("model",)
    FUNCTION = "load"

    @classmethod
    def INPUT_TYPES(cls) -> dict[str, Any]:
        return {
            "required": {
                "weights": (weights_names(), {"default": BUNDLED}),
                "dtype": (list(DTYPES), {"default": "auto", "tooltip": "auto: bf16 where the GPU has it, else fp32."}),
                "offload": (
                    "BOOLEAN",
                    {"default": False, "tooltip": "Keep one network at a time on the GPU: less memory, slower."},
                ),
            },
            "optional": {
                "file": (
                    "STRING",
                    {"default": "", "tooltip": "Another weights file, or hub:OWNER/NAME, in place of the above."},
                ),
            },
        }

    @torch.inference_mode(False)  # ComfyUI runs nodes in it, but the engine tells by a tensor's version if it changed
    def load(self, weights: str, dtype: str, offload: bool, file: str = "") -> tuple[LoadedModel]:
        return (load(file.strip() or weights, dtype, offload),)


class UpscaleVideo:
    """Upscales a batch of images as one clip, in memory."""

    CATEGORY = CATEGORY
    DESCRIPTION = "Upscale the frames of a clip four times, or to another size. For long clips see Stream Upscale."
    RETURN_TYPES = ("IMAGE",)
    FUNCTION = "upscale"

    @classmethod
    def INPUT_TYPES(cls) -> dict[str, Any]:
        return {
            "required": {
                "model": (MODEL,),
                "images": ("IMAGE",),
                "preset": ([WEIGHTS_OWN, *PRESETS], {"default": WEIGHTS_OWN}),
                "steps": ("INT", {"default": 0, "min": 0, "max": 1000, "tooltip": "Denoising steps; 0: the preset's."}),
                **IN_BOTH,
            },
            "optional": {
                "tcm_scale": (
                    "FLOAT",
                    {"default": 1.0, "min": 0.0, "max": 2.0, "step": 0.05, "tooltip": "Strength of temporal guidance."},
                ),
                "prompt": ("STRING", {"default": "", "multiline": True, "tooltip": "For weights with a text encoder."}),
                "negative_prompt": ("STRING", {"default": "", "multiline": True}),
                "cfg_scale": ("FLOAT", {"default": 1.0, "min": 1.0, "max": 20.0, "step": 0.5}),
                "tile": TILE,
                # New ones go last, because saved workflows give values by their position.
                "strength": STRENGTH,
                "scale": (
                    "FLOAT",
                    SCALES | {"max": float(SCALE**MAX_PASSES), "tooltip": f"{RESIZED}; above 4 the model runs twice."},
                ),
            },
        }

    @torch.inference_mode(False)
    def upscale(
        self, model: LoadedModel, images: torch.Tensor, preset: str, steps: int, **options: Any
    ) -> tuple[torch.Tensor]:
        config = PRESETS[preset] if preset != WEIGHTS_OWN else model.model.sampling
        fields = fields_of(options) | ({"steps": steps} if steps else {})
        config = config.with_fields(fields)
        n, height, width = images.shape[:3]
        config.check(model.model.config, n)  # before other models leave the GPU
        units = (
            {"stream": n}
            if config.mode == "streaming"
            else {"flow": n - 1, "denoise": n * config.steps_taken, "decode": n}
        )
        passes = passes_for(output_size(config, height, width, passes=MAX_PASSES), (height, width))
        largest = SCALE ** (passes - 1)
        with model.on_device(largest * height, largest * width) as ready:
            return (to_images(sample_video(ready, to_frames(images), config, progress=watching(units, passes))),)


class StreamUpscale:
    """Upscales a video file frame by frame into another: memory does not grow with its length."""

    CATEGORY = CATEGORY
    DESCRIPTION = (
        "Upscale a video four times, frame by frame, from file to file, with its sound. An interrupted run continues "
        "when it is queued again. Made for Stream-DiffVSR weights; with others the result flickers more."
    )
    RETURN_TYPES = ("VIDEO",)
    FUNCTION = "upscale"

    @classmethod
    def INPUT_TYPES(cls) -> dict[str, Any]:
        return {
            "required": {
                "model": (MODEL,),
                "video": ("VIDEO",),
                "steps": ("INT", {"default": DISTILLED_STEPS, "min": 1, "max": 1000}),
                **IN_BOTH,
                "codec": (list(CODECS), {"default": CODECS[0]}),
                "crf": ("INT", {"default": 12, "min": 0, "max": 51, "tooltip": "Quality of the file: 0 is best."}),
            },
            "optional": {"strength": STRENGTH, "scale": ("FLOAT", SCALES | {"tooltip": f"{RESIZED}."})},
        }

    @torch.inference_mode(False)
    def upscale(
        self, model: LoadedModel, video: Any, steps: int, codec: str, crf: int, **options: Any
    ) -> tuple[VideoFromFile]:
        own = model.model.sampling
        config = replace(PRESETS["streaming"], steps=steps, flow=own.flow, color_fix=own.color_fix)
        config = config.with_fields(fields_of(options))
        config.check(model.model.config)
        source = file_of(video)
        # Named by all that changes it, so that an interrupted run is found again.
        state = source.stat()
        same = (source.absolute(), state.st_mtime_ns, state.st_size, config, codec, crf)
        output = temporary(*same, hash_weights(model.model), model.model.dtype, ".mp4")
        with open_reader(source) as clip, model.on_device(clip.height, clip.width) as ready:
            units = {"stream": clip.frame_count or 1}
            encoding = Encoding(codec, crf)
            upscale(ready, clip, output, config, encoding=encoding, force=True, progress=watching(units))
        return (VideoFromFile(str(output)),)


def fields_of(options: dict[str, Any]) -> dict[str, Any]:
    """Widget values as fields of `SamplingConfig`: text such as "48,120" as numbers, empty text as the default."""
    fields = {name: value for name, value in options.items() if value not in ("", DEFAULT)}
    for name in ("scene_cuts", "tile"):
        text = str(fields.get(name, "")).replace(" ", "")
        if text and all(each.isdecimal() for each in text.split(",")):
            numbers = tuple(map(int, text.split(",")))
            fields[name] = numbers[0] if name == "tile" else numbers
    if options.get("scale") == SCALE:  # as the networks make it: nothing is resized
        del fields["scale"]
    return fields


def watching(units: dict[str, int], passes: int = 1) -> Callable[[Progress], None]:
    """A callback that moves ComfyUI's progress bar, and raises its exception when the user interrupts.

    Args:
        units: how many units of work each phase has, in order, in each pass of the model.
    """
    a_pass = sum(units.values())
    bar = comfy.utils.ProgressBar(passes * a_pass)
    before = dict(zip(units, accumulate(units.values(), initial=0), strict=False))

    def watch(now: Progress) -> None:
        bar.update_absolute((now.model_pass - 1) * a_pass + before.get(now.phase, 0) + now.done)
        management.throw_exception_if_processing_interrupted()

    return watch


def file_of(video: Any) -> Path:
    """The file of a video; of one that is made of images, trimmed or cropped, a new one in ComfyUI's temporary folder.

    Raises:
        InputError: when ComfyUI cannot write it.
    """
    if isinstance(video, VideoFromFile):
        source = video.get_stream_source()
        if isinstance(source, str | os.PathLike) and _is_all_of(video, VideoFromFile(str(source))):
            return Path(source)
    path = temporary(id(video), ".source.mp4")
    try:
        video.save_to(str(path))
    except Exception as error:
        raise InputError(f"ComfyUI could not write the video to {path} ({error}): give a video file") from error
    return path


def temporary(*key: object) -> Path:
    """A name in ComfyUI's temporary folder, which is emptied when it starts; the key's last part is the suffix."""
    folder = Path(folder_paths.get_temp_directory())
    folder.mkdir(parents=True, exist_ok=True)
    *same, suffix = map(str, key)
    return folder / f"stablevsr_{hashlib.sha256('|'.join(same).encode()).hexdigest()[:16]}{suffix}"


def _is_all_of(video: Any, file: Any) -> bool:
    """Whether a video shows all of its file: newer versions of ComfyUI can trim and crop it without a new file."""
    same_length = abs(video.get_duration() - file.get_duration()) < 1e-3
    return same_length and video.get_dimensions() == file.get_dimensions()


NODE_CLASS_MAPPINGS: dict[str, type] = {
    "LoadStableVSR": LoadStableVSR,
    "StableVSRUpscaleVideo": UpscaleVideo,
    "StableVSRStreamUpscale": StreamUpscale,
}
NODE_DISPLAY_NAME_MAPPINGS = {
    "LoadStableVSR": "Load StableVSR",
    "StableVSRUpscaleVideo": "Upscale Video (StableVSR)",
    "StableVSRStreamUpscale": "Stream Upscale (StableVSR)",
}
