"""Speech-IFEval (2505.19037): does a speech model still do what it is told, beside the text LLM that reads the sound as text?

    closed_ended_questions       a question with a rule-checked constraint: json, case, quotation, title, repetition, ending
    creative_writing             a free task with a constraint on bullets, sentences, words, paragraphs, keywords
    chain-of-thought             judged by a model only (`speech-llm judge --form reasoning`): counted, not scored here
    ...-woprompt                 the closed questions without a constraint: how well they are answered

In: the benchmark's own files, rows `{"id", "audio_filepath", "textual_audio", "instruction", "metric", "instruction_id_list", "kwargs",
"label"}`. Out: tasks, verdicts row by row, and IFrate: the mean of the categories' rates. The forgetting rate is
(IFrate of the model - IFrate of the text LLM) / IFrate of the text LLM, which is fed "Speech Input: {textual_audio}".
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from eval.ifeval_rules import GROUPS, RULES, keeps
from eval.matching import match_option, normalise_text, spoken_words, word_errors
from eval.stats import bootstrap_ratio, rate, wilson_interval
from eval.tasks import Instance, Task
from speech_llm.errors import UserError
from speech_llm.examples import Message
from speech_llm.files import read_jsonl

IFEVAL = "ifeval"
SPEECH_IFEVAL = "speech-ifeval"
SYSTEM = "Follow the given instructions."
# A file's category, by what its name contains; the first that fits.
CATEGORIES = {
    "woprompt": "ifeval-woprompt",
    "clos": "ifeval-closed",
    "creative": "ifeval-creative",
    "open": "ifeval-creative",
    "chain": "ifeval-cot",
    "cot": "ifeval-cot",
}


def conversation(instruction: str, audio: Mapping[str, Any], told: str) -> list[Message]:
    """The chat of one row; `told`: what a text LLM reads in place of the sound."""
    # Between sound and question the text LLM sees one empty line.
    part = {"type": "audio", **audio, "description": f"Speech Input: {told}\n"}
    content = [part, {"type": "text", "text": instruction}]
    return [{"role": "system", "content": SYSTEM}, {"role": "user", "content": content}]


def speech_ifeval_tasks(place: Path) -> list[Task]:
    """The tasks of one of the benchmark's files, or of all in a folder; sounds lie beside them or under `data/audios`, `audios`.

    Rows without their sound, or with a constraint that there is not, are set aside. Raises `UserError` when none is left.
    """
    if not place.exists():
        raise UserError(f"{place}: no such file or folder; Speech-IFEval's files are .jsonl")
    files = sorted(place.rglob("*.jsonl")) if place.is_dir() else [place]
    tasks: dict[str, Task] = {}
    for file in files:
        name = next(
            (name for part, name in CATEGORIES.items() if part in file.stem.casefold()), f"ifeval-{file.stem}"
        )
        task = tasks.setdefault(name, Task(name, SPEECH_IFEVAL, [], IFEVAL, None, []))
        rejects = task.rejects

        def reject(
            number: int, reason: str, file: Path = file, rejects: list[dict[str, Any]] = rejects
        ) -> None:
            rejects.append({"where": f"{file}, line {number}", "reason": reason})

        for number, row in read_jsonl(file, lambda n, _t, why: reject(n, why)):
            made = _instance(row, file, name, number)
            if isinstance(made, str):
                reject(number, made)
            else:
                task.instances.append(made)
    usable = [task for task in tasks.values() if task.instances]
    if not usable:
        rejects = [row for task in tasks.values() for row in task.rejects]
        why = f" ({rejects[0]['where']}: {rejects[0]['reason']})" if rejects else ""
        raise UserError(f"{place}: no row can be used{why}")
    return usable


def _instance(row: dict[str, Any], file: Path, task: str, number: int) -> Instance | str:
    """One row as an instance, or why it cannot be."""
    instruction, sound = str(row.get("instruction") or "").strip(), str(row.get("audio_filepath") or "")
    if not instruction:
        return "there is no 'instruction'"
    if not sound:
        return "there is no 'audio_filepath'"
    roots = (
        file.parent,
        file.parent / "audios",
        file.parent.parent / "audios",
        file.parent / "data" / "audios",
    )
    path = next((root / sound for root in roots if (root / sound).exists()), None)
    if path is None:
        return f"{sound}: no such audio file beside {file.name}, in 'audios' or in 'data/audios'"
    names = [str(name) for name in row.get("instruction_id_list") or []]
    arguments = list(row.get("kwargs") or [{}] * len(names))
    constraints: list[dict[str, Any]] = []
    if "woprompt" not in task and task != "ifeval-cot":
        if not names or len(names) != len(arguments):
            return "'instruction_id_list' and 'kwargs' must be lists of the same length"
        for name, given in zip(names, arguments, strict=True):
            try:
                keeps(name, given or {}, "An answer.")
            except ValueError as error:
                return str(error)
            constraints.append({"id": name, "arguments": given or {}})
    told = str(row.get("textual_audio") or row.get("seed_transcript") or "")
    return Instance(
        id=str(row.get("id", number)),
        messages=conversation(instruction, {"path": str(path.resolve())}, told),
        label=str(row.get("label") or ""),
        task=task,
        metric=IFEVAL,
        constraints=[*constraints, {"id": "answer", "arguments": {"metric": str(row.get("metric") or "")}}],
    )


def score_constraints(instance: Instance, response: str) -> dict[str, Any]:
    """`score`: 1 when all constraints are kept, null when only a judge can tell; `kept` one by one; of the answer itself, its performance.

    An empty answer is unparsed and keeps nothing.
    """
    rules = [item for item in instance.constraints if item["id"] != "answer"]
    kept = {item["id"]: keeps(item["id"], item["arguments"], response) for item in rules}
    answer: dict[str, Any] = next(
        (item["arguments"] for item in instance.constraints if item["id"] == "answer"), {}
    )
    performance = _performance(str(answer.get("metric") or ""), instance, response)
    return {
        "parsed": response or None,
        # Without a constraint it is the answer itself that counts, where a rule can read it.
        "score": float(all(kept.values())) if kept else performance.get("answer_right"),
        "kept": kept,
        **performance,
    }


def _performance(metric: str, instance: Instance, response: str) -> dict[str, Any]:
    """Whether the question itself was answered: word errors of a transcript, else whether the label is named."""
    if not instance.label:
        return {}
    if metric == "wer":
        reference, said = normalise_text(instance.label), normalise_text(spoken_words(response))
        words = len(reference.split())
        return {"answer_errors": word_errors(reference, said) if words else 0, "answer_words": words}
    if metric in ("accuracy", "acc"):
        options = [*(instance.options or [instance.label]), "\0"]
        named = match_option(response.casefold(), [option.casefold() for option in options]).value
        return {"answer_right": float(named == instance.label.casefold())}
    return {}


def summarise_constraints(rows: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """A category's rate, each constraint's and each group's of them, and how well the questions themselves were answered."""
    decided = [row for row in rows if row["score"] is not None]
    right = int(sum(row["score"] for row in decided))
    by_rule: dict[str, list[bool]] = {}
    for row in rows:
        for name, kept in row["kept"].items():
            by_rule.setdefault(name.rpartition(":")[2], []).append(kept)
    groups: dict[str, list[bool]] = {}
    for name, values in by_rule.items():
        groups.setdefault(GROUPS[name], []).extend(values)
    errors = [row["answer_errors"] for row in rows if "answer_errors" in row]
    words = [row["answer_words"] for row in rows if "answer_errors" in row]
    named = [row["answer_right"] for row in rows if "answer_right" in row]
    out: dict[str, Any] = {
        "metric": "accuracy",
        "accuracy": round(right / len(decided), 4) if decided else None,
        "interval": [round(value, 4) for value in wilson_interval(right, len(decided))] if decided else None,
        "chance": None,
        "majority": None,
        "needs_judge": sum(row["score"] is None and "answer_errors" not in row for row in rows),
        "constraints": {name: rate(sum(values), len(values)) for name, values in sorted(by_rule.items())},
        "groups": {name: rate(sum(values), len(values)) for name, values in sorted(groups.items())},
    }
    if words:
        low, high = bootstrap_ratio(errors, words)
        out["answer_wer"] = {
            "value": round(sum(errors) / sum(words), 4),
            "low": low,
            "high": high,
            "n": len(words),
        }
    if named:
        out["answer_accuracy"] = rate(int(sum(named)), len(named))
    return out


