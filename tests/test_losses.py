"""Hand-computed values of the losses."""

from __future__ import annotations

import math

import torch

from speech_llm.training.losses import (
    alignment_loss,
    all_finite,
    cross_entropy_sum,
    dpo_sum,
    easy_tokens,
    group_advantages,
    grpo_sum,
    kl_sum,
    kl_top_k_sum,
    l2_start,
    without_hardest,
)
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


# Two tokens over a vocabulary of three: the teacher 1/2, 1/4, 1/4, the student 1/4, 1/4, 1/2 and uniform.
TEACHER = torch.tensor([[0.5, 0.25, 0.25], [0.5, 0.25, 0.25]]).log()
STUDENT = torch.tensor([[0.25, 0.25, 0.5], [1 / 3, 1 / 3, 1 / 3]]).log()
FIRST = 0.5 * math.log(2) - 0.25 * math.log(2)  # the middle token is as likely for both
SECOND = 0.5 * math.log(1.5) + 0.5 * math.log(0.75)


def close(found: torch.Tensor | float, expected: float) -> bool:
    return math.isclose(float(found), expected, rel_tol=1e-5, abs_tol=1e-7)


def test_token_weights_count_in_cross_entropy() -> None:
    logits = torch.tensor([[0.0, math.log(3.0)], [math.log(4.0), 0.0]])
    got = cross_entropy_sum(logits, torch.tensor([1, 1]), torch.tensor([0.0, 2.0]))
    assert close(got, -2 * math.log(1 / 5))


def test_kl_is_by_hand_and_zero_for_a_model_with_itself() -> None:
    assert close(kl_sum(STUDENT, TEACHER), FIRST + SECOND)
    assert close(kl_sum(STUDENT, TEACHER, weights=torch.tensor([1.0, 0.0])), FIRST)
    assert close(kl_sum(TEACHER + 7, TEACHER), 0.0)
    # At temperature 1/2 probabilities are squared: teacher 4, 1, 1 (of 6); student 1, 1, 4. Times T squared.
    squared = (4 / 6) * math.log(4) - (1 / 6) * math.log(4)
    assert close(kl_sum(STUDENT[:1], TEACHER[:1], temperature=0.5), squared / 4)


def test_top_k_kl_merges_the_tail_and_misses_only_the_divergence_within_it() -> None:
    top, ids = TEACHER[:1].topk(1)
    # 1/2 against 1/4, and the rest 1/2 against 3/4.
    merged = 0.5 * math.log(2) + 0.5 * math.log(0.5 / 0.75)
    assert close(kl_top_k_sum(STUDENT[:1], ids, top), merged)
    # Within the tail: 1/2, 1/2 against 1/3, 2/3, which counts with the tail's mass of 1/2.
    within = 0.5 * math.log(1.5) + 0.5 * math.log(0.75)
    assert close(merged + 0.5 * within, FIRST)
    torch.manual_seed(0)
    teacher, student = 3 * torch.randn(20, 50), 3 * torch.randn(20, 50)
    full = float(kl_sum(student, teacher, 2.0))
    for k in (1, 5, 20, 50):
        values, ids = (teacher / 2).log_softmax(-1).topk(k)
        part = float(kl_top_k_sum(student, ids, values, 2.0))
        p, q = (teacher / 2).softmax(-1), (student / 2).softmax(-1)
        p, q = p.scatter(1, ids, 0.0), q.scatter(1, ids, 0.0)
        mass = p.sum(1, keepdim=True)
        within_tail = (p * ((p / mass).log() - (q / q.sum(1, keepdim=True)).log())).nan_to_num().sum()
        assert math.isclose(full, part + (4 * float(within_tail) if k < 50 else 0.0), rel_tol=1e-4)
    values, ids = (teacher / 2).log_softmax(-1).topk(5)
    assert abs(float(kl_top_k_sum(teacher, ids, values, 2.0))) < 1e-4


def test_hard_tokens_are_dropped_by_threshold_or_by_share() -> None:
    # Perplexities 1.25, 2, 4, 20.
    log_probs = [math.log(1 / p) for p in (1.25, 2, 4, 20)]
    assert easy_tokens(log_probs, 2.5) == [False, True, False, False]  # the first counts as 10
    assert easy_tokens(log_probs, 10.0) == [True, True, True, False]
    assert easy_tokens(log_probs, 2.5, first=(0, 1)) == [False, False, False, False]
    kept = without_hardest([log_probs, [math.log(1 / 3)]], 0.4)  # two of five
    assert kept == [[True, True, False, False], [True]]
    assert without_hardest([log_probs], 0.0) == [[True] * 4]
    assert without_hardest([[-1.0, -1.0]], 0.5) == [[False, True]]


def test_dpo_is_by_hand_and_falls_as_the_margin_grows() -> None:
    values = [torch.tensor([x]) for x in (-1.0, -3.0, -2.0, -2.5)]
    loss, margins = dpo_sum(*values, beta=0.5)
    assert close(margins, (-1.0 + 2.0) - (-3.0 + 2.5))
    assert close(loss, math.log(1 + math.exp(-0.5 * 1.5)))
    better, _ = dpo_sum(values[0] + 1, *values[1:], beta=0.5)
    assert float(better) < float(loss)
    same, _ = dpo_sum(*(values[:2] * 2), beta=0.5)
    assert close(same, math.log(2))


def test_grpo_is_by_hand() -> None:
    advantages = group_advantages(torch.tensor([[1.0, 0.0], [1.0, 1.0]]))
    deviation = math.sqrt(0.5)
    assert torch.allclose(
        advantages, torch.tensor([[0.5, -0.5], [0.0, 0.0]]) / torch.tensor([[deviation + 1e-4], [1e-4]])
    )
    # Two answers, of two tokens and of one. The ratios are 1, 2 (clipped to 1.2) and 1/2 (clipped to 0.8: with an advantage of
    # -1 that is the smaller gain).
    log_probs = torch.tensor([-1.0, -1.0, -1.0])
    sampled = torch.tensor([-1.0, -1.0 - math.log(2), -1.0 + math.log(2)])
    reference = torch.tensor([-1.0, -1.0, -1.0 + math.log(2)])
    loss, divergence = grpo_sum(
        log_probs, sampled, reference, torch.tensor([1.0, -1.0]), torch.tensor([0, 0, 1]), beta=0.1
    )
    k = 2 - math.log(2) - 1
    assert close(divergence, k)
    assert close(loss, -(1 + 1.2) / 2 + 0.8 + 0.1 * k)


def test_distance_to_the_start_is_half_its_square() -> None:
    now = {"a": torch.tensor([1.0, 2.0]), "b": torch.tensor([[3.0]])}
    start = {"a": torch.tensor([0.0, 2.0]), "b": torch.tensor([[1.0]])}
    assert close(l2_start(now, start), 0.5 * (1 + 4))
    assert close(l2_start(start, start), 0.0)
