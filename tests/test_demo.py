"""The demo's page over HTTP: what it answers is what the models answer, and nothing that is sent breaks or opens anything."""

from __future__ import annotations

import base64
import hashlib
import http.client
import io
import json
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import soundfile
import torch
from demo_pages import Browser, page, tiny_run, tone

from speech_llm.chat import answer_once, user_message
from speech_llm.cli import _exit_code
from speech_llm.demo.app import Demo
from speech_llm.demo.line import Line, LineFull
from speech_llm.demo.page import FOLDER, SCRIPTS
from speech_llm.demo.run_folder import Offer, find_run, read_offer
from speech_llm.demo.serve import ending_by_signal
from speech_llm.demo.server import MAX_BYTES, Server, may_be_called
from speech_llm.demo.voices import Voices
from speech_llm.errors import UserError
from speech_llm.responders import SpeechResponder, TextResponder, load_speech_model
from speech_llm.streaming import Drawing, Streamed

ASKED = {"question": "Who?", "max_new_tokens": 12}
ALL = ["model", "description", "silent"]


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_run(tmp_path_factory.mktemp("run"))


@pytest.fixture(scope="module")
def responder(run: Path, tmp_path_factory: pytest.TempPathFactory) -> SpeechResponder:
    return load_speech_model(run / "model", 12, features=tmp_path_factory.mktemp("features"))


@pytest.fixture
def browser(run: Path, responder: SpeechResponder, tmp_path: Path) -> Iterator[Browser]:
    with page(Demo(Voices(responder, "tiny", read_offer(run), ("duration", "volume")), tmp_path)) as found:
        yield found


class Says:
    """A model that says a word for each that it may, as long as `go_on` says so."""

    def __init__(self, go_on: Callable[[], Any] = lambda: None) -> None:
        self.go_on = go_on
        self.ended: list[str] = []
        self.asked: list[Any] = []

    def respond(self, conversations: Any, on_answer: Any = None) -> list[str]:
        raise NotImplementedError

    def stream(self, conversation: Any, drawing: Drawing, on_text: Callable[[str], None]) -> Streamed:
        self.asked.append(conversation)
        said = ""
        try:
            for number in range(drawing.max_new_tokens):
                said += f"{' ' if number else ''}word"
                on_text(said)
                self.go_on()
        except BaseException as error:
            self.ended.append(type(error).__name__)
            raise
        return Streamed(said, True)


def stub_page(model: Any, folder: Path) -> Any:
    return page(Demo(Voices(model, "stub", Offer()), folder))


# ---------------------------------------------------------------- the page


def test_the_page_is_one_file_that_loads_nothing_else(browser: Browser) -> None:
    status, headers, body = browser.request("GET", "/")
    html = body.decode()
    assert status == 200
    assert re.findall(r'(?:src|href)\s*=\s*"([^"]*)"', html) == ["data:,", "#question"]
    assert not re.search(r"@import|url\(|\bimport\b\s*[({\"']|<(?:link|img|iframe)[^>]*https?:", html)
    policy = headers["Content-Security-Policy"]
    assert policy.startswith("default-src 'none'")
    for tag in ("style", "script"):  # a browser runs and applies only what has the hash that the policy names
        [text] = re.findall(rf"<{tag}>(.*?)</{tag}>", html, re.DOTALL)
        digest = base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()
        assert f"{tag}-src 'sha256-{digest}'" in policy
    assert "unsafe" not in policy


def test_the_page_offers_what_the_run_has(browser: Browser, run: Path) -> None:
    _, about = browser.json("GET", "/about")
    assert about["voices"] == ALL
    assert about["prompts"]["trained"] == ["Who?", "A man?"]
    assert {clip["name"] for clip in about["examples"]} == {"male", "female"}
    assert len(about["examples"]) == 4
    assert str(run) not in json.dumps(about)  # where things lie is nobody's business
    status, headers, data = browser.request("GET", f"/clips/{about['examples'][0]['id']}")
    assert (status, headers["Content-Type"]) == (200, "audio/wav")
    assert soundfile.info(io.BytesIO(data)).samplerate == 16_000


