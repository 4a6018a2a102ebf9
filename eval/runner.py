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
from eval.safety import IDENTITY, REFUSAL
from eval.scoring import score_answer, summarise
from eval.speech_ifeval import SPEECH_IFEVAL, ifrate
from eval.tasks import Instance, Task
from speech_llm.errors import UserError
from speech_llm.examples import Message, audio_parts
from speech_llm.files import JsonlAppender, read_jsonl, stable_hash, write_json, write_jsonl


class Responder(Protocol):
    """Any model: conversations in, one answer each out, None where it gave none (a server that was down).

    `on_answer(index, text)` is called as answers come.
    """

    def respond(
        self, conversations: Sequence[list[Message]], on_answer: Callable[[int, str], None] | None = None
    ) -> Sequence[str | None]: ...


def evaluate(
    responder: Responder,
    tasks: Sequence[Task],
    out_dir: Path,
    limit: int | None = None,
    progress: bool = True,
    model: str | None = None,
) -> dict[str, dict[str, Any]]:
    """Ask every instance (the first `limit` of each task), score, and write both files under `out_dir`.

    `model`: names the model, so that answers journalled for another one in the same folder are not taken for its own.

    An instance without an answer is wrong and counted as `unanswered`; it is asked again the next time. One with a sound that
    the responder cannot take (its `unusable`, where it has one) is set aside with the task's rejects. Raises `UserError` when
    none is left.
    """
    out_dir.mkdir(parents=True, exist_ok=True)
    chosen, unheard = _heard_by(
        responder, [(task, instance) for task in tasks for instance in task.instances[:limit]]
    )
    if unheard and progress:
        tqdm.write(
            f"{len(unheard):,} instances have a sound that cannot be used, e.g. {unheard[0]['reason']}; "
            f"all in {out_dir / 'task_rejects.jsonl'}"
        )
    whose = [] if model is None else [model]
    keys = [
        stable_hash([*whose, task.name, instance.id, instance.messages, *_states(instance)])
        for task, instance in chosen
    ]
    with JsonlAppender(out_dir / "journal.jsonl") as journal:
        answers = {row["key"]: row["response"] for row in journal.rows}
        todo = [i for i, key in enumerate(keys) if key not in answers]
        with tqdm(total=len(todo), desc=f"eval {out_dir.name}", unit="answer", disable=not progress) as bar:

            def done(place: int, text: str | None) -> None:
                key = keys[todo[place]]
                if text is not None and key not in answers:
                    answers[key] = text
                    journal.append({"key": key, "response": text})
                    bar.update()

            # First, as a model that cannot do it says so at once.
            picked = [place for place, i in enumerate(todo) if chosen[i][1].metric == CHOICE]
            picks = pick_choices(responder, [chosen[todo[place]][1] for place in picked])
            for place, pick in zip(picked, picks, strict=True):
                done(place, pick)
            spoken = [place for place, i in enumerate(todo) if chosen[i][1].metric != CHOICE]
            texts = responder.respond(
                [chosen[todo[place]][1].messages for place in spoken],
                lambda number, text: done(spoken[number], text),
            )
            for place, text in zip(spoken, texts, strict=True):
                done(place, text)
    return _write_results(chosen, [answers.get(key) for key in keys], tasks, out_dir, unheard)


def _heard_by(
    responder: Responder, chosen: Sequence[tuple[Task, Instance]]
) -> tuple[list[tuple[Task, Instance]], list[dict[str, Any]]]:
    """The instances whose sounds a responder can take, and the others as rejects with their reasons."""
    unusable = getattr(responder, "unusable", None)
    if unusable is None:
        return list(chosen), []
    reasons = unusable(
        list(dict.fromkeys(part["path"] for _, one in chosen for part in audio_parts(one.messages)))
    )
    kept, rejects = [], []
    for task, instance in chosen:
        bad = next((p["path"] for p in audio_parts(instance.messages) if p["path"] in reasons), None)
        if bad is None:
            kept.append((task, instance))
        else:
            rejects.append({"task": task.name, "id": instance.id, "reason": f"{bad}: {reasons[bad]}"})
    if rejects and not kept:
        raise UserError(f"no question is left to ask: {rejects[0]['reason']}")
    return kept, rejects


def _states(instance: Instance) -> list[list[int] | None]:
    """Size and time of change of each sound: an answer about another sound under the same name is none about this one."""
    files = [Path(part["path"]) for part in audio_parts(instance.messages)]
    stats = [file.stat() if file.exists() else None for file in files]
    return [None if stat is None else [stat.st_size, stat.st_mtime_ns] for stat in stats]


