"""The wheel equals the tree, on every supported Python, and requires almost nothing of a host."""

from __future__ import annotations

import ast
import importlib.metadata
import os
import re
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

if sys.version_info >= (3, 11):
    import tomllib
else:  # pytest brings it there
    import tomli as tomllib

ROOT = Path(__file__).resolve().parent.parent
# folders of the package; what else stands at the root (tests, benchmarks, ...) is not installed
FOLDERS = ("core", "nodes", "sd_webui_ext", "example_workflows", "locales", "subgraphs", "web")
NOT_OURS = {"__pycache__", ".venv", "build", "dist", ".git"}


def tree() -> list[str]:
    """Every file of the repository but ignored ones, relative to the root."""
    try:
        listed = subprocess.run(
            ["git", "ls-files", "-co", "--exclude-standard", "-z"], cwd=ROOT, capture_output=True, check=True
        ).stdout.decode()
        names = [name for name in listed.split("\0") if name]
    except (OSError, subprocess.CalledProcessError):  # no git: an unpacked archive
        files = (path.relative_to(ROOT) for path in ROOT.rglob("*") if path.is_file())
        names = [f.as_posix() for f in files if not NOT_OURS & set(f.parts) and f.suffix != ".pyc"]
    return sorted(name for name in set(names) if (ROOT / name).is_file())


def packaged(name: str) -> bool:
    path = Path(name)
    return path.parts[0] in FOLDERS if len(path.parts) > 1 else path.suffix == ".py" or name == "py.typed"


@pytest.fixture(scope="module")
def settings():
    return tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))


@pytest.fixture(scope="module")
def wheel(tmp_path_factory):
    """The wheel, built of a clean copy: the tree itself may hold what an earlier build left."""
    folder = tmp_path_factory.mktemp("wheel")
    for name in tree():
        target = folder / "tree" / name
        target.parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(ROOT / name, target)
    code = f"from setuptools.build_meta import build_wheel; build_wheel({str(folder)!r})"
    built = subprocess.run([sys.executable, "-c", code], cwd=folder / "tree", capture_output=True, text=True)
    assert built.returncode == 0, built.stderr
    (found,) = folder.glob("*.whl")
    return found


@pytest.fixture(scope="module")
def unpacked(wheel):
    folder = wheel.parent / "site"
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(folder)
    return folder


def python(*args: str, path: Path, cwd: Path) -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, "PYTHONPATH": str(path), "PYTHONSAFEPATH": "1"}
    return subprocess.run([sys.executable, *args], cwd=cwd, env=environment, capture_output=True, text=True)


def test_the_wheel_holds_the_tree_byte_for_byte(wheel):
    with zipfile.ZipFile(wheel) as archive:
        inside = {name: archive.read(name) for name in archive.namelist() if ".dist-info/" not in name}
    expected = {f"forget_concept/{name}": name for name in tree() if packaged(name)}
    assert set(inside) == set(expected)
    different = [name for name, source in expected.items() if inside[name] != (ROOT / source).read_bytes()]
    assert not different
    for needed in ("py.typed", "core/request/request.schema.json", "core/cli/__init__.py", "nodes/host/__init__.py"):
        assert f"forget_concept/{needed}" in inside


