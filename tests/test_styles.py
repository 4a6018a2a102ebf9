"""Each style of training as a whole, on tiny models: it learns what it should, leaves the rest alone, and resumes exactly."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch
from learning import judge_letters, tiny_examples, tiny_recipe
from tiny_models import tiny_encoder, tiny_llm, tiny_model

import speech_llm.training.loop as loop
import speech_llm.training.step as step
from speech_llm.data.features import FeatureStore
from speech_llm.data.live import LiveFeatures
from speech_llm.errors import UserError
from speech_llm.examples import Example, write_examples
from speech_llm.files import read_json, read_jsonl
from speech_llm.model import SpeechLLMForConditionalGeneration
from speech_llm.recipe import Recipe
from speech_llm.training.log import MEASURED

LORA = "trainable.lora={rank: 2, dropout: 0.1}"
GRPO = "loss={type: grpo, answers: 4, max_new_tokens: 6}"
STYLES = {
    "kl": ["loss={type: kl, top_k: 20, ce: 0.5}"],
    "stm": ["loss={mask: share, share: 0.3, l2_start: 0.01}", LORA],
    "pretrain": ["style=pretrain", LORA, "optimizer.epochs=4"],
    "preference": ["style=preference", "loss={type: dpo, ce: 0.1}", LORA],
    "rollout": ["style=rollout", GRPO, LORA],
    "encoder": ["trainable.encoder_lora={rank: 2, dropout: 0.1}", "optimizer.part_lr.encoder=0.002"],
    "whole": ["trainable.llm=true", "model.gate_adapters=false", "loss={type: kl, top_k: null}"],
}
TEXT = [{"role": "user", "content": "Say something."}]


@pytest.fixture
def setting(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Any:
    """`setting(*overrides)`: a recipe, with Examples for it in `tmp_path`."""

    def make(*overrides: str) -> Recipe:
        write_examples(tmp_path / "examples.jsonl", tiny_examples(tmp_path / "clips"))
        return tiny_recipe(monkeypatch, tmp_path, *overrides)

    return make


def run(recipe: Recipe, folder: Path, probe: Any = None, **more: Any) -> dict[str, Any]:
    examples = folder.parent / "examples.jsonl"
    return loop.train(
        recipe, examples, folder / "train", folder / "model", probe=probe, progress=False, **more
    )


def steps(folder: Path) -> list[dict[str, Any]]:
    return [row for _, row in read_jsonl(folder / "train" / "log.jsonl") if "grad_norm" in row]


def weights(folder: Path) -> dict[str, torch.Tensor]:
    return safetensors.torch.load_file(folder / "model" / "model.safetensors")


@pytest.mark.parametrize("style", STYLES)
def test_a_run_killed_between_steps_ends_as_an_uninterrupted_one(
    setting: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, style: str
) -> None:
    recipe = setting(*STYLES[style], "optimizer.max_steps=4", "optimizer.batch_tokens=128")
    monkeypatch.setattr(loop, "verify_answers", judge_letters)
    run(recipe, tmp_path / "whole")
    calls = 0

    def killed(*arguments: Any) -> Any:
        nonlocal calls
        calls += 1
        if calls == 3:
            raise KeyboardInterrupt
        return real(*arguments)

    real = step.set_learning_rates
    with monkeypatch.context() as patched:
        patched.setattr(step, "set_learning_rates", killed)
        with pytest.raises(KeyboardInterrupt):
            run(recipe, tmp_path / "parts")
    run(recipe, tmp_path / "parts")

    def timeless(folder: Path) -> list[dict[str, Any]]:
        return [{k: v for k, v in row.items() if k not in MEASURED} for row in steps(folder)]

    assert len(timeless(tmp_path / "whole")) == 4
    assert timeless(tmp_path / "parts") == timeless(tmp_path / "whole")
    expected, found = weights(tmp_path / "whole"), weights(tmp_path / "parts")
    assert expected.keys() == found.keys()
    assert all(torch.equal(expected[name], found[name]) for name in expected)


# The tiny LLM's output layer is nearly flat, so that adapters alone could not say anything clearly.
WHOLE = ["trainable.llm=true", "model.gate_adapters=false", "optimizer.lr=0.02"]


def test_the_margin_of_a_preference_grows(setting: Any, tmp_path: Path) -> None:
    recipe = setting("style=preference", "loss={type: dpo, beta: 0.5}", "optimizer.epochs=6", *WHOLE)
    examples = tiny_examples(tmp_path / "clips")
    for example in examples:
        example.rejected = "Nobody."
    write_examples(tmp_path / "examples.jsonl", examples)
    counts = run(recipe, tmp_path / "run")
    rows = steps(tmp_path / "run")
    assert abs(rows[0]["margin"]) < 0.05
    assert rows[-1]["margin"] > 1
    assert rows[-1]["preferred"] == 1
    assert rows[-1]["loss"] < 0.5 < rows[0]["loss"]
    assert counts["objective"] == {"style": "preference", "loss": "dpo", "pairs": 12}


def test_rewarded_answers_become_likelier(
    setting: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The toy: an answer is worth the share of its characters that are letters."""
    monkeypatch.setattr(loop, "verify_answers", judge_letters)
    recipe = setting(
        "style=rollout", "loss={type: grpo, answers: 8, max_new_tokens: 3, beta: 0.01}",
        "optimizer.epochs=12", "optimizer.batch_tokens=4096", *WHOLE,
    )  # fmt: skip
    run(recipe, tmp_path / "run")
    rows = steps(tmp_path / "run")
    rewards = [row["reward"] for row in rows]
    assert rewards[0] < 0.4
    assert sum(rewards[-3:]) / 3 > rewards[0] + 0.3
    assert rows[0]["kl"] < 1e-5 < rows[-1]["kl"]
    assert {"right", "form", "answer_length", "cut_short"} <= set(rows[-1])


