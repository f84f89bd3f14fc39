"""Run by a ComfyUI's own Python in its folder: `python importing.py <pack>`.

Processor seconds that loading a pack takes when the host has loaded its own, and the modules that came with it, as
one JSON object in the last line.
"""
# ruff: noqa: E402, F401, I001 - the host's own order

import asyncio
import gc
import json
import os
import sys
import time

pack = sys.argv[1]
sys.path.insert(0, os.getcwd())
sys.argv = ["main.py", "--cpu", "--disable-api-nodes"]

import comfy.options

comfy.options.enable_args_parsing()

import utils.extra_config  # before `nodes` puts another `utils` on the path

import nodes
import server


async def measured():
    server.PromptServer(asyncio.get_running_loop())
    await nodes.init_builtin_extra_nodes()
    known = set(sys.modules)
    gc.collect()
    gc.disable()  # a collection of the host's own heap would be counted in
    start = time.process_time()
    loaded = await nodes.load_custom_node(pack)
    seconds = time.process_time() - start
    return {"loaded": loaded, "seconds": seconds, "modules": sorted(set(sys.modules) - known)}


print(json.dumps(asyncio.run(measured())))
