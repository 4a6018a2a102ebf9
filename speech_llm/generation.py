"""Batched sampling from a causal LLM: the one generator behind the teacher, evaluation and chat.

In: prompts as token ids (and, where a prompt holds audio, the embeddings that stand for them).
Out: token ids of the answers, in the order of the prompts.

What makes it quick on any device: the prefix that all prompts of a call share (system prompt, worked example) is run
once and its key/value cache reused; prompts are batched by length under a token budget, left-padded; rows that
have ended leave the batch, so that one long answer does not keep the others computing.
"""

from __future__ import annotations

import copy
import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers import DynamicCache


@dataclass
class Prompt:
    """One prompt: `ids`, and `embeds` (len(ids), width) when it holds audio (else they are looked up)."""

    ids: list[int]
    embeds: Tensor | None = None


def shared_prefix_length(prompts: Sequence[Prompt]) -> int:
    """How many leading tokens all prompts share as plain text, leaving each at least one token of its own.

    Audio placeholders never count as shared: the same id stands for different sounds.
    """
    if not prompts:
        return 0
    first = prompts[0].ids
    length = min(len(prompt.ids) for prompt in prompts) - 1
    for prompt in prompts:
        length = next((i for i in range(length) if prompt.ids[i] != first[i]), length)
    return length


@torch.inference_mode()
def generate(
    llm: Any,
    prompts: Sequence[Prompt],
    *,
    stop_ids: Sequence[int],
    max_new_tokens: int = 64,
    temperature: float = 0.0,
    top_p: float = 1.0,
    seed: int = 0,
    batch_tokens: int = 4096,
    audio_token_id: int | None = None,
    on_done: Callable[[int, list[int]], None] | None = None,
) -> list[list[int]]:
    """Answer every prompt; greedy when `temperature` is 0, else nucleus sampling with one seed per prompt.

    `batch_tokens` bounds rows x (prefix + longest prompt + answer) of a batch. `on_done(index, ids)` is called
    as soon as a prompt's answer is complete (progress bars, saving). The stop token is not part of the answer.
    A row's result does not depend on its batch-mates beyond rounding: padding is masked, positions are its own,
    and sampling draws from a generator of its own.
    """
    answers: list[list[int]] = [[] for _ in prompts]
    if not prompts:
        return answers
    shared = shared_prefix_length(prompts)
    if audio_token_id is not None and audio_token_id in prompts[0].ids[:shared]:
        shared = prompts[0].ids.index(audio_token_id)
    prefix = _run_prefix(llm, prompts[0].ids[:shared]) if shared else None
    order = sorted(range(len(prompts)), key=lambda i: -len(prompts[i].ids))
    for batch in _batches(order, prompts, max_new_tokens, batch_tokens):
        rows = [prompts[i] for i in batch]
        for row, ids in _generate_batch(
            llm,
            rows,
            shared,
            prefix,
            set(stop_ids),
            max_new_tokens,
            temperature,
            top_p,
            [seed + i for i in batch],
        ):
            answers[batch[row]] = ids
            if on_done is not None:
                on_done(batch[row], ids)
    return answers


def _batches(order: list[int], prompts: Sequence[Prompt], new_tokens: int, budget: int) -> list[list[int]]:
    """Cut the prompts, longest first, into batches of rows x longest row <= budget."""
    out: list[list[int]] = []
    longest = 0
    for index in order:
        if not out or (len(out[-1]) + 1) * longest > budget:
            out.append([])
            longest = len(prompts[index].ids) + new_tokens
        out[-1].append(index)
    return out


def _run_prefix(llm: Any, ids: list[int]) -> DynamicCache:
    cache = DynamicCache(config=llm.config)
    device = llm.get_input_embeddings().weight.device
    llm(input_ids=torch.tensor([ids], device=device), past_key_values=cache, use_cache=True, logits_to_keep=1)
    return cache


def embed_prompt(llm: Any, prompt: Prompt, start: int = 0) -> Tensor:
    """Embeddings (len - start, width) of a prompt from token `start` on."""
    if prompt.embeds is not None:
        return prompt.embeds[start:]
    table = llm.get_input_embeddings()
    return table(torch.tensor(prompt.ids[start:], device=table.weight.device))


