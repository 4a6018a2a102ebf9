"""The quickstart's corpus: short clips whose labels are true by construction.

    sentence x (gender, accent, speed) x voice, pitch -> eSpeak NG -> level, background noise -> clips/*.flac

In: how many clips. Out: `train.jsonl`, `test.jsonl` and `natural.jsonl` with the labels of each clip, its exact words and
how it was made. Training and test share neither a voice nor a sentence, and the harder `natural` test has voices of
another kind altogether. The words say nothing about the voice (see `sentences`), and every combination of gender, accent
and speed is equally frequent, so that no attribute can be guessed from another.
"""

from __future__ import annotations

import concurrent.futures
import itertools
import multiprocessing
import os
import random
import zlib
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import soundfile
import soxr  # type: ignore[import-untyped]
from tqdm import tqdm

from speech_llm import assets
from speech_llm.audio import SAMPLE_RATE_HZ
from speech_llm.errors import UserError
from speech_llm.files import explain_os_error, write_jsonl
from speech_llm.synthesis import espeak, natural
from speech_llm.synthesis.sentences import compose

WORDS_PER_MINUTE = {"slow": 115, "normal": 170, "fast": 250}
# eSpeak NG's voice variants; those of the test are never trained on.
VARIANTS: dict[str, dict[str, tuple[str, ...]]] = {
    "train": {"female": ("f2", "f3", "f4", "Annie"), "male": ("m1", "m3", "m4", "m7")},
    "test": {"female": ("f1", "f5"), "male": ("m2", "m8")},
}
NOISES = ("none", "none", "white", "pink", "hum")
LEVEL_DBFS = (-30.0, -14.0)
SNR_DB = (15.0, 35.0)
# A part is made by one process, clip after clip, from voices loaded afresh: natural voices draw their timing from a
# generator that goes on from clip to clip, so what is heard depends on the parts and not on how many processes there are.
NATURAL_PARTS, ESPEAK_PART = 4, 64
# Fewer clips are made sooner than other processes are started.
WORTH_PROCESSES = 32


def build_quickstart(
    out_dir: Path,
    train_clips: int = 1240,
    test_clips: int = 240,
    natural_clips: int = 60,
    seed: int = 0,
    progress: bool = True,
) -> None:
    """Write clips and manifests under `out_dir`; clips that are already there are kept.

    Without the `demo` extra there is no `natural.jsonl`. Raises `UserError` when a synthesiser cannot be had, or the
    grammar has too few sentences.
    """
    plans = {
        "train": list(espeak_plan("train", train_clips, seed)),
        "test": list(espeak_plan("test", test_clips, seed)),
    }
    if natural_clips and natural.available():
        plans["natural"] = list(natural_plan(natural_clips, seed))
    elif natural_clips:
        tqdm.write("the natural voices are left out: pip install onnxruntime adds them")
    # The slow ones first, so that no process is left alone with them at the end.
    slow = plans.get("natural", [])
    fast = [*plans["train"], *plans["test"]]
    missing = {row["id"] for row in (*slow, *fast) if not (out_dir / row["audio"]).exists()}
    # A part of natural voices is made whole, or an interrupted run would draw other timings than one that was not.
    parts = [slow[start::NATURAL_PARTS] for start in range(NATURAL_PARTS)]
    parts = [part for part in parts if any(row["id"] in missing for row in part)]
    fast = [row for row in fast if row["id"] in missing]
    parts += [fast[start : start + ESPEAK_PART] for start in range(0, len(fast), ESPEAK_PART)]
    total = sum(len(part) for part in parts)
    with tqdm(total=total, desc="synthesise", unit="clip", disable=not progress or not total) as bar:
        if total < WORTH_PROCESSES:
            for part in parts:
                _make_part(part, out_dir, bar.update)
        else:
            _side_by_side(parts, out_dir, bar)
    for split, rows in plans.items():
        write_jsonl(out_dir / f"{split}.jsonl", rows)


