"""Who is asked what: clips and prompts in, the teacher's questions out, the same for the same seed.

described clips + prompt pool -> (clip, prompt) pairs -> questions with a context and a worked example
"""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from describers.compose import compose
from speech_llm.files import read_jsonl
from speech_llm.targets.prompts import PoolPrompt

if TYPE_CHECKING:
    from speech_llm.recipe import Recipe

EXAMPLES_PER_PROMPT = 4


@dataclass(frozen=True)
class Question:
    """What a teacher is asked: `context` replaces the audio; `example` is (context, answer) of another clip.

    `sample`: which draw, where answers are sampled. `to`: the LLM itself, or the editor that mends its answers.
    """

    context: str
    text: str
    example: tuple[str, str] | None = None
    sample: int = 0
    to: Literal["llm", "editor"] = "llm"

    def messages(self) -> list[dict[str, Any]]:
        """The chat that the teacher sees."""
        turns: list[dict[str, Any]] = []
        if self.example is not None:
            turns.append({"role": "user", "content": f"{self.example[0]}\n{self.text}"})
            turns.append({"role": "assistant", "content": self.example[1]})
        turns.append({"role": "user", "content": f"{self.context}\n{self.text}"})
        return turns


def context_attributes(attributes: dict[str, Any], prompt: PoolPrompt) -> dict[str, Any]:
    """What the teacher is told for a prompt: all attributes, but the words only where they are asked for.

    A small LLM answers better without the distraction, and clips that then look alike share one answer. A question that a person
    asked may be about anything: for it all is told.
    """
    if prompt.whole:
        return {name: value for name, value in attributes.items() if name != "segments"}
    hidden = {"segments", "duration"} | (set() if "transcript" in prompt.asks else {"transcript"})
    return {name: value for name, value in attributes.items() if name not in hidden or name in prompt.asks}


def needs(prompt: PoolPrompt) -> set[str]:
    """The attributes that a clip must have to be asked a prompt."""
    return set(prompt.asks) | set(prompt.json_keys.values())


class Questioner:
    """Turns (clip, prompt, attempt) into the teacher's question, with its worked example."""

    def __init__(
        self,
        clips: Sequence[dict[str, Any]],
        form: str,
        worked_example: bool,
        seed: int,
        telling: Mapping[str, Any] | None = None,
    ) -> None:
        """`telling`: further arguments of `compose`; what a prompt asks for is told whatever they leave out."""
        self.form, self.worked_example, self.seed = form, worked_example, seed
        self.telling = dict(telling or {})
        self.clips = list(clips)
        self._examples: dict[str, list[dict[str, Any]]] = {}

    def context(
        self, attributes: dict[str, Any], prompt: PoolPrompt, clip_id: str, keep: Iterable[str] = ()
    ) -> str:
        """The description of a clip, as far as a prompt needs it; `keep`: attributes that must be in it as well."""
        return compose(
            context_attributes(attributes, prompt),
            self.form,
            **self.telling,
            keep=needs(prompt) | set(keep),
            seed=f"{self.seed}-{clip_id}-{prompt.id}",
        )

    def question(
        self, attributes: dict[str, Any], prompt: PoolPrompt, clip_id: str, attempt: int = 0
    ) -> Question:
        """The question about one clip; each attempt shows another worked example."""
        example = None
        if prompt.example:
            shown = self.example_clip(prompt, clip_id, attempt)
            if shown is not None:
                example = (
                    self.context(shown["attributes"], prompt, shown["id"], prompt.example_fields()),
                    prompt.example_answer(shown["attributes"]),
                )
        return Question(self.context(attributes, prompt, clip_id), prompt.text, example)

    def example_clip(self, prompt: PoolPrompt, clip_id: str, attempt: int = 0) -> dict[str, Any] | None:
        """The clip of an attempt's worked example (never the one asked about), None when there is to be none."""
        shown = self._examples_of(prompt) if self.worked_example else []
        if not shown:
            return None
        pick = shown[attempt % len(shown)]
        return shown[(attempt + 1) % len(shown)] if pick["id"] == clip_id else pick

    def _examples_of(self, prompt: PoolPrompt) -> list[dict[str, Any]]:
        """A few clips as worked examples, with the asked attributes as different from each other as can be."""
        if prompt.id not in self._examples:
            wanted = needs(prompt) | prompt.example_fields()
            able = [clip for clip in self.clips if wanted <= set(clip["attributes"])]
            random.Random(f"{self.seed}-{prompt.id}").shuffle(able)
            chosen: list[dict[str, Any]] = []
            used: Counter[tuple[str, str]] = Counter()
            choices = [name for name in prompt.asks if name != "transcript"]
            for _ in range(min(EXAMPLES_PER_PROMPT, len(able))):
                best = min(
                    able[:200],
                    key=lambda clip: sum(used[name, str(clip["attributes"][name])] for name in choices),
                )
                able.remove(best)
                chosen.append(best)
                used.update((name, str(best["attributes"][name])) for name in choices)
            self._examples[prompt.id] = chosen
        return self._examples[prompt.id]


def run_questioner(recipe: Recipe, run_dir: Path, worked_example: bool) -> Questioner:
    """What is asked about the test clips of a run: described by its recipe, leaving nothing out; examples are training clips."""
    train = read_described(run_dir / "describe" / "train.jsonl")
    telling = recipe.describe.telling(dropout=False)
    return Questioner(train, recipe.describe.form, worked_example, recipe.seed, telling)


def read_described(path: Path) -> list[dict[str, Any]]:
    """The lines of a described split, audio paths made absolute."""
    rows = []
    for _, row in read_jsonl(path):
        row["audio"] = str((path.parent / row["audio"]).resolve())
        rows.append(row)
    return rows


def choose_prompts(
    clips: Sequence[dict[str, Any]],
    pool: Sequence[PoolPrompt],
    per_clip: int,
    limit: int | None,
    seed: int,
    can_answer: Callable[[dict[str, Any], PoolPrompt], bool] | None = None,
) -> list[tuple[dict[str, Any], PoolPrompt]]:
    """Draw each clip's prompts among those it can answer; `limit` bounds how many clips are asked anything.

    `can_answer(clip, prompt)`: default, the clip has the attributes that the prompt asks for. Prompts are dealt in turn
    rather than drawn with replacement, so that each is asked about equally often.
    """
    rng = random.Random(f"{seed}-prompts")
    by_id = {clip["id"]: clip for clip in clips}
    used: Counter[str] = Counter()
    asked = []
    for clip_id in asked_first(list(by_id), seed)[:limit]:
        clip = by_id[clip_id]
        able = [
            prompt
            for prompt in pool
            if needs(prompt) <= set(clip["attributes"]) and (can_answer is None or can_answer(clip, prompt))
        ]
        rng.shuffle(able)
        able.sort(key=lambda prompt: used[prompt.id])
        for prompt in able[:per_clip]:
            used[prompt.id] += 1
            asked.append((clip, prompt))
    return asked


def asked_first(ids: Sequence[str], seed: int) -> list[str]:
    """Clips in the order in which they are asked, by chance but whatever other clips there are."""
    return sorted(ids, key=lambda clip_id: random.Random(f"{seed}-asked-{clip_id}").random())
