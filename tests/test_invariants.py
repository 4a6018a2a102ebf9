"""The list of invariants names tests that are there, and two invariants that no other file proves."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch
from learning import tiny_examples, tiny_recipe

import speech_llm.training.loop as loop
from speech_llm.examples import write_examples
from speech_llm.files import read_jsonl
from speech_llm.training.log import MEASURED

HERE = Path(__file__).parent


def test_every_invariant_has_tests_that_exist() -> None:
    table = (
        (HERE.parent / "docs" / "scaling.md").read_text(encoding="utf-8").partition("| Invariant | Test |")[2]
    )
    rows = [line for line in table.splitlines() if line.startswith("|") and "---" not in line]
    assert len(rows) >= 12
    for row in rows:
        named = re.findall(r"`(test_\w+\.py)::(test_\w+)`", row)
        assert named, row
        for file, test in named:
            assert f"def {test}(" in (HERE / file).read_text(encoding="utf-8"), (file, test)


def train(
    monkeypatch: pytest.MonkeyPatch, folder: Path, *overrides: str, long: bool = False
) -> dict[str, Any]:
    examples = tiny_examples(folder / "clips")
    if long:
        for example in (examples[1], examples[4]):
            example.messages[-1]["content"] = "word " * 400
    write_examples(folder / "examples.jsonl", examples)
    recipe = tiny_recipe(monkeypatch, folder, "trainable.lora={rank: 2, dropout: 0.2}", *overrides)
    return loop.train(recipe, folder / "examples.jsonl", folder / "train", folder / "model", progress=False)


def outcome(folder: Path) -> tuple[list[dict[str, Any]], dict[str, torch.Tensor]]:
    rows = [row for _, row in read_jsonl(folder / "train" / "log.jsonl")]
    kept = [{key: value for key, value in row.items() if key not in MEASURED} for row in rows]
    return kept, safetensors.torch.load_file(folder / "model" / "model.safetensors")


def test_an_over_long_example_is_dropped_and_counted_never_cut(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    whole = train(monkeypatch, tmp_path / "whole")
    counts = train(monkeypatch, tmp_path / "long", "optimizer.max_tokens=200", long=True)
    assert counts["rejected"] == whole["rejected"] + 2
    assert counts["rows"] == whole["rows"] - 2
    rejects = [row for _, row in read_jsonl(tmp_path / "long" / "train" / "rejects.jsonl")]
    assert [("never cut" in row["reason"], bool(row["id"])) for row in rejects] == [(True, True)] * 2
    steps = [row for row in outcome(tmp_path / "long")[0] if "loss" in row]
    # No step saw the long answers: all others have a few tokens each.
    assert max(row["answer_tokens"] / row["rows"] for row in steps) < 50


def test_the_same_seed_gives_the_same_run_and_another_seed_another(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    for name, seed in (("a", 3), ("b", 3), ("c", 4)):
        train(monkeypatch, tmp_path / name, f"seed={seed}")
    (log_a, first), (log_b, second), (log_c, third) = (outcome(tmp_path / name) for name in "abc")
    assert log_a == log_b
    assert all(torch.equal(first[name], second[name]) for name in first)
    assert log_a != log_c
    assert any(not torch.equal(first[name], third[name]) for name in first)
