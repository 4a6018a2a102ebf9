"""The targets stage: somebody writes what the speech model shall answer.

In: described clips (one JSON line each) and a prompt pool. Out: `examples.jsonl` (answers to learn) and `rejects.jsonl`.

    clips, prompts -> rows -> a strategy's generator for each row <-> journal <-> teachers -> examples, rejects, counts

Each clip is asked a few prompts of the pool, drawn by the clip's id. Who answers is the strategy: `own` (`self`, `teacher`),
`given`, `continuation`, `rewrite`, `self_output`, `minimum_change`. Every answer is journalled as it comes, so a killed
stage goes on where it was.
"""

from __future__ import annotations

import functools
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tqdm import tqdm

from speech_llm.chat_server import NoAnswer
from speech_llm.errors import UserError
from speech_llm.examples import Example, user_turn, write_examples
from speech_llm.files import read_jsonl, write_jsonl
from speech_llm.recipe_targets import OF_LABELS
from speech_llm.synthesis.tasks import ask_clips
from speech_llm.targets.continuation import continuation
from speech_llm.targets.given import few_choices, given, human_answer, manifest_answers
from speech_llm.targets.journal import Journal
from speech_llm.targets.minimum_change import minimum_change
from speech_llm.targets.own import own_answer
from speech_llm.targets.prompts import PoolPrompt, load_pool
from speech_llm.targets.questions import (
    Question,
    Questioner,
    asked_first,
    choose_prompts,
    read_described,
)
from speech_llm.targets.rewrite import rewrite
from speech_llm.targets.rows import Desk, Reject, Row, Target, Writing
from speech_llm.targets.self_output import self_output
from speech_llm.targets.teacher import Teacher, TransformersTeacher, open_teacher
from speech_llm.targets.verify import closed_options

if TYPE_CHECKING:
    from speech_llm.recipe import Recipe

STRATEGIES: dict[str, Callable[[Row, Desk], Writing]] = {
    "self": own_answer,
    "teacher": own_answer,
    "given": given,
    "continuation": continuation,
    "self_output": self_output,
    "minimum_change": minimum_change,
}


def write_targets(recipe: Recipe, described: Path, out_dir: Path, progress: bool = True) -> dict[str, Any]:
    """Write `examples.jsonl` and `rejects.jsonl` under `out_dir`; returns the counts of the stage.

    A manifest whose lines have questions and answers of their own lies at `corpus/train.jsonl` beside `described`'s folder.
    """
    from speech_llm.assets import load_answering_llm

    settings = recipe.targets
    clips = read_described(described)
    pool = load_pool(recipe.resolve_path(settings.prompts))
    manifest = described.parent.parent / "corpus" / described.name
    rows = choose_rows(recipe, clips, pool, manifest if manifest.exists() else None)
    if not rows:
        labels = settings.strategy in OF_LABELS
        raise UserError(
            f"{settings.prompts}: no clip of {described} has {'labels of people for' if labels else 'the attributes'} "
            f"{'what' if labels else 'that'} its prompts ask for"
            + (
                f" (targets.strategy is {settings.strategy!r}, and what a describer found does not count)"
                if labels
                else ""
            )
            + f"; the clips have: {', '.join(sorted({name for clip in clips for name in clip['attributes']}))}"
        )
    load = functools.lru_cache(maxsize=2)(
        lambda reference: load_answering_llm(reference, recipe.optimizer.precision)
    )
    teachers = _teachers(recipe, load)
    desk = Desk(
        Questioner(
            clips, recipe.describe.form, settings.worked_example, recipe.seed, recipe.describe.telling()
        ),
        closed_options([clip["attributes"] for clip in clips]),
        settings.attempts,
        settings.drawn_samples,
        settings.drawn_temperature > 0,
        few_choices([row.human for row in rows if row.manifest and row.human]),
    )
    write: Callable[[Row], Writing]
    if settings.strategy == "rewrite":
        write = lambda row: rewrite(row, desk, tuple(pool), settings.wording)  # noqa: E731
    else:
        write = lambda row: STRATEGIES[settings.strategy](row, desk)  # noqa: E731
    writer = "human" if settings.strategy == "given" else teachers["llm"].name
    source = {"strategy": settings.strategy, "teacher": writer, "seed": recipe.seed, "dataset": recipe.name}
    if settings.teacher is not None and settings.teacher.backend != "transformers":
        source["backend"] = settings.teacher.backend
    if "editor" in teachers:
        source["editor"] = teachers["editor"].name
    try:
        counts, examples = write_rows(
            rows,
            write,
            teachers,
            out_dir,
            source=source,
            shown=lambda row, attempt: desk.ask(row, attempt).example,
            progress=progress,
        )
    finally:
        for teacher in teachers.values():
            teacher.close()
    if settings.perplexity_rows and examples:
        from speech_llm.targets.perplexity import targets_perplexity

        llm, tokenizer = load(recipe.model.llm)
        counts.update(
            targets_perplexity(
                llm, tokenizer, examples, settings.perplexity_rows, settings.batch_tokens, progress
            )
        )
    tqdm.write(summary(counts))
    return counts


