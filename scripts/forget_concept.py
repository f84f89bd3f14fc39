"""The webui's door to this extension: the package under a name of its own, whatever the folder and the neighbours.

Other extensions have a ``core`` too, and the webui imports all of them into one process. The root's ``__init__.py``,
ComfyUI's door, is not run.
"""

import hashlib
import importlib
import sys
import types
from pathlib import Path

_root = Path(__file__).absolute().parents[1]
_name = "forget_concept_" + hashlib.sha256(str(_root).encode()).hexdigest()[:12]
if _name not in sys.modules:
    sys.modules[_name] = types.ModuleType(_name)
    sys.modules[_name].__path__ = [str(_root)]

ForgetConcept = importlib.import_module(f"{_name}.sd_webui_ext").register()
