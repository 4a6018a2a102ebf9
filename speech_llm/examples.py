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
        {"role": _ROLES.get(str(turn.get("from")), turn.get("from")), "content": turn.get("value")}
        for turn in messages
        if isinstance(turn, dict)
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
        if row.get("audios"):
            raise ValueError(
                "it has a sound and a text but no 'messages' that say which of them is the answer"
            )
        messages: list[Message] = []
    else:
        messages = _messages(row)
    for part in audio_parts(messages):
        if not isinstance(part.get("path"), str) or not part["path"]:
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
    in_parts = False
    out: list[Message] = []
    for turn in messages:
        if not isinstance(turn, dict):
            raise ValueError("a turn is no object with 'role' and 'content'")
        role, content = turn.get("role"), turn.get("content")
        if role not in ("system", "user", "assistant"):
            raise ValueError(f"a turn has role {role!r}; expected system, user or assistant")
        if role == "system" and (content is None or content == ""):
            continue
        # Tables fill what a row does not have with nulls, which say nothing.
        turn = {key: value for key, value in turn.items() if value is not None}
        own = list(turn.pop("audios", []))
        if isinstance(content, str) and AUDIO_MARK in content:
            turn["content"] = _split_marks(content, own or waiting)
        elif not isinstance(content, (str, list)):
            raise ValueError(f"a {role} turn has no content")
        elif isinstance(content, list):
            turn["content"] = _parts(content, role)
            in_parts |= bool(audio_parts([turn]))
        if own:
            raise ValueError(f"a turn has more audios than {AUDIO_MARK} marks")
        if role == "assistant" and turn.get("train", True) and not turn["content"].strip():
            raise ValueError("an assistant turn is empty")
        out.append(turn)
    # A column of sounds beside conversations that hold their own sounds says the same again.
    if waiting and not in_parts:
        _place_sound(out, waiting)
    if isinstance(row.get("response"), str) and out[-1]["role"] != "assistant":
        out.append({"role": "assistant", "content": row["response"]})
    if not any(turn["role"] == "assistant" for turn in out):
        raise ValueError("it has no assistant turn, so there is nothing to learn")
    return out


def _parts(content: list[Any], role: str) -> Any:
    """A turn's parts, checked; of an assistant's turn their text."""
    parts = []
    for part in content:
        kind = part.get("type") if isinstance(part, dict) else None
        if kind not in ("audio", "text"):
            raise ValueError(f"a {role} turn has a part of type {kind!r}; expected audio or text")
        if kind == "text" and not isinstance(part.get("text"), str):
            raise ValueError(f"a {role} turn has a text part without 'text'")
        parts.append({key: value for key, value in part.items() if value is not None})
    if role != "assistant":
        return parts
    if any(part["type"] == "audio" for part in parts):
        raise ValueError("an assistant turn has a sound, and answers are text")
    return "\n".join(part["text"] for part in parts)


def _place_sound(messages: list[Message], audios: list[Any]) -> None:
    """Put the one sound of a conversation without any mark before what the user says first."""
    first = next((turn for turn in messages if turn["role"] == "user"), None)
    if first is None or len(audios) > 1 or audio_parts(messages):
        raise ValueError(f"there are more audios than {AUDIO_MARK} marks")
    parts = (
        first["content"]
        if isinstance(first["content"], list)
        else [{"type": "text", "text": first["content"]}]
    )
    first["content"] = _split_marks(AUDIO_MARK, audios) + parts


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
