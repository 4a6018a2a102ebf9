"""How an answer is learned: pure functions from logits or log-probabilities to a loss.

Those over tokens return a *sum*, those over answers too. The loop divides by what counts in the whole global batch (tokens,
pairs, answers), so that neither padding, nor accumulation, nor the number of processes changes the weight of a token.
Everything is computed in float32 whatever the model's dtype.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional


def cross_entropy_sum(logits: Tensor, targets: Tensor, weights: Tensor | None = None) -> Tensor:
    r"""Sum of $-w \log p(\text{target})$ over answer tokens.

    `logits`: (n, vocabulary) at the positions that predict answer tokens; `targets`: (n,) token ids; `weights`: (n,), default 1.
    """
    values: Tensor = _CrossEntropy.apply(logits.float(), targets)
    return values.sum() if weights is None else (values * weights).sum()


class _CrossEntropy(torch.autograd.Function):
    """(n,) cross-entropies of logits (n, vocabulary) in float32, whose gradient is made in the place of the log-probabilities.

    PyTorch's own makes two more tensors of the size of the logits on the way back, which on a CPU takes longer than the softmax
    (docs/results/speed.md). The gradient can be asked for once.
    """

    @staticmethod
    def forward(ctx: Any, logits: Tensor, targets: Tensor) -> Tensor:
        log_probs = logits.log_softmax(-1)
        ctx.save_for_backward(log_probs, targets)
        return -log_probs.gather(1, targets[:, None])[:, 0]

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None]:
        log_probs, targets = ctx.saved_tensors
        gradient = gradients[0][:, None]
        found = log_probs.exp_().mul_(gradient)
        return found.scatter_add_(1, targets[:, None], -gradient), None


def kl_sum(
    logits: Tensor, teacher_logits: Tensor, temperature: float = 1.0, weights: Tensor | None = None
) -> Tensor:
    r"""Sum of $w\,T^2\,\mathrm{KL}(p_T \| q_T)$ over answer tokens, the teacher's $p_T$ and the student's $q_T$ at temperature $T$.

    Knowledge distillation (Hinton et al. 2015, 1503.02531, section 2), whose $T^2$ keeps the size of the gradient when the
    temperature changes; over answers only, the teacher reading text where the student hears (DiVA 2410.02678, Ultravox).
    `logits`, `teacher_logits`: (n, vocabulary). `weights`: (n,), default 1.
    """
    student = (logits.float() / temperature).log_softmax(-1)
    teacher = (teacher_logits.float() / temperature).log_softmax(-1)
    return _scaled_sum((teacher.exp() * (teacher - student)).sum(-1), temperature, weights)


def kl_top_k_sum(
    logits: Tensor,
    top_ids: Tensor,
    top_log_probs: Tensor,
    temperature: float = 1.0,
    weights: Tensor | None = None,
) -> Tensor:
    r"""`kl_sum` from the teacher's k most likely tokens and one bucket for all others.

    $T^2 \left[\sum_{i \le k} p_i (\log p_i - \log q_i) + p_{rest} (\log p_{rest} - \log q_{rest})\right]$: the divergence of the two
    distributions after the tail's tokens are merged, so it is never more than the full one (data processing inequality), and
    less by exactly $T^2\,p_{rest}$ times the divergence within the tail.

    `logits`: (n, vocabulary). `top_ids`, `top_log_probs`: (n, k), the teacher's log-probabilities at `temperature`.
    """
    return _scaled_sum(kl_top_k(logits, top_ids, top_log_probs, temperature), temperature, weights)


def kl_top_k(logits: Tensor, top_ids: Tensor, top_log_probs: Tensor, temperature: float = 1.0) -> Tensor:
    """(n,) the divergence at each place, as `kl_top_k_sum` sums it, without its factor."""
    student = (logits.float() / temperature).log_softmax(-1)
    top = student.gather(1, top_ids)
    teacher = top_log_probs.float()
    inside = (teacher.exp() * (teacher - top)).sum(-1)
    if top_ids.shape[1] >= student.shape[1]:  # no token is left for the tail
        return inside
    # Under 1e-6 the teacher's tail is rounding.
    rest = 1 - teacher.exp().sum(-1)
    rest = torch.where(rest > 1e-6, rest, torch.zeros_like(rest))
    # The student's tail from its own tokens: 1 - sum would lose all digits where the tail is small.
    student_rest = student.scatter(1, top_ids, -math.inf).logsumexp(-1)
    return inside + rest * (rest.clamp(min=1e-12).log() - student_rest)


def _scaled_sum(values: Tensor, temperature: float, weights: Tensor | None) -> Tensor:
    return (values if weights is None else values * weights).sum() * temperature**2


FIRST_TOKEN_PERPLEXITY = 10.0


def easy_tokens(log_probs: Sequence[float], tau: float, first: Iterable[int] = (0,)) -> list[bool]:
    r"""Which tokens of an answer are learned: those that the base LLM finds no harder than `tau`, $e^{-\log p} \le \tau$.

    Selective token masking (2501.14315, section 3; tau = 2.5 there): a harder token stays in the context but gets no loss. As in
    the authors' code, the perplexity of the first token of an answer (`first`: their places) counts as 10.
    """
    starts = set(first)
    return [
        (FIRST_TOKEN_PERPLEXITY if place in starts else math.exp(-value)) <= tau
        for place, value in enumerate(log_probs)
    ]


def without_hardest(log_probs: Sequence[Sequence[float]], share: float) -> list[list[bool]]:
    """Which tokens of each answer are learned when the hardest `share` of all tokens together is dropped.

    Exactly floor(share x tokens) are dropped; of equally hard ones, those that come first. (2501.14315 finds that dropping up to
    about a fifth helps.)
    """
    places = [(value, i, j) for i, row in enumerate(log_probs) for j, value in enumerate(row)]
    kept = [[True] * len(row) for row in log_probs]
    for _, i, j in sorted(places)[: math.floor(share * len(places) + 1e-9)]:
        kept[i][j] = False
    return kept


def dpo_sum(
    chosen: Tensor, rejected: Tensor, reference_chosen: Tensor, reference_rejected: Tensor, beta: float
) -> tuple[Tensor, Tensor]:
    r"""Sum of $-\log\sigma(\beta m)$ over pairs, and the margins $m$ (n,), detached.

    $m = \log\frac{\pi(y_w)}{\pi_{ref}(y_w)} - \log\frac{\pi(y_l)}{\pi_{ref}(y_l)}$ (DPO, Rafailov et al. 2023, 2305.18290, equation 7).
    All arguments: (n,) log-probabilities of whole answers.
    """
    margins = (chosen - reference_chosen) - (rejected - reference_rejected)
    return -functional.logsigmoid(beta * margins).sum(), margins.detach()


def group_advantages(rewards: Tensor) -> Tensor:
    r"""$(r_i - \bar r) / (\mathrm{std}(r) + 10^{-4})$ within each group; zero where all answers are worth the same.

    GRPO (DeepSeekMath, 2402.03300, section 4.1.2): the group's mean is the baseline. `rewards`: (groups, answers). The standard
    deviation is the sample's (n - 1), as in the released implementations.
    """
    centred = rewards - rewards.mean(1, keepdim=True)
    return centred / (rewards.std(1, keepdim=True) + 1e-4)


def grpo_sum(
    log_probs: Tensor,
    sampled_log_probs: Tensor,
    reference_log_probs: Tensor,
    advantages: Tensor,
    answer: Tensor,
    beta: float,
    clip: float = 0.2,
) -> tuple[Tensor, Tensor]:
    r"""Sum over answers of the mean over their tokens of $-\min(\rho A, \mathrm{clip}(\rho, 1 \pm \epsilon) A) + \beta k$.

    $\rho = \pi / \pi_{old}$ and $k = \frac{\pi_{ref}}{\pi} - \log\frac{\pi_{ref}}{\pi} - 1$, an unbiased estimate of $\mathrm{KL}(\pi \| \pi_{ref})$
    that is never negative (GRPO, 2402.03300, equations 3 and 4; a step's answers are sampled by the policy that it moves, so
    that $\rho = 1$ and only its gradient matters).

    `log_probs`, `sampled_log_probs`, `reference_log_probs`: (tokens,) of all answers one after the other. `advantages`:
    (answers,). `answer`: (tokens,) the answer a token belongs to. Returns the loss and the sum over answers of the mean k,
    detached.
    """
    lengths = torch.zeros_like(advantages).index_add_(0, answer, torch.ones_like(log_probs))
    share = (1 / lengths.clamp(min=1))[answer]
    ratio = (log_probs - sampled_log_probs).exp()
    own = advantages[answer]
    gain = torch.minimum(ratio * own, ratio.clamp(1 - clip, 1 + clip) * own)
    apart = reference_log_probs - log_probs
    divergence = apart.exp() - apart - 1
    return ((beta * divergence - gain) * share).sum(), (divergence * share).sum().detach()


def l2_start(parameters: Mapping[str, Tensor], start: Mapping[str, Tensor]) -> Tensor:
    r"""$\frac{1}{2}\sum \|\theta - \theta_0\|^2$ over all parameters: L2-SP (Li et al. 2018, 1802.01483, equation 2).

    `start`: the parameters where training began, under the same names.
    """
    terms = [
        (value.float() - start[name].to(value.device).float()).pow(2).sum()
        for name, value in parameters.items()
    ]
    return 0.5 * torch.stack(terms).sum()


def alignment_loss(
    vectors: Tensor, candidates: Tensor, labels: Tensor, temperature: float = 0.07
) -> tuple[Tensor, Tensor]:
    r"""Mean of $-\log\mathrm{softmax}_m(\cos(v - \bar c, c_m - \bar c)/\tau)[\text{label}]$ plus a pull to the candidate's own place.

    The warm-up of the connector: the vectors of an attribute shall lie where its value lies ("female", "Scottish"), told
    apart from the attribute's other values. What all values have in common ($\bar c$) tells nothing and is taken off.

    `vectors`: (n, slots, width). `candidates`: (m, slots, width). `labels`: (n,) rows of `candidates`.
    Returns the loss and the nearest candidates (n,). The first term is InfoNCE (1807.03748, equation 4) with cosine
    similarity; the second, the squared distance relative to that between candidates, fixes length as well as direction
    (DiVA, 2410.02678, aligns to text embeddings with an L2 loss).
    """
    middle = candidates.mean(0, keepdim=True)
    told, known = (vectors - middle).flatten(1), (candidates - middle).flatten(1)
    similarity = functional.normalize(told, dim=-1) @ functional.normalize(known, dim=-1).T
    contrast = functional.cross_entropy(similarity / temperature, labels)
    place = (told - known[labels]).pow(2).sum(-1).mean() / known.pow(2).sum(-1).mean().clamp(min=1e-12)
    return contrast + place, similarity.argmax(-1)


def all_finite(value: Tensor) -> bool:
    """Whether a loss is neither NaN nor infinite."""
    return bool(torch.isfinite(value).all())
