"""The report: every number of the results is on the page, and the page needs nothing outside itself."""

from __future__ import annotations

import base64
import csv
import html.parser
import re
import shutil
from pathlib import Path
from typing import Any

import pytest
from report_runs import a_result, make_run, probes_at

from eval.report import write_report
from eval.report.changes import compare, phase_pairs
from eval.report.clips import Sounds, clips
from eval.report.curves import reference
from eval.report.json_table import json_tables
from eval.report.plane import forgotten, plane
from eval.report.runs import read_run, read_runs
from eval.report.scores import Cell, dimensions, over_chance, scores
from eval.report.seeds import grouped
from eval.report.tables import csv_rows
from eval.stats import mcnemar
from speech_llm.cli import _exit_code
from speech_llm.errors import UserError
from speech_llm.files import read_json, read_jsonl, write_json, write_jsonl

VOID = {"meta", "br", "img", "link", "input", "hr", "path", "use", "rect"}


class Page(html.parser.HTMLParser):
    """Checks that tags are closed in order; keeps what stands in each element's attributes."""

    def __init__(self, text: str) -> None:
        super().__init__(convert_charrefs=True)
        self.open: list[str] = []
        self.tags: list[str] = []
        self.addresses: list[str] = []
        self.feed(text)
        self.close()
        assert self.open == []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.addresses += [value or "" for name, value in attrs if name in ("src", "href", "xlink:href")]
        if tag not in VOID:
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        if tag not in VOID:
            assert self.open.pop() == tag


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("runs")
    make_run(folder / "a <run>", skill=0.9, kept=[0.9, 0.9, 0.9], seed=1)
    make_run(folder / "naive", skill=0.5, kept=[0.9, 0.5, 0.1], seed=2)
    return folder


@pytest.fixture
def run(made: Path, tmp_path: Path) -> Path:
    """A copy that a test may change."""
    shutil.copytree(made / "a <run>", tmp_path / "a <run>")
    return tmp_path / "a <run>"


def page_of(*folders: Path, out: Path) -> str:
    write_report(folders, out)
    return out.read_text(encoding="utf-8")


def test_the_page_of_one_run_holds_everything_and_needs_nothing(run: Path) -> None:
    text = page_of(run, out=run / "report.html")
    page = Page(text)
    assert "a &lt;run&gt;" in text
    assert "It is &lt;b&gt;" in text  # what a model writes is text, never markup
    assert "b" not in set(re.findall(r"It is <(\w+)", text))
    assert '<meta name="viewport" content="width=device-width, initial-scale=1">' in text
    assert "prefers-color-scheme: dark" in text
    for title in ("Results", "Learning", "Forgetting", "Learning against forgetting", "What changed", "Costs", "Listen"):  # fmt: skip
        assert title in text
    assert not {"script", "iframe", "link"} & set(page.tags)
    assert [address for address in page.addresses if not address.startswith(("data:audio/", "#"))] == []
    assert "#0a0b" not in text  # every placeholder has become a colour of the page
    assert "3.79 M parameters" in text
    assert "2.0 GB" in text
    row = scores(read_run(run))[0]
    for share in (row.cell.value, row.cell.low, row.cell.high, row.chance, row.beside["ceiling"].value):
        assert share is not None
        assert f"{100 * share:.1f}" in text


def test_sound_is_inside_the_page_until_it_is_full(run: Path) -> None:
    text = page_of(run, out=run / "report.html")
    encoded = re.findall(r"data:audio/wav;base64,([^\"]+)", text)
    originals = {path.read_bytes() for path in (run / "eval" / "speech_llm").rglob("*.wav")}
    originals |= {Path(row["audio"]).read_bytes() for _, row in read_jsonl(run / "eval/speech_llm/predictions.jsonl")}  # fmt: skip
    assert encoded
    assert all(base64.b64decode(each) in originals for each in encoded)
    sounds = Sounds(budget_bytes=20_000)
    assert len(clips(read_run(run), sounds)) == 2  # of 8 kB each
    assert sounds.left >= 0
    assert sounds.address("gone.wav") is None
    assert sounds.address(None) is None
    assert sounds.address(str(run / "results.json")) is None


