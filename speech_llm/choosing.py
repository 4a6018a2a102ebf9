"""How likely a model finds each of several answers: what multiple choice is scored by.

In: contexts and choices. Out: the summed log-likelihood of every choice. After a plain text, context and choice become tokens as
lm-evaluation-harness makes them: both as one text, cut where the context alone ends. In a conversation the choice is an answer turn
and the token that ends the turn counts.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch

from speech_llm.data.packing import Row
from speech_llm.errors import UserError
from speech_llm.examples import Example, Message
from speech_llm.kv_cache import run_prefix
from speech_llm.targets.score import score_rows

# Tokens of a pack, which holds questions about one clip behind its sound, and of a batch of packs.
PACK_TOKENS, BATCH_TOKENS = 1024, 4096


Plain = Callable[[list[str], list[Sequence[str]]], list[list[float]]]
InChat = Callable[[list[list[Message]], list[Sequence[str]]], list[list[float]]]


def choose_by_form(
    contexts: Sequence[str | list[Message]], choices: Sequence[Sequence[str]], plain: Plain, in_chat: InChat
) -> list[list[float]]:
    """Texts go to `plain`, conversations to `in_chat`; the results are in order."""
    found: dict[int, list[float]] = {}
    texts = [(i, context) for i, context in enumerate(contexts) if isinstance(context, str)]
    chats = [(i, context) for i, context in enumerate(contexts) if not isinstance(context, str)]
    if texts:
        told = plain([text for _, text in texts], [choices[i] for i, _ in texts])
        found.update(zip((i for i, _ in texts), told, strict=True))
    if chats:
        told = in_chat([chat for _, chat in chats], [choices[i] for i, _ in chats])
        found.update(zip((i for i, _ in chats), told, strict=True))
    return [found[i] for i in range(len(contexts))]


def choose_plain(
    llm: Any, tokenizer: Any, contexts: Sequence[str], choices: Sequence[Sequence[str]]
) -> list[list[float]]:
    """Each choice as the continuation of a plain text."""
    rows = []
    for number, (context, own) in enumerate(zip(contexts, choices, strict=True)):
        for place, choice in enumerate(own):
            start, rest = encode_pair(tokenizer, context, choice)
            ids = [*start, *rest]
            rows.append(Row(f"{number}/{place}", ids, [(len(start), len(ids))], []))
    return by_context([float(s.log_probs.sum()) for s in score_rows(llm, rows)], choices)


def encode_pair(tokenizer: Any, context: str, continuation: str) -> tuple[list[int], list[int]]:
    """Tokens of a context and of what follows it; spaces at the context's end belong to the continuation."""
    bare = context.rstrip()
    whole = list(tokenizer(context + continuation)["input_ids"])
    start = list(tokenizer(bare)["input_ids"]) if bare else []
    if not start:
        prefix = tokenizer.bos_token_id if tokenizer.bos_token_id is not None else tokenizer.eos_token_id
        return [prefix], whole
    return start, whole[len(start) :]


def choose_in_chat(
    model: Any,
    processor: Any,
    features: Any,
    conversations: Sequence[list[Message]],
    choices: Sequence[Sequence[str]],
) -> list[list[float]]:
    """Each choice as the answer in a conversation that may hold sounds; questions about one clip share it.

    Raises `UserError` for a sound that cannot be used.
    """
    # What packs rows for training packs them here; it is only needed by who has a speech model.
    from speech_llm.training.rows import build_training_set
    from speech_llm.training.student import Student

    examples = [
        Example(id=f"{number}/{place}", messages=[*turns, {"role": "assistant", "content": choice}])
        for number, (turns, own) in enumerate(zip(_not_learned(conversations), choices, strict=True))
        for place, choice in enumerate(own)
    ]
    data = build_training_set(examples, processor, features, PACK_TOKENS, use_prefix=False, progress=False)
    if data.rejects:
        bad = data.rejects[0]
        raise UserError(f"{bad.get('audio', bad['id'])}: {bad['reason']}")
    student = Student(model, processor, features, run_prefix(model.llm, data.prefix), len(data.prefix))
    found: dict[str, float] = {}
    with torch.no_grad():
        for batch in student.batches(data.packs, BATCH_TOKENS):
            each = student.token_log_probs(batch)
            parts = each.split([data.rows[row].answer_tokens for row in batch.rows])
            found.update((row, float(part.sum())) for row, part in zip(batch.rows, parts, strict=True))
    return by_context([found[example.id] for example in examples], choices)


def _not_learned(conversations: Sequence[list[Message]]) -> list[list[Message]]:
    return [[{**turn, "train": False} for turn in turns] for turns in conversations]


def by_context(values: Sequence[float], choices: Sequence[Sequence[str]]) -> list[list[float]]:
    """A flat list of values as one list per context, as long as its choices."""
    out, place = [], 0
    for own in choices:
        out.append(list(values[place : place + len(own)]))
        place += len(own)
    return out