def test_the_wheel_works_where_there_is_no_tree(unpacked, tmp_path):
    code = (
        "import forget_concept, forget_concept.core.evaluation\n"
        "from forget_concept.core.request.request import SCHEMA_PATH\n"
        "from forget_concept.core.methods.registry import all_methods\n"
        "from forget_concept.core.mini.files import weights_folder\n"
        "SCHEMA_PATH.read_text(encoding='utf-8'); assert all_methods()\n"
        "print(forget_concept.__file__, weights_folder())"
    )
    done = python("-c", code, path=unpacked, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert all(place.startswith(str(unpacked)) for place in done.stdout.split()[:1])
    done = python("-m", "forget_concept.core.cli", "--version", path=unpacked, cwd=tmp_path)
    assert done.stdout.startswith("forget-concept ")


def test_the_root_imports_with_neither_host_nor_torch(unpacked, tmp_path):
    code = """
import sys
class Absent:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in {"torch", "numpy", "comfy", "comfy_api", "modules", "diffusers", "transformers"}:
            raise ModuleNotFoundError(name, name=name)
sys.meta_path.insert(0, Absent())
import forget_concept, forget_concept.core, forget_concept.core.request.request
assert forget_concept.__version__ and "fit" in dir(forget_concept)
assert not hasattr(forget_concept, "NODE_CLASS_MAPPINGS")
try:
    forget_concept.fit
except ModuleNotFoundError as error:
    assert error.name in ("torch", "numpy"), error
else:
    raise SystemExit("fit needs no torch?")
from forget_concept.core import cli
sys.exit(cli.main(["methods"]))
"""
    done = python("-c", code, path=unpacked, cwd=tmp_path)
    assert done.returncode == 1
    assert re.fullmatch(r"forget-concept: .*pip install 'forget-concept\[\w+\]'\.\n", done.stderr)


def test_the_command_is_installed():
    found = [e for e in importlib.metadata.entry_points(group="console_scripts") if e.name == "forget-concept"]
    assert found
    from forget_concept.core.cli import main

    assert all(entry.load() is main for entry in found)


def _named(requirement: str) -> str:
    return re.split(r"[^A-Za-z0-9._-]", requirement.strip(), maxsplit=1)[0].lower()


def _bounds(requirement: str) -> str:
    return requirement.strip()[len(_named(requirement)) :].strip()


# what this machine's webui pins (A1111 1.10 and Forge, requirements_versions.txt): the oldest that a host has
PINNED = {"einops": "0.4.1", "safetensors": "0.4.2"}


def test_a_host_is_asked_for_next_to_nothing():
    lines = (ROOT / "requirements.txt").read_text(encoding="utf-8").splitlines()
    wanted = {_named(line): _bounds(line) for line in lines if line.strip() and not line.startswith("#")}
    # a bound that every host's own version meets moves none of them
    assert wanted == {name: f">={version}" for name, version in PINNED.items()}


def test_the_package_states_lower_bounds_only(settings, wheel):
    project = settings["project"]
    wanted = {_named(item): _bounds(item) for item in project["dependencies"]}
    assert set(wanted) == {"comfyui-frontend-package", "einops", "numpy", "peft", "safetensors"}
    every = [*project["dependencies"], *(item for items in project["optional-dependencies"].values() for item in items)]
    for item in every:
        bounds = re.sub(r"^\[.*\]", "", _bounds(item))
        assert re.fullmatch(r">=[0-9.]+|", bounds), item
    with zipfile.ZipFile(wheel) as archive:
        metadata = archive.read(next(n for n in archive.namelist() if n.endswith("/METADATA"))).decode()
    always = [line for line in metadata.splitlines() if line.startswith("Requires-Dist") and "extra ==" not in line]
    assert {_named(line.partition(":")[2]) for line in always} == set(wanted)


def test_only_one_file_imports_peft():
    found = [
        name
        for name in tree()
        if name.endswith(".py") and packaged(name)
        if re.search(r"^\s*(import peft|from peft)\b", (ROOT / name).read_text(encoding="utf-8"), re.MULTILINE)
    ]
    assert found == ["core/formats/peft.py"]


# packages of an environment that has a torch and a front end of its own: older than the newest of each
PRESENT = ("torch", "comfyui-frontend-package==1.37.11", "transformers==4.57.6", "accelerate==1.10.1", "numpy==1.26.4")


@pytest.mark.long
def test_installing_the_wheel_moves_nothing_that_is_there(wheel, tmp_path):
    def pip(*arguments: str) -> subprocess.CompletedProcess[str]:
        command = [str(interpreter), "-m", "pip", "--disable-pip-version-check", *arguments]
        return subprocess.run(command, capture_output=True, text=True)

    def frozen() -> dict[str, str]:
        lines = pip("freeze").stdout.splitlines()
        return {line.partition("==")[0].partition(" @ ")[0].lower().replace("_", "-"): line for line in lines}

    subprocess.run([sys.executable, "-m", "venv", str(tmp_path / "env")], check=True)
    folder = tmp_path / "env"
    interpreter = folder / "Scripts" / "python.exe" if os.name == "nt" else folder / "bin" / "python"
    # this environment's torch, so that no other one is downloaded
    torch = f"torch=={importlib.metadata.version('torch')}"
    made = pip("install", "--quiet", torch, *PRESENT[1:])
    if made.returncode:
        pytest.skip(f"no environment to install over: {made.stderr.strip().splitlines()[-1]}")
    before = frozen()
    assert {_named(name).lower() for name in PRESENT} <= set(before)
    done = pip("install", "--quiet", str(wheel))
    assert done.returncode == 0, done.stderr
    after = frozen()
    assert {name: line for name, line in after.items() if name in before} == before
    assert {"forget-concept", "peft", "einops"} <= set(after)


# what a host brings, by the folder that is its door
HOSTS_OWN = {
    "nodes": {"comfy", "comfy_api", "folder_paths", "server"},
    "sd_webui_ext": {"backend", "fastapi", "gradio", "modules", "pydantic"},
}


def test_what_is_imported_is_declared_or_the_hosts_own(settings):
    extras = settings["project"]["optional-dependencies"]
    declared = [*settings["project"]["dependencies"], *extras["torch"], *extras["mini"]]
    known = {_named(item) for item in declared} | {"pil", "yaml"} | {name.lower() for name in sys.stdlib_module_names}
    for name in tree():
        if not name.endswith(".py") or not packaged(name):
            continue
        allowed = known | HOSTS_OWN.get(Path(name).parts[0], set())
        for node in ast.walk(ast.parse((ROOT / name).read_text(encoding="utf-8"))):
            modules = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
            if isinstance(node, ast.ImportFrom):
                assert node.level or node.module != "forget_concept", f"{name}: import relatively"
                modules = [node.module or ""] if not node.level else []
            for module in modules:
                assert module.partition(".")[0].lower() in allowed, f"{name} imports {module}"


def test_only_its_doors_name_a_webui():
    for path in (ROOT / "sd_webui_ext").glob("*.py"):
        tree = ast.walk(ast.parse(path.read_text(encoding="utf-8")))
        froms = {node.module or "" for node in tree if isinstance(node, ast.ImportFrom) and not node.level}
        named = {name for name in froms if name.partition(".")[0] in ("modules", "backend", "modules_forge")}
        assert not named or path.name in ("host.py", "host_forge.py", "webui.py"), path.name


def test_install_script_does_nothing_quickly_and_again(tmp_path):
    for _ in range(2):
        done = subprocess.run([sys.executable, "-I", ROOT / "install.py"], cwd=tmp_path, capture_output=True, text=True)
        assert (done.returncode, done.stdout, done.stderr) == (0, "", "")
    assert not list(tmp_path.iterdir())


def test_every_file_is_python_3_10():
    for name in tree():
        if name.endswith(".py"):
            ast.parse((ROOT / name).read_text(encoding="utf-8"), filename=name, feature_version=(3, 10))


def test_files_can_be_checked_out_anywhere():
    names = tree()
    assert not [name for name in names if (ROOT / name).is_symlink()]
    assert not [name for name in names if re.search(r'[<>:"|?*\\]', name) or name.endswith((" ", "."))]
    assert len({name.casefold() for name in names}) == len(names)


def test_the_registry_gets_what_it_wants(settings):
    project, comfy = settings["project"], settings["tool"]["comfy"]
    assert re.fullmatch(r"[a-z][a-z0-9-]*", project["name"])
    assert "comfyui" not in project["name"].lower()
    assert comfy["PublisherId"]
    assert comfy["DisplayName"]
    assert comfy["requires-comfyui"].startswith(">=")
    left_out = {line.strip("/") for line in (ROOT / ".comfyignore").read_text(encoding="utf-8").splitlines()}
    assert all((ROOT / name).exists() or name.startswith(".") for name in left_out)
    # what the nodes are made of goes to the registry
    assert not left_out & {*FOLDERS, "__init__.py", "install.py", "requirements.txt", "pyproject.toml"} - {
        "sd_webui_ext"
    }
    # the registry reads the front ends that the pages fit from this line, and takes it out
    assert [item for item in project["dependencies"] if item.startswith("comfyui-frontend-package>=")]
    changes = (ROOT / "CHANGELOG.md").read_text(encoding="utf-8")
    from forget_concept import __version__

    assert f"## [{__version__}]" in changes
    from forget_concept.core.version import VERSION

    assert re.fullmatch(r"\d+\.\d+\.\d+", VERSION)
    assert os.access(ROOT / ".ci" / "run", os.X_OK) or os.name == "nt"
