"""StableVSR video super-resolution in pure PyTorch."""

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from stablevsr.model import build_model
    from stablevsr.sampling.video import sample_video

__version__ = "0.1.0"
__all__ = ["__version__", "build_model", "sample_video"]


def __getattr__(name: str) -> object:
    # Only when asked for: they import PyTorch, and the command wants to be able to say something before.
    if name == "build_model":
        from stablevsr.model import build_model

        return build_model
    if name == "sample_video":
        from stablevsr.sampling.video import sample_video

        return sample_video
    raise AttributeError(f"module 'stablevsr' has no attribute {name!r}")
