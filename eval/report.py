"""The report of a run: one HTML file that opens without a server.

In: run folders (`results.json`, `train/log.jsonl`, `eval/*/predictions.jsonl`). Out: a page with the results table, the
learning curve, the JSON probe per epoch, and test clips to play beside what was answered. Everything is inside the file.
"""

from __future__ import annotations

import base64
import io
import itertools
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import jinja2

from speech_llm.errors import UserError
from speech_llm.files import atomic_write, read_json, read_jsonl

CLIPS = 12
# A clip longer than this is not put into the page.
MAX_CLIP_BYTES = 3 << 20
_MIME = {
    ".wav": "audio/wav",
    ".flac": "audio/flac",
    ".mp3": "audio/mpeg",
    ".ogg": "audio/ogg",
    ".opus": "audio/ogg",
}
PEERS = {
    "cascade": "the text LLM reads Whisper's transcript only",
    "ceiling": "the text LLM reads the description",
    "teacher": "the text LLM reads the description, after one worked example",
}
_COLOURS = {"answer": "#1668a8", "schema": "#2a9d6f", "strict": "#c7702b", "repaired": "#8a63b8"}
# Where a probe stands that does not end an epoch.
_PLACES = {0: "before", 0.5: "warm-up"}
_LEVELS = {
    "strict": "is JSON",
    "repaired": "is JSON once repaired",
    "schema": "has the right keys",
    "answer": "and the right answer",
}


def write_report(runs: Sequence[Path], out: Path) -> None:
    """Write the page of one or several runs to `out`.

    Raises `UserError` for a folder without `results.json`.
    """
    template = jinja2.Environment(autoescape=True, trim_blocks=True, lstrip_blocks=True).from_string(
        (Path(__file__).parent / "report.html").read_text(encoding="utf-8")
    )
    page = template.render(runs=[_run(Path(run)) for run in runs], peers=PEERS)
    with atomic_write(out) as handle:
        handle.write(page)


def _run(folder: Path) -> dict[str, Any]:
    path = folder / "results.json"
    if not path.exists():
        raise UserError(f"{path}: no such file; `speech-llm run` or `speech-llm eval` makes it")
    results = read_json(path)
    log = [row for _, row in read_jsonl(folder / "train" / "log.jsonl")] if _log(folder) else []
    return {
        "name": folder.resolve().name,
        "rows": table(results),
        "peers": [name for name in PEERS if name in results["models"]],
        "facts": _facts(folder, results),
        "learning": learning_curve(log),
        "json": json_curve(results),
        "clips": clips(folder, results),
    }


def _log(folder: Path) -> bool:
    return (folder / "train" / "log.jsonl").exists()


def table(results: dict[str, Any]) -> list[dict[str, Any]]:
    """A row for each task and kind of instruction: the model, its interval, and what stands beside it."""
    models = results["models"]
    main = "speech_llm" if "speech_llm" in models else next(iter(models), "")
    rows = []
    for task, whole in models.get(main, {}).items():
        for kind in ("seen", "unseen"):
            result = whole.get(kind)
            if not result:
                continue
            wer = result["metric"] == "wer"
            value = result[result["metric"]]
            peers: dict[str, float | None] = {}
            counts: dict[str, int] = {}
            for name in PEERS:
                other = (models.get(name, {}).get(task) or {}).get(kind)
                peers[name] = None if not other else other[other["metric"]]
                if other and other["n"] != result["n"]:
                    counts[name] = other["n"]
            best = peers["ceiling"]
            rows.append(
                {
                    "task": task,
                    "kind": "trained on" if kind == "seen" else "new",
                    "metric": "WER" if wer else "right",
                    "n": result["n"],
                    "value": value,
                    "low": result["interval"][0],
                    "high": result["interval"][1],
                    "chance": result["chance"],
                    "majority": result["majority"],
                    "unparsed": result["unparsed"],
                    "share": None if wer or not best else value / best,
                    "above_chance": not wer
                    and result["chance"] is not None
                    and result["interval"][0] > result["chance"],
                    "fewer": counts,
                    **peers,
                }
            )
    return rows