def test_seen_and_unseen_stand_beside_chance_and_peers(run: Path) -> None:
    results = read_json(run / "results.json")
    results["models"]["speech_llm"] = {"gender": a_result(18, 20) | {"unseen": a_result(11, 20)["seen"]}}
    results["models"]["ceiling"] = {"gender": a_result(16, 20) | {"unseen": a_result(10, 20)["seen"]}}
    results["models"]["cascade"] = {}
    write_json(run / "results.json", results)
    seen, unseen = scores(read_run(run))
    assert (seen.kind, seen.cell.value, seen.beside["ceiling"].value, seen.cell.n) == ("seen", 0.9, 0.8, 20)
    assert seen.of_ceiling == pytest.approx(0.9 / 0.8)
    assert "cascade" not in seen.beside
    assert (seen.above_chance, unseen.above_chance) == (True, False)
    text = page_of(run, out=run / "report.html")
    assert '<span class="good">112 %</span>' in text
    assert '<span class="bad">110 %</span>' in text  # a score that may be chance is not called good
    gain = over_chance([seen, unseen])
    assert gain is not None
    assert gain.value == pytest.approx((0.4 + 0.05) / 2)


def test_a_dimension_has_its_means_over_tasks_that_all_runs_have(made: Path) -> None:
    runs, _ = read_runs([made / "a <run>", made / "naive"])
    test, natural = dimensions(grouped(runs))
    assert (test.name, natural.name, natural.means) == ("test", "natural", [])
    assert [mean.first.kind for mean in test.means] == ["seen", "unseen"]
    for place, run in enumerate(runs):
        values = [
            run.models["speech_llm"][task]["seen"] for task in ("gender", "emotion")
        ]  # the words have no share right
        cell = test.means[0].cells[place]
        assert cell is not None
        assert cell.value == pytest.approx(sum(value["accuracy"] for value in values) / 2)
        assert cell.low == pytest.approx(sum(value["interval"][0] for value in values) / 2)
    del runs[1].models["speech_llm"]["emotion"]
    assert dimensions(grouped(runs))[0].means == []


def test_forgetting_is_the_drop_from_what_the_base_llm_could(made: Path) -> None:
    run = read_run(made / "naive")
    assert reference(run, "json", "audio strict") == (0.9, "the base LLM's own")  # on the description
    run.base_probe = {}
    assert reference(run, "safety", "text refuses harmful") == (0.8, "before training")
    run = read_run(made / "naive")

    def drop(*names: tuple[str, str]) -> float:
        found = forgotten(run, 2, names)
        assert found is not None
        assert found.low is not None
        assert found.high is not None
        assert found.low < found.value < found.high
        return found.value

    assert drop(("json", "audio strict")) == pytest.approx(0.9 - 0.1)
    # Less is better of refusing what is harmless: from 4 of 40 to 8 of 40 is forgetting.
    assert drop(("safety", "text refuses harmless")) == pytest.approx(0.1)
    both = [("json", "audio strict"), ("json", "audio repaired"), ("safety", "text refuses harmless")]
    assert drop(*both) == pytest.approx((0.8 + 0.1) / 2)  # probes weigh alike
    assert forgotten(run, 9, both) is None


def test_the_json_table_begins_with_what_the_base_llm_could(made: Path) -> None:
    tables = {table.title: table for table in json_tables(read_run(made / "naive"))}
    plain = tables["about a sound"]
    assert [when for when, _ in plain.rows] == ["base LLM, description", "before", "epoch 1", "epoch 2"]
    strict, neither = plain.columns.index("is JSON"), plain.columns.index("neither")
    values = [(figures[strict] or {}).get("value") for _, figures in plain.rows]
    assert values == [0.9, 0.9, 0.5, 0.1]
    # 40 answers at the end: 4 in form, of which 2 right, and 2 right without the form.
    assert plain.rows[-1][1][neither] == {"value": pytest.approx(1 - 4 / 40 - 2 / 40)}
    assert plain.rows[0][1][neither] is None
    assert plain.n == 40


