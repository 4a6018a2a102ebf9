"""The describers that need no model: the length of a recording, and what its manifest line already says."""

from __future__ import annotations

from collections.abc import Sequence

from describers.records import Attribute, Clip
from describers.vocabulary import SYNONYMS, canonical, is_missing

# Measured attributes: a manifest's column of this name usually tells which noise was mixed in, not how noisy it is.
_ONLY_WHEN_ASKED = ("noise", "reverberation")


class DurationDescriber:
    """`duration`: length in seconds."""

    name = "duration"
    attributes: tuple[str, ...] = ("duration",)

    def describe(self, clips: Sequence[Clip]) -> list[dict[str, Attribute]]:
        return [
            {"duration": Attribute(round(clip.duration_s, 3), "s", how="number of samples")} for clip in clips
        ]


class LabelsDescriber:
    """Columns of the manifest as attributes: someone already listened.

    `columns`: column -> attribute; by default every column that is named like a known attribute (but for `noise` and
    `reverberation`, which name other things in manifests). Values are brought to the vocabulary's spelling ("F" -> "female"); an absent
    or empty column, one that says "unknown" or NaN, and a list where a word belongs, give no attribute.
    """

    name = "labels"

    def __init__(self, columns: dict[str, str] | None = None) -> None:
        self.columns = (
            dict(columns) if columns else {name: name for name in SYNONYMS if name not in _ONLY_WHEN_ASKED}
        )
        self.attributes: tuple[str, ...] = tuple(self.columns.values())

    def describe(self, clips: Sequence[Clip]) -> list[dict[str, Attribute]]:
        found = []
        for clip in clips:
            given = {}
            for column, attribute in self.columns.items():
                value = clip.row.get(column)
                if is_missing(attribute, value) or not _fits(attribute, value):
                    continue
                if isinstance(value, str):
                    value = canonical(attribute, value)
                given[attribute] = Attribute(value, how=f"given in column {column!r}")
            found.append(given)
        return found


def _fits(attribute: str, value: object) -> bool:
    """`segments` is a list of `{"start_s", "end_s", "text", ...}`, every other attribute a word or a number."""
    if attribute != "segments":
        return not isinstance(value, (list, dict))
    return isinstance(value, list) and all(
        isinstance(part, dict) and {"start_s", "end_s"} <= part.keys() for part in value
    )