def _make_part(rows: list[dict[str, Any]], out_dir: Path, done: Callable[[], Any] | None = None) -> None:
    natural.start_over()
    for row in rows:
        _write(out_dir / row["audio"], _sound(row))
        (done or _done)()


def _side_by_side(parts: list[list[dict[str, Any]]], out_dir: Path, bar: Any) -> None:
    """Make the parts in as many processes as there are cores; `bar` moves clip by clip."""
    natural_too = any("words_per_minute" not in part[0] for part in parts)
    for asset in (assets.ESPEAK, assets.PIPER_JOE, assets.KOKORO)[: 3 if natural_too else 1]:
        assets.resolve(asset)  # fetched here, before several processes want it
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    context = multiprocessing.get_context("spawn")
    finished = context.SimpleQueue()
    with concurrent.futures.ProcessPoolExecutor(
        min(cores, len(parts)), context, initializer=_tell_here, initargs=(finished,)
    ) as pool:
        waiting = {pool.submit(_make_part, part, out_dir) for part in parts}
        try:
            while waiting:
                ready, waiting = concurrent.futures.wait(waiting, 0.3, concurrent.futures.FIRST_COMPLETED)
                while not finished.empty():
                    bar.update(finished.get())
                for future in ready:
                    future.result()  # what went wrong there goes wrong here
        except BaseException:
            pool.shutdown(wait=False, cancel_futures=True)
            raise


_finished: Any = None


def _tell_here(finished: Any) -> None:
    """In a process of its own: where to say that a clip is made."""
    global _finished
    _finished = finished


def _done() -> None:
    _finished.put(1)


def espeak_plan(split: str, count: int, seed: int) -> Iterator[dict[str, Any]]:
    """Manifest rows of a split (`train` or `test`); a pure function of its arguments."""
    rng = random.Random(f"quickstart {split} {seed}")
    cells = _balanced(itertools.product(VARIANTS[split], espeak.ACCENTS, WORDS_PER_MINUTE), count, rng)
    turns = {gender: itertools.cycle(variants) for gender, variants in VARIANTS[split].items()}
    for number, ((gender, accent, speed), text) in enumerate(
        zip(cells, compose(split, count, seed), strict=True)
    ):
        yield {
            "id": f"{split}-{number:04d}",
            "audio": f"clips/{split}-{number:04d}.flac",
            "text": text,
            "gender": gender,
            "accent": accent,
            "speed": speed,
            "voice": f"{espeak.ACCENTS[accent]}+{next(turns[gender])}",
            "words_per_minute": round(WORDS_PER_MINUTE[speed] * rng.uniform(0.94, 1.06)),
            "pitch": rng.randint(35, 65),
            "pitch_range": rng.randint(35, 75),
            **_room(rng),
        }


def natural_plan(count: int, seed: int) -> Iterator[dict[str, Any]]:
    """Manifest rows of the natural voices: as many female as male clips, three speeds each, no accent label."""
    rng = random.Random(f"quickstart natural {seed}")
    cells = _balanced(itertools.product(("female", "male"), WORDS_PER_MINUTE), count, rng)
    # The one male Kokoro voice speaks as often as each female one; Piper's joe takes the rest.
    male = [voice for voice in natural.VOICES if voice.gender == "male"]
    turns = {
        "female": itertools.cycle(voice for voice in natural.VOICES if voice.gender == "female"),
        "male": itertools.cycle([male[0], male[0], male[0], male[1]]),
    }
    sentences = compose("test", count, seed + 1)
    for number, ((gender, speed), text) in enumerate(zip(cells, sentences, strict=True)):
        yield {
            "id": f"natural-{number:04d}",
            "audio": f"clips/natural-{number:04d}.flac",
            "text": text,
            "gender": gender,
            "speed": speed,
            "voice": next(turns[gender]).name,
            **_room(rng),
        }