def test_the_plane_has_a_point_a_run_and_epoch(made: Path) -> None:
    runs, _ = read_runs([made / "a <run>", made / "naive"])
    found = plane(grouped(runs))
    assert found is not None
    assert [(point.run, point.epoch) for point in found.training] == [
        (run.name, e) for run in runs for e in range(3)
    ]
    kept, lost = found.end
    assert lost.forgotten.value > kept.forgotten.value + 0.3
    assert kept.learned.value > lost.learned.value
    assert not any(series.endswith("answer") or probe == "forgetting" for probe, series in found.series)
    answer = runs[0].probes[2]["json"]["audio answer"]
    assert found.training[2].learned == Cell(answer["value"], answer["low"], answer["high"], 40)
    runs[1].probes = []
    alone = plane(grouped(runs))
    assert alone is not None
    assert alone.without == ["naive"]
    runs[0].probes = []
    assert plane(grouped(runs)) is None


def test_rows_are_compared_on_the_same_instances_only() -> None:
    def row(number: int, score: float, **more: Any) -> dict[str, Any]:
        return {"task": "t", "id": str(number), "prompt": "?", "label": "x", "score": score, **more}

    def rows(*scored: dict[str, Any]) -> dict[tuple[str, str], dict[str, Any]]:
        return {(each["task"], each["id"]): each for each in scored}

    one = rows(*(row(i, float(i < 8)) for i in range(10)))
    two = rows(
        *(row(i, float(i in (0, 8))) for i in range(9)), row(9, 0.0, prompt="another question"), row(20, 1.0)
    )
    found = compare("one", one, "two", two, Sounds(), examples=3)
    assert found is not None
    total = found.total
    assert (total.both, total.lost, total.gained, total.neither, total.n) == (1, 7, 1, 0, 9)
    assert total.change == pytest.approx(-6 / 9)
    assert total.p == mcnemar(7, 1)
    assert found.only_one == 3
    assert (len(found.lost), len(found.gained)) == (3, 1)
    assert compare("one", one, "two", {}, Sounds()) is None


def test_several_runs_stand_side_by_side_and_bad_folders_are_set_aside(
    made: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "empty").mkdir()
    write_json(tmp_path / "odd" / "results.json", {"models_of": 3})
    (tmp_path / "broken").mkdir()
    (tmp_path / "broken" / "results.json").write_text('{"models": ')
    folders = [made / "a <run>", tmp_path / "empty", made / "naive", tmp_path / "odd", tmp_path / "broken", tmp_path / "nope", made / "naive"]  # fmt: skip
    out = tmp_path / "out" / "all.html"
    assert _exit_code(["report", *map(str, folders), "--out", str(out)]) == 0
    said = capsys.readouterr()
    assert str(out) in said.out
    text = out.read_text()
    Page(text)
    for name, reason in (("empty", "no such file"), ("odd", "no task in it has a score"), ("broken", "not JSON"), ("nope", "no such run folder")):  # fmt: skip
        assert re.search(rf"set aside: {tmp_path / name}.*{reason}", said.err)
        assert f"Set aside: {tmp_path / name}" in text
    assert "given twice" in said.err
    assert "Side by side" in text
    assert "a &lt;run&gt; → naive" in text
    numbers = read_json(out.parent / "results.json")
    assert list(numbers["runs"]) == ["a <run>", "naive"]
    (pair,) = numbers["compared"]
    assert pair["tasks"][-1]["n"] == 48
    assert len(numbers["set_aside"]) == 5
    # A report made again writes over its own numbers.
    write_report([made / "naive"], out)
    assert list(read_json(out.parent / "results.json")["runs"]) == ["naive"]