def test_a_model_of_no_run_has_a_page_too(responder: SpeechResponder, tmp_path: Path) -> None:
    with page(Demo(Voices(responder, "tiny", read_offer(None)), tmp_path)) as browser:
        _, about = browser.json("GET", "/about")
        assert about["examples"] == about["prompts"]["trained"] == []
        assert about["prompts"]["ideas"]
        clip = browser.send(tone())
        assert set(browser.ask(clip=clip["id"], voices=["model", "silent"], **ASKED)) == {"model", "silent"}


def test_a_run_its_model_and_a_model_alone_are_found(run: Path, tmp_path: Path) -> None:
    assert find_run(str(run)) == (str(run / "model"), run)
    assert find_run(str(run / "model")) == (str(run / "model"), run)
    assert find_run("text:some/llm") == ("text:some/llm", None)
    (tmp_path / "recipe.yaml").write_text("name: x\n")
    with pytest.raises(UserError, match="this run has no model yet"):
        find_run(str(tmp_path))
    with pytest.raises(UserError, match="not a run folder"):
        read_offer(tmp_path / "elsewhere")


@pytest.mark.skipif(shutil.which("node") is None, reason="needs node to run the page's own computations")
def test_the_pages_own_computations_are_right(tmp_path: Path) -> None:
    script = "\n".join((FOLDER / name).read_text() for name in SCRIPTS[:2])
    script += """
    const re = new Float32Array(FFT), im = new Float32Array(FFT);
    for (let i = 0; i < FFT; i++) re[i] = Math.sin(i * i);
    fourier(re, im);
    wav(Float32Array.from([0, 0.5, -0.5, 2]), 8000).arrayBuffer().then((bytes) =>
      console.log(JSON.stringify({ re: [...re], im: [...im], wav: [...new Uint8Array(bytes)], hz: hertz(mel(3000)) })));
    """
    (tmp_path / "page.js").write_text(script)
    told = json.loads(subprocess.run(["node", tmp_path / "page.js"], capture_output=True, check=True).stdout)
    wanted = np.fft.fft(np.sin(np.arange(512.0) ** 2))
    assert np.allclose(np.array(told["re"]) + 1j * np.array(told["im"]), wanted, atol=1e-3)
    samples, rate = soundfile.read(io.BytesIO(bytes(told["wav"])), dtype="int16")
    assert (rate, samples.tolist()) == (8000, [0, 16383, -16383, 32767])
    assert told["hz"] == pytest.approx(3000)
    every = tmp_path / "every.js"
    every.write_text("\n".join((FOLDER / name).read_text() for name in SCRIPTS))
    assert subprocess.run(["node", "--check", every], capture_output=True).returncode == 0


# ---------------------------------------------------------------- answers


def test_the_answer_is_the_one_that_chat_gives_to_the_file(
    browser: Browser, responder: SpeechResponder, tmp_path: Path
) -> None:
    file = tmp_path / "mine.flac"
    file.write_bytes(tone(0.9, 44_100, kind="FLAC"))
    clip = browser.send(file.read_bytes(), "mine.flac")
    assert (clip["name"], clip["duration_s"]) == ("mine.flac", 0.9)
    events = browser.events("/ask", clip=clip["id"], **ASKED)
    texts = [event for event in events if event["event"] == "text"]
    [end] = [event for event in events if event["event"] == "end"]
    assert end["text"] == answer_once(responder, "Who?", [file])
    assert len(end["text"]) > 3
    assert len(texts) > 2  # it came in pieces
    shown = ""
    for event in texts:
        shown = event["all"] if "all" in event else shown + event["add"]
    assert shown.rstrip("�") == end["text"].rstrip("�")


def test_beside_it_stand_the_llm_with_the_description_and_the_llm_alone(
    browser: Browser, responder: SpeechResponder
) -> None:
    [clip, *_] = browser.json("GET", "/about")[1]["examples"]
    text = TextResponder(responder.model.llm, responder.processor.tokenizer, max_new_tokens=12)
    for question, read in (
        ("Who?", f"A {clip['name']} speaker is heard."),  # the run's own: as its evaluation tells the clip
        ("Anything else?", clip["description"]),
    ):
        events = browser.events("/ask", clip=clip["id"], voices=ALL, question=question, max_new_tokens=12)
        told = {event["voice"]: event["text"] for event in events if event["event"] == "end"}
        assert [e["reads"] for e in events if e["event"] == "begin"] == [None, read, None]
        assert list(told) == ALL
        assert told["silent"] == text.respond([[{"role": "user", "content": question}]])[0]
        assert told["description"] == text.respond([[{"role": "user", "content": f"{read}\n{question}"}]])[0]
        assert len(set(told.values())) == 3


