"""What changed, row by row: the same instances answered by two runs, two models, or after two phases.

In: predictions. Out: per task how many only one of them got right, McNemar's exact p, and rows to look at and listen to.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from eval.report.clips import Sounds, is_right
from eval.report.runs import Rows, Run, read_predictions
from eval.stats import mcnemar

EXAMPLES = 6


@dataclass(frozen=True)
class Count:
    """Instances of a task that both answered, by who was right; `p` of McNemar's exact test."""

    task: str
    both: int
    lost: int
    gained: int
    neither: int

    @property
    def n(self) -> int:
        return self.both + self.lost + self.gained + self.neither

    @property
    def change(self) -> float:
        """Share right in the second minus that in the first."""
        return (self.gained - self.lost) / self.n

    @property
    def p(self) -> float:
        return mcnemar(self.lost, self.gained)


@dataclass(frozen=True)
class Changed:
    """A row that only one of the two got right."""

    task: str
    prompt: str
    label: str
    before: str
    after: str
    sound: str | None


@dataclass(frozen=True)
class Comparison:
    """`first` beside `second` on the instances that both answered; `lost`: right in the first, wrong in the second."""

    first: str
    second: str
    counts: list[Count]
    total: Count
    only_one: int
    lost: list[Changed] = field(default_factory=list)
    gained: list[Changed] = field(default_factory=list)


def compare(
    first: str, one: Rows, second: str, two: Rows, sounds: Sounds, examples: int = EXAMPLES
) -> Comparison | None:
    """Two sets of predictions on the instances they share: the same task, id, prompt and label. None when they share none."""
    keys = [key for key in one if key in two and _question(one[key]) == _question(two[key])]
    if not keys:
        return None
    cells: dict[str, dict[tuple[bool, bool], list[tuple[str, str]]]] = {}
    for key in keys:
        cell = (is_right(one[key]), is_right(two[key]))
        cells.setdefault(key[0], {}).setdefault(cell, []).append(key)
    counts = [
        Count(
            task,
            *(
                len(found.get(cell, []))
                for cell in ((True, True), (True, False), (False, True), (False, False))
            ),
        )
        for task, found in cells.items()
    ]
    total = Count(
        "all",
        *(sum(getattr(count, name) for count in counts) for name in ("both", "lost", "gained", "neither")),
    )

    def picked(cell: tuple[bool, bool]) -> list[Changed]:
        # In turn from every task, in the order in which they were asked: neither the best nor the worst.
        queues = [list(found.get(cell, [])) for found in cells.values()]
        order = [
            queue[place] for place in range(max(map(len, queues))) for queue in queues if place < len(queue)
        ]
        return [
            Changed(
                key[0],
                str(one[key].get("prompt", "")),
                str(one[key].get("label", "")),
                str(one[key].get("response") or ""),
                str(two[key].get("response") or ""),
                sounds.address(one[key].get("audio") or two[key].get("audio")),
            )
            for key in order[:examples]
        ]

    only_one = len(one) + len(two) - 2 * len(keys)
    return Comparison(first, second, counts, total, only_one, picked((True, False)), picked((False, True)))


def _question(row: dict[str, Any]) -> tuple[Any, Any]:
    return row.get("prompt"), row.get("label")


def comparisons(runs: Sequence[Run], sounds: Sounds) -> list[Comparison]:
    """The first run against every other; of a single run its model against its peers, and its phases against the last."""
    pairs: list[tuple[str, Rows, str, Rows]] = []
    if len(runs) > 1:
        first, *others = runs
        one = first.predictions.get(first.main, {})
        pairs = [(first.name, one, run.name, run.predictions.get(run.main, {})) for run in others]
    elif runs:
        run = runs[0]
        own = run.predictions.get(run.main, {})
        pairs = [(name, run.predictions.get(name, {}), run.main, own) for name in run.peers]
    for run in runs:
        pairs += phase_pairs(run)
    found = [compare(first, one, second, two, sounds) for first, one, second, two in pairs]
    return [comparison for comparison in found if comparison]


def phase_pairs(run: Run) -> list[tuple[str, Rows, str, Rows]]:
    """Each earlier phase's tasks as answered after that phase and after the last."""
    names = [str(name) for name in (run.phases or {}).get("names") or []]
    pairs = []
    for number, name in enumerate(names[:-1], start=1):
        rows = []
        for after, after_name in ((number, name), (len(names), names[-1])):
            path = (
                run.folder
                / "phases"
                / f"{after}-{after_name}"
                / "eval"
                / "after"
                / name
                / "predictions.jsonl"
            )
            rows.append(read_predictions(path, run.notes) if path.is_file() else {})
        pairs.append((f"{run.name} after {name}", rows[0], f"after {names[-1]}", rows[1]))
    return pairs
