"""Scores of guesses: silence costs coverage and never precision; thresholds keep what they promise; noise is to order."""

from __future__ import annotations

import numpy as np
import pytest

from describers.perturb import add_noise, telephone
from describers.scoring import (
    LEFT_OUT,
    calibration_error,
    check_text,
    choose_threshold,
    confusion_table,
    score,
)
from eval.stats import wilson_interval
from speech_llm.audio import SAMPLE_RATE_HZ


def test_silence_costs_coverage_and_not_precision() -> None:
    scores = score(["a", "a", "b", "b"], ["a", None, "b", "a"], [0.9, None, 0.8, 0.6])
    assert scores["n"] == 4
    assert scores["coverage"] == 0.75
    assert scores["accuracy"] == 0.5
    assert scores["precision"] == pytest.approx(2 / 3)
    assert scores["confusion"] == {"a": {"a": 1, LEFT_OUT: 1}, "b": {"a": 1, "b": 1}}
    assert (scores["majority"], scores["chance"]) == (0.5, 0.5)
    table = confusion_table(scores["confusion"])
    assert table.splitlines()[0].split() == ["is", "\\", "told", "a", "b", "(left", "out)"]
    assert "66.7 %" in check_text("x", scores)


def test_nothing_told_and_nothing_labelled_are_no_division_by_zero() -> None:
    told_nothing = score(["a", "b"], [None, None], [None, None])
    assert (told_nothing["precision"], told_nothing["ece"], told_nothing["coverage"]) == (None, None, 0.0)
    assert "none" in check_text("x", told_nothing)
    assert "no clip has a label" in check_text("x", score([], [], []))


def test_calibration_error_is_the_gap_between_confidence_and_accuracy() -> None:
    assert calibration_error([0.75] * 4, [True, True, True, False]) == 0
    assert calibration_error([0.95] * 4, [True, True, False, False]) == pytest.approx(0.45)
    # Over- and underconfidence in different bins do not cancel.
    assert calibration_error([0.9, 0.6], [False, True]) == pytest.approx((0.9 + 0.4) / 2)
    assert calibration_error([1.0], [True]) == 0


def test_the_threshold_keeps_the_precision_with_the_most_coverage() -> None:
    confidence = [0.99 - 0.005 * n for n in range(160)]
    right = [n < 100 or n % 2 == 0 for n in range(160)]
    threshold, coverage = choose_threshold(confidence, right, 0.9)
    assert threshold is not None
    told = [hit for p, hit in zip(confidence, right, strict=True) if p >= threshold]
    assert coverage == len(told) / 160 < 1
    # Not the share itself, its lower bound has to reach the precision.
    assert wilson_interval(sum(told), len(told), 1.2816)[0] >= 0.9
    one_more = right[: len(told) + 1]
    assert wilson_interval(sum(one_more), len(one_more), 1.2816)[0] < 0.9
    assert choose_threshold(confidence, [False] * 160, 0.5) == (None, 0.0)
    assert choose_threshold([], [], 0.9) == (None, 0.0)


@pytest.mark.parametrize(("precision", "least"), [(0.9, 15), (0.95, 32), (0.98, 81)])
def test_few_guesses_show_no_precision_however_right_they_are(precision: float, least: int) -> None:
    confidence = [0.99 - 0.001 * n for n in range(least)]
    assert choose_threshold(confidence, [True] * least, precision) == (confidence[-1], 1.0)
    assert choose_threshold(confidence[1:], [True] * (least - 1), precision) == (None, 0.0)


def test_a_promised_precision_holds_on_clips_that_the_threshold_was_not_chosen_on() -> None:
    """Guesses as sure as they are right, half to choose on, half to look at: seldom less than was promised."""
    rng = np.random.default_rng(0)
    kept = 0
    for _ in range(200):
        sure = rng.uniform(0.5, 1, (2, 150))
        right = rng.uniform(size=(2, 150)) < sure
        threshold, _ = choose_threshold(sure[0].tolist(), right[0].tolist(), 0.9)
        expected = 1.0 if threshold is None else sure[1][sure[1] >= threshold].mean()
        kept += expected >= 0.9
    assert kept >= 180


def test_guesses_of_equal_confidence_stand_or_fall_together() -> None:
    confidence, right = [0.9] * 20 + [0.5] * 20, [True] * 30 + [False] * 10
    assert choose_threshold(confidence, right, 0.9) == (0.9, 0.5)
    assert choose_threshold(confidence, right, 0.6) == (0.5, 1.0)


@pytest.mark.parametrize("slope", [0.0, 1.0, 2.0])
def test_noise_is_mixed_to_order(slope: float) -> None:
    rng = np.random.default_rng(0)
    clip = np.sin(2 * np.pi * 200 * np.arange(SAMPLE_RATE_HZ) / SAMPLE_RATE_HZ).astype(np.float32)
    noise = add_noise(clip, 5.0, rng, slope) - clip
    snr_db = 10 * np.log10(np.mean(clip.astype(float) ** 2) / np.mean(noise.astype(float) ** 2))
    assert snr_db == pytest.approx(5.0, abs=0.05)
    power = np.abs(np.fft.rfft(noise)) ** 2
    low, high = power[50:100].mean(), power[4000:8000].mean()
    assert 10 * np.log10(low / high) == pytest.approx(slope * 10 * np.log10(6000 / 72), abs=3)


def test_a_telephone_has_nothing_above_4_khz() -> None:
    clip = np.random.default_rng(0).standard_normal(SAMPLE_RATE_HZ + 7).astype(np.float32)
    narrow = telephone(clip)
    assert narrow.shape == clip.shape
    power = np.abs(np.fft.rfft(narrow)) ** 2
    hz = np.fft.rfftfreq(len(narrow), 1 / SAMPLE_RATE_HZ)
    assert power[hz > 4200].mean() < 1e-4 * power[hz < 3600].mean()
