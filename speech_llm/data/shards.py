"""Rows of Examples that are too many to hold: sharded files by index, datasets as a stream.

In: the places that `data.rows` names. Out: for indexed places any row by its number, for streamed ones the rows block by block.

    JSONL       where each line begins is held (8 bytes a row)
    parquet     converted to arrow files once, which are mapped into memory
    arrow       mapped into memory
    tar         WebDataset's form: KEY.json and the sounds that it names, or KEY.flac beside it; where each begins is held
    dataset     a hub id or a folder in the hub's form, streamed: nothing is fetched whole

A row is an Example (ours or DeSTA's), or `columns` says which of its columns are what. Sound inside a shard is written to a
folder when its row is read, named by its content.
"""

from __future__ import annotations

import glob
import hashlib
import json
import os
import tarfile
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from speech_llm.audio import SUFFIXES
from speech_llm.errors import UserError, nearest
from speech_llm.examples import Example, example_from_row, hub_turns
from speech_llm.files import atomic_write, explain_os_error

KINDS = (".jsonl", ".parquet", ".arrow", ".tar")
# Places in a stream that are kept, the latest of them all and of those before one in so many.
KEPT_BLOCKS = 512
# Blocks in which lines are looked for.
_READ_BYTES = 1 << 22


class IndexedRows(Protocol):
    """Rows of which each can be had by its number."""

    def __len__(self) -> int: ...

    def row(self, number: int) -> tuple[str, dict[str, Any], Path | None]:
        """Id, values, and the folder that paths start from. Raises `ValueError` for a row that cannot be read."""


class JsonlRows:
    """Lines of a JSONL file."""

    def __init__(self, path: Path) -> None:
        self.path = path
        try:
            self._starts = _line_starts(path)
        except OSError as error:
            raise explain_os_error(error, path) from error

    def __len__(self) -> int:
        return len(self._starts)

    def row(self, number: int) -> tuple[str, dict[str, Any], Path | None]:
        with open(self.path, "rb") as handle:
            handle.seek(int(self._starts[number]))
            try:
                row = json.loads(handle.readline())
            except ValueError:
                raise ValueError("the line is not JSON") from None
        return f"{self.path.stem}-{number + 1}", _checked(row), self.path.parent


class ArrowRows:
    """Rows of parquet or arrow files, mapped into memory by the `datasets` library."""

    def __init__(self, paths: Sequence[Path]) -> None:
        import datasets

        from speech_llm.assets import cache_dir

        self.path = paths[0]
        kind = self.path.suffix[1:]
        try:
            table = datasets.load_dataset(
                kind,
                data_files=[str(path) for path in paths],
                split="train",
                cache_dir=str(cache_dir() / "datasets"),
            )
        except Exception as error:  # the library raises many kinds
            raise UserError(
                f"{self.path}: not {kind} files that could be loaded ({_one_line(error)})"
            ) from None
        self._table = _undecoded(table)

    def __len__(self) -> int:
        return len(self._table)

    def row(self, number: int) -> tuple[str, dict[str, Any], Path | None]:
        return f"{self.path.stem}-{number + 1}", _checked(self._table[number]), self.path.parent


class TarRows:
    """Samples of a tar file: members of one key, up to the first dot of their names, belong together."""

    def __init__(self, path: Path) -> None:
        self.path = path
        # (key, where its json lies, where sounds lie by suffix); sizes and offsets, no contents.
        self._samples: dict[str, dict[str, tuple[int, int]]] = {}
        try:
            with tarfile.open(path, "r:") as archive:
                for member in archive:
                    if member.isfile():
                        folder, _, name = member.name.rpartition("/")
                        key, _, suffix = name.partition(".")
                        place = (member.offset_data, member.size)
                        self._samples.setdefault(f"{folder}/{key}" if folder else key, {})[
                            f".{suffix}".lower()
                        ] = place
        except (tarfile.TarError, OSError) as error:
            raise UserError(f"{path}: not a tar file that can be read ({_one_line(error)})") from None
        self._keys = [key for key, found in self._samples.items() if ".json" in found]

    def __len__(self) -> int:
        return len(self._keys)

    def row(self, number: int) -> tuple[str, dict[str, Any], Path | None]:
        key = self._keys[number]
        found = self._samples[key]
        try:
            row = _checked(json.loads(self._bytes(found[".json"])))
        except ValueError:
            raise ValueError("the member .json is not a JSON object") from None
        row = {"id": key, **row}
        sounds = {s: p for s, p in found.items() if s in SUFFIXES}
        row = _with_sounds(row, lambda name: self._member(key, name))
        if sounds and "audio" not in row and not row.get("audios"):
            suffix, place = next(iter(sounds.items()))
            row["audio"] = {"path": f"{key}{suffix}", "bytes": self._bytes(place)}
        return key, row, None

    def _member(self, key: str, name: str) -> dict[str, Any] | None:
        """The sound that a row names, by its member's name (with or without its folder)."""
        folder = key.rpartition("/")[0]
        for whole in (name, f"{folder}/{name}"):
            start, _, last = whole.rpartition("/")
            own, _, suffix = last.partition(".")
            place = self._samples.get(f"{start}/{own}" if start else own, {}).get(f".{suffix}".lower())
            if place is not None:
                return {"path": name, "bytes": self._bytes(place)}
        return None

    def _bytes(self, place: tuple[int, int]) -> bytes:
        with open(self.path, "rb") as handle:
            handle.seek(place[0])
            return handle.read(place[1])


