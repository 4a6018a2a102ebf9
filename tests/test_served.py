"""A model behind a server as MODEL of `eval` and `chat`: what is sent, and what a server that fails costs."""

from __future__ import annotations

import base64
import io
import itertools
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import soundfile
from chat_servers import ChatStub, chat_server, nobody, said

from eval.report import write_report
from eval.runner import evaluate
from eval.tasks import Instance, Task
from speech_llm.chat_server import ServerSettings
from speech_llm.cli import _exit_code
from speech_llm.errors import UserError
from speech_llm.files import read_json, read_jsonl, write_jsonl
from speech_llm.responders import load_responder
from speech_llm.streaming import Drawing

pytest.importorskip("openai")


@pytest.fixture
def server() -> Iterator[ChatStub]:
    with chat_server(lambda messages: "A " + ("male" if "odd" in said(messages) else "female")) as stub:
        yield stub


@pytest.fixture
def sound(tmp_path: Path) -> Path:
    path = tmp_path / "a.flac"
    soundfile.write(path, 0.3 * np.sin(np.arange(8000) / 5).astype(np.float32), 8000)
    return path


def conversation(text: str, sound: Path, **parts: Any) -> list[dict[str, Any]]:
    audio = {"type": "audio", "path": str(sound), **parts}
    return [{"role": "user", "content": [audio, {"type": "text", "text": text}]}]


def write_tasks(path: Path, sound: Path, count: int) -> Path:
    write_jsonl(
        path,
        (
            {
                "task": "gender",
                "id": f"i{i}",
                "messages": conversation(f"{'odd' if i % 2 else 'even'} {i}?", sound, description="D."),
                "label": "male" if i % 2 else "female",
                "options": ["female", "male"],
            }
            for i in range(count)
        ),
    )
    return path


def test_the_server_gets_the_sound_and_a_greedy_request(server: ChatStub, sound: Path) -> None:
    model = load_responder(f"openai:{server.url}#some/model", max_new_tokens=7)
    history = [{"role": "user", "content": "Hello"}, {"role": "assistant", "content": "Hi"}]
    asked = [*history, *conversation("odd?", sound)]
    text_only = [{"role": "user", "content": [{"type": "text", "text": "even?"}]}]
    assert model.respond([asked, text_only, asked]) == ["A male", "A female", "A male"]
    assert len(server.bodies) == 2  # the same question is asked once
    by_text = {said(body["messages"]): body for body in server.bodies}
    body = by_text["odd?"]
    assert (body["model"], body["temperature"], body["max_tokens"]) == ("some/model", 0, 7)
    assert body["messages"][:2] == history
    part, question = body["messages"][2]["content"]
    assert question == {"type": "text", "text": "odd?"}
    assert (part["type"], part["input_audio"]["format"]) == ("input_audio", "wav")
    samples, rate = soundfile.read(io.BytesIO(base64.b64decode(part["input_audio"]["data"])))
    assert (rate, samples.shape) == (16000, (16000,))
    assert np.abs(samples).max() == pytest.approx(0.3, abs=0.02)
    assert by_text["even?"]["messages"] == [{"role": "user", "content": "even?"}]


def test_one_answer_alone_is_drawn_as_asked_and_a_failure_is_a_sentence(
    server: ChatStub, sound: Path
) -> None:
    model = load_responder(f"openai:{server.url}#m", server=ServerSettings(retries=0))
    told: list[str] = []
    drawing = Drawing(max_new_tokens=9, temperature=0.7, top_p=0.9, seed=3)
    answer = model.stream(conversation("odd?", sound), drawing, told.append)  # type: ignore[attr-defined]
    assert (answer.text, told) == ("A male", ["A male"])
    body = server.bodies[0]
    assert [body[key] for key in ("max_tokens", "temperature", "top_p", "seed")] == [9, 0.7, 0.9, 3]
    server.reply = lambda _: 500
    with pytest.raises(UserError, match=r"there was no answer \(HTTP 500, no, thanks\)"):
        model.stream(conversation("odd?", sound), Drawing(), told.append)  # type: ignore[attr-defined]
    server.reply = lambda _: "again"
    assert model.stream(conversation("odd?", sound), Drawing(), told.append).text == "again"  # type: ignore[attr-defined]
    assert [server.bodies[-1].get(key) for key in ("temperature", "seed")] == [0, None]


