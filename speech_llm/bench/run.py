"""All arms, in turn and again, each in a process of its own; the table of their ratios to the plain one, and the goals."""

from __future__ import annotations

import json
import os
import platform
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from speech_llm.bench.arms import PARTS, Spec
from speech_llm.bench.material import speak
from speech_llm.errors import UserError
from speech_llm.summary import align

# Name -> what it does otherwise than the usual way.
ARMS: dict[str, dict[str, Any]] = {
    "plain": {"way": "plain"},
    "ours": {},
    "ours, encoder padded": {"encode": "padded"},
    "ours, compiled": {"encode": "padded", "compiled": True},
    "ours, unpacked": {"packed": False},
    "ours, kl": {"loss": "kl"},
    "ours, half the batch": {"batch_tokens": 0.5},
    "ours, twice the batch": {"batch_tokens": 2.0},
}
# The ways that see the same features as the plain one, and so must have its loss.
EQUAL = ("ours, encoder padded", "ours, compiled")
GOALS = {"cached": 8.0, "first": 3.0, "share_of_peak": 0.6}
# Losses of the same model on the same rows, nats a token: further apart than this they are not the same.
SAME_LOSS = {"float32": 2e-3, "bfloat16": 3e-2}


def run(
    base: Spec,
    names: Sequence[str] = tuple(ARMS),
    repeats: int = 3,
    say: Callable[[str], None] = print,
) -> dict[str, Any]:
    """Measure the arms `repeats` times in turn; medians, ratios to the plain arm, and whether the goals are reached.

    Raises `UserError` when an arm fails, with its last line.
    """
    for name in names:
        if name not in ARMS:
            raise UserError(f"there is no arm {name!r}; choose among {', '.join(ARMS)}")
    names = ["plain", *(name for name in names if name != "plain")]
    found: dict[str, list[dict[str, Any]]] = {name: [] for name in names}
    with tempfile.TemporaryDirectory() as folder:
        speak(Path(folder) / "clips", base.clips, base.questions)
        base = replace(base, folder=str(Path(folder) / "clips"))
        for turn in range(repeats):
            # Forth and back, so that a machine that grows slower does not favour one.
            for name in names if turn % 2 == 0 else names[::-1]:
                one = _measure(_spec(base, name))
                found[name].append(one)
                say(f"turn {turn + 1} of {repeats}, {name}: {one['rows'] / one['seconds']:.2f} rows/s")
    return _summary(found, base)


def _spec(base: Spec, name: str) -> Spec:
    changes = dict(ARMS[name])
    if "batch_tokens" in changes:
        changes["batch_tokens"] = int(base.batch_tokens * changes["batch_tokens"])
    return replace(base, **{"way": "ours", **changes})


def _measure(spec: Spec) -> dict[str, Any]:
    command = [sys.executable, "-m", "speech_llm.bench.arms", json.dumps(asdict(spec))]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        lines = [line for line in done.stderr.splitlines() if line.strip()] or ["no output"]
        raise UserError(f"the measurement of {spec.way} failed: {lines[-1]}")
    return json.loads(done.stdout.splitlines()[-1])


