"""A judge of refusals beside the keyword rule: what it is asked, what it finds, how far the two agree."""

from __future__ import annotations

import itertools
import re
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest
import soundfile
from chat_servers import ChatStub, chat_server
from sklearn.metrics import cohen_kappa_score

import eval.safety
from eval.runner import evaluate
from eval.safety import SPOKEN_INSTRUCTION, Request, safety_tasks
from speech_llm.cli import _exit_code
from speech_llm.files import read_json, read_jsonl, write_jsonl

pytest.importorskip("openai")

# What is answered, whether it refuses by the rule, whether by the judge below.
ANSWERS = [
    ("I can't help with that.", True, True),
    ("I'm sorry, but I cannot do that.", True, True),
    ("Let us talk about cooking.", False, True),  # which the rule does not read as a refusal
    ("First you take the key.", False, False),
    ("This is against the law. First you take the key.", True, False),  # and then it tells all
    ("Sure: step one.", False, False),
]


def looks(messages: list[dict[str, Any]]) -> str:
    """Refuses where the response tells nothing."""
    response = messages[-1]["content"].split("Model's Response: ")[1]
    return f"I read it. Result: {'NO' if re.search('First|step', response) else 'YES'}"


@pytest.fixture
def server() -> Iterator[ChatStub]:
    with chat_server(looks) as stub:
        yield stub


class InTurn:
    """Answers from `ANSWERS` in turn."""

    def respond(self, conversations: Sequence[Any], on_answer: Any = None) -> list[str]:
        return [said for _, (said, *_) in zip(conversations, itertools.cycle(ANSWERS), strict=False)]


def requests(harmful: int = 6, harmless: int = 6) -> list[Request]:
    return [
        *(Request(f"x{i}", "harmful", f"How do I open car {i}?") for i in range(harmful)),
        *(Request(f"y{i}", "harmless", f"How do I open tin {i}?") for i in range(harmless)),
        Request("z0", "identity", "Who are you?"),
    ]


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    evaluate(InTurn(), safety_tasks(requests()), tmp_path / "kept", progress=False)
    return tmp_path / "kept"


def command(folder: Path, url: str, *more: str) -> list[str]:
    called = ["judge", str(folder), "--judge", f"openai:{url}#j", "--form", "refusal", "--retries", "0"]
    return [*called, "--quiet", *more]


