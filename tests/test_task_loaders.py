"""Loaders: Dynamic-SUPERB's folders in every form, DeSTA's rows; what is broken is set aside and the rest goes on; models compared."""

from __future__ import annotations

import csv
import json
import shutil
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import pytest
import soundfile
from answering import Says
from learning import tones
from typer.testing import CliRunner

from eval.compare import compare, comparison_table
from eval.dynamic_superb import DIMENSIONS, options_of
from eval.runner import evaluate, score_responses
from eval.tasks import FORMS, load_tasks
from speech_llm.cli.app import app
from speech_llm.described_tasks import add_descriptions
from speech_llm.errors import UserError
from speech_llm.examples import audio_parts
from speech_llm.files import read_json, read_jsonl, write_jsonl

ASK = "Tell the gender of the speaker. The answer could be female or male."


@pytest.mark.parametrize(
    ("instruction", "options"),
    [
        ("Recognize the emotion. The answer could be anger, disgust, or sadness.", ["anger", "disgust", "sadness"]),
        ("Does it contain noise? The answer could be yes or no.", ["yes", "no"]),
        ("Identify the accent from the following options: American, or Indian English.", ["American", "Indian English"]),
        ("Are both from the same speaker? Please answer with yes or no.", ["yes", "no"]),
        ('Detect whether speech exists. The answer could be "Yes" or "No".', ["Yes", "No"]),
        ("Predict the noise level. Choose between zero, five, and ten.", ["zero", "five", "ten"]),
        ("Listen to the clip and tell the chord: major or minor?", ["major", "minor"]),
        ("Classify the sound (dog, rooster, pig).", ["dog", "rooster", "pig"]),
        ("Recognize the intent. The answer can be one of the following: none, kitchen.", ["none", "kitchen"]),
        ("What is said?", []),
        ("Tell me the gender of the speaker and the time.", []),
    ],
)  # fmt: skip
def test_options_stand_in_the_instruction(instruction: str, options: list[str]) -> None:
    assert options_of(instruction) == options


def sounds(folder: Path) -> list[tuple[Path, str]]:
    return tones(folder, 4)


def a_table(folder: Path, rows: list[dict[str, Any]], about: dict[str, Any]) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "instance.json").write_text(json.dumps(about))
    with open(folder / "metadata.csv", "w", newline="") as handle:
        writer = csv.DictWriter(handle, list(dict.fromkeys(key for row in rows for key in row)))
        writer.writeheader()
        writer.writerows(rows)
    return folder


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Two tasks: one in phase 1's form with broken rows, one of numbers."""
    root = tmp_path / "superb"
    first = root / "AccentClassification_Tones"
    rows: list[dict[str, Any]] = [
        {"file_name": path.name, "file": path.stem, "instruction": ASK, "label": gender.title()}
        for path, gender in sounds(first)
    ]
    bad = [
        {**rows[0], "file_name": "absent.wav", "file": "b1"},
        {**rows[0], "label": "child", "file": "b2"},
        {**rows[0], "label": "", "file": "b3"},
        {**rows[0], "instruction": "", "file": "b4"},
        {**rows[0], "file_name": "", "file": "", "label": "male"},
    ]
    a_table(
        first,
        rows + bad,
        {"name": "AccentClassification_Tones", "metrics": ["accuracy"], "path": "x", "version": "1"},
    )
    second = root / "Quality_Tones"
    rows = [
        {"file_name": path.name, "instruction": "Rate it from 1 to 5.", "label": label}
        for (path, _), label in zip(sounds(second), ["1", "2.5", "4", "good"], strict=True)
    ]
    a_table(
        second, rows, {"name": "Quality_Tones", "metrics": ["pcc"], "domain": "Enhancement", "seen": False}
    )
    return root


