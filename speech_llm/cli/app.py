"""What the verbs share: the application that they are added to, the options that several have, and how these are read."""

from __future__ import annotations

import shlex
import sys
from pathlib import Path
from typing import Annotated

import typer

from speech_llm.errors import UserError

app = typer.Typer(
    name="speech-llm",
    help="Teach an existing text LLM to hear without making it forget.",
    epilog="""\b
Start here:
  speech-llm run recipes/quickstart.yaml
  speech-llm chat runs/quickstart/model some.wav "What can you hear?"
  speech-llm demo runs/quickstart --open
Each command has examples: speech-llm COMMAND --help""",
    no_args_is_help=True,
    add_completion=False,
    rich_markup_mode=None,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 110},
)

RecipePath = Annotated[
    Path, typer.Argument(metavar="RECIPE", help="the recipe, a YAML file", show_default=False)
]
Out = Annotated[
    Path | None,
    typer.Option("--out", metavar="DIR", help="run folder (default: runs/<recipe name>)", show_default=False),
]
Set = Annotated[
    list[str] | None,
    typer.Option(
        "--set",
        metavar="KEY=VALUE",
        help="change one key of the recipe; may be given many times",
        show_default=False,
    ),
]
Quiet = Annotated[bool, typer.Option("--quiet", "-q", help="no progress bars")]

MaxNewTokens = Annotated[int, typer.Option("--max-new-tokens", min=1, metavar="N", help="longest answer")]
# How a server is asked (`openai:URL`); the same in every verb that can ask one.
ApiKeyEnv = Annotated[
    str | None,
    typer.Option(
        "--api-key-env",
        metavar="NAME",
        help="of openai:URL: the environment variable that holds the key",
        show_default=False,
    ),
]
Concurrency = Annotated[
    int, typer.Option("--concurrency", min=1, metavar="N", help="of openai:URL: requests at a time")
]
Retries = Annotated[
    int, typer.Option("--retries", min=0, metavar="N", help="of openai:URL: further tries of a request")
]
TimeoutS = Annotated[
    float,
    typer.Option("--timeout-s", min=0.1, metavar="S", help="of openai:URL: seconds that a try may take"),
]


def typed_command() -> str:
    """What the user typed, fit to be typed again."""
    return shlex.join(["speech-llm", *sys.argv[1:]])


def names_of(text: str, option: str) -> list[str]:
    names = [name.strip() for name in text.split(",") if name.strip()]
    if not names:
        raise UserError(f"{option} {text!r}: expected names with commas between")
    return names


def identity_of(model: str, max_new_tokens: int) -> str:
    """What an answer depends on beside the question: a model's name, of a folder its weights, settings and template (a model that
    was trained again is another one), and how long the answer may become."""
    from speech_llm.files import sha256_file

    folders = [Path(model), Path(model.partition(":")[2] or model)]
    folder = next((folder for folder in folders if folder.is_dir()), None)
    kinds = (".safetensors", ".json", ".jinja")
    weights = sorted(file for file in folder.iterdir() if file.suffix in kinds) if folder else []
    return " ".join([model, *(sha256_file(file) for file in weights), f"{max_new_tokens} tokens"])


def pair_of(
    text: str, option: str = "--label", example: str = "sex=gender", form: str = "COLUMN=ATTRIBUTE"
) -> tuple[str, str]:
    left, equals, right = (part.strip() for part in text.partition("="))
    if not equals or not left or not right:
        raise UserError(f"{option} {text}: expected {form}, for example {option} {example}")
    return left, right
