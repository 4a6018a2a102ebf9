"""How likely an LLM finds given answers: the one function behind KL, token difficulty, references and perplexity.

    chats + answers -> token ids -> packs (what chats share is run once) -> log-probabilities of the answers' tokens

In: an LLM, chats, and an answer to each. Out: for every answer its tokens (the one that ends the turn included), their
log-probabilities, and on demand the most likely tokens at each of their places. The answer's tokens are exactly those that
training learns, because both are written and tokenised by the same code.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor
from tqdm import tqdm

from speech_llm.data.packing import IGNORE, Row, collate, constant_prefix, longest_first, pack_group
from speech_llm.grouping import group_prompts
from speech_llm.kv_cache import expanded, run_prefix
from speech_llm.model.configuration import SpeechLLMConfig
from speech_llm.model.masks import additive, attention_window, logits_only_at, states_at
from speech_llm.model.processing import SpeechLLMProcessor
from speech_llm.training.answers import Answers, in_chunks, vocabulary_of

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
        for members, logits, targets, _ in _run(llm, rows, batch_tokens):
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
    for members, logits, _, _ in _run(llm, rows, batch_tokens):
        found.update(zip(members, _by_row(logits, rows, members), strict=True))
    return torch.cat([found[number] for number in range(len(rows))])


@torch.no_grad()
def row_answers(llm: Any, rows: Sequence[Row], most_logits: int, batch_tokens: int = 4096) -> Answers:
    """What predicts the tokens in the rows' spans, one row after the other; more logits than `most_logits` are not made at once."""
    if sum(row.answer_tokens for row in rows) * vocabulary_of(llm) <= most_logits:
        return _all_logits(llm, rows, batch_tokens)
    found: dict[int, tuple[Tensor, Tensor]] = {}
    chunked: Answers | None = None
    for members, logits, targets, states in _run(llm, rows, batch_tokens, only_states=True):
        assert states is not None
        chunked = in_chunks(llm, states, targets, logits[0], most_logits)
        if chunked is None:
            return _all_logits(llm, rows, batch_tokens)
        parts = zip(_by_row(states, rows, members), _by_row(targets, rows, members), strict=True)
        found.update(zip(members, parts, strict=True))
    assert chunked is not None
    states, targets = (
        torch.cat(column) for column in zip(*(found[i] for i in range(len(rows))), strict=True)
    )
    return replace(chunked, states=states, targets=targets)


def _all_logits(llm: Any, rows: Sequence[Row], batch_tokens: int) -> Answers:
    ids = [token for row in rows for start, end in row.spans for token in row.ids[start:end]]
    logits = row_logits(llm, rows, batch_tokens)
    return Answers(logits, torch.tensor(ids, device=logits.device))


def _by_row(values: Tensor, rows: Sequence[Row], members: Sequence[int]) -> tuple[Tensor, ...]:
    return values.split([rows[number].answer_tokens for number in members])


def _run(
    llm: Any, rows: Sequence[Row], batch_tokens: int, only_states: bool = False
) -> Iterator[tuple[list[int], Tensor, Tensor, Tensor | None]]:
    """For batches of rows: their numbers, logits (n, vocabulary) at their answers' places, and the tokens (n,) there.

    `only_states`: logits of the first place alone, and last the hidden states (n, width) from which the output layer makes them all.
    """
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
        with states_at(llm, wanted) if only_states else logits_only_at(llm, wanted) as states:
            logits = llm(
                input_ids=batch.ids.to(device),
                attention_mask=mask.to(device),
                position_ids=batch.positions.to(device),
                past_key_values=expanded(prefix, len(batch.ids)) if prefix else None,
                use_cache=bool(prefix),
            ).logits[0]
        numbers = [number for i in chosen for number in groups[i]]
        yield numbers, logits, batch.targets.to(device)[wanted], states[0] if states else None


def _score(logits: Tensor, targets: Tensor, top_k: int | None, temperature: float) -> tuple[Tensor, ...]:
    """Log-probabilities (n,) of the targets; with `top_k` also the top ids (n, k) and theirs at the temperature."""
    logits = logits.float()
    chosen = logits.log_softmax(-1).gather(1, targets[:, None])[:, 0].cpu()
    if top_k is None:
        return (chosen,)
    scaled = (logits / temperature).log_softmax(-1)
    values, ids = scaled.topk(min(top_k, scaled.shape[-1]), dim=-1)
    return chosen, ids.cpu(), values.cpu()
