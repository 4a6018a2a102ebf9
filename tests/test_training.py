"""The training loop on tiny random models: it learns, a killed run ends as an uninterrupted one, NaN stops it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch
from learning import QUICKSTART, asked_tones
from tiny_models import tiny_model

import speech_llm.model
import speech_llm.training.align
import speech_llm.training.loop as loop
import speech_llm.training.objectives as objectives
import speech_llm.training.soft_words
from speech_llm.errors import UserError
from speech_llm.examples import write_examples
from speech_llm.files import read_jsonl, write_jsonl
from speech_llm.recipe import Recipe, load_recipe
from speech_llm.training.soft_words import SoftWords


@pytest.fixture
def recipe(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Recipe:
    monkeypatch.setenv("SPEECH_LLM_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(speech_llm.model, "build_model", lambda *_, **__: tiny_model())
    changes = {"epochs": 3, "batch_tokens": 256, "lr": 0.01, "align_epochs": 2, "soft_word_epochs": 2, "checkpoint_every": 2, "precision": "float32"}  # fmt: skip
    return load_recipe(QUICKSTART, [f"optimizer.{key}={value}" for key, value in changes.items()])


@pytest.fixture
def data(tmp_path: Path) -> tuple[Path, Path]:
    """Examples and described clips: eight sounds, low or high, two questions each."""
    examples, described = asked_tones(tmp_path, 8)
    write_examples(tmp_path / "examples.jsonl", examples)
    write_jsonl(tmp_path / "train.jsonl", described)
    return tmp_path / "examples.jsonl", tmp_path / "train.jsonl"


def run(recipe: Recipe, data: tuple[Path, Path], folder: Path, probe: Any = None) -> dict[str, Any]:
    return loop.train(
        recipe, data[0], folder / "train", folder / "model", described=data[1], probe=probe, progress=False
    )


def weights(folder: Path) -> dict[str, torch.Tensor]:
    return safetensors.torch.load_file(folder / "model" / "model.safetensors")


def losses(folder: Path) -> list[float]:
    return [
        row["loss"]
        for _, row in read_jsonl(folder / "train" / "log.jsonl")
        if "loss" in row and "step" in row
    ]


def test_a_killed_run_ends_as_an_uninterrupted_one(
    recipe: Recipe, data: tuple[Path, Path], tmp_path: Path
) -> None:
    counts = run(recipe, data, tmp_path / "whole")
    seen = losses(tmp_path / "whole")
    assert len(seen) == counts["steps"] >= 6
    assert seen[-1] < seen[0]
    assert counts["align"]["epochs"] == 2
    assert counts["align"]["soft_words"]["epochs"] == 2

    def killed(_model: Any, _processor: Any, epoch: int) -> dict[str, Any]:
        if epoch == 2:
            raise KeyboardInterrupt
        return {}

    with pytest.raises(KeyboardInterrupt):
        run(recipe, data, tmp_path / "parts", killed)
    assert not (tmp_path / "parts" / "model").exists()
    run(recipe, data, tmp_path / "parts")
    assert losses(tmp_path / "parts") == seen
    expected, found = weights(tmp_path / "whole"), weights(tmp_path / "parts")
    assert all(torch.equal(expected[name], found[name]) for name in expected)


def test_the_text_llm_stays_as_it_was(recipe: Recipe, data: tuple[Path, Path], tmp_path: Path) -> None:
    models: list[Any] = []
    before = {name: p.clone() for name, p in tiny_model()[0].llm.named_parameters()}

    def probe(model: Any, _processor: Any, _epoch: int) -> dict[str, Any]:
        models.append(model)
        return {}

    run(recipe, data, tmp_path, probe)
    assert len(models) == 5  # before, warmed up, three epochs
    assert all(torch.equal(before[name], p.cpu()) for name, p in models[-1].llm.named_parameters())
    assert all(name.startswith("connector.") for name in weights(tmp_path))


def test_a_loss_that_is_not_finite_stops_and_names_the_rows(
    recipe: Recipe, data: tuple[Path, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(objectives, "cross_entropy_sum", lambda logits, *_: logits.sum() * float("nan"))
    with pytest.raises(
        UserError, match=r"step 1: the loss is not finite on the rows c\d.*lower optimizer\.lr"
    ):
        run(recipe, data, tmp_path)


def test_clips_that_cannot_be_used_are_set_aside(
    recipe: Recipe, data: tuple[Path, Path], tmp_path: Path
) -> None:
    Path(tmp_path / "c3.wav").write_bytes(b"")
    counts = run(recipe, data, tmp_path)
    assert counts["rows"] == 14
    rejects = [row for _, row in read_jsonl(tmp_path / "train" / "rejects.jsonl")]
    assert {row["id"] for row in rejects} == {"c3/who?", "c3/man or woman?"}
    assert all("empty" in row["reason"] for row in rejects)


def test_a_run_killed_while_aligning_keeps_its_soft_words(
    recipe: Recipe, data: tuple[Path, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run(recipe, data, tmp_path / "whole")

    def killed(*_: Any, **__: Any) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patched:
        patched.setattr(speech_llm.training.align, "align", killed)
        with pytest.raises(KeyboardInterrupt):
            run(recipe, data, tmp_path / "parts")
    monkeypatch.setattr(
        speech_llm.training.soft_words, "learn_soft_words", killed
    )  # must not be needed again
    run(recipe, data, tmp_path / "parts")
    logs = [(tmp_path / name / "train" / "log.jsonl") for name in ("whole", "parts")]
    warm_up = [[row for _, row in read_jsonl(log) if "grad_norm" not in row] for log in logs]
    assert warm_up[0] == warm_up[1]
    assert [row["epoch"] for row in warm_up[0] if "phase" in row] == [1, 2]
    assert [row["loss"] for row in warm_up[0] if "soft_step" in row]
    expected, found = weights(tmp_path / "whole"), weights(tmp_path / "parts")
    assert all(torch.equal(expected[name], found[name]) for name in expected)


def test_soft_words_learn_the_answers_and_a_clip_of_unknown_labels_has_its_own(
    data: tuple[Path, Path],
) -> None:
    model, processor = tiny_model()
    clips = [row for _, row in read_jsonl(data[1])]
    table = model.llm.get_input_embeddings().weight
    soft = SoftWords(clips, processor.tokenizer, table, vectors=4, use=["gender", "accent"])
    assert (soft.names, soft.slots, soft.common.shape[0]) == (["gender"], 2, 2)
    places = soft.places([{"gender": "male"}, {"gender": "female"}, {}])
    assert places.tolist() == [[1], [0], [2]]
    vectors = soft(places)
    assert vectors.shape == (3, 4, table.shape[1])
    assert torch.equal(vectors[0, :2], vectors[1, :2])
    assert not torch.equal(vectors[0, 2:], vectors[1, 2:])
    common, (gender,) = soft.parts(vectors)
    assert torch.equal(common[0], soft.common)
    assert torch.equal(gender[2], soft.values[0][2])
