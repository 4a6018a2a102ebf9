"""Batched sampling from a causal LLM: the one generator behind the teacher, evaluation and chat.

    prompts -> groups that begin alike -> packed prefill -> rows of one cache -> decode

In: prompts as token ids (and, where a prompt holds audio, the embeddings that stand for them).
Out: token ids of the answers, in the order of the prompts.

What makes it quick on any device: nothing that prompts share is computed twice (the system prompt of all, the worked
example or the sound of a few); prompts of all groups decode side by side under a token budget, in a cache that is
never copied; rows that have ended leave the batch, so that one long answer does not keep the others computing.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from speech_llm.grouping import Group, group_prompts, shared_length
from speech_llm.kv_cache import Prefix, expanded, roomy_cache, run_prefix
from speech_llm.model.masks import additive, attention_window, branch_mask, logits_only_at

# A batch that has fallen to this share of its rows is worth moving together.
COMPACT_BELOW = 0.8
# Packs shorter than this share of the longest wait for a forward pass of their own, once one has enough tokens to keep
# a processor busy.
LEAST_FILLED, ENOUGH_TOKENS = 0.8, 256


@dataclass
class Prompt:
    """One prompt: `ids`, and `embeds` (len(ids), width) when it holds audio (else they are looked up).

    `sounds` names what its audio placeholders stand for: prompts with the same sounds may share their computation.
    """

    ids: list[int]
    embeds: Tensor | None = None
    sounds: tuple[str, ...] = ()


def comparable_ids(prompts: Sequence[Prompt], audio_token_id: int | None = None) -> list[list[int]]:
    """The prompts' ids, audio placeholders replaced by a number of their sounds (or of the prompt, when unnamed).

    So two prompts that begin with the same numbers begin with the same embeddings.
    """
    numbers: dict[Any, int] = {}
    out = []
    for place, prompt in enumerate(prompts):
        if prompt.embeds is None or audio_token_id is None or audio_token_id not in prompt.ids:
            # Embeddings of which nothing is known are shared with no one.
            unknown = prompt.embeds is not None and audio_token_id is None
            out.append([-1 - place, *prompt.ids[1:]] if unknown else prompt.ids)
            continue
        own = -1 - numbers.setdefault(prompt.sounds or ("", place), len(numbers))
        out.append([own if token == audio_token_id else token for token in prompt.ids])
    return out


@torch.inference_mode()
def generate(
    llm: Any,
    prompts: Sequence[Prompt],
    *,
    stop_ids: Sequence[int],
    max_new_tokens: int = 64,
    temperature: float = 0.0,
    top_p: float = 1.0,
    seed: int | Sequence[int] = 0,
    batch_tokens: int = 4096,
    audio_token_id: int | None = None,
    on_done: Callable[[int, list[int]], None] | None = None,
    on_token: Callable[[int, list[int]], None] | None = None,
    top_k: int = 0,
) -> list[list[int]]:
    """Answer every prompt; greedy when `temperature` is 0, else nucleus sampling with one seed per prompt.

    `seed`: one for all (prompt i draws from seed + i), or each prompt's own.
    `batch_tokens` bounds rows x (longest prompt + answer) of a batch. `on_done(index, ids)` is called
    as soon as a prompt's answer is complete (progress bars, saving). The stop token is not part of the answer.
    `on_token(index, ids)` is called with an answer that has grown by a token; what it raises ends the generation.
    A row's result does not depend on its batch-mates beyond rounding: padding is masked, positions are its own,
    and sampling draws from a generator of its own. `top_k`: sample among the k likeliest tokens only; 0 = all.
    """
    answers: list[list[int]] = [[] for _ in prompts]
    if not prompts:
        return answers
    keys = comparable_ids(prompts, audio_token_id)
    start = shared_length(keys)
    if any(key < 0 for key in keys[0][:start]):  # the prefix is run from ids alone
        start = next(i for i, key in enumerate(keys[0]) if key < 0)
    prefix = run_prefix(llm, prompts[0].ids[:start])
    window = attention_window(llm.config)
    packable = window is None or max(len(prompt.ids) for prompt in prompts) <= window
    groups = (
        group_prompts(keys, start)
        if packable
        else [Group(len(p.ids) - 1, [i]) for i, p in enumerate(prompts)]
    )
    stop = set(stop_ids)
    seeds = [seed + i for i in range(len(prompts))] if isinstance(seed, int) else list(seed)
    for batch in _batches(groups, prompts, max_new_tokens, batch_tokens):
        members, logits, layers, mask = _prefill(llm, prompts, batch, start, prefix, batch_tokens, packable)
        generators = [torch.Generator().manual_seed(seeds[i]) for i in members] if temperature > 0 else None
        sample = _Sampler(temperature, top_p, generators, top_k)

        def grown(row: int, ids: list[int], members: list[int] = members) -> None:
            if on_token is not None:
                on_token(members[row], ids)

        for row, ids in _decode(llm, logits, layers, mask, sample, stop, max_new_tokens, grown):
            answers[members[row]] = ids
            if on_done is not None:
                on_done(members[row], ids)
    return answers


def _batches(
    groups: Sequence[Group], prompts: Sequence[Prompt], new_tokens: int, budget: int
) -> Iterator[list[Group]]:
    """Groups whose rows decode together: rows x (longest prompt + answer) <= budget, groups split where they must be."""
    batch: list[Group] = []
    rows, longest = 0, 0
    for group in sorted(groups, key=lambda group: -max(len(prompts[i].ids) for i in group.members)):
        waiting = list(group.members)
        while waiting:
            longest = max([longest, *(len(prompts[i].ids) + new_tokens for i in waiting)])
            room = max(budget // longest - rows, 0 if batch else 1)
            taken, waiting = waiting[:room], waiting[room:]
            if taken:
                batch.append(Group(group.shared, taken))
                rows += len(taken)
            if waiting:
                yield batch
                batch, rows, longest = [], 0, 0
    if batch:
        yield batch


def _prefill(
    llm: Any,
    prompts: Sequence[Prompt],
    groups: Sequence[Group],
    start: int,
    prefix: Prefix,
    budget: int,
    packable: bool,
) -> tuple[list[int], Tensor, Prefix, Tensor]:
    """The prompts in the order of the rows, and of each row: logits (rows, vocabulary), keys and values, mask.

    Keys and values of every layer are (rows, heads, length, width), left-padded; the mask (rows, length) has 1 where
    a token is.

    The groups are run as packs: the shared part once, each prompt's own part as a branch of its own.
    """
    device = llm.get_input_embeddings().weight.device
    pieces: list[list[tuple[Tensor, Tensor]]] = []
    logits: list[Tensor] = []
    # For each row the places of its tokens among all keys: the prefix first, then one pack after the other.
    places: list[list[int]] = []
    members: list[int] = []
    offset = start
    for packs in _pack_batches(groups, prompts, start, budget):
        width = max(_pack_length(group, prompts, start) for group in packs)
        embeds = torch.zeros(
            len(packs), width, llm.get_input_embeddings().weight.shape[1],
            device=device, dtype=llm.get_input_embeddings().weight.dtype,
        )  # fmt: skip
        branch = torch.full((len(packs), width), -1)
        positions = torch.zeros(len(packs), width, dtype=torch.long)
        ends = torch.zeros(len(packs), width, dtype=torch.bool)
        for row, group in enumerate(packs):
            shared = group.shared_from(start)
            place = shared - start
            if place:
                embeds[row, :place] = _embedded(llm, prompts[group.members[0]], start, shared)
                branch[row, :place] = 0
                positions[row, :place] = torch.arange(start, shared)
            common = [*range(start), *range(offset, offset + place)]
            for number, member in enumerate(group.members, start=1):
                own = _embedded(llm, prompts[member], shared, len(prompts[member].ids))
                end = place + len(own)
                embeds[row, place:end] = own
                branch[row, place:end] = number
                positions[row, place:end] = torch.arange(shared, shared + len(own))
                ends[row, end - 1] = True
                members.append(member)
                places.append([*common, *range(offset + place, offset + end)])
                place = end
            offset += width
        cache = expanded(prefix, len(packs))
        if packable:
            mask = additive(branch_mask(branch.to(device), start), embeds.dtype)
        else:  # one prompt a pack: the LLM's own mask knows how far each of its layers sees
            mask = torch.cat([torch.ones(len(packs), start), (branch >= 0).float()], dim=1).long().to(device)
        with logits_only_at(llm, ends.to(device)):
            output = llm(
                inputs_embeds=embeds,
                attention_mask=mask,
                position_ids=positions.to(device),
                past_key_values=cache,
                use_cache=True,
            )
        logits.append(output.logits[0])
        # (rows, heads, length, width) -> (heads, rows x length, width), without the prefix
        pieces.append(
            [tuple(states[:, :, start:].transpose(0, 1).flatten(1, 2) for states in (layer.keys, layer.values))
             for layer in cache.layers]
        )  # fmt: skip
    longest = max(len(row) for row in places)
    index = torch.zeros(len(places), longest, dtype=torch.long)
    filled = torch.zeros(len(places), longest, dtype=torch.long)
    for row, own_places in enumerate(places):
        index[row, longest - len(own_places) :] = torch.tensor(own_places)
        filled[row, longest - len(own_places) :] = 1
    index = index.to(device)
    layers = []
    for number in range(len(pieces[0])):
        both = []
        for kind in (0, 1):
            head = [prefix[number][kind][0]] if prefix else []
            both.append(
                torch.cat([*head, *(piece[number][kind] for piece in pieces)], dim=1)[:, index].transpose(
                    0, 1
                )
            )
        layers.append((both[0], both[1]))
    return members, torch.cat(logits), layers, filled.to(device)


def _pack_batches(
    groups: Sequence[Group], prompts: Sequence[Prompt], start: int, budget: int
) -> Iterator[list[Group]]:
    """Groups that run together, longest first: packs x longest pack <= budget, and little of that padding."""
    batch: list[Group] = []
    longest = 0
    for group in sorted(groups, key=lambda group: -_pack_length(group, prompts, start)):
        length = _pack_length(group, prompts, start)
        wasteful = length < LEAST_FILLED * longest and len(batch) * longest >= ENOUGH_TOKENS
        if batch and (wasteful or (len(batch) + 1) * longest > budget):
            yield batch
            batch = []
        longest = longest if batch else length
        batch.append(group)
    yield batch


def _pack_length(group: Group, prompts: Sequence[Prompt], start: int) -> int:
    shared = group.shared_from(start)
    return shared - start + sum(len(prompts[i].ids) - shared for i in group.members)


def _embedded(llm: Any, prompt: Prompt, start: int, end: int) -> Tensor:
    """Embeddings (end - start, width) of a part of a prompt."""
    if prompt.embeds is not None:
        return prompt.embeds[start:end]
    table = llm.get_input_embeddings()
    return table(torch.tensor(prompt.ids[start:end], device=table.weight.device))


def _decode(
    llm: Any,
    logits: Tensor,
    layers: Prefix,
    mask: Tensor,
    sample: _Sampler,
    stop_ids: set[int],
    max_new_tokens: int,
    grown: Callable[[int, list[int]], None],
) -> Iterator[tuple[int, list[int]]]:
    """Answer rows token by token; yields (row, ids) as rows end, and tells `grown` of each token."""
    cache = roomy_cache(layers)
    device = logits.device
    alive = list(range(len(logits)))
    answers: list[list[int]] = [[] for _ in alive]
    done = [False] * len(alive)
    positions = mask.sum(1, keepdim=True)
    for step in range(max_new_tokens):
        chosen = sample(logits, alive)
        for row, token in zip(alive, chosen.tolist(), strict=True):
            if done[row]:
                continue
            if token not in stop_ids:
                answers[row].append(token)
                grown(row, answers[row])
            if token in stop_ids or step + 1 == max_new_tokens:
                done[row] = True
                yield row, answers[row]
        going = [place for place, row in enumerate(alive) if not done[row]]
        if not going:
            return
        if len(going) <= COMPACT_BELOW * len(alive):
            index = torch.tensor(going, device=device)
            for layer in cache.layers:
                layer.batch_select_indices(index)
            mask, positions, chosen = mask[index], positions[index], chosen[index]
            alive = [alive[place] for place in going]
        mask = torch.cat([mask, mask.new_ones(len(alive), 1)], dim=1)
        logits = llm(
            input_ids=chosen[:, None],
            attention_mask=mask,
            position_ids=positions,
            past_key_values=cache,
            use_cache=True,
        ).logits[:, -1]
        positions = positions + 1


@dataclass
class _Sampler:
    """Next tokens: the most likely ones, or nucleus samples with each row's own generator."""

    temperature: float
    top_p: float
    generators: list[torch.Generator] | None
    top_k: int = 0

    def __call__(self, logits: Tensor, rows: Sequence[int]) -> Tensor:
        chosen = None if self.generators is None else [self.generators[row] for row in rows]
        return _choose(logits, self.temperature, self.top_p, chosen, self.top_k)