def test_the_llm_beside_a_model_whose_llm_was_trained_is_the_one_before(
    run: Path, responder: SpeechResponder, tmp_path: Path
) -> None:
    model = load_speech_model(run / "model", 12, features=tmp_path / "features")
    with torch.no_grad():
        for parameter in model.model.llm.parameters():
            parameter.requires_grad_(True).mul_(-0.5)
    with page(Demo(Voices(model, "trained", read_offer(run)), tmp_path)) as browser:
        told = browser.ask(clip=browser.demo.clips.examples()[0].id, voices=ALL, **ASKED)
    base = TextResponder(responder.model.llm, responder.processor.tokenizer, max_new_tokens=12)
    assert told["silent"] == base.respond([[{"role": "user", "content": "Who?"}]])[0]
    assert told["silent"] != told["model"]


def test_every_voice_remembers_what_it_said_itself(browser: Browser, responder: SpeechResponder) -> None:
    clip = browser.demo.clips.examples()[0]
    first = browser.ask(clip=clip.id, voices=ALL, **ASKED)
    turns = [{"question": "Who?", "answers": first}]
    told = browser.ask(clip=clip.id, voices=ALL, turns=turns, question="And then?", max_new_tokens=12)
    part = {"path": str(clip.path)}
    heard = [
        {"role": "user", "content": [{"type": "audio", **part}, {"type": "text", "text": "Who?"}]},
        {"role": "assistant", "content": first["model"]},
        {"role": "user", "content": "And then?"},
    ]
    assert told["model"] == responder.respond([heard])[0]
    text = TextResponder(responder.model.llm, responder.processor.tokenizer, max_new_tokens=12)
    for voice, opening in (("silent", "Who?"), ("description", f"A {clip.name} speaker is heard.\nWho?")):
        chat = [{"role": "user", "content": opening}, {"role": "assistant", "content": first[voice]}]
        assert told[voice] == text.respond([[*chat, {"role": "user", "content": "And then?"}]])[0]


def test_without_a_sound_the_model_alone_answers(browser: Browser, responder: SpeechResponder) -> None:
    assert browser.ask(clip=None, voices=ALL, **ASKED) == {
        "model": responder.respond([[user_message("Who?", [])]])[0]
    }


def test_warm_answers_follow_their_seed(browser: Browser) -> None:
    clip = browser.send(tone())["id"]
    told = [browser.ask(clip=clip, temperature=1.5, seed=seed, **ASKED)["model"] for seed in (1, 1, 2, 3)]
    assert told[0] == told[1]
    assert len(set(told)) > 1


def test_a_sound_of_ones_own_is_described_and_read(browser: Browser) -> None:
    clip = browser.send(tone(1.2))
    assert clip["description"] is None
    *_, told = browser.events("/describe", clip=clip["id"])
    assert told["event"] == "described"
    assert told["clip"]["attributes"]["duration"] == pytest.approx(1.2)
    assert "1 second" in told["clip"]["description"]
    events = browser.events("/ask", clip=clip["id"], voices=["description"], question="Hm?", max_new_tokens=2)
    assert events[0]["event"] == "begin"  # it is not described again
    assert events[0]["reads"] == told["clip"]["description"]
    files = {path.suffix for path in browser.demo.folder.iterdir()}
    assert files == {".wav"}  # the describers' own files are gone


def test_of_ones_own_sound_the_runs_instructions_are_told_what_they_are_about(browser: Browser) -> None:
    clip = browser.demo.clips.get(browser.send(tone())["id"])
    clip.attributes = {"gender": "male", "noise": "noisy", "transcript": "hello"}
    clip.description = "All of it."
    reads = browser.demo.voices.reads
    assert reads(clip, "Who?") == "A male speaker is heard."
    assert reads(clip, "Who else?") == "All of it."
    clip.attributes = {"noise": "noisy"}  # nothing that the run knows: better that than nothing
    assert reads(clip, "Who?") == "The recording is noisy."


def test_a_conversation_that_is_too_long_is_told_in_the_place_of_the_answer(browser: Browser) -> None:
    events = browser.events("/ask", clip=browser.send(tone())["id"], question="w" * 1500, max_new_tokens=9)
    [failed] = [event for event in events if event["event"] == "failed"]
    assert re.search(
        r"has 1,\d+ tokens, which .* more than the 512 that this LLM takes; start", failed["error"]
    )


