"""Text rows beside audio rows: they pack, train and resume, change nothing for the audio, and teach what they say."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch
from learning import QUICKSTART, asked_tones
from tiny_models import tiny_model

import speech_llm.model
import speech_llm.training.loop as loop
from speech_llm.data.features import FeatureStore
from speech_llm.examples import Example, read_examples, user_turn, write_examples
from speech_llm.files import read_json, read_jsonl, write_jsonl
from speech_llm.kv_cache import run_prefix
from speech_llm.pipeline import run_stages
from speech_llm.recipe import Recipe, load_recipe
from speech_llm.stages import STAGES, Stage
from speech_llm.training.losses import cross_entropy_sum
from speech_llm.training.rows import build_training_set
from speech_llm.training.student import Student

LORA = {"rank": 4, "alpha": 16, "dropout": 0.0, "target_modules": None}
TALK = [
    ("Where is Oslo?", "In Norway."),
    ("How many legs has a spider? I forgot.", "Eight."),
    ("Say hello to everyone in the room.", "Hello, everyone in the room!"),
]


def text_rows() -> list[Example]:
    rows = []
    for number, (question, answer) in enumerate(TALK):
        turns = [user_turn(question), {"role": "assistant", "content": answer}]
        rows.append(Example(id=f"replay/{number}", messages=turns, source={"strategy": "replay"}))
    system = {"role": "system", "content": "Be brief."}
    return [*rows, Example(id="replay/system", messages=[system, *rows[0].messages])]


@pytest.fixture
def files(tmp_path: Path) -> tuple[Path, Path, Path]:
    """Audio Examples (six sounds, two questions each), text rows, described clips."""
    examples, described = asked_tones(tmp_path, 6)
    write_examples(tmp_path / "examples.jsonl", examples)
    write_examples(tmp_path / "extra.jsonl", text_rows())
    write_jsonl(tmp_path / "train.jsonl", described)
    return tmp_path / "examples.jsonl", tmp_path / "extra.jsonl", tmp_path / "train.jsonl"


@pytest.fixture
def recipe(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Recipe:
    monkeypatch.setenv("SPEECH_LLM_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(
        speech_llm.model, "build_model", lambda *_, **__: tiny_model(lora=LORA, gate_adapters=False)
    )
    changes = {"epochs": 3, "batch_tokens": 256, "lr": 0.01, "align_epochs": 1, "soft_word_epochs": 1, "checkpoint_every": 2, "precision": "float32"}  # fmt: skip
    return load_recipe(
        QUICKSTART,
        [
            *(f"optimizer.{key}={value}" for key, value in changes.items()),
            "trainable.lora={rank: 4}",
            "model.gate_adapters=false",
            "mixture={sources: [{type: replay}]}",
        ],
    )


def train(recipe: Recipe, files: tuple[Path, Path, Path], out: Path, probe: Any = None) -> dict[str, Any]:
    return loop.train(
        recipe,
        files[0],
        out / "train",
        out / "model",
        files[2],
        probe,
        progress=False,
        extra_examples=files[1],
    )


@pytest.mark.parametrize("frozen", [True, False], ids=["behind the shared prefix", "whole rows"])
def test_a_text_row_in_a_batch_with_audio_rows_gives_the_loss_it_has_alone(
    files: tuple[Path, Path, Path], tmp_path: Path, frozen: bool
) -> None:
    model, processor = tiny_model(lora=LORA, gate_adapters=False)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_B" in name:  # adapters that have learned something
                parameter.normal_(0, 0.2)
    store = FeatureStore(tmp_path / "features", model, processor)
    examples = [*read_examples(files[0]), *text_rows()[:3]]
    data = build_training_set(examples, processor, store, 512, frozen, False, text_tokens=1)
    assert not data.rejects
    assert bool(data.prefix) == frozen
    together = build_training_set(examples, processor, store, 512, frozen, False).packs[-1]
    student = Student(model, processor, store, run_prefix(model.llm, data.prefix), len(data.prefix))

    def loss(packs: list[Any]) -> torch.Tensor:
        return cross_entropy_sum(*student.answer_logits(student.batch(packs))).detach()

    text = [pack for pack in data.packs if not pack.clips]
    assert [pack.rows for pack in text] == [["replay/0"], ["replay/1"], ["replay/2"]]
    sound = [pack for pack in data.packs if pack.clips]
    alone = [loss([pack]) for pack in text]
    for pack, expected in zip(text, alone, strict=True):
        both = loss([sound[0], pack, sound[1]])
        torch.testing.assert_close(both - loss([sound[0], sound[1]]), expected, rtol=1e-4, atol=1e-4)
        row = processor.render(text_rows()[text.index(pack)].messages)
        logits = model(input_ids=torch.tensor([row.input_ids]), has_audio=True).logits[0]
        places = [place for start, end in row.answer_spans for place in range(start, end)]
        plain = torch.nn.functional.cross_entropy(
            logits[[place - 1 for place in places]],
            torch.tensor([row.input_ids[place] for place in places]),
            reduction="sum",
        )
        torch.testing.assert_close(expected, plain.detach(), rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(loss(text), torch.stack(alone).sum(), rtol=1e-4, atol=1e-4)
    assert together.rows == ["replay/0", "replay/1", "replay/2"]  # rows of text share a sequence
    both = loss([sound[0], together, sound[1]]) - loss([sound[0], sound[1]])
    torch.testing.assert_close(both, torch.stack(alone).sum(), rtol=1e-4, atol=1e-4)


def test_text_rows_are_trained_on_after_those_of_the_targets(
    recipe: Recipe, files: tuple[Path, Path, Path], tmp_path: Path
) -> None:
    counts = train(recipe, files, tmp_path / "mixed")
    assert counts["rows"] == 12 + 4
    assert counts["packs"] == 6 + 2  # six clips with two questions each; four rows of text in two
    assert 0 < counts["padding_share"] < 0.5
    assert counts["rejected"] == 0
    assert counts["align"]["epochs"] == 1  # the warm-up looks at clips only
    assert counts["align"]["soft_words"]["epochs"] == 1
    losses = [
        row["loss"] for _, row in read_jsonl(tmp_path / "mixed" / "train" / "log.jsonl") if "grad_norm" in row
    ]
    assert losses[-1] < losses[0]
    alone = loop.train(
        recipe, files[0], tmp_path / "a" / "train", tmp_path / "a" / "model", files[2], progress=False
    )
    assert alone["rows"] == 12


def test_text_rows_teach_an_ungated_model_what_they_say(
    recipe: Recipe, files: tuple[Path, Path, Path], tmp_path: Path
) -> None:
    """Its loss on the replayed conversations falls further with them in the mixture than without."""

    def loss_on_text(extra: Path | None, name: str) -> float:
        loop.train(
            recipe, files[0], tmp_path / name / "train", tmp_path / name / "model", files[2],
            progress=False, extra_examples=extra,
        )  # fmt: skip
        model, processor = tiny_model(lora=LORA, gate_adapters=False)
        model.load_trained(safetensors.torch.load_file(tmp_path / name / "model" / "model.safetensors"))
        total = 0.0
        for example in text_rows():
            row = processor.render(example.messages)
            labels = torch.full((1, len(row.input_ids)), -100)
            for start, end in row.answer_spans:
                labels[0, start:end] = torch.tensor(row.input_ids[start:end])
            with torch.no_grad():
                total += float(model(input_ids=torch.tensor([row.input_ids]), labels=labels).loss)
        return total

    assert loss_on_text(files[1], "with") < loss_on_text(None, "without")


def test_a_killed_run_with_text_rows_ends_as_an_uninterrupted_one(
    recipe: Recipe, files: tuple[Path, Path, Path], tmp_path: Path
) -> None:
    train(recipe, files, tmp_path / "whole")

    def killed(_model: Any, _processor: Any, epoch: float) -> dict[str, Any]:
        if epoch == 2:
            raise KeyboardInterrupt
        return {}

    with pytest.raises(KeyboardInterrupt):
        train(recipe, files, tmp_path / "parts", killed)
    train(recipe, files, tmp_path / "parts")
    whole, parts = (
        safetensors.torch.load_file(tmp_path / name / "model" / "model.safetensors")
        for name in ("whole", "parts")
    )
    assert all(torch.equal(whole[name], parts[name]) for name in whole)


# ---------------------------------------------------------------- the stage


def stage(name: str) -> Stage:
    return next(stage for stage in STAGES if stage.name == name)


def test_a_run_without_a_mixture_has_no_such_stage_and_keeps_its_keys(recipe: Recipe, tmp_path: Path) -> None:
    plain = load_recipe(QUICKSTART)
    assert not stage("mixture").when(plain)
    assert stage("mixture").when(recipe)
    for name in ("train", "report"):
        assert not any("mixture" in path.parts for path in stage(name).inputs(plain, tmp_path))
        assert any("mixture" in path.parts for path in stage(name).inputs(recipe, tmp_path))
    assert stage("train").part(plain)["mixture"] == {}
    for other in ("corpus", "describe", "targets"):
        changed = load_recipe(QUICKSTART, ["mixture={sources: [{type: replay}]}", "trainable.lora={rank: 4}", "model.gate_adapters=false"])  # fmt: skip
        assert stage(other).part(changed) == stage(other).part(plain)


def test_the_stage_runs_once_and_again_when_its_file_changes(tmp_path: Path) -> None:
    (tmp_path / "pool.yaml").write_text("prompts: []\n")
    (tmp_path / "small.yaml").write_text(
        "name: small\ndata: {synthesize: {train_clips: 8, test_clips: 4}}\ndescribe: {labels: {gender: gender}}\n"
        "targets: {prompts: pool.yaml}\neval: {attributes: [gender], prompts: pool.yaml}\n"
        "model: {gate_adapters: false}\ntrainable: {lora: {rank: 2}}\n"
        "mixture: {sources: [{type: replay, ratio: 0.5, rows: talk.jsonl, repeat: true}]}\n"
    )
    turns = [{"role": "user", "content": "Hi."}, {"role": "assistant", "content": "Hello."}]
    write_jsonl(tmp_path / "talk.jsonl", [{"id": "one", "messages": turns}])
    run_dir = tmp_path / "run"
    sound = [user_turn("Who?", {"path": "a.wav"}), turns[1]]
    write_examples(
        run_dir / "targets" / "examples.jsonl", [Example(id=f"e{i}", messages=sound) for i in range(6)]
    )
    (run_dir / "recipe.yaml").write_text("# The whole recipe of this run, as it was\n")

    def run() -> list[str]:
        said: list[str] = []
        run_stages(load_recipe(tmp_path / "small.yaml"), run_dir, "mixture", say=said.append, progress=False, stages=(stage("mixture"),))  # fmt: skip
        return said

    assert "mixed_in 3" in run()[-1]
    assert [row["id"] for _, row in read_jsonl(run_dir / "mixture" / "examples.jsonl")] == [
        "replay/one", "replay/one#2", "replay/one#3",
    ]  # fmt: skip
    manifest = read_json(run_dir / "mixture" / "manifest.json")
    assert manifest["counts"]["share"] == 0.5
    assert manifest["counts"]["sources"][0]["promised_rows"] == 3
    assert "already done" in run()[0]
    write_jsonl(tmp_path / "talk.jsonl", [{"id": "two", "messages": turns}])
    assert any("starts over" in line for line in run())
    assert next(read_jsonl(run_dir / "mixture" / "examples.jsonl"))[1]["id"] == "replay/two"
    # The recipe that a run keeps means the same from anywhere.
    kept = load_recipe(run_dir / "recipe.yaml")
    assert kept.mixture.sources[0].rows == str(tmp_path / "talk.jsonl")  # type: ignore[union-attr]
