"""Real text rows: from a file of ours, a hub dataset or the package, in an order of chance, without holding them all.

In: a source of the mixture (`replay` or `safety`) and a budget. Out: Examples without sound.
"""

from __future__ import annotations

import json
import random
from array import array
from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from speech_llm.errors import UserError, nearest
from speech_llm.examples import Example, example_from_row, hub_turns
from speech_llm.files import explain_os_error
from speech_llm.mixture.share import Budget, promised

if TYPE_CHECKING:
    from speech_llm.recipe_mixture import Replay, Safety

PACKAGED = {name: Path(__file__).parent / f"{name}.jsonl" for name in ("general", "safety")}
REFUSAL, LOOK_ALIKE = "refusal", "look_alike"
# Rows of a stream that are held at a time, to be drawn from by chance.
STREAM_BUFFER = 1000


@dataclass
class TextRows:
    """Rows of one place in an order of chance; iterating again gives the same order.

    `dropped` counts what could not be used, by reason, of the latest pass.
    """

    file: Path | None
    dataset: str | None
    subset: str | None
    split: str
    columns: Mapping[str, str]
    seed: int
    dropped: Counter[str] = field(default_factory=Counter)

    @property
    def name(self) -> str:
        """What `source.dataset` of a row says."""
        if self.file is None:
            return str(self.dataset)
        return self.file.stem if self.file in PACKAGED.values() else str(self.file)

    def __iter__(self) -> Iterator[Example]:
        self.dropped.clear()
        rows = self._file_rows(self.file) if self.file is not None else self._stream()
        for identity, row in rows:
            try:
                example = example_from_row(self._mapped(row))
                if example.audio_parts():
                    raise ValueError("it has sound")
                if not example.messages:
                    raise ValueError("it has no messages")
                for turn in example.messages:
                    if not isinstance(turn["content"], str) or not turn["content"].strip():
                        raise ValueError(f"a turn of the {turn['role']} is empty or not text")
            except (ValueError, AttributeError, TypeError) as error:
                self.dropped[str(error)] += 1
                continue
            example.id = example.id or identity
            example.source = {**example.source, "dataset": self.name, "row": example.id}
            yield example

    def _mapped(self, row: dict[str, Any]) -> dict[str, Any]:
        """The row in our own form, by the columns that the recipe names."""
        if "messages" in self.columns:
            row = {**row, "messages": row.get(self.columns["messages"])}
        elif self.columns:
            turns = []
            for role in ("system", "user", "assistant"):
                column = self.columns.get(role)
                if column is not None and column not in row:
                    raise ValueError(
                        f"it has no column {column!r}.{nearest(column, [str(name) for name in row])}"
                    )
                if column is not None and (role != "system" or row[column]):
                    turns.append({"role": role, "content": row[column]})
            row = {"id": row.get("id"), "messages": turns}
        row = {**row, "messages": hub_turns(row.get("messages"))}
        # Other columns of a dataset may be called as an Example's parts are, and mean something else.
        return {key: row[key] for key in ("id", "messages", "source") if row.get(key) is not None}

    def _file_rows(self, path: Path) -> Iterator[tuple[str, dict[str, Any]]]:
        """Lines in an order of chance; only where each begins is held (8 bytes a line)."""
        try:
            with open(path, "rb") as handle:
                starts = array("Q")
                place = 0
                for line in handle:
                    if line.strip():
                        starts.append(place)
                    place += len(line)
                numbers = array("Q", range(len(starts)))
                random.Random(f"{self.seed}-rows").shuffle(numbers)
                for number in numbers:
                    handle.seek(starts[number])
                    try:
                        row = json.loads(handle.readline())
                    except ValueError:
                        self.dropped["the line is not JSON"] += 1
                        continue
                    if not isinstance(row, dict):
                        self.dropped["the line is not a JSON object"] += 1
                        continue
                    yield f"{path.stem}-{number + 1}", row
        except FileNotFoundError:
            raise UserError(f"{path}: no such file of text rows (mixture.sources, rows)") from None
        except OSError as error:
            raise explain_os_error(error, path) from error

    def _stream(self) -> Iterator[tuple[str, dict[str, Any]]]:
        """Rows of a dataset as they come, drawn from a buffer by chance; a hub's is never fetched whole."""
        import datasets

        where = f"{self.dataset}" + (f" ({self.subset})" if self.subset else "")
        try:
            loaded = datasets.load_dataset(self.dataset, self.subset, split=self.split, streaming=True)
            first = loaded.features or {}
        except Exception as error:  # the library raises many kinds: no network, no such name, no such split
            said = " ".join(str(error).split())[:300]
            raise UserError(
                f"mixture: {where}, split {self.split}: not a dataset that could be loaded ({said}); give a local folder "
                "in the hub's form, or a JSONL file as rows"
            ) from None
        for column in self.columns.values():
            if first and column not in first:
                raise UserError(f"mixture: {where} has no column {column!r}; it has: {', '.join(first)}")
        shuffled = loaded.shuffle(seed=self.seed, buffer_size=STREAM_BUFFER)
        for number, row in enumerate(shuffled, start=1):
            yield f"row-{number}", row