def text_logits(model: Any) -> torch.Tensor:
    with torch.no_grad():
        return model.eval()(input_ids=torch.tensor([[5, 6, 7, 8]])).logits


@pytest.mark.parametrize(("gate", "same"), [(True, True), (False, False)])
def test_gated_adapters_leave_text_untouched_and_ungated_ones_do_not(
    setting: Any, tmp_path: Path, gate: bool, same: bool
) -> None:
    models: list[Any] = []
    recipe = setting(LORA, f"model.gate_adapters={str(gate).lower()}", "optimizer.epochs=2")
    before = text_logits(tiny_model()[0])
    run(recipe, tmp_path / "run", lambda model, *_: models.append(model) or {})
    after = text_logits(models[-1].cpu())
    assert torch.equal(before, after) == same
    assert models[-1].text_path_is_base == same


def parts() -> dict[str, Any]:
    return {"use_llm": tiny_llm(), "use_encoder": tiny_encoder()}


@pytest.mark.parametrize("style", ["encoder", "whole"])
def test_what_was_trained_is_in_the_folder_and_loads(setting: Any, tmp_path: Path, style: str) -> None:
    models: list[Any] = []
    run(
        setting(*STYLES[style], "optimizer.max_steps=3"),
        tmp_path / "run",
        lambda m, *_: models.append(m) or {},
    )
    loaded = SpeechLLMForConditionalGeneration.from_pretrained(tmp_path / "run" / "model", **parts())
    part = "encoder" if style == "encoder" else "llm"
    fresh = dict(tiny_model()[0].named_parameters())
    moved = [
        name
        for name, p in models[-1].named_parameters()
        if name.startswith(part) and (name not in fresh or not torch.equal(p.cpu(), fresh[name]))
    ]
    assert moved
    own = dict(loaded.named_parameters())
    assert all(torch.equal(own[name], p.cpu()) for name, p in models[-1].named_parameters())
    training = read_json(tmp_path / "run" / "model" / "training.json")
    told = training["parts"]["encoder_adapters" if style == "encoder" else "llm"]
    assert told["trained"] == told["parameters"] > 0
    assert training["parts"]["encoder"]["trained"] == 0


def test_features_of_a_trained_encoder_equal_the_cached_ones_and_carry_gradients(tmp_path: Path) -> None:
    examples = tiny_examples(tmp_path / "clips", clips=4)
    paths = list(dict.fromkeys(part["path"] for example in examples for part in example.audio_parts()))
    model, processor = tiny_model(encoder_lora={"rank": 2})
    live = LiveFeatures(model, processor)
    stored = FeatureStore(tmp_path / "cache", model, processor)
    stored.fill(paths, progress=False)
    expected, counts = stored.stacked(paths)
    found, lengths = live.stacked(paths)
    assert torch.equal(counts, lengths)
    assert torch.allclose(found, expected, atol=2e-3)
    found.sum().backward()
    gradients = [p.grad for name, p in model.encoder.named_parameters() if "lora_B" in name]
    assert gradients
    assert all(g is not None and bool(g.abs().sum() > 0) for g in gradients)


