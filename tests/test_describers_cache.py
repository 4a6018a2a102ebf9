"""What was told about a sound before is not computed again, and never used where it would no longer be right."""

from __future__ import annotations

import os
import signal
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import soundfile

import describers.cache
from describers.cache import Cache, version_of
from describers.classifier import ClassifierDescriber
from describers.lines import DescribeReport
from describers.named import attribute_describer
from describers.records import Attribute, Clip
from describers.run import DESCRIBERS, describe_inputs
from describers.signal import SIGNAL_DESCRIBERS
from describers.transcript import TranscriptDescriber
from speech_llm.audio import SAMPLE_RATE_HZ
from speech_llm.files import JsonlAppender


class Peak:
    """A describer that counts what it is asked."""

    attributes = ("peak",)

    def __init__(self, name: str = "peak", version: str | None = "1") -> None:
        self.name, self.asked = name, 0
        if version is not None:
            self.version = version

    def describe(self, clips: Sequence[Clip]) -> list[dict[str, Attribute]]:
        self.asked += len(clips)
        peaks = [max(float(np.abs(block).max()) for block in clip.blocks()) for clip in clips]
        return [{} if peak > 0.9 else {"peak": Attribute(peak, "x", 0.25, "how")} for peak in peaks]


class Reader(Peak):
    """What it tells depends on the peak."""

    attributes = ("twice",)
    reads = ("peak",)

    def describe(self, clips: Sequence[Clip]) -> list[dict[str, Attribute]]:
        self.asked += len(clips)
        known = [clip.known.get("peak") for clip in clips]
        return [{} if peak is None else {"twice": Attribute(2 * peak.value)} for peak in known]


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    for number in range(5):
        write(tmp_path / "in" / f"{number}.wav", 0.2 * (number + 1))
    return tmp_path / "in"


def write(path: Path, peak: float, seconds: float = 0.5) -> None:
    path.parent.mkdir(exist_ok=True)
    wave = peak * np.sin(np.arange(round(seconds * SAMPLE_RATE_HZ)) / 9)
    soundfile.write(path, wave.astype(np.float32), SAMPLE_RATE_HZ, "FLOAT" if path.suffix == ".wav" else None)


def run(folder: Path, name: str, *describers: Peak, cache: bool | Path = True) -> DescribeReport:
    out = folder.parent / name
    return describe_inputs(folder, out, use=["duration"], describers=describers, progress=False, cache=cache)


def test_one_more_describer_is_the_only_one_that_is_asked(folder: Path) -> None:
    first, again, other = Peak(), Peak(), Peak("another")
    run(folder, "a.jsonl", first)
    report = run(folder, "b.jsonl", again, other)
    assert (first.asked, again.asked, other.asked) == (5, 0, 5)
    assert report.cached == {"peak": 5}  # an abstention is an answer too
    run(folder, "c.jsonl", Peak(), Peak("another"), cache=False)
    assert (folder.parent / "b.jsonl").read_bytes() == (folder.parent / "c.jsonl").read_bytes()


def test_the_sound_counts_and_not_its_name_or_format(folder: Path) -> None:
    run(folder, "a.jsonl", Peak())
    soundfile.write(folder / "9.flac", soundfile.read(folder / "1.wav", dtype="int16")[0], SAMPLE_RATE_HZ)
    (folder / "0.wav").rename(folder / "renamed.wav")
    write(folder / "4.wav", 0.11)
    again = Peak()
    report = run(folder, "b.jsonl", again)
    assert report.described == 6
    assert again.asked == 2  # the flac has other samples, as it has 16 bits; 4.wav is another sound
    soundfile.write(
        folder / "8.flac", soundfile.read(folder / "9.flac", dtype="int16")[0], 16000, format="WAV"
    )
    third = Peak()
    run(folder, "c.jsonl", third)
    assert third.asked == 0


def test_another_version_or_other_knowledge_is_asked_again(folder: Path) -> None:
    run(folder, "a.jsonl", Peak(), Reader("reader"))
    newer, reader = Peak(version="2"), Reader("reader")
    run(folder, "b.jsonl", newer, reader)
    assert (newer.asked, reader.asked) == (5, 0)  # the same peaks are known to the reader
    alone = Reader("reader")
    run(folder, "c.jsonl", alone)
    assert alone.asked == 4  # now it knows no peak; of the loudest clip it knew none before


def test_what_states_no_version_is_never_cached(folder: Path) -> None:
    run(folder, "a.jsonl", Peak(version=None))
    again = Peak(version=None)
    assert run(folder, "b.jsonl", again).cached == {}
    assert again.asked == 5


def test_without_a_cache_nothing_is_looked_up_and_nothing_kept(folder: Path) -> None:
    run(folder, "a.jsonl", Peak(), cache=False)
    assert not describers.cache.default_path().exists()
    run(folder, "b.jsonl", Peak())
    again = Peak()
    run(folder, "c.jsonl", again, cache=False)
    assert again.asked == 5


