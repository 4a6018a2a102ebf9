"""How likely an LLM finds given answers: the one function behind KL, token difficulty, references and perplexity.

    chats + answers -> token ids -> packs (what chats share is run once) -> log-probabilities of the answers' tokens

In: an LLM, chats, and an answer to each. Out: for every answer its tokens (the one that ends the turn included), their
log-probabilities, and on demand the most likely tokens at each of their places. The answer's tokens are exactly those that
training learns, because both are written and tokenised by the same code.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from tqdm import tqdm

from speech_llm.data.packing import IGNORE, Row, collate, constant_prefix, longest_first, pack_group
from speech_llm.generation import group_prompts
from speech_llm.kv_cache import expanded, run_prefix
from speech_llm.model.configuration import SpeechLLMConfig
from speech_llm.model.masks import additive, attention_window, logits_only_at
from speech_llm.model.processing import SpeechLLMProcessor

# Answer positions whose distribution over the vocabulary is in memory at once.
CHUNK = 512


@dataclass(frozen=True)
class AnswerScores:
    """One answer's n tokens as an LLM finds them.

    `ids`: its tokens. `log_probs`: (n,) float32, natural logarithm, at temperature 1. `top_ids`, `top_log_probs`: (n, k) the
    most likely tokens of each place and their log-probabilities at the temperature asked for; None when not asked for.
    """

    ids: list[int]
    log_probs: Tensor
    top_ids: Tensor | None = None
    top_log_probs: Tensor | None = None

    @property
    def perplexity(self) -> float:
        """exp of the mean negative log-probability of a token."""
        return math.exp(-float(self.log_probs.mean())) if len(self.ids) else math.nan


def mean_perplexity(scores: Sequence[AnswerScores]) -> float:
    """The perplexity of all answers' tokens together: exp of their mean negative log-probability; NaN of no token."""
    tokens = sum(len(score.ids) for score in scores)
    total = -sum(float(score.log_probs.sum()) for score in scores)
    return math.exp(total / tokens) if tokens else math.nan


def score_answers(
    llm: Any,
    tokenizer: Any,
    chats: Sequence[Sequence[dict[str, Any]]],
    answers: Sequence[str],
    *,
    batch_tokens: int = 4096,
    top_k: int | None = None,
    temperature: float = 1.0,
    progress: bool = False,
) -> list[AnswerScores]:
    """Score each answer as the next turn of its chat (lists of `{"role", "content": str}`), in order.

    `batch_tokens` bounds the tokens run side by side. `top_k`: also keep so many most likely tokens of each place, their
    log-probabilities at `temperature`. No gradients. An answer's scores do not depend on the others.
    Raises `UserError` when the tokenizer has no chat template or the template refuses a chat.
    """
    # A processor without sounds: the text of a turn becomes the same tokens as in training.
    processor = SpeechLLMProcessor(tokenizer, None, SpeechLLMConfig())
    rows = []
    for number, (chat, answer) in enumerate(zip(chats, answers, strict=True)):
        turns = [{**turn, "train": False} for turn in chat]
        rendered = processor.render([*turns, {"role": "assistant", "content": answer}])
        rows.append(Row(str(number), list(rendered.input_ids), list(rendered.answer_spans), []))
    return score_rows(
        llm, rows, batch_tokens=batch_tokens, top_k=top_k, temperature=temperature, progress=progress
    )


@torch.inference_mode()
def score_rows(
    llm: Any,
    rows: Sequence[Row],
    *,
    batch_tokens: int = 4096,
    top_k: int | None = None,
    temperature: float = 1.0,
    progress: bool = False,
) -> list[AnswerScores]:
    """`score_answers` for rows that are tokens already, without audio: the tokens in the spans of each are scored."""
    found: dict[int, AnswerScores] = {}
    with tqdm(total=len(rows), desc="score answers", unit="answer", disable=not progress) as bar:
        for members, logits, targets in _run(llm, rows, batch_tokens):
            pieces = [
                _score(logits[i : i + CHUNK], targets[i : i + CHUNK], top_k, temperature)
                for i in range(0, len(targets), CHUNK)
            ]
            columns = [torch.cat(column) for column in zip(*pieces, strict=True)]
            sizes = [rows[number].answer_tokens for number in members]
            for number, ids, *values in zip(
                members, targets.cpu().split(sizes), *(column.split(sizes) for column in columns), strict=True
            ):
                found[number] = AnswerScores(ids.tolist(), *values)
            bar.update(len(members))
    return [found[number] for number in range(len(rows))]


@torch.no_grad()
def row_logits(llm: Any, rows: Sequence[Row], batch_tokens: int = 4096) -> Tensor:
    """Logits (n, vocabulary) that predict the tokens in the rows' spans, one row after the other."""
    found: dict[int, Tensor] = {}
    for members, logits, _ in _run(llm, rows, batch_tokens):
        pieces = logits.split([rows[number].answer_tokens for number in members])
        found.update(zip(members, pieces, strict=True))
    return torch.cat([found[number] for number in range(len(rows))])


def _run(llm: Any, rows: Sequence[Row], batch_tokens: int) -> Iterator[tuple[list[int], Tensor, Tensor]]:
    """For batches of rows: their numbers, logits (n, vocabulary) at their answers' places, and the tokens (n,) there."""
    if not rows:
        return
    device = llm.get_input_embeddings().weight.device
    window = attention_window(llm.config.get_text_config())
    packable = window is None or max(len(row.ids) for row in rows) <= window
    prefix_ids = constant_prefix(list(rows), -1) if packable else []
    prefix, start = run_prefix(llm, prefix_ids), len(prefix_ids)
    if packable:
        groups = [group.members for group in group_prompts([row.ids for row in rows], start)]
    else:  # the LLM's own mask knows how far each of its layers sees
        groups = [[number] for number in range(len(rows))]
    packs = [pack_group([rows[i] for i in members], start) for members in groups]
    for chosen in longest_first(packs, batch_tokens):
        batch = collate([packs[i] for i in chosen], start, 0)
        wanted = (batch.targets != IGNORE).to(device)
        if packable:
            mask = additive(batch.mask, llm.get_input_embeddings().weight.dtype)
        else:
            lengths = torch.tensor([len(packs[i].ids) for i in chosen])
            mask = (torch.arange(batch.ids.shape[1])[None] < lengths[:, None]).long()
        with logits_only_at(llm, wanted):
            logits = llm(
                input_ids=batch.ids.to(device),
                attention_mask=mask.to(device),
                position_ids=batch.positions.to(device),
                past_key_values=expanded(prefix, len(batch.ids)) if prefix else None,
                use_cache=bool(prefix),
            ).logits[0]
        yield [number for i in chosen for number in groups[i]], logits, batch.targets.to(device)[wanted]


def _score(logits: Tensor, targets: Tensor, top_k: int | None, temperature: float) -> tuple[Tensor, ...]:
    """Log-probabilities (n,) of the targets; with `top_k` also the top ids (n, k) and theirs at the temperature."""
    logits = logits.float()
    chosen = logits.log_softmax(-1).gather(1, targets[:, None])[:, 0].cpu()
    if top_k is None:
        return (chosen,)
    scaled = (logits / temperature).log_softmax(-1)
    values, ids = scaled.topk(min(top_k, scaled.shape[-1]), dim=-1)
    return chosen, ids.cpu(), values.cpu()
