"""Tasks: questions about audio with labels, from JSON lines.

One line is one instance: `{"task", "id", "messages", "label", "metric", "options", "synonyms", "seen", "prompt_id",
"dimension"}`. `messages` end with a user turn whose content holds audio parts (paths relative to the file).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from speech_llm.errors import UserError, nearest
from speech_llm.examples import Message, audio_parts
from speech_llm.files import read_jsonl, write_jsonl

METRICS = ("option", "exact", "wer", "cer", "per", "number", "f1", "choice", "refusal", "identity", "ifeval")


@dataclass
class Instance:
    """One question. `metric`: how its answer is scored, one of `METRICS`; `eval.scoring` says what each means."""

    id: str
    messages: list[Message]
    label: str
    task: str
    metric: str = "option"
    options: list[str] | None = None
    synonyms: dict[str, list[str]] | None = None
    attributes: dict[str, Any] = field(default_factory=dict)
    seen: bool | None = None
    prompt_id: str | None = None
    # Of metric "ifeval": what the answer must keep, `{"id", "arguments"}` each, and how the answer itself is scored.
    constraints: list[dict[str, Any]] = field(default_factory=list)


@dataclass
class Task:
    """Instances under one name. `dimension`: what they belong to (a test split, a Dynamic-SUPERB dimension)."""

    name: str
    dimension: str
    instances: list[Instance]
    metric: str = "option"
    options: list[str] | None = None
    rejects: list[dict[str, Any]] = field(default_factory=list)


def write_task(task: Task, path: Path) -> None:
    """Write a task as JSON lines; audio paths are written as they are."""
    write_jsonl(
        path,
        (
            {
                "task": task.name,
                "id": item.id,
                "dimension": task.dimension,
                "messages": item.messages,
                "label": item.label,
                "metric": item.metric,
                "options": item.options,
                "synonyms": item.synonyms,
                "seen": item.seen,
                "prompt_id": item.prompt_id,
                **({"constraints": item.constraints} if item.constraints else {}),
            }
            for item in task.instances
        ),
    )


FORMS = {
    "jsonl": "jsonl:FILE",
    "dynamic-superb": "dynamic-superb:FOLDER_OR_HUB_ID",
    "desta": "desta:FILE",
    "speech-ifeval": "speech-ifeval:FILE_OR_FOLDER",
    "ifeval": "ifeval:RUN",
    "general": "general[:NAME]",
    "safety": "safety[:FILE]",
    "safety-spoken": "safety-spoken[:FILE]",
}


def load_tasks(spec: str) -> list[Task]:
    """Tasks from a reference of one of `FORMS` (or a path that ends in .jsonl). Bad rows are kept in the task's `rejects`.

    Raises `UserError` for an unknown form, a missing file, or one without a usable row.
    """
    kind, _, rest = spec.partition(":")
    if kind == "jsonl" and rest:
        return _load_jsonl(Path(rest))
    if kind == "dynamic-superb" and rest:
        from eval.dynamic_superb import dynamic_superb_tasks

        return dynamic_superb_tasks(rest)
    if kind == "desta" and rest:
        from eval.desta_rows import desta_task

        return [desta_task(Path(rest))]
    if kind == "speech-ifeval" and rest:
        from eval.speech_ifeval import speech_ifeval_tasks

        return speech_ifeval_tasks(Path(rest))
    if kind == "ifeval" and rest:
        from eval.ifeval_set import run_tasks

        return run_tasks(Path(rest))
    if kind == "general":
        from eval.general import general_tasks

        return general_tasks([rest] if rest else None)
    if kind in ("safety", "safety-spoken"):
        from eval.safety import read_requests, safety_tasks
        from speech_llm.assets import cache_dir

        rejects: list[dict[str, Any]] = []
        requests = read_requests(Path(rest), rejects) if rest else None
        tasks = safety_tasks(requests, spoken=cache_dir() / "spoken" if kind.endswith("spoken") else None)
        tasks[0].rejects = rejects
        return tasks
    if spec.endswith(".jsonl"):
        return _load_jsonl(Path(spec))
    raise UserError(
        f"unknown task {spec!r}; give one of {', '.join(FORMS.values())}.{nearest(kind, list(FORMS))}"
    )


def _load_jsonl(path: Path) -> list[Task]:
    rejects: list[dict[str, Any]] = []
    tasks: dict[str, Task] = {}
    ids: set[tuple[str, str]] = set()

    def reject(number: int, reason: str) -> None:
        rejects.append({"file": str(path), "line": number, "reason": reason})

    for number, row in read_jsonl(path, lambda n, _text, reason: reject(n, reason)):
        try:
            instance, dimension = _instance(row, path, number)
        except (ValueError, TypeError, AttributeError) as error:
            reject(number, str(error))
            continue
        if (instance.task, instance.id) in ids:
            reject(number, f"the id {instance.id!r} occurs twice in task {instance.task!r}")
            continue
        ids.add((instance.task, instance.id))
        task = tasks.setdefault(
            instance.task, Task(instance.task, dimension, [], instance.metric, instance.options)
        )
        task.instances.append(instance)
    if not tasks:
        why = f" (line {rejects[0]['line']}: {rejects[0]['reason']})" if rejects else ""
        raise UserError(f"{path}: there is no usable instance{why}")
    next(iter(tasks.values())).rejects = rejects
    return list(tasks.values())


def _instance(row: dict[str, Any], path: Path, number: int) -> tuple[Instance, str]:
    messages, label = row.get("messages"), row.get("label")
    metric = str(row.get("metric") or ("option" if row.get("options") else "exact"))
    if not isinstance(messages, list) or not messages or messages[-1].get("role") != "user":
        raise ValueError("'messages' must be a list that ends with a user turn")
    if label is None:
        raise ValueError("there is no 'label'")
    if metric not in METRICS:
        raise ValueError(f"unknown metric {metric!r}; choose one of {', '.join(METRICS)}")
    options = row.get("options")
    if metric in ("option", "choice"):
        if not isinstance(options, Sequence) or isinstance(options, str) or len(options) < 2:
            raise ValueError(f"metric {metric!r} needs a list 'options' of at least two")
        if label not in options:
            raise ValueError(f"the label {label!r} is not among the options {options}")
    if metric == "number":
        try:
            float(label)
        except (TypeError, ValueError):
            raise ValueError(f"metric 'number' needs a number as the label, not {label!r}") from None
    contents = [message.get("content") for message in messages]
    parts = [part for content in contents if isinstance(content, list) for part in content]
    if any(part.get("type") == "text" and not isinstance(part.get("text"), str) for part in parts):
        raise ValueError("a text part has no 'text'")
    synonyms = row.get("synonyms")
    if synonyms is not None and not (
        isinstance(synonyms, dict)
        and all(
            isinstance(words, list) and all(isinstance(word, str) for word in words)
            for words in synonyms.values()
        )
    ):
        raise ValueError('\'synonyms\' must tell of options other words for them, as {"female": ["woman"]}')
    for part in audio_parts(messages):
        if not part.get("path"):
            raise ValueError("an audio part has no 'path'")
        if not Path(part["path"]).is_absolute():
            part["path"] = str((path.parent / part["path"]).resolve())
        if not Path(part["path"]).exists():
            raise ValueError(f"{part['path']}: no such audio file")
    instance = Instance(
        id=str(row.get("id") or f"{path.stem}-{number}"),
        messages=messages,
        label=str(label),
        task=str(row.get("task") or path.stem),
        metric=metric,
        options=[str(option) for option in options] if options else None,
        synonyms=synonyms,
        seen=row.get("seen"),
        prompt_id=row.get("prompt_id"),
        constraints=list(row.get("constraints") or []),
    )
    return instance, str(row.get("dimension") or "")
