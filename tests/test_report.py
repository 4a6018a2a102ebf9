"""The report: every number of the results is on the page, the page needs nothing outside itself."""

from __future__ import annotations

import base64
import json
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import soundfile

from eval.report import clips, table, write_report
from speech_llm.errors import UserError
from speech_llm.files import write_json, write_jsonl


def a_result(right: float, n: int = 10) -> dict[str, Any]:
    half = {"metric": "accuracy", "accuracy": right, "n": n, "unparsed": 1, "interval": [right - 0.1, right + 0.1], "chance": 0.5, "majority": 0.6}  # fmt: skip
    return {"dimension": "test", **half, "seen": half, "unseen": None}


@pytest.fixture
def run(tmp_path: Path) -> Path:
    folder = tmp_path / "a <run>"
    levels = {"strict": 0.5, "repaired": 0.75, "schema": 0.5, "answer": 0.25}
    rates = {
        f"{name} {level}": {"value": value, "low": 0.1, "high": 0.9, "n": 4, "better": "higher"}
        for name in ("audio", "text")
        for level, value in levels.items()
    }
    write_json(
        folder / "results.json",
        {
            "models": {"speech_llm": {"gender": a_result(0.9)}, "ceiling": {"gender": a_result(0.8)}, "teacher": {"gender": a_result(1.0)}},
            "probes": [{"epoch": 0, "json": rates}, {"epoch": 1, "json": rates}],
            "base_probe": {"json": rates},
            "training": {"parameters": {"trained": 3_790_000}, "steps": 2, "rows": 20, "epochs": 1},
        },
    )  # fmt: skip
    write_jsonl(
        folder / "train" / "log.jsonl",
        [
            {"step": 1, "epoch": 1, "loss": 2.0},
            {"step": 2, "epoch": 1, "loss": 1.5},
            {"probe": {}, "epoch": 1},
        ],
    )
    sound = tmp_path / "clip.wav"
    soundfile.write(sound, np.zeros(1600, np.float32), 16_000)
    for model, said in (("speech_llm", "It is <b>male</b>."), ("teacher", "A female voice.")):
        row = {
            "task": "gender",
            "id": "c1/gender",
            "prompt": "Man or woman?",
            "response": said,
            "label": "female",
        }
        row |= {"parsed": None, "score": float(model == "teacher"), "seen": True, "audio": str(sound)}
        write_jsonl(folder / "eval" / model / "predictions.jsonl", [row])
    return folder


def test_the_page_holds_results_curves_and_sound(run: Path) -> None:
    write_report([run], run / "report.html")
    page = (run / "report.html").read_text(encoding="utf-8")
    assert "a &lt;run&gt;" in page
    assert "It is &lt;b&gt;male&lt;/b&gt;." in page  # what a model writes is text, never markup
    assert page.count("<svg") == 2
    assert "3.79 M parameters" in page
    encoded = re.search(r"data:audio/wav;base64,([^\"]+)", page)
    assert encoded is not None
    assert base64.b64decode(encoded[1]) == (run.parent / "clip.wav").read_bytes()
    outside = re.findall(r'(?:src|href)="(?!data:|#)([^"]+)"', page)
    assert outside == []


def test_the_table_compares_with_the_ceiling(run: Path) -> None:
    (row,) = table(json.loads((run / "results.json").read_text()))
    assert (row["value"], row["ceiling"], row["teacher"], row["cascade"]) == (0.9, 0.8, 1.0, None)
    assert row["share"] == pytest.approx(0.9 / 0.8)
    assert row["above_chance"]


def test_a_score_that_may_be_chance_is_not_called_good(run: Path) -> None:
    results = json.loads((run / "results.json").read_text())
    results["models"]["speech_llm"]["gender"] = a_result(0.55)
    results["models"]["ceiling"]["gender"] = a_result(0.5)
    write_json(run / "results.json", results)
    write_report([run], run / "report.html")
    page = (run / "report.html").read_text(encoding="utf-8")
    assert '<span class="bad">110 %</span>' in page


def test_a_clip_that_is_gone_is_left_out(run: Path) -> None:
    results = json.loads((run / "results.json").read_text())
    assert len(clips(run, results)) == 1
    (run.parent / "clip.wav").unlink()
    assert clips(run, results) == []


def test_a_folder_without_results_is_named(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"results\.json: no such file"):
        write_report([tmp_path], tmp_path / "out.html")
    assert not (tmp_path / "out.html").exists()
