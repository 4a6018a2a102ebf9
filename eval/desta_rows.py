"""Rows of DeSTA's form (DeSTA-AQA5M: `messages` with `<|AUDIO|>`, `audios`, `response`) as a task.

The label is the last answer, a free text: it is scored by the words in common with it (`f1`), and better by a judge.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from eval.tasks import Instance, Task
from speech_llm.errors import UserError
from speech_llm.examples import read_examples


def desta_task(path: Path) -> Task:
    """The rows of a file; those without a sound, or without an answer at their end, are set aside."""
    if not path.exists():
        raise UserError(f"{path}: no such file")
    rejects: list[dict[str, Any]] = []
    instances: list[Instance] = []
    ids: set[str] = set()
    for number, example in enumerate(read_examples(path, rejects), start=1):
        if not example.messages or example.messages[-1]["role"] != "assistant":
            rejects.append({"id": example.id, "reason": "there is no answer at its end"})
            continue
        missing = [part["path"] for part in example.audio_parts() if not Path(part["path"]).exists()]
        if not example.audio_parts() or missing:
            why = f"{missing[0]}: no such audio file" if missing else "there is no audio"
            rejects.append({"id": example.id or number, "reason": why})
            continue
        name = example.id or f"{path.stem}-{number}"
        name = f"{name}#{number}" if name in ids else name
        ids.add(name)
        asked = list(example.messages[:-1])
        for part in example.audio_parts():
            if example.context and "description" not in part:
                part["description"] = example.context
        instances.append(Instance(name, asked, str(example.messages[-1]["content"]), path.stem, "f1"))
    if not instances:
        why = f" ({rejects[0]['reason']})" if rejects else ""
        raise UserError(f"{path}: no row can be used{why}")
    return Task(path.stem, "DeSTA", instances, "f1", None, rejects)
