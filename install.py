"""Run by ComfyUI's manager and by the webui after the requirements: there is nothing left to do.

Kept so that it stays so: nothing here may install, move or import a host's own packages.
"""
