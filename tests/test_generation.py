"""What must be true of generation: the same answers as the library's own, whatever the batch."""

from __future__ import annotations

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from speech_llm.generation import Prompt, answer_chats, comparable_ids, generate
from speech_llm.grouping import group_prompts, shared_length


@pytest.fixture(scope="module")
def llm() -> LlamaForCausalLM:
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=97, hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, max_position_embeddings=256, initializer_range=0.4, eos_token_id=2, pad_token_id=2,
    )  # fmt: skip
    return LlamaForCausalLM(config).eval()


PROMPTS = [
    [5, 6, 7, *tail] for tail in ([8], [9, 10, 11, 12], [13, 14], [15, 16, 17, 18, 19, 20, 21], [22, 23])
]


def test_greedy_answers_equal_the_library_one_by_one(llm: LlamaForCausalLM) -> None:
    got = generate(llm, [Prompt(ids) for ids in PROMPTS], stop_ids=[2], max_new_tokens=12, batch_tokens=64)
    for ids, answer in zip(PROMPTS, got, strict=True):
        out = llm.generate(
            torch.tensor([ids]), attention_mask=torch.ones(1, len(ids)), max_new_tokens=12, do_sample=False
        )
        want = out[0, len(ids) :].tolist()
        assert answer == (want[: want.index(2)] if 2 in want else want)


def test_every_token_is_told_and_whoever_is_told_may_end_it(llm: LlamaForCausalLM) -> None:
    prompts = [Prompt(ids) for ids in PROMPTS]
    grown: dict[int, list[list[int]]] = {}
    got = generate(
        llm,
        prompts,
        stop_ids=[2],
        max_new_tokens=6,
        on_token=lambda i, ids: grown.setdefault(i, []).append([*ids]),
    )
    for place, ids in enumerate(got):
        assert grown.get(place, []) == [ids[: length + 1] for length in range(len(ids))]

    def enough(_: int, ids: list[int]) -> None:
        if len(ids) == 3:
            raise InterruptedError

    with pytest.raises(InterruptedError):
        generate(llm, prompts, stop_ids=[], max_new_tokens=6, on_token=enough)


def test_rows_that_end_leave_the_batch_and_change_nothing(llm: LlamaForCausalLM) -> None:
    free = generate(llm, [Prompt(ids) for ids in PROMPTS], stop_ids=[], max_new_tokens=12)
    stops = [free[0][3], free[2][5]]
    got = generate(llm, [Prompt(ids) for ids in PROMPTS], stop_ids=stops, max_new_tokens=12)
    for whole, cut in zip(free, got, strict=True):
        end = next((i for i, token in enumerate(whole) if token in stops), len(whole))
        assert cut == whole[:end]
    assert len({len(answer) for answer in got}) > 1


def test_embeddings_answer_like_their_ids(llm: LlamaForCausalLM) -> None:
    table = llm.get_input_embeddings()
    with_embeds = [Prompt(ids, table(torch.tensor(ids)).detach()) for ids in PROMPTS]
    assert generate(llm, with_embeds, stop_ids=[2], max_new_tokens=6) == generate(
        llm, [Prompt(ids) for ids in PROMPTS], stop_ids=[2], max_new_tokens=6
    )


def test_the_shared_prefix_stops_before_audio_and_leaves_each_row_a_token(llm: LlamaForCausalLM) -> None:
    assert shared_length(PROMPTS) == 3
    assert shared_length([[5, 6], [5, 6]]) == 1
    # Two different sounds behind the same placeholder id 96 must not be taken for a shared prefix.
    torch.manual_seed(1)
    prompts = [Prompt([5, 96, 96, 7], torch.randn(4, 32)) for _ in range(2)]
    prompts[1].embeds[0] = prompts[0].embeds[0]  # type: ignore[index]
    together = generate(llm, prompts, stop_ids=[], max_new_tokens=5, audio_token_id=96)
    table = llm.get_input_embeddings()
    for prompt, answer in zip(prompts, together, strict=True):
        prompt.embeds[0] = table(torch.tensor(5))  # type: ignore[index]
        alone = generate(llm, [prompt], stop_ids=[], max_new_tokens=5, audio_token_id=96)[0]
        assert alone == answer


def test_sampling_is_reproducible_and_row_by_row(llm: LlamaForCausalLM) -> None:
    options = {"stop_ids": [2], "max_new_tokens": 8, "temperature": 1.0, "top_p": 0.9, "seed": 3}
    prompts = [Prompt(ids) for ids in PROMPTS]
    together = generate(llm, prompts, **options)  # type: ignore[arg-type]
    assert together == generate(llm, prompts, **options)  # type: ignore[arg-type]
    assert together[0] == generate(llm, prompts[:1], **options)[0]  # type: ignore[arg-type]
    assert together != generate(llm, prompts, **{**options, "seed": 4})  # type: ignore[arg-type]


