"""The how-to runs as it is written."""

from __future__ import annotations

import json
import re
import shlex
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import soundfile
from test_describers_classifier import save_classifier
from test_describers_probe import tone

from speech_llm.cli import _exit_code

DOCUMENT = Path(__file__).parents[1] / "docs" / "describers.md"


def snippets(language: str) -> list[str]:
    return re.findall(rf"```{language}\n(.*?)```", DOCUMENT.read_text(encoding="utf-8"), re.DOTALL)


def lines(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder to stand in, with three recordings: quiet, too loud, silent."""
    monkeypatch.chdir(tmp_path)
    wave = np.sin(np.arange(16000) / 20)
    (tmp_path / "recordings").mkdir()
    for name, sound in (("fine", 0.3 * wave), ("loud", np.clip(3 * wave, -1, 1)), ("silent", 0 * wave)):
        soundfile.write(tmp_path / "recordings" / f"{name}.wav", sound, 16000)
    return tmp_path


def test_the_describer_in_twenty_lines_is_one_and_is_cached(here: Path) -> None:
    (snippet,) = (text for text in snippets("python") if "class " in text)
    body = snippet[snippet.index("class ") : snippet.index("\n\n\ndescribe_inputs")]
    assert len(body.splitlines()) <= 20
    for _ in range(2):
        exec(compile(snippet, "docs/describers.md", "exec"), {"__name__": "snippet"})
    rows = lines(here / "described.jsonl")
    assert [row["attributes"].get("clipped") for row in rows] == ["no", "yes", None]
    (here / "described.jsonl").unlink()
    exec(compile(snippet, "docs/describers.md", "exec"), {"__name__": "snippet"})
    report = json.loads((here / "described.report.json").read_text())
    assert report["cached"] == {"clipping": 3}


def test_the_snippet_of_a_hub_classifier_runs(here: Path) -> None:
    save_classifier(here / "OWNER" / "NAME", labels=("rain", "bus"), favours=0)
    (snippet,) = (text for text in snippets("python") if "ClassifierDescriber(" in text)
    exec(compile(snippet, "docs/describers.md", "exec"), {})
    rows = lines(here / "described.jsonl")
    assert [row["attributes"].get("event") for row in rows] == ["rain", "rain", None]
    assert rows[0]["confidence"]["event"] >= 0.7


def test_a_probe_is_fitted_and_used_by_the_commands_as_written(
    here: Path, whisper_dir: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    rows = []
    (here / "my" / "clips").mkdir(parents=True)
    for number in range(32):
        emotion, speaker = ("happy", "angry")[number % 2], f"speaker {number // 4}"
        name = f"clips/{number}.flac"
        soundfile.write(here / "my" / name, tone(230 if emotion == "happy" else 110, 0.8, number), 16000)
        rows.append({"audio": name, "emotion": emotion, "speaker": speaker})
    (here / "my" / "metadata.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (text,) = (text for text in snippets("bash") if "fit-describer emotion" in text)
    for line in text.splitlines():
        program, *arguments = shlex.split(line)
        assert program == "speech-llm"
        assert _exit_code([*arguments, "-q"]) == 0
    told = lines(here / "described.jsonl")
    assert [row["id"] for row in told] == ["fine.wav", "loud.wav", "silent.wav"]
    assert "emotion" not in told[2]["attributes"]
    capsys.readouterr()
    (snippet,) = (text for text in snippets("python") if "load_probe(" in text)
    exec(compile(snippet, "docs/describers.md", "exec"), {})
    assert "accuracy" in capsys.readouterr().out


@pytest.mark.parametrize(
    "option", ["--include", "--random-order", "--dropout", "--wording", "--no-cache", "--form"]
)
def test_every_option_of_the_document_is_one(option: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert option in DOCUMENT.read_text(encoding="utf-8")
    assert _exit_code(["describe", "--help"]) == 0
    assert option in capsys.readouterr().out


def test_the_conversation_of_the_document_reads_as_it_says(here: Path) -> None:
    (row,) = (text for text in snippets("json") if '"segments"' in text)
    soundfile.write(here / "talk.flac", np.sin(np.arange(9 * 16000) / 20) * 0.1, 16000)
    (here / "m.jsonl").write_text(json.dumps(json.loads(row)) + "\n")
    arguments = ["describe", "m.jsonl", "--out", "o.jsonl", "--use", "labels", "--label", "segments=segments"]
    assert _exit_code([*arguments, "--form", "desta", "-q"]) == 0
    (told,) = (text for text in snippets("text") if text.startswith("[00:00"))
    assert lines(here / "o.jsonl")[0]["description"] == told.strip()