def _balanced(cells: Iterable[tuple[str, ...]], count: int, rng: random.Random) -> list[tuple[str, ...]]:
    """`count` cells, each as often as every other (give or take one), in random order."""
    every = list(cells)
    out: list[tuple[str, ...]] = []
    while len(out) < count:
        out += rng.sample(every, len(every))
    return out[:count]


def _room(rng: random.Random) -> dict[str, Any]:
    """Level and background noise of a clip."""
    noise = rng.choice(NOISES)
    return {
        "level_dbfs": round(rng.uniform(*LEVEL_DBFS), 1),
        "noise": noise,
        "snr_db": None if noise == "none" else round(rng.uniform(*SNR_DB), 1),
    }


def _sound(row: dict[str, Any]) -> np.ndarray:
    """Samples of a manifest row at 16 kHz, with its level and noise."""
    if "words_per_minute" in row:
        speech = espeak.synthesize(
            row["text"], row["voice"], row["words_per_minute"], row["pitch"], row["pitch_range"]
        )
        rate = espeak.SAMPLE_RATE_HZ
    else:
        voice = next(voice for voice in natural.VOICES if voice.name == row["voice"])
        speech, rate = natural.synthesize(row["text"], voice, row["speed"])
    speech = soxr.resample(speech, rate, SAMPLE_RATE_HZ).astype(np.float32)
    return in_room(speech, row["level_dbfs"], row["noise"], row["snr_db"], zlib.crc32(row["id"].encode()))


def in_room(speech: np.ndarray, level_dbfs: float, noise: str, snr_db: float | None, seed: int) -> np.ndarray:
    """Speech (n,) brought to a level (RMS, dB of full scale) with background noise `snr_db` below it, never clipped."""
    speech = speech * _gain(speech, level_dbfs)
    if snr_db is not None:
        background = _noise(noise, len(speech), np.random.default_rng(seed))
        speech = speech + background * _gain(background, level_dbfs - snr_db)
    peak = float(np.abs(speech).max(initial=0.0))
    return (speech * min(1.0, 0.98 / max(peak, 1e-9))).astype(np.float32)


def _gain(samples: np.ndarray, level_dbfs: float) -> float:
    rms = float(np.sqrt(np.mean(np.square(samples, dtype=np.float64)))) if len(samples) else 0.0
    return 10 ** (level_dbfs / 20) / rms if rms > 0 else 0.0


def _noise(kind: str, length: int, rng: np.random.Generator) -> np.ndarray:
    """Background of shape (length,) at 16 kHz: flat ("white"), falling by 3 dB an octave ("pink"), or mains "hum"."""
    if kind == "white":
        return rng.standard_normal(length)
    if kind == "pink":
        spectrum = np.fft.rfft(rng.standard_normal(length))
        frequencies = np.fft.rfftfreq(length, 1 / SAMPLE_RATE_HZ)
        return np.fft.irfft(spectrum / np.sqrt(np.maximum(frequencies, 20.0)), length)
    if kind == "hum":
        time_s = np.arange(length) / SAMPLE_RATE_HZ
        base = rng.choice([50.0, 60.0])
        tones = sum(np.sin(2 * np.pi * base * k * time_s + rng.uniform(0, 6.28)) / k for k in (1, 2, 3, 5))
        return np.asarray(tones + 0.05 * rng.standard_normal(length))
    raise ValueError(f"unknown noise {kind!r}")


def _write(path: Path, samples: np.ndarray) -> None:
    """A FLAC file, written aside and renamed."""
    if not len(samples):
        raise UserError(f"{path}: the synthesiser made no sound")
    aside = path.with_name(f".{path.name}.part")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        soundfile.write(aside, samples, SAMPLE_RATE_HZ, format="FLAC", subtype="PCM_16")
        aside.replace(path)
    except OSError as error:
        raise explain_os_error(error, path) from error
    except soundfile.SoundFileError as error:
        raise UserError(f"{path}: could not be written ({error}); is the disk full?") from error
    finally:
        aside.unlink(missing_ok=True)
