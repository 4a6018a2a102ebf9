"""The command line. Every verb is a thin door: it reads its arguments, calls one function, and prints what came out.

Nothing heavy is imported before a verb needs it, so that `--help` answers at once. A user's mistake is one line on
standard error and exit code 2; an interrupt says how to go on and exits with 130.
"""

from __future__ import annotations

import io
import os
import sys
import warnings
from pathlib import Path
from typing import Any

import typer

from speech_llm.cli.app import app, typed_command
from speech_llm.errors import UserError
from speech_llm.launch import OtherFailed, launched

# isort: off
# Importing a module adds its verbs, in the order in which `speech-llm --help` lists them.
from speech_llm.cli import stages, describing, asking, comparing, chatting, showing, machine  # noqa: F401
# isort: on

# Verbs in which all processes of a launch take part; any other is done by the main process alone.
TOGETHER = ("run", "targets", "mixture", "cache", "train")


def main(arguments: list[str] | None = None) -> None:
    """Run the command line and exit: 0 on success, 2 with one line on a user's mistake, 130 on an interrupt."""
    # Quieter libraries: their warnings are about code, and the people who read this terminal did not write it.
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
    warnings.filterwarnings("ignore", category=FutureWarning)
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="replace")  # a terminal that has no letter for an answer's sign
    sys.exit(_exit_code(arguments))


def _exit_code(arguments: list[str] | None) -> int:
    verb = next(iter(sys.argv[1:] if arguments is None else arguments), "")
    if verb not in TOGETHER and not launched().main:
        return 0
    try:
        code = typer.main.get_command(app).main(args=arguments, prog_name="speech-llm", standalone_mode=False)
        # Depending on its version typer tells of an interrupt by this code or by an exception.
        return _interrupted() if code == 130 else code if isinstance(code, int) else 0
    except OtherFailed as other:
        return launched().fails(other.code) or other.code
    except UserError as error:
        return _fail(str(error))
    except KeyboardInterrupt:
        return _interrupted()
    except BrokenPipeError:  # `speech-llm run --keys | head`
        sys.stdout = open(os.devnull, "w")  # noqa: SIM115 - so that Python's own flush at the end finds no broken pipe
        return 0
    except OSError as error:
        if error.filename is None and error.errno is None:
            raise
        from speech_llm.files import explain_os_error

        return _fail(str(explain_os_error(error, Path(str(error.filename or "writing")))))
    except Exception as error:
        # typer's own kinds come from its own copy of click or from click, depending on its version.
        name = type(error).__name__
        if name == "Abort":
            return _interrupted()
        if name == "NoArgsIsHelpError":
            typer.echo(str(error))
            return 2
        if hasattr(error, "format_message"):
            return _fail(_usage(error))
        # Where another process has failed, what follows from that here (a connection is closed, ...) tells nothing.
        first = launched().fails(1)
        if first is not None:
            return first
        raise


def _usage(error: Any) -> str:
    """A usage error of the argument parser in one line."""
    said = " ".join(str(error.format_message()).split()).rstrip(".")
    context = getattr(error, "ctx", None)
    command = context.command_path if context is not None else "speech-llm"
    return f"{said}; see {command} --help"


def _fail(message: str) -> int:
    first = launched().fails(2)
    if first is not None:  # of several processes one tells it
        return first
    print(f"error: {' '.join(message.split())}", file=sys.stderr)
    return 2


def _interrupted() -> int:
    first = launched().fails(130)
    if first is not None:
        return first
    print(
        f"\nstopped; finished work is kept, and the same command goes on from here: {typed_command()}",
        file=sys.stderr,
    )
    return 130
