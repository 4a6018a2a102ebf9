"""What a run folder has for the page: its model, its instructions, clips to try, and how its descriptions are told.

In: what the user named. Out: a model's reference and an `Offer`, which is empty where the model is of no run.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from describers.vocabulary import display
from speech_llm.errors import UserError
from speech_llm.targets.prompts import PoolPrompt
from speech_llm.targets.questions import Questioner

FIRST = "What can you hear?"
EXAMPLES = 8
IDEAS = (
    "What does the speaker say?",
    "Is the speaker male or female?",
    "Describe the recording in one sentence.",
)


@dataclass
class Offer:
    """What the page offers beside the model.

    `trained`, `new`: instructions whose very words were and were not in training. `examples`: described test clips, as `describe` writes
    them, `audio` absolute. `questioner`: tells a clip as the run's evaluation does. `run`: the folder it is from.
    """

    run: Path | None = None
    trained: list[PoolPrompt] = field(default_factory=list)
    new: list[PoolPrompt] = field(default_factory=list)
    examples: list[dict[str, Any]] = field(default_factory=list)
    questioner: Questioner = field(default_factory=lambda: Questioner([], "sentence", False, 0))
    asr: str | None = None

    def ideas(self, count: int = 6) -> list[str]:
        """A few instructions that ask for different things; without a run some that suit any sound."""
        if not self.trained and not self.new:
            return list(IDEAS)
        by_what: dict[tuple[str, ...], str] = {}
        for prompt in [*self.trained, *self.new]:
            by_what.setdefault(prompt.asks, prompt.text)
        return list(by_what.values())[:count]

    def told(self, attributes: Mapping[str, Any]) -> dict[str, Any]:
        """Of a sound's attributes those that the run's clips have: what its instructions are about, without distraction."""
        known = {name for row in self.examples for name in row["attributes"]}
        return {name: value for name, value in attributes.items() if name in known} or dict(attributes)

    def prompt(self, text: str) -> PoolPrompt | None:
        """The instruction of these words, None when it is the user's own."""
        return next((prompt for prompt in [*self.trained, *self.new] if prompt.text == text), None)


def find_run(model: str) -> tuple[str, Path | None]:
    """The model's reference, and the run folder that it lies in: of a run folder, or of its `model`.

    Raises `UserError` for a run that has no model yet.
    """
    path = Path(model).expanduser()
    if (path / "recipe.yaml").is_file():
        if not (path / "model" / "config.json").is_file():
            raise UserError(
                f"{path}: this run has no model yet; finish it with `speech-llm run`, or make a model of a checkpoint "
                "with `speech-llm export`"
            )
        return str(path / "model"), path
    if path.is_dir() and path.resolve().name == "model" and (path.resolve().parent / "recipe.yaml").is_file():
        return model, path.resolve().parent
    return model, None


def read_offer(run: Path | None) -> Offer:
    """What a run has; what is missing or was moved is left out. Raises `UserError` where `run` is no run folder."""
    if run is None:
        return Offer()
    from speech_llm.recipe import load_recipe

    if not (run / "recipe.yaml").is_file():
        raise UserError(f"{run}: not a run folder (it has no recipe.yaml); give what `speech-llm run` wrote")
    recipe = load_recipe(run / "recipe.yaml")
    questioner = Questioner(
        [], recipe.describe.form, False, recipe.seed, recipe.describe.telling(dropout=False)
    )
    offer = Offer(run, questioner=questioner, asr=recipe.describe.asr)
    asked = [] if recipe.targets.tasks is not None else _pool(recipe.resolve_path(recipe.targets.prompts))
    offer.trained = [prompt for prompt in asked if not prompt.json_keys]
    words = {prompt.text for prompt in asked}
    for prompt in _pool(recipe.resolve_path(recipe.eval.prompts)):
        if prompt.text not in words:
            offer.new.append(prompt)
    folders = [run, *sorted((run / "phases").glob("*/"), reverse=True)]
    described = next((folder for folder in folders if (folder / "describe").is_dir()), None)
    if described is not None:
        offer.examples = _examples(described)
    return offer


def clip_name(attributes: dict[str, Any]) -> str:
    """What a clip is called by its labels: "female, Scottish, slow"."""
    told = []
    for name, value in attributes.items():
        if isinstance(value, str) and name != "transcript" and len(value) < 30:
            word = display(name, value)
            # "normal" alone says nothing of what.
            told.append(f"{word} {name}" if word in ("normal", "average", "medium") else word)
    return ", ".join(told[:4])


def _pool(path: Path) -> list[PoolPrompt]:
    from speech_llm.targets.prompts import load_pool

    try:
        return load_pool(path)
    except UserError:  # the run was made elsewhere
        return []


def _examples(folder: Path, count: int = EXAMPLES) -> list[dict[str, Any]]:
    """A few clips of each test split in turn, each as unlike those before it as can be."""
    from speech_llm.evaluation import test_splits
    from speech_llm.targets.questions import read_described

    splits = []
    for split in test_splits(folder):
        rows = [row for row in read_described(folder / "describe" / f"{split}.jsonl") if _is_there(row)]
        if rows:
            splits.append(_unlike(rows, count))
    taken: list[dict[str, Any]] = []
    for place in range(count):
        taken += [rows[place] for rows in splits if place < len(rows)]
    return taken[:count]


def _is_there(row: dict[str, Any]) -> bool:
    return Path(row["audio"]).is_file() and bool(row.get("description"))


def _unlike(rows: Sequence[dict[str, Any]], count: int) -> list[dict[str, Any]]:
    left = list(rows[:500])
    used: dict[tuple[str, str], int] = {}
    chosen: list[dict[str, Any]] = []
    while left and len(chosen) < count:
        best = min(left, key=lambda row: sum(used.get(label, 0) for label in _labels(row)))
        left.remove(best)
        chosen.append(best)
        for label in _labels(best):
            used[label] = used.get(label, 0) + 1
    return chosen


def _labels(row: dict[str, Any]) -> list[tuple[str, str]]:
    return [
        (name, value)
        for name, value in row["attributes"].items()
        if isinstance(value, str) and name != "transcript"
    ]
