"""The model: text goes through untouched, sound goes where its placeholders are, rows do not disturb each other."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from tiny_models import VOCABULARY, tiny_llm, tiny_model
from torch import Tensor
from transformers import DynamicCache

from speech_llm.errors import UserError

AUDIO = VOCABULARY
LORA = {"rank": 4, "alpha": 16}


def stir_adapters(model: Any) -> None:
    """Make fresh adapters do something: their second matrix starts at zero."""
    torch.manual_seed(5)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                parameter.normal_(std=0.5)


def text(rows: int = 2, length: int = 9) -> Tensor:
    return torch.randint(3, VOCABULARY, (rows, length), generator=torch.Generator().manual_seed(7))


def sounds(*counts: int, taps: int = 3) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(8)
    return {
        "features": torch.randn(len(counts), max(counts), taps, 24, generator=generator),
        "frame_counts": torch.tensor(counts),
    }


def spoken(rows: int = 1, vectors: int = 3) -> Tensor:
    """Rows of four tokens, one sound, five tokens."""
    ids = text(rows, 9)
    return torch.cat([ids[:, :4], torch.full((rows, vectors), AUDIO), ids[:, 4:]], dim=1)


# ---------------------------------------------------------------- text


@pytest.mark.parametrize("lora", [None, LORA])
def test_text_logits_are_bit_identical_to_the_base_llms(lora: dict[str, int] | None) -> None:
    model, _ = tiny_model(lora=lora)
    stir_adapters(model)
    base = tiny_llm()
    ids, mask = text(), torch.ones(2, 9, dtype=torch.long)
    mask[1, 6:] = 0
    with torch.no_grad():
        assert torch.equal(model(input_ids=ids).logits, base(input_ids=ids).logits)
        ours, theirs = (m(input_ids=ids, attention_mask=mask).logits for m in (model, base))
        assert torch.equal(ours[0], theirs[0])
        assert torch.equal(ours[1, :6], theirs[1, :6])
        # The LLM called by itself (teacher, text generation) is the base LLM too.
        assert torch.equal(model.llm(input_ids=ids).logits, base(input_ids=ids).logits)
    assert model.text_path_is_base


def test_ungated_adapters_change_text_and_gated_ones_do_not() -> None:
    ids = text()
    base = tiny_llm()(input_ids=ids).logits
    ungated, _ = tiny_model(lora=LORA, gate_adapters=False)
    stir_adapters(ungated)
    assert not torch.allclose(ungated(input_ids=ids).logits, base, atol=1e-3)
    assert not ungated.text_path_is_base
    with ungated.adapters_off():
        assert torch.equal(ungated.llm(input_ids=ids).logits, base)


def test_text_rows_beside_spoken_rows_get_the_base_llms_logits() -> None:
    """Each row of a mixed batch has its own behaviour; the base is asked with the same batch, adapters off."""
    model, _ = tiny_model(lora=LORA)
    stir_adapters(model)
    ids = spoken(3)
    ids[1] = text(1, ids.shape[1])
    with torch.no_grad():
        mixed = model(input_ids=ids, **sounds(5, 7)).logits
        embeds = model.embed(ids, model.audio_vectors(**sounds(5, 7))[0])
        base = tiny_llm()(inputs_embeds=embeds).logits
        adapted = model(inputs_embeds=embeds, has_audio=torch.ones(3, dtype=torch.bool)).logits
    assert torch.equal(mixed[1], base[1])
    assert not torch.allclose(mixed[0], base[0], atol=1e-3)
    assert torch.equal(mixed[[0, 2]], adapted[[0, 2]])


def test_text_rows_teach_the_gated_adapters_nothing() -> None:
    model, _ = tiny_model(lora=LORA)
    stir_adapters(model)
    ids = spoken(2)
    ids[1] = text(1, ids.shape[1])

    def gradients(labels: Tensor) -> float:
        model.zero_grad()
        model(input_ids=ids, labels=labels, **sounds(5)).loss.backward()
        return sum(
            float(p.grad.abs().sum())
            for n, p in model.named_parameters()
            if "lora_" in n and p.grad is not None
        )

    labels = torch.full_like(ids, -100)
    labels[1, -3:] = ids[1, -3:]
    assert gradients(labels) == 0
    labels[0, -3:] = ids[0, -3:]
    assert gradients(labels) > 0


def test_adapter_strength_can_be_set_at_evaluation() -> None:
    model, _ = tiny_model(lora=LORA)
    stir_adapters(model)
    plain, _ = tiny_model()
    ids = spoken()

    def logits(of: Any) -> Tensor:
        with torch.no_grad():
            return of(input_ids=ids, **sounds(5)).logits

    full = logits(model)
    model.set_lora_scale(0.0)
    assert torch.equal(logits(model), logits(plain))
    model.set_lora_scale(0.5)
    assert not torch.allclose(logits(model), full, atol=1e-4)
    model.set_lora_scale(1.0)
    assert torch.equal(logits(model), full)
    with pytest.raises(UserError, match="no LoRA adapters"):
        plain.set_lora_scale(0.5)


def test_gated_adapters_ask_for_has_audio_where_the_ids_do_not_show_it() -> None:
    model, _ = tiny_model(lora=LORA)
    ids = spoken()
    embeds = model.embed(ids, model.audio_vectors(**sounds(5))[0])
    with pytest.raises(ValueError, match="has_audio must be given"):
        model(inputs_embeds=embeds)
    cache = DynamicCache(config=model.llm.config)
    model(input_ids=ids, past_key_values=cache, use_cache=True, **sounds(5))
    with pytest.raises(ValueError, match="has_audio must be given"):
        model(input_ids=text(1, 1), past_key_values=cache, use_cache=True)


# ---------------------------------------------------------------- placeholders


def test_the_placeholder_lies_outside_the_vocabulary_and_tables_keep_their_size() -> None:
    model, processor = tiny_model()
    assert processor.audio_token_id == model.config.audio_token_id == VOCABULARY
    assert model.get_input_embeddings().weight.shape[0] == VOCABULARY
    assert model(input_ids=spoken(), **sounds(5)).logits.shape[-1] == VOCABULARY
    with pytest.raises(UserError, match="never resized"):
        model.resize_token_embeddings(VOCABULARY + 1)


def test_a_placeholder_count_that_does_not_match_is_an_error_with_both_numbers() -> None:
    model, _ = tiny_model()
    with pytest.raises(ValueError, match="4 audio placeholders, but there are 3 audio vectors"):
        model(input_ids=spoken(vectors=4), **sounds(5))
    with pytest.raises(ValueError, match="3 audio placeholders, but there are 6 audio vectors"):
        model(input_ids=spoken(), **sounds(5, 5))
    with pytest.raises(ValueError, match="3 audio placeholders, but there are 0 audio vectors"):
        model(input_ids=spoken())
    with pytest.raises(ValueError, match="0 audio placeholders, but there are 3 audio vectors"):
        model(input_ids=text(1), **sounds(5))


def test_vectors_land_on_their_placeholders_in_order() -> None:
    model, _ = tiny_model()
    ids = spoken(2)
    vectors, counts = model.audio_vectors(**sounds(5, 8))
    embeds = model.embed(ids, vectors)
    assert counts.tolist() == [3, 3]
    assert torch.equal(embeds[0, 4:7], vectors[:3])
    assert torch.equal(embeds[1, 4:7], vectors[3:])
    table = model.get_input_embeddings()
    assert torch.equal(embeds[:, :4], table(ids[:, :4]))
    assert torch.equal(embeds[:, 7:], table(ids[:, 7:]))


@pytest.mark.parametrize("connector", ["qformer", "stack"])
def test_several_sounds_in_one_conversation_are_heard_each_in_its_place(connector: str) -> None:
    model, _ = tiny_model(connector={"type": connector, "queries": 3, "stack": 4}, taps=[1, 2, 3])
    first, second = sounds(5), sounds(9)
    sizes = [model.connector.num_vectors(5), model.connector.num_vectors(9)]
    ids = torch.tensor([[5, 6, *[AUDIO] * sizes[0], 7, *[AUDIO] * sizes[1], 8, 9]])
    both = {
        "features": torch.cat(
            [torch.nn.functional.pad(first["features"], (0, 0, 0, 0, 0, 4)), second["features"]]
        ),
        "frame_counts": torch.tensor([5, 9]),
    }
    with torch.no_grad():
        got = model(input_ids=ids, **both).logits
        vectors = torch.cat([model.audio_vectors(**first)[0], model.audio_vectors(**second)[0]])
        wanted = model.llm(inputs_embeds=model.embed(ids, vectors)).logits
        swapped = {"features": both["features"].flip(0), "frame_counts": torch.tensor([9, 5])}
        torch.testing.assert_close(got, wanted, atol=1e-5, rtol=1e-5)
        if connector == "qformer":
            assert not torch.allclose(model(input_ids=ids, **swapped).logits, got, atol=1e-4)


# ---------------------------------------------------------------- rows, padding, cache


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("llm", ["llama", "gemma2", "phi"])
def test_a_rows_logits_do_not_depend_on_batch_mates_or_padding_side(llm: str, side: str) -> None:
    model, _ = tiny_model(llm=llm, lora=LORA)
    stir_adapters(model)
    rows = [spoken()[0], text(1, 5)[0], spoken(2)[1][:10]]
    clips = sounds(6, 9)
    longest = max(len(row) for row in rows)
    ids, mask = torch.zeros(3, longest, dtype=torch.long), torch.zeros(3, longest, dtype=torch.long)
    places = []
    for i, row in enumerate(rows):
        places.append(slice(longest - len(row), longest) if side == "left" else slice(0, len(row)))
        ids[i, places[i]], mask[i, places[i]] = row, 1
    with torch.no_grad():
        together = model(input_ids=ids, attention_mask=mask, **clips).logits
        alone = [
            model(
                input_ids=rows[0][None], features=clips["features"][:1, :6], frame_counts=torch.tensor([6])
            ),
            model(input_ids=rows[1][None]),
            model(input_ids=rows[2][None], features=clips["features"][1:], frame_counts=torch.tensor([9])),
        ]
    for i, place in enumerate(places):
        torch.testing.assert_close(together[i, place], alone[i].logits[0], atol=2e-5, rtol=1e-4)


def test_answer_only_logits_equal_full_logits_there() -> None:
    for llm in ("llama", "gemma2"):
        model, _ = tiny_model(llm=llm)
        ids = spoken(2)
        mask = torch.zeros_like(ids, dtype=torch.bool)
        mask[0, 7:11] = True
        mask[1, 9:] = True
        with torch.no_grad():
            full = model(input_ids=ids, **sounds(5, 6)).logits
            some = model(input_ids=ids, answer_mask=mask, **sounds(5, 6)).logits
        assert some.shape == (7, VOCABULARY)
        torch.testing.assert_close(some, full[mask], atol=1e-6, rtol=1e-5)
        assert not model.get_output_embeddings()._forward_pre_hooks


def test_loss_on_labels_is_the_mean_cross_entropy_of_the_next_token() -> None:
    model, _ = tiny_model()
    ids = spoken(2)
    labels = torch.full_like(ids, -100)
    labels[:, -4:] = ids[:, -4:]
    output = model(input_ids=ids, labels=labels, **sounds(5, 6))
    full = model(input_ids=ids, **sounds(5, 6)).logits
    wanted = torch.nn.functional.cross_entropy(
        full[:, -5:-1].reshape(-1, VOCABULARY), ids[:, -4:].reshape(-1)
    )
    torch.testing.assert_close(output.loss, wanted)
    assert output.logits.shape == (8, VOCABULARY)


@pytest.mark.parametrize("llm", ["llama", "gemma3"])
@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("kind", ["bool", "additive"])
def test_a_four_dimensional_mask_and_a_cached_prefix_give_the_plain_logits(
    kind: str, attention: str, llm: str
) -> None:
    model, _ = tiny_model(llm=llm, lora=LORA)
    stir_adapters(model)
    model.llm.set_attn_implementation(attention)
    ids, clips = spoken(2), sounds(5, 6)
    prefix = 3
    ids[1, :prefix] = ids[0, :prefix]
    own = ids.shape[1] - prefix
    seen = (
        torch.cat([torch.ones(own, prefix), torch.ones(own, own).tril()], dim=1)
        .bool()[None, None]
        .expand(2, -1, -1, -1)
    )
    mask = (
        seen if kind == "bool" else torch.zeros(seen.shape).masked_fill(~seen, torch.finfo(torch.float32).min)
    )
    with torch.no_grad():
        plain = model(input_ids=ids, **clips).logits
        cache = DynamicCache(config=model.llm.config)
        with model.adapters_for(True):
            model.llm(input_ids=ids[:1, :prefix], past_key_values=cache, use_cache=True)
        cache.batch_repeat_interleave(2)
        embeds = model.embed(ids[:, prefix:], model.audio_vectors(**clips)[0])
        cached = model(
            inputs_embeds=embeds,
            attention_mask=mask,
            position_ids=torch.arange(prefix, ids.shape[1])[None].expand(2, -1),
            past_key_values=cache,
            use_cache=True,
            has_audio=torch.ones(2, dtype=torch.bool),
        ).logits
    torch.testing.assert_close(cached, plain[:, prefix:], atol=2e-5, rtol=1e-4)


def test_a_mask_that_a_sliding_window_would_not_obey_is_refused() -> None:
    model, _ = tiny_model(llm="gemma3")
    model.config.get_text_config().sliding_window = 8
    ids = text(1, 9)
    with pytest.raises(
        ValueError, match="mask over 9 keys cannot be given to an LLM whose layers see only the last 8"
    ):
        model(input_ids=ids, attention_mask=torch.ones(1, 1, 9, 9, dtype=torch.bool).tril())


def test_cached_generation_gates_each_row_by_its_own_audio() -> None:
    model, _ = tiny_model(lora=LORA)
    stir_adapters(model)
    ids = spoken(2)
    ids[1] = text(1, ids.shape[1])
    has_audio = torch.tensor([True, False])
    tail = text(2, 4)
    with torch.no_grad():
        whole = model(input_ids=torch.cat([ids, tail], 1), **sounds(5)).logits[:, -4:]
        cache = DynamicCache(config=model.llm.config)
        model(input_ids=ids, past_key_values=cache, use_cache=True, **sounds(5))
        steps = [
            model(
                input_ids=tail[:, i : i + 1], past_key_values=cache, use_cache=True, has_audio=has_audio
            ).logits
            for i in range(4)
        ]
    torch.testing.assert_close(torch.cat(steps, 1), whole, atol=2e-5, rtol=1e-4)


def test_generate_answers_as_the_base_llm_where_there_is_no_audio() -> None:
    model, _ = tiny_model(lora=LORA)
    stir_adapters(model)
    settings: dict[str, Any] = {"max_new_tokens": 5, "do_sample": False, "pad_token_id": 0}
    ids = text(2, 6)
    base = tiny_llm().generate(ids, attention_mask=torch.ones_like(ids), **settings)[:, 6:]
    assert torch.equal(model.generate(ids, **settings), base)
    assert model.generate(spoken(2), **sounds(5, 6), **settings).shape == (2, 5)
    assert model.generate(spoken(2), **sounds(5, 6), **settings, num_beams=2).shape == (2, 5)


# ---------------------------------------------------------------- training


@pytest.mark.parametrize("lora", [None, LORA])
def test_gradients_flow_through_the_frozen_llm_into_what_is_trained_and_nowhere_else(
    lora: dict[str, int] | None,
) -> None:
    model, _ = tiny_model(lora=lora)
    stir_adapters(model)
    model.train()
    model(
        input_ids=spoken(2), labels=spoken(2).masked_fill(spoken(2) == AUDIO, -100), **sounds(5, 6)
    ).loss.backward()
    for name, parameter in model.named_parameters():
        trained = name.startswith("connector.") or "lora_" in name
        assert parameter.requires_grad == trained
        assert (parameter.grad is not None and bool(parameter.grad.abs().sum() > 0)) == trained, name


@pytest.mark.parametrize("gate_adapters", [True, False])
def test_activation_checkpointing_changes_no_gradient(gate_adapters: bool) -> None:
    """Also with several forwards before the backward passes: each is recomputed with its own rows' gates."""
    grads = []
    for checkpointing in (False, True):
        model, _ = tiny_model(lora=LORA, gate_adapters=gate_adapters)
        stir_adapters(model)
        model.train()
        if checkpointing:
            model.gradient_checkpointing_enable()
        ids = spoken(2)
        ids[1] = text(1, ids.shape[1])
        labels = ids.masked_fill(ids == AUDIO, -100)
        mixed = model(input_ids=ids, labels=labels, **sounds(5)).loss
        plain = model(input_ids=text(1), labels=text(1)).loss
        (mixed + plain).backward()
        grads.append({n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None})
    assert grads[0].keys() == grads[1].keys()
    for name, grad in grads[0].items():
        torch.testing.assert_close(grads[1][name], grad, atol=1e-6, rtol=1e-4)


