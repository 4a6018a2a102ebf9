"""Losses at answer positions: chunk by chunk as all at once, in loss and gradients; and accumulated as in one batch."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from learning import tiny_examples
from tiny_models import tiny_model
from torch.nn import functional

from speech_llm.data.features import FeatureStore
from speech_llm.kv_cache import run_prefix
from speech_llm.training import answers as rooms
from speech_llm.training.losses import cross_entropy_sum
from speech_llm.training.rows import TrainingSet, build_training_set
from speech_llm.training.student import Student, log_probs_of


def student_of(folder: Path, llm: str = "llama") -> tuple[Student, TrainingSet]:
    model, processor = tiny_model(llm, lora={"rank": 2, "alpha": 4, "dropout": 0.0, "target_modules": None})
    features = FeatureStore(folder / "cache", model, processor)
    examples = tiny_examples(folder / "clips", 6)
    for example in examples[::3]:
        example.messages[-1]["content"] = "A much longer answer, for batches that weigh differently."
    data = build_training_set(examples, processor, features, 1024, False, False)
    return Student(model, processor, features, run_prefix(model.llm, data.prefix), len(data.prefix)), data


def gradients(student: Student, loss: torch.Tensor) -> dict[str, torch.Tensor]:
    student.model.zero_grad()
    loss.backward()
    named = student.model.named_parameters()
    return {name: p.grad.clone() for name, p in named if p.grad is not None}


@pytest.mark.parametrize("llm", ["llama", "gemma2"])  # gemma2 caps its logits
@pytest.mark.parametrize("trained", [False, True])
def test_chunks_give_the_loss_and_gradients_of_all_logits(tmp_path: Path, llm: str, trained: bool) -> None:
    student, data = student_of(tmp_path, llm)
    if trained:  # the output layer's own gradient too
        student.model.llm.requires_grad_(True)
    batch = student.batch(data.packs)
    logits, targets = student.answer_logits(batch)
    whole = cross_entropy_sum(logits, targets)
    expected = gradients(student, whole)
    student.most_logits = 1
    found = student.answers(batch)
    assert found.project is not None
    assert len(found.targets) > 2 * found.chunk
    loss = found.sum(lambda logits, at: cross_entropy_sum(logits, found.targets[at]))
    assert float(loss) == pytest.approx(float(whole), rel=1e-6)
    actual = gradients(student, loss)
    assert actual.keys() == expected.keys()
    for name, gradient in expected.items():
        torch.testing.assert_close(actual[name], gradient, rtol=1e-4, atol=1e-5)
    with torch.no_grad():
        torch.testing.assert_close(student.token_log_probs(batch), log_probs_of(logits, targets))


def test_an_llm_that_changes_its_logits_in_its_own_way_is_not_chunked(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    student, data = student_of(tmp_path, "gemma2")
    student.most_logits = 1
    monkeypatch.setattr(student.model.llm.config.get_text_config(), "final_logit_softcapping", 0.01)
    real = rooms.projection
    monkeypatch.setattr(
        "speech_llm.training.answers.projection", lambda llm: lambda states: 2 * real(llm)(states)
    )
    assert student.answers(student.batch(data.packs)).project is None


def test_no_logits_are_made_at_prompts_and_no_more_than_a_chunk_at_answers(tmp_path: Path) -> None:
    student, data = student_of(tmp_path)
    student.most_logits = 1
    seen: list[int] = []
    head = student.model.llm.get_output_embeddings()
    head.register_forward_hook(lambda _m, _a, out: seen.append(out.numel() // out.shape[-1]))
    batch = student.batch(data.packs)
    answers = student.answers(batch)
    answers.sum(lambda logits, at: cross_entropy_sum(logits, answers.targets[at])).backward()
    assert max(seen) <= answers.chunk < batch.answer_tokens < batch.ids.numel()


def test_accumulated_gradients_of_uneven_answers_are_those_of_one_batch(tmp_path: Path) -> None:
    student, data = student_of(tmp_path)

    def loss_of(packs: list[Any]) -> torch.Tensor:
        return cross_entropy_sum(*student.answer_logits(student.batch(packs)))

    tokens = [pack.answer_tokens for pack in data.packs]
    assert len(set(tokens)) > 1
    expected = gradients(student, loss_of(data.packs) / sum(tokens))
    student.model.zero_grad()
    for pack in data.packs:
        (loss_of([pack]) / sum(tokens)).backward()
    for name, p in student.model.named_parameters():
        if name in expected:
            torch.testing.assert_close(p.grad, expected[name], rtol=1e-4, atol=1e-6)


def test_the_loss_is_that_of_full_logits_by_hand(tmp_path: Path) -> None:
    student, data = student_of(tmp_path)
    row = next(iter(data.rows.values()))
    pack = next(pack for pack in data.packs if row.id in pack.rows)
    ids = torch.tensor([row.ids])
    vectors = student.vectors(pack.clips)
    with torch.no_grad():
        logits = student.model(
            inputs_embeds=student.model.embed(ids, vectors), has_audio=torch.tensor([True])
        ).logits[0]
        start, end = row.spans[0]
        by_hand = functional.cross_entropy(logits[start - 1 : end - 1], ids[0, start:end], reduction="sum")
        batch = student.batch([pack])
        own = batch.row_of == batch.rows.index(row.id)
        assert float(-student.token_log_probs(batch)[own].sum()) == pytest.approx(float(by_hand), rel=1e-4)