# ---------------------------------------------------------------- what is sent


def test_a_sound_that_cannot_be_used_is_told_in_one_sentence(browser: Browser) -> None:
    nan = io.BytesIO()
    soundfile.write(nan, np.full(16_000, np.nan, np.float32), 16_000, format="WAV", subtype="FLOAT")
    for data, why in (
        (b"not a sound" * 100, "not a sound file that can be decoded"),
        (b"", "the file is empty"),
        (tone()[:60], "of sound; at least 0.1 s is needed"),
        (tone(level=0.0), "it is silent, so there is nothing to hear"),
        (tone(level=0.0001), "it is silent"),
        (nan.getvalue(), "NaN or infinite"),
        (tone(kind="FLAC")[:700], "damaged or cut off"),
    ):
        status, told = browser.json("POST", "/clips", data, X_File_Name="mein%20Ton.wav")
        assert (status, list(told)) == (422, ["error"]), told
        assert told["error"].startswith("mein Ton.wav: ")
        assert why in told["error"]
        assert "\n" not in told["error"]
        assert str(browser.demo.folder) not in told["error"]
    assert list(browser.demo.folder.iterdir()) == []  # and leaves nothing behind


def test_a_sound_longer_than_the_model_hears_says_so(browser: Browser) -> None:
    status, told = browser.json("POST", "/clips", tone(31, 8_000), X_File_Name="long.wav")
    assert (status, told["too_long"]) == (422, True)
    assert told["error"] == "long.wav: it is longer than the 30 s that the model hears at once"


def test_requests_are_bounded(browser: Browser) -> None:
    status, told = browser.json("POST", "/clips", b"", Content_Length=str(MAX_BYTES + 1))
    assert (status, told["error"]) == (413, "32 MB is more than the 32 MB that may be sent at once")
    status, told = browser.json("POST", "/ask", b"x" * (300 << 10))
    assert status == 413
    status, told = browser.json("POST", "/clips", b"", Content_Length="much")
    assert status == 411


@pytest.mark.parametrize(
    ("asked", "why"),
    [
        ({"question": ""}, "the question is empty"),
        ({"question": "x" * 2001}, "question: string should have at most 2000"),
        (
            {"question": "x", "max_new_tokens": 10_000},
            "max_new_tokens: input should be less than or equal to 512",
        ),
        ({"question": "x", "temperature": "hot"}, "temperature: "),
        ({"question": "x", "path": "/etc/passwd"}, "path: extra inputs are not permitted"),
        ({"question": "x", "voices": ["root"]}, "voices.0: input should be"),
        ({"question": "x", "turns": [{"question": "y"}] * 21}, "this conversation has 20 turns"),
        ({"question": "x", "clip": "/etc/passwd"}, "this sound is not kept any more"),
        ({"question": "x", "clip": "../../../etc/passwd"}, "this sound is not kept any more"),
    ],
)
def test_what_may_not_be_asked_is_refused_in_one_sentence(browser: Browser, asked: Any, why: str) -> None:
    status, told = browser.json("POST", "/ask", json.dumps(asked).encode())
    assert (status, list(told)) == (422, ["error"])
    assert told["error"].startswith(why)


def test_what_is_no_json_is_refused(browser: Browser) -> None:
    for body in (b"", b"{", b"[]", b"\xff\xfe", b"null"):
        assert browser.json("POST", "/ask", body)[0] == 422


def test_no_path_from_the_browser_is_opened(browser: Browser, run: Path) -> None:
    secret = next((run / "describe").iterdir())
    up = "../" * 20
    for path in (
        f"/clips/{up}{secret}",
        f"/clips/{secret}",
        f"/{up}etc/passwd",
        "/clips/",
        "/page.js",
        "//etc/passwd",
    ):
        status, told = browser.json("GET", path)
        assert status in (404, 422), path
        assert list(told) == ["error"]
    clip = browser.send(tone(), f"{up}{browser.demo.folder}/evil.wav")
    assert [path.name for path in browser.demo.folder.iterdir()] == [f"{clip['id']}.wav"]


