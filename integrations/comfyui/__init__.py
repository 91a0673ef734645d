"""StableVSR for ComfyUI. Copy or link this folder into ComfyUI's custom_nodes."""

import importlib.util

if importlib.util.find_spec("stablevsr") is None:
    raise ImportError("the StableVSR nodes need the package stablevsr in ComfyUI's Python: pip install stablevsr")

from .nodes import NODE_CLASS_MAPPINGS, NODE_DISPLAY_NAME_MAPPINGS

__all__ = ["NODE_CLASS_MAPPINGS", "NODE_DISPLAY_NAME_MAPPINGS"]
