"""Scoring answers with an LLM: as one forward pass of each alone, whatever is run beside it."""

from __future__ import annotations

import math

import pytest
import torch
from tiny_models import tiny_llm, tiny_model, tiny_tokenizer

from speech_llm.targets.score import AnswerScores, mean_perplexity, score_answers

CHATS = [
    [{"role": "user", "content": "A woman speaks.\nWho is it?"}],
    [{"role": "user", "content": "A woman speaks.\nIs it loud?"}],
    [
        {"role": "user", "content": "A man.\nWho?"},
        {"role": "assistant", "content": "male"},
        {"role": "user", "content": "A woman.\nWho?"},
    ],
]
ANSWERS = ["A woman.", "no", "female"]


def alone(llm: torch.nn.Module, ids: list[int], count: int) -> torch.Tensor:
    """Logits (count, vocabulary) that predict the last `count` of these tokens."""
    with torch.no_grad():
        return llm(input_ids=torch.tensor([ids])).logits[0, -count - 1 : -1]


@pytest.mark.parametrize("kind", ["llama", "gemma3"])  # gemma3: some layers see a window only
def test_scores_are_those_of_each_answer_by_itself(kind: str) -> None:
    llm = tiny_llm(kind, **({"sliding_window": 16} if kind == "gemma3" else {}))
    tokenizer = tiny_tokenizer()
    for budget in (1, 4096):
        found = score_answers(llm, tokenizer, CHATS, ANSWERS, batch_tokens=budget, top_k=5, temperature=2.0)
        for chat, answer, scores in zip(CHATS, ANSWERS, found, strict=True):
            text = tokenizer.apply_chat_template(
                [*chat, {"role": "assistant", "content": answer}], tokenize=False
            )
            ids = tokenizer(text.rstrip("\n"), add_special_tokens=False)["input_ids"]
            assert scores.ids == ids[-len(scores.ids) :]
            assert tokenizer.decode(scores.ids) == f"{answer}<|im_end|>"
            logits = alone(llm, ids, len(scores.ids))
            own = torch.tensor(scores.ids)[:, None]
            expected = logits.log_softmax(-1).gather(1, own)[:, 0]
            assert torch.allclose(scores.log_probs, expected, atol=1e-5)
            values, _ = (logits / 2).log_softmax(-1).topk(5)
            assert scores.top_log_probs is not None
            assert scores.top_ids is not None
            assert torch.allclose(scores.top_log_probs, values, atol=1e-5)
            got = (logits / 2).log_softmax(-1).gather(1, scores.top_ids)
            assert torch.allclose(got, values, atol=1e-5)


def test_the_tokens_scored_are_those_that_training_learns() -> None:
    _, processor = tiny_model()
    scores = score_answers(tiny_llm(), processor.tokenizer, CHATS[:1], ANSWERS[:1])[0]
    sound = {
        "role": "user",
        "content": [{"type": "audio", "path": "x"}, {"type": "text", "text": "Who is it?"}],
    }
    rendered = processor.render([sound, {"role": "assistant", "content": ANSWERS[0]}], frame_counts=[4])
    (start, end) = rendered.answer_spans[0]
    assert rendered.input_ids[start:end] == scores.ids


def test_perplexity_counts_every_token_alike() -> None:
    half, quarter = math.log(0.5), math.log(0.25)
    short, long = AnswerScores([1], torch.tensor([quarter])), AnswerScores([1, 2], torch.tensor([half, half]))
    assert math.isclose(short.perplexity, 4, rel_tol=1e-5)
    # Mean negative log2 is (2 + 1 + 1) / 3.
    assert math.isclose(mean_perplexity([short, long]), 2 ** (4 / 3), rel_tol=1e-5)
    assert math.isnan(mean_perplexity([]))
