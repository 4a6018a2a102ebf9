"""Compiled layers compute what the plain ones do, for batches of any size, and touch nothing else."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import parallel
import pytest
import torch
from learning import QUICKSTART, judge_letters, tiny_examples, tiny_recipe
from safetensors.torch import load_file
from test_packing_rows import text_examples, training_set

import speech_llm.training.loop as loop
from speech_llm.errors import UserError
from speech_llm.examples import write_examples
from speech_llm.files import read_jsonl
from speech_llm.recipe import load_recipe
from speech_llm.training.compiled import CompiledLayers, missing_compiler
from speech_llm.training.losses import cross_entropy_sum
from speech_llm.training.step import seed_chance
from speech_llm.training.student import Student

compiling = pytest.mark.skipif(
    missing_compiler() is not None, reason=f"nothing can be compiled without {missing_compiler()}"
)
LORA = {"rank": 2, "alpha": 4, "dropout": 0.2, "target_modules": None}


def step(student: Student, packs: list[Any]) -> tuple[float, dict[str, torch.Tensor]]:
    """Loss of some packs, and its gradients by name."""
    seed_chance("a step")
    student.model.zero_grad(set_to_none=True)
    loss = cross_entropy_sum(*student.answer_logits(student.batch(packs)))
    loss.backward()
    return float(loss.detach()), {
        name: p.grad.clone() for name, p in student.model.named_parameters() if p.grad is not None
    }


@compiling
def test_losses_and_gradients_are_those_of_the_plain_layers_with_few_programs(tmp_path: Path) -> None:
    examples = tiny_examples(tmp_path, 7) + text_examples(6)
    student, data = training_set(examples, tmp_path, lora=LORA)
    student.model.train()
    heard = [pack for pack in data.packs if pack.clips]
    silent = [pack for pack in data.packs if not pack.clips]
    # Several packs, then a single one, which is a kind of batch of its own.
    batches = [heard[:3], heard[3:], heard[:2] + silent, heard, heard[5:6], heard[1:2]]
    names = list(student.model.state_dict())
    plain = [step(student, packs) for packs in batches]
    student.compiled = CompiledLayers(student.model)
    for packs, (loss, gradients) in zip(batches, plain, strict=True):
        found, compiled = step(student, packs)
        assert found == pytest.approx(loss, rel=1e-5)
        assert compiled.keys() == gradients.keys()
        for name, gradient in gradients.items():
            torch.testing.assert_close(compiled[name], gradient, rtol=1e-4, atol=1e-5)
    assert student.compiled.programs == len(student.compiled.kinds) == 2
    assert student.compiled.seconds > 0
    assert list(student.model.state_dict()) == names
    # Without gradients nothing is compiled.
    student.model.eval()
    with torch.no_grad():
        student.answer_logits(student.batch(heard))
    assert student.compiled.programs == len(student.compiled.kinds) == 2
    assert not any("forward" in vars(module) for module in student.model.modules())


@pytest.fixture
def examples(tmp_path: Path) -> Path:
    write_examples(tmp_path / "examples.jsonl", tiny_examples(tmp_path / "clips", 8))
    return tmp_path / "examples.jsonl"


def run(recipe: Any, examples: Path, folder: Path, probe: Any = None) -> dict[str, Any]:
    return loop.train(recipe, examples, folder / "train", folder / "model", probe=probe, progress=False)


def log_of(folder: Path) -> list[dict[str, Any]]:
    return [row for _, row in read_jsonl(folder / "train" / "log.jsonl") if "loss" in row]


@compiling
def test_a_compiled_run_that_was_killed_ends_as_an_uninterrupted_one(
    examples: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The resumed run meets other sizes first, and finds no program of the first run in a cache."""
    from torch._inductor.utils import fresh_cache

    changes = ["trainable.lora={rank: 2, dropout: 0.2}", "optimizer.batch_tokens=300", "optimizer.epochs=3"]
    plain = tiny_recipe(monkeypatch, tmp_path, *changes)
    recipe = tiny_recipe(monkeypatch, tmp_path, *changes, "optimizer.compile=true")
    run(plain, examples, tmp_path / "plain")

    def killed(_model: Any, _processor: Any, epoch: float) -> dict[str, Any]:
        if epoch == 2:
            raise KeyboardInterrupt
        return {}

    with fresh_cache():
        counts = run(recipe, examples, tmp_path / "whole")
        with pytest.raises(KeyboardInterrupt):
            run(recipe, examples, tmp_path / "parts", killed)
    assert counts["compiled"]["programs"] >= 1
    for one, two in zip(log_of(tmp_path / "plain"), log_of(tmp_path / "whole"), strict=True):
        assert two["loss"] == pytest.approx(one["loss"], abs=2e-4)
    with fresh_cache():
        run(recipe, examples, tmp_path / "parts")
    whole, parts = (log_of(tmp_path / name) for name in ("whole", "parts"))
    assert [row["loss"] for row in parts] == [row["loss"] for row in whole]
    one, two = (load_file(tmp_path / name / "model" / "model.safetensors") for name in ("whole", "parts"))
    assert one.keys() == two.keys() == load_file(tmp_path / "plain" / "model" / "model.safetensors").keys()
    assert all(torch.equal(one[name], two[name]) for name in one)


