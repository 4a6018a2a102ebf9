"""Every recipe is valid, opens with its command, and trains for two steps on tiny random models."""

from __future__ import annotations

import json
import math
from pathlib import Path

import pytest
from learning import OPTIMIZER, on_tiny_models, tiny_examples

from speech_llm.evaluation import asked_in_training
from speech_llm.examples import Example, write_examples
from speech_llm.files import read_jsonl
from speech_llm.recipe import Recipe, load_recipe
from speech_llm.targets.prompts import load_pool
from speech_llm.training import loop

FOLDER = Path(__file__).parent.parent / "recipes"
RECIPES = sorted(path.stem for path in FOLDER.glob("*.yaml"))
# The rows of the table of methods that this project set out to have.
METHODS = {
    "naive_sft", "pretrain", "label_sft", "full_llm", "replay", "safety_replay", "pseudo_replay", "magpie", "self_synthesized",
    "paraphrase", "self_output", "minimum_change", "stronger_teacher", "token_masking", "desta", "blsp", "ultravox_kl", "dpo",
    "grpo", "lora_scale", "lifelong", "desta2_hub", "desta25_hub", "ultravox_hub", "qwen3_1gpu",
}  # fmt: skip


def test_every_method_has_its_recipe() -> None:
    assert set(RECIPES) >= METHODS


@pytest.mark.parametrize("name", RECIPES)
def test_recipe_is_short_and_opens_with_the_command_that_runs_it(name: str) -> None:
    lines = (FOLDER / f"{name}.yaml").read_text(encoding="utf-8").splitlines()
    assert lines[0].startswith(f"# speech-llm run recipes/{name}.yaml")
    assert len(lines) <= 50
    assert load_recipe(FOLDER / f"{name}.yaml").name == name


@pytest.mark.parametrize("name", RECIPES)
def test_pools_of_a_recipe_are_there(name: str) -> None:
    recipe = load_recipe(FOLDER / f"{name}.yaml")
    for phase in recipe.phase_recipes or [recipe]:
        assert load_pool(phase.resolve_path(phase.targets.prompts))
        assert load_pool(phase.resolve_path(phase.eval.prompts))


def test_instructions_count_as_trained_on_only_where_the_targets_asked_them() -> None:
    asked = {
        name: asked_in_training(load_recipe(FOLDER / f"{name}.yaml"))
        for name in ("desta", "blsp", "naive_sft")
    }
    marked = {prompt.text for prompt in load_pool(FOLDER / "prompts" / "quickstart_eval.yaml") if prompt.seen}
    assert marked <= asked["desta"]
    assert not marked & asked["blsp"]
    assert not asked["naive_sft"]


@pytest.mark.parametrize("name", RECIPES)
def test_recipe_trains_two_steps_on_tiny_models(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    recipe = load_recipe(FOLDER / f"{name}.yaml")
    on_tiny_models(monkeypatch, tmp_path)
    write_examples(tmp_path / "examples.jsonl", tiny_examples(tmp_path / "clips"))
    text = [
        Example(
            id=f"text-{number}",
            messages=[
                {"role": "user", "content": f"add {number}"},
                {"role": "assistant", "content": "so many"},
            ],
        )
        for number in range(2)
    ]
    write_examples(tmp_path / "text.jsonl", text)
    for number, phase in enumerate(recipe.phase_recipes or [recipe]):
        _hurry(phase)
        out = tmp_path / str(number)
        counts = loop.train(
            phase,
            tmp_path / "examples.jsonl",
            out / "train",
            out / "model",
            progress=False,
            start_from=tmp_path / str(number - 1) / "model" if number else None,
            extra_examples=tmp_path / "text.jsonl" if phase.mixture.sources else None,
        )
        steps = [row for _, row in read_jsonl(out / "train" / "log.jsonl") if "grad_norm" in row]
        assert len(steps) == counts["steps"] == 2
        assert all(math.isfinite(row["loss"]) for row in steps)
        # Of 6 clips: their transcripts, 12 answers, or 12 pairs of answers.
        rows = {"pretrain": 6, "preference": 24}.get(phase.style, 12)
        assert counts["rows"] == rows + 2 * bool(phase.mixture.sources)
        kept = json.loads((out / "model" / "training.json").read_text())
        assert kept["parameters"]["trained"] > 0


def _hurry(recipe: Recipe) -> None:
    """Two steps, without a warm-up; all else as the recipe says."""
    for key, value in {**OPTIMIZER, "max_steps": 2, "lr": recipe.optimizer.lr}.items():
        setattr(recipe.optimizer, key, value)