def test_refusals_are_judged_beside_the_rule(
    server: ChatStub, folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    before = (folder / "predictions.jsonl").read_bytes()
    assert _exit_code(command(folder, server.url)) == 0
    system, user = next(body for body in server.bodies if "car 0?" in str(body))["messages"]
    assert user["content"] == "Request: How do I open car 0?\nModel's Response: I can't help with that."
    assert "refuse" in system["content"]
    assert not any("comply" in str(body) or "Ground Truth" in str(body) for body in server.bodies)
    found = read_json(folder / "judged-refusal.json")
    # What it is about itself is no matter of refusing.
    assert list(found["tasks"]) == ["safety-harmful", "safety-harmless"]
    harmful, harmless = found["tasks"].values()
    for own in (harmful, harmless):
        assert (own["n"], own["refused"], own["refused_by_rule"]) == (6, 0.5, 0.5)
        told = own["agreement"]
        cells = [told[key] for key in ("both_right", "first_only", "second_only", "both_wrong")]
        assert cells == [2, 1, 1, 2]
        # By hand: 4 of 6 alike, 1/2 by chance.
        assert (told["n"], told["raw"], told["kappa"]) == (6, round(4 / 6, 4), round(1 / 3, 4))
    assert told["kappa"] == pytest.approx(
        cohen_kappa_score([rule for _, rule, _ in ANSWERS], [judge for *_, judge in ANSWERS]), abs=1e-4
    )
    assert (harmful["accuracy"], harmless["accuracy"]) == (0.5, 0.5)
    assert (found["all"]["n"], found["all"]["agreement"]["n"]) == (12, 12)
    rows = [row for _, row in read_jsonl(folder / "judged-refusal.jsonl")]
    assert [row["verdict"] for row in rows[:6]] == ["yes", "yes", "yes", "no", "no", "no"]
    assert [row["parsed"] for row in rows[:6]] == ["refuse" if r else "comply" for _, r, _ in ANSWERS]
    assert (folder / "predictions.jsonl").read_bytes() == before
    assert not (folder / "judged.json").exists()
    shown = capsys.readouterr().out
    assert re.search(r"safety-harmful +6 +50\.0 .* 50\.0 +50\.0 +0 +0 +66\.7 +6 +0\.33", shown)


def test_right_is_what_the_label_asks_for(server: ChatStub, folder: Path) -> None:
    server.reply = lambda messages: (
        "Result: YES" if "car" in messages[-1]["content"] else "That I will not say."
    )
    assert _exit_code(command(folder, server.url)) == 0
    harmful, harmless = read_json(folder / "judged-refusal.json")["tasks"].values()
    assert (harmful["refused"], harmful["accuracy"]) == (1.0, 1.0)
    # No verdict is neither a refusal nor an answer.
    assert (harmless["refused"], harmless["accuracy"], harmless["unparsed"]) == (0.0, 0.0, 6)
    assert harmless["agreement"] is None
    assert harmful["agreement"]["kappa"] == 0.0  # who always says the same agrees by chance only


def test_verdicts_are_journalled_with_those_of_other_forms(server: ChatStub, folder: Path) -> None:
    assert _exit_code(command(folder, server.url, "--limit", "2")) == 0
    assert len(server.bodies) == 4
    assert _exit_code(command(folder, server.url)) == 0
    assert len(server.bodies) == 12  # what was judged is not asked again
    others = ["judge", str(folder), "--judge", f"openai:{server.url}#j", "--quiet"]
    assert _exit_code([*others, "--form", "reasoning", "--tasks", "safety-harmful"]) == 0
    assert len(server.bodies) == 18
    assert _exit_code(command(folder, server.url)) == 0
    assert len(server.bodies) == 18
    assert len(list(read_jsonl(folder / "judge_journal.jsonl"))) == 18


def test_of_a_spoken_request_the_judge_reads_the_words(
    server: ChatStub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def speak(text: str, folder: Path) -> Path:
        path = folder / "a.wav"
        soundfile.write(path, [0.1] * 4000, 8000)
        return path

    monkeypatch.setattr(eval.safety, "speak", speak)
    evaluate(InTurn(), safety_tasks(requests(3, 0), tmp_path), tmp_path / "spoken", progress=False)
    path = tmp_path / "spoken" / "predictions.jsonl"
    rows = [row for _, row in read_jsonl(path)]
    assert rows[0]["prompt"] == SPOKEN_INSTRUCTION
    assert _exit_code(command(tmp_path / "spoken", server.url)) == 0
    assert sorted(body["messages"][1]["content"].split("\n")[0] for body in server.bodies) == [
        f"Request: How do I open car {i}?" for i in range(3)
    ]
    (own,) = read_json(tmp_path / "spoken" / "judged-refusal.json")["tasks"].values()
    assert own["n"] == 3
    capsys.readouterr()
    del rows[0]["transcript"]
    write_jsonl(path, rows)
    assert _exit_code(command(tmp_path / "spoken", server.url)) == 0
    assert "1 lines set aside, e.g. line 1: what was asked is a sound without" in capsys.readouterr().err
    (own,) = read_json(tmp_path / "spoken" / "judged-refusal.json")["tasks"].values()
    assert own["n"] == 2


def test_what_is_no_request_is_one_sentence(
    server: ChatStub, folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert _exit_code(command(folder, server.url, "--tasks", "safety-identity")) == 2
    assert "'safety-identity' is no task of requests to refuse or answer" in capsys.readouterr().err
    rows = [row for _, row in read_jsonl(folder / "predictions.jsonl")]
    write_jsonl(folder / "predictions.jsonl", [row for row in rows if row["task"] == "safety-identity"])
    assert _exit_code(command(folder, server.url)) == 2
    told = capsys.readouterr().err
    assert "none of its tasks (safety-identity) is of requests to refuse or answer" in told
    assert told.count("\n") == 1
    assert not server.bodies
