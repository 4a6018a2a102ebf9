"""What a run was made of and what it cost: time, tokens, rows, parameters, memory."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from eval.report.runs import STAGES, Run, as_dict, is_number


def facts(run: Run) -> list[tuple[str, str]]:
    """A few sentences on targets and training, from the manifests."""
    found: list[tuple[str, str]] = []
    found += [("Targets", _targets(manifest)) for stage, manifest in run.manifests if stage == "targets"]
    training = run.training
    trained = trained_parameters(training)
    if trained:
        found.append(
            ("Trained", f"{trained / 1e6:.2f} M parameters; {_frozen(as_dict(training.get('parts')))}")
        )
    if is_number(training.get("steps")):
        align = as_dict(training.get("align"))
        words = as_dict(align.get("soft_words"))
        parts = [f"{training['rows']:,} rows"] if is_number(training.get("rows")) else []
        if is_number(words.get("steps")):
            parts.append(f"soft words without sound {words['steps']:,} steps")
        if align.get("epochs"):
            told = f"connector aligned to them {align['epochs']} times through the clips"
            if is_number(align.get("named")):
                told += f" (it then names {100 * align['named']:.1f} % of what these are labelled with)"
            parts.append(told)
        parts.append(f"answers on sound {training['steps']:,} steps")
        found.append(("Training", ", ".join(parts)))
    total = sum(seconds.values()) if (seconds := stage_seconds(run)) else 0
    if total:
        found.append(("Time", f"{duration(total)} in all"))
    return found


def costs(runs: Sequence[Run]) -> list[tuple[str, list[str]]]:
    """Rows of the costs table: what it is, and a cell a run. Rows that no run knows are left out."""
    rows: dict[str, list[str]] = {}
    for place, run in enumerate(runs):
        for name, told in _costs(run).items():
            rows.setdefault(name, ["–"] * len(runs))[place] = told
    order = [f"{stage}, time" for stage in STAGES]
    return sorted(rows.items(), key=lambda row: order.index(row[0]) if row[0] in order else len(order))


def stage_seconds(run: Run) -> dict[str, float]:
    """Stage -> seconds, phases added up."""
    seconds: dict[str, float] = {}
    for stage, manifest in run.manifests:
        if is_number(manifest.get("seconds")):
            seconds[stage] = seconds.get(stage, 0.0) + float(manifest["seconds"])
    return seconds


def trained_parameters(training: dict[str, Any]) -> int | None:
    counts = as_dict(training.get("parameters"))
    found = counts.get("trained", counts.get("trainable"))
    return int(found) if is_number(found) else None


def _costs(run: Run) -> dict[str, str]:
    seconds = stage_seconds(run)
    out = {f"{stage}, time": duration(value) for stage, value in seconds.items()}
    if seconds:
        out["all stages, time"] = duration(sum(seconds.values()))
    probing = sum(
        sum(value for value in row["probe_seconds"].values() if is_number(value))
        for row in run.log
        if isinstance(row.get("probe_seconds"), dict)
    )
    if probing:
        out["of training: probes"] = duration(probing)
    training = run.training
    tokens = sum(row["answer_tokens"] for row in run.log if is_number(row.get("answer_tokens")))
    for name, value in (
        ("answer tokens trained on", tokens),
        ("rows", training.get("rows")),
        ("steps", training.get("steps")),
        ("epochs", training.get("epochs")),
        ("trained parameters", trained_parameters(training)),
    ):
        if is_number(value) and value:
            out[name] = f"{value:,}"
    whole, trained = as_dict(training.get("parameters")).get("total"), trained_parameters(training)
    if is_number(whole) and whole and trained:
        out["share of all parameters"] = f"{100 * trained / whole:.2f} %"
    if is_number(training.get("rows_per_s")):
        out["rows a second"] = f"{training['rows_per_s']:g}"
    for name, value in training.items():
        if name.startswith("peak_") and name.endswith("_mb") and is_number(value):
            out[name.removesuffix("_mb").replace("_", " ")] = f"{value / 1024:.1f} GB"
    return out


def duration(seconds: float) -> str:
    if seconds < 100:
        return f"{seconds:.1f} s"
    return f"{seconds / 60:.1f} min" if seconds < 6000 else f"{seconds / 3600:.1f} h"


def _targets(manifest: dict[str, Any]) -> str:
    """Who wrote how many targets, in words."""
    counts = as_dict(manifest.get("counts"))
    strategy = as_dict(as_dict(manifest.get("recipe")).get("targets")).get("strategy", "self")
    if not is_number(counts.get("kept")) or not is_number(counts.get("asked")):
        return f"by the strategy {strategy}"
    kept = f"{counts['kept']:,} of {counts['asked']:,}"
    if strategy == "self":
        return f"{kept} answers of the text LLM passed verification"
    writers = ", ".join(f"{name} {count:,}" for name, count in as_dict(counts.get("kept_of")).items())
    return f"{kept} rows have a target, by the strategy {strategy}" + (f" ({writers})" if writers else "")


def _frozen(parts: dict[str, Any]) -> str:
    """Which parts were trained and which stayed as they were, in words."""
    if not parts:  # of a run before parts were noted, when only these were ever frozen
        return "the text LLM and the encoder stayed frozen"
    names = {
        "encoder_adapters": "adapters in the encoder",
        "adapters": "adapters in the text LLM",
        "llm": "text LLM",
    }
    moved = [names.get(part, part) for part, count in parts.items() if as_dict(count).get("trained")]
    still = [names.get(part, part) for part, count in parts.items() if not as_dict(count).get("trained")]
    return f"trained: {', '.join(moved)}" + (f"; frozen: {', '.join(still)}" if still else "")
