"""ComfyUI nodes, one a file. The folder ``host`` is the only one that names ``comfy``."""