def _generate_batch(
    llm: Any,
    rows: list[Prompt],
    shared: int,
    prefix: DynamicCache | None,
    stop_ids: set[int],
    max_new_tokens: int,
    temperature: float,
    top_p: float,
    seeds: list[int],
) -> list[tuple[int, list[int]]]:
    """Answer one batch; returns (row, ids) pairs."""
    table = llm.get_input_embeddings()
    device, dtype = table.weight.device, table.weight.dtype
    own = [embed_prompt(llm, row, shared) for row in rows]
    longest = max(len(piece) for piece in own)
    embeds = torch.zeros(len(rows), longest, table.weight.shape[1], device=device, dtype=dtype)
    mask = torch.zeros(len(rows), shared + longest, device=device, dtype=torch.long)
    mask[:, :shared] = 1
    for i, piece in enumerate(own):
        embeds[i, longest - len(piece) :] = piece
        mask[i, shared + longest - len(piece) :] = 1
    if prefix is None:
        cache = DynamicCache(config=llm.config)
    else:
        cache = copy.deepcopy(prefix)
        cache.batch_repeat_interleave(len(rows))
    positions = (mask.cumsum(-1) - 1).clamp(min=0)[:, shared:]
    generators = [torch.Generator().manual_seed(seed) for seed in seeds] if temperature > 0 else None
    alive = list(range(len(rows)))
    answers: list[list[int]] = [[] for _ in rows]
    finished: list[tuple[int, list[int]]] = []
    for step in range(max_new_tokens):
        logits = llm(
            inputs_embeds=embeds,
            attention_mask=mask,
            position_ids=positions,
            past_key_values=cache,
            use_cache=True,
            logits_to_keep=1,
        ).logits[:, -1]
        chosen = _choose(
            logits, temperature, top_p, None if generators is None else [generators[r] for r in alive]
        )
        keep = []
        for place, (row, token) in enumerate(zip(alive, chosen.tolist(), strict=True)):
            if token not in stop_ids:
                answers[row].append(token)
                if step + 1 < max_new_tokens:
                    keep.append(place)
                    continue
            finished.append((row, answers[row]))
        if not keep:
            break
        if len(keep) < len(alive):
            index = torch.tensor(keep, device=device)
            cache.batch_select_indices(index)
            mask, positions, chosen = mask[index], positions[index], chosen[index]
            alive = [alive[place] for place in keep]
        embeds = table(chosen[:, None])
        mask = torch.cat([mask, mask.new_ones(len(alive), 1)], dim=1)
        positions = positions[:, -1:] + 1
    return finished


def _choose(
    logits: Tensor, temperature: float, top_p: float, generators: list[torch.Generator] | None
) -> Tensor:
    """Next token (rows,): the most likely, or a nucleus sample with each row's own generator."""
    if temperature <= 0 or generators is None:
        return logits.argmax(-1)
    probabilities = torch.softmax(logits.float() / temperature, dim=-1)
    if top_p < 1:
        sorted_p, order = probabilities.sort(-1, descending=True)
        beyond = sorted_p.cumsum(-1) - sorted_p >= top_p
        probabilities = torch.zeros_like(probabilities).scatter(-1, order, sorted_p.masked_fill(beyond, 0.0))
    picks = [
        torch.multinomial(row.cpu(), 1, generator=generator)
        for row, generator in zip(probabilities, generators, strict=True)
    ]
    return torch.cat(picks).to(logits.device)


def answer_chats(
    llm: Any,
    tokenizer: Any,
    chats: Sequence[Sequence[dict[str, Any]]],
    *,
    max_new_tokens: int = 64,
    batch_tokens: int = 4096,
    on_answer: Callable[[int, str, int], None] | None = None,
) -> list[str]:
    """Greedy answers of a text LLM to chats (lists of `{"role", "content": str}`), in order.

    Chats that begin alike (same worked example) run together and share that part; a chat that occurs twice is
    answered once. `on_answer(index, text, tokens)` is called for the first of equal chats, as soon as it is answered.
    """
    stop_ids = end_of_turn_ids(tokenizer, llm)
    keys = [json.dumps(chat, sort_keys=True, ensure_ascii=False) for chat in chats]
    first_of = {key: i for i, key in reversed(list(enumerate(keys)))}
    groups: dict[str, list[int]] = {}
    for index in sorted(first_of.values()):
        groups.setdefault(json.dumps(chats[index][:-1], ensure_ascii=False), []).append(index)
    answered: dict[int, str] = {}
    for group in groups.values():
        prompts = [
            Prompt(
                tokenizer.apply_chat_template(
                    list(chats[i]), add_generation_prompt=True, tokenize=True, return_dict=True
                )["input_ids"]
            )
            for i in group
        ]

        def done(place: int, ids: list[int], group: list[int] = group) -> None:
            text = tokenizer.decode(ids, skip_special_tokens=True).strip()
            answered[group[place]] = text
            if on_answer is not None:
                on_answer(group[place], text, len(ids) + 1)

        generate(
            llm,
            prompts,
            stop_ids=stop_ids,
            max_new_tokens=max_new_tokens,
            batch_tokens=batch_tokens,
            on_done=done,
        )
    return [answered[first_of[key]] for key in keys]


def end_of_turn_ids(tokenizer: Any, llm: Any) -> list[int]:
    """Every id that ends an answer: the tokenizer's and the generation settings' end-of-sequence tokens."""
    found: list[int] = []
    settings = getattr(llm, "generation_config", None)
    for ids in (tokenizer.eos_token_id, getattr(settings, "eos_token_id", None)):
        if ids is not None:
            found += list(ids) if isinstance(ids, (list, tuple)) else [int(ids)]
    return sorted(set(found))
