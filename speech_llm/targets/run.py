"""The targets stage: the base LLM writes what the speech model shall answer.

In: described clips (one JSON line each) and a prompt pool. Out: `examples.jsonl` (verified answers) and `rejects.jsonl`.
Each clip is asked a few prompts of the pool, drawn by the clip's id. An answer that drops or contradicts what it was
asked for is asked again with another worked example, and rejected, with its reason, when all attempts fail. Every
answer is journalled as it comes, so a killed stage goes on where it was.
"""

from __future__ import annotations

import random
import time
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tqdm import tqdm

from describers.compose import compose
from speech_llm.errors import UserError
from speech_llm.examples import Example, user_turn, write_examples
from speech_llm.files import JsonlAppender, read_jsonl, write_jsonl
from speech_llm.targets.prompts import PoolPrompt, load_pool
from speech_llm.targets.teacher import Question, Teacher
from speech_llm.targets.verify import closed_options, verdict

if TYPE_CHECKING:
    from speech_llm.recipe import Recipe

EXAMPLES_PER_PROMPT = 4


def context_attributes(attributes: dict[str, Any], prompt: PoolPrompt) -> dict[str, Any]:
    """What the teacher is told for a prompt: all attributes, but the words only where they are asked for.

    A small LLM answers better without the distraction, and clips that then look alike share one answer.
    """
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

    def question(
        self, attributes: dict[str, Any], prompt: PoolPrompt, clip_id: str, attempt: int = 0
    ) -> Question:
        """The question about one clip; each attempt shows another worked example."""
        context = self._context(attributes, prompt, clip_id, needs(prompt))
        example = None
        if self.worked_example and prompt.example:
            shown = self._examples_of(prompt)
            if shown:
                pick = shown[attempt % len(shown)]
                if pick["id"] == clip_id:
                    pick = shown[(attempt + 1) % len(shown)]
                example = (
                    self._context(
                        pick["attributes"], prompt, pick["id"], needs(prompt) | prompt.example_fields()
                    ),
                    prompt.example_answer(pick["attributes"]),
                )
        return Question(context, prompt.text, example)

    def _context(self, attributes: dict[str, Any], prompt: PoolPrompt, clip_id: str, keep: set[str]) -> str:
        return compose(
            context_attributes(attributes, prompt),
            self.form,
            **self.telling,
            keep=keep,
            seed=f"{self.seed}-{clip_id}-{prompt.id}",
        )

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


def read_described(path: Path) -> list[dict[str, Any]]:
    """The lines of a described split, audio paths made absolute."""
    rows = []
    for _, row in read_jsonl(path):
        row["audio"] = str((path.parent / row["audio"]).resolve())
        rows.append(row)
    return rows


def write_targets(recipe: Recipe, described: Path, out_dir: Path, progress: bool = True) -> dict[str, Any]:
    """Write `examples.jsonl` and `rejects.jsonl` under `out_dir`; returns the counts of the stage."""
    from speech_llm.assets import load_answering_llm

    settings = recipe.targets
    clips = read_described(described)
    pool = load_pool(recipe.resolve_path(settings.prompts))
    asked = choose_prompts(clips, pool, settings.prompts_per_clip, settings.clips, recipe.seed)
    if not asked:
        raise UserError(
            f"{settings.prompts}: no clip of {described} has the attributes that its prompts ask for; "
            f"the clips have: {', '.join(sorted({name for clip in clips for name in clip['attributes']}))}"
        )
    llm, tokenizer = load_answering_llm(recipe.model.llm, recipe.optimizer.precision)
    teacher = Teacher(llm, tokenizer, settings.batch_tokens, settings.max_new_tokens)
    return self_targets(
        teacher,
        clips,
        asked,
        Questioner(
            clips, recipe.describe.form, settings.worked_example, recipe.seed, recipe.describe.telling()
        ),
        out_dir,
        attempts=settings.attempts,
        source={"strategy": "self", "teacher": recipe.model.llm, "seed": recipe.seed, "dataset": recipe.name},
        progress=progress,
    )


def choose_prompts(
    clips: Sequence[dict[str, Any]], pool: Sequence[PoolPrompt], per_clip: int, limit: int | None, seed: int
) -> list[tuple[dict[str, Any], PoolPrompt]]:
    """Draw each clip's prompts among those it can answer; `limit` bounds how many clips are asked anything.

    Prompts are dealt in turn rather than drawn with replacement, so that each is asked about equally often.
    """
    rng = random.Random(f"{seed}-prompts")
    by_id = {clip["id"]: clip for clip in clips}
    used: Counter[str] = Counter()
    asked = []
    for clip_id in asked_first(list(by_id), seed)[:limit]:
        clip = by_id[clip_id]
        able = [prompt for prompt in pool if needs(prompt) <= set(clip["attributes"])]
        rng.shuffle(able)
        able.sort(key=lambda prompt: used[prompt.id])
        for prompt in able[:per_clip]:
            used[prompt.id] += 1
            asked.append((clip, prompt))
    return asked


