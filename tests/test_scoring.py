"""Scoring: option matching on a list of answers and verdicts, numbers, error rates, and what a task's rows add up to."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from eval.matching import match_option
from eval.numbers import read_number
from eval.scoring import score_answer, summarise
from eval.tasks import Instance
from speech_llm.summary import scores_table

PAIRS = Path(__file__).parent / "data" / "option_pairs.txt"


def option_pairs() -> list[tuple[tuple[str, ...], dict[str, list[str]], str, str | None]]:
    pairs: list[Any] = []
    options: dict[str, list[str]] = {}
    for line in PAIRS.read_text(encoding="utf-8").splitlines():
        if line.startswith("#"):
            continue
        if line.startswith("@"):
            named = [part.strip().partition("=") for part in line[1:].split("|")]
            options = {name: [word for word in words.split(",") if word] for name, _, words in named}
            continue
        answer, _, verdict = line.rpartition("=>")
        value = None if verdict.strip() == "-" else verdict.strip()
        pairs.append((tuple(options), options, answer.strip().replace("\\n", "\n"), value))
    return pairs


def test_there_are_many_pairs_of_every_kind() -> None:
    pairs = option_pairs()
    assert len(pairs) >= 150
    assert len({(options, answer) for options, _, answer, _ in pairs}) == len(pairs)
    assert sum(value is None for *_, value in pairs) >= 50
    assert all(value is None or value in options for options, _, _, value in pairs)


@pytest.mark.parametrize(("options", "synonyms", "answer", "value"), option_pairs())
def test_each_answer_has_its_verdict_whatever_the_order_of_the_options(
    options: tuple[str, ...], synonyms: dict[str, list[str]], answer: str, value: str | None
) -> None:
    assert match_option(answer, options, synonyms).value == value
    assert match_option(answer, options[::-1], synonyms).value == value


@pytest.mark.parametrize(
    ("answer", "number"),
    [
        ("3.5", 3.5),
        ("The score is 4.", 4),
        ("It is about 3.5 out of 5.", 3.5),
        ("3/5", 3),
        ("On a scale from 1 to 5 it is 2.", 2),
        ("I would give it a 4 on a scale of 1 to 5.", 4),
        ("-12 dB", -12),
        ("−3", -3),
        ("1,250 Hz", 1250),
        ("twenty-one years", 21),
        ("There are three speakers.", 3),
        ("seven", 7),
        ("The speaker says 5, yes, 5.", 5),
        ("2e3", 2000),
        ("between 3 and 4", None),
        ("3 or 4", None),
        ("I cannot tell.", None),
        ("", None),
        ("MP3", None),
        ("one or two", None),
        ("1.2.3", None),
        ("one hundred", 100),
        ("95 out of a hundred", 95),
        ("2 hundred", 200),
        ("a hundred and five", 105),
        ("two thousand three hundred and twenty-one", 2321),
        ("3.5 thousand Hz", 3500),
        ("between one hundred and two hundred", None),
        ("a dozen", None),
        ("hundreds of times", None),
    ],
)
def test_one_number_or_none(answer: str, number: float | None) -> None:
    assert read_number(answer) == number


def an_instance(label: str, metric: str, options: list[str] | None = None) -> Instance:
    return Instance(label, [{"role": "user", "content": "?"}], label, "task", metric, options)


def scored(metric: str, pairs: list[tuple[str, str]], options: list[str] | None = None) -> dict[str, Any]:
    instances = [an_instance(label, metric, options) for label, _ in pairs]
    rows = [score_answer(instance, answer) for instance, (_, answer) in zip(instances, pairs, strict=True)]
    return summarise(instances, rows)


def test_numbers_that_are_not_there_count_against_the_error_and_the_correlation() -> None:
    pairs = [("1", "1"), ("2", "2.5"), ("3", "3"), ("4", "I don't know"), ("5", "5")]
    found = scored("number", pairs)
    assert (found["n"], found["unparsed"], found["na_rate"]) == (5, 1, 0.2)
    assert found["mae_of_read"] == 0.125
    # Less is better, so what was read is divided by the share read; the correlation is multiplied by it.
    assert found["mae"] == pytest.approx(0.125 / 0.8, abs=1e-4)
    whole = scored("number", [pair for pair in pairs if pair[0] != "4"])
    assert found["pearson"] == pytest.approx(0.8 * whole["pearson"], abs=1e-3)
    assert found["majority"] == 1.2
    assert found["interval"][0] <= found["mae"] <= found["interval"][1]
    nothing = scored("number", [("1", "?"), ("2", "?")])
    assert (nothing["mae"], nothing["na_rate"], nothing["interval"]) == (None, 1.0, None)
    assert "0.156" in scores_table({"task": found})
    assert scores_table({"task": {**nothing, "rejected": 7, "missing": 3}}).split("\n")[2].split()[2] == "-"


def test_error_rates_by_word_by_character_and_by_unit() -> None:
    assert scored("wer", [("we read it", "we red it"), ("yes", "yes")])["wer"] == 0.25
    assert scored("cer", [("we read it", "we red it")])["cer"] == pytest.approx(1 / 8)
    assert scored("per", [("W IY R EH D", "W IY EH D")])["per"] == pytest.approx(1 / 5)
    assert scored("cer", [("abc", "")])["unparsed"] == 1


def test_exact_is_the_same_string_but_for_its_case() -> None:
    found = scored("exact", [("Yes", "yes"), ("Yes", "yes "), ("Yes", "yes.")])
    assert found["accuracy"] == pytest.approx(1 / 3, abs=1e-4)
    both = scored("option", [("yes", "Yes"), ("yes", "Yes, it does."), ("no", "")], ["yes", "no"])
    assert (both["accuracy"], both["exact"], both["unparsed"]) == (0.6667, 0.3333, 1)
    assert both["majority"] == pytest.approx(2 / 3)


def test_words_in_common_with_a_reference() -> None:
    assert scored("f1", [("A man laughs.", "a man laughs")])["f1"] == 1
    half = scored("f1", [("a man laughs", "a man cries"), ("a b", "")])
    assert half["f1"] == pytest.approx(1 / 3, abs=1e-3)
    assert half["unparsed"] == 1
