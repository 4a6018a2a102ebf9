"""The benchmark of describers goes on where it was stopped, and encodes only what a task needs."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import soundfile
from test_describers_probe import save_encoder, tone

from describers import benchmark
from describers.benchmark import Corpus, Task, run, tables
from speech_llm.audio import SAMPLE_RATE_HZ


def data_set(folder: Path, label: str) -> None:
    folder.mkdir(parents=True)
    rows = []
    for speaker in range(6):
        for hz in (110, 230):
            name = f"{speaker}-{hz}.wav"
            soundfile.write(folder / name, tone(hz, 0.5, 10 * speaker + hz), SAMPLE_RATE_HZ)
            row = {"id": name, "audio": name, label: str(hz), "speaker": f"s{speaker}"}
            rows.append({**row, "split": "train" if speaker < 4 else "dev"})
    (folder / "metadata.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))


def test_a_second_run_encodes_and_fits_nothing_and_finds_the_same(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    data_set(tmp_path / "data" / "buzzes", "register")
    data_set(tmp_path / "data" / "others", "colour")
    encoder = str(save_encoder(tmp_path / "encoder", seed=0))
    monkeypatch.setattr(benchmark, "TASKS", (Task("register", ("buzzes",)),))
    monkeypatch.setattr(benchmark, "ACROSS", ())
    cache = tmp_path / "cache"
    first = run(Corpus(tmp_path / "data", encoder, cache, progress=False), 0.5, progress=False)
    assert {path.name.split("-")[0] for path in cache.iterdir()} == {"buzzes", "register"}
    assert first["tasks"][0]["clean"]["everything"]["n"] == 4
    assert "| register, buzzes | 4 |" in tables(first)

    def never(*_arguments: object) -> None:
        raise AssertionError("this was done before")

    monkeypatch.setattr(benchmark, "fit_probe", never)
    monkeypatch.setattr(Corpus, "_encode", never)
    again = run(Corpus(tmp_path / "data", encoder, cache, progress=False), 0.5, progress=False)
    assert again == first
