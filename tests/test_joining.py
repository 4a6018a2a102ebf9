"""Several sounds of a question as one: what a model that takes one sound hears then."""

from __future__ import annotations

import base64
import io
import json
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import soundfile
from chat_servers import ChatStub, chat_server

from eval.joining import join_sounds, joined_sound
from eval.tasks import Instance, Task, load_tasks
from speech_llm.audio import load_audio
from speech_llm.cli import _exit_code
from speech_llm.errors import UserError
from speech_llm.examples import audio_parts
from speech_llm.files import read_json, read_jsonl, write_jsonl

ASK = "The same speaker? The answer could be yes or no."


def tone(path: Path, hz: float, rate_hz: int, seconds: float, channels: int = 1) -> Path:
    times = np.arange(round(seconds * rate_hz)) / rate_hz
    samples = 0.5 * np.sin(2 * np.pi * hz * times)
    soundfile.write(path, np.stack([samples] * channels, axis=1), rate_hz)
    return path


@pytest.fixture
def superb(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Two pairs of sounds at two rates, and one whose second sound is no sound."""
    monkeypatch.setenv("SPEECH_LLM_CACHE", str(tmp_path / "cache"))
    folder = tmp_path / "SpeakerVerification_Tones"
    folder.mkdir()
    (folder / "instance.json").write_text(json.dumps({"name": "SpeakerVerification_Tones"}))
    tone(folder / "a.wav", 440, 8000, 1.0)
    tone(folder / "b.wav", 880, 44100, 0.75, channels=2)
    (folder / "text.wav").write_text("no sound")
    pairs = [("a.wav", "b.wav", "yes"), ("b.wav", "a.wav", "no"), ("a.wav", "text.wav", "no")]
    rows = [
        {"audio": one, "audio2": two, "id": f"p{i}", "instruction": ASK, "label": label}
        for i, (one, two, label) in enumerate(pairs)
    ]
    write_jsonl(folder / "metadata.jsonl", rows)
    return folder


@pytest.fixture
def server() -> Iterator[ChatStub]:
    pytest.importorskip("openai")
    with chat_server(lambda _: "yes") as stub:
        yield stub


def loudest_hz(samples: np.ndarray) -> float:
    return float(np.abs(np.fft.rfft(samples)).argmax() * 16000 / len(samples))


def test_joined_sounds_stand_in_order_with_half_a_second_of_silence_between(
    superb: Path, tmp_path: Path
) -> None:
    path = joined_sound([superb / "a.wav", superb / "b.wav"], tmp_path)
    samples = load_audio(path)
    assert soundfile.info(path).samplerate == 16000
    assert len(samples) == 16000 + 8000 + 12000  # 1 s, the silence, 0.75 s: one rate for both
    assert not samples[16000:24000].any()
    assert loudest_hz(samples[:16000]) == pytest.approx(440, abs=2)
    assert loudest_hz(samples[24000:]) == pytest.approx(880, abs=2)
    assert np.abs(samples[:16000] - load_audio(superb / "a.wav")).max() < 1e-4
    before = path.stat().st_mtime_ns
    assert joined_sound([superb / "a.wav", superb / "b.wav"], tmp_path) == path
    assert path.stat().st_mtime_ns == before  # made once
    assert joined_sound([superb / "b.wav", superb / "a.wav"], tmp_path) != path


def test_a_turns_other_parts_stay_and_what_is_known_of_its_sounds_is_joined(
    superb: Path, tmp_path: Path
) -> None:
    def audio(name: str, **known: str) -> dict[str, str]:
        return {"type": "audio", "path": str(superb / name), **known}

    first = {
        "role": "user",
        "content": [
            {"type": "text", "text": "One:"},
            audio("a.wav", description="Low.", transcript="hm"),
            {"type": "text", "text": "Two:"},
            audio("b.wav", description="High."),
            {"type": "text", "text": ASK},
        ],
    }
    single = {"role": "user", "content": [audio("a.wav"), {"type": "text", "text": "And this?"}]}
    plain = {"role": "user", "content": "Hello"}
    task = Task("t", "", [Instance("1", [plain, first, single], "yes", "t")])
    assert join_sounds([task], tmp_path) == 1
    asked = task.instances[0].messages
    assert (asked[0], asked[2]) == (plain, single)
    assert [part.get("text") for part in asked[1]["content"]] == ["One:", None, "Two:", ASK]
    (part,) = audio_parts([asked[1]])
    assert part["description"] == "Low.\nHigh."
    assert "transcript" not in part  # of one it is not known
    assert len(audio_parts([first])) == 2  # what was given is as it was


def test_a_sound_that_cannot_be_read_costs_its_own_instance(superb: Path, tmp_path: Path) -> None:
    (task,) = load_tasks(f"dynamic-superb:{superb}")
    assert join_sounds([task], tmp_path / "joined") == 2
    assert [instance.id for instance in task.instances] == ["p0", "p1"]
    assert [row["id"] for row in task.rejects] == ["p2"]
    assert "text.wav: not a sound file" in task.rejects[0]["reason"]
    assert len(list((tmp_path / "joined").iterdir())) == 2
    (task,) = load_tasks(f"dynamic-superb:{superb}")
    task.instances[:] = task.instances[2:]
    with pytest.raises(UserError, match=r"no instance has sounds that can be joined .*text\.wav"):
        join_sounds([task], tmp_path / "joined")


def test_the_model_is_sent_several_sounds_or_one(
    superb: Path, server: ChatStub, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    def sent(name: str, *more: str) -> list[int]:
        server.bodies.clear()
        command = ["eval", f"openai:{server.url}#m", "--tasks", f"dynamic-superb:{superb}", "--quiet"]
        assert _exit_code([*command, "--out", str(tmp_path / name), *more]) == 0
        lengths = []
        for body in server.bodies:
            sounds = [part["input_audio"] for part in body["messages"][0]["content"] if "input_audio" in part]
            samples, _ = soundfile.read(io.BytesIO(base64.b64decode(sounds[0]["data"])))
            lengths += [len(sounds) * 1_000_000 + len(samples)]
        return sorted(lengths)

    assert sent("several", "--limit", "2") == [2_012_000, 2_016_000]  # by default each as it is
    assert sent("one", "--join-sounds") == [1_036_000, 1_036_000]
    assert "1 rows set aside" in capsys.readouterr().err
    assert read_json(tmp_path / "one" / "results.json")["SpeakerVerification_Tones"]["accuracy"] == 0.5
    rows = [row for _, row in read_jsonl(tmp_path / "one" / "predictions.jsonl")]
    assert {Path(row["audio"]).parent for row in rows} == {tmp_path / "cache" / "joined_sounds"}
    assert len(list(read_jsonl(tmp_path / "one" / "task_rejects.jsonl"))) == 1