def text_rows(settings: Replay | Safety, file: Path | None, dataset: str | None, seed: int) -> TextRows:
    """The rows that a source names; `file`, `dataset`: where it says that they lie. Without either, the package's own."""
    if file is None and dataset is None:
        file = PACKAGED["general" if settings.type == "replay" else "safety"]
    columns = {str(role): column for role, column in settings.columns.items()}
    return TextRows(file, dataset, settings.subset, settings.split, columns, seed)


def fill_replay(budget: Budget, rows: TextRows, repeat: bool, kind: str | None = None) -> Counter[str]:
    """Put real rows (of one kind) into the budget until it is full; returns what was dropped, by reason.

    Raises `UserError` when there are too few and they may not be repeated.
    """
    passes = 0
    dropped: Counter[str] = Counter()
    while not budget.full:
        met = 0
        for example in rows:
            if kind is not None and kind_of(example) != kind:
                continue
            met += 1
            if passes:
                example.id += f"#{passes + 1}"
            budget.put(example)
            if budget.full:
                break
        passes += 1
        dropped = dropped or Counter(rows.dropped)
        if not budget.full and (not repeat or met == 0):
            of_kind = f" of kind {kind}" if kind else ""
            reasons = ", ".join(f"{reason}: {count}" for reason, count in rows.dropped.most_common(3))
            raise UserError(
                f"mixture: {rows.name} has {met} usable rows{of_kind}, but {budget} are promised; "
                + ("lower the ratio or " if met else "")
                + "name another file or dataset"
                + (", or set repeat: true to go through them again" if met else "")
                + (f" (not usable: {reasons})" if reasons else "")
            )
    return dropped


def kind_of(example: Example) -> str:
    """Whether a safety row is a refusal or a look-alike; rows that do not say are refusals."""
    return LOOK_ALIKE if example.source.get("kind") == LOOK_ALIKE else REFUSAL


def fill_safety(budget: Budget, settings: Safety, rows: TextRows) -> Counter[str]:
    """Refusals and look-alikes in the shares that the recipe says; look-alikes are the package's where the rows have none."""
    refusals = budget.like(promised(round(1 - settings.look_alikes, 9), budget.wanted))
    dropped = fill_replay(refusals, rows, settings.repeat, REFUSAL)
    answered = budget.like(max(0, budget.wanted - refusals.taken))
    if not answered.full:
        own = rows if any(kind_of(example) == LOOK_ALIKE for example in _some(rows)) else None
        packaged = TextRows(PACKAGED["safety"], None, None, "train", {}, rows.seed)
        dropped += fill_replay(answered, own or packaged, settings.repeat, LOOK_ALIKE)
    budget.fill([*refusals.rows, *answered.rows])
    return dropped


def _some(rows: TextRows) -> Iterator[Example]:
    """The first rows, enough to tell whether there are look-alikes among them."""
    for number, example in enumerate(rows):
        if number >= STREAM_BUFFER:
            return
        yield example
