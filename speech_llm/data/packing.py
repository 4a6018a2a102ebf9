"""Packing: many questions about one clip behind one shared prefix, and batches of such packs.

In: rendered rows (token ids, answer spans, the clip). Out: `Pack`s and padded batches with exact masks.

A row is [constant prefix][audio, transcript][question][answer]. The rows of one clip differ only after the audio,
so a pack holds that part once and every question/answer after it; each branch sees the shared part and itself,
never its neighbours, at the positions it would have alone. Rows without sound are branches too, several to a pack, behind
whatever they begin with alike (often nothing). Logits equal the unpacked ones.
"""

from __future__ import annotations

import random
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from speech_llm.model.masks import branch_mask

IGNORE = -100
# Rows without sound share packs up to here: with SmolLM2 longer ones gain nothing (docs/results/packing.md), and the attention
# of every pack grows with the square of its length.
TEXT_PACK_TOKENS = 512


@dataclass
class Row:
    """One rendered conversation: ids, answer spans [start, end) and the paths of its clips, in order."""

    id: str
    ids: list[int]
    spans: list[tuple[int, int]]
    clips: list[str]

    @property
    def answer_tokens(self) -> int:
        return sum(end - start for start, end in self.spans)


@dataclass
class Pack:
    """Rows of one clip, or without sound, behind their shared prefix (`shared` tokens, after the constant prefix is taken off)."""

    rows: list[str]
    clips: list[str]
    ids: list[int] = field(default_factory=list)
    positions: list[int] = field(default_factory=list)
    branch: list[int] = field(default_factory=list)  # 0 = shared, 1.. = the row's own part
    targets: list[int] = field(default_factory=list)  # the token that the position must predict, or IGNORE

    @property
    def answer_tokens(self) -> int:
        return sum(target != IGNORE for target in self.targets)


def constant_prefix(rows: list[Row], audio_token_id: int) -> list[int]:
    """The longest run of leading ids that every row shares and that holds no audio and no answer."""
    if not rows:
        return []
    length = min(min((span[0] for span in row.spans), default=len(row.ids)) for row in rows)
    first = rows[0].ids
    for row in rows:
        length = next(
            (i for i in range(length) if row.ids[i] != first[i] or row.ids[i] == audio_token_id), length
        )
    # The prefix's last token must not be the one that predicts the first answer token.
    return first[: max(0, min(length, min(span[0] for row in rows for span in row.spans) - 1))]


def pack_rows(
    rows: list[Row],
    prefix_length: int,
    max_tokens: int,
    text_tokens: int | None = None,
    audio_token_id: int | None = None,
) -> list[Pack]:
    """Pack rows that name the same clips; a row whose own part would exceed `max_tokens` opens a new pack.

    Sounds are there once in a pack, so rows share one only where they are alike up to the end of their last sound, and no
    answer comes before it; `audio_token_id` (None: it is at the start of all) tells where that is.
    Rows without sound share packs of at most `text_tokens` (None: `max_tokens`); a longer one has a pack of its own.
    """
    groups: dict[tuple[Any, ...], list[Row]] = {}
    silent: list[Row] = []
    for row in rows:
        if row.clips:
            groups.setdefault((*row.clips, *_until_heard(row, audio_token_id)), []).append(row)
        else:
            silent.append(row)
    packs = []
    for group in groups.values():
        pack: list[Row] = []
        length = 0
        for row in group:
            own = len(row.ids) - prefix_length
            if pack and length + own > max_tokens:
                packs.append(pack_group(pack, prefix_length))
                pack, length = [], 0
            pack.append(row)
            length += own
        packs.append(pack_group(pack, prefix_length))
    filled = fill_packs(silent, prefix_length, max_tokens if text_tokens is None else text_tokens)
    return packs + [pack_group(own, prefix_length) for own in filled]


def _until_heard(row: Row, audio_token_id: int | None) -> tuple[Any, ...]:
    """What rows must share to share a pack: their tokens up to the last sound; the row itself where an answer comes before it."""
    if audio_token_id is None or audio_token_id not in row.ids:
        return ()
    end = len(row.ids) - row.ids[::-1].index(audio_token_id)
    alone = any(start - 1 < end for start, _ in row.spans)
    return (row.id,) if alone else (tuple(row.ids[:end]),)


def fill_packs(rows: list[Row], prefix_length: int, tokens: int, most_open: int = 64) -> list[list[Row]]:
    """Rows put together so that each group has at most `tokens` tokens of its own: each goes where it fits most tightly.

    At most `most_open` groups wait for more, so that the work grows with the number of rows and neighbours stay near each other.
    """
    done: list[list[Row]] = []
    waiting: list[tuple[int, list[Row]]] = []  # tokens that are free, rows
    for row in rows:
        own = len(row.ids) - prefix_length
        fitting = [place for place, (free, _) in enumerate(waiting) if own <= free]
        if fitting:
            place = min(fitting, key=lambda place: waiting[place][0])
            free, group = waiting.pop(place)
            group.append(row)
            waiting.append((free - own, group))
            continue
        waiting.append((tokens - own, [row]))
        if len(waiting) > most_open:
            fullest = min(range(len(waiting)), key=lambda place: waiting[place][0])
            done.append(waiting.pop(fullest)[1])
    return done + [group for _, group in waiting]


