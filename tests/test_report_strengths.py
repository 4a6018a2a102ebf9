"""The report of a model whose adapters were also tried at part of their strength."""

from __future__ import annotations

import csv
from pathlib import Path

import pytest
from report_runs import a_result, make_run, probes_at

from eval.report import write_report
from eval.report.runs import read_run
from eval.report.strengths import strengths
from speech_llm.files import read_json, write_json


@pytest.fixture
def run(tmp_path: Path) -> Path:
    folder = make_run(tmp_path / "half", skill=0.9, kept=[0.9, 0.5])
    results = read_json(folder / "results.json")
    results["models"]["speech_llm@0.5"] = {
        "gender": a_result(18, 24),
        "emotion": a_result(12, 24, 4),
    }
    text = {"text KL": {"value": 0.2, "low": 0.1, "high": 0.3, "n": 24, "better": "lower"}}
    at_half = probes_at(0.8, 0.4, 0.1)
    at_half["forgetting"] |= text
    results["lora_scales"] = [{"scale": 0.5, **at_half}, {"scale": "all"}]
    write_json(folder / "results.json", results)
    return folder


def test_every_strength_has_what_is_learned_and_forgotten_and_the_whole_one_comes_last(run: Path) -> None:
    found = strengths(read_run(run))
    assert found is not None
    half, whole = found.rows
    assert (half.scale, whole.scale) == (0.5, 1)
    # 18 of 24 with a chance of 1/2 and 12 of 24 with 1/4.
    assert half.learned is not None
    assert half.learned.value == pytest.approx(0.25)
    assert half.divergence == 0.2
    assert half.forgotten is not None
    assert whole.forgotten is not None
    assert half.forgotten.value < whole.forgotten.value  # 0.8 of the form is kept, and 0.5 by the whole
    assert dict(zip(found.tasks, half.cells, strict=True))["words"] is None  # not asked at that strength
    assert found.drawing is not None


def test_the_page_and_the_table_tell_of_strengths(run: Path, tmp_path: Path) -> None:
    write_report([run], tmp_path / "page.html")
    page = (tmp_path / "page.html").read_text()
    assert 'id="strengths"' in page
    assert 'href="#strengths"' in page
    with open(tmp_path / "results.csv", newline="") as handle:
        rows = [row for row in csv.DictReader(handle) if row["what"] == "strength"]
    assert {row["model"] for row in rows} == {"speech_llm@0.5"}
    (divergence,) = [row for row in rows if row["name"] == "text KL"]
    assert float(divergence["value"]) == 0.2


def test_a_run_at_its_whole_strength_only_has_no_such_section(tmp_path: Path) -> None:
    folder = make_run(tmp_path / "plain", skill=0.9, kept=[0.9, 0.5])
    assert strengths(read_run(folder)) is None
    write_report([folder], tmp_path / "page.html")
    assert 'id="strengths"' not in (tmp_path / "page.html").read_text()
