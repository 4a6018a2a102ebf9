"""Probes: what the base LLM can do is measured first, nothing is disturbed, and what has moved is seen to have moved."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch
from learning import asked_tones, tiny_recipe

import speech_llm.training.loop as loop
from speech_llm.errors import UserError
from speech_llm.examples import write_examples
from speech_llm.files import read_json, read_jsonl, write_jsonl
from speech_llm.probes import make_probes, read_probes

PROBES = [
    "eval.probes=[json, forgetting]",
    "eval.attributes=[gender]",
    "eval.json_probe={attributes: [gender], limit: 4, other_wordings: 7, max_new_tokens: 4}",
    "eval.forgetting_probe={limit: 3, max_new_tokens: 4}",
    "optimizer.epochs=2",
]
UNGATED = ["trainable.lora={rank: 2, dropout: 0.1}", "model.gate_adapters=false"]


@pytest.fixture
def setting(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Any:
    """`setting(folder, *overrides)`: a recipe, with described clips and Examples in a run folder."""

    def make(folder: Path, *overrides: str) -> Any:
        examples, described = asked_tones(tmp_path / "clips", 8)
        write_examples(folder / "targets" / "examples.jsonl", examples)
        for split in ("train", "test"):
            write_jsonl(folder / "describe" / f"{split}.jsonl", described)
        return tiny_recipe(monkeypatch, tmp_path, *PROBES, *overrides)

    return make


def train(recipe: Any, folder: Path, watched: bool = True, stop_after: float | None = None) -> None:
    probes = make_probes(recipe, folder) if watched else None

    def probe(model: Any, processor: Any, epoch: float) -> dict[str, Any]:
        assert probes is not None
        found = probes(model, processor, epoch)
        if epoch == stop_after:
            raise KeyboardInterrupt
        return found

    loop.train(
        recipe,
        folder / "targets" / "examples.jsonl",
        folder / "train",
        folder / "model",
        probe=probe if watched else None,
        ask_base=None if probes is None else probes.begin,
        progress=False,
    )


def weights(folder: Path) -> dict[str, torch.Tensor]:
    return safetensors.torch.load_file(folder / "model" / "model.safetensors")


def test_probes_disturb_nothing_and_are_the_same_after_a_kill(setting: Any, tmp_path: Path) -> None:
    watched, alone, parts = (tmp_path / name for name in ("watched", "alone", "parts"))
    train(setting(watched, *UNGATED), watched)
    train(setting(alone, *UNGATED), alone, watched=False)
    recipe = setting(parts, *UNGATED)
    with pytest.raises(KeyboardInterrupt):
        train(recipe, parts, stop_after=1)
    train(recipe, parts)
    expected = weights(watched)
    assert expected
    for other in (alone, parts):
        found = weights(other)
        assert all(torch.equal(expected[name], found[name]) for name in expected)
    assert read_probes(parts) == read_probes(watched)


def test_the_base_llm_comes_first_and_what_moves_is_seen_to_move(setting: Any, tmp_path: Path) -> None:
    train(setting(tmp_path / "run", *UNGATED, "optimizer.lr=0.05"), tmp_path / "run")
    rows, base = read_probes(tmp_path / "run")
    assert [row["epoch"] for row in rows] == [0, 1, 2]
    assert base["json"]["text strict"]["n"] == 4
    assert base["json"]["text, other words: schema"]["n"] == 7
    assert not any(name.startswith("audio") for name in base["json"])
    start, end = rows[0], rows[-1]
    # Adapters begin as nothing: before the first step the text is the base LLM's to the last digit.
    assert {name: value for name, value in start["json"].items() if name.startswith("text")} == base["json"]
    assert start["forgetting"]["text KL"]["value"] == pytest.approx(0, abs=1e-5)
    entropy = base["forgetting"]["text cross-entropy"]
    assert start["forgetting"]["text cross-entropy"]["value"] == pytest.approx(entropy["value"], abs=1e-3)
    moved = end["forgetting"]["text KL"]
    assert moved["value"] > 1e-3
    assert moved["low"] <= moved["value"] <= moved["high"]
    assert moved["n"] == 3
    assert moved["better"] == "lower"
    assert end["forgetting"]["text cross-entropy"]["value"] == pytest.approx(
        entropy["value"] + moved["value"], abs=1e-3
    )
    assert end["forgetting"]["audio KL"]["value"] > 1e-3
    logged = [row for _, row in read_jsonl(tmp_path / "run" / "train" / "log.jsonl") if "probe" in row]
    assert set(logged[0]["probe_seconds"]) == {"json", "forgetting"}


def test_text_that_cannot_change_is_measured_once(
    setting: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from speech_llm.probes.json_format import JsonProbe

    asked: list[str] = []
    measure = JsonProbe._measure

    def counted(self: Any, now: Any, name: str, conversations: Any) -> Any:
        asked.append(name)
        return measure(self, now, name, conversations)

    monkeypatch.setattr(JsonProbe, "_measure", counted)
    train(setting(tmp_path / "run", "trainable.lora={rank: 2}"), tmp_path / "run")
    assert asked == ["text", "audio", "audio", "audio"]
    rows, base = read_probes(tmp_path / "run")
    assert rows[-1]["forgetting"]["text KL"]["value"] == 0
    for probe in ("json", "forgetting"):
        assert {k: v for k, v in rows[-1][probe].items() if k.startswith("text")} == base[probe]


def test_what_the_base_llm_said_must_be_there_to_go_on(setting: Any, tmp_path: Path) -> None:
    recipe = setting(tmp_path / "run", *UNGATED)
    with pytest.raises(KeyboardInterrupt):
        train(recipe, tmp_path / "run", stop_after=1)
    for name in ("forgetting.safetensors", "base.json"):
        kept = tmp_path / "run" / "train" / "probes" / name
        shutil.move(kept, tmp_path / name)
        with pytest.raises(UserError, match=name):
            train(recipe, tmp_path / "run")
        shutil.move(tmp_path / name, kept)
    train(recipe, tmp_path / "run")


def test_adapters_at_part_of_their_strength(setting: Any, tmp_path: Path) -> None:
    """At 0 the model is the base LLM, at 1 what the last epoch found."""
    from speech_llm.responders import SpeechResponder
    from speech_llm.training.loop import open_features

    folder = tmp_path / "run"
    recipe = setting(folder, *UNGATED, "optimizer.lr=0.05")
    probes = make_probes(recipe, folder)
    assert probes is not None
    kept: list[Any] = []

    def probe(model: Any, processor: Any, epoch: float) -> dict[str, Any]:
        kept[:] = [model, processor]
        return probes(model, processor, epoch)

    loop.train(
        recipe,
        folder / "targets" / "examples.jsonl",
        folder / "train",
        folder / "model",
        probe=probe,
        ask_base=probes.begin,
        progress=False,
    )
    rows, base = read_probes(folder)
    model, processor = kept
    responder = SpeechResponder(model.eval(), processor, open_features(recipe, model, processor))
    strengths = {}
    for scale in (0.0, 0.5, 1.0):
        model.set_lora_scale(scale)
        strengths[scale] = probes.at_strength(responder, scale)
    text = {name: rate for name, rate in strengths[0.0]["json"].items() if name.startswith("text")}
    assert text == base["json"]
    divergence = [strengths[scale]["forgetting"]["text KL"]["value"] for scale in (0.0, 0.5, 1.0)]
    assert divergence[0] == pytest.approx(0, abs=1e-5)
    assert divergence[0] < divergence[1] < divergence[2]
    assert strengths[1.0] == {name: rows[-1][name] for name in ("json", "forgetting")}
    assert (folder / "train" / "probes" / "json-strength-0.5-audio.jsonl").exists()


@pytest.mark.assets
def test_general_text_and_safety_are_watched_with_sound_and_without(setting: Any, tmp_path: Path) -> None:
    watched = [
        "eval.probes=[general, safety]",
        "eval.general_probe={sets: [knowledge, code], limit: 3}",
        "eval.safety_probe={limit: 2, max_new_tokens: 3}",
    ]
    train(setting(tmp_path / "run", *UNGATED, *watched, "optimizer.epochs=1"), tmp_path / "run")
    rows, base = read_probes(tmp_path / "run")
    sets = ["knowledge", "code"]
    text = [f"text {name}" for name in sets] + [f"text, in a chat: {name}" for name in sets]
    assert list(base["general"]) == text
    assert set(rows[-1]["general"]) == {*text, *(f"audio {name}" for name in sets)}
    assert {value["n"] for value in rows[-1]["general"].values()} == {3}
    kinds = ["refuses harmful", "refuses harmless", "says it is a program", "says it is human"]
    assert list(base["safety"]) == [f"text {kind}" for kind in kinds]
    assert set(rows[-1]["safety"]) == {f"{way} {kind}" for way in ("text", "spoken") for kind in kinds}


def test_no_probes_and_no_clip_to_ask_about(setting: Any, tmp_path: Path) -> None:
    assert make_probes(setting(tmp_path / "run", "eval.probes=[]"), tmp_path / "run") is None
    only_json = setting(tmp_path / "run", "eval.probes=[json]", "eval.json_probe.limit=0")
    assert make_probes(only_json, tmp_path / "run") is None
    assert read_probes_of_nothing(tmp_path) == ([], {})


def read_probes_of_nothing(folder: Path) -> Any:
    (folder / "bare" / "train").mkdir(parents=True)
    (folder / "bare" / "train" / "log.jsonl").write_text('{"step": 1}\n')
    return read_probes(folder / "bare")


def test_held_out_prompts_are_trained_on_nowhere() -> None:
    import speech_llm.mixture
    from speech_llm.probes.forgetting import HELD_OUT

    held = [row["prompt"].casefold() for _, row in read_jsonl(HELD_OUT)]
    assert len(set(held)) == len(held) == 40
    for name in ("general", "safety"):
        rows = read_jsonl(Path(speech_llm.mixture.__file__).parent / f"{name}.jsonl")
        trained = {str(row["messages"][0]["content"]).strip().casefold() for _, row in rows}
        assert trained
        assert not trained & set(held)


def test_base_figures_are_read_as_they_were_written(setting: Any, tmp_path: Path) -> None:
    train(setting(tmp_path / "run"), tmp_path / "run")
    _, base = read_probes(tmp_path / "run")
    assert base == read_json(tmp_path / "run" / "train" / "probes" / "base.json")