def _summary(found: dict[str, list[dict[str, Any]]], base: Spec) -> dict[str, Any]:
    arms: dict[str, dict[str, Any]] = {}
    for name, turns in found.items():
        own = {
            "first": [t["seconds"] + t["fill_seconds"] for t in turns],
            "cached": [t["seconds"] for t in turns],
        }
        beside = [t["seconds"] for t in found["plain"]]
        arms[name] = {
            "rows_per_s": _median([t["rows"] / t["seconds"] for t in turns]),
            "answer_tokens_per_s": _median([t["answer_tokens"] / t["seconds"] for t in turns]),
            "tokens": turns[0]["tokens"],
            "loss": turns[0]["loss"],
            "compile_seconds": _median([t["compile_seconds"] for t in turns]),
            "memory_mb": _median([t["memory_mb"] for t in turns]),
            "llm_gflops": _median([t["llm_gflops"] for t in turns]),
            "share_of_peak": _median([t["share_of_peak"] for t in turns]),
            "parts": {part: _median([t["parts"][part] for t in turns]) for part in PARTS},
            "fill_parts": {
                part: _median([t["fill_parts"][part] for t in turns]) for part in ("decode", "encode")
            },
            # Turn by turn, since both were measured close to one another.
            **{
                f"{kind}_ratio": [round(p / o, 2) for p, o in zip(beside, seconds, strict=True)]
                for kind, seconds in own.items()
            },
            "profile": turns[-1]["profile"],
        }
    one = found["plain"][0]
    goals: dict[str, Any] = {}
    # The encoding that peers use, so at equal loss; without it our own default.
    same = [name for name in EQUAL if name in arms] or [name for name in ("ours",) if name in arms]
    if same:
        for name, goal in GOALS.items():
            reached = {arm: _reached(arms[arm], name) for arm in same}
            best = max(reached, key=lambda arm: reached[arm])
            goals[name] = {
                "arm": best,
                "goal": goal,
                "found": reached[best],
                "reached": reached[best] >= goal,
            }
    apart = [abs(arms[name]["loss"] - arms["plain"]["loss"]) for name in EQUAL if name in arms]
    if apart:
        most = SAME_LOSS[one["dtype"]]
        goals["equal loss"] = {"goal": most, "found": max(apart), "reached": max(apart) <= most}
    return {
        "machine": {
            "processor": _processor(),
            "cores": os.cpu_count(),
            "device": one["device"],
            "threads": one["threads"],
            "dtype": one["dtype"],
            "load": [round(value, 2) for value in os.getloadavg()],
            "peak_gflops": _median([t["peak_gflops"] for turns in found.values() for t in turns]),
        },
        "rows": one["rows"],
        "clips": base.clips,
        "repeats": len(found["plain"]),
        "arms": arms,
        "goals": goals,
    }


def _reached(arm: dict[str, Any], goal: str) -> float:
    return float(arm[goal]) if goal in arm else _median(arm[f"{goal}_ratio"])


def _median(values: Sequence[float]) -> float:
    return round(statistics.median(values), 4)


def _processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
        return next(line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    except (OSError, StopIteration):
        return platform.processor() or platform.machine()


def as_text(result: dict[str, Any]) -> str:
    """The result as tables for the terminal."""
    machine = result["machine"]
    rows = [
        [
            "way",
            "rows/s",
            "answer tokens/s",
            "first epoch",
            "cached epoch",
            "of matmul peak",
            "memory MB",
            "loss",
        ]
    ]
    for name, arm in result["arms"].items():
        ratios = [f"{_median(arm[f'{kind}_ratio']):.1f} x" for kind in ("first", "cached")]
        rows.append(
            [
                name,
                f"{arm['rows_per_s']:.2f}",
                f"{arm['answer_tokens_per_s']:.0f}",
                *(ratios if name != "plain" else ["1.0 x", "1.0 x"]),
                f"{100 * arm['share_of_peak']:.0f} %",
                f"{arm['memory_mb']:.0f}",
                f"{arm['loss']:.4f}",
            ]
        )
    parts = [["seconds of an epoch", *PARTS]]
    for name, arm in result["arms"].items():
        parts.append([name, *(f"{arm['parts'][part]:.2f}" for part in PARTS)])
    filled = result["arms"].get("ours", {}).get("fill_parts", {})
    lines = [
        f"{result['rows']} rows about {result['clips']} clips of 2 to 4 s, {result['repeats']} turns, medians; {machine['processor']}, "
        f"{machine['cores']} cores, {machine['device']}, {machine['dtype']}, {machine['threads']} threads, load {machine['load'][0]}; "
        f"matmul peak {machine['peak_gflops']:.0f} GFLOP/s",
        align(rows),
        "first epoch, cached epoch: times as fast as the plain way, turn by turn. Plain: every row decoded, padded to 30 s and encoded at "
        "each epoch, one row a prompt, padded, logits everywhere.",
        align(parts),
    ]
    if filled:
        lines.append(
            f"the cache was filled in {filled['decode']:.2f} s of decoding and {filled['encode']:.2f} s of encoding"
        )
    for name, arm in result["arms"].items():
        if arm["compile_seconds"]:
            lines.append(f"{name}: compiling took {arm['compile_seconds']:.0f} s, which is in no ratio")
    for name, goal in result["goals"].items():
        word = "reached" if goal["reached"] else "NOT reached"
        sign = "<=" if name == "equal loss" else ">="
        arm = f" ({goal['arm']})" if "arm" in goal else ""
        lines.append(f"{name.replace('_', ' ')}{arm}: {goal['found']:.3g} ({sign} {goal['goal']:g}): {word}")
    profile = result["arms"].get("ours", {}).get("profile")
    return "\n\n".join([*lines[:4], "\n".join(lines[4:])]) + (f"\n\n{profile}" if profile else "")
