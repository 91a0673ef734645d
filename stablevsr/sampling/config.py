"""`SamplingConfig`: every option of a sampling run, defined once.

The Python functions take it, the command's options are made from its fields, a weights file carries the one that its
weights were made for, and an unfinished run is identified by it. Imports no torch, so that `--help` is fast.
"""

import dataclasses
import re
from collections.abc import Collection
from dataclasses import dataclass, field, replace
from typing import Any, Self

from stablevsr.config import ModelConfig, ScheduleConfig
from stablevsr.fields import require_types
from stablevsr.sampling.groups import FlowOptions, TemporalGuidance, option, require

MODES = ("bidirectional", "streaming")
SAMPLERS = ("ddpm", "ddim", "dpm++")
SPACINGS = ("leading", "trailing", "linspace")
COLOR_FIXES = ("none", "wavelet", "adain", "backprojection")  # "none" becomes None
DEFAULT_NOISE_LEVEL = 20
DISTILLED_STEPS = 4  # of the released streaming weights
# Share of the clean picture at the first timestep, sqrt(abar_t), above which a notice is due: sampling starts with none
MAX_SIGNAL = 0.05
FEW_STEPS = 10  # weights made for fewer are distilled: other steps are not what they learned
MIN_TILE = 16
SIZES = ("scale", "size", "height")  # the fields that say how large the result is; at most one of them
SIZE = re.compile(r"[0-9]{1,6}x[0-9]{1,6}")


def steps_within(num_steps: int, strength: float) -> int:
    """How many of the last steps of a schedule a strength leaves; rounded down, as in img2img of diffusers."""
    return min(int(num_steps * strength), num_steps)


