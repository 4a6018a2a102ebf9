"""What the tests of the mixture share: a recipe with sources, audio Examples to mix them with, and the mixing itself."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from learning import QUICKSTART

from speech_llm.examples import Example, read_examples, user_turn, write_examples
from speech_llm.mixture.run import write_mixture
from speech_llm.recipe import Recipe, load_recipe


def recipe_with(*sources: dict[str, Any], count: str = "rows", seed: int = 0) -> Recipe:
    """The quickstart with adapters that act on text too, and a mixture."""
    return load_recipe(
        QUICKSTART,
        [
            f"mixture={json.dumps({'sources': list(sources), 'count': count})}",
            "trainable.lora={rank: 4}",
            "model.gate_adapters=false",
            "optimizer.precision=float32",
            f"seed={seed}",
        ],
    )


def audio_examples(folder: Path) -> Path:
    """The file of a hundred audio Examples, written below `folder`."""
    turns = [user_turn("Who speaks?", {"path": "a.wav"}), {"role": "assistant", "content": "A woman."}]
    path = folder / "targets" / "examples.jsonl"
    write_examples(path, [Example(id=f"e{i}", messages=turns) for i in range(100)])
    return path


def mix(recipe: Recipe, audio: Path, out: Path) -> tuple[list[Example], dict[str, Any]]:
    counts = write_mixture(recipe, audio, out, progress=False)
    return list(read_examples(out / "examples.jsonl")), counts
