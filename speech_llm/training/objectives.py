"""What a step minimises: the loss of a batch of packs, one class per kind of learning.

    TokenLoss   each answer token by cross-entropy, divergence from the teacher, or both   (styles sft, pretrain)
    PairLoss    a right answer against a wrong one                                          (style preference)
    `rollout.RolloutLoss`  sampled answers by their rewards                                 (style rollout)

The loop asks an objective two things of a batch: what it weighs, and its loss as a sum. It divides by what the whole global batch
weighs.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

import safetensors
import safetensors.torch
import torch
from torch import Tensor

from speech_llm.data.packing import PackBatch, Row
from speech_llm.files import atomic_write, stable_hash, write_jsonl
from speech_llm.targets.score import AnswerScores, row_answers, score_rows
from speech_llm.training.answers import Answers
from speech_llm.training.losses import (
    cross_entropy_sum,
    dpo_sum,
    easy_tokens,
    kl_sum,
    kl_top_k_sum,
    without_hardest,
)
from speech_llm.training.rows import TrainingSet, answer_ids
from speech_llm.training.student import Origin, Student, check_kept


@dataclass
class BatchLoss:
    """A batch's summed loss and what there is to tell of it: name -> (sum, over how many)."""

    loss: Tensor
    rows: list[str]
    answer_tokens: int
    padding_share: float
    figures: dict[str, tuple[float, float]] = field(default_factory=dict)


class Objective(Protocol):
    """What the loop minimises. `told`: what the stage's counts say of it."""

    @property
    def told(self) -> dict[str, Any]: ...

    def begin(self, folder: Path, resumed: bool) -> None:
        """Called where training begins (or, resumed, goes on), before the first loss; `folder` keeps what must not be lost."""

    def weight(self, packs: Sequence[int]) -> float:
        """What the loss of these packs is to be divided by, summed over a step."""

    def loss(self, packs: Sequence[int], place: str) -> BatchLoss:
        """The summed loss of packs (by number); `place` names step and batch, and seeds whatever is by chance."""