def test_other_web_sites_are_refused(browser: Browser) -> None:
    assert browser.json("GET", "/about", Host="evil.example")[0] == 403
    assert browser.json("GET", "/about", Host=f"evil.example:{browser.port}")[0] == 403
    assert browser.json("POST", "/clips", tone(), Host="localhost.evil.example")[0] == 403
    for name in ("localhost", f"127.0.0.1:{browser.port}", f"[::1]:{browser.port}", "LOCALHOST:1"):
        assert browser.json("GET", "/about", Host=name)[0] == 200
    for origin in ("https://evil.example", "null", "http://127.0.0.1:1"):
        assert browser.json("POST", "/clips", tone(), Origin=origin)[0] == 403
    own = f"http://127.0.0.1:{browser.port}"
    assert browser.json("POST", "/clips", tone(), Origin=own)[0] == 200


def test_an_open_page_answers_to_addresses_and_its_own_name_only() -> None:
    for host in ("0.0.0.0", "192.0.2.7"):
        assert may_be_called("192.0.2.7", host)
        assert may_be_called(socket.gethostname().lower(), host)
        assert not may_be_called("evil.example", host)
    assert not may_be_called("192.0.2.7", "127.0.0.1")


def test_old_sounds_make_room(responder: SpeechResponder, tmp_path: Path) -> None:
    demo = Demo(Voices(responder, "tiny", Offer()), tmp_path)
    demo.clips.kept = 3
    ids = [demo.add(tone(), f"{number}.wav").id for number in range(5)]
    assert sorted(path.stem for path in tmp_path.iterdir()) == sorted(ids[2:])
    with pytest.raises(UserError, match="not kept any more"):
        demo.clips.get(ids[0])


# ---------------------------------------------------------------- one at a time


def test_one_is_answered_at_a_time_and_the_next_is_told_so(tmp_path: Path) -> None:
    first_speaks, second_waits = threading.Event(), threading.Event()
    model = Says(lambda: (first_speaks.set(), second_waits.wait(120)))
    with stub_page(model, tmp_path) as browser:
        told: list[Any] = []
        first = threading.Thread(
            target=lambda: told.append(browser.ask(clip=None, question="1", max_new_tokens=3))
        )
        first.start()
        assert first_speaks.wait(120)
        seen: list[Any] = []

        def emit(event: dict[str, Any]) -> None:
            seen.append(event)
            second_waits.set()

        from speech_llm.demo.asked import read_asked

        browser.demo.ask(read_asked(b'{"question": "2", "max_new_tokens": 1}'), emit)
        first.join()
    assert seen[0] == {"event": "waiting", "before": 1}
    assert seen[-1] == {"event": "done"}
    assert told == [{"model": "word word word"}]
    assert [turn[0]["content"] for turn in model.asked] == ["1", "2"]


def test_the_line_is_first_come_first_served_and_no_longer_than_it_may_be() -> None:
    line, order, standing = Line(3), [], [threading.Event() for _ in range(2)]

    def wait(number: int) -> None:
        with line.turn(lambda _: standing[number].set()):
            order.append(number)

    with line.turn():
        threads = []
        for number in range(2):
            threads.append(threading.Thread(target=wait, args=(number,)))
            threads[-1].start()
            assert standing[number].wait(120)
        with pytest.raises(LineFull, match="3 others are waiting"), line.turn():
            pass
    for thread in threads:
        thread.join()
    assert order == [0, 1]
    assert line.wait_until_empty(0)


def test_a_browser_that_goes_away_ends_its_answer(tmp_path: Path) -> None:
    speaks = threading.Event()
    model = Says(lambda: (speaks.set(), threading.Event().wait(0.001)))
    with stub_page(model, tmp_path) as browser:
        # Endless for the test: what ends it is that nobody listens.
        body = json.dumps({"question": "?", "max_new_tokens": 512}).encode()
        with socket.create_connection(("127.0.0.1", browser.port)) as connection:
            head = f"POST /ask HTTP/1.1\r\nHost: localhost\r\nContent-Length: {len(body)}\r\n\r\n".encode()
            connection.sendall(head + body)
            assert speaks.wait(120)
            connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, b"\1\0\0\0\0\0\0\0")  # hang up at once
        assert browser.demo.line.wait_until_empty(120)
        assert model.ended in (["BrokenPipeError"], ["ConnectionResetError"])
        assert set(browser.ask(clip=None, question="again", max_new_tokens=1)) == {"model"}


