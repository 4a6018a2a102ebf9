"""Hand-computed values of the losses."""

from __future__ import annotations

import math

import torch

from speech_llm.training.losses import alignment_loss, all_finite, cross_entropy_sum
from speech_llm.training.schedule import learning_rate_at


def test_cross_entropy_is_the_sum_over_answer_tokens() -> None:
    logits = torch.tensor([[0.0, math.log(3.0)], [math.log(4.0), 0.0]])
    got = cross_entropy_sum(logits, torch.tensor([1, 1]))
    assert math.isclose(float(got), -math.log(3 / 4) - math.log(1 / 5), rel_tol=1e-6)


def test_alignment_is_zero_on_the_value_itself_and_grows_with_distance() -> None:
    # Two values of one slot each, 2 apart: the middle is (1, 1), and from there they lie in opposite directions.
    values = torch.tensor([[[2.0, 1.0]], [[0.0, 1.0]]])
    loss, named = alignment_loss(values, values, torch.tensor([0, 1]), temperature=0.02)
    assert float(loss) < 1e-6
    assert named.tolist() == [0, 1]
    # On the other value: cosines (-1, 1) with label 0, and a squared distance of 4 against 1 from the middle.
    loss, named = alignment_loss(values[[1]], values, torch.tensor([0]), temperature=1.0)
    assert math.isclose(float(loss), -math.log(math.exp(-1) / (math.exp(-1) + math.e)) + 4.0, rel_tol=1e-5)
    assert named.tolist() == [1]
    # What the values have in common tells nothing: shifting everything changes nothing.
    shifted, _ = alignment_loss(values[[1]] + 7, values + 7, torch.tensor([0]), temperature=1.0)
    assert math.isclose(float(shifted), float(loss), rel_tol=1e-5)


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