def test_without_any_run_the_exit_code_is_2(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "out.html"
    assert _exit_code(["report", str(tmp_path), str(tmp_path / "nope"), "--out", str(out)]) == 2
    said = capsys.readouterr().err
    assert "results.json: no such file" in said
    assert "nope: no such run folder" in said
    assert not out.exists()
    with pytest.raises(UserError, match="no run folder was given"):
        write_report([], out)


def test_a_runs_own_results_are_never_written_over(run: Path) -> None:
    before = (run / "results.json").read_bytes()
    write_report([run], run / "report.html")
    assert (run / "results.json").read_bytes() == before
    assert list(read_json(run / "report.json")["runs"]) == ["a <run>"]
    assert (run / "results.csv").exists()


def test_the_csv_gives_back_every_figure(run: Path) -> None:
    results = read_json(run / "results.json")
    results["models"]["speech_llm"]['a, "quoted"\ntask'] = a_result(3, 7, None)
    write_json(run / "results.json", results)
    write_report([run], run / "report.html")
    wanted = csv_rows([read_run(run)])
    with open(run / "results.csv", newline="", encoding="utf-8") as handle:
        found = list(csv.DictReader(handle))
    assert len(found) == len(wanted) > 80
    for row, original in zip(found, wanted, strict=True):
        for name, told in row.items():
            value = original.get(name)
            if value is None:
                assert told == ""
            elif isinstance(value, str):
                assert told == value
            else:
                assert float(told) == value
    keys = [(row["what"], row["model"], row["dimension"], row["name"], row["instructions"], row["epoch"]) for row in found]  # fmt: skip
    assert len(set(keys)) == len(keys)


def test_the_output_of_one_evaluation_is_a_run_of_its_own(made: Path, tmp_path: Path) -> None:
    results = read_json(made / "naive" / "results.json")
    folder = tmp_path / "server"
    write_json(folder / "results.json", results["models"]["ceiling"])
    shutil.copy(made / "naive/eval/ceiling/predictions.jsonl", folder)
    text = page_of(folder, out=tmp_path / "one.html")
    Page(text)
    assert "server" in text
    assert "Forgetting, probe by probe" not in text
    both = page_of(made / "a <run>", folder, out=tmp_path / "two.html")
    assert "a &lt;run&gt; → server" in both


def test_older_and_poorer_results_are_shown_too(run: Path) -> None:
    old = {"n": 12, "strict": 0.5, "repaired": 0.75, "keys": 0.5, "answer": 0.25, "intervals": {"strict": [0.25, 0.75]}}  # fmt: skip
    results = {
        "models": {"speech_llm": {"gender": {"metric": "accuracy", "accuracy": 0.7}, "broken": None}},
        "probes": [
            {"epoch": 0, "audio": old, "text": old},
            {"epoch": 1, "audio": old, "text": old},
            "no row",
        ],
        "base_probe": {"ceiling": old},
        "training": None,
    }
    write_json(run / "results.json", results)
    with open(run / "eval/speech_llm/predictions.jsonl", "a") as handle:
        handle.write('{"torn\n{"task": "gender"}\n')
    read = read_run(run)
    assert read.probes[1]["json"]["audio schema"] == {"value": 0.5, "low": None, "high": None, "n": 12, "better": "higher"}  # fmt: skip
    assert read.probes[1]["json"]["audio strict"]["low"] == 0.25
    assert read.base_probe["json"]["text answer"]["value"] == 0.25
    text = page_of(run, out=run / "report.html")
    Page(text)
    assert "70.0" in text
    assert "no score for broken" in text
    assert "2 lines are no predictions" in text


def test_what_a_run_left_in_another_shape_is_passed_over(run: Path) -> None:
    results = read_json(run / "results.json")
    results["training"] = {"steps": 4, "rows": "many", "parameters": 7, "align": [1], "parts": {"llm": 3}}
    results["phases"] = {"names": ["one"], "matrix": [[0.1, 0.2]]}
    results["models"]["teacher"] = ["none"]
    write_json(run / "results.json", results)
    write_json(run / "targets/manifest.json", {"seconds": "long", "counts": [], "recipe": {"targets": 1}})
    (run / "corpus/manifest.json").write_text("{")
    write_json(run / "train/manifest.json", [])
    odd = [
        {"step": 1, "loss": "x"},
        {"step": 2, "loss": 1.5},
        {"epoch": "one", "probe": 3, "probe_seconds": [1]},
    ]
    write_jsonl(run / "train/log.jsonl", odd)
    text = page_of(run, out=run / "report.html")
    Page(text)
    assert "corpus/manifest.json: not JSON" in text
    assert "answers on sound 4 steps" in text
    assert 'id="phases"' not in text
    assert "by the strategy self" in text


def test_a_run_that_is_still_training_shows_its_curves(run: Path) -> None:
    (run / "results.json").unlink()
    write_json(run / "train/probes/base.json", {"general": probes_at(1, 1, 1)["general"]})
    text = page_of(run, out=run / "report.html")
    Page(text)
    assert "not evaluated yet" in text
    assert "Nothing has been scored yet" in text
    assert "audio knowledge" in text
    assert read_run(run).base_probe["general"]["text knowledge"]["n"] == 40
    assert not (run / "results.json").exists()  # which a run makes for itself


def test_phases_show_their_matrix_and_what_later_ones_undid(made: Path, run: Path) -> None:
    results = read_json(run / "results.json")
    phases = {"names": ["words", "mood"], "matrix": [[0.81, None], [0.6, 0.7]], "backward_transfer": -0.21, "average": 0.65}  # fmt: skip
    del results["probes"], results["base_probe"]
    write_json(run / "results.json", results | {"phases": phases})
    for number, (name, other) in enumerate((("words", "a <run>"), ("mood", "naive")), start=1):
        shutil.copytree(made / other / "train", run / "phases" / f"{number}-{name}" / "train")
        shutil.copytree(
            made / other / "eval/speech_llm", run / "phases" / f"{number}-{name}" / "eval/after/words"
        )
    read = read_run(run)
    assert [row["epoch"] for row in read.probes] == [0, 1, 2, 3, 4]  # the second phase goes on
    ((first, one, second, two),) = phase_pairs(read)
    assert (first, second) == ("a <run> after words", "after mood")
    assert len(one) == len(two) == 48
    text = page_of(run, out=run / "report.html")
    Page(text)
    assert "<b>-21.0</b> points" in text
    assert "tasks of mood" in text
    assert "a &lt;run&gt; after words → after mood" in text


def test_folders_of_one_name_are_told_apart(made: Path, tmp_path: Path) -> None:
    for place in ("x", "y"):
        shutil.copytree(made / "naive", tmp_path / place / "naive")
    runs, _ = read_runs([tmp_path / "x" / "naive", tmp_path / "y" / "naive"])
    assert [run.name for run in runs] == ["x/naive", "y/naive"]


def test_names_that_would_be_markup_or_formulae_are_text(run: Path) -> None:
    nasty = '<img src=x onerror="alert(1)">$\\frac{'
    results = read_json(run / "results.json")
    results["models"]["speech_llm"][nasty] = a_result(3, 4)
    results["probes"] = [
        {"epoch": e, nasty: {nasty: {"value": 0.5, "n": 4, "better": "higher"}}} for e in (0, 1)
    ]
    write_json(run / "results.json", results)
    rows = [{"task": nasty, "id": nasty, "prompt": nasty, "response": nasty, "label": nasty, "score": score} for score in (0.0, 1.0)]  # fmt: skip
    for model, row in zip(("speech_llm", "ceiling"), rows, strict=True):
        write_jsonl(run / "eval" / model / "predictions.jsonl", [row])
    text = page_of(run, out=run / "report.html")
    assert "img" not in Page(text).tags
