"""DeepSpeed's ZeRO: two processes on CPU that hold optimiser or weights in parts do what one process does. Most needs the package."""

from __future__ import annotations

import importlib.util
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import accelerate.utils
import parallel
import pytest
import safetensors.torch
import torch
from tiny_models import tiny_model

from speech_llm.data.features import FeatureStore
from speech_llm.errors import UserError
from speech_llm.examples import Example
from speech_llm.files import read_jsonl
from speech_llm.training.log import MEASURED
from speech_llm.training.losses import cross_entropy_sum
from speech_llm.training.processes import Processes
from speech_llm.training.rows import build_training_set
from speech_llm.training.student import Student
from speech_llm.training.zero import Zero

needs_deepspeed = pytest.mark.skipif(
    importlib.util.find_spec("deepspeed") is None,
    reason="deepspeed is not installed: pip install 'speech-llm[deepspeed]'",
)
# The divergence is measured at each process's first batch, so of more batches than in one process.
UNLIKE = {*MEASURED, "kl_base"}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Rows with and without sound and answers of very different lengths, and what one process makes of them."""
    path: Path = tmp_path_factory.mktemp("zero")
    turns = [
        {"role": "user", "content": "What is it?"},
        {"role": "assistant", "content": "A test, and more."},
    ]
    parallel.alone(path, [Example(id=f"text{i}", messages=turns) for i in range(3)])
    return path


def rows_of(folder: Path, name: str) -> list[dict[str, Any]]:
    rows = [row for _, row in read_jsonl(folder / name / "train" / "log.jsonl")]
    return [{k: v for k, v in row.items() if k not in UNLIKE} for row in rows if "loss" in row]


def tensors_of(folder: Path, name: str) -> dict[str, torch.Tensor]:
    """Weights, and what the last checkpoint keeps for the optimiser."""
    last = max((folder / name / "train" / "checkpoints").glob("step-*"))
    return {
        **safetensors.torch.load_file(folder / name / "model" / "model.safetensors"),
        **safetensors.torch.load_file(last / "optimizer.safetensors"),
    }


def launch(folder: Path, name: str, options: Sequence[str]) -> None:
    """A training of two processes that is sent back to its middle checkpoint and goes on from there."""
    parallel.launch(folder, name, ["--use_deepspeed", *options])


@needs_deepspeed
@pytest.mark.parametrize("stage", ["1", "2"])
def test_an_optimiser_in_parts_does_what_one_process_does_bit_for_bit(folder: Path, stage: str) -> None:
    launch(folder, f"stage{stage}", ["--zero_stage", stage])
    assert len({row["answer_tokens"] for row in rows_of(folder, "one")}) > 1  # answers are uneven
    assert rows_of(folder, f"stage{stage}") == rows_of(folder, "one")
    one, two = tensors_of(folder, "one"), tensors_of(folder, f"stage{stage}")
    assert one.keys() == two.keys()
    assert all(torch.equal(one[name], two[name]) for name in one)


@needs_deepspeed
def test_weights_in_parts_do_what_one_process_does(folder: Path) -> None:
    settings = folder / "stage3.json"
    sections = {"stage": 3, "stage3_param_persistence_threshold": 0}  # small weights are else held whole
    settings.write_text(json.dumps({"zero_optimization": sections, "bf16": {"enabled": "auto"}}))
    launch(folder, "stage3", ["--deepspeed_config_file", str(settings)])
    expected, found = rows_of(folder, "one"), rows_of(folder, "stage3")
    assert len(found) == len(expected) == 6
    for one, two in zip(expected, found, strict=True):
        assert two["loss"] == pytest.approx(one["loss"], abs=2e-5)
        assert two["grad_norm"] == pytest.approx(one["grad_norm"], rel=1e-4)
        assert (two["rows"], two["answer_tokens"]) == (one["rows"], one["answer_tokens"])
    first, second = tensors_of(folder, "one"), tensors_of(folder, "stage3")
    assert first.keys() == second.keys()
    assert all(first[name].shape == second[name].shape for name in first)
    assert all(torch.allclose(first[name], second[name], atol=1e-4) for name in first)


def test_without_the_package_it_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ACCELERATE_USE_DEEPSPEED", "true")
    monkeypatch.setattr(accelerate.utils, "is_deepspeed_available", lambda: False)
    with pytest.raises(UserError, match=r"pip install 'speech-llm\[deepspeed\]'"):
        Processes()


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"zero_optimization": {"stage": 0}}, "holds nothing in parts; launch with --multi_gpu"),
        ({"zero_optimization": {"stage": 2}, "optimizer": {"type": "Adam"}}, "'optimizer'.*remove it"),
        ({"zero_optimization": {"stage": 2}, "bf16": {"enabled": True}}, r"'bf16'.*optimizer\.precision"),
        ({}, "ZeRO optimization config"),
    ],
)
def test_settings_that_go_against_the_recipe_are_refused_in_a_sentence(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, settings: dict[str, Any], said: str
) -> None:
    monkeypatch.setattr(accelerate.utils, "is_deepspeed_available", lambda: True)
    file = tmp_path / "settings.json"
    file.write_text(json.dumps(settings))
    monkeypatch.setenv("ACCELERATE_DEEPSPEED_CONFIG_FILE", str(file))
    with pytest.raises(UserError, match=said):
        Zero()


def test_a_stand_in_for_sound_changes_nothing_and_lets_every_layer_have_a_gradient(tmp_path: Path) -> None:
    model, processor = tiny_model(lora={"rank": 2, "alpha": 4, "dropout": 0.0, "target_modules": None})
    turns = [{"role": "user", "content": "What is it?"}, {"role": "assistant", "content": "A test."}]
    store = FeatureStore(tmp_path / "features", model, processor)
    data = build_training_set(
        [Example(id="text", messages=turns)], processor, store, 512, False, progress=False
    )
    trained = [p for p in model.parameters() if p.requires_grad]
    losses = []
    for every_layer in (False, True):
        student = Student(model, processor, store, [], 0, every_layer=every_layer)
        loss = cross_entropy_sum(*student.answer_logits(student.batch(data.packs)))
        losses.append(float(loss.detach()))
        loss.backward()
        assert all(p.grad is not None for p in trained) == every_layer
    assert losses[0] == losses[1]
    assert not any(p.grad.any() for p in trained if p.grad is not None)