def score_responses(tasks: Sequence[Task], responses: Path, out_dir: Path) -> dict[str, dict[str, Any]]:
    """Score saved outputs: JSON lines with `response`, matched by `id` (and `task`), or where no line has one by row order.

    Missing answers count as unparsed and wrong; surplus or broken lines go to `rejects.jsonl` with their reason. By row order
    a broken line keeps its place, as a missing answer.
    """
    chosen = [(task, instance) for task in tasks for instance in task.instances]
    rejects: list[dict[str, Any]] = []
    rows: list[tuple[int, dict[str, Any] | None]] = []

    def broken(number: int, _text: str, reason: str) -> None:
        rejects.append({"line": number, "reason": reason})
        rows.append((number, None))

    for number, found in read_jsonl(responses, broken):
        if isinstance(found.get("response"), str):
            rows.append((number, found))
        else:
            broken(number, "", "no text under 'response'")
    usable = [row for _, row in rows if row is not None]
    answers: dict[int, str] = {}
    if any("id" in row for row in usable):
        places: dict[tuple[str | None, str], int] = {}
        for i, (task, instance) in enumerate(chosen):
            places[(task.name, instance.id)] = i
            places.setdefault((None, instance.id), i)
        for number, row in rows:
            if row is None:
                continue
            if "id" not in row:
                rejects.append({"line": number, "reason": "no 'id', which other lines have"})
                continue
            place = places.get((row.get("task"), str(row["id"])))
            if place is None or place in answers:
                why = "occurs twice" if place is not None else "is not in the task"
                rejects.append({"line": number, "reason": f"the id {row['id']!r} {why}"})
            else:
                answers[place] = row["response"]
    else:
        for place, (number, row) in enumerate(rows):
            if row is not None and place < len(chosen):
                answers[place] = row["response"]
            elif row is not None:
                rejects.append({"line": number, "reason": "more responses than instances"})
    rejects.sort(key=lambda reject: reject["line"])
    if not answers:
        raise UserError(
            f"{responses}: no line answers an instance of {', '.join(task.name for task in tasks)}"
        )
    write_jsonl(out_dir / "rejects.jsonl", rejects)
    results = _write_results(chosen, [answers.get(i) for i in range(len(chosen))], tasks, out_dir)
    for task in tasks:
        if task.name in results:
            unanswered = [i for i, (owner, _) in enumerate(chosen) if owner is task and i not in answers]
            results[task.name].pop("unanswered", None)
            results[task.name]["missing"] = len(unanswered)
    write_json(out_dir / "results.json", results)
    return results


def _write_results(
    chosen: Sequence[tuple[Task, Instance]],
    answers: Sequence[str | None],
    tasks: Sequence[Task],
    out_dir: Path,
    unheard: Sequence[dict[str, Any]] = (),
) -> dict[str, dict[str, Any]]:
    rows = [
        {
            "task": task.name,
            "id": instance.id,
            "prompt": _prompt(instance),
            "response": answer,
            "label": instance.label,
            "metric": instance.metric,
            **(score_answer(instance, answer) if answer is not None else _unanswered(instance)),
            "seen": instance.seen,
            "audio": next((part["path"] for part in audio_parts(instance.messages)), None),
            **_heard(instance),
        }
        for (task, instance), answer in zip(chosen, answers, strict=True)
    ]
    write_jsonl(out_dir / "predictions.jsonl", rows)
    results: dict[str, dict[str, Any]] = {}
    set_aside: list[dict[str, Any]] = []
    for task in tasks:
        mine = [(i, row) for (t, i), row in zip(chosen, rows, strict=True) if t.name == task.name]
        rejects = [*task.rejects, *(row for row in unheard if row["task"] == task.name)]
        set_aside += [{"task": task.name, **row} for row in rejects]
        if not mine:
            continue
        result = {"dimension": task.dimension, **summarise([i for i, _ in mine], [r for _, r in mine])}
        unanswered = sum(row["response"] is None for _, row in mine)
        if unanswered:
            result["unanswered"] = unanswered
        for name, wanted in (("seen", True), ("unseen", False)):
            part = [(i, row) for i, row in mine if i.seen is wanted]
            result[name] = summarise([i for i, _ in part], [r for _, r in part]) if part else None
        if rejects:
            result["rejected"] = len(rejects)
        results[task.name] = result
    follows = ifrate(results)
    if follows is not None:
        results[SPEECH_IFEVAL] = follows
    if set_aside:
        write_jsonl(out_dir / "task_rejects.jsonl", set_aside)
    else:
        (out_dir / "task_rejects.jsonl").unlink(missing_ok=True)  # of a task file that was mended since
    write_json(out_dir / "results.json", results)
    return results


def _unanswered(instance: Instance) -> dict[str, Any]:
    """The score of no answer: wrong, even where an empty one would have been right."""
    scored = score_answer(instance, "")
    if "errors" in scored:
        return scored | {"score": max(1.0, scored["score"]), "errors": max(1, scored["errors"])}
    return scored if scored["score"] is None else scored | {"score": 0.0}


def _heard(instance: Instance) -> dict[str, str]:
    """What a spoken request says, which its prompt does not: who judges the answer must know it."""
    if instance.metric not in (REFUSAL, IDENTITY):
        return {}
    said = [part["transcript"] for part in audio_parts(instance.messages) if part.get("transcript")]
    words = instance.attributes.get("transcript") or " ".join(said)
    return {"transcript": str(words)} if words else {}


def _prompt(instance: Instance) -> str:
    content = instance.messages[-1]["content"]
    if isinstance(content, str):
        return content
    return "\n".join(part["text"] for part in content if part.get("type") == "text")
