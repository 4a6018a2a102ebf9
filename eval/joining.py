"""Several sounds of a question as one: for models that take one sound only.

In: tasks whose questions may hold several audio parts in a turn (Dynamic-SUPERB's `audio`, `audio2`, ...). Out: the same tasks with one
part in their place, a file of the cache that holds the sounds in order with `SILENCE_S` between them, as Dynamic-SUPERB phase 2
(2411.05361) gives them to models that take one.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import soundfile

from eval.tasks import Instance, Task
from speech_llm.audio import SAMPLE_RATE_HZ, load_audio
from speech_llm.errors import UserError
from speech_llm.examples import Message
from speech_llm.files import atomic_write, sha256_file, stable_hash

SILENCE_S = 0.5


def join_sounds(tasks: Sequence[Task], folder: Path) -> int:
    """Put one sound in the place of several in each turn; returns how many files of `folder` stand for several now.

    An instance with a sound that cannot be read goes to its task's `rejects`. Raises `UserError` where a task has none left.
    """
    joined: set[str] = set()
    for task in tasks:
        kept = []
        for instance in task.instances:
            reason = _joined(instance, folder, joined)
            if reason is None:
                kept.append(instance)
            else:
                task.rejects.append({"id": instance.id, "reason": reason})
        if not kept:
            raise UserError(
                f"{task.name}: no instance has sounds that can be joined ({task.rejects[-1]['reason']})"
            )
        task.instances[:] = kept
    return len(joined)


def joined_sound(paths: Sequence[Path], folder: Path) -> Path:
    """A 16 kHz mono FLAC file in `folder` with the sounds of `paths` in order, named by their contents; made once.

    Raises `AudioError` for a sound that cannot be read.
    """
    name = stable_hash([*(sha256_file(path) for path in paths), SILENCE_S, SAMPLE_RATE_HZ])
    path = folder / f"{name[:32]}.flac"
    if not path.exists():
        pieces: list[np.ndarray] = []
        for sound in paths:
            if pieces:
                pieces.append(np.zeros(round(SILENCE_S * SAMPLE_RATE_HZ), np.float32))
            pieces.append(load_audio(sound, SAMPLE_RATE_HZ))
        with atomic_write(path, "wb") as handle:
            soundfile.write(handle, np.concatenate(pieces), SAMPLE_RATE_HZ, format="FLAC", subtype="PCM_16")
    return path


def _joined(instance: Instance, folder: Path, joined: set[str]) -> str | None:
    """Why the instance's sounds cannot be joined; None where they are now."""
    try:
        instance.messages = [_one_sound(message, folder, joined) for message in instance.messages]
    except (UserError, OSError) as error:
        return str(error)
    return None


def _one_sound(message: Message, folder: Path, joined: set[str]) -> Message:
    content: str | list[dict[str, Any]] = message["content"]
    if isinstance(content, str):
        return message
    sounds = [part for part in content if part.get("type") == "audio"]
    if len(sounds) < 2:
        return message
    path = str(joined_sound([Path(part["path"]) for part in sounds], folder))
    joined.add(path)
    one: dict[str, Any] = {"type": "audio", "path": path}
    # What stands in for the sounds in a text LLM's prompt is in order, too, where it is known of all.
    for key, between in (("description", "\n"), ("transcript", " ")):
        if all(part.get(key) for part in sounds):
            one[key] = between.join(str(part[key]) for part in sounds)
    first = next(i for i, part in enumerate(content) if part is sounds[0])
    rest = [part for part in content[first:] if part.get("type") != "audio"]
    return {**message, "content": [*content[:first], one, *rest]}