def shard_files(reference: str, path: Path) -> list[Path]:
    """The files that one `path` of `data.rows` names. Raises `UserError` when there is none, or one of another kind."""
    if glob.has_magic(reference):
        files = [Path(found) for found in sorted(glob.glob(str(path), recursive=True))]
    elif path.is_dir():
        files = [file for file in sorted(path.rglob("*")) if file.suffix in KINDS]
    else:
        files = [path]
    if not files or not all(file.is_file() for file in files):
        raise UserError(f"data.rows: {path}: no such file, or no shards in it ({', '.join(KINDS)})")
    strange = next((file for file in files if file.suffix not in KINDS), None)
    if strange is not None:
        raise UserError(f"data.rows: {strange}: rows are read from {', '.join(KINDS)} files")
    return files


def open_files(files: Sequence[Path]) -> list[IndexedRows]:
    """The rows of shards."""
    places: list[IndexedRows] = []
    for kind in (".parquet", ".arrow"):
        own = [file for file in files if file.suffix == kind]
        if own:
            places.append(ArrowRows(own))
    places += [JsonlRows(file) for file in files if file.suffix == ".jsonl"]
    places += [TarRows(file) for file in files if file.suffix == ".tar"]
    return places


class StreamedRows:
    """Rows of a dataset in the order in which they come, block by block; at its end it begins again.

    Where each block begins is kept in `folder`, so that a resumed run does not read the stream from its beginning.
    """

    def __init__(self, dataset: str, subset: str | None, split: str, block_rows: int, folder: Path) -> None:
        import datasets

        self.name, self.block_rows, self.folder = dataset, block_rows, folder
        try:
            stream = datasets.load_dataset(dataset, subset, split=split, streaming=True)
        except Exception as error:  # no network, no such name, no such split, ...
            raise UserError(
                f"data.rows: {dataset}, split {split}: not a dataset that could be loaded ({_one_line(error)}); give a local "
                "folder in the hub's form, or shards as path"
            ) from None
        self._stream: Any = _undecoded(stream)
        self._base = Path(dataset) if Path(dataset).is_dir() else None
        self._next: int | None = None
        self._rows: Iterator[dict[str, Any]] = iter(())
        self._held: tuple[int, list[tuple[str, dict[str, Any], Path | None]]] = (-1, [])

    def block(self, number: int) -> list[tuple[str, dict[str, Any], Path | None]]:
        """Id, values and folder of the rows of a block; the same block is always the same rows."""
        if self._held[0] == number:
            return self._held[1]
        if self._next != number:
            self._seek(number)
        rows: list[tuple[str, dict[str, Any], Path | None]] = []
        restarted = False
        while len(rows) < self.block_rows:
            row = next(self._rows, None)
            if row is None:
                if restarted and not rows:
                    raise UserError(f"data.rows: {self.name} has no rows")
                restarted = True
                self._begin()
                continue
            place = number * self.block_rows + len(rows) + 1
            rows.append((f"{Path(self.name).name}-{place}", row, self._base))
        self._next = number + 1
        self._keep(number + 1)
        self._held = (number, rows)
        return rows

    def _begin(self) -> None:
        # A new iterator of a stream that was iterated before begins anew only from its first state.
        self._stream.load_state_dict(self._first_state())
        self._rows = iter(self._stream)

    def _first_state(self) -> dict[str, Any]:
        if not hasattr(self, "_origin"):
            self._origin = json.dumps(self._stream.state_dict())
        return json.loads(self._origin)

    def _seek(self, number: int) -> None:
        """Go to where a block begins: to the nearest place before it that is kept, and on from there."""
        self._first_state()
        kept = sorted(int(file.stem) for file in self.folder.glob("*.json")) if self.folder.is_dir() else []
        before = max((place for place in kept if place <= number), default=0)
        if before:
            self._stream.load_state_dict(json.loads((self.folder / f"{before}.json").read_text()))
            self._rows = iter(self._stream)
        else:
            self._begin()
        self._next = before
        while self._next < number:
            self.block(self._next)

    def _keep(self, number: int) -> None:
        path = self.folder / f"{number}.json"
        old = number - KEPT_BLOCKS
        if old % KEPT_BLOCKS:
            (self.folder / f"{old}.json").unlink(missing_ok=True)
        if not path.exists():
            with atomic_write(path) as handle:
                json.dump(self._stream.state_dict(), handle)