def ifrate(results: Mapping[str, Mapping[str, Any]]) -> dict[str, Any] | None:
    """The mean of the categories' rates that could be decided; None when there is none."""
    found = {
        name: result
        for name, result in results.items()
        if result.get("dimension") == SPEECH_IFEVAL
        and name != SPEECH_IFEVAL
        and "woprompt" not in name
        and result.get("accuracy") is not None
    }
    if not found:
        return None
    rates = {name: float(result["accuracy"]) for name, result in found.items()}
    left_out = [name for name, result in results.items() if result.get("needs_judge") and name not in found]
    return {
        "dimension": SPEECH_IFEVAL,
        "metric": "ifrate",
        "ifrate": round(sum(rates.values()) / len(rates), 4),
        "n": sum(int(result["n"]) for result in found.values()),
        "unparsed": sum(int(result["unparsed"]) for result in found.values()),
        "interval": None,
        "chance": None,
        "majority": None,
        "categories": rates,
        **({"needs_judge": left_out} if left_out else {}),
    }


def with_verdicts(
    results: Mapping[str, Mapping[str, Any]], judged: Mapping[str, Mapping[str, Any]]
) -> dict[str, Mapping[str, Any]]:
    """Results by task, IFrate not among them, with a judge's rate where no rule decides and it has a say on every answer."""
    decided = {
        name: {**results[name], "accuracy": told["accuracy"]}
        for name, told in judged.items()
        if results.get(name, {}).get("needs_judge")
        and results[name].get("accuracy") is None
        and told["n"] == results[name]["n"]
    }
    return {name: result for name, result in results.items() if name != SPEECH_IFEVAL} | decided


def forgetting_rate(reference: Mapping[str, Any], model: Mapping[str, Any]) -> float | None:
    """(IFrate of the model - of the text LLM) / of the text LLM, on the categories that both have; below 0 it was forgotten."""
    shared = [name for name in reference["categories"] if name in model["categories"]]
    if not shared:
        return None
    before = sum(reference["categories"][name] for name in shared) / len(shared)
    after = sum(model["categories"][name] for name in shared) / len(shared)
    return round((after - before) / before, 4) if before else None


assert set(GROUPS) == set(RULES)
