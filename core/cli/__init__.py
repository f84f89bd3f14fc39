"""The command line, ``forget-concept``: one command a file.

Exit codes: 0 success; 1 an error that the user can fix, reported in one sentence on standard error; 130 interrupted
(Ctrl-C), 143 terminated; neither leaves a half-written file behind.
"""

from __future__ import annotations

import argparse
import contextlib
import io
import logging
import os
import signal
import sys
import warnings
from collections.abc import Iterator, Sequence
from types import FrameType, ModuleType

from ..errors import Cancelled, ForgetConceptError
from ..files.names import check_unicode
from ..version import VERSION
from . import bench, demo, evaluate, export, forget, generate, inspect, methods, mini_table, restore, themes
from .options import Parser

__all__ = ["build_parser", "main"]

COMMANDS: dict[str, ModuleType] = {
    "demo": demo,
    "forget": forget,
    "restore": restore,
    "generate": generate,
    "evaluate": evaluate,
    "bench": bench,
    "methods": methods,
    "themes": themes,
    "inspect": inspect,
    "export": export,
    "mini-table": mini_table,
}
OK, USER_ERROR, INTERRUPTED, TERMINATED = 0, 1, 130, 143
# the extra of this package that installs a missing module
EXTRAS = {
    "torch": "torch",
    "numpy": "cli",
    "rich": "cli",
    "PIL": "cli",
    "diffusers": "cli",
    "transformers": "cli",
}


def build_parser() -> argparse.ArgumentParser:
    """Build the parser of all commands."""
    parser = Parser(
        prog="forget-concept", description="Make a text-to-image diffusion model forget a concept, and measure it."
    )
    parser.add_argument("--version", action="version", version=f"forget-concept {VERSION}")
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND", parser_class=Parser)
    for name, module in COMMANDS.items():
        command = commands.add_parser(name, help=module.HELP, description=str(module.__doc__).partition(": ")[2])
        module.add_arguments(command)
        command.add_argument("--json", action="store_true", help="print one JSON object instead of text")
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command.

    Args:
        argv: Arguments without the program's name. Default: those of the process.

    Returns:
        The exit code.
    """
    for stream in (sys.stdout, sys.stderr):
        # printing must not lose work that is done: characters that the console's encoding lacks are replaced
        if isinstance(stream, io.TextIOWrapper) and stream.errors in ("strict", "surrogateescape"):
            stream.reconfigure(errors="replace")
    before = signal.getsignal(signal.SIGTERM)
    try:
        # raise instead of dying, so that half-written files are removed as after Ctrl-C
        signal.signal(signal.SIGTERM, _terminated)
    except ValueError:  # not the main thread
        before = None
    try:
        with _quiet_libraries():
            return _run(argv)
    finally:
        if before is not None:
            signal.signal(signal.SIGTERM, before)


def _run(argv: Sequence[str] | None) -> int:
    try:
        for argument in sys.argv[1:] if argv is None else argv:
            check_unicode(argument, "The argument")
        args = build_parser().parse_args(argv)
        from .console import Console

        console = Console(args.json)
        console.result(COMMANDS[args.command].run(args, console))
        return OK
    except ForgetConceptError as error:
        return _fail(str(error))
    except (KeyboardInterrupt, Cancelled):
        print("Interrupted.", file=sys.stderr)
        return INTERRUPTED
    except ModuleNotFoundError as error:
        name = (error.name or "").partition(".")[0]
        if name not in EXTRAS:
            raise
        extra = EXTRAS[name]
        return _fail(f"The package '{name}' is missing: install it with pip install 'forget-concept[{extra}]'.")
    except BrokenPipeError:
        # the reader of our output has closed it: send the rest, including the flush at exit, to nowhere
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return USER_ERROR
    except OSError as error:
        where = f"'{error.filename}': " if error.filename else ""
        return _fail(f"{where}{error.strerror or error}.")
    except MemoryError:
        return _fail("Out of memory: try a smaller --batch.")
    except RuntimeError as error:
        if "out of memory" not in str(error).lower():
            raise
        return _fail("Out of memory on the device: try a smaller --batch, or --device cpu.")


@contextlib.contextmanager
def _quiet_libraries() -> Iterator[None]:
    """Silence developer warnings of the libraries (deprecations, missing CUDA), which users cannot act on.

    Python's own -W and PYTHONWARNINGS bring the warnings back.
    """
    for library in ("diffusers", "transformers"):
        os.environ.setdefault(f"{library.upper()}_VERBOSITY", "error")  # read once, when they are imported
        logging.getLogger(library).setLevel(logging.ERROR)
    with warnings.catch_warnings():
        if not sys.warnoptions:
            # all of them: whose module a warning is put down to differs with its stack level
            warnings.simplefilter("ignore")
        yield


def _fail(sentence: str) -> int:
    print(f"forget-concept: {sentence}", file=sys.stderr)
    return USER_ERROR


def _terminated(number: int, frame: FrameType | None) -> None:
    raise SystemExit(TERMINATED)