def test_a_training_step_moves_text_logits_by_nothing() -> None:
    model, _ = tiny_model(lora=LORA)
    before = model(input_ids=text()).logits.detach()
    optimizer = torch.optim.AdamW(model.trainable_parameters(), lr=0.1)
    model.train()
    for _ in range(3):
        optimizer.zero_grad()
        ids = spoken(2)
        model(input_ids=ids, labels=ids.masked_fill(ids == AUDIO, -100), **sounds(5, 6)).loss.backward()
        optimizer.step()
    assert torch.equal(model.eval()(input_ids=text()).logits, before)


def test_parameters_are_counted_by_part() -> None:
    model, _ = tiny_model(lora=LORA)
    counts = model.count_parameters()
    assert (
        counts["trained"]
        == counts["connector"] + counts["adapters"]
        == sum(p.numel() for p in model.trainable_parameters())
    )
    assert counts["llm"] == tiny_llm().num_parameters()


def test_unknown_adapter_targets_name_what_there_is() -> None:
    with pytest.raises(UserError, match=r"no linear layer 'q_projection'; it has .*q_proj"):
        tiny_model(lora={"rank": 2, "target_modules": ["q_projection"]})
    with pytest.raises(UserError, match="Did you mean 'rank'"):
        tiny_model(lora={"ranks": 2})


def test_the_llm_in_half_precision_keeps_what_is_trained_in_full() -> None:
    from tiny_models import tiny_encoder

    from speech_llm.model import SpeechLLMForConditionalGeneration

    llm, encoder = tiny_llm().to(torch.bfloat16), tiny_encoder().to(torch.bfloat16)
    model = SpeechLLMForConditionalGeneration.build(
        llm, encoder, lora=LORA, connector={"queries": 3, "heads": 2}
    )
    assert {p.dtype for p in model.trainable_parameters()} == {torch.float32}
    ids = spoken(2)
    output = model(input_ids=ids, labels=ids.masked_fill(ids == AUDIO, -100), **sounds(5, 6))
    output.loss.backward()
    assert output.logits.dtype == torch.bfloat16
    assert all(torch.isfinite(p.grad).all() for p in model.trainable_parameters() if p.grad is not None)
