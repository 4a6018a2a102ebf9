"""What a probe is fitted on: labelled recordings in, feature vectors with their labels and speakers out.

Lines that cannot be used (no label, no sound, a damaged file, silence) are set aside and counted by reason.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from tqdm import tqdm

from describers.features import BLOCKS, EncoderFeatures
from describers.inputs import Entry, count_entries, read_entries
from describers.lines import reason_kind
from describers.perturb import at_random
from describers.run import decode_entry
from describers.vocabulary import canonical, is_missing
from describers.voting import loud_windows
from speech_llm.audio import SAMPLE_RATE_HZ, AudioError, audio_hash
from speech_llm.errors import UserError
from speech_llm.files import stable_hash

# The label of background: sounds of which the attribute must never be told.
NOTHING = "(nothing to tell)"
Change = Callable[[np.ndarray, np.random.Generator], np.ndarray]
# Windows whose features are computed at a time.
_AT_ONCE = 64


@dataclass
class Material:
    """Labelled windows of recordings, at most 30 s each.

    A clip has a label and a group (its speaker); a row is one window of one clip: `owner` is the clip's index, `copy` 0
    for the sound itself and k for the kth copy under worse conditions, `blocks` block name -> (rows, features of the block).
    """

    labels: list[str] = field(default_factory=list)
    groups: list[str] = field(default_factory=list)
    hashes: list[str] = field(default_factory=list)
    grouped_by: str = "clip"
    owner: np.ndarray = field(default_factory=lambda: np.zeros(0, int))
    copy: np.ndarray = field(default_factory=lambda: np.zeros(0, int))
    seconds: np.ndarray = field(default_factory=lambda: np.zeros(0))
    blocks: dict[str, np.ndarray] = field(default_factory=dict)
    aside: Counter[str] = field(default_factory=Counter)

    def vectors(self, blocks: Sequence[str]) -> np.ndarray:
        """(rows, features) float32: the blocks side by side."""
        return np.concatenate([self.blocks[name] for name in blocks], axis=1)

    def keep(self, clips: Sequence[int], copies: Sequence[int] | None = None) -> Material:
        """The same, of these clips only; of their copies those with these numbers (default: all)."""
        new = {old: place for place, old in enumerate(clips)}
        rows = np.array(
            [
                index
                for index, (owner, copy) in enumerate(
                    zip(self.owner.tolist(), self.copy.tolist(), strict=True)
                )
                if owner in new and (copies is None or copy in copies)
            ],
            int,
        )
        return Material(
            [self.labels[clip] for clip in clips],
            [self.groups[clip] for clip in clips],
            [self.hashes[clip] for clip in clips],
            self.grouped_by,
            np.array([new[int(owner)] for owner in self.owner[rows]], int),
            self.copy[rows],
            self.seconds[rows],
            {name: block[rows] for name, block in self.blocks.items()},
            self.aside,
        )

    def fingerprint(self) -> str:
        """Hash of the sounds, their labels and groups, whatever their order."""
        return stable_hash(sorted(zip(self.hashes, self.labels, self.groups, strict=True)))


def read_material(
    manifests: Sequence[str | Path],
    attribute: str,
    features: EncoderFeatures,
    *,
    column: str | None = None,
    label: str | None = None,
    where: dict[str, str] | None = None,
    group: str = "speaker",
    changes: Sequence[Change] = (at_random,),
    progress: bool = True,
    out: Path = Path("probe.safetensors"),
) -> Material:
    """Decode and encode every usable line of the manifests (folders, JSONL or CSV files, hub datasets).

    `column` (default: the attribute's name) has the label, `group` the speaker; without any, each clip is its own group.
    `label`: that of every clip, instead of a column's.
    `where`: column -> the value that a line must have. `changes`: what makes a copy of each window under worse conditions,
    the same in every run. `out`: beside it lie the sounds of a hub dataset. Raises `UserError` when no line
    can be used.
    """
    material = Material()
    owner: list[int] = []
    copy: list[int] = []
    seconds: list[float] = []
    rows: dict[str, list[np.ndarray]] = {name: [] for name in BLOCKS}
    waiting: list[np.ndarray] = []
    has_group = False

    def flush() -> None:
        for found in features.every_block(waiting) if waiting else []:
            for name in BLOCKS:
                rows[name].append(found[name])
        waiting.clear()

    totals = [count_entries(manifest) for manifest in manifests]
    total = None if None in totals else sum(count or 0 for count in totals)
    bar = tqdm(total=total, unit="clip", desc="encode", disable=not progress, dynamic_ncols=True)
    with bar:
        for number, entry in _entries(manifests, out):
            bar.update()
            if any(str(entry.row.get(name)) != value for name, value in (where or {}).items()):
                if entry.reason is not None and not entry.row:
                    material.aside[reason_kind(entry.reason)] += 1
                continue
            given = label or entry.row.get(column or attribute)
            if entry.reason is None and is_missing(attribute, given):
                material.aside[f"no label in column {column or attribute!r}"] += 1
                continue
            try:
                clip = decode_entry(entry)
                sounds = list(loud_windows(clip))
            except AudioError as error:
                material.aside[reason_kind(error.reason)] += 1
                continue
            if not sounds:
                material.aside["silence"] += 1
                continue
            has_group |= entry.row.get(group) not in (None, "")
            index = len(material.labels)
            material.labels.append(label or canonical(attribute, given))
            material.groups.append(str(entry.row.get(group) or f"clip {number} {entry.id}"))
            material.hashes.append(audio_hash(np.concatenate(sounds)))
            for sound in sounds:
                rng = np.random.default_rng(int(audio_hash(sound)[:12], 16))
                waiting += [sound, *(change(sound, rng) for change in changes)]
                owner += [index] * (1 + len(changes))
                copy += range(1 + len(changes))
                seconds += [len(sound) / SAMPLE_RATE_HZ] * (1 + len(changes))
            if len(waiting) >= _AT_ONCE:
                flush()
        flush()
    if not material.labels:
        reasons = ", ".join(f"{reason} ({count})" for reason, count in material.aside.most_common(3))
        chosen = f" with {' and '.join(f'{k}={v}' for k, v in where.items())}" if where else ""
        raise UserError(
            f"{', '.join(map(str, manifests))}: no line{chosen} has a label in column {column or attribute!r} and a sound"
            + (f": {reasons}" if reasons else "")
        )
    material.grouped_by = group if has_group else "clip"
    material.owner, material.copy = np.array(owner), np.array(copy)
    material.seconds = np.array(seconds)
    material.blocks = {name: np.stack(found) for name, found in rows.items()}
    return material


def joined(parts: Sequence[Material]) -> Material | None:
    """Several materials as one."""
    if not parts:
        return None
    starts = np.cumsum([0, *(len(part.labels) for part in parts)])
    return Material(
        [label for part in parts for label in part.labels],
        [group for part in parts for group in part.groups],
        [digest for part in parts for digest in part.hashes],
        parts[0].grouped_by,  # of the first: background has no speakers
        np.concatenate([part.owner + start for part, start in zip(parts, starts[:-1], strict=True)]),
        np.concatenate([part.copy for part in parts]),
        np.concatenate([part.seconds for part in parts]),
        {name: np.concatenate([part.blocks[name] for part in parts]) for name in BLOCKS},
        sum((part.aside for part in parts), Counter()),
    )


def _entries(manifests: Sequence[str | Path], out: Path) -> Iterator[tuple[int, Entry]]:
    for number, manifest in enumerate(manifests):
        for entry in read_entries(manifest, out):
            yield number, entry


def describe_material(material: Material) -> dict[str, Any]:
    """Counts for the probe's header."""
    return {
        "clips": len(material.labels),
        "groups": len(set(material.groups)),
        "grouped_by": material.grouped_by,
        "labels": dict(sorted(Counter(material.labels).items())),
        "minutes": round(float(material.seconds[material.copy == 0].sum()) / 60, 1),
        "copies": len(set(material.copy.tolist()) - {0}),
        "set_aside": dict(material.aside.most_common()),
        "hash": material.fingerprint(),
    }
