"""Tasks for a text LLM: each sound that has no description yet is described, so that there is something to read in its place.

In: tasks. Out: the same tasks with `description` in their audio parts; `OUT/described.jsonl` keeps what was told, and an instance whose
sound cannot be described is set aside with the others of its task.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from eval.tasks import Task
from speech_llm.examples import audio_parts
from speech_llm.files import read_jsonl, write_jsonl

USE = ("duration", "transcript", "gender", "age_group", "pitch", "volume", "speed", "noise")


def add_descriptions(
    tasks: Sequence[Task], out: Path, use: Sequence[str] = USE, progress: bool = True
) -> int:
    """Describe what needs it, with the describers `use`; returns how many sounds were described."""
    from describers.run import describe_inputs

    waiting: dict[str, list[dict[str, Any]]] = {}
    for task in tasks:
        for instance in task.instances:
            for part in audio_parts(instance.messages):
                if not part.get("description"):
                    waiting.setdefault(str(part["path"]), []).append(part)
    if not waiting:
        return 0
    manifest = out / "sounds.jsonl"
    write_jsonl(manifest, ({"id": str(i), "audio": path} for i, path in enumerate(waiting)))
    describe_inputs(manifest, out / "described.jsonl", use=use, progress=progress)
    for _, row in read_jsonl(out / "described.jsonl"):
        for part in waiting.get(str((out / row["audio"]).resolve()), waiting.get(str(row["audio"]), [])):
            part["description"] = row["description"]
            if "transcript" in row["attributes"]:
                part.setdefault("transcript", row["attributes"]["transcript"])
    for task in tasks:
        told = [i for i in task.instances if all(p.get("description") for p in audio_parts(i.messages))]
        left_out = {instance.id for instance in task.instances} - {instance.id for instance in told}
        task.rejects += [
            {"id": name, "reason": "its sound could not be described"} for name in sorted(left_out)
        ]
        task.instances[:] = told
    return len(waiting)
