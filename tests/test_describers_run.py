"""Describing many recordings: every input once, in order, bad ones told apart, and a kill changes nothing."""

from __future__ import annotations

import errno
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import soundfile

from describers.records import Attribute, Clip
from describers.run import DescribeReport, describe_inputs
from speech_llm.audio import SAMPLE_RATE_HZ
from speech_llm.errors import UserError


class Loudness:
    """A describer in a dozen lines; it can be told to die at its nth call, as a killed process would."""

    name = "loudness"
    attributes = ("peak",)

    def __init__(self, dies_at: int | None = None) -> None:
        self.dies_at = dies_at
        self.calls: list[list[str]] = []

    def describe(self, clips: Sequence[Clip]) -> list[dict[str, Attribute]]:
        self.calls.append([clip.id for clip in clips])
        if len(self.calls) == self.dies_at:
            raise KeyboardInterrupt
        peaks = [max(float(np.abs(block).max()) for block in clip.blocks()) for clip in clips]
        return [{"peak": Attribute(round(peak, 2), confidence=0.9)} for peak in peaks]


def write_clip(path: Path, seconds: float = 0.3, peak: float = 0.5) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    soundfile.write(path, np.full(round(seconds * SAMPLE_RATE_HZ), peak, np.float32), SAMPLE_RATE_HZ)
    return path


def write_manifest(folder: Path, rows: Sequence[dict[str, Any] | str]) -> Path:
    manifest = folder / "manifest.jsonl"
    manifest.write_text("".join((row if isinstance(row, str) else json.dumps(row)) + "\n" for row in rows))
    return manifest


def many_clips(folder: Path, count: int = 10) -> Path:
    for number in range(count):
        write_clip(folder / f"{number}.wav", 0.2 + 0.05 * (number * 7 % count), (number + 1) / 20)
    rows: list[dict[str, Any] | str] = [
        {"id": f"clip{n}", "audio": f"{n}.wav", "gender": "f"} for n in range(count)
    ]
    rows.insert(3, "not json")
    rows.insert(6, {"audio": "absent.wav"})
    return write_manifest(folder, rows)