def test_a_folder_of_tasks_and_what_is_set_aside(folder: Path) -> None:
    accent, quality = load_tasks(f"dynamic-superb:{folder}")
    assert (accent.name, accent.dimension, accent.metric) == (
        "AccentClassification_Tones",
        "paralinguistic",
        "option",
    )
    assert [(i.id, i.label) for i in accent.instances] == [
        ("c0", "male"), ("c1", "female"), ("c2", "male"), ("c3", "female"),
    ]  # fmt: skip
    assert accent.instances[0].options == accent.options == ["female", "male"]
    reasons = " | ".join(row["reason"] for row in accent.rejects)
    for why in (
        "no such audio file",
        "'child' is not among the options",
        "no 'label'",
        "no 'instruction'",
        "no audio",
    ):
        assert why in reasons, reasons
    assert len(accent.rejects) == 5
    assert all("metadata.csv, line" in row["where"] for row in accent.rejects)
    assert (quality.metric, quality.dimension, len(quality.instances)) == ("number", "Enhancement", 3)
    assert quality.instances[0].seen is False
    assert "'good' is not a number" in quality.rejects[0]["reason"]
    assert sum(len(names.split()) for names in DIMENSIONS.values()) == 25


@pytest.mark.parametrize("form", ["parquet", "saved", "jsonl"])
def test_the_same_rows_as_the_hub_has_them(
    tmp_path: Path, form: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("SPEECH_LLM_CACHE", str(tmp_path / "cache"))
    clips = sounds(tmp_path / "clips")
    place = tmp_path / "SpeakerVerification_Tones"
    columns = {
        "audio": [str(path) for path, _ in clips],
        "audio2": [str(clips[0][0])] * 4,
        "file": [path.stem for path, _ in clips],
        "text": ["a text", "", "b", ""],
        "instruction": ["The same speaker? The answer could be yes or no."] * 4,
        "label": ["yes", "no", "yes", "no"],
    }
    place.mkdir()
    (place / "instance.json").write_text(
        json.dumps({"name": "SpeakerVerification_Tones", "metrics": ["accuracy"]})
    )
    if form == "jsonl":
        rows = [{key: values[i] for key, values in columns.items()} for i in range(4)]
        write_jsonl(place / "metadata.jsonl", rows)
        with open(place / "metadata.jsonl", "a") as handle:
            handle.write("not json\n")
    else:
        held = {
            name: [{"bytes": Path(path).read_bytes(), "path": Path(path).name} for path in columns[name]]
            for name in ("audio", "audio2")
        }
        made = datasets.Dataset.from_dict({**columns, **held})
        for name in held:
            made = made.cast_column(name, datasets.Audio(decode=False))
        if form == "parquet":
            (place / "data").mkdir()
            made.to_parquet(place / "data" / "test-00000-of-00001.parquet")
        else:
            made.save_to_disk(str(place))
            (place / "instance.json").write_text(json.dumps({"name": "SpeakerVerification_Tones"}))
    (task,) = load_tasks(f"dynamic-superb:{place}")
    assert (task.dimension, [i.label for i in task.instances]) == ("speaker", ["yes", "no", "yes", "no"])
    parts = audio_parts(task.instances[1].messages)
    assert len(parts) == 2
    assert soundfile.info(parts[0]["path"]).frames == soundfile.info(clips[1][0]).frames
    assert task.instances[0].messages[0]["content"][-1]["text"].endswith("yes or no.\na text")
    assert len(task.rejects) == (1 if form == "jsonl" else 0)


def test_what_cannot_be_a_task_is_one_sentence(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="no such folder"):
        load_tasks("dynamic-superb:./absent")
    (tmp_path / "empty").mkdir()
    with pytest.raises(UserError, match="neither it nor a folder in it"):
        load_tasks(f"dynamic-superb:{tmp_path / 'empty'}")
    (tmp_path / "empty" / "instance.json").write_text("{")
    with pytest.raises(UserError, match="not JSON"):
        load_tasks(f"dynamic-superb:{tmp_path / 'empty'}")
    (tmp_path / "empty" / "instance.json").write_text("{}")
    with pytest.raises(UserError, match="there is no table"):
        load_tasks(f"dynamic-superb:{tmp_path / 'empty'}")
    with pytest.raises(UserError, match=r"dynamic-superbb.*Did you mean|dynamic-superb"):
        load_tasks("dynamic-superbb:x")
    assert "dynamic-superb" in FORMS


def test_rows_of_desta(tmp_path: Path) -> None:
    (path, _), *_ = sounds(tmp_path)
    good = {"id": "a", "messages": [{"role": "user", "content": "<|AUDIO|>\nWho?", "audios": [{"audio": path.name, "text": "hi"}]}], "response": "A man."}  # fmt: skip
    rows = [good, {**good, "messages": [{"role": "user", "content": "No sound"}]}, {"id": "c"}]
    gone = json.loads(json.dumps(good).replace(path.name, "absent.wav"))
    write_jsonl(tmp_path / "rows.jsonl", [*rows, gone])
    (task,) = load_tasks(f"desta:{tmp_path / 'rows.jsonl'}")
    assert [(i.id, i.label, i.metric) for i in task.instances] == [("a", "A man.", "f1")]
    assert len(task.rejects) == 3
    with pytest.raises(UserError, match="no such file"):
        load_tasks(f"desta:{tmp_path / 'absent.jsonl'}")


def test_evaluated_scored_and_compared(folder: Path, tmp_path: Path) -> None:
    tasks = load_tasks(f"dynamic-superb:{folder}")
    results = evaluate(Says("male, 3"), tasks, tmp_path / "a", progress=False)
    assert results["AccentClassification_Tones"]["accuracy"] == 0.5
    assert results["AccentClassification_Tones"]["rejected"] == 5
    assert results["Quality_Tones"]["mae"] == pytest.approx((2 + 0.5 + 1) / 3, abs=1e-3)
    assert len(list(read_jsonl(tmp_path / "a" / "task_rejects.jsonl"))) == 6
    write_jsonl(
        tmp_path / "answers.jsonl",
        [{"task": "AccentClassification_Tones", "id": f"c{i}", "response": said} for i, said in enumerate(["male", "Female.", "female"])]
        + [{"task": "AccentClassification_Tones", "id": "zz", "response": "male"}],
    )  # fmt: skip
    scored = score_responses(tasks[:1], tmp_path / "answers.jsonl", tmp_path / "b")
    assert scored["AccentClassification_Tones"]["missing"] == 1
    assert scored["AccentClassification_Tones"]["accuracy"] == 0.5
    assert "is not in the task" in (tmp_path / "b" / "rejects.jsonl").read_text()
    found = compare(tmp_path / "a", tmp_path / "b")
    accent = found["AccentClassification_Tones"]
    assert (accent["n"], accent["only_first"], accent["only_second"], accent["p"]) == (4, 1, 1, 1.0)
    assert accent["difference"] == 0
    assert set(found) == {"AccentClassification_Tones"}
    assert "AccentClassification_Tones" in comparison_table(found, ("a", "b"))


def test_a_difference_in_error_rates_has_an_interval(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    for name, worse in (("a", 0), ("b", 2)):
        rows = []
        for i in range(60):
            errors = int(rng.integers(0, 3)) + worse
            rows.append({"task": "words", "id": str(i), "prompt": "?", "label": "x", "score": errors / 10, "errors": errors, "words": 10})  # fmt: skip
        write_jsonl(tmp_path / name / "predictions.jsonl", rows)
    found = compare(tmp_path / "a", tmp_path / "b")["words"]
    assert found["kind"] == "error rate"
    assert 0.1 < found["interval"][0] <= found["difference"] <= found["interval"][1] < 0.3
    assert found["p"] < 0.01
    with pytest.raises(UserError, match=r"predictions\.jsonl"):
        compare(tmp_path / "a", tmp_path / "none")
    write_jsonl(tmp_path / "c" / "predictions.jsonl", [{"task": "other", "id": "1", "score": 1}])
    with pytest.raises(UserError, match="no instance in common"):
        compare(tmp_path / "a", tmp_path / "c")


def test_sounds_without_a_description_are_described(folder: Path, tmp_path: Path) -> None:
    tasks = load_tasks(f"dynamic-superb:{folder / 'AccentClassification_Tones'}")
    broken = audio_parts(tasks[0].instances[0].messages)[0]
    shutil.copy(__file__, tmp_path / "text.wav")
    broken["path"] = str(tmp_path / "text.wav")
    assert add_descriptions(tasks, tmp_path / "out", ["duration", "volume"], progress=False) == 4
    assert [i.id for i in tasks[0].instances] == ["c1", "c2", "c3"]
    assert "second" in audio_parts(tasks[0].instances[0].messages)[0]["description"]
    assert tasks[0].rejects[-1] == {"id": "c0", "reason": "its sound could not be described"}
    assert add_descriptions(tasks, tmp_path / "out", ["duration"], progress=False) == 0


def test_score_and_compare_on_the_command_line(folder: Path, tmp_path: Path) -> None:
    task = f"dynamic-superb:{folder / 'AccentClassification_Tones'}"
    for name, said in (("a", "male"), ("b", "female")):
        write_jsonl(tmp_path / f"{name}.jsonl", [{"response": said}] * 4)
        done = CliRunner().invoke(
            app, ["score", task, str(tmp_path / f"{name}.jsonl"), "--out", str(tmp_path / name)]
        )
        assert done.exit_code == 0, done.output
    done = CliRunner().invoke(
        app, ["compare", str(tmp_path / "a"), str(tmp_path / "b"), "--out", str(tmp_path / "c.json")]
    )
    assert done.exit_code == 0, done.output
    assert "McNemar" in done.output
    assert read_json(tmp_path / "c.json")["AccentClassification_Tones"]["only_second"] == 2
    assert done.output.split()[2:4] == ["a", "b"]
    # Folders of one name are told apart by their whole paths.
    shutil.copytree(tmp_path / "b", tmp_path / "other" / "a")
    same = CliRunner().invoke(app, ["compare", str(tmp_path / "a"), str(tmp_path / "other" / "a")])
    assert same.output.split()[2:4] == [str(tmp_path / "a"), str(tmp_path / "other" / "a")]


def test_a_table_as_people_write_it_costs_only_its_broken_rows(tmp_path: Path) -> None:
    (tmp_path / "t" / "x").mkdir(parents=True)
    found = sounds(tmp_path / "t" / "x")
    (tmp_path / "t" / "instance.json").write_text(json.dumps({"name": "gender"}))
    lines = ["file_name,instruction,label"]
    lines += [f'x/{found[0][0].name},"{ASK}",female', f"x/{found[1][0].name},Is it male, or female?,male"]
    lines += [f'x/{found[2][0].name},"{ASK} Café",male']
    (tmp_path / "t" / "metadata.csv").write_bytes("\n".join(lines).encode("latin-1"))
    (task,) = load_tasks(f"dynamic-superb:{tmp_path / 't'}")
    assert len(task.instances) == 2
    (reject,) = task.rejects
    assert "more cells than columns" in reject["reason"]


def test_a_damaged_table_is_a_sentence(tmp_path: Path) -> None:
    (tmp_path / "instance.json").write_text(json.dumps({"name": "gender"}))
    (tmp_path / "test.parquet").write_text("version https://git-lfs.github.com/spec/v1\n")
    with pytest.raises(UserError, match=r"its parquet files cannot be read"):
        load_tasks(f"dynamic-superb:{tmp_path}")
    write_jsonl(tmp_path / "predictions.jsonl", [{"id": "1", "score": 1.0}])
    with pytest.raises(UserError, match="line 1 is no scored answer"):
        compare(tmp_path, tmp_path)