@dataclass(frozen=True)
class SamplingConfig:
    """How a clip is sampled. The defaults are the published algorithm, plus scene cuts.

    Raises:
        OptionsError: for a field of the wrong type, a value out of range, and fields that exclude each other.
    """

    mode: str = option(
        "bidirectional",
        "bidirectional: each step over all frames (StableVSR); streaming: frame by frame, each guided by the previous "
        "output frame (Stream-DiffVSR)",
        choices=MODES,
    )
    steps: int = option(50, "denoising steps", metavar="N")
    strength: float = option(
        1.0,
        "how much may be invented: 1 starts from pure noise; less starts from the enlarged input with noise, and runs "
        "only that share of the steps",
    )
    spacing: str | None = option(
        None,
        "spacing of the timesteps; use trailing, which starts at the noisiest, for few steps (default: the weights')",
        choices=SPACINGS,
    )
    sampler: str = option("ddpm", "ddpm is the published one; the others are meant for fewer steps", choices=SAMPLERS)
    eta: float = option(0.0, "noise added by the ddim sampler: 0 is none, 1 as much as DDPM")
    seed: int = option(0, "seed of the noise, which is the same on every device")
    prompt: str | None = option(None, "text prompt that describes the clip (default: the empty prompt)")
    negative_prompt: str | None = option(None, "text prompt for what to avoid; needs cfg_scale above 1")
    cfg_scale: float = option(1.0, "classifier-free guidance scale; above 1 every step runs the networks twice")
    tcm_scale: float = option(1.0, "scale of the residuals that the TCM adds to the UNet")
    noise_level: int | None = option(
        None, f"noise added to the LR frames, for stock SD x4 weights only (default: {DEFAULT_NOISE_LEVEL})"
    )
    scene_cuts: str | tuple[int, ...] = option(
        "auto",
        "frames that start a new scene, which guidance does not cross; auto detects them",
        metavar="auto|off|I,J,...",
    )
    segments: int | None = option(
        None,
        "divide scenes into segments of at most N frames, whose first frames are guided by their neighbors' estimates "
        "of the step before (default: whole scenes)",
        metavar="N",
    )
    tile: str | int = option(
        "auto",
        "decode in overlapping tiles of N LR pixels to save memory; auto: only after running out of memory",
        metavar="auto|off|N",
    )
    color_fix: str | None = option(
        None,
        "match the result to the input: its colors, or by backprojection half of all that differs at the input's size",
        choices=COLOR_FIXES,
    )
    scale: float | None = option(
        None,
        "resize the result to F times the input's size, at most 16; above 4 the model runs twice (default: 4)",
        metavar="F",
    )
    size: str | None = option(
        None, "resize the result to W x H pixels; a video of another shape is still shown in its own", metavar="WxH"
    )
    height: int | None = option(None, "resize the result to H lines, in the input's shape", metavar="H")
    temporal: TemporalGuidance = field(default_factory=TemporalGuidance)
    flow: FlowOptions = field(default_factory=FlowOptions)

    def __post_init__(self) -> None:
        _make_plain(self)
        require_types(self)
        if isinstance(self.scene_cuts, tuple):
            object.__setattr__(self, "scene_cuts", tuple(sorted(self.scene_cuts)))
        require(self.steps >= 1, f"got steps {self.steps}, expected 1 or more")
        require(0 < self.strength <= 1, f"got strength {self.strength:g}, expected above 0 and at most 1")
        require(
            self.steps_taken >= 1,
            f"got strength {self.strength:g} with steps {self.steps}, which leaves no step: increase one of them",
        )
        for name, choices in (("mode", MODES), ("sampler", SAMPLERS)):
            value = getattr(self, name)
            require(value in choices, f"got {name} {value!r}, expected one of {', '.join(choices)}")
        require(
            self.spacing in (None, *SPACINGS), f"got spacing {self.spacing!r}, expected one of {', '.join(SPACINGS)}"
        )
        require(0 <= self.eta <= 1, f"got eta {self.eta}, expected 0 to 1")
        require(
            self.eta == 0 or self.sampler == "ddim",
            f"got eta {self.eta} with sampler {self.sampler}, which takes none: use sampler ddim, or omit eta",
        )
        require(0 <= self.seed < 2**64, f"got seed {self.seed}, expected 0 to 2^64 - 1")
        require(
            self.negative_prompt is None or self.cfg_scale > 1,
            f"got a negative_prompt with cfg_scale {self.cfg_scale:g}, where it has no effect: set cfg_scale above 1",
        )
        require(
            self.noise_level is None or self.noise_level >= 0, f"got noise_level {self.noise_level}, expected 0 or more"
        )
        cuts = self.scene_cuts
        require(
            cuts in ("auto", "off") or (isinstance(cuts, tuple) and all(cut > 0 for cut in cuts)),
            f"got scene_cuts {cuts!r}, expected auto, off or frame numbers above 0",
        )
        require(self.segments is None or self.segments >= 2, f"got segments {self.segments}, expected 2 or more")
        require(
            self.segments is None or self.mode != "streaming",
            f"got segments {self.segments} in mode streaming, where each frame needs the one before: omit it",
        )
        require(
            self.tile in ("auto", "off") or (isinstance(self.tile, int) and self.tile >= MIN_TILE),
            f"got tile {self.tile!r}, expected auto, off or a number of at least {MIN_TILE}",
        )
        require(
            self.color_fix in (None, *COLOR_FIXES),
            f"got color_fix {self.color_fix!r}, expected one of {', '.join(COLOR_FIXES)}",
        )
        self._check_size()

    def _check_size(self) -> None:
        given = [f"{name} {getattr(self, name)}" for name in SIZES if getattr(self, name) is not None]
        require(len(given) < 2, f"got {' and '.join(given)}, expected one of them")
        require(self.scale is None or self.scale > 0, f"got scale {self.scale}, expected a number above 0")
        require(self.height is None or self.height >= 1, f"got height {self.height}, expected 1 or more")
        require(
            self.size is None or (SIZE.fullmatch(self.size) is not None and min(self.size_in_pixels) > 0),
            f"got size {self.size!r}, expected WIDTHxHEIGHT in pixels, as in 1920x1080",
        )

    @property
    def size_in_pixels(self) -> tuple[int, int]:
        """`size` as (height, width)."""
        assert self.size is not None
        width, height = map(int, self.size.split("x"))
        return height, width

    def check(self, model: ModelConfig, num_frames: int | None = None) -> None:
        """Check the fields against the weights and, if it is known, the number of frames.

        Cheap enough to be called before any frame is read.

        Raises:
            OptionsError: naming the field, what these weights take, and what to do.
        """
        from stablevsr.sampling.schedule import timesteps  # imports torch

        if self.mode == "streaming":
            self._check_streaming(model)
        else:
            require(
                not model.is_streaming,
                "got mode bidirectional for streaming weights, which were trained on guidance from past frames only: "
                "use preset streaming, or StableVSR weights",
            )
        timesteps(self.schedule_for(model), self.steps, self.strength)
        for name in ("prompt", "negative_prompt"):
            require(
                not getattr(self, name) or model.text is not None,
                f"got the {name} {getattr(self, name)!r}, but these weights hold no text encoder: "
                "convert with --with-text",
            )
        require(
            not self.temporal.tiny or model.tiny is not None,
            "got temporal.tiny, but these weights hold no tiny decoder: convert with --tiny, or omit it",
        )
        if model.unet.encoder.num_noise_levels is None:
            require(
                self.noise_level is None,
                f"got noise_level {self.noise_level}, but these weights have no noise levels: omit it",
            )
        elif self.noise_level is not None:
            limit = model.max_noise_level
            require(
                self.noise_level <= limit,
                f"got noise_level {self.noise_level}, expected 0 to {limit} for these weights",
            )
        if num_frames is not None:
            require(num_frames > 0, "got no frames, expected at least 1")
            require(
                num_frames == 1 or model.flow is not None,
                "these weights hold no flow network, which a clip of several frames needs: convert with --flow",
            )
            for cut in self.scene_cuts if isinstance(self.scene_cuts, tuple) else ():
                require(cut < num_frames, f"got a scene cut at frame {cut}, but the clip has {num_frames} frames")

    def _check_streaming(self, model: ModelConfig) -> None:
        require(model.flow is not None, "these weights hold no flow network, which a stream needs: convert with --flow")
        require(
            model.unet.encoder.num_noise_levels is None,
            "these weights add noise to the LR frames (stock SD x4), which streaming does not support: "
            "use StableVSR or streaming weights",
        )
        require(
            not (model.is_streaming and isinstance(self.tile, int)),
            f"got tile {self.tile}, but streaming weights decode whole frames only: omit it",
        )

    def notices(self, model: ModelConfig, made_for: Self) -> list[str]:
        """Warnings about options that work with these weights, but may not do what is expected; a sentence each.

        Args:
            made_for: the weights' own config.
        """
        from stablevsr.sampling.schedule import alphas_cumprod, timesteps  # imports torch

        found = []
        if self.cfg_scale < 1.0:
            found.append(f"cfg_scale {self.cfg_scale:g} means no classifier-free guidance, which needs a scale above 1")
        first = timesteps(self.schedule_for(model), self.steps)[0]
        signal = alphas_cumprod(model.schedule)[first].item() ** 0.5
        if self.strength == 1 and signal > MAX_SIGNAL:
            found.append(
                f"{self.steps} steps start at timestep {first}, where {100 * signal:.0f}% of the picture should "
                "remain, but sampling starts from pure noise: use more steps, or spacing trailing"
            )
        learned, asked = made_for._steps_in_words(model), self._steps_in_words(model)
        if made_for.steps < FEW_STEPS and asked != learned:
            found.append(f"these weights were distilled for {learned}, their default, not for {asked}")
        if self.mode == "streaming":
            if not model.is_streaming:
                found.append("these weights were not trained for streaming, and flicker more than streaming weights")
            if replace(self.temporal, tiny=False) != TemporalGuidance():
                found.append("the temporal options have no effect in streaming, which is guided by output frames")
        return found

    def _steps_in_words(self, model: ModelConfig) -> str:
        """The steps that distilled weights depend on: "4 ddim steps with trailing spacing"."""
        noise = f", eta {self.eta:g}" if self.eta else ""
        steps = "step" if self.steps == 1 else "steps"
        return f"{self.steps} {self.sampler} {steps} with {self.schedule_for(model).timestep_spacing} spacing{noise}"

    @property
    def steps_taken(self) -> int:
        """The number of steps that are run: `steps`, or fewer with a `strength` below 1."""
        return steps_within(self.steps, self.strength)

    def schedule_for(self, model: ModelConfig) -> ScheduleConfig:
        """The weights' noise schedule, with this config's spacing if it is set."""
        return replace(model.schedule, timestep_spacing=self.spacing) if self.spacing else model.schedule

    def noise_level_for(self, model: ModelConfig) -> int | None:
        """The noise level of the LR frames, by default `DEFAULT_NOISE_LEVEL`; None for weights without noise levels."""
        if model.unet.encoder.num_noise_levels is None:
            return None
        return DEFAULT_NOISE_LEVEL if self.noise_level is None else self.noise_level

    def with_fields(self, fields: dict[str, Any]) -> Self:
        """A copy with these values; fields of a group are named with a dot, as in `temporal.every`.

        Raises:
            OptionsError: for a name that is not a field, and as the constructor does.
        """
        own: dict[str, Any] = {}
        groups: dict[str, dict[str, Any]] = {}
        for name, value in fields.items():
            group, dot, rest = name.partition(".")
            if dot:
                groups.setdefault(group, {})[rest] = value
            else:
                own[name] = value
        for group, values in groups.items():
            _check_names(self, [group])
            _check_names(getattr(self, group), list(values), f"{group}.")
            own[group] = replace(getattr(self, group), **values)
        _check_names(self, list(own))
        return replace(self, **own)

    def flat(self) -> dict[str, Any]:
        """Every field by name, those of groups with a dot; values are plain JSON types."""
        found: dict[str, Any] = {}
        for name, value in dataclasses.asdict(self).items():
            if isinstance(value, dict):
                found |= {f"{name}.{inner}": each for inner, each in value.items()}
            else:
                found[name] = list(value) if isinstance(value, tuple) else value
        return found


