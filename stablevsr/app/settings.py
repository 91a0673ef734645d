"""The options of a run on the page."""

import re
from dataclasses import dataclass
from typing import Any

import gradio as gr

from stablevsr.app.studio import FORMATS, WEIGHTS_OWN, Studio
from stablevsr.errors import OptionsError
from stablevsr.sampling.config import COLOR_FIXES, SamplingConfig

MAX_SEED = 2**32 - 1  # numbers in a browser are exact up to 2^53
MAX_STEPS = 1000
PRESET_NAMES = {
    WEIGHTS_OWN: "Recommended for these weights",
    "exact": "Exact, as published",
    "balanced": "Balanced",
    "fast": "Fast",
    "streaming": "Streaming",
}
FOURFOLD = "4×"
SIZES = [FOURFOLD, "3×", "2×", "8×", "2160 lines", "1080 lines", "720 lines"]  # others can be typed, as 1280x720


@dataclass(frozen=True)
class Settings:
    """The options of a run."""

    preset: gr.Radio
    steps: gr.Number
    seed: gr.Number
    strength: gr.Slider
    size: gr.Dropdown
    color: gr.Dropdown
    format: gr.Dropdown

    def sampling(self) -> list[Any]:
        """The arguments of `options_of`."""
        return [self.preset, self.steps, self.seed, self.strength, self.size, self.color]


def settings_of(studio: Studio) -> Settings:
    """The options of a run."""
    presets = studio.presets()
    own = presets[WEIGHTS_OWN]
    choices = [(f"{PRESET_NAMES.get(name, name)}: {config.steps} steps", name) for name, config in presets.items()]
    preset = gr.Radio(choices, value=WEIGHTS_OWN, label="Preset", elem_id="preset")
    with gr.Row():
        limits = {"precision": 0, "min_width": 120}
        steps = gr.Number(own.steps, label="Steps", minimum=1, maximum=MAX_STEPS, elem_id="steps", **limits)
        seed = gr.Number(own.seed, label="Seed", minimum=0, maximum=MAX_SEED, elem_id="seed", **limits)
    strength = gr.Slider(0.05, 1, value=1, step=0.05, label="Strength: 1 invents most", elem_id="strength")
    with gr.Row():
        size = gr.Dropdown(
            SIZES,
            value=SIZES[0],
            label="Size",
            allow_custom_value=True,
            min_width=140,
            elem_id="size",
        )
        color = gr.Dropdown(list(COLOR_FIXES), value=own.color_fix or "none", label="Color match", min_width=140)
        format = gr.Dropdown(list(FORMATS), value=next(iter(FORMATS)), label="Format", min_width=140)

    def follow(name: str) -> tuple[int, str]:
        return presets[name].steps, presets[name].color_fix or "none"

    preset.change(follow, preset, [steps, color], show_progress="hidden", api_visibility="private")
    return Settings(preset, steps, seed, strength, size, color, format)


def options_of(
    studio: Studio, preset: str, steps: float | None, seed: float | None, strength: float, size: str, color: str
) -> SamplingConfig:
    """The options that the page shows.

    Raises:
        OptionsError: for values out of range.
    """
    fields: dict[str, Any] = {"color_fix": color, "strength": strength} | size_fields(size)
    if steps is not None:  # emptied fields are the preset's
        fields["steps"] = int(steps)
    if seed is not None:
        fields["seed"] = int(seed)
    return studio.config(preset, fields)


def size_fields(text: str) -> dict[str, Any]:
    """The field of `SamplingConfig` for a size such as "2×", "1080 lines" or "1280x720"; none for four times.

    Raises:
        OptionsError: for another text.
    """
    plain = text.lower().replace("×", "x").replace("lines", "").replace("p", "").replace(" ", "")
    if plain in ("", "4", "4x"):
        return {}
    if re.fullmatch(r"\d+x\d+", plain):
        return {"size": plain}
    if re.fullmatch(r"\d+(\.\d+)?x", plain):
        return {"scale": float(plain[:-1])}
    if plain.isdecimal():
        return {"height": int(plain)}
    raise OptionsError(f"got the size {text!r}, expected one such as 2×, 1080 lines or 1280x720")