def example_of(
    identity: str, row: dict[str, Any], base: Path | None, columns: Mapping[str, str], clips: Path
) -> Example:
    """A row as an Example, its sounds as files. Raises `ValueError` with a sentence when it is none."""
    row = _mapped(row, columns) if columns else row
    row = _written(row, clips)
    if "messages" in row:
        row = {**row, "messages": hub_turns(row["messages"])}
    if isinstance(row.get("audio"), (str, dict)) and not row.get("audios"):
        row = {**row, "audios": [row["audio"]]}
    example = example_from_row({k: v for k, v in row.items() if v is not None}, base)
    example.id = example.id or identity
    return example


def _mapped(row: dict[str, Any], columns: Mapping[str, str]) -> dict[str, Any]:
    """The row in our own form, by the columns that the recipe names."""
    for column in columns.values():
        if column not in row:
            raise ValueError(f"it has no column {column!r}.{nearest(column, [str(name) for name in row])}")
    out = {
        name: row[columns[name]] for name in ("id", "messages", "text", "context", "audio") if name in columns
    }
    out.setdefault("id", row.get("id"))
    if "assistant" in columns:
        mark = "<|AUDIO|>" if out.get("audio") is not None else ""
        system = _cell(row, columns["system"]) if columns.get("system") else ""
        turns = [{"role": "system", "content": system}] if system else []
        asked = _cell(row, columns["user"]) if "user" in columns else ""
        if "user" in columns and not asked:
            raise ValueError(f"its column {columns['user']!r} is empty")
        turns.append({"role": "user", "content": f"{mark}{asked}"})
        turns.append({"role": "assistant", "content": _cell(row, columns["assistant"])})
        out["messages"] = turns
    return out


def _cell(row: dict[str, Any], column: str) -> str:
    """A cell's text; nothing where it is null or NaN, which a table has where it has nothing."""
    value = row[column]
    if value is None or (isinstance(value, float) and value != value):
        return ""
    if isinstance(value, (list, dict)):
        raise ValueError(f"its column {column!r} is no text")
    return str(value).strip()


def _written(value: Any, clips: Path) -> Any:
    """The same with `{"bytes", "path"}` of a sound replaced by the path of a file that holds it."""
    if isinstance(value, dict):
        if isinstance(value.get("bytes"), bytes):
            data = value["bytes"]
            suffix = Path(str(value.get("path") or "")).suffix.lower()
            name = f"{hashlib.sha256(data).hexdigest()[:32]}{suffix if suffix in SUFFIXES else '.wav'}"
            path = clips / name[:2] / name
            if not path.exists():
                with atomic_write(path, "wb") as handle:
                    handle.write(data)
            rest = {k: v for k, v in value.items() if k not in ("bytes", "path")}
            return {**rest, "path": os.path.abspath(path)}
        return {key: _written(item, clips) for key, item in value.items()}
    return [_written(item, clips) for item in value] if isinstance(value, list) else value


def _with_sounds(value: Any, find: Any) -> Any:
    """The same with every sound that a tar's row names replaced by its bytes."""
    if isinstance(value, dict):
        named = value.get("path") or value.get("audio")
        if isinstance(named, str) and Path(named).suffix.lower() in SUFFIXES:
            found = find(named)
            if found is not None:
                rest = {k: v for k, v in value.items() if k not in ("path", "audio")}
                return {**rest, **found}
        return {key: _with_sounds(item, find) for key, item in value.items()}
    return [_with_sounds(item, find) for item in value] if isinstance(value, list) else value


def _undecoded(table: Any) -> Any:
    """Audio columns as bytes and path: sound is decoded by `speech_llm.audio` alone."""
    import datasets

    for name, feature in (table.features or {}).items():
        if isinstance(feature, datasets.Audio):
            table = table.cast_column(name, datasets.Audio(decode=False))
    return table


def _line_starts(path: Path) -> np.ndarray:
    """Where each line begins that is not empty, in bytes."""
    ends = []
    size = 0
    with open(path, "rb") as handle:
        while block := handle.read(_READ_BYTES):
            ends.append(np.flatnonzero(np.frombuffer(block, np.uint8) == 10) + size)
            size += len(block)
    newlines = np.concatenate([np.zeros(0, np.int64), *ends])
    starts = np.concatenate([[0], newlines + 1]).astype(np.int64)
    lengths = np.append(newlines, size) - starts
    return starts[lengths > 0]


def _checked(row: Any) -> dict[str, Any]:
    if not isinstance(row, dict):
        raise ValueError("it is not a JSON object")
    return row


def _one_line(error: Exception) -> str:
    return " ".join(str(error).split())[:300] or type(error).__name__