class TokenLoss:
    """Cross-entropy and divergence from the base LLM, token by token; hard tokens may be left out.

    The base LLM scores the answers once, before anything is trained (see `targets.score`), except for the full divergence, which
    is too large to keep.
    """

    def __init__(
        self, settings: Any, student: Student, data: TrainingSet, origin: Origin, folder: Path, progress: bool
    ) -> None:
        self.settings, self.student, self.data, self.origin = settings, student, data, origin
        self.kl = settings.kl if settings.type == "kl" else 0.0
        self.ce = settings.ce if settings.type == "kl" else 1.0
        self.scores: dict[str, AnswerScores] = {}
        self.weights: dict[str, list[float]] = {}
        top_k = settings.top_k if self.kl else None
        if top_k or settings.mask != "none":
            with origin.base():
                self.scores = score_teacher(
                    student.model.llm,
                    data.teacher,
                    folder / "teacher.safetensors",
                    top_k=top_k,
                    temperature=settings.temperature if top_k else 1.0,
                    progress=progress,
                )
        if settings.mask != "none":
            self._mask(folder / "dropped_tokens.jsonl")

    def _mask(self, path: Path) -> None:
        """Decide which tokens are learned and list the others: id, and (place in the answer, token, perplexity) of each."""
        log_probs = {name: score.log_probs.tolist() for name, score in self.scores.items()}
        if self.settings.mask == "share":
            kept = dict(
                zip(log_probs, without_hardest(list(log_probs.values()), self.settings.share), strict=True)
            )
        else:
            kept = {
                name: easy_tokens(values, self.settings.tau, first=_firsts(self.data.rows[name]))
                for name, values in log_probs.items()
            }
        self.weights = {name: [float(keep) for keep in row] for name, row in kept.items()}
        tokenizer = self.student.processor.tokenizer
        write_jsonl(
            path,
            (
                {
                    "id": name,
                    "tokens": len(row),
                    "dropped": [
                        [
                            place,
                            tokenizer.decode([self.scores[name].ids[place]]),
                            round(math.exp(-log_probs[name][place]), 3),
                        ]
                        for place, keep in enumerate(row)
                        if not keep
                    ],
                }
                for name, row in kept.items()
            ),
        )

    @property
    def told(self) -> dict[str, Any]:
        if not self.weights:
            return {}
        tokens = sum(len(row) for row in self.weights.values())
        dropped = tokens - sum(sum(row) for row in self.weights.values())
        return {
            "answer_tokens": tokens,
            "dropped_tokens": int(dropped),
            "dropped_share": round(dropped / tokens, 4),
        }

    def begin(self, folder: Path, resumed: bool) -> None:
        """Nothing: what the teacher says is known already."""

    def weight(self, packs: Sequence[int]) -> float:
        chosen = [self.data.packs[i] for i in packs]
        if not self.weights:
            return float(sum(pack.answer_tokens for pack in chosen))
        return sum(sum(self.weights[row]) for pack in chosen for row in pack.rows)

    def loss(self, packs: Sequence[int], place: str) -> BatchLoss:
        batch = self.student.batch([self.data.packs[i] for i in packs])
        device = self.student.device
        weights = None
        if self.weights:
            weights = torch.tensor([w for row in batch.rows for w in self.weights[row]], device=device)
        teacher = self._teacher(batch) if self.kl and not self.settings.top_k else None
        answers = self.student.answers(batch)
        parts = {"ce": torch.zeros((), device=device), "kl": torch.zeros((), device=device)}

        def of_logits(logits: Tensor, at: slice) -> Tensor:
            own = None if weights is None else weights[at]
            loss = logits.new_zeros((), dtype=torch.float32)
            # Whatever makes a chunk's logits again for its gradient also counts again, so parts are told of the first time only.
            first = at.start not in told
            told.add(at.start)
            if self.ce:
                cross_entropy = cross_entropy_sum(logits, answers.targets[at], own)
                loss = loss + self.ce * cross_entropy
                parts["ce"] += cross_entropy.detach() * first
            if self.kl:
                divergence = self._divergence(logits, teacher, known, at, own)
                loss = loss + self.kl * divergence
                parts["kl"] += divergence.detach() * first
            return loss

        told: set[int] = set()
        known = self._teacher_top(batch) if self.kl and teacher is None else None
        loss = answers.sum(of_logits)
        figures: dict[str, tuple[float, float]] = {}
        if self.kl:
            weight = self.weight(packs)
            figures = {name: (float(parts[name]), weight) for name in (["ce"] if self.ce else []) + ["kl"]}
        return BatchLoss(loss, batch.rows, batch.answer_tokens, batch.padding_share, figures)

    def _teacher(self, batch: PackBatch) -> Answers:
        rows = [self.data.teacher[row] for row in batch.rows]
        with self.origin.base():
            return row_answers(self.student.model.llm, rows, self.student.most_logits)

    def _teacher_top(self, batch: PackBatch) -> tuple[Tensor, Tensor]:
        """(n, k) ids and log-probabilities that were stored of the batch's answer tokens."""
        scores = [self.scores[row] for row in batch.rows]
        ids = torch.cat([score.top_ids for score in scores if score.top_ids is not None])
        values = torch.cat([score.top_log_probs for score in scores if score.top_log_probs is not None])
        return ids.to(self.student.device), values.to(self.student.device)

    def _divergence(
        self,
        logits: Tensor,
        teacher: Answers | None,
        known: tuple[Tensor, Tensor] | None,
        at: slice,
        weights: Tensor | None,
    ) -> Tensor:
        temperature = self.settings.temperature
        if teacher is not None:
            with torch.no_grad(), self.origin.base():  # whose output layer may be another one
                expected = teacher.logits(at)
            return kl_sum(logits, expected, temperature, weights)
        assert known is not None
        return kl_top_k_sum(logits, known[0][at], known[1][at], temperature, weights)


