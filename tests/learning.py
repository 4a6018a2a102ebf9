"""A tiny corpus and tiny models to learn it, for tests of how is learned."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import soundfile
import yaml
from tiny_models import tiny_encoder, tiny_feature_extractor, tiny_llm, tiny_model, tiny_tokenizer

import speech_llm.model
from speech_llm.examples import Example, user_turn
from speech_llm.files import write_jsonl
from speech_llm.recipe import Recipe, load_recipe

QUICKSTART = Path(__file__).parent.parent / "recipes" / "quickstart.yaml"
OPTIMIZER = {
    "epochs": 3,
    "batch_tokens": 256,
    "lr": 0.01,
    "align_epochs": 0,
    "soft_word_epochs": 0,
    "checkpoint_every": 1,
    "precision": "float32",
    "max_steps": None,
}


def tiny_recipe(
    monkeypatch: pytest.MonkeyPatch, folder: Path, *overrides: str, path: Path = QUICKSTART
) -> Recipe:
    """A recipe on tiny random models that `trainable` and `model` shape; `overrides` as `--set` takes them."""
    optimizer = [f"optimizer.{key}={'null' if value is None else value}" for key, value in OPTIMIZER.items()]
    recipe = load_recipe(path, [*optimizer, *overrides])
    on_tiny_models(monkeypatch, folder)
    return recipe


def on_tiny_models(monkeypatch: pytest.MonkeyPatch, folder: Path) -> None:
    """Training builds tiny random models from here on, shaped by the recipe's `trainable` and `model`."""
    monkeypatch.setenv("SPEECH_LLM_CACHE", str(folder / "cache"))

    def build(model: Any, trainable: Any, **_: Any) -> Any:
        lora, encoder_lora = (
            None if section is None else section.model_dump()
            for section in (trainable.lora, trainable.encoder_lora)
        )
        made = tiny_model(lora=lora, encoder_lora=encoder_lora, gate_adapters=model.gate_adapters)
        made[0].llm.requires_grad_(trainable.llm) if trainable.lora is None else None
        made[0].connector.requires_grad_(trainable.connector)
        return made

    monkeypatch.setattr(speech_llm.model, "build_model", build)


def tones(folder: Path, clips: int) -> list[tuple[Path, str]]:
    """Sounds c0.wav, c1.wav, ... that are low ("male") or high ("female") in turn, each a little longer than the one before."""
    folder.mkdir(parents=True, exist_ok=True)
    rng = np.random.default_rng(0)
    made = []
    for i in range(clips):
        time_s = np.arange(8000 + 400 * i) / 16_000
        tone = np.sin(2 * np.pi * (120, 400)[i % 2] * time_s) + 0.05 * rng.normal(size=len(time_s))
        path = folder / f"c{i}.wav"
        soundfile.write(path, 0.3 * tone, 16_000)
        made.append((path, ("male", "female")[i % 2]))
    return made


def asked_tones(folder: Path, clips: int) -> tuple[list[Example], list[dict[str, Any]]]:
    """Examples with two questions about each of `tones`, and the clips as the describe stage would tell them."""
    examples, described = [], []
    for path, gender in tones(folder, clips):
        described.append(
            {"id": path.stem, "audio": str(path), "attributes": {"gender": gender}, "description": gender}
        )
        for question in ("who?", "man or woman?"):
            turns = [user_turn(question, {"path": str(path)}), {"role": "assistant", "content": gender}]
            examples.append(Example(id=f"{path.stem}/{question}", messages=turns))
    return examples, described


def tiny_examples(folder: Path, clips: int = 6) -> list[Example]:
    """Sounds that are low or high, with a description, and two questions about each."""
    examples = []
    for i, (path, gender) in enumerate(tones(folder, clips)):
        examples += [
            Example(
                id=f"c{i}/{question}",
                messages=[
                    user_turn(question, {"path": str(path), "transcript": f"word {i}"}),
                    {"role": "assistant", "content": f"A {gender}."},
                ],
                context=f"The voice is {gender}.",
                attributes={"gender": gender, "transcript": f"word {i}"},
                source={"example": ["The voice is male.", "A male."]},
            )
            for question in ("who?", "man or woman?")
        ]
    return examples


def judge_letters(_data: Any) -> Any:
    """In the place of `loop.verify_answers`: an answer is worth the share of its characters that are letters."""

    def judge(_name: str, answer: str, _ended: bool) -> tuple[float, float]:
        return sum(c.isascii() and c.isalpha() for c in answer) / max(1, len(answer)), 0.0

    return judge


def saved_recipe(folder: Path) -> Path:
    """The file of a recipe of two phases on tiny models saved in `folder`, with clips of its own and people's answers."""
    folder.mkdir(parents=True, exist_ok=True)
    tiny_llm().save_pretrained(folder / "llm")
    tiny_tokenizer().save_pretrained(folder / "llm")
    tiny_encoder("wav2vec2").save_pretrained(folder / "encoder")  # type: ignore[operator]
    tiny_feature_extractor("wav2vec2").save_pretrained(folder / "encoder")
    clips = [
        {"id": path.stem, "audio": str(path), "gender": gender, "split": "train" if number < 8 else "test"}
        for number, (path, gender) in enumerate(tones(folder / "clips", 12))
    ]
    write_jsonl(folder / "clips.jsonl", clips)
    prompts = [
        {"id": "who", "text": "Who?", "asks": ["gender"], "example": "It is a {gender} speaker."},
        {"id": "man", "text": "A man?", "asks": ["gender"], "example": "{gender}"},
    ]
    (folder / "pool.yaml").write_text(yaml.safe_dump({"prompts": prompts}))
    recipe = {
        "name": "saved",
        "model": {
            "llm": str(folder / "llm"),
            "encoder": str(folder / "encoder"),
            "connector": {"type": "qformer", "queries": 3, "layers": 1, "heads": 2},
            "use_transcript": False,
            "gate_adapters": False,
        },
        "data": {"manifests": ["clips.jsonl"], "train": {"split": "train"}, "test": {"split": "test"}},
        "describe": {"use": ["labels"], "labels": {"gender": "gender"}},
        "targets": {"strategy": "given", "prompts": "pool.yaml", "prompts_per_clip": 2},
        "trainable": {"lora": {"rank": 2, "dropout": 0.2}},
        "optimizer": {**OPTIMIZER, "epochs": 2, "batch_tokens": 256, "align_epochs": 2},
        "eval": {
            "attributes": ["gender"], "transcript": False, "prompts": "pool.yaml", "models": ["speech_llm"],
            "probes": ["json"], "json_probe": {"limit": 2, "attributes": ["gender"], "max_new_tokens": 4}, "max_new_tokens": 4,
        },
        "phases": [{"name": "first"}, {"name": "second", "optimizer": {"lr": 0.002}}],
    }  # fmt: skip
    path = folder / "saved.yaml"
    path.write_text(yaml.safe_dump(recipe))
    return path