def choose_rows(
    recipe: Recipe, clips: Sequence[dict[str, Any]], pool: Sequence[PoolPrompt], manifest: Path | None
) -> list[Row]:
    """The (clip, prompt) pairs that get a target, with a person's answer where the strategy starts from one.

    A clip whose manifest line has a question and an answer of its own is asked that question and nothing else.
    """
    settings = recipe.targets
    chosen = (settings.prompts_per_clip, settings.clips, recipe.seed)
    if settings.strategy == "continuation":
        spoken = [clip for clip in clips if str(clip["attributes"].get("transcript") or "").strip()]
        return [Row(clip, prompt) for clip, prompt in choose_prompts(spoken, pool, *chosen)]
    if settings.strategy not in OF_LABELS:
        return [Row(clip, prompt) for clip, prompt in choose_prompts(clips, pool, *chosen)]
    by_id = {clip["id"]: clip for clip in clips}
    first = asked_first(list(by_id), recipe.seed)[: settings.clips]
    if settings.tasks is not None and manifest is not None:
        made = {row["id"]: row for _, row in read_jsonl(manifest)}
        asked = ask_clips((made[clip_id] for clip_id in first), settings.prompts_per_clip, recipe.seed)
        return [
            Row(
                by_id[row["id"]],
                PoolPrompt(f"{task.name}-{wording + 1}", task.instruction(question, wording), (), whole=True),
                question.label,
                manifest=True,
            )
            for row, task, question, wording in asked
        ]
    own = manifest_answers(manifest, list(by_id)) if manifest is not None else {}
    rows = []
    for clip_id in first:
        if clip_id in own:
            question, answer = own[clip_id]
            rows.append(
                Row(by_id[clip_id], PoolPrompt("manifest", question, (), whole=True), answer, manifest=True)
            )

    def can_answer(clip: dict[str, Any], prompt: PoolPrompt) -> bool:
        return clip["id"] not in own and human_answer(clip, prompt, settings.wording) is not None

    for clip, prompt in choose_prompts(clips, pool, *chosen, can_answer=can_answer):
        rows.append(Row(clip, prompt, human_answer(clip, prompt, settings.wording)))
    return rows


def _teachers(recipe: Recipe, load: Callable[[str], Any]) -> dict[str, Teacher]:
    """Who is asked: `llm`, and for minimum_change `editor`; nobody for given."""
    settings, reference = recipe.targets, recipe.model.llm
    if settings.strategy == "given":
        return {}
    named = open_teacher(settings, reference, recipe.seed, load, recipe.optimizer.precision)
    if settings.strategy != "minimum_change":
        return {"llm": named}
    if named.name == reference:
        return {"llm": named, "editor": named}
    llm, tokenizer = load(reference)
    own = TransformersTeacher(
        llm, tokenizer, reference, settings.sampling(recipe.seed), settings.batch_tokens
    )
    return {"llm": own, "editor": named}