def test_stopping_ends_the_answer_under_way(tmp_path: Path) -> None:
    speaks = threading.Event()
    model = Says(speaks.set)
    demo = Demo(Voices(model, "stub", Offer()), tmp_path)
    with page(demo) as browser:
        held = threading.Event()
        model.go_on = lambda: (speaks.set(), held.wait(120))

        def ask() -> None:
            with pytest.raises(http.client.IncompleteRead):  # cut off, and not as if it had ended
                browser.events("/ask", clip=None, question="?")

        thread = threading.Thread(target=ask)
        thread.start()
        assert speaks.wait(120)
        demo._stopping.set()
        held.set()
        assert demo.line.wait_until_empty(120)
        thread.join()
    assert model.ended == ["Stopped"]


def test_a_mistake_of_ours_is_one_sentence_on_the_page(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    def fail() -> None:
        raise RuntimeError("out of luck")

    with stub_page(Says(fail), tmp_path) as browser:
        events = browser.events("/ask", clip=None, question="?")
        assert events[-1]["event"] == "error"
        assert "the terminal" in events[-1]["error"]
        assert "luck" not in events[-1]["error"]
        assert browser.json("GET", "/about")[0] == 200
    assert "out of luck" in capsys.readouterr().err


# ---------------------------------------------------------------- the command


@pytest.mark.parametrize(
    ("arguments", "why"),
    [
        (["no/such/folder"], "no/such/folder"),
        (["x", "--describe", "gendr"], "unknown describer 'gendr'"),
        (["x", "--describe", "labels"], "unknown describer 'labels'"),
        (["x", "--run", "no/such/run"], "no/such/run: not a run folder"),
    ],
)
def test_a_mistake_on_the_command_line_is_one_line(
    arguments: list[str], why: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert _exit_code(["demo", *arguments]) == 2
    told = capsys.readouterr().err
    assert why in told
    assert told.count("\n") == 1


def test_the_other_loopback_serves_too(tmp_path: Path) -> None:
    demo = Demo(Voices(Says(), "stub", Offer()), tmp_path)
    try:
        server = Server(demo, "::1", 0)
    except UserError:
        pytest.skip("this machine has no IPv6")
    with server:
        assert server.url == f"http://[::1]:{server.server_address[1]}/"


def test_a_port_or_address_that_cannot_be_had_is_told(tmp_path: Path) -> None:
    demo = Demo(Voices(Says(), "stub", Offer()), tmp_path)
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        with pytest.raises(UserError, match=rf"port {port} of 127.0.0.1 cannot be used .*--port 0 for any"):
            Server(demo, "127.0.0.1", port)
    for host in ("192.0.2.1", "no such host"):
        with pytest.raises(UserError, match=f"--host {host}: this is no address of this machine"):
            Server(demo, host, 0)


def test_the_command_serves_until_it_is_ended(run: Path, tmp_path: Path) -> None:
    process = subprocess.Popen(
        [sys.executable, "-u", "-m", "speech_llm", "demo", str(run), "--port", "0", "--describe", "duration"],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        env={**os.environ, "TMPDIR": str(tmp_path), "OMP_NUM_THREADS": "1"},
    )
    assert process.stdout is not None
    said = ""
    try:
        for line in process.stdout:
            said += line
            if found := re.search(r"open http://127\.0\.0\.1:(\d+)/", line):
                break
        else:
            pytest.fail(said)

        class At:
            server_address = ("127.0.0.1", int(found[1]))
            demo = None

        browser = Browser(At())  # type: ignore[arg-type]
        clip = browser.send(tone())
        assert set(browser.ask(clip=clip["id"], voices=ALL, **ASKED)) == set(ALL)
        # Not an interrupt, which a test run in the background would have it ignore.
        process.send_signal(signal.SIGTERM)
        said += process.stdout.read()
        assert process.wait(300) == 0
    finally:
        process.kill()
        process.stdout.close()
    assert said.endswith("stopped; the sounds that were sent are deleted\n")
    assert "Traceback" not in said
    assert list(tmp_path.iterdir()) == []


def test_kill_ends_it_as_an_interrupt_does() -> None:
    before = signal.getsignal(signal.SIGTERM)
    with pytest.raises(KeyboardInterrupt), ending_by_signal():
        signal.raise_signal(signal.SIGTERM)
    assert signal.getsignal(signal.SIGTERM) is before
