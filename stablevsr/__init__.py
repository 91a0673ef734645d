"""StableVSR video super-resolution in pure PyTorch."""

import importlib
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from stablevsr.engine.memory import sample_video
    from stablevsr.engine.progress import Progress, Stopped
    from stablevsr.engine.stream import stream_video
    from stablevsr.engine.upscale import upscale
    from stablevsr.errors import IncompleteOutput, InputError, OptionsError, ResourceError, UserError, WeightsError
    from stablevsr.model import build_model
    from stablevsr.sampling.config import PRESETS, FlowOptions, SamplingConfig, TemporalGuidance

__version__ = "0.1.0"

# Imported on first use: `import stablevsr` and the command's --help need no PyTorch.
_PLACES = {
    "build_model": "model",
    "sample_video": "engine.memory",
    "stream_video": "engine.stream",
    "upscale": "engine.upscale",
    "SamplingConfig": "sampling.config",
    "TemporalGuidance": "sampling.config",
    "FlowOptions": "sampling.config",
    "PRESETS": "sampling.config",
    "Progress": "engine.progress",
    "Stopped": "engine.progress",
    "UserError": "errors",
    "InputError": "errors",
    "OptionsError": "errors",
    "WeightsError": "errors",
    "ResourceError": "errors",
    "IncompleteOutput": "errors",
}
__all__ = [
    "PRESETS",
    "FlowOptions",
    "IncompleteOutput",
    "InputError",
    "OptionsError",
    "Progress",
    "ResourceError",
    "SamplingConfig",
    "Stopped",
    "TemporalGuidance",
    "UserError",
    "WeightsError",
    "__version__",
    "build_model",
    "sample_video",
    "stream_video",
    "upscale",
]


def __getattr__(name: str) -> object:
    if name not in _PLACES:
        raise AttributeError(f"module 'stablevsr' has no attribute {name!r}")
    value = getattr(importlib.import_module(f"stablevsr.{_PLACES[name]}"), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *_PLACES})
