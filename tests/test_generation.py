"""What must be true of generation: the same answers as the library's own, whatever the batch."""

from __future__ import annotations

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from speech_llm.generation import Prompt, generate, shared_prefix_length


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
    assert shared_prefix_length([Prompt(ids) for ids in PROMPTS]) == 3
    assert shared_prefix_length([Prompt([5, 6]), Prompt([5, 6])]) == 1
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