@pytest.mark.parametrize("damage", [b"", b"no database at all" * 99, b"SQLite format 3\0" + bytes(5000)])
def test_a_damaged_cache_is_begun_anew(folder: Path, tmp_path: Path, damage: bytes) -> None:
    path = tmp_path / "told.sqlite"
    run(folder, "a.jsonl", Peak(), cache=path)
    path.write_bytes(damage)
    again, third = Peak(), Peak()
    run(folder, "b.jsonl", again, cache=path)
    run(folder, "c.jsonl", third, cache=path)
    assert (again.asked, third.asked) == (5, 0)


def test_a_cache_that_cannot_be_written_stops_no_run(folder: Path, tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    cache = Cache(tmp_path / "file" / "told.sqlite")
    assert "told.sqlite" in cache.trouble
    cache.put({"a": {}})
    assert cache.get(["a"]) == {}
    assert run(folder, "a.jsonl", Peak(), cache=tmp_path / "file" / "told.sqlite").described == 5


def test_the_file_stays_below_its_limit_and_forgets_what_is_oldest(tmp_path: Path) -> None:
    limit = 200_000
    cache = Cache(tmp_path / "told.sqlite", max_bytes=limit)
    for number in range(0, 3000, 50):
        answer = {"word": Attribute("x" * 100, how="y" * 50)}
        cache.put({f"{one:064}": answer for one in range(number, number + 50)})
    assert (tmp_path / "told.sqlite").stat().st_size < 1.2 * limit
    assert cache.get([f"{2999:064}"])
    assert not cache.get([f"{0:064}"])


def test_more_answers_than_one_question_may_have_values(tmp_path: Path) -> None:
    cache = Cache(tmp_path / "told.sqlite")
    cache.put({str(number): {"n": Attribute(number)} for number in range(2000)})
    found = Cache(tmp_path / "told.sqlite").get([str(number) for number in range(2100)])
    assert [found[str(number)]["n"].value for number in range(2000)] == list(range(2000))
    assert len(found) == 2000


def test_the_packages_describers_are_cached_by_their_code_and_models(tmp_path: Path) -> None:
    versions = {name: version_of(made()) for name, made in SIGNAL_DESCRIBERS.items()}
    assert all(versions.values())
    assert version_of(attribute_describer("gender", others=DESCRIBERS))
    assert version_of(TranscriptDescriber("pypi:a==1")) != version_of(TranscriptDescriber("pypi:a==2"))
    model = tmp_path / "model"
    model.mkdir()
    (model / "config.json").write_text("{}")
    before = version_of(ClassifierDescriber(str(model), "event"))
    (model / "model.safetensors").write_bytes(b"other weights")
    assert version_of(ClassifierDescriber(str(model), "event")) != before


@pytest.mark.skipif(not hasattr(os, "fork"), reason="a process that can be killed is made by fork")
@pytest.mark.parametrize(
    ("where", "number"),
    [("describer", 1), ("describer", 2), ("line", 1), ("line", 6), ("cache", 1), ("cache", 2)],
)
def test_killed_outright_at_any_moment_the_same_command_ends_the_same(
    tmp_path: Path, where: str, number: int
) -> None:
    folder = tmp_path / "in"
    for clip in range(8):
        write(folder / f"{clip}.wav", 0.1 * (clip + 1))
    (folder / "bad.wav").write_bytes(b"no sound")

    def described(name: str, cache: bool | Path = tmp_path / "told.sqlite") -> DescribeReport:
        out = tmp_path / name
        options = {"use": ["duration"], "progress": False, "batch_size": 1, "cache": cache}
        return describe_inputs(folder, out, describers=[Peak()], **options)  # type: ignore[arg-type]

    described("whole.jsonl", cache=False)
    child = os.fork()
    if child == 0:
        dies(where, number)
        described("killed.jsonl")
        os._exit(0)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == -signal.SIGKILL
    report = described("killed.jsonl")
    for end in (".jsonl", ".rejects.jsonl"):
        assert (tmp_path / f"killed{end}").read_bytes() == (tmp_path / f"whole{end}").read_bytes()
    assert (report.described, report.rejected) == (8, 1)


def dies(where: str, number: int) -> None:
    """From now on this process kills itself at the nth call of a describer, in the middle of a line, or in the cache."""
    left = number

    def one_less() -> None:
        nonlocal left
        left -= 1
        if left == 0:
            os.kill(os.getpid(), signal.SIGKILL)

    describe, append, put = Peak.describe, JsonlAppender.append, Cache.put

    def describing(self: Peak, clips: Sequence[Clip]) -> list[dict[str, Attribute]]:
        one_less()
        return describe(self, clips)

    def appending(self: JsonlAppender, row: dict[str, Any]) -> None:
        if left == 1:
            self._handle.write('{"id": "torn')
            self._handle.flush()
        one_less()
        append(self, row)

    def putting(self: Cache, told: Mapping[str, dict[str, Attribute]]) -> None:
        put(self, told)
        one_less()

    patched = {"describer": (Peak, "describe", describing), "line": (JsonlAppender, "append", appending)}
    setattr(*patched.get(where, (Cache, "put", putting)))  # type: ignore[arg-type]
