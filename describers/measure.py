"""How right and how fast the signal describers are: manifests of recordings go in, tables for docs/results come out.

    python -m describers.measure speed MANIFEST...                      times real time, each describer on one core
    python -m describers.measure pitch MANIFEST...                      medians by gender, through a telephone
    python -m describers.measure tempo MANIFEST...                      words against syllable nuclei
    python -m describers.measure noise MANIFEST... --with MANIFEST      SNR found against noise mixed to order
    python -m describers.measure reverberation MANIFEST... --with MANIFEST   RT60 found against rooms of known decay
    python -m describers.measure calibrate MANIFEST...                  the constants that reverberation.py has
    python -m describers.measure transcript MANIFEST... --split dev     words wrong, against plain Whisper

A manifest has lines with `audio` (relative to it), `duration_s`, and where a table needs them `gender`, `text`, or
`kind` (noise, rir) for `--with`, or `split`. Clips are taken evenly over a manifest, so that the same command gives the same table.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import scipy.signal

from describers.noise import NoiseDescriber
from describers.pitch import MEAN_HZ, PitchDescriber
from describers.records import Attribute, Clip, Describer, windows
from describers.reverberation import (
    ReverberationDescriber,
    fall_counts,
    impulse_rt60_s,
    reverberation_band,
    steepest_rt60_s,
)
from describers.run import DEFAULT_ASR
from describers.speech_activity import speech_activity
from describers.tempo import SYLLABLES_PER_NUCLEUS, PausesDescriber, SpeedDescriber, count_words
from describers.transcript import TranscriptDescriber
from describers.volume import VolumeDescriber
from describers.whisper import Whisper
from eval.matching import normalise_text
from eval.stats import bootstrap_ratio
from speech_llm.audio import SAMPLE_RATE_HZ, load_audio
from speech_llm.errors import UserError
from speech_llm.files import read_jsonl

SNRS_DB = (0, 5, 10, 15, 20, 25, 30)
BURSTS_S = ((0.1, 0.4), (0.3, 0.7), (1.0, 1.0))
RT60S_S = (0.2, 0.3, 0.4, 0.6, 0.8, 1.0, 1.2)


def load(manifests: Sequence[Path], limit: int, least_s: float = 0.0, **wanted: Any) -> list[Clip]:
    """About `limit` clips of each manifest, evenly spread over its lines that are long enough and have `wanted`."""
    clips = []
    for manifest in manifests:
        rows = [
            row
            for _, row in read_jsonl(manifest)
            if row.get("duration_s", least_s) >= least_s
            and all(key in row if value is ... else row.get(key) == value for key, value in wanted.items())
        ]
        for row in rows[:: max(len(rows) // limit, 1)][:limit]:
            samples = load_audio(manifest.parent / row["audio"])
            path = manifest.parent / row["audio"]
            clips.append(Clip(row.get("id", row["audio"]), path, len(samples) / SAMPLE_RATE_HZ, samples, row))
    if not clips:
        raise UserError(
            f"{', '.join(map(str, manifests))}: no line is long enough and has the columns needed"
        )
    return clips


def again(clip: Clip, samples: np.ndarray | None = None) -> Clip:
    """The clip with nothing measured yet, with other samples where given."""
    return Clip(clip.id, clip.path, clip.duration_s, clip.samples if samples is None else samples, clip.row)


def speed(clips: Sequence[Clip]) -> Iterator[str]:
    """CPU time of each describer alone, and of all with what they share; sound already decoded."""
    total_s = sum(clip.duration_s for clip in clips)
    describers: list[Describer] = [PitchDescriber(), VolumeDescriber(), SpeedDescriber(), PausesDescriber(), NoiseDescriber(), ReverberationDescriber()]  # fmt: skip
    for describer in describers:  # the networks are loaded once
        describer.describe([again(clips[0])])
    yield f"{len(clips)} clips, {total_s:.0f} s; times real time of one core (CPU time)"
    for describer in describers:
        fresh = [again(clip) for clip in clips]
        start = time.process_time()
        describer.describe(fresh)
        yield f"{describer.name:14} {total_s / (time.process_time() - start):6.0f}"
    fresh = [again(clip) for clip in clips]
    start = time.process_time()
    for describer in describers:
        describer.describe(fresh)
    yield f"{'all together':14} {total_s / (time.process_time() - start):6.0f}"


def pitch(clips: Sequence[Clip]) -> Iterator[str]:
    """Median F0 by gender, how well it alone tells the gender, and what a telephone changes."""
    telephone = scipy.signal.butter(4, [300, 3400], "bandpass", fs=SAMPLE_RATE_HZ, output="sos")
    middle_hz = float(np.sqrt(MEAN_HZ["male"] * MEAN_HZ["female"]))
    for gender in ("male", "female"):
        chosen = [clip for clip in clips if clip.row["gender"] == gender]
        hz = medians(chosen)
        through = medians(
            [again(c, scipy.signal.sosfilt(telephone, c.samples).astype(np.float32)) for c in chosen]
        )
        both = ~np.isnan(hz) & ~np.isnan(through)
        moved = np.abs(through[both] / hz[both] - 1) > 0.1
        known = hz[~np.isnan(hz)]
        right = (known < middle_hz) == (gender == "male")
        yield (
            f"{gender:7} {len(chosen)} clips, told of {len(known)}: median {np.median(known):.0f} Hz, 5 to 95 % "
            f"{np.quantile(known, 0.05):.0f} to {np.quantile(known, 0.95):.0f} Hz, between speakers "
            f"{12 * np.std(np.log2(known)):.1f} semitones, on its side of {middle_hz:.0f} Hz {right.mean():.0%}, "
            f"through a telephone told of {both.sum()}, more than 10 % off {moved.sum()}"
        )


def medians(clips: Sequence[Clip]) -> np.ndarray:
    """The `pitch_hz` of every clip, NaN where nothing is told."""
    told = PitchDescriber().describe(list(clips))
    return np.array([found["pitch_hz"].value if "pitch_hz" in found else np.nan for found in told])


def tempo(clips: Sequence[Clip]) -> Iterator[str]:
    """Words a minute by the true words against syllable nuclei a second, and the words of both."""
    by_words, by_nuclei = [], []
    for clip in clips:
        known = again(clip)
        known.known["transcript"] = Attribute(clip.row["text"])
        if count_words(clip.row["text"]) < 5:
            continue
        first, second = SpeedDescriber().describe([known, again(clip)])
        if first and second:
            by_words.append((first["words_per_minute"].value, first["speed"].value))
            word = second["speed"].value if "speed" in second else "(no word)"
            by_nuclei.append((second["syllables_per_s"].value, word))
    words = np.array([rate for rate, _ in by_words])
    nuclei = np.array([rate for rate, _ in by_nuclei]) / SYLLABLES_PER_NUCLEUS
    bands = [(one[1], other[1]) for one, other in zip(by_words, by_nuclei, strict=True)]
    yield (
        f"{len(words)} clips: words/min median {np.median(words):.0f} (5 to 95 % {np.quantile(words, 0.05):.0f} to "
        f"{np.quantile(words, 0.95):.0f}), nuclei/s median {np.median(nuclei):.1f} ({np.quantile(nuclei, 0.05):.1f} to "
        f"{np.quantile(nuclei, 0.95):.1f}), nuclei a word {np.median(60 * nuclei / words):.2f}, correlation "
        f"{np.corrcoef(words, nuclei)[0, 1]:.2f}"
    )
    yield (
        f"same word (slow, normal, fast) {np.mean([one == other for one, other in bands]):.0%}; by words "
        f"{counts([one for one, _ in bands])}; by nuclei {counts([other for _, other in bands])}"
    )


def counts(values: Sequence[str]) -> str:
    """ "fast 2, normal 9"."""
    return ", ".join(f"{value} {values.count(value)}" for value in sorted(set(values)))


def noise(clips: Sequence[Clip], noises: Sequence[tuple[str, np.ndarray]]) -> Iterator[str]:
    """SNR found less SNR mixed, for each noise; the reference level is that of the speech without its pauses."""
    own = [found["snr_db"].value for found in NoiseDescriber().describe(list(clips)) if "snr_db" in found]
    yield (
        f"{len(clips)} clips; as they are: told of {len(own)}, median {np.median(own):.0f} dB" if own else ""
    )
    yield "noise            " + "".join(f"{snr_db:>16} dB" for snr_db in SNRS_DB)
    for name, sound in noises:
        cells = []
        for snr_db in SNRS_DB:
            told = NoiseDescriber().describe([again(clip, mixed(clip, sound, snr_db)) for clip in clips])
            off = np.array([found["snr_db"].value - snr_db for found in told if "snr_db" in found])
            cells.append(
                f"{np.median(off):+5.1f} {np.mean(np.abs(off) <= 3):4.0%} of {len(off):2}"
                if len(off)
                else "-"
            )
        yield f"{name:16} " + "".join(f"{cell:>19}" for cell in cells)
    yield "each cell: median error in dB, share within 3 dB, of so many clips that a number is told of"


def mixed(clip: Clip, sound: np.ndarray, snr_db: float) -> np.ndarray:
    """The clip with `sound` (repeated or cut to its length) `snr_db` below the level of its speech."""
    assert clip.samples is not None
    background = np.resize(sound, len(clip.samples))
    background = background - background.mean()
    level_db = speech_activity(clip).speech_dbfs() - snr_db
    gain = 10 ** (level_db / 20) / np.sqrt(np.mean(np.square(background, dtype=np.float64)))
    out: np.ndarray = (clip.samples + gain * background).astype(np.float32)
    return out


def reverberation(clips: Sequence[Clip], rooms: Sequence[tuple[str, np.ndarray]]) -> Iterator[str]:
    """RT60 found against RT60 of the room, first exponential decays, then the impulse responses given."""
    yield f"{len(clips)} clips; as they are: {_rooms_line(clips, None)}"
    errors = []
    for rt60_s in RT60S_S:
        convolved = [
            again(clip, in_room(clip, exponential_room(rt60_s, index))) for index, clip in enumerate(clips)
        ]
        found = _told_rt60s(convolved)
        errors += list(found - rt60_s)
        yield f"exponential {rt60_s:.1f} s: {_rooms_line(convolved, rt60_s)}"
    yield f"exponential, all: root mean square error {np.sqrt(np.mean(np.square(errors))):.2f} s"
    for name, response in rooms:
        true_s = impulse_rt60_s(response)
        convolved = [again(clip, in_room(clip, response)) for clip in clips]
        shown = "no straight decay" if true_s is None else f"{true_s:.2f} s"
        yield f"{name} ({shown}): {_rooms_line(convolved, true_s)}"


def _told_rt60s(clips: Sequence[Clip]) -> np.ndarray:
    return np.array(
        [f["rt60_s"].value for f in ReverberationDescriber().describe(list(clips)) if "rt60_s" in f]
    )


def _rooms_line(clips: Sequence[Clip], true_s: float | None) -> str:
    found = _told_rt60s(clips)
    if not len(found):
        return f"told of 0 of {len(clips)}"
    words = counts([reverberation_band(value) or "(no word)" for value in found])
    return (
        f"told of {len(found)}, median {np.median(found):.2f} s (5 to 95 % {np.quantile(found, 0.05):.2f} to "
        f"{np.quantile(found, 0.95):.2f}); {words}"
    )


def exponential_room(rt60_s: float, seed: int) -> np.ndarray:
    """An impulse response: the direct sound, 2 ms later noise that falls by 60 dB in `rt60_s`, as loud (even seeds) or half as loud."""
    length = round(1.2 * rt60_s * SAMPLE_RATE_HZ)
    time_s = np.arange(length) / SAMPLE_RATE_HZ
    response = np.random.default_rng(seed).normal(size=length) * 10 ** (-3 * time_s / rt60_s)
    response[: round(0.002 * SAMPLE_RATE_HZ)] = 0
    response /= np.sqrt(np.square(response).sum())
    response[0] = 1.0 if seed % 2 == 0 else 2.0
    return response


def in_room(clip: Clip, response: np.ndarray) -> np.ndarray:
    """The clip convolved with an impulse response, as long as before and no louder than full scale."""
    assert clip.samples is not None
    wet = scipy.signal.fftconvolve(clip.samples, response)[: len(clip.samples)]
    out: np.ndarray = (wet / max(np.abs(wet).max() / 0.9, 1.0)).astype(np.float32)
    return out


def calibrate(clips: Sequence[Clip]) -> Iterator[str]:
    """Least squares of log RT60 over the two statistics of `reverberation.steepest_rt60_s`."""
    rows, targets = [], []
    for rt60_s in (*RT60S_S, 1.6):
        for index, clip in enumerate(clips):
            wet = again(clip, in_room(clip, exponential_room(rt60_s, index)))
            statistics = steepest_rt60_s(fall_counts(windows(wet), speech_activity(wet)))
            rows.append([1.0, *np.log(statistics)])
            targets.append(np.log(rt60_s))
    fit, *_ = np.linalg.lstsq(np.array(rows), np.array(targets), rcond=None)
    off = np.exp(np.array(rows) @ fit) - np.exp(targets)
    yield f"_FIT = ({', '.join(f'{value:.3f}' for value in fit)})"
    yield f"{len(clips)} clips; root mean square error {np.sqrt(np.mean(np.square(off))):.2f} s on the same clips"


def transcript(clips: Sequence[Clip], asr: str) -> Iterator[str]:
    """Word error rate of the transcript describer, left out counting as nothing said, and of Whisper as it comes.

    Plain Whisper is the library's `generate`, greedy, on 30 s of every clip. Of a multilingual one it is also told what the describer
    writes in the language that the lines state. All texts go through Whisper's normaliser.
    """
    import torch

    plain = Whisper(asr)
    described = TranscriptDescriber(asr)
    described.describe([again(clips[0])])  # loads it
    ways = [("describer", [again(clip) for clip in clips])]
    if plain.languages and all("language" in clip.row for clip in clips):
        ways.append(("language given", [again(clip) for clip in clips]))
        for clip in ways[-1][1]:
            clip.known = {"language": Attribute(clip.row["language"])}
    results = []
    for name, asked in ways:
        start = time.process_time()
        told = described.describe(asked)
        texts = [str(found["transcript"].value) if "transcript" in found else "" for found in told]
        results.append((name, texts, time.process_time() - start))
    start = time.process_time()
    written = []
    # Without a task a multilingual one is not told to write what is said.
    task = {"task": "transcribe"} if plain.languages else {}
    for clip in clips:
        assert clip.samples is not None
        made = plain.processor.feature_extractor(
            clip.samples, sampling_rate=SAMPLE_RATE_HZ, return_tensors="pt"
        )
        with torch.inference_mode():
            features = made.input_features.to(plain.device)
            tokens = plain.model.generate(features, num_beams=1, do_sample=False, **task)
        written += plain.tokenizer.batch_decode(tokens, skip_special_tokens=True)
    results.append(("plain Whisper", written, time.process_time() - start))
    total_s = sum(clip.duration_s for clip in clips)
    speakers = len({clip.row.get("speaker", clip.id) for clip in clips})
    yield f"{len(clips)} clips of {speakers} speakers, {total_s:.0f} s; {results[0][1].count('')} left out by the describer"
    for name, said, spent_s in results:
        wrong, words = word_errors([clip.row["text"] for clip in clips], said)
        low, high = bootstrap_ratio(wrong, words)
        yield (
            f"{name:14} {sum(wrong) / sum(words):6.1%} of {sum(words)} words wrong (95 % by clips {low:.1%} to {high:.1%}), "
            f"{total_s / spent_s:.0f} times real time (CPU time)"
        )


def word_errors(texts: Sequence[str], said: Sequence[str]) -> tuple[list[int], list[int]]:
    """Of every clip the words substituted, deleted or inserted, and the words of the text."""
    import jiwer

    wrong, words = [], []
    for text, heard in zip(texts, said, strict=True):
        found = jiwer.process_words(normalise_text(text), normalise_text(heard))
        wrong.append(found.substitutions + found.deletions + found.insertions)
        words.append(found.substitutions + found.deletions + found.hits)
    return wrong, words


def main(arguments: Sequence[str] | None = None) -> int:
    """The command; returns its exit code."""
    parser = argparse.ArgumentParser("python -m describers.measure", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)  # fmt: skip
    parser.add_argument(
        "table", choices=("speed", "pitch", "tempo", "noise", "reverberation", "calibrate", "transcript")
    )
    parser.add_argument("manifests", nargs="+", type=Path, metavar="MANIFEST")
    parser.add_argument("--with", dest="other", type=Path, metavar="MANIFEST", help="noises or rooms")
    parser.add_argument("--limit", type=int, default=30, help="clips of each manifest (30)")
    parser.add_argument("--split", help="only lines of this split")
    parser.add_argument("--asr", default=DEFAULT_ASR, metavar="REF", help="the Whisper model of `transcript`")
    given = parser.parse_args(arguments)
    try:
        for line in _table(given):
            print(line, flush=True)
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0


def _table(given: argparse.Namespace) -> Iterator[str]:
    name, other = given.table, given.other
    only = {} if given.split is None else {"split": given.split}

    def clips(**wanted: Any) -> list[Clip]:
        return load(given.manifests, given.limit, **wanted, **only)

    if name == "speed":
        return speed(clips())
    if name == "pitch":
        return pitch(clips(gender=...))
    if name == "tempo":
        return tempo(clips(least_s=1.5, text=...))
    if name == "transcript":
        return transcript(clips(text=...), given.asr)
    if name == "calibrate":
        return calibrate(clips(least_s=3.0))
    if name == "noise":
        return noise(
            clips(least_s=2.0), [*_made_noises(), *([] if other is None else _sounds(other, "noise", 4.0))]
        )
    return reverberation(clips(least_s=3.0), [] if other is None else _sounds(other, "rir", 0.0))


def _made_noises() -> list[tuple[str, np.ndarray]]:
    """White noise, low noise (most of it below 300 Hz), and white noise that comes and goes; 20 s each."""
    white = np.random.default_rng(0).normal(size=20 * SAMPLE_RATE_HZ)
    return [
        ("white", white),
        ("low", scipy.signal.lfilter([1], [1, -0.97], white)),
        *((f"bursts {on_s:g}/{off_s:g} s", bursts(white, on_s, off_s)) for on_s, off_s in BURSTS_S),
    ]


def bursts(sound: np.ndarray, on_s: float, off_s: float, seed: int = 0) -> np.ndarray:
    """The sound, heard for about `on_s`, silent for about `off_s` (each half to one and a half times that), and so on."""
    rng = np.random.default_rng(seed)
    gate = np.zeros(len(sound))
    place = 0
    while place < len(sound):
        begin = place + round(rng.uniform(0.5, 1.5) * off_s * SAMPLE_RATE_HZ)
        place = begin + round(rng.uniform(0.5, 1.5) * on_s * SAMPLE_RATE_HZ)
        gate[begin:place] = 1
    return sound * gate


def _sounds(manifest: Path, kind: str, least_s: float) -> list[tuple[str, np.ndarray]]:
    return [
        (Path(clip.row["audio"]).stem, np.asarray(clip.samples))
        for clip in load([manifest], 1000, least_s, kind=kind)
    ]


if __name__ == "__main__":
    sys.exit(main())