def test_as_a_text_llm_it_reads_what_stands_in_for_the_sound(server: ChatStub, sound: Path) -> None:
    asked = conversation("What?", sound, description="A woman.", transcript="Good day")
    asked[0]["content"][0]["example"] = {"context": "A man.", "answer": "Male."}
    for kind in ("text", "cascade", "teacher"):
        load_responder(f"{kind}:openai:{server.url}#m").respond([asked])
    shown = [[turn["content"] for turn in body["messages"]] for body in server.bodies]
    assert shown == [
        ["A woman.\nWhat?"],
        ['Someone says: "Good day"\nWhat?'],
        ["A man.\nWhat?", "Male.", "A woman.\nWhat?"],
    ]


def test_without_a_name_the_only_model_is_asked(server: ChatStub, sound: Path) -> None:
    server.models = ["only"]
    load_responder(f"openai:{server.url}").respond([conversation("odd?", sound)])
    assert server.bodies[0]["model"] == "only"
    server.models = ["one", "two"]
    with pytest.raises(UserError, match=r"has 2 models \(one, two\); name the one to ask behind '#'"):
        load_responder(f"openai:{server.url}")
    with pytest.raises(UserError, match=r"no server can be reached there"):
        load_responder(f"openai:{nobody()}", server=ServerSettings(retries=0))
    with pytest.raises(UserError, match=r"behind 'openai:' the server's URL is needed"):
        load_responder("openai:gpt")


