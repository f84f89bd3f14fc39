"""ComfyUI nodes, one a file. ``host.py`` is the only one that names ``comfy``; ``words.py`` names no host at all."""