def lines(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def run(source: Path | str, out: Path, describer: Loudness | None = None, **options: Any) -> DescribeReport:
    options = {"use": ["duration", "labels"], "batch_size": 1, "progress": False, **options}
    return describe_inputs(source, out, describers=[describer or Loudness()], **options)


def test_a_folder_is_described_recursively_sorted_and_named_relative_to_the_output(tmp_path: Path) -> None:
    for name in ("b.wav", "a/z.flac", "c/d/e.ogg"):
        write_clip(tmp_path / "in" / name)
    (tmp_path / "in" / "notes.txt").write_text("no sound")
    report = run(tmp_path / "in", tmp_path / "out" / "d.jsonl")
    rows = lines(tmp_path / "out" / "d.jsonl")
    assert [row["id"] for row in rows] == ["a/z.flac", "b.wav", "c/d/e.ogg"]
    assert [Path(row["audio"]).is_absolute() for row in rows] == [True] * 3
    assert rows[1]["attributes"] == {"duration": 0.3, "peak": 0.5}
    assert rows[1]["confidence"] == {"peak": 0.9}
    assert set(rows[1]) == {"id", "audio", "attributes", "confidence", "how", "description"}
    assert (report.described, report.rejected) == (3, 0)
    assert report.coverage == {"duration": 3, "peak": 3}


def test_audio_of_a_relative_manifest_is_found_from_the_outputs_folder(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    write_clip(Path("corpus/clips/a.wav"))
    write_manifest(Path("corpus"), [{"audio": "clips/a.wav", "gender": "M"}])
    run(Path("corpus/manifest.jsonl"), Path("described/x.jsonl"))
    row = lines(Path("described/x.jsonl"))[0]
    assert row["audio"] == "../corpus/clips/a.wav"
    assert row["id"] == "clips/a.wav"
    assert row["attributes"]["gender"] == "male"
    run(Path("described/x.jsonl"), Path("again/x.jsonl"))  # a described file is a manifest itself
    assert lines(Path("again/x.jsonl"))[0]["attributes"]["peak"] == 0.5


def test_every_bad_input_is_rejected_with_line_and_reason_and_the_rest_goes_on(tmp_path: Path) -> None:
    write_clip(tmp_path / "good.wav")
    write_clip(tmp_path / "short.wav", 0.05)
    (tmp_path / "empty.wav").touch()
    (tmp_path / "corrupt.wav").write_bytes(b"RIFF and then nonsense" * 50)
    manifest = write_manifest(
        tmp_path,
        [
            {"id": "good", "audio": "good.wav"},
            {"id": "empty", "audio": "empty.wav"},
            {"id": "corrupt", "audio": "corrupt.wav"},
            {"id": "short", "audio": "short.wav"},
            {"id": "missing", "audio": "missing.wav"},
            "{broken",
            "[1, 2]",
            {"id": "no audio"},
            {"id": "good", "audio": "short.wav"},
            {"id": "also good", "audio": "good.wav"},
            "",
            '{"id": "cut o',
        ],
    )
    report = run(manifest, tmp_path / "out.jsonl")
    assert [row["id"] for row in lines(tmp_path / "out.jsonl")] == ["good", "also good"]
    rejects = lines(tmp_path / "out.rejects.jsonl")
    expected = {
        2: "empty", 3: "not a sound file", 4: "0.050 s", 5: "no such file", 6: "not a JSON object",
        7: "not a JSON object", 8: "no 'audio'", 9: "already used on line 1", 12: "not a JSON object",
    }  # fmt: skip
    assert [row["line"] for row in rejects] == list(expected)
    for row in rejects:
        assert set(row) == {"audio", "reason", "line"}
        assert expected[row["line"]] in row["reason"]
    assert (report.described, report.rejected) == (2, 9)
    assert sum(report.reasons.values()) == 9
    assert report.reasons["line N is not a JSON object"] == 3


@pytest.mark.parametrize("dies_at", [1, 2, 3])
def test_a_killed_and_resumed_run_equals_an_uninterrupted_one(tmp_path: Path, dies_at: int) -> None:
    manifest = many_clips(tmp_path)
    run(manifest, tmp_path / "whole.jsonl")
    with pytest.raises(KeyboardInterrupt):
        run(manifest, tmp_path / "killed.jsonl", Loudness(dies_at))
    assert len(lines(tmp_path / "killed.jsonl")) < 10
    resumed = Loudness()
    report = run(manifest, tmp_path / "killed.jsonl", resumed)
    for end in (".jsonl", ".rejects.jsonl"):
        assert (tmp_path / f"killed{end}").read_bytes() == (tmp_path / f"whole{end}").read_bytes()
    assert (report.described, report.rejected) == (10, 2)
    assert report.kept == 4 * (dies_at - 1)
    assert not report.restarted


def test_a_kill_in_the_middle_of_a_line_repeats_its_whole_window(tmp_path: Path) -> None:
    manifest = many_clips(tmp_path)
    whole, killed = tmp_path / "whole.jsonl", tmp_path / "killed.jsonl"
    first, second = Loudness(), Loudness()
    run(manifest, whole, first)
    run(manifest, killed)
    killed.write_bytes(killed.read_bytes()[:-30])  # torn in the last line
    run(manifest, killed, second)
    assert killed.read_bytes() == whole.read_bytes()
    assert (
        second.calls == first.calls[-1:]
    )  # batched as the first time, so that nothing can come out differently


def test_a_finished_run_does_nothing_the_second_time(tmp_path: Path) -> None:
    manifest = many_clips(tmp_path)
    run(manifest, tmp_path / "out.jsonl")
    again = Loudness()
    report = run(manifest, tmp_path / "out.jsonl", again)
    assert again.calls == []
    assert (report.kept, report.described, report.rejected) == (12, 10, 2)
    assert report.coverage["gender"] == 10


@pytest.mark.parametrize("change", ["settings", "labels", "input"])
def test_other_settings_or_another_input_start_over(tmp_path: Path, change: str) -> None:
    manifest = many_clips(tmp_path)
    source = tmp_path if change == "input" else manifest
    if change == "input":
        manifest.unlink()
    out = tmp_path / "out.jsonl"
    run(source, out)
    if change == "labels":
        manifest.write_text(manifest.read_text().replace('"f"', '"m"'))
    if change == "input":
        (tmp_path / "2.wav").unlink()
    report = run(source, out, form="desta" if change == "settings" else "sentence")
    assert report.restarted
    assert report.kept == 0
    fresh = tmp_path / "fresh.jsonl"
    run(source, fresh, form="desta" if change == "settings" else "sentence")
    assert out.read_text() == fresh.read_text()


def test_a_describer_that_has_changed_starts_over(tmp_path: Path) -> None:
    manifest = many_clips(tmp_path)
    for version, kept in (("1", 0), ("1", 12), ("2", 0)):
        describer = Loudness()
        describer.version = version  # type: ignore[attr-defined]
        assert run(manifest, tmp_path / "out.jsonl", describer).kept == kept


def test_a_full_disk_is_a_sentence_and_leaves_only_whole_lines(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    manifest = many_clips(tmp_path)
    whole, out = tmp_path / "whole.jsonl", tmp_path / "out.jsonl"
    run(manifest, whole)

    class FullDisk:
        """Takes 500 bytes of the output, the last line only in part, then refuses; flushes and closes fail too."""

        def __init__(self, handle: Any) -> None:
            self.handle, self.left = handle, 500

        def write(self, text: str) -> None:
            self.handle.write(text[: self.left])
            self.left -= len(text)

        def flush(self) -> None:
            self.handle.flush()
            if self.left < 0:
                raise OSError(errno.ENOSPC, "No space left on device")

        def close(self) -> None:
            self.handle.close()
            if self.left < 0:
                raise OSError(errno.ENOSPC, "No space left on device")

    with monkeypatch.context() as patched:
        import builtins

        real_open = builtins.open

        def full_open(file: Any, mode: str = "r", *rest: Any, **named: Any) -> Any:
            handle = real_open(file, mode, *rest, **named)
            return FullDisk(handle) if str(file) == str(out) and mode == "a" else handle

        patched.setattr(builtins, "open", full_open)
        with pytest.raises(UserError, match="disk is full") as caught:
            run(manifest, out)
    assert str(out) in str(caught.value)
    assert 0 < len(lines(out)) < 10  # every line there is whole
    run(manifest, out)
    assert out.read_bytes() == whole.read_bytes()


def test_unknown_names_tell_the_nearest_known_one(tmp_path: Path) -> None:
    write_clip(tmp_path / "a.wav")
    with pytest.raises(UserError, match="'transcript'"):
        describe_inputs(tmp_path, tmp_path / "o.jsonl", use=["transcripts"], progress=False)
    with pytest.raises(UserError, match="labels"):  # one way to an attribute that no describer here tells
        describe_inputs(tmp_path, tmp_path / "o.jsonl", use=["emotion"], progress=False)
    with pytest.raises(UserError, match="'desta'"):
        describe_inputs(tmp_path, tmp_path / "o.jsonl", use=["duration"], form="dest", progress=False)
    assert not (tmp_path / "o.jsonl").exists()


@pytest.mark.parametrize("source", ["absent", "absent.jsonl", "some/absent.wav", "/absent/folder"])
def test_an_input_that_is_not_there_is_a_sentence(tmp_path: Path, source: str) -> None:
    with pytest.raises(UserError, match="no such file or folder"):
        run(source, tmp_path / "o.jsonl")


def test_an_input_without_sound_is_a_sentence(tmp_path: Path) -> None:
    (tmp_path / "in").mkdir()
    with pytest.raises(UserError, match="no sound files"):
        run(tmp_path / "in", tmp_path / "o.jsonl")
    with pytest.raises(UserError, match="no lines"):
        run(write_manifest(tmp_path, []), tmp_path / "o.jsonl")
    with pytest.raises(UserError, match="manifest being read"):
        run(write_manifest(tmp_path, [{"audio": "a.wav"}]), tmp_path / "manifest.jsonl")
    (tmp_path / "a.pdf").touch()
    with pytest.raises(UserError, match="expected a folder"):
        run(tmp_path / "a.pdf", tmp_path / "o.jsonl")


def test_a_ten_minute_recording_is_streamed(tmp_path: Path) -> None:
    file = tmp_path / "long.flac"
    soundfile.write(file, np.full(600 * 8000, 0.25, np.float32), 8000)
    held: list[bool] = []

    class Watch(Loudness):
        def describe(self, clips: Sequence[Clip]) -> list[dict[str, Attribute]]:
            held.extend(clip.samples is not None for clip in clips)
            return super().describe(clips)

    run(file, tmp_path / "o.jsonl", Watch())
    row = lines(tmp_path / "o.jsonl")[0]
    assert row["attributes"]["duration"] == pytest.approx(600, abs=0.01)
    assert row["attributes"]["peak"] == pytest.approx(0.25, abs=0.05)  # rings at the onset
    assert "10 minutes long" in row["description"]
    assert held == [False]


def test_a_hub_dataset_of_parquet_files_keeps_its_sounds_beside_the_output(tmp_path: Path) -> None:
    import datasets
    import pyarrow as pa
    import pyarrow.parquet as parquet

    features = datasets.Features(
        {
            "audio": datasets.Audio(),
            "sex": datasets.ClassLabel(names=["female", "male"]),
            "speed": datasets.Value("string"),
        }
    )
    rows = [
        {"audio": {"bytes": write_clip(tmp_path / f"{n}.flac", peak=0.1 * (n + 1)).read_bytes(), "path": f"{n}.flac"},
         "sex": n % 2, "speed": "fast"}
        for n in range(3)
    ]  # fmt: skip
    rows.append({"audio": {"bytes": b"no sound", "path": "x.wav"}, "sex": 0, "speed": "slow"})
    folder = tmp_path / "dataset" / "data"
    folder.mkdir(parents=True)
    table = pa.Table.from_pylist(rows, schema=features.arrow_schema)
    parquet.write_table(table, folder / "train-00000-of-00001.parquet")
    out = tmp_path / "out" / "d.jsonl"
    report = run(tmp_path / "dataset", out, label_columns={"sex": "gender"})
    described = lines(out)
    assert [row["id"] for row in described] == ["train-000000", "train-000001", "train-000002"]
    assert [row["attributes"]["gender"] for row in described] == ["female", "male", "female"]
    assert [row["attributes"]["peak"] for row in described] == pytest.approx([0.1, 0.2, 0.3], abs=0.01)
    assert all(Path(row["audio"]).exists() for row in described)
    assert [row["line"] for row in lines(out.with_suffix(".rejects.jsonl"))] == [4]
    before = out.read_bytes()
    assert run(tmp_path / "dataset", out, label_columns={"sex": "gender"}).kept == report.described + 1
    assert out.read_bytes() == before


@pytest.mark.parametrize("several", [False, True])
def test_a_dataset_saved_to_disk_is_described_like_its_files(tmp_path: Path, several: bool) -> None:
    import datasets

    files = [str(write_clip(tmp_path / f"{n}.wav", peak=0.1 * (n + 1))) for n in range(3)]
    made = datasets.Dataset.from_dict({"id": ["x", "y", "z"], "sound": files, "gender": ["f", "m", "f"]})
    made = made.cast_column("sound", datasets.Audio(sampling_rate=16000))
    saved = datasets.DatasetDict({"train": made}) if several else made
    saved.save_to_disk(tmp_path / "saved")
    run(tmp_path / "saved", tmp_path / "out" / "d.jsonl")
    rows = lines(tmp_path / "out" / "d.jsonl")
    assert [row["id"] for row in rows] == ["x", "y", "z"]
    assert [row["attributes"]["gender"] for row in rows] == ["female", "male", "female"]
    assert [row["attributes"]["peak"] for row in rows] == pytest.approx([0.1, 0.2, 0.3], abs=0.01)


@pytest.mark.parametrize("form", ["jsonl", "csv"])
def test_a_local_audio_folder_dataset_is_read_by_its_metadata(tmp_path: Path, form: str) -> None:
    for split in ("train", "test"):
        folder = tmp_path / "in" / split
        write_clip(folder / "a.wav")
        text = (
            '{"file_name": "a.wav", "gender": "female"}\n'
            if form == "jsonl"
            else "file_name,gender\na.wav,female\n"
        )
        (folder / f"metadata.{form}").write_text(text)
    run(tmp_path / "in", tmp_path / "o.jsonl")
    rows = lines(tmp_path / "o.jsonl")
    assert [row["id"] for row in rows] == ["test/a.wav", "train/a.wav"]
    assert rows[0]["attributes"]["gender"] == "female"
