"""How fast somebody speaks and how often they pause: words or syllables in, per time of speech without its pauses."""

from __future__ import annotations

import re
from collections.abc import Sequence

import numpy as np
import scipy.signal

from describers.pitch import HOP_S, voiced_pitch
from describers.records import Attribute, Clip, windows
from describers.speech_activity import speech_activity

# Shorter gaps are articulation (Goldman-Eisler 1968: pauses from 250 ms on).
LEAST_PAUSE_S = 0.25
# Two words or one second say nothing about a tempo.
LEAST_WORDS, LEAST_SPEECH_S = 4, 1.0
# British English has 170 words a minute on average and 1.41 syllables a word (Tauroza & Allison 1990), pauses counted. That
# pauses are a tenth of it is an assumption of ours: without them it is then 190 words a minute and 4.5 syllables a
# second. Slow and fast are a quarter away from that, five times the just noticeable difference (5 %, Quené 2007).
MEAN_WORDS_PER_MINUTE = 190.0
MEAN_SYLLABLES_PER_S = 4.5
SLOW, FAST = 1 / 1.25, 1.25
# de Jong & Wempe (2009): a nucleus is a voiced peak of intensity at most 25 dB below the loudest, between dips of 2 dB.
PEAK_BELOW_LOUDEST_DB = 25.0
DIP_DB = 2.0
# Such peaks miss weak syllables: 1.15 are found in a word on 54 clips of three corpora (`python -m describers.measure tempo`).
SYLLABLES_PER_NUCLEUS = 1.41 / 1.15
# A rate that is estimated so roughly gives no word when it is this near to a limit.
_WORD_MARGIN = 1.1
_FRAME, _HOP = 512, 256  # 32 ms every 16 ms, the frames of the pitch
# English words are counted, in other languages words are longer or shorter.
_COUNTED_LANGUAGES = ("en", "english")


class SpeedDescriber:
    """`words_per_minute` (a transcript is known) or `syllables_per_s`, and `speed` (slow, normal, fast).

    Per minute and second of speech, pauses of 0.25 s and more left out. Nothing from less than a second of speech.
    """

    name = "speed"
    attributes: tuple[str, ...] = ("speed", "words_per_minute", "syllables_per_s")
    reads: tuple[str, ...] = ("transcript", "language")

    def describe(self, clips: Sequence[Clip]) -> list[dict[str, Attribute]]:
        return [self._describe(clip) for clip in clips]

    def _describe(self, clip: Clip) -> dict[str, Attribute]:
        speech_s = articulated_s(clip)
        if speech_s < LEAST_SPEECH_S:
            return {}
        language = str(clip.known["language"].value).casefold() if "language" in clip.known else "en"
        if "transcript" in clip.known and language in _COUNTED_LANGUAGES:
            words = count_words(str(clip.known["transcript"].value))
            if words < LEAST_WORDS:
                return {}
            rate, mean = 60 * words / speech_s, MEAN_WORDS_PER_MINUTE
            name, unit = "words_per_minute", "words/min"
            how = f"{words} words of the transcript in {speech_s:.1f} s of speech without pauses"
        else:
            nuclei = count_nuclei(clip)
            if nuclei < LEAST_WORDS:
                return {}
            rate, mean = SYLLABLES_PER_NUCLEUS * nuclei / speech_s, MEAN_SYLLABLES_PER_S
            name, unit = "syllables_per_s", "syllables/s"
            how = (
                f"{nuclei} syllable nuclei (de Jong & Wempe) in {speech_s:.1f} s of speech without pauses, "
                f"{SYLLABLES_PER_NUCLEUS:.2f} syllables each"
            )
        found = {name: Attribute(round(rate, 1), unit, how=how)}
        band = speed_band(rate / mean, 1.0 if name == "words_per_minute" else _WORD_MARGIN)
        if band is not None:
            limits = f"normal is {SLOW * mean:.3g} to {FAST * mean:.3g} {unit}"
            found["speed"] = Attribute(band, how=f"{how}, {limits}")
        return found


class PausesDescriber:
    """`pauses` (how many of 0.25 s and more between words), `pause_share` (their share of the time from first to last word).

    Nothing where nobody speaks.
    """

    name = "pauses"
    attributes: tuple[str, ...] = ("pauses", "pause_share")

    def describe(self, clips: Sequence[Clip]) -> list[dict[str, Attribute]]:
        return [self._describe(clip) for clip in clips]

    def _describe(self, clip: Clip) -> dict[str, Attribute]:
        activity = speech_activity(clip)
        if activity.speech_s < LEAST_SPEECH_S:
            return {}
        pauses = activity.pauses(LEAST_PAUSE_S)
        whole_s = activity.spans[-1][1] - activity.spans[0][0]
        how = f"gaps of at least {LEAST_PAUSE_S} s in what Silero VAD takes for speech"
        share = sum(end_s - start_s for start_s, end_s in pauses) / whole_s
        return {
            "pauses": Attribute(len(pauses), how=how),
            "pause_share": Attribute(round(share, 2), how=f"{how}, share of {whole_s:.1f} s"),
        }


def speed_band(relative: float, margin: float = 1.0) -> str | None:
    """slow, normal or fast for a rate relative to the mean; None within the factor `margin` of a limit."""
    for limit in (SLOW, FAST):
        if limit / margin < relative < limit * margin:
            return None
    return "slow" if relative < SLOW else "fast" if relative > FAST else "normal"


def articulated_s(clip: Clip) -> float:
    """Seconds of speech with its short gaps: from the first word to the last, less the pauses."""
    activity = speech_activity(clip)
    if not activity.spans:
        return 0.0
    pauses = sum(end_s - start_s for start_s, end_s in activity.pauses(LEAST_PAUSE_S))
    return activity.spans[-1][1] - activity.spans[0][0] - pauses


def count_words(transcript: str) -> int:
    """Words of a text; every digit counts as one, as it is spoken as one ("8885112931")."""
    return len(re.findall(r"\d|[^\W\d_]+(?:['’-][^\W\d_]+)*", transcript))


def count_nuclei(clip: Clip) -> int:
    """Syllable nuclei in the speech of a clip (de Jong & Wempe 2009), without knowing its words."""
    count = 0
    pitch = dict(voiced_pitch(clip))
    for start_s, samples in windows(clip) if pitch else ():
        count += len(syllable_nuclei(samples, pitch[start_s] > 0))
    return count


def syllable_nuclei(samples: np.ndarray, voiced: np.ndarray) -> np.ndarray:
    """Times in s of the nuclei: samples (n,) at 16 kHz and, every 16 ms, whether they are voiced speech."""
    samples = samples - samples.mean()
    padded = np.pad(samples.astype(np.float64), _FRAME // 2)
    frames = np.lib.stride_tricks.sliding_window_view(padded, _FRAME)[::_HOP]
    energy = scipy.signal.fftconvolve(np.square(frames).mean(axis=1), np.hanning(7)[1:-1] / 3, mode="same")
    intensity_db = 10 * np.log10(np.maximum(energy, 1e-12))
    count = min(len(voiced), len(intensity_db))
    intensity_db, voiced = intensity_db[:count], voiced[:count]
    if not voiced.any():
        return np.zeros(0)
    floor_db = np.quantile(intensity_db[voiced], 0.99) - PEAK_BELOW_LOUDEST_DB
    peaks, _ = scipy.signal.find_peaks(intensity_db, height=floor_db, prominence=DIP_DB)
    times: np.ndarray = peaks[voiced[peaks]] * HOP_S
    return times
