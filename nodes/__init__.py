"""ComfyUI nodes, one per file. Only the subpackage ``host`` imports ``comfy``."""