def asked_first(ids: Sequence[str], seed: int) -> list[str]:
    """Clips in the order in which they are asked, by chance but whatever other clips there are."""
    return sorted(ids, key=lambda clip_id: random.Random(f"{seed}-asked-{clip_id}").random())


def self_targets(
    teacher: Teacher,
    clips: Sequence[dict[str, Any]],
    asked: Sequence[tuple[dict[str, Any], PoolPrompt]],
    questioner: Questioner,
    out_dir: Path,
    *,
    attempts: int = 2,
    source: dict[str, Any] | None = None,
    progress: bool = True,
) -> dict[str, Any]:
    """Strategy `self` (DeSTA2, 2409.20007): the base LLM's own answers, verified; see `write_targets`."""
    options = closed_options([clip["attributes"] for clip in clips])
    started = time.perf_counter()
    waiting = list(asked)
    kept: dict[tuple[str, str], Example] = {}
    failed: dict[tuple[str, str], dict[str, Any]] = {}
    by_prompt: dict[str, Counter[str]] = {}
    out_dir.mkdir(parents=True, exist_ok=True)
    with JsonlAppender(out_dir / "journal.jsonl") as journal:
        for row in journal.rows:
            shown = tuple(row["example"]) if row["example"] else None
            teacher.answered[Question(row["context"], row["question"], shown)] = row["answer"]
        for attempt in range(attempts):
            questions = [
                questioner.question(clip["attributes"], prompt, clip["id"], attempt)
                for clip, prompt in waiting
            ]
            todo = set(questions) - set(teacher.answered)
            with tqdm(
                total=len(todo), desc=f"targets, try {attempt + 1}", unit="answer", disable=not progress
            ) as bar:

                def done(question: Question, answer: str, bar: tqdm = bar) -> None:
                    journal.append(
                        {
                            "context": question.context,
                            "question": question.text,
                            "example": question.example,
                            "answer": answer,
                        }
                    )
                    bar.update()

                answers = teacher.answer(questions, done)
            again = []
            for (clip, prompt), question, answer in zip(waiting, questions, answers, strict=True):
                key = (clip["id"], prompt.id)
                outcome = verdict(answer, prompt, clip["attributes"], options)
                if outcome == "ok":
                    kept[key] = _example(clip, prompt, question, answer, attempt, source or {})
                    failed.pop(key, None)
                else:
                    again.append((clip, prompt))
                    failed[key] = {
                        "clip": clip["id"],
                        "prompt": prompt.id,
                        "attempts": attempt + 1,
                        "reason": outcome,
                        "answer": answer,
                    }
            waiting = again
    for (_, prompt_id), example in kept.items():
        by_prompt.setdefault(prompt_id, Counter())[f"kept at try {example.source['attempt'] + 1}"] += 1
    for (_, prompt_id), row in failed.items():
        by_prompt.setdefault(prompt_id, Counter())[row["reason"]] += 1
    keys = [(clip["id"], prompt.id) for clip, prompt in asked]
    write_examples(out_dir / "examples.jsonl", [kept[key] for key in keys if key in kept])
    write_jsonl(out_dir / "rejects.jsonl", [failed[key] for key in keys if key in failed])
    seconds = time.perf_counter() - started
    return {
        "asked": len(asked),
        "kept": len(kept),
        "rejected": len(failed),
        "acceptance": round(len(kept) / max(1, len(asked)), 4),
        "generated_tokens": teacher.tokens,
        "tokens_per_s": round(teacher.tokens / seconds, 1),
        "by_prompt": {name: dict(counts) for name, counts in sorted(by_prompt.items())},
    }


def _example(
    clip: dict[str, Any],
    prompt: PoolPrompt,
    question: Question,
    answer: str,
    attempt: int,
    source: dict[str, Any],
) -> Example:
    audio: dict[str, Any] = {"path": clip["audio"]}
    if clip["attributes"].get("transcript"):
        audio["transcript"] = clip["attributes"]["transcript"]
    return Example(
        id=f"{clip['id']}/{prompt.id}",
        messages=[user_turn(prompt.text, audio), {"role": "assistant", "content": answer}],
        context=question.context,
        attributes=clip["attributes"],
        source={**source, "prompt": prompt.id, "attempt": attempt, "verdict": "ok"},
    )
