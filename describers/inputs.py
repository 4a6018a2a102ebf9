"""What is to be described: a folder, a manifest, a sound file or a hub dataset, as one ordered stream of entries.

An entry that cannot be used (a line that is not JSON, a line without `audio`, an id met before) is in the stream too,
with its reason, so that every input is accounted for exactly once.
"""

from __future__ import annotations

import csv
import hashlib
import os
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from speech_llm.audio import SUFFIXES
from speech_llm.errors import UserError
from speech_llm.files import explain_os_error, read_jsonl

LISTINGS = ("metadata.jsonl", "metadata.csv")
# Characters of one cell of a CSV file; the library's own limit of 131,072 is met by long transcripts.
_LONGEST_CELL = 10_000_000


@dataclass
class Entry:
    """One input: where it stands (`line` of its file, or its 1-based position), what it is called, its sound.

    `audio`: as the output shall name it. `data`: the encoded file's bytes when it is in no file of its own; `path` is
    then where to keep it. `reason`: why it cannot be used, None for a good entry.
    """

    line: int
    id: str
    audio: str | None
    path: Path
    row: dict[str, Any] = field(default_factory=dict)
    data: bytes | None = None
    reason: str | None = None


def read_entries(source: str | Path, out: Path) -> Iterator[Entry]:
    """The entries of `source`, lazily and in order; a later entry with an id already used carries a reason.

    `source`: a folder (its `metadata.jsonl`/`metadata.csv` files where it has any, its parquet files as a hub dataset, what
    `save_to_disk` of the datasets library left there, else every sound file in it, sorted), a JSONL or CSV manifest, one sound file, or a hub dataset
    `OWNER/NAME[:SPLIT]` or `OWNER/NAME:CONFIG/SPLIT`. Paths are named relative to `out`'s folder, so that the output is
    itself a manifest; absolute ones stay absolute. Raises `UserError` when there is nothing to read.
    """
    first_line: dict[str, int] = {}
    for entry in _stream(str(source), out):
        if entry.reason is None:
            earlier = first_line.setdefault(entry.id, entry.line)
            if earlier != entry.line:
                entry.reason = f"the id {entry.id!r} was already used on line {earlier}; ids must be unique"
        yield entry


def count_entries(source: str | Path) -> int | None:
    """How many entries there will be, None where only reading them all would tell."""
    path = Path(source)
    if path.is_file() and path.suffix == ".jsonl":
        with open(path, "rb") as handle:
            return sum(1 for line in handle if line.strip())
    if path.is_dir() and not _listings(path) and not _parquet(path) and not _saved(path):
        return len(_sound_files(path))
    return 1 if path.is_file() and path.suffix.lower() in SUFFIXES else None


def listing_files(source: str | Path) -> list[Path]:
    """The manifests that `source` is read from; empty for bare sound files and hub datasets."""
    path = Path(source)
    if path.is_dir():
        return _listings(path)
    return [path] if path.is_file() and path.suffix.lower() not in SUFFIXES else []


def sounds_stamp(source: str | Path, out: Path) -> str | None:
    """Changes when a sound file is added, taken away, replaced or mended; None for datasets that are streamed.

    By size and time of change, as to read every sound again would take as long as describing it.
    """
    path = Path(source)
    if not path.exists() or (path.is_dir() and not _listings(path) and (_parquet(path) or _saved(path))):
        return None
    digest = hashlib.sha256()
    for entry in _stream(str(source), out):
        if entry.reason is None:
            try:
                stat = entry.path.stat()
                state = f"{stat.st_size} {stat.st_mtime_ns}"
            except OSError:
                state = "not there"
            digest.update(f"{entry.id} {state}\n".encode(errors="backslashreplace"))
    return digest.hexdigest()


