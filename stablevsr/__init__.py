"""StableVSR video super-resolution in pure PyTorch."""

from stablevsr.model import build_model
from stablevsr.sampling.video import sample_video

__version__ = "0.1.0"
__all__ = ["__version__", "build_model", "sample_video"]
