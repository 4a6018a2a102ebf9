"""The Example: the one record that flows through everything, one JSON line each.

In: JSON lines of our own form, or of DeSTA's (`messages` with `<|AUDIO|>` and `audios`, plus `response`).
Out: `Example` objects; bad lines go to a rejects file with their reason and the rest goes on.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from speech_llm.errors import UserError
from speech_llm.files import read_jsonl, write_jsonl

Message = dict[str, Any]
AUDIO_MARK = "<|AUDIO|>"
# Names that conversations on the hub use for the roles.
_ROLES = {"human": "user", "gpt": "assistant", "bot": "assistant", "model": "assistant"}


@dataclass
class Example:
    """One conversation (or plain text) to learn from.

    `messages`: chat turns; a user turn's content is a string or a list of parts
    `{"type": "audio", "path": ..., "transcript": ...}` and `{"type": "text", "text": ...}`. Every assistant
    turn is learned unless it says `"train": False`. `text`: a plain-text row instead of messages.
    `context`: the text that stood in for the audio when the teacher answered. `attributes`: what is known of
    the clip. `source`: where the row comes from (dataset, teacher, prompt id, strategy, seed, ...).
    `rejected`: a wrong answer to set against the last assistant turn (preference style).
    """

    id: str
    messages: list[Message] = field(default_factory=list)
    text: str | None = None
    context: str | None = None
    attributes: dict[str, Any] = field(default_factory=dict)
    source: dict[str, Any] = field(default_factory=dict)
    rejected: str | None = None

    def audio_parts(self) -> list[dict[str, Any]]:
        """The audio parts of all turns, in order."""
        return audio_parts(self.messages)

    def to_row(self) -> dict[str, Any]:
        row = asdict(self)
        if self.rejected is None:
            row.pop("rejected")
        if self.text is None:
            row.pop("text")
        else:
            row.pop("messages")
        return row


def audio_parts(messages: list[Message]) -> list[dict[str, Any]]:
    """The audio parts of a conversation, in order."""
    found = []
    for message in messages:
        content = message.get("content")
        if isinstance(content, list):
            found += [part for part in content if part.get("type") == "audio"]
    return found


def hub_turns(messages: Any) -> Any:
    """Turns of the hub's other form (`from`, `value`) in ours; anything else as it is."""
    if not isinstance(messages, list) or not messages or not isinstance(messages[0], dict):
        return messages
    if "from" not in messages[0]:
        return messages
    return [
        {"role": _ROLES.get(turn["from"], turn["from"]), "content": turn.get("value")} for turn in messages
    ]


def user_turn(text: str, audio: dict[str, Any] | None = None) -> Message:
    """A user turn: one optional audio part followed by the text."""
    if audio is None:
        return {"role": "user", "content": text}
    return {"role": "user", "content": [{"type": "audio", **audio}, {"type": "text", "text": text}]}


def example_from_row(row: dict[str, Any], base: Path | None = None) -> Example:
    """Check one row and return it as an Example; `base` is where relative audio paths start.

    Raises `ValueError` with a sentence when the row is not an Example.
    """
    if "text" in row and "messages" not in row:
        if not isinstance(row["text"], str) or not row["text"].strip():
            raise ValueError("'text' is empty")
        messages: list[Message] = []
    else:
        messages = _messages(row)
    for part in audio_parts(messages):
        if not part.get("path"):
            raise ValueError("an audio part has no 'path'")
        if base is not None and not Path(part["path"]).is_absolute():
            part["path"] = str(base / part["path"])
    source = row.get("source") or {}
    rejected = row.get("rejected")
    if rejected is not None and not isinstance(rejected, str):
        raise ValueError("'rejected' must be a text, the wrong answer")
    return Example(
        id=str(row.get("id") or ""),
        messages=messages,
        text=row.get("text") if not messages else None,
        context=row.get("context"),
        attributes=dict(row.get("attributes") or {}),
        source=source if isinstance(source, dict) else {"dataset": str(source)},
        rejected=rejected,
    )


def _messages(row: dict[str, Any]) -> list[Message]:
    messages = row.get("messages")
    if not isinstance(messages, list) or not messages:
        raise ValueError("it has neither 'messages' nor 'text'")
    waiting = list(row.get("audios") or [])
    out: list[Message] = []
    for turn in messages:
        role, content = turn.get("role"), turn.get("content")
        if role not in ("system", "user", "assistant"):
            raise ValueError(f"a turn has role {role!r}; expected system, user or assistant")
        turn = dict(turn)
        turn_audios = turn.pop("audios", None)
        if isinstance(content, str) and AUDIO_MARK in content:
            turn["content"] = _split_marks(content, list(turn_audios) if turn_audios else waiting)
        elif not isinstance(content, (str, list)):
            raise ValueError(f"a {role} turn has no content")
        elif isinstance(content, list):
            turn["content"] = [dict(part) for part in content]
        out.append(turn)
    if isinstance(row.get("response"), str) and out[-1]["role"] != "assistant":
        out.append({"role": "assistant", "content": row["response"]})
    if not any(turn["role"] == "assistant" for turn in out):
        raise ValueError("it has no assistant turn, so there is nothing to learn")
    return out


def _split_marks(content: str, audios: list[Any]) -> list[dict[str, Any]]:
    """Replace each `<|AUDIO|>` of a DeSTA turn by an audio part."""
    parts: list[dict[str, Any]] = []
    pieces = content.split(AUDIO_MARK)
    for index, piece in enumerate(pieces):
        piece = piece.replace("<start_audio>", "").replace("<end_audio>", "")
        if index > 0:
            if not audios:
                raise ValueError(f"there are more {AUDIO_MARK} marks than audios")
            audio = audios.pop(0)
            if isinstance(audio, str):
                audio = {"audio": audio}
            part = {"type": "audio", "path": audio.get("audio") or audio.get("path")}
            if isinstance(audio.get("text"), str):
                part["transcript"] = audio["text"]
            parts.append(part)
        if piece.strip():
            parts.append({"type": "text", "text": piece.strip()})
    return parts


def read_examples(path: str | Path, rejects: list[dict[str, Any]] | None = None) -> Iterator[Example]:
    """Yield the Examples of a JSONL file; audio paths are taken relative to the file.

    Bad lines are appended to `rejects` as `{"line", "reason"}`; without it the first one is a `UserError`.
    """
    path = Path(path)

    def reject(number: int, reason: str) -> None:
        if rejects is None:
            raise UserError(f"{path}, line {number}: {reason}")
        rejects.append({"line": number, "reason": reason})

    for number, row in read_jsonl(path, lambda n, _text, reason: reject(n, reason)):
        try:
            example = example_from_row(row, path.parent)
        except (ValueError, AttributeError, TypeError) as error:
            reject(number, str(error))
            continue
        example.id = example.id or f"{path.stem}-{number}"
        yield example


def write_examples(path: str | Path, examples: list[Example]) -> int:
    """Write Examples as JSON lines, whole or not at all."""
    return write_jsonl(path, (example.to_row() for example in examples))