def test_the_key_is_the_one_that_was_named(
    server: ChatStub, sound: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("OPENAI_API_KEY", "private")
    monkeypatch.setenv("PEER_KEY", "sesame")
    load_responder(f"openai:{server.url}#m").respond([conversation("odd?", sound)])
    settings = ServerSettings(api_key_env="PEER_KEY")
    load_responder(f"openai:{server.url}#m", server=settings).respond([conversation("odd?", sound)])
    assert server.keys == ["Bearer none", "Bearer sesame"]


def test_what_a_server_refuses_is_unanswered_and_asked_again(
    server: ChatStub, sound: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    tasks, out = write_tasks(tmp_path / "t.jsonl", sound, 6), tmp_path / "out"
    command = ["eval", f"openai:{server.url}#m", "--tasks", f"jsonl:{tasks}", "--out", str(out)]
    command += ["--retries", "0", "--quiet"]
    good = server.reply
    server.reply = lambda messages: 400 if said(messages) in ("odd 3?", "even 4?") else good(messages)
    assert _exit_code(command) == 0
    assert "2 got no answer (HTTP 400: 2; the last one: no, thanks)" in capsys.readouterr().err
    found = read_json(out / "results.json")["gender"]
    assert (found["n"], found["unanswered"], found["accuracy"]) == (6, 2, round(4 / 6, 4))
    rows = [row for _, row in read_jsonl(out / "predictions.jsonl")]
    assert [row["response"] for row in rows] == ["A female", "A male", "A female", None, None, "A male"]
    assert write_report([out], tmp_path / "report.html") == []
    assert "None" not in (tmp_path / "report.html").read_text()

    server.reply = good
    before = len(server.bodies)
    assert _exit_code(command) == 0
    assert sorted(server.asked()[before:]) == ["even 4?", "odd 3?"]
    found = read_json(out / "results.json")["gender"]
    assert (found["accuracy"], "unanswered" in found) == (1.0, False)


def test_a_server_that_goes_away_leaves_what_it_answered(
    server: ChatStub, sound: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    tasks, out = write_tasks(tmp_path / "t.jsonl", sound, 60), tmp_path / "out"
    command = ["eval", f"openai:{server.url}#m", "--tasks", f"jsonl:{tasks}", "--out", str(out)]
    command += ["--retries", "0", "--concurrency", "2", "--quiet"]
    good = server.reply
    number = itertools.count()
    server.reply = lambda messages: good(messages) if next(number) < 20 else 503
    assert _exit_code(command) == 2
    shown = capsys.readouterr()
    assert "the last 16 requests all failed (the last one: HTTP 503" in shown.err
    assert "(40 are without an answer)" in shown.err
    assert shown.err.count("\n") == 1
    found = read_json(out / "results.json")["gender"]
    assert (found["n"], found["unanswered"], found["accuracy"]) == (60, 40, round(20 / 60, 4))
    assert len(server.bodies) < 60  # it was not asked for ever

    server.reply = good
    before = len(server.bodies)
    assert _exit_code(command) == 0
    assert len(server.bodies) - before == 40
    assert read_json(out / "results.json")["gender"]["accuracy"] == 1.0


def test_where_there_is_no_server_one_sentence_says_so(
    server: ChatStub, sound: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    tasks, out = write_tasks(tmp_path / "t.jsonl", sound, 3), tmp_path / "out"
    command = ["eval", f"openai:{nobody()}#m", "--tasks", f"jsonl:{tasks}", "--out", str(out)]
    assert _exit_code([*command, "--retries", "0", "--quiet"]) == 2
    told = capsys.readouterr().err
    assert told.startswith("error: http://127.0.0.1:")
    assert "no answer from there (connection failed)" in told
    assert told.count("\n") == 1
    assert not (out / "results.json").exists()
    server.reply = lambda messages: 404
    assert _exit_code(["chat", f"openai:{server.url}#absent", "Hello"]) == 2
    assert "refused the request for model 'absent' (HTTP 404" in capsys.readouterr().err


def test_a_task_that_a_server_cannot_do_is_told_before_anything_is_asked(
    server: ChatStub, sound: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    tasks = f"jsonl:{write_tasks(tmp_path / 't.jsonl', sound, 3)},general:code"
    command = ["eval", f"openai:{server.url}#m", "--tasks", tasks, "--out", str(tmp_path / "out"), "--quiet"]
    assert _exit_code(command) == 2
    assert "(a server gives texts only); leave the task out" in capsys.readouterr().err
    assert not server.bodies


def test_a_sound_that_cannot_be_sent_costs_its_own_instance(
    server: ChatStub, sound: Path, tmp_path: Path
) -> None:
    broken = tmp_path / "broken.wav"
    broken.write_bytes(b"no sound")
    model = load_responder(f"openai:{server.url}#m")
    asked = [conversation(f"odd {i}?", broken) for i in range(20)] + [conversation("even?", sound)]
    assert model.respond(asked) == [None] * 20 + ["A female"]
    assert "20 got no answer (could not be asked: 20" in (model.trouble() or "")  # type: ignore[attr-defined]
    assert "broken.wav" in (model.trouble() or "")  # type: ignore[attr-defined]
    assert len(server.bodies) == 1


def test_no_answer_is_never_right(tmp_path: Path) -> None:
    class Silent:
        def respond(self, conversations: Any, on_answer: Any = None) -> list[None]:
            return [None for _ in conversations]

    asked: list[dict[str, Any]] = [{"role": "user", "content": "?"}]
    labels = {"wer": "", "exact": "", "f1": "", "number": "0", "refusal": "comply"}
    tasks = [
        Task(name, "", [Instance("1", asked, label, name, name)], name) for name, label in labels.items()
    ]
    found = evaluate(Silent(), tasks, tmp_path, progress=False)
    assert {name: result["unanswered"] for name, result in found.items()} == dict.fromkeys(labels, 1)
    assert (found["wer"]["wer"], found["exact"]["accuracy"], found["f1"]["f1"]) == (1.0, 0.0, 0.0)
    assert (found["number"]["mae"], found["refusal"]["accuracy"]) == (None, 0.0)
    assert not (tmp_path / "journal.jsonl").read_text()


def test_chat_with_a_server(
    server: ChatStub, sound: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    assert _exit_code(["chat", f"openai:{server.url}#m", str(sound), "odd?"]) == 0
    assert capsys.readouterr().out == "A male\n"
    server.reply = lambda messages: 400
    assert _exit_code(["chat", f"openai:{server.url}#m", "odd?"]) == 2
    assert "one got no answer (HTTP 400, no, thanks)" in capsys.readouterr().err
