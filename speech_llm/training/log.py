"""The log of a training run, one JSON line per step and probe; a resumed run cuts it back to its checkpoint."""

from __future__ import annotations

import resource
from pathlib import Path
from typing import Any

import torch

from speech_llm.files import JsonlAppender, write_jsonl

# What a row tells of the machine and not of the training: two runs of one recipe differ in these fields only.
MEASURED = ("seconds", "rows_per_s", "answer_tokens_per_s", "wait_s", "memory_mb", "probe_seconds")


def memory_mb() -> int:
    """The most memory that this process held so far: of its GPU where there is one, else of the machine."""
    if torch.cuda.is_available():
        return round(torch.cuda.max_memory_allocated() / 2**20)
    return round(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024)


class TrainingLog:
    """Rows appended to a file; `rows` counts them. Without a path (a process that does not write) they are only counted."""

    def __init__(self, path: Path | None, kept: int) -> None:
        """`kept`: how many of the rows that are there already belong to the run that goes on."""
        self.rows = kept
        self._file: JsonlAppender | None = None
        if path is None:
            return
        self._file = JsonlAppender(path)
        if len(self._file.rows) != kept:
            before = self._file.rows[:kept]
            self._file.close()
            write_jsonl(path, before)
            self._file = JsonlAppender(path)
            self.rows = len(before)

    def write(self, row: dict[str, Any]) -> None:
        self.rows += 1
        if self._file is not None:
            self._file.append(row)

    def close(self) -> None:
        if self._file is not None:
            self._file.close()
