"""Runs of one recipe that differ in the seed only: one row, curve and point with its spread, every run still to be read."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
from report_runs import make_run

from eval.report import write_report
from eval.report.curves import learning_curve, panels
from eval.report.plane import plane
from eval.report.runs import Run, read_runs
from eval.report.scores import dimensions
from eval.report.seeds import Group, grouped, mean_losses, mean_points
from speech_llm.files import read_json, write_json

LEARNED = {"loss": {"type": "ce"}}
NAIVE = {"loss": {"type": "kl"}}


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("runs")
    for seed, skill, last in ((0, 0.9, 0.9), (1, 0.7, 0.8), (2, 0.8, 0.85)):
        make_run(folder / f"words-s{seed}", skill=skill, kept=[0.9, 0.9, last], seed=seed, recipe=LEARNED)
    make_run(folder / "naive", skill=0.5, kept=[0.9, 0.5, 0.1], seed=0, recipe=NAIVE)
    return folder


def runs_of(made: Path, *names: str) -> list[Run]:
    runs, aside = read_runs([made / name for name in names])
    assert not aside
    return runs


SEEDS = ("words-s0", "words-s1", "words-s2")


def test_what_differs_in_the_seed_only_is_one_group(made: Path, tmp_path: Path) -> None:
    several, other = grouped(runs_of(made, "words-s0", "naive", "words-s1", "words-s2"))
    assert (several.name, several.seeds) == ("words (3 seeds)", [0, 1, 2])
    assert [run.name for run in several.runs] == list(SEEDS)
    assert (other.name, [run.name for run in other.runs]) == ("naive", ["naive"])
    # The same seed twice is no second seed, and a run that does not tell its recipe is like no other.
    shutil.copytree(made / "words-s0", tmp_path / "copy")
    shutil.copytree(made / "words-s1", tmp_path / "silent")
    for file in (tmp_path / "silent").glob("*/manifest.json"):
        write_json(file, {"seconds": 1.0})
    runs, _ = read_runs([made / "words-s0", tmp_path / "copy", tmp_path / "silent"])
    assert [group.name for group in grouped(runs)] == ["words-s0", "copy", "silent"]
    # A stage's version is part of what made the figures.
    path = made / "words-s2" / "train" / "manifest.json"
    before = read_json(path)
    write_json(path, before | {"version": 2})
    try:
        assert len(grouped(runs_of(made, *SEEDS))) == 2
    finally:
        write_json(path, before)


def test_how_many_clips_are_asked_tells_recipes_apart_and_with_which_seed_does_not(
    made: Path, tmp_path: Path
) -> None:
    folders = []
    for seed, clips in ((0, 8), (1, 8), (2, 9)):
        shutil.copytree(made / f"words-s{seed}", tmp_path / f"s{seed}")
        write_json(tmp_path / f"s{seed}" / "describe" / "manifest.json", {"recipe": {"asked": [seed, clips]}})
        folders.append(tmp_path / f"s{seed}")
    assert [len(group.runs) for group in grouped(read_runs(folders)[0])] == [2, 1]


def test_groups_that_would_have_one_name_have_their_runs_names(made: Path, tmp_path: Path) -> None:
    for seed in (3, 4):
        make_run(tmp_path / f"words-s{seed}", skill=0.5, kept=[0.9, 0.1], seed=seed, recipe=NAIVE)
    runs, _ = read_runs([*(made / name for name in SEEDS), tmp_path / "words-s3", tmp_path / "words-s4"])
    assert [group.name for group in grouped(runs)] == [
        "words-s0, words-s1, words-s2 (3 seeds)",
        "words-s3, words-s4 (2 seeds)",
    ]


def test_a_row_is_the_mean_with_the_least_and_the_greatest(made: Path) -> None:
    runs = runs_of(made, *SEEDS, "naive")
    (test, *_) = dimensions(grouped(runs))
    row = next(row for row in test.rows if row.first.task == "gender" and row.first.kind == "seen")
    several, other = row.cells
    values = [run.models["speech_llm"]["gender"]["seen"]["accuracy"] for run in runs]
    assert len(set(values[:3])) > 1
    assert several is not None
    assert several.value == pytest.approx(sum(values[:3]) / 3)
    assert (several.low, several.high, several.n, several.seeds) == (min(values[:3]), max(values[:3]), 12, 3)
    assert other is not None
    assert (other.value, other.seeds) == (values[3], 1)
    assert [other.low, other.high] == runs[3].models["speech_llm"]["gender"]["seen"]["interval"]
    ceilings = [run.models["ceiling"]["gender"]["seen"]["accuracy"] for run in runs[:3]]
    assert row.beside["ceiling"].value == pytest.approx(sum(ceilings) / 3)
    # Of a mean over tasks the spread is that of the runs' means, not the mean of the tasks' spreads.
    mean = next(row for row in test.means if row.first.kind == "seen").cells[0]
    own = [
        sum(run.models["speech_llm"][task]["seen"]["accuracy"] for task in ("gender", "emotion")) / 2
        for run in runs[:3]
    ]
    assert mean is not None
    assert (mean.value, mean.low, mean.high) == pytest.approx((sum(own) / 3, min(own), max(own)))


def test_a_seed_that_lacks_a_task_is_not_counted_for_it(made: Path) -> None:
    runs = runs_of(made, *SEEDS)
    del runs[1].models["speech_llm"]["emotion"]
    (test, *_) = dimensions(grouped(runs))
    assert {row.first.task: row.cells[0].seeds for row in test.rows if row.cells[0]} == {"gender": 3, "emotion": 2, "words": 3}  # fmt: skip
    assert test.means == []


def test_curves_and_points_are_means_where_all_seeds_have_one(made: Path) -> None:
    runs = runs_of(made, *SEEDS, "naive")
    logs = [[{"step": 1, "loss": 2.0}, {"step": 2, "loss": 1.0}], [{"step": 1, "loss": 4.0}]]
    assert mean_losses(logs) == [{"step": 1, "loss": 3.0, "least": 2.0, "greatest": 4.0}]
    rate = {"value": 0.5, "low": 0.4, "high": 0.6, "n": 40, "better": "higher"}
    found = mean_points([[(0, rate), (1, rate)], [(0, rate | {"value": 0.1})]])
    assert found == [(0, {"value": 0.3, "low": 0.1, "high": 0.5, "n": 40, "better": "higher", "seeds": 2})]
    assert mean_points([[(1, rate)]]) == [(1, rate)]

    groups = grouped(runs)
    where = plane(groups)
    assert where is not None
    assert [(point.run, point.epoch) for point in where.training] == [
        (name, epoch) for name in ("words (3 seeds)", "naive") for epoch in range(3)
    ]
    singles = plane([Group(run.name, [run], [0]) for run in runs])
    assert singles is not None
    own = [point.forgotten.value for point in singles.end if point.run in SEEDS]
    cell = where.end[0].forgotten
    assert (cell.value, cell.low, cell.high, cell.seeds) == (pytest.approx(sum(own) / 3), min(own), max(own), 3)  # fmt: skip
    assert where.end[1] == singles.end[3]

    def lines(drawing: str | None) -> int:
        assert drawing is not None
        return drawing.count("var(--c1)") + drawing.count("var(--c2)")

    assert "var(--c3)" not in str(learning_curve(groups))
    assert lines(learning_curve(groups)) == 3  # two lines and one band
    for _, first, rest in panels(groups):
        assert not any("var(--c3)" in panel.drawing for panel in [*first, *rest])


def test_the_page_tells_the_spread_and_keeps_every_run(made: Path, tmp_path: Path) -> None:
    out = tmp_path / "page" / "report.html"
    write_report([made / name for name in (*SEEDS, "naive")], out)
    text = out.read_text()
    assert "<th>words (3 seeds)</th><th>naive</th>" in text
    assert ", 3 seeds</small>" in text
    for seed, name in enumerate(SEEDS):
        assert f"<summary>{name} alone</summary>" in text
        assert f"{name} (seed {seed})" in text
    # Row by row the first seed stands for all.
    assert "words-s0 → naive" in text
    assert "words-s0 → words-s1" not in text
    numbers = read_json(out.parent / "results.json")
    assert numbers["seeds"] == {"words (3 seeds)": {name: seed for seed, name in enumerate(SEEDS)}}
    assert list(numbers["runs"]) == [*SEEDS, "naive"]
    # Seeds alone, without another recipe beside them.
    write_report([made / name for name in SEEDS], out)
    text = out.read_text()
    assert "Side by side" in text
    assert ", 3 seeds</small>" in text