@compiling
@pytest.mark.parametrize(
    "changes",
    [
        ["loss={type: kl, top_k: null}"],
        ["style=preference", "loss={type: dpo, ce: 0.1}"],
        ["style=rollout", "loss={type: grpo, answers: 4, max_new_tokens: 6}"],
    ],
    ids=["kl", "dpo", "grpo"],
)
def test_every_style_steps_compiled_as_it_does_uncompiled(
    examples: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, changes: list[str]
) -> None:
    # What a random model says is worth more or less.
    monkeypatch.setattr(loop, "verify_answers", judge_letters)
    settings = [*changes, "trainable.lora={rank: 2, dropout: 0.1}", "optimizer.max_steps=1"]
    run(tiny_recipe(monkeypatch, tmp_path, *settings), examples, tmp_path / "plain")
    recipe = tiny_recipe(monkeypatch, tmp_path, *settings, "optimizer.compile=true")
    counts = run(recipe, examples, tmp_path / "compiled")
    assert counts["compiled"]["programs"] >= 1
    (plain,), (compiled,) = (log_of(tmp_path / name) for name in ("plain", "compiled"))
    assert plain["grad_norm"] > 0
    assert compiled["grad_norm"] == pytest.approx(plain["grad_norm"], rel=1e-3)
    assert compiled["loss"] == pytest.approx(plain["loss"], abs=2e-4)


@compiling
def test_two_compiled_copies_do_what_one_compiled_process_does(tmp_path: Path) -> None:
    parallel.alone(tmp_path, changes=["optimizer.compile=true"])
    parallel.launch(tmp_path, "copies", parallel.COPIES, "optimizer.compile=true")
    one, copies = (log_of(tmp_path / name) for name in ("one", "copies"))
    assert [row["loss"] for row in copies] == [row["loss"] for row in one]
    ours, theirs = (load_file(tmp_path / name / "model" / "model.safetensors") for name in ("one", "copies"))
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(ours[name], theirs[name]) for name in ours)


def test_what_cannot_be_compiled_is_told_before_anything_is_trained(
    examples: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(UserError, match=r"optimizer\.compile .*optimizer\.gradient_checkpointing"):
        load_recipe(QUICKSTART, ["optimizer.compile=true", "optimizer.gradient_checkpointing=true"])
    recipe = tiny_recipe(monkeypatch, tmp_path, "optimizer.compile=true")
    monkeypatch.setenv("CXX", "no-such-compiler")
    with pytest.raises(
        UserError, match=r"needs a C\+\+ compiler \(no-such-compiler.*set optimizer\.compile to false"
    ):
        run(recipe, examples, tmp_path / "none")
