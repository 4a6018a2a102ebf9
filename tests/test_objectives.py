"""What a step minimises, on tiny models: the teacher, hard tokens, pairs, and the model as it was."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from learning import tiny_examples, tiny_recipe
from tiny_models import tiny_model
from torch import nn

import speech_llm.training.answers
from speech_llm.data.features import FeatureStore
from speech_llm.examples import Example
from speech_llm.files import read_jsonl
from speech_llm.kv_cache import run_prefix
from speech_llm.targets.score import score_answers
from speech_llm.training.loop import feature_root, make_objective
from speech_llm.training.objectives import TokenLoss
from speech_llm.training.rows import TrainingSet, build_training_set, teacher_messages
from speech_llm.training.student import Origin, Student

LORA = {"rank": 2}
TEXTS = [
    Example(
        id=f"t{i}",
        messages=[{"role": "user", "content": f"Say {word}."}, {"role": "assistant", "content": word}],
    )
    for i, word in enumerate(("yes", "no, never"))
]


@pytest.fixture
def make(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Any:
    """`make(examples, *overrides, **settings)`: objective, student, data and origin on a tiny model of these settings."""

    def build(examples: list[Example], *overrides: str, prepare: Any = None, **settings: Any) -> Any:
        recipe = tiny_recipe(monkeypatch, tmp_path, *overrides)
        model, processor = tiny_model(**settings)
        if prepare is not None:
            prepare(model)
        features = FeatureStore(feature_root(), model, processor)
        frozen = settings.get("lora") is None
        data = build_training_set(
            examples, processor, features, 1024, frozen, False, recipe.style, recipe.loss.asks_base
        )
        student = Student(model, processor, features, run_prefix(model.llm, data.prefix), len(data.prefix))
        origin = Origin(model)
        return make_objective(recipe, student, data, origin, None, tmp_path, False), student, data, origin

    return build


def every(data: TrainingSet) -> list[int]:
    return list(range(len(data.packs)))


def move_adapters(model: Any) -> None:
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                parameter.normal_(0, 0.5)


@pytest.mark.parametrize("top_k", ["null", "5", "300"])
def test_kl_of_a_model_with_itself_is_zero_and_of_a_changed_one_is_not(make: Any, top_k: str) -> None:
    objective, student, data, _ = make(
        TEXTS, f"loss={{type: kl, top_k: {top_k}}}", "model.gate_adapters=false", "trainable.lora.rank=2",
        lora=LORA, gate_adapters=False,
    )  # fmt: skip
    same = objective.loss(every(data), "")
    assert abs(float(same.loss.detach())) < 1e-4
    assert same.answer_tokens == sum(len(t.messages[1]["content"]) + 1 for t in TEXTS)
    move_adapters(student.model)
    assert float(objective.loss(every(data), "").loss) > 5e-3  # the teacher is the base LLM still


def test_stored_and_full_kl_agree_when_nothing_is_left_for_the_tail(make: Any, tmp_path: Path) -> None:
    examples = tiny_examples(tmp_path / "clips")
    full, _, data, _ = make(examples, "loss={type: kl, top_k: null}")
    stored, _, _, _ = make(examples, "loss={type: kl, top_k: 300}")
    few, _, _, _ = make(examples, "loss={type: kl, top_k: 20}")
    expected = float(full.loss(every(data), "").loss)
    assert expected > 0
    assert float(stored.loss(every(data), "").loss) == pytest.approx(expected, rel=1e-4)
    assert 0 < float(few.loss(every(data), "").loss) < expected


def test_the_teacher_reads_the_context_and_its_worked_example_and_answers_the_same_tokens(
    make: Any, tmp_path: Path
) -> None:
    examples = tiny_examples(tmp_path / "clips", clips=2)
    objective, student, *_ = make(examples, "loss={type: kl, top_k: 3}")
    example = examples[1]
    chat = [
        {"role": "user", "content": "The voice is male.\nman or woman?"},
        {"role": "assistant", "content": "A male."},
        {"role": "user", "content": "The voice is male.\nman or woman?"},
    ]
    messages = teacher_messages(example)
    assert messages is not None
    assert [{k: turn[k] for k in ("role", "content")} for turn in messages[:-1]] == chat
    assert [turn.get("train", True) for turn in messages] == [False, False, False, True]
    expected = score_answers(student.model.llm, student.processor.tokenizer, [chat], ["A male."])[0]
    found = objective.scores[example.id]
    assert found.ids == expected.ids
    assert torch.allclose(found.log_probs, expected.log_probs, atol=1e-5)


def test_half_and_half_is_the_sum_of_both_losses(make: Any, tmp_path: Path) -> None:
    examples = tiny_examples(tmp_path / "clips")
    values = [
        float(make(examples, f"loss={loss}")[0].loss([0, 1, 2], "").loss)
        for loss in ("{type: ce}", "{type: kl}", "{type: kl, kl: 0.5, ce: 0.5}")
    ]
    assert values[2] == pytest.approx((values[0] + values[1]) / 2, rel=1e-5)


def hand_made(model: Any) -> None:
    """A base LLM that finds "A" and " " easy (half and a quarter) and all else hard, whatever comes before."""
    table = torch.full((300,), 0.25 / 298)
    tokenizer = tiny_model()[1].tokenizer
    table[tokenizer("A")["input_ids"][0]] = 0.5
    table[tokenizer(" ")["input_ids"][0]] = 0.25
    head = nn.Linear(32, 300)
    with torch.no_grad():
        head.weight.zero_()
        head.bias.copy_(table.log())
    model.llm.set_output_embeddings(head.requires_grad_(False))


def test_the_mask_drops_the_tokens_that_a_hand_made_base_model_finds_hard(make: Any, tmp_path: Path) -> None:
    example = Example(
        id="x",
        messages=[{"role": "user", "content": "?"}, {"role": "assistant", "content": "zA A b"}],
    )
    objective, *_ = make([example], "loss={mask: threshold, tau: 4.1}", prepare=hand_made)
    # z A _ A _ b <end>: the first counts as perplexity 10, "A" has 2, " " has 4.
    assert objective.weights["x"] == [0, 1, 1, 1, 1, 0, 0]
    assert objective.weight([0]) == 4
    done = objective.loss([0], "")
    assert float(done.loss) == pytest.approx(2 * 0.693147 + 2 * 1.386294, rel=1e-4)
    rows = [row for _, row in read_jsonl(tmp_path / "dropped_tokens.jsonl")]
    assert rows[0]["id"] == "x"
    assert rows[0]["tokens"] == 7
    assert [(place, token) for place, token, _ in rows[0]["dropped"]] == [
        (0, "z"),
        (5, "b"),
        (6, "<|im_end|>"),
    ]
    assert rows[0]["dropped"][0][2] == pytest.approx(298 * 4, rel=1e-3)
    assert objective.told == {"answer_tokens": 7, "dropped_tokens": 3, "dropped_share": 0.4286}
    # Two of seven: the hardest first, of equally hard ones the earlier.
    share, *_ = make([example], "loss={mask: share, share: 0.3}", prepare=hand_made)
    assert share.weights["x"] == [0, 1, 1, 1, 1, 0, 1]


def test_rows_without_a_context_are_left_out_of_what_the_teacher_scores(make: Any, tmp_path: Path) -> None:
    examples = tiny_examples(tmp_path / "clips")
    examples[3].context = None
    _, _, data, _ = make(examples, "loss.type=kl")
    assert len(data.rows) == len(examples) - 1
    assert [row["id"] for row in data.rejects] == [examples[3].id]
    assert "no 'context'" in data.rejects[0]["reason"]


@pytest.mark.parametrize(
    "overrides",
    [
        ["loss={mask: share, share: 0.4}"],
        ["loss={type: kl, ce: 0.5}"],
        ["loss={type: dpo, reference: context, ce: 0.3}", "style=preference"],
    ],
)
def test_batches_of_a_step_add_up_to_one(make: Any, tmp_path: Path, overrides: list[str]) -> None:
    examples = [*tiny_examples(tmp_path / "clips"), *([] if "style=preference" in overrides else TEXTS)]
    objective, student, data, _ = make(examples, *overrides)

    def gradients(batches: list[list[int]]) -> torch.Tensor:
        student.model.zero_grad()
        weight = sum(objective.weight(batch) for batch in batches)
        for batch in batches:
            loss = objective.loss(batch, "").loss
            if loss.requires_grad:
                (loss / weight).backward()
        return torch.cat(
            [p.grad.flatten() for p in student.model.connector.parameters() if p.grad is not None]
        )

    whole = gradients([every(data)])
    apart = gradients([[i] for i in every(data)])
    assert float(whole.abs().max()) > 0
    assert torch.allclose(whole, apart, rtol=1e-3, atol=1e-5 * float(whole.abs().max()))


def test_a_pair_is_compared_with_the_model_as_it_began(make: Any, tmp_path: Path) -> None:
    examples = tiny_examples(tmp_path / "clips")
    examples[0].rejected = "Nobody."
    objective, student, data, _ = make(examples, "loss.type=dpo", "style=preference")
    assert len(data.packs) == len(examples)
    wrong = data.examples[f"{examples[0].id}#rejected"].messages[-1]["content"]
    assert wrong == "Nobody."
    assert data.examples[f"{examples[1].id}#rejected"].messages[-1]["content"] == "A female."
    objective.begin(tmp_path, resumed=False)
    done = objective.loss(every(data), "")
    assert float(done.loss) / len(examples) == pytest.approx(0.693147, rel=1e-3)
    assert abs(done.figures["margin"][0]) < 1e-2
    again, _, _, _ = make(examples, "loss.type=dpo", "style=preference")
    with torch.no_grad():
        for parameter in student.model.connector.parameters():
            parameter.add_(0.1)
    again.begin(tmp_path, resumed=True)
    assert again.reference == objective.reference


def test_the_base_llm_comes_back_for_a_block_whatever_has_been_trained() -> None:
    for settings in ({"lora": LORA}, {"lora": LORA, "gate_adapters": False}, {}):
        model, _ = tiny_model(**settings)
        ids = torch.tensor([[5, 6, 7]])
        before = model.llm(input_ids=ids).logits.detach()
        if not settings:
            model.llm.requires_grad_(True)
        origin = Origin(model)
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                if parameter.requires_grad and name.startswith("llm."):
                    parameter.add_(0.3)
        with origin.base():
            assert torch.equal(model.llm(input_ids=ids).logits, before)
        with model.adapters_for(True):
            assert not torch.allclose(model.llm(input_ids=ids).logits, before, atol=1e-3)


def test_where_training_began_lies_in_memory_as_it_did_before_a_resume(tmp_path: Path) -> None:
    model, _ = tiny_model(lora=LORA)
    before, after = Origin(model), Origin(model)
    before.remember_start(tmp_path / "start.safetensors", resumed=False)
    after.remember_start(tmp_path / "start.safetensors", resumed=True)
    assert before.began.keys() == after.began.keys()
    assert all(torch.equal(value, after.began[name]) for name, value in before.began.items())
    # Matrix products sum in an order that depends on where their operands lie; a file's tensors lie anywhere.
    assert {value.data_ptr() % 64 for value in after.began.values()} == {0}


def test_rows_of_plain_text_and_transcripts(make: Any, tmp_path: Path) -> None:
    examples = [*tiny_examples(tmp_path / "clips", clips=2), Example(id="p", text="plain words")]
    objective, student, data, _ = make(examples, "style=pretrain")
    assert isinstance(objective, TokenLoss)
    tokenizer = student.processor.tokenizer
    heard = [row for row in data.rows.values() if row.clips]
    assert len(heard) == 2  # once per clip, though each was asked twice
    for row, words in zip([*heard, data.rows["p"]], ("word 0", "word 1", "plain words"), strict=True):
        ((start, end),) = row.spans
        assert end == len(row.ids)
        first = 1 if row.id == "p" else 0
        learned = [*tokenizer(words)["input_ids"][first:], tokenizer.eos_token_id]
        assert row.ids[start:end] == learned
    audio = student.processor.audio_token_id
    assert heard[0].ids[: heard[0].spans[0][0]] == [audio] * 3


@pytest.mark.parametrize(
    "whole_llm", [False, True]
)  # whose output layer moves too, and the teacher's does not
@pytest.mark.parametrize("mask", ["none", "share"])
def test_full_kl_chunk_by_chunk_has_the_loss_and_gradients_of_all_logits(
    make: Any, tmp_path: Path, whole_llm: bool, mask: str
) -> None:
    def prepare(model: Any) -> None:
        model.llm.requires_grad_(whole_llm)

    objective, student, data, origin = make(
        tiny_examples(tmp_path / "clips"), f"loss={{type: kl, top_k: null, ce: 0.5, temperature: 2.0, mask: {mask}}}",
        "model.gate_adapters=false", f"trainable.llm={str(whole_llm).lower()}", gate_adapters=False, prepare=prepare,
    )  # fmt: skip
    if whole_llm:
        assert any("lm_head" in name for name in origin.base_llm)
        with torch.no_grad():
            student.model.llm.get_output_embeddings().weight.mul_(1.1)
    at_once: list[int] = []
    head = student.model.llm.get_output_embeddings()
    head.register_forward_hook(lambda _m, _a, out: at_once.append(out.numel() // out.shape[-1]))

    def losses(most_logits: int) -> tuple[Any, dict[str, torch.Tensor], int]:
        student.most_logits = most_logits
        at_once.clear()
        student.model.zero_grad()
        found = objective.loss(every(data), "")
        found.loss.backward()
        named = student.model.named_parameters()
        return found, {n: p.grad.clone() for n, p in named if p.grad is not None}, max(at_once)

    whole, expected, most = losses(1 << 25)
    chunked, actual, fewest = losses(1)
    assert most == whole.answer_tokens > 2 * fewest
    assert float(whole.loss) > 0
    assert float(chunked.loss) == pytest.approx(float(whole.loss), rel=1e-5)
    for name, figure in whole.figures.items():
        assert chunked.figures[name] == pytest.approx(figure, rel=1e-5)
    assert actual.keys() == expected.keys()
    for name, gradient in expected.items():
        torch.testing.assert_close(actual[name], gradient, rtol=1e-3, atol=1e-5)


def test_a_teacher_that_changes_its_logits_in_its_own_way_is_not_chunked(
    make: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    objective, student, data, _ = make(tiny_examples(tmp_path / "clips"), "loss={type: kl, top_k: null}")
    expected = float(objective.loss(every(data), "").loss)
    real = speech_llm.training.answers.projection
    monkeypatch.setattr("speech_llm.training.answers.projection", lambda llm: lambda x: 2 * real(llm)(x))
    student.most_logits = 1
    assert float(objective.loss(every(data), "").loss) == pytest.approx(expected, rel=1e-5)
