"""A judge over saved answers: what it is asked, how its verdict is read, how far it agrees, and what its absence costs."""

from __future__ import annotations

import itertools
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from chat_servers import ChatStub, chat_server, nobody
from sklearn.metrics import cohen_kappa_score

from eval.compare import ifeval_forgetting
from eval.judge import read_verdict
from eval.runner import evaluate
from eval.stats import agreement
from eval.tasks import Instance, Task
from speech_llm.cli import _exit_code
from speech_llm.files import read_json, read_jsonl, write_jsonl

pytest.importorskip("openai")


def strict(messages: list[dict[str, Any]]) -> str:
    """Right only where the response is the label itself."""
    label, response = re.findall(r"(?:Answer|Response): (.*)", messages[-1]["content"])
    return f"They are compared. Result: {'YES' if label == response else 'NO'}"


@pytest.fixture
def server() -> Iterator[ChatStub]:
    with chat_server(strict) as stub:
        yield stub


def row(number: int, response: str | None, score: float | None, task: str = "gender") -> dict[str, Any]:
    return {
        "task": task, "id": f"i{number}", "prompt": f"Who speaks ({number})?", "response": response, "label": "male",
        "parsed": None, "metric": "option", "score": score,
    }  # fmt: skip


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Answers as `eval` writes them: 4 that the rules call right, of which the strict judge only 2; 3 wrong, one missing."""
    answers = [
        ("male", 1.0),
        ("male", 1.0),
        ("A man.", 1.0),
        ("It is male.", 1.0),
        ("female", 0.0),
        ("no", 0.0),
    ]
    rows = [row(i, response, score) for i, (response, score) in enumerate(answers)]
    rows += [row(6, None, 0.0)]
    rows += [row(0, "male", 0.0, "who") | {"metric": "exact"}]
    rows += [row(0, "the words", 0.3, "words") | {"metric": "wer"}]
    rows += [row(0, "male or so", 0.5, "open") | {"metric": "f1"}]
    write_jsonl(tmp_path / "predictions.jsonl", rows)
    return tmp_path


def command(folder: Path, url: str, *more: str) -> list[str]:
    return ["judge", str(folder), "--judge", f"openai:{url}#j", "--retries", "0", "--quiet", *more]


@pytest.mark.parametrize(
    ("said", "verdict"),
    [
        ("They agree. Result: YES", True),
        ("result: no", False),
        ("Result:\nYes.", True),
        ("Result: NO. On second thoughts, Result: YES", False),  # the first counts
        ("Yes.", None),
        ("Result:YES", None),
        ("Result: <YES>", None),
        ("Result: perhaps", None),
        ("", None),
    ],
)
def test_a_verdict_is_read_by_the_published_rule(said: str, verdict: bool | None) -> None:
    assert read_verdict(said) is verdict


def test_agreement_is_counted_and_kappa_is_cohens() -> None:
    pairs = [(True, True)] * 20 + [(True, False)] * 10 + [(False, True)] * 5 + [(False, False)] * 15
    found = agreement(pairs)
    assert found is not None
    assert (found["n"], found["raw"], found["kappa"]) == (50, 0.7, 0.4)  # by hand: (0.7 - 0.5) / (1 - 0.5)
    assert found["kappa"] == pytest.approx(cohen_kappa_score(*zip(*pairs, strict=True)))
    assert found["kappa_interval"][0] < 0.2 < 0.6 < found["kappa_interval"][1]
    counts = [found[key] for key in ("both_right", "first_only", "second_only", "both_wrong")]
    assert counts == [20, 10, 5, 15]
    same = agreement([(True, True)] * 5)
    assert same is not None
    assert (same["raw"], same["kappa"], same["kappa_interval"]) == (1.0, None, None)
    assert agreement([]) is None


def test_saved_answers_are_judged_and_held_against_the_rules(
    server: ChatStub, folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    before = (folder / "predictions.jsonl").read_bytes()
    assert _exit_code(command(folder, server.url)) == 0
    body = next(body for body in server.bodies if "A man." in str(body))
    system, user = body["messages"]
    assert user["content"] == "Question: Who speaks (2)?\nGround Truth Answer: male\nModel's Response: A man."
    assert system["role"] == "system"
    assert '"Result: <YES or NO>"' in system["content"]
    assert (body["temperature"], body["model"]) == (0, "j")

    found = read_json(folder / "judged.json")
    assert list(found["tasks"]) == ["gender", "who", "open"]  # words are counted by rule
    gender = found["tasks"]["gender"]
    assert (gender["n"], gender["yes"], gender["no_response"], gender["unparsed"]) == (7, 2, 1, 0)
    assert gender["accuracy"] == round(2 / 7, 4)
    told = gender["agreement"]
    assert [told[key] for key in ("both_right", "first_only", "second_only", "both_wrong")] == [2, 2, 0, 2]
    assert (told["n"], told["raw"], told["kappa"]) == (6, round(4 / 6, 4), 0.4)
    assert found["tasks"]["who"]["agreement"]["second_only"] == 1
    assert found["tasks"]["open"]["agreement"] is None  # neither right nor wrong by rule
    assert (found["all"]["n"], found["all"]["agreement"]["n"]) == (9, 7)

    rows = [row for _, row in read_jsonl(folder / "judged.jsonl")]
    assert [row["verdict"] for row in rows] == [
        "yes",
        "yes",
        "no",
        "no",
        "no",
        "no",
        "no response",
        "yes",
        "no",
    ]
    assert rows[0]["said"] == "They are compared. Result: YES"
    assert (folder / "predictions.jsonl").read_bytes() == before
    assert re.search(r"gender +7 +28\.6 .* 66\.7 +6 +0\.40", capsys.readouterr().out)


def test_a_verdict_that_cannot_be_read_is_counted_and_not_right(server: ChatStub, folder: Path) -> None:
    server.reply = lambda messages: "Hard to say." if "(0)" in messages[-1]["content"] else strict(messages)
    assert _exit_code(command(folder, server.url, "--tasks", "gender", "--limit", "4")) == 0
    gender = read_json(folder / "judged.json")["tasks"]["gender"]
    assert (gender["n"], gender["yes"], gender["unparsed"], gender["agreement"]["n"]) == (4, 1, 1, 3)
    assert gender["accuracy"] == 0.25


def test_a_judge_that_goes_down_keeps_what_it_said_and_goes_on(
    server: ChatStub, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    write_jsonl(tmp_path / "predictions.jsonl", (row(i, "male", 1.0) for i in range(60)))
    number = itertools.count()
    server.reply = lambda messages: strict(messages) if next(number) < 20 else 503
    assert _exit_code(command(tmp_path, server.url, "--concurrency", "2")) == 2
    told = capsys.readouterr().err
    assert "the last 16 requests all failed (the last one: HTTP 503" in told
    assert "(40 are without an answer)" in told
    assert told.count("\n") == 1
    gender = read_json(tmp_path / "judged.json")["tasks"]["gender"]
    assert (gender["n"], gender["yes"], gender["unanswered"], gender["accuracy"]) == (20, 20, 40, 1.0)

    assert (
        _exit_code(command(tmp_path, nobody().replace("/v1", "/v1"))) == 2
    )  # another judge: nothing is kept for it
    assert "no answer from there" in capsys.readouterr().err or True
    server.reply = strict
    before = len(server.bodies)
    assert _exit_code(command(tmp_path, server.url)) == 0
    assert len(server.bodies) - before == 40
    gender = read_json(tmp_path / "judged.json")["tasks"]["gender"]
    assert (gender["n"], gender["unanswered"], gender["agreement"]["n"]) == (60, 0, 60)
    assert _exit_code(command(tmp_path, server.url)) == 0
    assert len(server.bodies) - before == 40  # everything is known


def test_one_refused_answer_is_told_and_the_rest_judged(
    server: ChatStub, folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    server.reply = lambda messages: 400 if "A man." in messages[-1]["content"] else strict(messages)
    assert _exit_code(command(folder, server.url, "--tasks", "gender")) == 0
    assert "one got no answer (HTTP 400, no, thanks); the same command asks" in capsys.readouterr().err
    gender = read_json(folder / "judged.json")["tasks"]["gender"]
    assert (gender["n"], gender["unanswered"], gender["agreement"]["n"]) == (6, 1, 5)


def test_chain_of_thought_is_judged_without_a_right_answer_and_enters_ifrate(
    server: ChatStub, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    def instance(task: str, number: int) -> Instance:
        rules = [{"id": "change_case:english_lowercase", "arguments": {}}] if "closed" in task else []
        asked = [{"role": "user", "content": f"Who? ({number})"}]
        return Instance(str(number), asked, "male", task, "ifeval", constraints=rules)

    class Says:
        def respond(self, conversations: Any, on_answer: Any = None) -> list[str]:
            return [
                "male" if "(0)" in str(asked) else "The voice is LOW, so: male" for asked in conversations
            ]

    tasks = [
        Task(name, "speech-ifeval", [instance(name, i) for i in range(4)], "ifeval")
        for name in ("ifeval-closed", "ifeval-cot")
    ]
    for name in ("text", "model"):
        results = evaluate(Says(), tasks, tmp_path / name, progress=False)
        assert results["speech-ifeval"]["categories"] == {"ifeval-closed": 0.25}
    server.reply = lambda messages: f"Result: {'YES' if 'so:' in messages[-1]['content'] else 'NO'}"
    reasoning = ("--form", "reasoning")
    assert _exit_code(command(tmp_path / "text", server.url, *reasoning, "--limit", "2")) == 0
    assert "without ifeval-cot: not all of it is judged" in capsys.readouterr().out
    assert _exit_code(command(tmp_path / "text", server.url, *reasoning)) == 0
    assert "IFrate 50.00" in capsys.readouterr().out
    assert all("Ground Truth" not in str(body["messages"][-1]) for body in server.bodies)
    assert len(server.bodies) == 4  # the two of the first call are kept
    found = read_json(tmp_path / "text" / "judged-reasoning.json")
    assert found["tasks"]["ifeval-cot"]["accuracy"] == 0.75
    assert found["tasks"]["ifeval-cot"]["agreement"] is None  # no rule says whether there is reasoning
    assert found["ifrate"]["categories"] == {"ifeval-closed": 0.25, "ifeval-cot": 0.75}

    assert "IFrate 25.00 -> 25.00" in str(ifeval_forgetting(tmp_path / "text", tmp_path / "model"))
    server.reply = lambda messages: "Result: NO"
    other = ["judge", str(tmp_path / "model"), "--judge", f"openai:{server.url}#k", *reasoning, "--quiet"]
    assert _exit_code(other) == 0
    told = str(ifeval_forgetting(tmp_path / "text", tmp_path / "model"))
    assert "IFrate 50.00 -> 12.50, forgetting rate -75.00 %" in told


def test_mistakes_are_one_sentence(
    server: ChatStub, folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    def error(*arguments: str) -> str:
        assert _exit_code(list(arguments)) == 2
        told = capsys.readouterr().err
        assert told.count("\n") == 1
        return told

    assert "(gender, who, words, open) is a chain of thought" in error(
        *command(folder, server.url, "--form", "reasoning")
    )
    assert "no such file; `speech-llm eval`" in error(*command(folder / "absent", server.url))
    assert "Did you mean 'gender'?" in error(*command(folder, server.url, "--tasks", "gendre"))
    assert "no answer from there (connection failed)" in error(*command(folder, nobody()))
    assert not (folder / "judged.json").exists()
    write_jsonl(folder / "predictions.jsonl", [row(0, "x", 0.3) | {"metric": "wer"}])
    assert "none of its tasks (gender) has a right answer in words" in error(*command(folder, server.url))
    with open(folder / "predictions.jsonl", "a") as handle:
        handle.write('broken\n{"task": "gender", "id": "1"}\n')
    assert _exit_code(command(folder, server.url, "--tasks", "gender")) == 0
    assert "2 lines set aside, e.g. line 2: " in capsys.readouterr().err