class PairLoss:
    """DPO on packs of a right and a wrong answer.

    How likely the reference finds both is known before the first step; of rows that are `streamed` it is asked at each step.
    """

    def __init__(
        self,
        settings: Any,
        student: Student,
        data: TrainingSet,
        origin: Origin,
        folder: Path,
        progress: bool,
        streamed: bool = False,
    ) -> None:
        self.settings, self.student, self.data, self.origin = settings, student, data, origin
        self.streamed = streamed
        self.reference: dict[str, float] = {}
        if settings.reference == "context" and not streamed:
            with origin.base():
                scores = score_teacher(
                    student.model.llm, data.teacher, folder / "teacher.safetensors", progress=progress
                )
            self.reference = {name: float(score.log_probs.sum()) for name, score in scores.items()}

    @property
    def told(self) -> dict[str, Any]:
        return {"pairs": len(self.data.packs)}

    def begin(self, folder: Path, resumed: bool) -> None:
        """For reference `start`: how likely the model finds all answers now; a resumed run reads what was found then."""
        if self.settings.reference == "context":
            return
        if self.streamed:
            self.origin.remember_start(folder / "start.safetensors", resumed)
            return
        path = folder / "reference.safetensors"
        names = list(self.data.rows)
        if resumed:
            check_kept(path)
        else:
            found: dict[str, float] = {}
            self.student.model.eval()
            with torch.no_grad():
                for pack in self.data.packs:
                    batch = self.student.batch([pack])
                    sums = _row_sums(self.student.token_log_probs(batch), batch)
                    found.update(zip(batch.rows, sums.tolist(), strict=True))
            with atomic_write(path, "wb") as handle:
                values = torch.tensor([found[name] for name in names], dtype=torch.float64)
                handle.write(safetensors.torch.save({"log_probs": values}))
        values = safetensors.torch.load_file(path)["log_probs"]
        self.reference = dict(zip(names, values.tolist(), strict=True))

    def weight(self, packs: Sequence[int]) -> float:
        return float(len(packs))

    def loss(self, packs: Sequence[int], place: str) -> BatchLoss:
        batch = self.student.batch([self.data.packs[i] for i in packs])
        log_probs = self.student.token_log_probs(batch)
        right, wrong = _row_sums(log_probs, batch).view(-1, 2).unbind(1)
        found = self._asked(batch) if self.streamed else [self.reference[row] for row in batch.rows]
        known = torch.tensor(found, device=right.device)
        known_right, known_wrong = known.to(right.dtype).view(-1, 2).unbind(1)
        loss, margins = dpo_sum(right, wrong, known_right, known_wrong, self.settings.beta)
        pairs = float(len(packs))
        figures = {
            "margin": (float(margins.sum()), pairs),
            "preferred": (float((margins > 0).sum()), pairs),
        }
        if self.settings.ce:
            lengths = torch.bincount(batch.row_of, minlength=len(batch.rows)).to(right.device)
            cross_entropy = -(right / lengths.view(-1, 2)[:, 0]).sum()
            loss = loss + self.settings.ce * cross_entropy
            figures["ce"] = (float(cross_entropy.detach()), pairs)
        return BatchLoss(loss, batch.rows, batch.answer_tokens, batch.padding_share, figures)

    def _asked(self, batch: PackBatch) -> list[float]:
        """How likely the reference finds each answer of a batch."""
        model = self.student.model
        model.eval()
        try:
            if self.settings.reference == "context":
                with self.origin.base():
                    told = score_rows(model.llm, [self.data.teacher[row] for row in batch.rows])
                return [float(score.log_probs.sum()) for score in told]
            with torch.no_grad(), self.origin.start():
                return [float(x) for x in _row_sums(self.student.token_log_probs(batch), batch)]
        finally:
            model.train()


def _row_sums(log_probs: Tensor, batch: PackBatch) -> Tensor:
    """(rows,) of a batch: the sum over each row's tokens."""
    sums = torch.zeros(len(batch.rows), dtype=log_probs.dtype, device=log_probs.device)
    return sums.index_add(0, batch.row_of.to(log_probs.device), log_probs)


def _firsts(row: Row) -> list[int]:
    """The places, among a row's learned tokens, at which its answers begin."""
    places, before = [], 0
    for start, end in row.spans:
        places.append(before)
        before += end - start
    return places


def score_teacher(
    llm: Any,
    rows: dict[str, Row],
    path: Path,
    *,
    top_k: int | None = None,
    temperature: float = 1.0,
    progress: bool = False,
) -> dict[str, AnswerScores]:
    """`score_rows` of what the base LLM reads, kept in `path`: a run that is resumed does not ask it again."""
    told = {name: (row.ids, row.spans) for name, row in rows.items()}
    key = stable_hash({"rows": told, "top_k": top_k, "temperature": temperature})
    tensors: dict[str, Tensor] = {}
    if path.exists():
        with safetensors.safe_open(str(path), "pt") as file:
            if (file.metadata() or {}).get("key") == key:
                tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (not a mapping)
    if not tensors:
        found = score_rows(llm, list(rows.values()), top_k=top_k, temperature=temperature, progress=progress)
        tensors = {"log_probs": torch.cat([score.log_probs for score in found])}
        if top_k:
            tensors["top_ids"] = torch.cat([s.top_ids for s in found if s.top_ids is not None]).int()
            tensors["top_log_probs"] = torch.cat(
                [s.top_log_probs for s in found if s.top_log_probs is not None]
            )
        with atomic_write(path, "wb") as handle:
            handle.write(safetensors.torch.save(tensors, metadata={"key": key}))
    if top_k:
        tensors["top_ids"] = tensors["top_ids"].long()
    sizes = [row.answer_tokens for row in rows.values()]
    parts = {name: value.split(sizes) for name, value in tensors.items()}
    return {
        name: AnswerScores(answer_ids(row), **{key: values[i] for key, values in parts.items()})
        for i, (name, row) in enumerate(rows.items())
    }