def resolve(config: SamplingConfig | None, default: SamplingConfig, fields: dict[str, Any]) -> SamplingConfig:
    """`config`, or `default` if it is None, with `fields` replaced by name.

    Raises:
        OptionsError: for a `config` of another type, and as `SamplingConfig.with_fields` does.
    """
    require(
        config is None or isinstance(config, SamplingConfig),
        f"got config {config!r}, expected a SamplingConfig: pass single options by name, as in steps=20",
    )
    return (config or default).with_fields(fields)


def _make_plain(config: SamplingConfig) -> None:
    """Turn numpy scalars into Python numbers, an empty prompt and color fix "none" into None, any collection of cuts
    into a tuple, and a size that is (width, height) into text."""

    def plain(value: Any) -> Any:
        return value.item() if type(value).__module__ == "numpy" and getattr(value, "ndim", 1) == 0 else value

    for name, value in vars(config).items():
        object.__setattr__(config, name, plain(value))
        if (name in ("prompt", "negative_prompt") and value == "") or (name == "color_fix" and value == "none"):
            object.__setattr__(config, name, None)
        elif name == "scene_cuts" and isinstance(value, Collection) and not isinstance(value, str):
            object.__setattr__(config, name, tuple(map(plain, value)))
        elif name == "size" and isinstance(value, tuple | list):
            object.__setattr__(config, name, "x".join(str(plain(side)) for side in value))


def _check_names(owner: Any, names: list[str], prefix: str = "") -> None:
    known = [each.name for each in dataclasses.fields(owner)] if dataclasses.is_dataclass(owner) else []
    unknown = [prefix + name for name in names if name not in known]
    require(
        not unknown,
        f"got {', '.join(unknown)}, which is not a sampling option: expected one of "
        f"{', '.join(prefix + name for name in known)}",
    )


STREAMING = SamplingConfig(mode="streaming", steps=DISTILLED_STEPS, spacing="trailing", sampler="ddim")
PRESETS = {
    "exact": SamplingConfig(scene_cuts="off"),  # StableVSR as published
    "balanced": SamplingConfig(steps=20),
    # Needs weights with a tiny decoder. The tiny decoder costs no quality; half the flow's size costs a little.
    "fast": SamplingConfig(steps=10, temporal=TemporalGuidance(tiny=True), flow=FlowOptions(half_size=True)),
    "streaming": replace(STREAMING, scene_cuts="off"),  # Stream-DiffVSR as published
}