def test_a_sampled_chat_depends_on_its_own_seed_and_nothing_else() -> None:
    from tiny_models import tiny_llm, tiny_tokenizer

    model, tokenizer = tiny_llm(initializer_range=0.4), tiny_tokenizer()
    chats = [[{"role": "user", "content": text}] for text in ("a", "b b", "a", "a", "c c c")]
    options = {"max_new_tokens": 6, "temperature": 1.0, "top_p": 0.9}
    told: list[int] = []
    answers = answer_chats(
        model, tokenizer, chats, seeds=[1, 2, 3, 1, 4],
        on_answer=lambda index, text, tokens: told.append(index), **options,  # type: ignore[arg-type]
    )  # fmt: skip
    assert answers[0] == answers[3]
    assert answers[0] != answers[2]
    assert sorted(told) == [0, 1, 2, 4]
    assert answer_chats(model, tokenizer, chats[2:3], seeds=[3], **options) == answers[2:3]  # type: ignore[arg-type]
    greedy = answer_chats(model, tokenizer, chats, seeds=[1, 2, 3, 1, 4], max_new_tokens=6)
    assert greedy[0] == greedy[2]
    assert greedy == answer_chats(model, tokenizer, chats, max_new_tokens=6)


def test_prompts_that_begin_alike_are_grouped_where_it_saves_most() -> None:
    keys = [[1, 2, *[3] * 9, 7], [1, 2, *[3] * 9, 8, 9], [1, 2, *[4] * 9, 7], [1, 2, *[4] * 9, 8], [1, 2, 5]]
    groups = [(group.shared, sorted(group.members)) for group in group_prompts(keys, start=2)]
    assert groups == [(11, [0, 1]), (11, [2, 3]), (2, [4])]
    # A group is never longer than it may be: with room for 12 tokens behind the prefix, only pairs fit.
    many = [[1, *[3] * 5, 10 + i, 20] for i in range(6)]
    assert [len(group.members) for group in group_prompts(many, start=1, longest=9)] == [2, 2, 2]


def test_sounds_are_shared_by_name_and_by_nothing_else() -> None:
    embeds = torch.zeros(4, 32)
    prompts = [Prompt([5, 96, 96, 7], embeds, ("a",)), Prompt([5, 96, 96, 8], embeds, ("a",)),
               Prompt([5, 96, 96, 7], embeds, ("b",)), Prompt([5, 96, 96, 7], embeds)]  # fmt: skip
    first, same, other, unnamed = comparable_ids(prompts, audio_token_id=96)
    assert shared_length([first, same]) == 3
    assert shared_length([first, other]) == shared_length([first, unnamed]) == 1
    assert shared_length(comparable_ids(prompts[:2])) == 0  # placeholders unknown: nothing can be compared


def test_packed_prompts_answer_as_they_do_alone(llm: LlamaForCausalLM) -> None:
    torch.manual_seed(2)
    table = llm.get_input_embeddings()
    sounds = {name: torch.randn(3, 32) for name in "abc"}

    def spoken(name: str, question: list[int]) -> Prompt:
        ids = [5, 6, 96, 96, 96, 7, *question]
        embeds = table(torch.tensor([min(i, 95) for i in ids])).detach().clone()
        embeds[2:5] = sounds[name]
        return Prompt(ids, embeds, (name,))

    prompts = [spoken(name, [10 + k, *[20 + k] * k]) for k in range(4) for name in sounds]
    options = {"stop_ids": [2], "max_new_tokens": 40, "audio_token_id": 96}
    alone = [generate(llm, [prompt], **options)[0] for prompt in prompts]  # type: ignore[arg-type]
    for budget in (60, 150, 4096):
        assert generate(llm, prompts, batch_tokens=budget, **options) == alone  # type: ignore[arg-type]


def test_an_llm_that_sees_only_a_window_answers_like_the_library() -> None:
    from transformers import MistralConfig, MistralForCausalLM

    torch.manual_seed(0)
    settings = {"vocab_size": 97, "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2}
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2, "initializer_range": 0.4}
    config = MistralConfig(**settings, **heads, sliding_window=6, eos_token_id=2, pad_token_id=2)
    model = MistralForCausalLM(config).eval()
    got = generate(model, [Prompt(ids) for ids in PROMPTS], stop_ids=[2], max_new_tokens=10)
    for ids, answer in zip(PROMPTS, got, strict=True):
        tokens = torch.tensor([ids])
        out = model.generate(
            tokens, attention_mask=torch.ones_like(tokens), max_new_tokens=10, do_sample=False
        )
        want = out[0, len(ids) :].tolist()
        assert answer == (want[: want.index(2)] if 2 in want else want)
