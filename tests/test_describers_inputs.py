"""Inputs as spreadsheets, people and years leave them: marks of nothing, odd CSV, odd names, sounds that have changed since."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import soundfile
from typer.testing import CliRunner

from describers.records import Clip
from describers.run import describe_inputs
from describers.simple import LabelsDescriber
from describers.speech_activity import Activity
from describers.voting import judge
from speech_llm.audio import SAMPLE_RATE_HZ
from speech_llm.cli import app
from speech_llm.errors import UserError


def write(path: Path, seconds: float = 0.5) -> Path:
    soundfile.write(path, np.full(round(seconds * SAMPLE_RATE_HZ), 0.5, np.float32), SAMPLE_RATE_HZ)
    return path


def lines(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def described(source: Path, out: Path, use: str = "duration,labels") -> list[dict[str, Any]]:
    describe_inputs(source, out, use=use.split(","), progress=False)
    return lines(out)


def labels(**row: object) -> dict[str, Any]:
    clip = Clip("a", Path("a"), 1.0, np.zeros(SAMPLE_RATE_HZ, np.float32), row)
    describer = LabelsDescriber({name: name for name in row})
    return {name: found.value for name, found in describer.describe([clip])[0].items()}


def test_what_stands_for_a_missing_label_is_no_label() -> None:
    assert labels(gender=float("nan"), emotion="unknown", accent="N/A", age_group="None", event=" ") == {}
    assert labels(gender=["female"], emotion={"happy": 1}) == {}
    assert labels(transcript="Unknown", gender="F") == {"transcript": "Unknown", "gender": "female"}
    part = {"start_s": 0.0, "end_s": 1.0, "text": "Hello."}
    assert labels(segments=json.dumps([part])) == labels(segments=["Hello."]) == {}
    assert labels(segments=[part]) == {"segments": [part]}


@pytest.mark.parametrize("name", ["table.csv", "table.jsonl"])
def test_a_byte_order_mark_costs_nothing(tmp_path: Path, name: str) -> None:
    write(tmp_path / "a.wav")
    text = "audio,gender\na.wav,F\n" if name.endswith("csv") else '{"audio": "a.wav", "gender": "F"}\n'
    (tmp_path / name).write_text(text, encoding="utf-8-sig")
    (row,) = described(tmp_path / name, tmp_path / "out.jsonl")
    assert row["attributes"] == {"duration": 0.5, "gender": "female"}


def test_a_table_without_a_column_of_sounds_names_the_columns_that_it_has(tmp_path: Path) -> None:
    (tmp_path / "table.csv").write_text("audio;gender\na.wav;F\n")
    with pytest.raises(UserError, match=r"no column 'audio'.*'audio;gender'.*commas"):
        described(tmp_path / "table.csv", tmp_path / "out.jsonl")


def test_one_bad_table_of_a_folder_costs_itself(tmp_path: Path) -> None:
    for name, text in (("a", "audio;gender\nx.wav;F\n"), ("b", "audio\nx.wav\n"), ("c", "audio\n")):
        folder = tmp_path / "all" / name
        folder.mkdir(parents=True)
        write(folder / "x.wav")
        (folder / "metadata.csv").write_text(text)
    (row,) = described(tmp_path / "all", tmp_path / "out.jsonl", "duration")
    assert row["id"] == "b/x.wav"
    reasons = [reject["reason"] for reject in lines(tmp_path / "out.rejects.jsonl")]
    assert len(reasons) == 2
    assert "no column 'audio'" in reasons[0]
    assert "no lines" in reasons[1]


def test_a_long_cell_is_read_and_one_that_is_endless_costs_its_line(tmp_path: Path) -> None:
    write(tmp_path / "a.wav")
    rows = ["audio,note", f"a.wav,{'x' * 200_000}", f"a.wav,{'x' * 10_000_001}", "a.wav,short"]
    (tmp_path / "table.csv").write_text("\n".join(rows) + "\n")
    report = describe_inputs(tmp_path / "table.csv", tmp_path / "out.jsonl", use=["duration"], progress=False)
    assert report.described == 1
    assert sum(report.reasons.values()) == 2  # and the id that is there twice
    assert "cannot be read" in (tmp_path / "out.rejects.jsonl").read_text()


def test_a_name_that_is_not_utf_8_is_rejected_by_a_name_that_can_be_read(tmp_path: Path) -> None:
    sounds = tmp_path / "sounds"
    sounds.mkdir()
    write(sounds / "a.wav")
    try:
        os.rename(write(sounds / "b.wav"), os.fsencode(sounds) + b"/caf\xe9.wav")
    except OSError:
        pytest.skip("this file system takes names in UTF-8 only")
    (row,) = described(sounds, tmp_path / "out.jsonl", "duration")
    assert row["id"] == "a.wav"
    (reject,) = lines(tmp_path / "out.rejects.jsonl")
    assert reject["audio"].endswith("sounds/caf\\xe9.wav")
    assert "not UTF-8" in reject["reason"]


@pytest.mark.parametrize("by_manifest", [False, True])
def test_a_sound_that_was_mended_or_replaced_is_described_again(tmp_path: Path, by_manifest: bool) -> None:
    sounds, out = tmp_path / "sounds", tmp_path / "out.jsonl"
    sounds.mkdir()
    whole = write(sounds / "a.wav").read_bytes()
    (sounds / "a.wav").write_bytes(whole[:20])
    write(sounds / "b.wav", 1.0)
    source = sounds
    if by_manifest:
        source = tmp_path / "m.jsonl"
        source.write_text("".join(json.dumps({"audio": f"sounds/{name}.wav"}) + "\n" for name in "ab"))
    assert [row["attributes"]["duration"] for row in described(source, out, "duration")] == [1.0]
    (sounds / "a.wav").write_bytes(whole)
    assert [row["attributes"]["duration"] for row in described(source, out, "duration")] == [0.5, 1.0]
    assert lines(tmp_path / "out.rejects.jsonl") == []
    write(sounds / "b.wav", 0.75)
    assert [row["attributes"]["duration"] for row in described(source, out, "duration")] == [0.5, 0.75]


def test_what_is_to_be_told_must_be_something_that_exists(tmp_path: Path) -> None:
    write(tmp_path / "a.wav")
    arguments = ["describe", str(tmp_path / "a.wav"), "--use", "duration", "--quiet", "--out"]
    runner = CliRunner()
    found = runner.invoke(app, [*arguments, str(tmp_path / "o.jsonl"), "--include", "duraton"])
    assert found.exit_code != 0
    assert "duration" in str(found.exception)
    assert "duraton" in str(found.exception)
    found = runner.invoke(app, [*arguments, ""])
    assert isinstance(found.exception, UserError)
    assert "must be a file" in str(found.exception)
    (tmp_path / "map.json").write_text("[1]")
    found = runner.invoke(
        app, [*arguments, str(tmp_path / "o.jsonl"), "--map", f"emotion={tmp_path}/map.json"]
    )
    assert isinstance(found.exception, UserError)
    assert "JSON object" in str(found.exception)


def test_only_the_windows_in_which_somebody_speaks_judge_a_voice() -> None:
    loud = (0.1 * np.random.default_rng(0).standard_normal(70 * SAMPLE_RATE_HZ)).astype(np.float32)
    clip = Clip("a", Path("a"), 70.0, loud)
    clip.measured["speech"] = Activity(((1.0, 3.0),), np.zeros(0), np.zeros(0))
    heard: list[int] = []

    def listen(sounds: list[np.ndarray]) -> list[np.ndarray | None]:
        heard.extend(len(sound) for sound in sounds)
        return [np.log([0.9, 0.1]) for _ in sounds]

    judge([clip], listen, of_speech=True)
    assert len(heard) == 1
    judge([clip], listen)
    assert len(heard) == 4