def _choose(
    logits: Tensor,
    temperature: float,
    top_p: float,
    generators: list[torch.Generator] | None,
    top_k: int = 0,
) -> Tensor:
    """Next token (rows,): the most likely, or a nucleus sample with each row's own generator."""
    if temperature <= 0 or generators is None:
        return logits.argmax(-1)
    if 0 < top_k < logits.shape[-1]:
        least = logits.topk(top_k, dim=-1).values[:, -1:]
        logits = logits.masked_fill(logits < least, float("-inf"))
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
    temperature: float = 0.0,
    top_p: float = 1.0,
    seeds: Sequence[int] | None = None,
    on_answer: Callable[[int, str, int], None] | None = None,
) -> list[str]:
    """Answers of a text LLM to chats (lists of `{"role", "content": str}`), in order; greedy at `temperature` 0.

    What chats share at their beginning (a worked example) is computed once; a chat that occurs twice is answered once.
    `seeds`: one per chat, what it draws from when sampled (default: 0 for all); a chat with two seeds has two answers, and
    the same chat and seed have the same answer whatever else is asked.
    `on_answer(index, text, tokens)` is called for the first of equal chats, as soon as it is answered.
    """
    stop_ids = end_of_turn_ids(tokenizer, llm)
    chosen = [0] * len(chats) if seeds is None or temperature <= 0 else list(seeds)
    keys = [
        f"{seed} {json.dumps(chat, sort_keys=True, ensure_ascii=False)}"
        for seed, chat in zip(chosen, chats, strict=True)
    ]
    first_of = {key: i for i, key in reversed(list(enumerate(keys)))}
    unique = sorted(first_of.values())
    answered: dict[int, str] = {}
    prompts = [
        Prompt(
            tokenizer.apply_chat_template(
                list(chats[i]),
                add_generation_prompt=True,
                tokenize=True,
                return_dict=True,
                enable_thinking=False,  # as answers are learned and scored
            )["input_ids"]
        )
        for i in unique
    ]

    def done(place: int, ids: list[int]) -> None:
        text = tokenizer.decode(ids, skip_special_tokens=True).strip()
        answered[unique[place]] = text
        if on_answer is not None:
            on_answer(unique[place], text, len(ids) + 1)

    generate(
        llm,
        prompts,
        stop_ids=stop_ids,
        max_new_tokens=max_new_tokens,
        temperature=temperature,
        top_p=top_p,
        seed=[chosen[i] for i in unique],
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
