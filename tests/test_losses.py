"""Hand-computed values of the losses."""

from __future__ import annotations

import math

import torch

from speech_llm.training.loop import learning_rate_at
from speech_llm.training.losses import alignment_loss, all_finite, cross_entropy_sum


def test_cross_entropy_is_the_sum_over_answer_tokens() -> None:
    logits = torch.tensor([[0.0, math.log(3.0)], [math.log(4.0), 0.0]])
    got = cross_entropy_sum(logits, torch.tensor([1, 1]))
    assert math.isclose(float(got), -math.log(3 / 4) - math.log(1 / 5), rel_tol=1e-6)


def test_alignment_is_zero_on_the_word_itself_and_grows_with_distance() -> None:
    table = torch.eye(4) * 2.0
    words = torch.tensor([0, 1, 2])
    targets = torch.tensor([[0, -100, 2]])
    there = alignment_loss(table[[0, 3, 2]][None], words, targets, table, temperature=0.02)
    assert float(there) < 1e-6
    wrong = alignment_loss(table[[1, 3, 2]][None], words, targets, table, temperature=1.0)
    # One slot of two sits on another word: softmax of (0, 1, 0) at the label, and (0, 0, 1) at its own;
    # the squared distance between two rows is 8 against a squared norm of 4.
    e = math.e
    contrast = (-math.log(1 / (2 + e)) - math.log(e / (2 + e))) / 2
    assert math.isclose(float(wrong), contrast + (8 / 2) / 4, rel_tol=1e-5)


def test_finite_check() -> None:
    assert all_finite(torch.tensor(1.0))
    assert not all_finite(torch.tensor(float("nan")))
    assert not all_finite(torch.tensor(float("inf")))


def test_learning_rate_warms_up_then_falls_to_zero() -> None:
    rates = [learning_rate_at(step, 100, 1.0, 0.1) for step in range(100)]
    assert math.isclose(rates[0], 0.1)
    assert math.isclose(max(rates), 1.0)
    assert rates[9] == 1.0
    assert rates[-1] < 0.001
    assert rates[10:] == sorted(rates[10:], reverse=True)
