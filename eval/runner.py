"""Running and scoring: tasks and a responder in, predictions and results out.

`predictions.jsonl`: one line an instance, in the task's order. `results.json`: metrics with n, intervals, chance and
majority. Answers are journalled as they come, so an interrupted evaluation goes on where it was.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Protocol

from tqdm import tqdm

from eval.general import CHOICE, pick_choices
from eval.matching import match_option, normalise_text, spoken_words
from eval.safety import IDENTITY, REFUSAL, verdict
from eval.stats import bootstrap_ratio, chance, majority, wilson_interval
from eval.tasks import Instance, Task
from speech_llm.errors import UserError
from speech_llm.examples import Message, audio_parts
from speech_llm.files import JsonlAppender, read_jsonl, stable_hash, write_json, write_jsonl


class Responder(Protocol):
    """Any model: conversations in, one answer each out. `on_answer(index, text)` is called as answers come."""

    def respond(
        self, conversations: Sequence[list[Message]], on_answer: Callable[[int, str], None] | None = None
    ) -> list[str]: ...


def score_answer(instance: Instance, response: str) -> dict[str, Any]:
    """`{"parsed", "score"}` of one answer, and for WER also `errors` and `words`.

    An answer that names no option or several is not parsed (`parsed` null) and scores 0. For WER, `score` is the
    answer's own word error rate.
    """
    if instance.metric == "option":
        match = match_option(response, instance.options or [], instance.synonyms)
        return {"parsed": match.value, "score": float(match.value == instance.label), "reason": match.reason}
    if instance.metric in ("exact", CHOICE):
        # Dynamic-SUPERB's own metric: the same string, whatever its case.
        said = response.strip()
        return {"parsed": said or None, "score": float(said.casefold() == instance.label.strip().casefold())}
    if instance.metric in (REFUSAL, IDENTITY):
        said_as = verdict(instance.metric, response)
        return {"parsed": said_as, "score": float(said_as == instance.label)}
    import jiwer

    reference, said = normalise_text(instance.label), normalise_text(spoken_words(response))
    if not reference:
        return {"parsed": None, "score": float(bool(said)), "errors": len(said.split()), "words": 0}
    if not said:
        count = len(reference.split())
        return {"parsed": None, "score": 1.0, "errors": count, "words": count}
    measured = jiwer.process_words(reference, said)
    errors = measured.substitutions + measured.deletions + measured.insertions
    words = len(reference.split())
    return {"parsed": said, "score": errors / words, "errors": errors, "words": words}


def summarise(instances: Sequence[Instance], rows: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """Metrics of one task from its scored rows."""
    n = len(rows)
    unparsed = sum(row["parsed"] is None for row in rows)
    labels = [instance.label for instance in instances]
    if instances and instances[0].metric == "wer":
        errors, words = [row["errors"] for row in rows], [row["words"] for row in rows]
        rate = sum(errors) / max(1, sum(words))
        interval = bootstrap_ratio(errors, words)
        return {"metric": "wer", "wer": round(rate, 4), "n": n, "unparsed": unparsed, "interval": _rounded(interval), "chance": None, "majority": None}  # fmt: skip
    right = int(sum(row["score"] for row in rows))
    options = instances[0].options if instances else None
    return {
        "metric": "accuracy",
        "accuracy": round(right / n, 4) if n else None,
        "n": n,
        "unparsed": unparsed,
        "interval": _rounded(wilson_interval(right, n)),
        "chance": None if instances and instances[0].metric in (REFUSAL, IDENTITY) else chance(options),
        # Where every instance has options of its own, no label is frequent; where one is right for all, the rate is the finding.
        "majority": None
        if instances and instances[0].metric in (CHOICE, REFUSAL, IDENTITY)
        else majority(labels),
    }


def _rounded(pair: tuple[float, float]) -> list[float]:
    return [round(value, 4) for value in pair]


def evaluate(
    responder: Responder,
    tasks: Sequence[Task],
    out_dir: Path,
    limit: int | None = None,
    progress: bool = True,
) -> dict[str, dict[str, Any]]:
    """Ask every instance (the first `limit` of each task), score, and write both files under `out_dir`."""
    out_dir.mkdir(parents=True, exist_ok=True)
    chosen = [(task, instance) for task in tasks for instance in task.instances[:limit]]
    keys = [stable_hash([task.name, instance.id, instance.messages]) for task, instance in chosen]
    with JsonlAppender(out_dir / "journal.jsonl") as journal:
        answers = {row["key"]: row["response"] for row in journal.rows}
        todo = [i for i, key in enumerate(keys) if key not in answers]
        with tqdm(total=len(todo), desc=f"eval {out_dir.name}", unit="answer", disable=not progress) as bar:

            def done(place: int, text: str) -> None:
                key = keys[todo[place]]
                if key not in answers:
                    answers[key] = text
                    journal.append({"key": key, "response": text})
                    bar.update()

            spoken = [place for place, i in enumerate(todo) if chosen[i][1].metric != CHOICE]
            texts = responder.respond(
                [chosen[todo[place]][1].messages for place in spoken],
                lambda number, text: done(spoken[number], text),
            )
            for place, text in zip(spoken, texts, strict=True):
                done(place, text)
            picked = [place for place, i in enumerate(todo) if chosen[i][1].metric == CHOICE]
            for place, text in zip(
                picked, pick_choices(responder, [chosen[todo[p]][1] for p in picked]), strict=True
            ):
                done(place, text)
    return _write_results(chosen, [answers[key] for key in keys], tasks, out_dir)


def score_responses(tasks: Sequence[Task], responses: Path, out_dir: Path) -> dict[str, dict[str, Any]]:
    """Score saved outputs: JSON lines with `response`, matched by `id` (and `task`) or else by row order.

    Missing answers count as unparsed and wrong; surplus or broken lines go to `rejects.jsonl` with their reason.
    """
    chosen = [(task, instance) for task in tasks for instance in task.instances]
    rejects: list[dict[str, Any]] = []
    rows = list(read_jsonl(responses, lambda n, _t, reason: rejects.append({"line": n, "reason": reason})))
    usable = [(number, row) for number, row in rows if isinstance(row.get("response"), str)]
    rejects += [
        {"line": n, "reason": "no text under 'response'"}
        for n, row in rows
        if not isinstance(row.get("response"), str)
    ]
    answers: dict[int, str] = {}
    if usable and all("id" in row for _, row in usable):
        places: dict[tuple[str | None, str], int] = {}
        for i, (task, instance) in enumerate(chosen):
            places[(task.name, instance.id)] = i
            places.setdefault((None, instance.id), i)
        for number, row in usable:
            place = places.get((row.get("task"), str(row["id"])))
            if place is None or place in answers:
                why = "occurs twice" if place is not None else "is not in the task"
                rejects.append({"line": number, "reason": f"the id {row['id']!r} {why}"})
            else:
                answers[place] = row["response"]
    elif usable:
        for place, (number, row) in enumerate(usable):
            if place < len(chosen):
                answers[place] = row["response"]
            else:
                rejects.append({"line": number, "reason": "more responses than instances"})
    if not answers:
        raise UserError(
            f"{responses}: no line answers an instance of {', '.join(task.name for task in tasks)}"
        )
    write_jsonl(out_dir / "rejects.jsonl", rejects)
    results = _write_results(chosen, [answers.get(i, "") for i in range(len(chosen))], tasks, out_dir)
    missing = len(chosen) - len(answers)
    for task_result in results.values():
        task_result["missing"] = missing
    write_json(out_dir / "results.json", results)
    return results


def _write_results(
    chosen: Sequence[tuple[Task, Instance]], answers: Sequence[str], tasks: Sequence[Task], out_dir: Path
) -> dict[str, dict[str, Any]]:
    rows = [
        {
            "task": task.name,
            "id": instance.id,
            "prompt": _prompt(instance),
            "response": answer,
            "label": instance.label,
            **score_answer(instance, answer),
            "seen": instance.seen,
            "audio": next((part["path"] for part in audio_parts(instance.messages)), None),
        }
        for (task, instance), answer in zip(chosen, answers, strict=True)
    ]
    write_jsonl(out_dir / "predictions.jsonl", rows)
    results: dict[str, dict[str, Any]] = {}
    for task in tasks:
        mine = [(i, row) for (t, i), row in zip(chosen, rows, strict=True) if t.name == task.name]
        if not mine:
            continue
        result = {"dimension": task.dimension, **summarise([i for i, _ in mine], [r for _, r in mine])}
        for name, wanted in (("seen", True), ("unseen", False)):
            part = [(i, row) for i, row in mine if i.seen is wanted]
            result[name] = summarise([i for i, _ in part], [r for _, r in part]) if part else None
        if task.rejects:
            result["rejected"] = len(task.rejects)
        results[task.name] = result
    write_json(out_dir / "results.json", results)
    return results


def _prompt(instance: Instance) -> str:
    content = instance.messages[-1]["content"]
    if isinstance(content, str):
        return content
    return "\n".join(part["text"] for part in content if part.get("type") == "text")