def pack_group(rows: list[Row], prefix_length: int) -> Pack:
    """One pack of rows with the same clips (or all without): what they begin with alike is there once."""
    shared = min(min((span[0] for span in row.spans), default=len(row.ids)) - 1 for row in rows)
    first = rows[0].ids
    for row in rows:
        shared = next((i for i in range(shared) if row.ids[i] != first[i]), shared)
    if len(rows) == 1:
        shared = min(shared, len(first))
    pack = Pack(rows=[row.id for row in rows], clips=list(rows[0].clips))
    pack.ids = list(first[prefix_length:shared])
    pack.positions = list(range(prefix_length, shared))
    pack.branch = [0] * len(pack.ids)
    pack.targets = [IGNORE] * len(pack.ids)
    for number, row in enumerate(rows, start=1):
        targets = [IGNORE] * len(row.ids)
        for start, end in row.spans:
            for place in range(start, end):
                targets[place - 1] = row.ids[place]
        # The last token predicts nothing, so it need not be run at all.
        stop = max(end for _, end in row.spans) - 1
        pack.ids += row.ids[shared:stop]
        pack.positions += range(shared, stop)
        pack.branch += [number] * (stop - shared)
        pack.targets += targets[shared:stop]
    return pack


@dataclass
class PackBatch:
    """Right-padded packs: ids, positions, targets (b, l); mask (b, 1, l, prefix + l) bool, True = may see.

    `row_of` (answer tokens,): the row, by its place in `rows`, that each answer token belongs to; they follow one another.
    """

    ids: Tensor
    positions: Tensor
    targets: Tensor
    mask: Tensor
    clips: list[str]
    rows: list[str]
    row_of: Tensor
    padding_share: float

    @property
    def answer_tokens(self) -> int:
        return int((self.targets != IGNORE).sum())


def collate(packs: list[Pack], prefix_length: int, pad_id: int) -> PackBatch:
    """Pad packs to the longest and build their attention masks."""
    longest = max(len(pack.ids) for pack in packs)
    size = (len(packs), longest)
    ids = torch.full(size, pad_id)
    positions = torch.zeros(size, dtype=torch.long)
    targets = torch.full(size, IGNORE)
    branch = torch.full(size, -1)
    for i, pack in enumerate(packs):
        n = len(pack.ids)
        ids[i, :n] = torch.tensor(pack.ids)
        positions[i, :n] = torch.tensor(pack.positions)
        targets[i, :n] = torch.tensor(pack.targets)
        branch[i, :n] = torch.tensor(pack.branch)
    used = sum(len(pack.ids) for pack in packs)
    before = torch.tensor([0, *(len(pack.rows) for pack in packs)]).cumsum(0)[:-1, None]
    return PackBatch(
        ids=ids,
        positions=positions,
        targets=targets,
        mask=branch_mask(branch, prefix_length),
        clips=[clip for pack in packs for clip in pack.clips],
        rows=[row for pack in packs for row in pack.rows],
        row_of=(before + branch - 1)[targets != IGNORE],
        padding_share=1 - used / ids.numel(),
    )


def longest_first(packs: Sequence[Pack], batch_tokens: int) -> Iterator[list[int]]:
    """Batches of pack numbers, the longest packs first, each of no more tokens than `batch_tokens` where it holds several."""
    order = sorted(range(len(packs)), key=lambda i: -len(packs[i].ids))
    while order:
        count = max(1, batch_tokens // max(1, len(packs[order[0]].ids)))
        yield order[:count]
        order = order[count:]


def plan_epoch(packs: list[Pack], batch_tokens: int, seed: int, epoch: int) -> list[list[int]]:
    """Batches of pack numbers for one epoch: shuffled, then bucketed by length, under a token budget.

    A pure function of its arguments, so a resumed run knows its place without having to store the order.
    """
    rng = random.Random(f"{seed}-{epoch}")
    order = list(range(len(packs)))
    rng.shuffle(order)
    batches: list[list[int]] = []
    for start in range(0, len(order), 256):
        window = sorted(order[start : start + 256], key=lambda i: len(packs[i].ids))
        batch: list[int] = []
        for index in window:
            if batch and (len(batch) + 1) * len(packs[index].ids) > batch_tokens:
                batches.append(batch)
                batch = []
            batch.append(index)
        if batch:
            batches.append(batch)
    rng.shuffle(batches)
    return batches


def padding_share(packs: Sequence[Pack], batches: Sequence[Sequence[int]]) -> float:
    """The share of the tokens that these batches compute which is padding."""
    used = sum(len(packs[i].ids) for batch in batches for i in batch)
    computed = sum(len(batch) * max(len(packs[i].ids) for i in batch) for batch in batches)
    return 1 - used / computed if computed else 0.0


def told_batches(packs: Sequence[Pack], batches: Sequence[Sequence[int]], prefix_length: int) -> str:
    """How the rows of these batches are packed, in a sentence."""
    rows = sum(len(packs[i].rows) for batch in batches for i in batch)
    taken = sum(len(batch) for batch in batches)
    share = 100 * padding_share(packs, batches)
    told = f"{rows:,} rows in {taken:,} packs and {len(batches):,} batches, {share:.1f} % of their tokens padding"
    return f"{told}; the {prefix_length} tokens that all begin with are run once" if prefix_length else told