def test_a_part_may_have_its_own_learning_rate_and_a_line_says_what_is_trained(
    setting: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    recipe = setting(LORA, "optimizer.part_lr.lora=0.001", "optimizer.max_steps=2")
    loop.train(recipe, tmp_path / "examples.jsonl", tmp_path / "train", tmp_path / "model")
    said = "".join(capsys.readouterr())
    assert "parameters are trained" in said
    assert "frozen: encoder" in said
    row = next(row for _, row in read_jsonl(tmp_path / "train" / "log.jsonl") if "grad_norm" in row)
    assert row["lr"]["connector"] == pytest.approx(10 * row["lr"]["adapters"])


def test_l2_start_holds_the_parameters_where_they_began(setting: Any, tmp_path: Path) -> None:
    moved = {}
    for strength in (0.0, 100.0):
        folder = tmp_path / f"l2-{strength}"
        run(
            setting(f"loss.l2_start={strength}", "optimizer.max_steps=4", "optimizer.weight_decay=0.0"),
            folder,
        )
        start = dict(tiny_model()[0].named_parameters())
        moved[strength] = sum(
            float((w - start[name].detach()).pow(2).sum()) for name, w in weights(folder).items()
        )
    assert moved[100.0] < 0.5 * moved[0.0]
    assert steps(tmp_path / "l2-100.0")[0]["l2_start"] == 0


def test_kl_without_any_context_names_the_two_keys(setting: Any, tmp_path: Path) -> None:
    recipe = setting("loss.type=kl")
    examples = tiny_examples(tmp_path / "clips")
    for example in examples:
        example.context = None
    write_examples(tmp_path / "examples.jsonl", examples)
    with pytest.raises(UserError, match=r"loss\.type is kl.*targets\.strategy self gave no row"):
        run(recipe, tmp_path / "run")


def test_text_rows_beside_sound_train_without_a_gradient_of_their_own(setting: Any, tmp_path: Path) -> None:
    recipe = setting("optimizer.max_steps=6", "optimizer.batch_tokens=64")
    replay = [Example(id=f"r{i}", messages=[*TEXT, {"role": "assistant", "content": "ok"}]) for i in range(6)]
    write_examples(tmp_path / "examples.jsonl", [*tiny_examples(tmp_path / "clips"), *replay])
    counts = run(recipe, tmp_path / "run")
    assert counts["rows"] == 18
    assert counts["steps"] == 6
    assert counts["teach_nothing"] == 6
    write_examples(tmp_path / "examples.jsonl", replay)
    with pytest.raises(UserError, match=r"no row has sound.*model\.gate_adapters is true"):
        run(recipe, tmp_path / "other")


def test_a_training_goes_on_from_an_earlier_model_and_keeps_its_teacher(setting: Any, tmp_path: Path) -> None:
    first = setting("trainable.lora={rank: 2}", "optimizer.max_steps=2")
    run(first, tmp_path / "first")
    still = ["trainable.lora={rank: 2}", "optimizer.max_steps=1", "optimizer.lr=1e-12"]
    teachers = []
    for folder, start in (("fresh", None), ("second", tmp_path / "first" / "model")):
        run(setting("loss={type: kl, top_k: 5}", *still), tmp_path / folder, start_from=start)
        teachers.append(safetensors.torch.load_file(tmp_path / folder / "train" / "teacher.safetensors"))
    before, after = weights(tmp_path / "first"), weights(tmp_path / "second")
    assert before.keys() == after.keys()
    assert all(torch.allclose(before[name], after[name], atol=1e-6) for name in before)
    fresh = weights(tmp_path / "fresh")
    assert not all(torch.allclose(fresh[name], after[name], atol=1e-4) for name in before)
    assert all(torch.equal(teachers[0][name], teachers[1][name]) for name in teachers[0])
    with pytest.raises(UserError, match=r"lora_\w.* does not fit the model of this recipe"):
        run(setting("optimizer.max_steps=1"), tmp_path / "other", start_from=tmp_path / "first" / "model")
