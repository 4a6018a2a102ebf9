"""The corpus stage: which clips there are, with their labels, split into training and test.

In: a recipe's `data` section. Out: `train.jsonl`, `test.jsonl` (and `natural.jsonl`) manifests under the stage's folder,
synthesised or picked from the user's own manifests; lines that cannot be used go to `rejects.jsonl` with the reason.
"""

from __future__ import annotations

import glob
import itertools
import random
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from speech_llm.errors import UserError, nearest
from speech_llm.files import read_jsonl, write_jsonl
from speech_llm.recipe import Recipe
from speech_llm.recipe_data import DataSection

SPLITS = ("train", "test", "natural")


def build_corpus(recipe: Recipe, out_dir: Path, progress: bool = True) -> dict[str, Any]:
    """Write the manifests of all splits under `out_dir`; returns how many clips each has and how many were left out."""
    data = recipe.data
    if data.synthesize is None:
        files = manifest_files(recipe)
        return pick_clips(data, files, out_dir, recipe.seed)
    from speech_llm.synthesis.quickstart import build_quickstart

    most = data.limit or max(
        data.synthesize.train_clips, data.synthesize.test_clips, data.synthesize.natural_clips
    )
    build_quickstart(
        out_dir,
        train_clips=min(most, data.synthesize.train_clips),
        test_clips=min(most, data.synthesize.test_clips),
        natural_clips=min(most, data.synthesize.natural_clips),
        seed=recipe.seed,
        progress=progress,
    )
    return {table.stem: _count(table) for table in split_tables(out_dir)}


def split_tables(folder: Path) -> list[Path]:
    """The splits' tables that a stage left in its folder."""
    return [path for split in SPLITS if (path := folder / f"{split}.jsonl").exists()]


def manifest_files(recipe: Recipe) -> list[Path]:
    """The manifests a recipe names: files, folders with a `metadata.jsonl`, or patterns with `*`.

    Raises `UserError` for one that is not there.
    """
    found: list[Path] = []
    for reference in recipe.data.manifests or []:
        path = recipe.resolve_path(reference)
        if glob.has_magic(reference):
            matches = [Path(match) for match in sorted(glob.glob(str(path), recursive=True))]
            if not matches:
                raise UserError(f"data.manifests: nothing matches {path}")
        elif path.is_dir():
            matches = [path / "metadata.jsonl"]
        else:
            matches = [path]
        for match in matches:
            if not match.is_file():
                raise UserError(
                    f"data.manifests: {match}: no such manifest; expected JSON lines such as "
                    '{"audio": "a.wav", "gender": "female", "split": "train"}'
                )
            found.append(match)
    return list(dict.fromkeys(found))