def _facts(folder: Path, results: dict[str, Any]) -> list[tuple[str, str]]:
    """What the run was made of, from its manifests."""
    facts: list[tuple[str, str]] = []
    total = 0.0
    times = []
    for stage in ("corpus", "describe", "targets", "mixture", "train", "eval"):
        path = folder / stage / "manifest.json"
        if path.exists():
            seconds = float(read_json(path)["seconds"])
            total += seconds
            times.append(f"{stage} {seconds:.0f} s")
    training = results.get("training") or {}
    targets = folder / "targets" / "manifest.json"
    if targets.exists():
        facts.append(("Targets", _targets(read_json(targets))))
    if training.get("parameters"):
        parameters = training["parameters"]
        trained = (
            parameters.get("trained", parameters.get("trainable")) if isinstance(parameters, dict) else None
        )
        if trained:
            facts.append(("Trained", f"{trained / 1e6:.2f} M parameters; {_frozen(training.get('parts'))}"))
    if training.get("steps"):
        align = training.get("align") or {}
        words = align.get("soft_words") or {}
        parts = [f"{training['rows']:,} rows"]
        if words.get("steps"):
            parts.append(f"soft words without sound {words['steps']:,} steps")
        if align.get("epochs"):
            parts.append(
                f"connector aligned to them {align['epochs']} times through the clips (it then names {100 * align['named']:.1f} % "
                "of what these are labelled with)"
            )
        parts.append(f"answers on sound {training['steps']:,} steps")
        facts.append(("Training", ", ".join(parts)))
    if times:
        facts.append(("Time", f"{total / 60:.1f} minutes ({', '.join(times)})"))
    return facts


def _targets(manifest: dict[str, Any]) -> str:
    """Who wrote how many targets, in words."""
    counts = manifest["counts"]
    strategy = ((manifest.get("recipe") or {}).get("targets") or {}).get("strategy", "self")
    kept = f"{counts['kept']:,} of {counts['asked']:,}"
    if strategy == "self":
        return f"{kept} answers of the text LLM passed verification"
    writers = ", ".join(f"{name} {count:,}" for name, count in (counts.get("kept_of") or {}).items())
    return f"{kept} rows have a target, by the strategy {strategy}" + (f" ({writers})" if writers else "")


