"""The webui's entry point: imports the package under a unique name, independent of the folder's name.

The webui imports all extensions into one process, and others have a package ``core`` too. The root's ``__init__.py``,
which is ComfyUI's entry point, is not run.
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
