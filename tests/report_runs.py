"""Made-up runs for the report: every kind of file that a run leaves, with figures that are known."""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any

import numpy as np
import soundfile

from eval.stats import rate, wilson_interval
from speech_llm.files import write_json, write_jsonl

TASKS = {"gender": ["male", "female"], "emotion": ["angry", "calm", "sad", "happy"]}


def a_result(right: int, n: int, options: int | None = 2) -> dict[str, Any]:
    """A task's metrics with `right` of `n` right, all instructions seen."""
    chance = 1 / options if options else None
    half = {
        "metric": "accuracy",
        "accuracy": right / n,
        "n": n,
        "unparsed": 1,
        "interval": list(wilson_interval(right, n)),
        "chance": chance,
        "majority": 0.6,
    }
    return {"dimension": "test", **half, "seen": half, "unseen": None}


def json_figures(kept: float, learned: float, n: int = 40) -> dict[str, Any]:
    """The JSON probe where a share `kept` of answers has the form and a share `learned` of those is right."""
    found = {}
    for kind, share in (("audio", kept), ("audio, other words:", kept / 2)):
        right = round(share * learned * n)
        form = round(share * n)
        found |= {f"{kind} {level}": rate(form, n) for level in ("strict", "repaired", "schema")}
        found |= {f"{kind} answer": rate(right, n)}
        if kind == "audio":
            found |= {
                "audio answer only": rate(2, n, "lower"),
                "audio format only": rate(form - right, n, "lower"),
            }
    found |= {
        f"text {level}": rate(round(0.9 * n), n) for level in ("strict", "repaired", "schema", "answer")
    }
    return found


def probes_at(kept: float, learned: float, divergence: float) -> dict[str, Any]:
    """All four probes at one place of the training."""
    return {
        "json": json_figures(kept, learned),
        "general": {"text knowledge": rate(30, 40), "audio knowledge": rate(round(30 * kept), 40)},
        "safety": {
            "text refuses harmful": rate(round(36 * kept), 40),
            "text refuses harmless": rate(round(8 - 4 * kept), 40, "lower"),
        },
        "forgetting": {
            "audio KL": {
                "value": divergence,
                "low": 0.8 * divergence,
                "high": 1.2 * divergence,
                "n": 24,
                "better": "lower",
            }
        },
    }


def make_run(
    folder: Path,
    *,
    skill: float,
    kept: list[float],
    seed: int = 0,
    n: int = 24,
    recipe: dict[str, Any] | None = None,
) -> Path:
    """A run whose model is right with probability `skill`; `kept[e]` is what its probes keep after epoch e; `recipe`: what its
    manifests tell beside the seed."""
    rng = random.Random(seed)
    sounds = folder.parent / "sounds"
    sounds.mkdir(parents=True, exist_ok=True)
    models: dict[str, Any] = {}
    for model, right in (("speech_llm", skill), ("ceiling", 0.9), ("cascade", 0.3)):
        rows, models[model] = [], {}
        for task, options in TASKS.items():
            asked = []
            for number in range(n):
                sound = sounds / f"c{number}.wav"
                if not sound.exists():
                    tone = 0.3 * np.sin(2 * np.pi * (180 + 40 * number) * np.arange(4000) / 8000)
                    soundfile.write(sound, tone.astype(np.float32), 8000)
                label = options[number % len(options)]
                score = float(rng.random() < right)
                said = label if score else rng.choice([option for option in options if option != label])
                asked.append(
                    {
                        "task": task,
                        "id": f"c{number}/{task}",
                        "prompt": f"Which {task}?",
                        "response": f"It is <b>{said}</b>.",
                        "label": label,
                        "parsed": said,
                        "score": score,
                        "seen": number % 2 == 0,
                        "audio": str(sound),
                    }
                )
            parts = {}
            for name, wanted in (("seen", True), ("unseen", False)):
                half = [row for row in asked if row["seen"] is wanted]
                parts[name] = a_result(int(sum(row["score"] for row in half)), len(half), len(options))[
                    "seen"
                ]
            whole = a_result(int(sum(row["score"] for row in asked)), len(asked), len(options))
            models[model][task] = whole | parts
            rows += asked
        wer = {
            "metric": "wer",
            "wer": 0.4,
            "n": n,
            "unparsed": 0,
            "interval": [0.3, 0.5],
            "chance": None,
            "majority": None,
        }
        models[model]["words"] = {"dimension": "test", **wer, "seen": wer, "unseen": None}
        models[model]["natural-gender"] = a_result(n // 2, n) | {"dimension": "natural"}
        write_jsonl(folder / "eval" / model / "predictions.jsonl", rows)
    probes = [
        probes_at(share, min(1, epoch * skill / 2), 0.2 * epoch + 0.05) for epoch, share in enumerate(kept)
    ]
    write_json(
        folder / "results.json",
        {
            "models": models,
            "probes": [{"epoch": epoch, **found} for epoch, found in enumerate(probes)],
            "base_probe": {
                "json": {
                    f"text {level}": rate(36, 40) for level in ("strict", "repaired", "schema", "answer")
                },
                "general": {"text knowledge": rate(30, 40)},
                "safety": {
                    "text refuses harmful": rate(36, 40),
                    "text refuses harmless": rate(4, 40, "lower"),
                },
            },
            "training": {
                "parameters": {"total": 140_000_000, "trained": 3_790_000},
                "steps": 60,
                "rows": 480,
                "epochs": len(kept) - 1,
                "peak_memory_mb": 2048,
                "rows_per_s": 31.5,
            },
        },
    )
    log: list[dict[str, Any]] = [
        {"probe": probes[0], "probe_seconds": {"json": 2.0, "general": 1.0}, "epoch": 0}
    ]
    per_epoch = 60 // max(1, len(kept) - 1)
    for epoch in range(1, len(kept)):
        for step in range(per_epoch):
            place = (epoch - 1) * per_epoch + step
            log.append(
                {
                    "step": place + 1,
                    "epoch": epoch,
                    "loss": 2.5 * 0.97**place + 0.3 * rng.random(),
                    "answer_tokens": 100,
                }
            )
        log.append({"probe": probes[epoch], "probe_seconds": {"json": 2.0, "general": 1.0}, "epoch": epoch})
    write_jsonl(folder / "train" / "log.jsonl", log)
    for stage, seconds in (("corpus", 20.5), ("targets", 130.0), ("train", 300.0), ("eval", 90.0)):
        told = {} if recipe is None else {"version": 1, "recipe": {"seed": seed, **recipe}}
        counts = {"kept": 90, "asked": 100}
        write_json(folder / stage / "manifest.json", {"seconds": seconds, "counts": counts, **told})
    return folder
