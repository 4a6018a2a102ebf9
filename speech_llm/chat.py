"""Talking to a model: one answer about a recording, or a session that keeps its turns.

In: a responder and what the user typed. Out: answers, as text.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

from speech_llm.audio import SUFFIXES
from speech_llm.errors import UserError
from speech_llm.examples import Message

if TYPE_CHECKING:
    from speech_llm.responders import Responder

HELP = "Type a question. /audio FILE adds a recording to it, /new forgets the conversation, /quit ends."


def split_inputs(inputs: list[str]) -> tuple[list[Path], str | None]:
    """Recordings and the question of `chat MODEL [AUDIO ...] [QUESTION]`; no question means a session.

    Raises `UserError` for a recording that is not there.
    """
    if not inputs:
        return [], None
    last_is_sound = Path(inputs[-1]).suffix.lower() in SUFFIXES or (
        " " not in inputs[-1] and Path(inputs[-1]).is_file()
    )
    files = inputs if last_is_sound else inputs[:-1]
    return [recording(file) for file in files], None if last_is_sound else inputs[-1]


def recording(file: str) -> Path:
    """The path of a recording; `UserError` when it is not there."""
    path = Path(file).expanduser()
    if not path.is_file():
        hint = (
            ""
            if path.suffix
            else ' (a question of several words needs quotes: chat MODEL a.wav "What can you hear?")'
        )
        raise UserError(f"{file}: no such recording{hint}")
    return path.resolve()


def user_message(question: str, recordings: list[Path]) -> Message:
    """A user turn with any number of recordings before the question."""
    if not recordings:
        return {"role": "user", "content": question}
    audio = [{"type": "audio", "path": str(path)} for path in recordings]
    return {"role": "user", "content": [*audio, {"type": "text", "text": question}]}


def answer_once(responder: Responder, question: str, recordings: list[Path]) -> str:
    return answer_of(responder, [user_message(question, recordings)])


def answer_of(responder: Responder, conversation: list[Message]) -> str:
    """The answer to a conversation; `UserError` where a server gave none."""
    answer = responder.respond([conversation])[0]
    if answer is None:
        why = getattr(responder, "trouble", lambda: None)()
        raise UserError(why or "there was no answer")
    return answer


def session(
    responder: Responder,
    recordings: list[Path],
    ask: Callable[[str], str] = input,
    say: Callable[[str], None] = print,
) -> None:
    """Ask and answer until the user ends it; every turn hears the whole conversation."""
    turns: list[Message] = []
    waiting = list(recordings)
    say(HELP)
    for path in waiting:
        say(f"(listening to {path.name})")
    while True:
        try:
            line = ask("> ").strip()
        except (EOFError, KeyboardInterrupt):
            say("")
            return
        command, _, rest = line.partition(" ")
        try:
            if not line:
                continue
            if command in ("/quit", "/exit"):
                return
            if command == "/new":
                turns, waiting = [], []
                say("(a new conversation)")
            elif command == "/audio":
                waiting.append(recording(rest.strip()))
                say(f"(listening to {waiting[-1].name}; now ask)")
            elif command.startswith("/"):
                say(HELP)
            else:
                asked = user_message(line, waiting)
                answer = answer_of(responder, [*turns, asked])
                turns += [asked, {"role": "assistant", "content": answer}]
                waiting = []
                say(answer)
        except UserError as error:
            # A recording that cannot be used would spoil every later turn too.
            waiting = []
            say(f"error: {error}")
