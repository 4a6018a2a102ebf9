"""What must be true of packs: nothing leaks between the rows of one clip, and nothing is lost."""

from __future__ import annotations

import torch
from transformers import DynamicCache, LlamaConfig, LlamaForCausalLM

from speech_llm.data.packing import IGNORE, Row, collate, constant_prefix, pack_rows, plan_epoch
from speech_llm.training.losses import cross_entropy_sum

AUDIO = 99


def rows() -> list[Row]:
    """Three questions about clip a, one about clip b, one text row; [1, 2] is the constant prefix."""
    shared_a, shared_b = [1, 2, 10, 11, 12, 13], [1, 2, 10, 14, 15]
    made = [
        Row("a/1", [*shared_a, 20, 21, 30, 31, 3], [(8, 11)], ["a"]),
        Row("a/2", [*shared_a, 22, 32, 3], [(7, 9)], ["a"]),
        Row("a/3", [*shared_a, 20, 23, 24, 33, 34, 35, 3], [(9, 13)], ["a"]),
        Row("b/1", [*shared_b, 25, 36, 3], [(6, 8)], ["b"]),
    ]
    return [*made, Row("text", [1, 2, 16, 17, 37, 38, 3, 18, 39, 3], [(4, 7), (8, 10)], [])]


def tiny_llm() -> LlamaForCausalLM:
    torch.manual_seed(0)
    return LlamaForCausalLM(
        LlamaConfig(
            vocab_size=64,
            hidden_size=32,
            intermediate_size=64,
            num_hidden_layers=2,
            num_attention_heads=4,
            num_key_value_heads=2,
            initializer_range=0.3,
        )
    ).eval()


def unpacked_loss(llm: LlamaForCausalLM, row: Row) -> torch.Tensor:
    logits = llm(torch.tensor([row.ids])).logits[0]
    places = [place for start, end in row.spans for place in range(start, end)]
    return cross_entropy_sum(logits[[p - 1 for p in places]], torch.tensor([row.ids[p] for p in places]))


def packed_loss(llm: LlamaForCausalLM, prefix: list[int], max_tokens: int) -> tuple[torch.Tensor, int]:
    packs = pack_rows(rows(), len(prefix), max_tokens)
    batch = collate(packs, len(prefix), pad_id=0)
    cache = DynamicCache(config=llm.config)
    if prefix:
        llm(torch.tensor([prefix]), past_key_values=cache, use_cache=True)
        cache.batch_repeat_interleave(len(packs))
    mask = torch.zeros(batch.mask.shape).masked_fill(~batch.mask, torch.finfo(torch.float32).min)
    logits = llm(
        batch.ids, attention_mask=mask, position_ids=batch.positions, past_key_values=cache, use_cache=True
    ).logits
    wanted = batch.targets != IGNORE
    return cross_entropy_sum(logits[wanted], batch.targets[wanted]), batch.answer_tokens


def test_packed_loss_equals_unpacked_loss_with_and_without_a_cached_prefix() -> None:
    llm = tiny_llm()
    want = sum((unpacked_loss(llm, row) for row in rows()), torch.zeros(()))
    tokens = sum(end - start for row in rows() for start, end in row.spans)
    prefix = constant_prefix(rows(), AUDIO)
    assert prefix == [1, 2]
    for cached, limit in (([], 1000), (prefix, 1000), (prefix, 12)):
        got, counted = packed_loss(llm, cached, limit)
        assert counted == tokens
        torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-4)


def test_another_rows_answer_does_not_reach_a_row() -> None:
    llm = tiny_llm()
    packs = pack_rows(rows()[:3], 0, 1000)
    assert len(packs) == 1
    batch = collate(packs, 0, pad_id=0)
    mask = torch.zeros(batch.mask.shape).masked_fill(~batch.mask, torch.finfo(torch.float32).min)
    branch = torch.tensor(packs[0].branch)
    changed = batch.ids.clone()
    changed[0, branch == 1] = 50
    before = llm(batch.ids, attention_mask=mask, position_ids=batch.positions).logits[0, branch == 2]
    after = llm(changed, attention_mask=mask, position_ids=batch.positions).logits[0, branch == 2]
    torch.testing.assert_close(before, after, rtol=0, atol=0)


def test_the_constant_prefix_ends_before_audio_and_answers() -> None:
    assert constant_prefix([Row("x", [1, 2, AUDIO, 5, 6], [(4, 5)], ["a"])] * 2, AUDIO) == [1, 2]
    assert constant_prefix([Row("x", [1, 2, 3, 4], [(2, 4)], [])] * 2, AUDIO) == [1]


def test_an_epoch_visits_every_pack_once_in_an_order_of_its_own() -> None:
    packs = pack_rows(rows(), 2, 1000) * 40
    first, again = plan_epoch(packs, 64, seed=1, epoch=0), plan_epoch(packs, 64, seed=1, epoch=0)
    assert first == again
    assert sorted(i for batch in first for i in batch) == list(range(len(packs)))
    assert first != plan_epoch(packs, 64, seed=1, epoch=1)
    assert first != plan_epoch(packs, 64, seed=2, epoch=0)
    for batch in first:
        assert len(batch) == 1 or len(batch) * max(len(packs[i].ids) for i in batch) <= 64
