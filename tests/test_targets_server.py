"""The teacher behind a server: what a real one answers, and what a misbehaving one costs."""

from __future__ import annotations

import http.server
import json
import os
import socket
import subprocess
import sys
import threading
import time
import urllib.request
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from chat_servers import quick_retries

from speech_llm.chat_server import NoAnswer
from speech_llm.errors import UserError
from speech_llm.files import read_jsonl, write_jsonl
from speech_llm.recipe import load_recipe
from speech_llm.targets.questions import Question
from speech_llm.targets.run import write_targets
from speech_llm.targets.teacher import Sampling, TransformersTeacher, open_teacher
from speech_llm.targets.teacher_server import ServerTeacher
from speech_llm.targets.teacher_vllm import VllmTeacher

pytest.importorskip("openai")


class Misbehaving(http.server.BaseHTTPRequestHandler):
    """Answers a chat by what its last turn says: well, late, with nonsense, with half a line, with an error."""

    protocol_version = "HTTP/1.1"
    lock = threading.Lock()
    requests: Counter[str]
    bodies: list[dict[str, Any]]
    keys: list[tuple[str | None, str | None]]
    under_way = most_under_way = 0
    release: threading.Event

    def do_POST(self) -> None:
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        asked = body["messages"][-1]["content"].split("\n")[0]
        kind = asked.split()[0]
        cls = type(self)
        with cls.lock:
            cls.requests[asked] += 1
            tries = cls.requests[asked]
            cls.bodies.append(body)
            cls.keys.append((self.headers.get("Authorization"), self.headers.get("OpenAI-Organization")))
            cls.under_way += 1
            cls.most_under_way = max(cls.most_under_way, cls.under_way)
        try:
            self.reply(kind, tries, asked)
        except (BrokenPipeError, ConnectionResetError):
            pass
        finally:
            with cls.lock:
                cls.under_way -= 1

    def reply(self, kind: str, tries: int, asked: str) -> None:
        good = json.dumps(
            {
                "id": "1",
                "object": "chat.completion",
                "created": 0,
                "model": "m",
                "choices": [
                    {
                        "index": 0,
                        "finish_reason": "stop",
                        "message": {"role": "assistant", "content": f" heard: {asked} "},
                    }
                ],
                "usage": {"prompt_tokens": 1, "completion_tokens": 4, "total_tokens": 5},
            }
        )
        if kind == "late":
            type(self).release.wait(20)
        if kind == "meanwhile":
            time.sleep(0.05)  # so that requests overlap
        if kind == "broken":
            return self.send(500, "{}")
        if kind == "busy" and tries < 3:
            return self.send(503, "{}")
        if kind == "refused":
            return self.send(401, json.dumps({"error": {"message": "no such key"}}))
        text = {
            "page": "<html>It works!</html>",
            "half": good[: len(good) // 2],
            "other": '{"hello": 1}',
            "list": "[1, 2]",
            "empty": good.replace(f" heard: {asked} ", "  "),
            "null": good.replace(f'" heard: {asked} "', "null"),
        }.get(kind, good)
        if kind == "cut":  # says how much is coming and hangs up half-way
            return self.send(200, good, cut=len(good) // 2)
        return self.send(200, text, html=kind == "page")

    def send(self, status: int, text: str, cut: int | None = None, html: bool = False) -> None:
        data = text.encode()
        self.send_response(status)
        self.send_header("Content-Type", "text/html" if html else "application/json")
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        self.wfile.write(data[:cut])
        self.close_connection = cut is not None

    def log_message(self, *args: Any) -> None:
        pass


@pytest.fixture
def server() -> Iterator[tuple[str, type[Misbehaving]]]:
    handler = type(
        "Handler",
        (Misbehaving,),
        {"requests": Counter(), "bodies": [], "keys": [], "release": threading.Event()},
    )
    with quick_retries(), http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler) as running:
        running.daemon_threads = True
        thread = threading.Thread(target=running.serve_forever, daemon=True)
        thread.start()
        yield f"http://127.0.0.1:{running.server_port}/v1", handler
        handler.release.set()
        running.shutdown()
        thread.join()


def ask(teacher: ServerTeacher, *contexts: str) -> dict[str, str | NoAnswer]:
    found: dict[str, str | NoAnswer] = {}

    def done(question: Question, answer: str | NoAnswer, tokens: int) -> None:
        assert question.context not in found
        found[question.context] = answer
        assert tokens == (0 if isinstance(answer, NoAnswer) else 4)

    teacher.answer([Question(context, "What can you hear?") for context in contexts], done)
    return found


def test_each_kind_of_misbehaviour_costs_its_own_row_and_is_named(
    server: tuple[str, type[Misbehaving]],
) -> None:
    url, handler = server
    teacher = ServerTeacher(url, "m", Sampling(), retries=3, timeout_s=1.0, concurrency=4)
    bad = {
        "page": "not an answer",
        "half": "not an answer",
        "other": "not an answer",
        "list": "not an answer",
        "empty": "not an answer",
        "null": "not an answer",
        "broken": "HTTP 500",
        "cut": "connection failed",
        "late": "timed out",
    }
    found = ask(teacher, "good a", *bad, "busy", "good b")
    assert {name: found[name] for name in bad} == {name: NoAnswer(why) for name, why in bad.items()}
    assert found["good a"] == "heard: good a"
    assert found["busy"] == "heard: busy"  # two refusals, then an answer
    assert handler.requests["busy"] == 3
    assert handler.requests["broken"] == handler.requests["late"] == 4


def test_requests_are_bounded_and_say_what_is_sampled(server: tuple[str, type[Misbehaving]]) -> None:
    url, handler = server
    teacher = ServerTeacher(url, "m", Sampling(7, 0.7, 0.9, seed=3), concurrency=3)
    ask(teacher, *(f"meanwhile {i}" for i in range(12)))
    assert handler.most_under_way == 3
    assert all(body["max_tokens"] == 7 and body["temperature"] == 0.7 for body in handler.bodies)
    assert len({body["seed"] for body in handler.bodies}) == 12
    assert {body["model"] for body in handler.bodies} == {"m"}
    ask(ServerTeacher(url, "m", Sampling()), "good")
    assert handler.bodies[-1]["temperature"] == 0
    assert "seed" not in handler.bodies[-1]


def test_the_key_comes_from_the_environment_and_goes_nowhere_unasked(
    server: tuple[str, type[Misbehaving]], monkeypatch: pytest.MonkeyPatch
) -> None:
    url, handler = server
    monkeypatch.setenv("OPENAI_API_KEY", "private")
    monkeypatch.setenv("OPENAI_ORG_ID", "private")
    monkeypatch.setenv("SOME_KEY", "sesame")
    ask(ServerTeacher(url, "m", Sampling()), "good a")
    ask(ServerTeacher(url, "m", Sampling(), api_key_env="SOME_KEY"), "good b")
    assert "private" not in str(handler.keys)
    assert handler.keys[1] == ("Bearer sesame", None)
    with pytest.raises(UserError, match="environment variable ABSENT is not set"):
        ServerTeacher(url, "m", Sampling(), api_key_env="ABSENT")


def test_a_server_that_refuses_or_is_gone_stops_the_stage_with_a_sentence(
    server: tuple[str, type[Misbehaving]],
) -> None:
    url, handler = server
    with pytest.raises(UserError, match=r"refused the request for model 'm' \(HTTP 401: .*no such key"):
        ask(ServerTeacher(url, "m", Sampling(), concurrency=1), "refused")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        gone = f"http://127.0.0.1:{free.getsockname()[1]}/v1"
    with pytest.raises(
        UserError, match=r"the last 16 requests all failed \(the last one: connection failed\)"
    ):
        ask(ServerTeacher(gone, "m", Sampling(), retries=0), *(f"good {i}" for i in range(40)))
    assert handler.requests.total() == 1


def described(tmp_path: Path, contexts: list[str]) -> Path:
    """A run folder with clips whose descriptions begin with these words."""
    path = tmp_path / "describe" / "train.jsonl"
    clips = [
        {"id": f"c{i}", "audio": f"c{i}.wav", "attributes": {"transcript": context}}
        for i, context in enumerate(contexts)
    ]
    write_jsonl(path, clips)
    return path


def small_recipe(tmp_path: Path, **teacher: Any) -> Any:
    (tmp_path / "pool.yaml").write_text("prompts: [{id: go-on, text: Go on., asks: []}]\n")
    path = tmp_path / "small.yaml"
    path.write_text(
        "data: {synthesize: {}}\ndescribe: {use: [transcript, labels]}\n"
        "targets: {strategy: continuation, prompts: pool.yaml, perplexity_rows: 0, worked_example: false,"
        f" max_new_tokens: 12, teacher: {json.dumps({'backend': 'openai', **teacher})}}}\n"
        "eval: {prompts: pool.yaml}\n"
    )
    return load_recipe(path)


def test_a_stage_goes_on_from_its_journal_after_the_server_misbehaved(
    tmp_path: Path, server: tuple[str, type[Misbehaving]]
) -> None:
    url, handler = server
    contexts = ["good a", "half b", "good c", "page d", "late e"]
    recipe = small_recipe(tmp_path, url=url, timeout_s=0.5, retries=0)
    counts = write_targets(recipe, described(tmp_path, contexts), tmp_path / "targets", progress=False)
    assert (counts["kept"], counts["unanswered"]) == (2, {"not an answer": 2, "timed out": 1})
    reasons = Counter(row["reason"] for _, row in read_jsonl(tmp_path / "targets" / "rejects.jsonl"))
    assert reasons == {"no answer: not an answer": 2, "no answer: timed out": 1}
    before = handler.requests.copy()
    handler.reply = lambda self, kind, tries, asked: Misbehaving.reply(self, "good", tries, asked)  # type: ignore[method-assign]
    counts = write_targets(recipe, described(tmp_path, contexts), tmp_path / "targets", progress=False)
    assert counts["kept"] == 5
    assert handler.requests - before == {context: 1 for context in contexts if "good" not in context}
    sources = [row["source"] for _, row in read_jsonl(tmp_path / "targets" / "examples.jsonl")]
    assert {source["backend"] for source in sources} == {"openai"}


def test_a_backend_that_is_not_installed_is_a_sentence(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "vllm", None)
    with pytest.raises(UserError, match=r"vLLM is not installed.*speech-llm\[vllm\]"):
        VllmTeacher("m", Sampling())
    monkeypatch.setitem(sys.modules, "openai", None)
    with pytest.raises(UserError, match=r"client library is not installed.*speech-llm\[openai\]"):
        ServerTeacher("http://127.0.0.1:1/v1", "m", Sampling())


def test_the_base_llm_answers_through_any_backend(tmp_path: Path) -> None:
    recipe = small_recipe(tmp_path, url="http://127.0.0.1:1/v1", concurrency=2)
    teacher = open_teacher(recipe.targets, "hub/model", 0, lambda _: pytest.fail("nothing is loaded"))
    assert isinstance(teacher, ServerTeacher)
    assert (teacher.name, teacher.server.concurrency) == ("hub/model", 2)
    recipe.targets.teacher = None
    teacher = open_teacher(recipe.targets, "hub/model", 0, lambda reference: (reference, None))
    assert isinstance(teacher, TransformersTeacher)
    assert teacher.llm == "hub/model"


@pytest.fixture(scope="module")
def transformers_serve(
    smollm2_dir: Path, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[tuple[str, subprocess.Popen[bytes]]]:
    """A real server of the embedded LLM on loopback."""
    pytest.importorskip("fastapi")
    pytest.importorskip("uvicorn")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    log = tmp_path_factory.mktemp("serve") / "log.txt"
    command = [
        sys.executable, "-c", "from transformers.cli.transformers import main; main()", "serve", str(smollm2_dir),
        "--host", "127.0.0.1", "--port", str(port), "--device", "cpu", "--dtype", "float32",
    ]  # fmt: skip
    with open(log, "wb") as out:
        process = subprocess.Popen(
            command,
            stdout=out,
            stderr=subprocess.STDOUT,
            env={**os.environ, "HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false"},
        )
    try:
        for _ in range(1200):
            assert process.poll() is None, log.read_text()
            try:
                with urllib.request.urlopen(f"http://127.0.0.1:{port}/health", timeout=1) as reply:
                    if reply.status == 200:
                        break
            except OSError:
                time.sleep(0.5)
        else:
            pytest.fail(f"the server did not start: {log.read_text()}")
        yield f"http://127.0.0.1:{port}/v1", process
    finally:
        process.kill()
        process.wait()


@pytest.mark.assets
def test_a_real_server_answers_like_the_llm_in_this_process_and_its_answers_outlive_it(
    tmp_path: Path, transformers_serve: tuple[str, subprocess.Popen[bytes]]
) -> None:
    from speech_llm.assets import SMOLLM2, load_llm

    url, process = transformers_serve
    contexts = ["The children ran to the beach.", "Anna sold the old car.", "We parked by the river."]
    recipe = small_recipe(tmp_path, url=url, concurrency=2, timeout_s=300)
    path = described(tmp_path, contexts)
    counts = write_targets(recipe, path, tmp_path / "targets", progress=False)
    journal = [row for _, row in read_jsonl(tmp_path / "targets" / "journal.jsonl")]
    rows = [row for _, row in read_jsonl(tmp_path / "targets" / "examples.jsonl")]
    assert len(journal) == 3
    assert counts["kept"] == len(rows) > 0
    assert "unanswered" not in counts
    assert counts["generated_tokens"] > 10
    assert rows[0]["source"]["teacher"] == SMOLLM2

    own: dict[str, str] = {}
    teacher = TransformersTeacher(*load_llm(SMOLLM2), sampling=Sampling(12))
    teacher.answer(
        [Question(context, "Go on.") for context in contexts],
        lambda question, answer, _: own.update({question.context: str(answer)}),
    )
    assert {row["context"]: row["answer"] for row in journal} == own

    first = (tmp_path / "targets" / "examples.jsonl").read_bytes()
    (tmp_path / "targets" / "examples.jsonl").unlink()
    process.kill()
    process.wait()
    write_targets(recipe, path, tmp_path / "targets", progress=False)
    assert (tmp_path / "targets" / "examples.jsonl").read_bytes() == first