def pick_clips(data: DataSection, manifests: Sequence[Path], out_dir: Path, seed: int) -> dict[str, Any]:
    """Sort the manifests' lines into training and test by the recipe's filters; see `build_corpus`.

    Labels are kept; audio paths are made absolute; ids that two manifests share get the manifest's folder in front.
    Raises `UserError` when a split is empty, or a line belongs to both.
    """
    train, test = data.train or {}, data.test or {}
    picked: dict[str, list[dict[str, Any]]] = {"train": [], "test": []}
    rejects: list[dict[str, Any]] = []
    reasons: Counter[str] = Counter()
    columns: dict[str, Counter[str]] = {}
    ids: set[str] = set()
    used: set[tuple[Path, str]] = set()
    sides: dict[str, tuple[str, str]] = {}
    neither = 0

    def reject(manifest: Path, line: int, reason: str, kind: str) -> None:
        rejects.append({"file": str(manifest), "line": line, "reason": reason})
        reasons[kind] += 1

    for manifest in manifests:

        def bad_line(line: int, _text: str, reason: str, manifest: Path = manifest) -> None:
            reject(manifest, line, reason, "not a JSON object")

        for line, row in read_jsonl(manifest, bad_line):
            for column in {*train, *test}:
                columns.setdefault(column, Counter())[str(row.get(column))] += 1
            wanted = [name for name, filters in (("train", train), ("test", test)) if _matches(row, filters)]
            if len(wanted) == 2:
                raise UserError(
                    f"{manifest}, line {line}: this clip matches both data.train = {train} and data.test = {test}; "
                    "a test on trained clips says nothing, so make the two exclude each other"
                )
            if not wanted:
                neither += 1
                continue
            if (unfit := _unfit(row, manifest, data)) is not None:
                reject(manifest, line, *unfit)
                continue
            name = str(row.get("id") or f"{manifest.parent.name}-{line}")
            if (manifest, name) in used:
                reject(manifest, line, f"the id {name!r} was already used in this manifest", "id used twice")
                continue
            used.add((manifest, name))
            name = _unused(name, manifest, ids)
            ids.add(name)
            sound = str(_audio_path(row, manifest))
            place = f"{manifest}, line {line}"
            split_of, first = sides.setdefault(sound, (wanted[0], place))
            if split_of != wanted[0]:
                raise UserError(
                    f"{place}: the sound {sound} is in data.{wanted[0]}, and in data.{split_of} by {first}; "
                    "a test on trained clips says nothing, so make the two exclude each other"
                )
            picked[wanted[0]].append({**row, "id": name, "audio": sound})
    for split, filters in (("train", train), ("test", test)):
        if not picked[split]:
            raise UserError(_empty(split, filters, manifests, columns, reasons))
        if data.limit is not None and len(picked[split]) > data.limit:
            keep = set(random.Random(f"{seed}-{split}").sample(range(len(picked[split])), data.limit))
            picked[split] = [row for number, row in enumerate(picked[split]) if number in keep]
        write_jsonl(out_dir / f"{split}.jsonl", picked[split])
    write_jsonl(out_dir / "rejects.jsonl", rejects)
    counts: dict[str, Any] = {split: len(rows) for split, rows in picked.items()}
    return {**counts, "rejected": len(rejects), "reasons": dict(reasons), "in_neither_split": neither}


def _unused(name: str, manifest: Path, taken: set[str]) -> str:
    """An id that no other clip has: of a second manifest with its folder in front, then its own name, then a number."""
    names = [name, f"{manifest.parent.name}/{name}", f"{manifest.parent.name}/{manifest.stem}/{name}"]
    more = (f"{names[-1]}#{number}" for number in itertools.count(2))
    return next(free for free in itertools.chain(names, more) if free not in taken)


def _matches(row: dict[str, Any], filters: dict[str, Any]) -> bool:
    return all(
        row.get(column) in value if isinstance(value, list) else row.get(column) == value
        for column, value in filters.items()
    )


def _audio_path(row: dict[str, Any], manifest: Path) -> Path:
    return (manifest.parent / str(row["audio"])).resolve()


def _unfit(row: dict[str, Any], manifest: Path, data: DataSection) -> tuple[str, str] | None:
    """Why a line cannot be used, as a sentence and as a kind to count; unreadable sound is found when described."""
    if not row.get("audio"):
        return "this line has no 'audio'", "no audio"
    from describers.vocabulary import is_missing

    for column in data.require:
        if is_missing(column, row.get(column)):
            return f"this line has no {column!r}, which data.require asks for", f"no {column}"
    from speech_llm.audio import AudioError, duration_s

    try:
        length_s = duration_s(_audio_path(row, manifest))
    except (AudioError, OSError, RuntimeError, ValueError):
        return None
    if length_s > data.max_duration_s:
        said = f"{length_s:.1f} s long; data.max_duration_s is {data.max_duration_s:g}: left out, never cut"
        return said, "too long"
    return None


def _empty(
    split: str,
    filters: dict[str, Any],
    manifests: Sequence[Path],
    columns: dict[str, Counter[str]],
    reasons: Counter[str],
) -> str:
    """The sentence for a split without clips: what the filter's columns hold instead."""
    where = f"{manifests[0]}" + (f" and {len(manifests) - 1} more" if len(manifests) > 1 else "")
    there = []
    for column, wanted in filters.items():
        values = columns.get(column, Counter())
        has = ", ".join(f"{value} ({count})" for value, count in values.most_common(8)) or "nothing"
        there.append(f"column {column!r} has {has}.{nearest(str(wanted), list(values))}")
    left_out = f" Left out: {dict(reasons)}." if reasons else ""
    return f"{where}: no usable line matches data.{split} = {filters}; {' '.join(there)}{left_out}"


def _count(manifest: Path) -> int:
    return sum(1 for _ in read_jsonl(manifest))