def _svg(draw: Callable[[Any], None], height: float = 2.6) -> str:
    """A matplotlib drawing as inline SVG that scales with the page; text stays text."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    with plt.rc_context(
        {
            "svg.fonttype": "none",
            "font.family": "sans-serif",
            "font.size": 9,
            "axes.spines.top": False,
            "axes.spines.right": False,
        }
    ):
        figure, axes = plt.subplots(figsize=(6.4, height), layout="constrained")
        draw(axes)
        buffer = io.StringIO()
        figure.savefig(buffer, format="svg", transparent=True, metadata={"Date": None})
        plt.close(figure)
    svg = buffer.getvalue()
    return svg[svg.index("<svg") :]


def learning_curve(log: Sequence[dict[str, Any]]) -> str | None:
    """Loss per step with its running mean, and where the epochs end; None without training steps.

    Steps on soft words, which come before any sound is heard, stand before those on sound.
    """
    steps = [row for row in log if "step" in row and "loss" in row]
    words = [row for row in log if "soft_step" in row]
    if not steps:
        return None

    def curve(axes: Any, rows: Sequence[dict[str, Any]], first: int, colour: str, label: str) -> None:
        x, y = range(first, first + len(rows)), [row["loss"] for row in rows]
        axes.plot(x, y, color=colour, linewidth=0.7, alpha=0.4)
        smooth, mean = [], y[0]
        for value in y:
            mean = 0.93 * mean + 0.07 * value
            smooth.append(mean)
        axes.plot(x, smooth, color=colour, linewidth=1.8, label=label)
        for place, (before, after) in enumerate(itertools.pairwise(rows), start=first):
            if after["epoch"] != before["epoch"]:
                axes.axvline(place, color="#bbbbbb", linewidth=0.8, linestyle=":")

    def draw(axes: Any) -> None:
        if words:
            curve(axes, words, 1, "#c7702b", "soft words, no sound")
        curve(axes, steps, len(words) + 1, "#1668a8", "on sound")
        axes.set(xlabel="step", ylabel="loss per answer token", ylim=(0, None))
        if words:
            axes.legend(frameon=False, fontsize=8)

    return _svg(draw)


def _frozen(parts: dict[str, dict[str, int]] | None) -> str:
    """Which parts were trained and which stayed as they were, in words."""
    if not parts:  # of a run before parts were noted, when only these were ever frozen
        return "the text LLM and the encoder stayed frozen"
    names = {
        "encoder_adapters": "adapters in the encoder",
        "adapters": "adapters in the text LLM",
        "llm": "text LLM",
    }
    moved = [names.get(part, part) for part, count in parts.items() if count["trained"]]
    still = [names.get(part, part) for part, count in parts.items() if not count["trained"]]
    return f"trained: {', '.join(moved)}" + (f"; frozen: {', '.join(still)}" if still else "")


def json_curve(results: dict[str, Any]) -> str | None:
    """The JSON probe's rates per epoch on audio, with the base LLM's own rates on the description as lines."""
    probes = [row for row in results.get("probes") or [] if "json" in row]
    if not probes:
        return None
    base = (results.get("base_probe") or {}).get("json")

    def draw(axes: Any) -> None:
        epochs = [row["epoch"] for row in probes]
        for level in ("strict", "schema", "answer"):
            rates = [100 * row["json"][f"audio {level}"]["value"] for row in probes]
            axes.plot(epochs, rates, marker="o", color=_COLOURS[level], label=_LEVELS[level], linewidth=1.8)
            if base:
                axes.axhline(
                    100 * base[f"text {level}"]["value"],
                    color=_COLOURS[level],
                    linewidth=1,
                    linestyle="--",
                    alpha=0.7,
                )
        axes.set(xlabel="epoch", ylabel="% of answers", ylim=(-3, 103))
        axes.set_xticks(epochs, [_PLACES.get(epoch, f"{epoch:g}") for epoch in epochs])
        axes.legend(frameon=False, loc="best", fontsize=8)

    return _svg(draw)


def clips(folder: Path, results: dict[str, Any], count: int = CLIPS) -> list[dict[str, Any]]:
    """Test clips with prompt and answers, taken at even distances from each task: neither the best nor the worst."""
    models = list(results["models"])
    answers: dict[str, dict[tuple[str, str], dict[str, Any]]] = {}
    for name in models:
        path = folder / "eval" / name / "predictions.jsonl"
        if path.exists():
            answers[name] = {(row["task"], row["id"]): row for _, row in read_jsonl(path)}
    main = "speech_llm" if "speech_llm" in answers else next(iter(answers), "")
    by_task: dict[str, list[dict[str, Any]]] = {}
    for row in answers.get(main, {}).values():
        by_task.setdefault(row["task"], []).append(row)
    picked: list[dict[str, Any]] = []
    used: set[str] = set()
    tasks = list(by_task.values())
    turn = 0
    while tasks and len(picked) < count and turn < 50 * count:
        rows = tasks[turn % len(tasks)]
        place = (turn // len(tasks)) * 7 + 3 * (turn % len(tasks))
        row = rows[place % len(rows)]
        turn += 1
        sound = _sound(row["audio"]) if row["audio"] and row["audio"] not in used else None
        if sound is None:
            continue
        used.add(row["audio"])
        others = []
        for name in PEERS:
            other = answers.get(name, {}).get((row["task"], row["id"]))
            if other is not None:
                others.append({"name": name, "text": other["response"], "good": _good(other)})
        picked.append({**row, "sound": sound, "good": _good(row), "others": others})
    return picked


def _good(row: dict[str, Any]) -> bool:
    """Right, or for words not one of them wrong."""
    return row["errors"] == 0 if "errors" in row else row["score"] == 1


def _sound(path: str) -> str | None:
    """A sound file as a data address that a page can play; None when it is not there, too big, or of another kind."""
    file = Path(path)
    mime = _MIME.get(file.suffix.lower())
    if mime is None or not file.is_file() or file.stat().st_size > MAX_CLIP_BYTES:
        return None
    return f"data:{mime};base64,{base64.b64encode(file.read_bytes()).decode()}"
