"""What is told while a model trains: figures of every step, the divergence from the base LLM, trackers; and what stops it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from learning import tiny_examples, tiny_recipe

import speech_llm.training.loop as loop
from speech_llm.errors import UserError
from speech_llm.examples import write_examples
from speech_llm.files import read_jsonl
from speech_llm.training.losses import all_finite
from speech_llm.training.processes import Processes


@pytest.fixture
def run(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Any:
    """Trains four steps by a recipe of its own; returns the log's rows of steps."""
    write_examples(tmp_path / "examples.jsonl", tiny_examples(tmp_path / "clips", 8))

    def go(name: str, *overrides: str) -> list[dict[str, Any]]:
        settings = ("optimizer.max_steps=4", "optimizer.batch_tokens=128", "optimizer.kl_every=3", *overrides)
        recipe = tiny_recipe(monkeypatch, tmp_path, *settings)
        out = tmp_path / name
        loop.train(recipe, tmp_path / "examples.jsonl", out / "train", out / "model", progress=False)
        return [row for _, row in read_jsonl(out / "train" / "log.jsonl")]

    return go


LORA = ["trainable.lora.rank=2"]


def test_every_step_tells_its_figures(run: Any) -> None:
    rows = run("plain", *LORA)
    named = {"loss", "lr", "grad_norm", "rows", "answer_tokens", "rows_per_s", "answer_tokens_per_s"}
    named |= {"padding_share", "memory_mb", "wait_s", "seconds"}
    assert all(named <= row.keys() for row in rows)
    assert all(row["memory_mb"] > 50 and row["wait_s"] < row["seconds"] for row in rows)
    measured = [row["step"] for row in rows if "kl_base" in row]
    assert measured == [1, 4]
    assert all(row["kl_base"] >= 0 for row in rows if "kl_base" in row)
    assert rows[3]["kl_base"] > rows[0]["kl_base"]  # it moves away from what it was


def test_measuring_the_divergence_changes_nothing_of_the_training(run: Any) -> None:
    dropout = [*LORA, "trainable.lora.dropout=0.3"]
    often, never = (
        run("often", *dropout, "optimizer.kl_every=1"),
        run("never", *dropout, "optimizer.kl_every=0"),
    )
    assert [row["loss"] for row in often] == [row["loss"] for row in never]
    assert all("kl_base" not in row for row in never)


def test_recomputed_activations_give_the_same_losses(run: Any) -> None:
    plain, again = run("plain", *LORA), run("again", *LORA, "optimizer.gradient_checkpointing=true")
    for one, two in zip(plain, again, strict=True):
        assert two["loss"] == pytest.approx(one["loss"], abs=2e-5)
        assert two["grad_norm"] == pytest.approx(one["grad_norm"], rel=1e-3)


def test_tensorboard_gets_every_step(run: Any, tmp_path: Path) -> None:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    rows = run("tracked", "optimizer.trackers=[tensorboard]")
    events = next((tmp_path / "tracked" / "train").rglob("events.out.tfevents.*"))
    seen = EventAccumulator(str(events.parent))
    seen.Reload()
    told = {event.step: event.value for event in seen.Scalars("loss")}
    assert told == {row["step"]: pytest.approx(row["loss"], rel=1e-5) for row in rows}
    assert {"lr", "grad_norm", "rows_per_s", "memory_mb"} <= set(seen.Tags()["scalars"])


def test_a_gradient_that_is_not_finite_stops_and_names_rows_and_checkpoint(
    run: Any, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    real, calls = Processes.clip, 0

    def breaks(self: Processes, parameters: Any, largest: float) -> float:
        nonlocal calls
        calls += 1
        if calls == 3:
            parameters[0].grad[...] = float("inf")
        return real(self, parameters, largest)

    monkeypatch.setattr(Processes, "clip", breaks)
    with pytest.raises(UserError, match=r"step 3: the gradient is not finite on the rows c\d.*step-000002"):
        run("broken")
    assert not (tmp_path / "broken" / "model").exists()


def test_infinity_is_not_finite_either() -> None:
    assert not all_finite(torch.tensor(float("inf")))
    assert not all_finite(torch.tensor(float("nan")))
    assert all_finite(torch.tensor(1e30))
