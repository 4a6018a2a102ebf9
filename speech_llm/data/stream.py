"""Training on rows that are rendered when their step comes: it begins at once and takes no more memory however many they are.

In: places of rows (see `shards`). Out: a training set that holds one step at a time, and the steps.

A step is `step_rows` rows. Those of indexed places are drawn from all of them together: each epoch goes through every block of
`BLOCK_ROWS` rows once, in an order that is a pure function of the seed, so that a resumed run knows its place; rows of one clip lie side by
side in what the targets stage writes, and so share their clip. Of a streamed dataset each step takes the next rows. Every process plans the
same steps, and each batch of a step is trained on by one of them: two processes do what one does, and no row twice.
"""

from __future__ import annotations

import contextlib
import random
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from speech_llm.data.features import FeatureStore
from speech_llm.data.packing import Pack, Row, plan_epoch
from speech_llm.data.shards import IndexedRows, JsonlRows, StreamedRows, example_of, open_files, shard_files
from speech_llm.errors import UserError, nearest
from speech_llm.examples import Example
from speech_llm.files import JsonlAppender

BLOCK_ROWS = 8
# Rows of a place that are looked at before it is said to have no column of a name.
_LOOKED_AT = 8
Found = tuple[str, dict[str, Any], Path | None]


@dataclass
class Place:
    """One place of rows and what its columns are."""

    rows: IndexedRows
    columns: dict[str, str] = field(default_factory=dict)


@dataclass
class Stream:
    """One streamed dataset, and how many rows of it each step takes."""

    rows: StreamedRows
    columns: dict[str, str]
    share: float