def _stream(source: str, out: Path) -> Iterator[Entry]:
    path = Path(source)
    if path.is_dir():
        if listings := _listings(path):
            offset = 0
            for listing in listings:
                prefix = "" if len(listings) == 1 else listing.parent.relative_to(path).as_posix()
                line = 0
                try:
                    for entry in _manifest(listing, out):
                        line = entry.line
                        entry.line += offset  # numbers stay unique over several files
                        entry.id = (
                            f"{prefix}/{entry.id}"
                            if prefix and not entry.id.startswith(f"{prefix}/")
                            else entry.id
                        )
                        yield entry
                except UserError as error:  # one bad table of several costs itself
                    if len(listings) == 1:
                        raise
                    line += 1
                    yield Entry(offset + line, "", None, listing, reason=str(error))
                offset += line
        elif _parquet(path) or _saved(path):
            yield from _hub(source, None, None, out)
        else:
            yield from _folder(path, out)
    elif path.is_file():
        if path.suffix.lower() in SUFFIXES:
            yield Entry(1, path.name, _named(path, out), path)
        elif path.suffix.lower() in (".jsonl", ".csv"):
            yield from _manifest(path, out)
        else:
            raise UserError(
                f"{path}: expected a folder, a .jsonl or .csv manifest, a sound file or a hub dataset"
            )
    else:
        name, _, selection = source.partition(":")
        if (
            name.count("/") != 1
            or name.startswith((".", "/"))
            or Path(name).suffix in (*SUFFIXES, ".jsonl", ".csv")
        ):
            raise UserError(f"{source}: no such file or folder")
        config, _, split = selection.rpartition("/")
        yield from _hub(name, config or None, split or None, out)


def _folder(folder: Path, out: Path) -> Iterator[Entry]:
    files = _sound_files(folder)
    if not files:
        raise UserError(
            f"{folder}: no sound files in this folder (looked for {', '.join(SUFFIXES[:4])}, ... also in its subfolders)"
        )
    for number, file in enumerate(files, start=1):
        if not _printable(file):
            name = os.fsencode(_named(file, out)).decode("utf-8", "backslashreplace")
            yield Entry(number, name, name, file, reason="its name is not UTF-8; rename it")
            continue
        yield Entry(number, file.relative_to(folder).as_posix(), _named(file, out), file)


def _manifest(manifest: Path, out: Path) -> Iterator[Entry]:
    """Lines with `audio` (or the hub's `file_name`) relative to the manifest, and any other columns."""
    bad: list[Entry] = []

    def set_aside(number: int, _text: str, reason: str) -> None:
        bad.append(Entry(number, "", None, manifest, reason=reason))

    rows = (_csv_rows if manifest.suffix.lower() == ".csv" else read_jsonl)(manifest, set_aside)
    empty = True
    for number, row in rows:
        yield from bad
        bad.clear()
        empty = False
        name = row.get("audio", row.get("file_name"))
        identity = row.get("id")
        if not isinstance(name, str) or not name:
            reason = f"line {number} has no 'audio' (a path relative to the manifest)"
            yield Entry(number, str(identity or ""), None, manifest, row, reason=reason)
            continue
        path = Path(name) if Path(name).is_absolute() else manifest.parent / name
        audio = name if Path(name).is_absolute() else _named(path, out)
        yield Entry(number, name if identity in (None, "") else str(identity), audio, path, row)
    empty = empty and not bad
    yield from bad
    if empty:
        raise UserError(f"{manifest}: the manifest has no lines")


def _csv_rows(
    path: Path, on_bad_line: Callable[[int, str, str], None]
) -> Iterator[tuple[int, dict[str, Any]]]:
    csv.field_size_limit(_LONGEST_CELL)
    try:
        with open(path, encoding="utf-8-sig", errors="replace", newline="") as handle:
            reader = csv.DictReader(handle)
            columns = [column for column in reader.fieldnames or [] if column]
            if columns and not {"audio", "file_name"} & set(columns):
                raise UserError(
                    f"{path}: no column 'audio' (paths relative to the manifest) among its columns "
                    f"{', '.join(map(repr, columns))}; the first line must name them, separated by commas"
                )
            while True:
                try:
                    row = next(reader)
                except StopIteration:
                    return
                except csv.Error as error:
                    on_bad_line(reader.line_num, "", f"line {reader.line_num} cannot be read ({error})")
                    continue
                yield (
                    reader.line_num,
                    {key: value for key, value in row.items() if key and value not in (None, "")},
                )
    except csv.Error as error:
        raise UserError(f"{path}: its first line cannot be read ({error})") from None
    except OSError as error:
        raise explain_os_error(error, path) from error


