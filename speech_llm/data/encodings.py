"""How far apart the two encodings of a clip are, and what each costs: `python -m speech_llm.data.encodings FOLDER`.

    padded      the encoder hears the clip followed by silence up to its native 30 s, as it was pretrained; then trimmed
    own_length  the encoder hears the clip alone

In: sound files. Out: per tapped layer the relative difference |own - padded| / |padded| and the cosine of the two, over all real
frames; and encoder seconds per clip of each, clip by clip.
"""

from __future__ import annotations

import argparse
import json
import platform
import random
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from speech_llm.audio import SUFFIXES, load_audio
from speech_llm.errors import UserError


def measure_encodings(model: Any, processor: Any, paths: Sequence[str | Path]) -> dict[str, Any]:
    """Compare both encodings of these clips; returns `{"clips", "mean_s", "layers": [{"layer", "difference", "cosine"}], "seconds"}`.

    `seconds`: per clip, by encoding; the median of three passes.
    """
    rate = processor.sample_rate_hz
    clips = [load_audio(path, rate) for path in paths]
    heard = {
        padded: [_encode(model, processor, [clip], padded) for clip in clips] for padded in (False, True)
    }
    own, full = (torch.cat([features[0] for features in heard[padded]]).float() for padded in (False, True))
    layers = []
    for place, tap in enumerate(model.config.taps):
        a, b = own[:, place], full[:, place]
        layers.append(
            {
                "layer": tap,
                "difference": round(float((a - b).norm() / b.norm()), 4),
                "cosine": round(float(torch.nn.functional.cosine_similarity(a, b, dim=-1).mean()), 4),
            }
        )
    seconds = {name: _seconds(model, processor, clips, name == "padded") for name in ("own_length", "padded")}
    return {
        "clips": len(clips),
        "mean_s": round(sum(map(len, clips)) / rate / len(clips), 2),
        "frames": len(own),
        "layers": layers,
        "seconds": seconds,
        "ratio": round(seconds["padded"] / seconds["own_length"], 1),
    }


def _encode(model: Any, processor: Any, clips: Sequence[Any], padded: bool) -> torch.Tensor:
    features, counts = processor.mel_features(clips)
    with torch.no_grad():
        return model.encode_audio(features, counts, padded=padded)[0]


def _seconds(model: Any, processor: Any, clips: Sequence[Any], padded: bool) -> float:
    """Seconds per clip, log-mel frames included; the median of three passes."""
    passes = []
    for _ in range(3):
        started = time.perf_counter()
        for clip in clips:
            _encode(model, processor, [clip], padded)
        passes.append((time.perf_counter() - started) / len(clips))
    return round(sorted(passes)[1], 4)


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m speech_llm.data.encodings", description=__doc__)
    parser.add_argument("folder", type=Path, help="folder of sound files")
    parser.add_argument("--clips", type=int, default=20, help="how many are drawn, by chance (default 20)")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--json", type=Path, help="also write the figures to this file")
    given = parser.parse_args()
    files = sorted(file for file in given.folder.rglob("*") if file.suffix.lower() in SUFFIXES)
    if not files:
        raise SystemExit(f"{given.folder}: no sound files")
    from speech_llm.model import build_model
    from speech_llm.recipe_learning import TrainableSection
    from speech_llm.recipe_model import ModelSection

    try:
        model, processor = build_model(ModelSection(), TrainableSection(), dtype=torch.float32)
        chosen = random.Random(given.seed).sample(files, min(given.clips, len(files)))
        found = measure_encodings(model, processor, chosen)
    except UserError as error:
        raise SystemExit(str(error)) from None
    threads = torch.get_num_threads()
    print(
        f"{found['clips']} clips of {found['mean_s']} s on average, {threads} threads on {platform.machine()}"
    )
    print(f"{'layer':>6}  {'difference':>10}  {'cosine':>7}")
    for row in found["layers"]:
        print(f"{row['layer']:>6}  {row['difference']:>10.4f}  {row['cosine']:>7.4f}")
    seconds = found["seconds"]
    print(
        f"encoder seconds per clip: own_length {seconds['own_length']:.4f}, padded {seconds['padded']:.4f} ({found['ratio']} x)"
    )
    if given.json is not None:
        given.json.write_text(json.dumps(found, indent=2) + "\n")


if __name__ == "__main__":
    main()
