"""Folders in, the page and its tables out."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jinja2

from eval.report.changes import comparisons
from eval.report.clips import Sounds, clips
from eval.report.costs import costs, facts
from eval.report.curves import has_soft_words, learning_curve, panels
from eval.report.json_table import json_tables
from eval.report.judged import judged
from eval.report.plane import plane
from eval.report.runs import MAIN, PEERS, Run, is_number, read_runs
from eval.report.scores import dimensions
from eval.report.seeds import Group, grouped
from eval.report.strengths import strengths
from eval.report.tables import json_path, write_csv, write_results
from speech_llm.errors import UserError
from speech_llm.files import atomic_write

# With several runs each has fewer clips to listen to.
CLIPS_OF_MANY = 4


def write_report(folders: Sequence[Path], out: Path) -> list[tuple[Path, str]]:
    """Write the page of one or several runs to `out`, and `results.json` and `results.csv` beside it
    (`PAGE.json` in a run's own folder).

    Returns the folders that were set aside, each with its reason. Raises `UserError` when none is left.
    """
    runs, aside = read_runs([Path(folder) for folder in folders])
    if not runs:
        raise UserError("; ".join(dict.fromkeys(reason for _, reason in aside)) or "no run folder was given")
    sounds = Sounds()
    groups = grouped(runs)
    # Rows of one seed stand for those of all.
    compared = comparisons([group.runs[0] for group in groups], sounds)
    where = plane(groups)
    page = _template().render(
        title=", ".join(group.name for group in groups),
        groups=groups,
        runs=[
            _shown(run, group, place, sounds, len(runs))
            for place, group in enumerate(groups)
            for run in group.runs
        ],
        aside=aside,
        together=dimensions(groups) if len(runs) > 1 else [],
        together_peers=_peers(runs),
        peers=PEERS,
        learning=learning_curve(groups),
        soft_words=len(runs) == 1 and has_soft_words(runs[0]),
        panels=panels(groups),
        plane=where,
        compared=compared,
        costs=costs(runs),
    )
    with atomic_write(out) as handle:
        handle.write(page)
    write_csv(out.parent / "results.csv", runs)
    write_results(json_path(out, runs), groups, aside, compared, where)
    return aside


def _peers(runs: Sequence[Run]) -> list[str]:
    return list(dict.fromkeys(name for run in runs for name in run.peers))


def _shown(run: Run, group: Group, place: int, sounds: Sounds, runs: int) -> dict[str, Any]:
    """`again`: another seed of what stands above it, to be opened by those who want it; `colour`: that of its group."""
    again = run is not group.runs[0]
    return {
        "name": run.name,
        "again": again,
        "colour": place % 8 + 1,
        "shown": "speech model" if run.main == MAIN else run.main,
        "facts": facts(run),
        "peers": run.peers,
        "dimensions": dimensions([Group(run.name, [run], [None])]),
        "json": json_tables(run),
        "phases": run.phases,
        "strengths": strengths(run),
        "clips": [] if again else clips(run, sounds) if runs == 1 else clips(run, sounds, CLIPS_OF_MANY),
        "judged": judged(run),
        "notes": run.notes,
    }


def _template() -> jinja2.Template:
    environment = jinja2.Environment(
        autoescape=True,
        trim_blocks=True,
        lstrip_blocks=True,
        loader=jinja2.FileSystemLoader(Path(__file__).parent),
    )
    environment.filters["percent"] = lambda value: f"{100 * value:.1f}" if is_number(value) else "–"
    environment.filters["points"] = lambda value: f"{100 * value:+.1f}" if is_number(value) else "–"
    environment.filters["p"] = lambda value: "< 0.001" if value < 0.001 else f"{value:.3f}"
    return environment.get_template("page.html")