def write_rows(
    rows: Sequence[Row],
    write: Callable[[Row], Writing],
    teachers: Mapping[str, Teacher],
    out_dir: Path,
    *,
    source: Mapping[str, Any] | None = None,
    shown: Callable[[Row, int], tuple[str, str] | None] = lambda row, attempt: None,
    progress: bool = True,
) -> tuple[dict[str, Any], list[Example]]:
    """Let a strategy write every row, all rows side by side; returns the counts and the Examples written.

    `shown(row, attempt)`: the worked example that goes before a row's description; it is kept in `source`, so that
    training can ask the base LLM about the same answer in the same way.

    Whenever it is killed, running it again over the same `out_dir` ends with the same files as a run that was not.
    """
    out_dir.mkdir(parents=True, exist_ok=True)
    writing = [write(row) for row in rows]
    asking: dict[int, list[Question]] = {}
    ended: dict[int, Target | Reject] = {}

    def advance(number: int, answers: list[str] | None) -> None:
        try:
            asking[number] = writing[number].send(answers)  # type: ignore[arg-type]  # None starts a generator
        except StopIteration as end:
            asking.pop(number, None)
            ended[number] = end.value

    with Journal(out_dir / "journal.jsonl") as journal:
        for number in range(len(rows)):
            advance(number, None)
        tries = 0
        while asking:
            tries += 1
            questions = [question for own in asking.values() for question in own]
            answers = journal.ask(questions, teachers, f"targets, try {tries}", progress)
            for number, own in list(asking.items()):
                told = [answers[question] for question in own]
                failed = next((answer for answer in told if isinstance(answer, NoAnswer)), None)
                if failed is None:
                    advance(number, [answer for answer in told if isinstance(answer, str)])
                else:
                    writing[number].close()
                    del asking[number]
                    ended[number] = Reject(f"no answer: {failed.why}", "", tries)
        kept = [
            _example(row, target, source or {}, shown(row, target.attempt))
            for i, row in enumerate(rows)
            if isinstance(target := ended[i], Target)
        ]
        write_examples(out_dir / "examples.jsonl", kept)
        write_jsonl(
            out_dir / "rejects.jsonl",
            [_reject(row, ended[i]) for i, row in enumerate(rows) if isinstance(ended[i], Reject)],
        )
        return _counts(rows, ended, journal), kept


def _example(row: Row, target: Target, source: Mapping[str, Any], shown: tuple[str, str] | None) -> Example:
    audio: dict[str, Any] = {"path": row.clip["audio"]}
    if row.attributes.get("transcript"):
        audio["transcript"] = row.attributes["transcript"]
    return Example(
        id=f"{row.clip['id']}/{row.prompt.id}",
        messages=[user_turn(row.prompt.text, audio), {"role": "assistant", "content": target.answer}],
        context=target.context,
        attributes=row.attributes,
        source={
            **source,
            "prompt": row.prompt.id,
            "attempt": target.attempt,
            "verdict": target.verdict,
            **target.notes,
            **({"example": list(shown)} if shown else {}),
        },
    )


def _reject(row: Row, reject: Target | Reject) -> dict[str, Any]:
    assert isinstance(reject, Reject)
    return {
        "clip": row.clip["id"],
        "prompt": row.prompt.id,
        "attempts": reject.attempts,
        "reason": reject.reason,
        "answer": reject.answer,
    }


def _counts(rows: Sequence[Row], ended: Mapping[int, Target | Reject], journal: Journal) -> dict[str, Any]:
    by_prompt: dict[str, Counter[str]] = {}
    by_writer: Counter[str] = Counter()
    kept = accepted = 0
    for number, row in enumerate(rows):
        end = ended[number]
        how = end.reason if isinstance(end, Reject) else f"kept at try {end.attempt + 1}"
        if isinstance(end, Target):
            kept += 1
            accepted += end.verdict == "ok"
            if "kept" in end.notes:
                by_writer[end.notes["kept"]] += 1
            if end.verdict != "ok":
                how = f"{end.verdict}, so the human answer"
        by_prompt.setdefault(row.prompt.id, Counter())[how] += 1
    counts: dict[str, Any] = {
        "asked": len(rows),
        "kept": kept,
        "rejected": len(rows) - kept,
        "acceptance": round(accepted / max(1, len(rows)), 4),
        "generated_tokens": journal.tokens,
        "tokens_per_s": round(journal.new_tokens / journal.seconds, 1) if journal.new_tokens else 0.0,
        "by_prompt": {name: dict(found) for name, found in sorted(by_prompt.items())},
    }
    if by_writer:
        counts["kept_of"] = dict(sorted(by_writer.items()))
    if journal.unanswered:
        counts["unanswered"] = dict(journal.unanswered.most_common())
    return counts


def summary(counts: Mapping[str, Any]) -> str:
    """What the stage did, in one line to print."""
    parts = [f"{counts['kept']:,} of {counts['asked']:,} rows have a target"]
    if counts["generated_tokens"]:
        parts.append(f"acceptance {counts['acceptance']:.1%}")
    if "kept_of" in counts:
        parts.append(", ".join(f"{name} {count:,}" for name, count in counts["kept_of"].items()))
    if counts["tokens_per_s"]:
        parts.append(f"{counts['tokens_per_s']:.0f} tokens/s")
    if "perplexity" in counts:
        parts.append(
            f"base LLM's mean perplexity {counts['perplexity']:.2f} a token (of {counts['perplexity_rows']:,} rows)"
        )
    if "unanswered" in counts:
        why = ", ".join(f"{name} {count:,}" for name, count in counts["unanswered"].items())
        parts.append(f"questions that got no answer: {why}")
    return "targets: " + "; ".join(parts)
