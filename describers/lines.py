"""The lines of a describe run: which an earlier run has written already, how new ones are added, and what they add up to."""

from __future__ import annotations

import contextlib
import re
from collections.abc import Generator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from describers.compose import compose
from describers.inputs import Entry
from describers.records import Attribute, Clip
from describers.vocabulary import canonical, is_missing
from speech_llm.files import JsonlAppender, explain_os_error, read_json, read_jsonl, write_json


@dataclass
class DescribeReport:
    """What a run did: inputs described and rejected, why, and in how many clips each attribute was found.

    `kept`: how many of these lines an earlier run had already written. `restarted`: older output that had been made
    with other settings or from another input was replaced. `cached`: describer -> clips it had told of before (see
    `describers.cache`). `checks`: attribute -> `scoring.score` of what was told,
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
    cached: dict[str, int] = field(default_factory=dict)
    checks: dict[str, dict[str, Any]] = field(default_factory=dict)


class OtherInput(Exception):
    """The lines written earlier belong to another input."""


class Lines:
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
            self._out, self._rejects = (JsonlAppender(path, keep=False) for path in self._paths)
        except OSError as error:
            raise explain_os_error(error, self.path) from error
        self._earlier, self._earlier_rejects = (_first(each) for each in (self._out, self._rejects))
        self._next = next(self._earlier, None)
        self._next_reject = next(self._earlier_rejects, None)

    def start_over(self) -> None:
        """Empty both files: what is there was made with other settings or from another input."""
        self.report.restarted = self._next is not None or self._next_reject is not None
        self.close()
        self._earlier.close()
        self._earlier_rejects.close()
        for path in self._paths:
            path.unlink(missing_ok=True)
        self.report.described = self.report.rejected = self.report.kept = 0
        self.report.coverage, self.report.reasons, self.report.cached = {}, {}, {}
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
        """Raise `OtherInput` when earlier lines are left that the input does not have at this place."""
        if self._next is not None or self._next_reject is not None:
            raise OtherInput

    def describe(
        self, entry: Entry, clip: Clip, found: dict[str, Attribute], telling: Mapping[str, Any]
    ) -> None:
        """Write an entry's line; `telling`: arguments of `compose`, its seed without the clip's id."""
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
        row["description"] = compose(values, **{**telling, "seed": f"{telling.get('seed', 0)}-{entry.id}"})
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
            if not is_missing(attribute, label):
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

    def __enter__(self) -> Lines:
        return self

    def __exit__(self, kind: type[BaseException] | None, *rest: object) -> None:
        self.close()
        if kind is not None:
            for path in self._paths:
                with contextlib.suppress(OSError):
                    JsonlAppender(path).close()  # cuts off a line that a full disk left half-written


def _first(written: JsonlAppender) -> Generator[dict[str, Any], None, None]:
    """The rows that were there when the file was opened, one at a time: more are being added behind them."""
    for _, (_, row) in zip(range(written.count), read_jsonl(written.path), strict=False):
        yield row


def reason_kind(reason: str) -> str:
    """ "only 0.050 s of sound; ..." and "line 7 is not ..." are one kind each, whatever their numbers."""
    return re.sub(r"\d[\d.]*", "N", re.split(r" \(|;", re.sub(r"'[^']*'", "...", reason))[0])
