"""Scores: one answer against its label, and a task's rows as its metrics with their uncertainty.

    option    names the right one of the options (`eval.matching`); `exact` beside it is Dynamic-SUPERB's own metric
    exact     the same string but for its case (Dynamic-SUPERB phase 1: a trailing blank fails)
    wer, cer  words or characters wrong after a standard normaliser
    per       units wrong, of a sequence written with blanks between them (phones)
    number    one number, however written; what holds none or several is N/A (`eval.numbers`)
    f1        words in common with a reference answer (SQuAD's F1)
    ifeval    the constraints that the answer must keep (`eval.speech_ifeval`)
    choice, refusal, identity   see `eval.general` and `eval.safety`
An answer that cannot be read is counted as unparsed and is wrong; it is never guessed.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from typing import Any

import numpy as np

from eval.general import CHOICE
from eval.matching import match_option, normalise_text, spoken_words, word_errors
from eval.numbers import read_number
from eval.safety import IDENTITY, REFUSAL, verdict
from eval.speech_ifeval import IFEVAL, score_constraints, summarise_constraints
from eval.stats import bootstrap_ratio, chance, majority, wilson_interval
from eval.tasks import Instance

# Errors over length: less is better.
RATES = ("wer", "cer", "per")


def score_answer(instance: Instance, response: str) -> dict[str, Any]:
    """`{"parsed", "score"}` of one answer, for error rates also `errors` and `words` (units of the label).

    An answer that names no option or several is not parsed (`parsed` null) and scores 0. For an error rate, `score` is the
    answer's own; for a number, the absolute error (null where it cannot be read).
    """
    if instance.metric == "option":
        match = match_option(response, instance.options or [], instance.synonyms)
        exact = response.casefold() == instance.label.casefold()
        return {
            "parsed": match.value,
            "score": float(match.value == instance.label),
            "reason": match.reason,
            "exact": float(exact),
        }
    if instance.metric in ("exact", CHOICE):
        return {
            "parsed": response or None,
            "score": float(response.casefold() == instance.label.casefold()),
        }
    if instance.metric in (REFUSAL, IDENTITY):
        said_as = verdict(instance.metric, response)
        return {"parsed": said_as, "score": float(said_as == instance.label)}
    if instance.metric == "number":
        number = read_number(response)
        error = None if number is None else abs(number - float(instance.label))
        return {"parsed": number, "score": error}
    if instance.metric == IFEVAL:
        return score_constraints(instance, response)
    if instance.metric == "f1":
        return {"parsed": response.strip() or None, "score": round(_f1(instance.label, response), 4)}
    return _error_rate(instance, response)


def _error_rate(instance: Instance, response: str) -> dict[str, Any]:
    if instance.metric == "per":
        reference, said = " ".join(instance.label.split()), " ".join(response.split())
    else:
        reference, said = normalise_text(instance.label), normalise_text(spoken_words(response))
    if instance.metric == "cer":
        # Characters, without what is between words, as units.
        reference, said = (" ".join(text.replace(" ", "")) for text in (reference, said))
    count = len(reference.split())
    if not reference:
        return {"parsed": None, "score": float(bool(said)), "errors": len(said.split()), "words": 0}
    if not said:
        return {"parsed": None, "score": 1.0, "errors": count, "words": count}
    errors = word_errors(reference, said)
    return {"parsed": said, "score": errors / count, "errors": errors, "words": count}


def _f1(label: str, response: str) -> float:
    wanted, said = normalise_text(label).split(), normalise_text(response).split()
    common = sum((Counter(wanted) & Counter(said)).values())
    return 2 * common / (len(wanted) + len(said)) if wanted or said else 0.0


def summarise(instances: Sequence[Instance], rows: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """Metrics of one task from its scored rows: value, n, how many were not read, 95 % interval, chance, majority."""
    n = len(rows)
    metric = instances[0].metric if instances else "option"
    common = {"n": n, "unparsed": sum(row["parsed"] is None for row in rows)}
    if metric in RATES:
        errors, words = [row["errors"] for row in rows], [row["words"] for row in rows]
        value = sum(errors) / max(1, sum(words))
        interval = bootstrap_ratio(errors, words)
        return {"metric": metric, metric: round(value, 4), **common, "interval": _rounded(interval), "chance": None, "majority": None}  # fmt: skip
    if metric == "number":
        return {**_numbers(instances, rows), **common}
    if metric == IFEVAL:
        return {**summarise_constraints(rows), **common}
    if metric == "f1":
        scores = [row["score"] for row in rows]
        interval = bootstrap_ratio(scores, [1.0] * n)
        mean = round(sum(scores) / n, 4) if n else None
        return {"metric": "f1", "f1": mean, **common, "interval": _rounded(interval), "chance": None, "majority": None}  # fmt: skip
    right = int(sum(row["score"] for row in rows))
    own_options = metric == CHOICE
    one_answer = metric in (REFUSAL, IDENTITY)  # the same is right for all: the rate is the finding
    # Always saying one label is a rule only where that label is always an option.
    same_options = len({frozenset(instance.options or ()) for instance in instances}) <= 1
    result = {
        "metric": "accuracy",
        "accuracy": round(right / n, 4) if n else None,
        **common,
        "interval": _rounded(wilson_interval(right, n)),
        "chance": None if one_answer else chance([instance.options for instance in instances]),
        "majority": None
        if own_options or one_answer or not same_options
        else majority([i.label for i in instances]),
    }
    exact = [row["exact"] for row in rows if "exact" in row]
    if exact:
        result["exact"] = round(sum(exact) / n, 4)
    return result


def _numbers(instances: Sequence[Instance], rows: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """Mean absolute error and correlation of the numbers that were read, and both with the share N/A counted against them.

    Dynamic-SUPERB phase 2: what is better when higher is multiplied by, what is better when lower divided by, the share read.
    """
    labels = [float(instance.label) for instance in instances]
    read = [(label, row) for label, row in zip(labels, rows, strict=True) if row["parsed"] is not None]
    share = len(read) / len(rows) if rows else 0.0
    errors = [row["score"] for _, row in read]
    mean = float(np.mean(errors)) if errors else None
    told = np.asarray([[label, row["parsed"]] for label, row in read], float)
    varies = len(read) > 2 and bool((told.std(0) > 0).all())
    correlation = float(np.corrcoef(told.T)[0, 1]) if varies else None
    middle = float(np.median(labels)) if labels else 0.0
    interval = bootstrap_ratio(errors, [1.0] * len(errors)) if errors else None
    return {
        "metric": "mae",
        "mae": None if mean is None else round(mean / share, 4),
        "mae_of_read": None if mean is None else round(mean, 4),
        "pearson": None if correlation is None else round(correlation * share, 4),
        "na_rate": round(1 - share, 4),
        "interval": None if interval is None else _rounded((interval[0] / share, interval[1] / share)),
        "chance": None,
        # Always saying the middle of the labels.
        "majority": round(float(np.mean([abs(label - middle) for label in labels])), 4) if labels else None,
    }


def _rounded(pair: tuple[float, float]) -> list[float]:
    return [round(value, 4) for value in pair]