class RowPool:
    """All rows of a recipe: which of them a step takes."""

    def __init__(
        self, places: Sequence[Place], streams: Sequence[Stream], step_rows: int, seed: int, clips: Path
    ) -> None:
        self.places, self.streams, self.seed, self.clips = list(places), list(streams), seed, clips
        self.ends = np.cumsum([len(place.rows) for place in places], dtype=np.int64)
        self.total = int(self.ends[-1]) if len(self.ends) else 0
        self.of_streams = [max(1, round(stream.share * step_rows)) for stream in streams]
        indexed = step_rows - sum(self.of_streams) if self.total else 0
        if self.total and indexed < 1:
            raise UserError(
                f"data.rows: the streams take all of the {step_rows} rows of a step (share), so that none is left for the other "
                "rows; lower their share or raise data.step_rows"
            )
        self.blocks_per_step = max(1, indexed // BLOCK_ROWS)
        self.blocks = -(-self.total // BLOCK_ROWS)
        self._order: tuple[int, np.ndarray] = (-1, np.zeros(0, np.int64))

    def steps_per_epoch(self) -> int | None:
        """Steps that go through every indexed row once; None where all rows are streamed."""
        return -(-self.blocks // self.blocks_per_step) if self.total else None

    def numbers(self, step: int) -> tuple[int, list[int]]:
        """The epoch (from 0) of a step and the numbers of its indexed rows."""
        steps = self.steps_per_epoch()
        if steps is None:
            return 0, []
        epoch, place = divmod(step, steps)
        if self._order[0] != epoch:
            order = np.random.default_rng([self.seed, epoch]).permutation(self.blocks)
            self._order = (epoch, order)
        chosen = self._order[1][place * self.blocks_per_step : (place + 1) * self.blocks_per_step]
        return epoch, [
            number
            for block in chosen.tolist()
            for number in range(block * BLOCK_ROWS, min((block + 1) * BLOCK_ROWS, self.total))
        ]

    def examples(self, step: int, rejects: list[dict[str, Any]]) -> list[Example]:
        """The Examples of a step; what is none goes to `rejects` with its reason."""
        made = []
        for found, columns in self._rows(step, rejects):
            try:
                made.append(example_of(*found, columns, self.clips))
            except (ValueError, AttributeError, TypeError) as error:  # noqa: PERF203 (one bad row must not end the step)
                rejects.append({"id": found[0], "reason": str(error)})
        return made

    def _rows(self, step: int, rejects: list[dict[str, Any]]) -> Iterator[tuple[Found, dict[str, str]]]:
        for number in self.numbers(step)[1]:
            which = int(np.searchsorted(self.ends, number, side="right"))
            place = self.places[which]
            own = number - (int(self.ends[which - 1]) if which else 0)
            try:
                yield place.rows.row(own), place.columns
            except ValueError as error:
                rejects.append({"id": f"row {own + 1} of place {which + 1}", "reason": str(error)})
        for stream, taken in zip(self.streams, self.of_streams, strict=True):
            for number in range(step * taken, (step + 1) * taken):
                block, inside = divmod(number, stream.rows.block_rows)
                rows = stream.rows.block(block)
                order = list(range(len(rows)))
                random.Random(f"{self.seed}-{block}").shuffle(order)
                yield rows[order[inside]], stream.columns


class StreamedSet:
    """What a `TrainingSet` is, of the step that is being trained on: its packs by number, and what is known of their rows."""

    def __init__(self, pool: RowPool, processor: Any, features: FeatureStore, rejects: Path | None) -> None:
        self.pool, self.processor, self.features = pool, processor, features
        self.packs: dict[int, Pack] = {}
        self.prefix: list[int] = []
        self.rows: dict[str, Row] = {}
        self.teacher: dict[str, Row] = {}
        self.examples: dict[str, Example] = {}
        # What an earlier part of this run, killed since, set aside is not set aside again.
        self._appender = None if rejects is None else JsonlAppender(rejects)
        self.rejects: list[dict[str, Any]] = list(self._appender.rows) if self._appender else []
        self._told = {str(row) for row in self.rejects}

    def render(self, step: int, batch_tokens: int, seed: int, **settings: Any) -> list[list[int]]:
        """Make a step the one that is held; returns its batches of pack numbers."""
        from speech_llm.training.rows import build_training_set

        rejects: list[dict[str, Any]] = []
        examples = self.pool.examples(step, rejects)
        self.features.forget()
        made = build_training_set(
            examples, self.processor, self.features, use_prefix=False, progress=False, **settings
        )
        self.packs = dict(enumerate(made.packs))
        self.rows, self.teacher, self.examples = made.rows, made.teacher, made.examples
        for row in [*rejects, *made.rejects]:
            self._set_aside(row)
        return plan_epoch(made.packs, batch_tokens, seed, step)

    def told(self) -> str:
        """What an epoch is, in a sentence."""
        pool = self.pool
        names = ", ".join(stream.rows.name for stream in pool.streams)
        streamed = f", and {sum(pool.of_streams)} rows a step as they come from {names}" if names else ""
        steps = pool.steps_per_epoch()
        return f"{pool.total:,} rows of {len(pool.places)} places in {steps or 1:,} steps{streamed}; rendered step by step"

    def _set_aside(self, row: dict[str, Any]) -> None:
        if str(row) in self._told:
            return
        self._told.add(str(row))
        self.rejects.append(row)
        if self._appender is not None:
            self._appender.append(row)


class LazyStep:
    """(epoch, batches) of a step, whose batches are made when they are asked for."""

    def __init__(self, steps: StreamedSteps, number: int) -> None:
        self.steps, self.number = steps, number

    def __getitem__(self, place: int) -> Any:
        return self.steps.data.pool.numbers(self.number)[0] if place == 0 else self.steps.batches(self.number)

    def __iter__(self) -> Iterator[Any]:
        yield self[0]
        yield self[1]


class StreamedSteps:
    """The steps of a run, each rendered when it comes."""

    def __init__(self, data: StreamedSet, total: int, batch_tokens: int, seed: int, **settings: Any) -> None:
        self.data, self.total, self.batch_tokens, self.seed, self.settings = (
            data,
            total,
            batch_tokens,
            seed,
            settings,
        )
        self._held: tuple[int, list[list[int]]] = (-1, [])

    def __len__(self) -> int:
        return self.total

    def __getitem__(self, number: int) -> LazyStep:
        if not 0 <= number < self.total:
            raise IndexError(number)
        return LazyStep(self, number)

    def batches(self, number: int) -> list[list[int]]:
        if self._held[0] != number:
            self._held = (number, self.data.render(number, self.batch_tokens, self.seed, **self.settings))
        return self._held[1]


def open_pool(recipe: Any, files: Sequence[Path], out_dir: Path) -> RowPool:
    """The rows of JSONL `files` and of the recipe's `data.rows`. Raises `UserError` for a place that is not there."""
    data = recipe.data
    places = [Place(JsonlRows(file)) for file in files]
    named = [source for source in data.rows if source.dataset is not None]
    for source in data.rows:
        if source.path is not None:
            opened = open_files(shard_files(source.path, recipe.resolve_path(source.path)))
            places += [Place(rows, dict(source.columns)) for rows in opened]
    indexed = sum(len(place.rows) for place in places)
    streams = []
    for number, source in enumerate(named):
        folder = recipe.resolve_path(source.dataset)
        share = (
            source.share
            if source.share is not None
            else (0.5 / len(named) if indexed else 1 / max(1, len(named)))
        )
        rows = StreamedRows(
            str(folder) if folder.is_dir() else source.dataset,
            source.subset,
            source.split,
            max(64, data.step_rows),
            out_dir / "stream" / str(number),
        )
        streams.append(Stream(rows, dict(source.columns), share))
    if not indexed and not streams:
        raise UserError(f"{recipe.path}: there is no row to train on")
    for place in places:
        _check_columns(place)
    return RowPool(
        [place for place in places if len(place.rows)],
        streams,
        data.step_rows,
        recipe.seed,
        out_dir / "clips",
    )


def _check_columns(place: Place) -> None:
    """Raise `UserError` when none of the first rows has the columns that the recipe names: a slip, and no bad rows."""
    found: dict[str, None] = {}
    for number in range(min(_LOOKED_AT, len(place.rows)) if place.columns else 0):
        with contextlib.suppress(ValueError):
            _, row, _ = place.rows.row(number)
            if all(column in row for column in place.columns.values()):
                return
            found.update(dict.fromkeys(map(str, row)))
    for column in place.columns.values():
        if found and column not in found:
            raise UserError(
                f"data.rows: there is no column {column!r}; its rows have {', '.join(found)}.{nearest(column, list(found))}"
            )


def open_stream(
    recipe: Any, files: Sequence[Path], processor: Any, features: FeatureStore, out_dir: Path, main: bool
) -> tuple[StreamedSet, StreamedSteps]:
    """The training set and steps of a recipe that streams: the rows of `files`, and of `data.rows`."""
    from speech_llm.data.packing import TEXT_PACK_TOKENS

    settings = recipe.optimizer
    pool = open_pool(recipe, files, out_dir)
    data = StreamedSet(pool, processor, features, out_dir / "rejects.jsonl" if main else None)
    each = pool.steps_per_epoch()
    if each is None and settings.max_steps is None:
        raise UserError(
            f"{recipe.path}: every row comes from a stream, which has no end that is known; give optimizer.max_steps"
        )
    total = each * settings.epochs if each is not None else int(settings.max_steps)
    steps = StreamedSteps(
        data,
        total if settings.max_steps is None else min(total, settings.max_steps),
        settings.batch_tokens,
        recipe.seed,
        max_tokens=settings.max_tokens,
        style=recipe.style,
        needs_context=recipe.loss.asks_base,
        text_tokens=min(TEXT_PACK_TOKENS, settings.batch_tokens),
    )
    return data, steps
