"""Run by ComfyUI's manager and by the webui after the requirements are installed. It does nothing.

The file is kept on purpose: installation must never install, upgrade or import packages of the host.
"""