def _hub(name: str, config: str | None, split: str | None, out: Path) -> Iterator[Entry]:
    """Stream a dataset's rows undecoded; sounds that lie in no file of their own get one beside the output."""
    import datasets  # slow to import, and only needed here

    where = name if split is None else f"{name}:{split}"
    try:
        if Path(name).is_dir() and _saved(Path(name)):
            loaded = datasets.load_from_disk(name)
        else:
            loaded = datasets.load_dataset(name, config, split=split, streaming=True)
    except Exception as error:  # the library raises many kinds: no network, no such name, no such split
        kind = (
            "a dataset that could be loaded"
            if Path(name).is_dir()
            else "a file, a folder or a hub dataset that could be loaded"
        )
        raise UserError(f"{where}: not {kind} ({' '.join(str(error).split())[:300]})") from None
    parts = {split or "": loaded} if not hasattr(loaded, "items") else dict(loaded.items())
    keep = out.with_suffix(".audio")
    number = 0
    for part, rows in parts.items():
        part = part or str(getattr(rows, "split", None) or "clip")
        features = rows.features or {}
        columns = [column for column, kind in features.items() if isinstance(kind, datasets.Audio)]
        if not columns:
            raise UserError(f"{where}: no audio column among {', '.join(features) or 'its columns'}")
        rows = rows.cast_column(columns[0], datasets.Audio(decode=False))
        try:
            for index, row in enumerate(rows):
                number += 1
                sound = row.pop(columns[0]) or {}
                for column, kind in features.items():
                    if (
                        isinstance(kind, datasets.ClassLabel)
                        and isinstance(row.get(column), int)
                        and row[column] >= 0
                    ):
                        row[column] = kind.int2str(row[column])
                identity = str(row.get("id") or f"{part}-{index:06d}")
                yield _hub_entry(number, identity, sound, row, keep / f"{part}-{index:06d}", out)
        except ImportError as error:
            raise UserError(
                f"{where}: this dataset cannot be read without another package ({error})"
            ) from None


def _hub_entry(
    number: int, identity: str, sound: dict[str, Any], row: dict[str, Any], keep: Path, out: Path
) -> Entry:
    original = str(sound.get("path") or "")
    if sound.get("bytes"):
        path = keep.with_name(keep.name + Path(original).suffix)
        return Entry(number, identity, _named(path, out), path, row, data=sound["bytes"])
    if original and Path(original).is_file():
        return Entry(number, identity, original, Path(original), row)
    return Entry(number, identity, original or None, Path(original), row, reason=f"row {number} has no sound")


def _listings(folder: Path) -> list[Path]:
    return sorted(path for name in LISTINGS for path in folder.rglob(name))


def _parquet(folder: Path) -> bool:
    return any(True for _ in folder.rglob("*.parquet"))


def _saved(folder: Path) -> bool:
    """Whether `save_to_disk` of the datasets library wrote the folder."""
    return (folder / "dataset_dict.json").is_file() or (folder / "state.json").is_file()


def _sound_files(folder: Path) -> list[Path]:
    return sorted(path for path in folder.rglob("*") if path.suffix.lower() in SUFFIXES and path.is_file())


def _printable(path: Path) -> bool:
    try:
        str(path).encode()
    except UnicodeEncodeError:
        return False
    return True


def _named(path: Path, out: Path) -> str:
    return str(path) if path.is_absolute() else Path(os.path.relpath(path, out.parent)).as_posix()
