"""How much faster the targets stage writes answers than one `generate` call per prompt.

    python -m speech_llm.targets.benchmark [--answers 500] [--one-by-one 40] [--llm REF] [--threads 2] [--json FILE]

In: one LLM, descriptions of made-up clips and short prompts about them. Out: answers per second of both ways and their
ratio. Both run in this process, on the same LLM in the same number format, greedily, on the same prompts and with the same
longest answer; one-by-one runs on an evenly spaced sample, as it is slow and its time grows with the number of prompts
and nothing else. The quickstart's prompts repeat: clips that look alike share an answer. Here no two questions are equal,
so what is measured is the generation alone.
"""

from __future__ import annotations

import argparse
import platform
import random
import sys
import time
from pathlib import Path
from typing import Any

from speech_llm.chat_server import NoAnswer
from speech_llm.errors import UserError
from speech_llm.targets.questions import Question
from speech_llm.targets.teacher import Sampling, TransformersTeacher

_NAMES = ("Anna", "Ben", "Clara", "David", "Emma", "Frank", "Grace", "Henry", "Iris", "Jack", "Kate", "Leo")
_DID = ("bought", "lost", "found", "painted", "sold", "cleaned", "carried", "dropped")
_THINGS = ("a blue coat", "the old car", "three apples", "a letter", "the red bicycle", "a guitar", "the map")
_WHERE = ("at the market", "by the river", "after lunch", "in the garden", "before the rain", "on Monday")
_ASKED = ("Who is speaking, and how?", "What does the speaker say?", "Describe the speaker.", "What is said?")


def questions(count: int) -> list[Question]:
    """Different questions in the manner of the quickstart, each behind one of four worked examples."""
    rng = random.Random(0)
    out: dict[Question, None] = {}
    while len(out) < count:
        text = rng.choice(_ASKED)
        shown = _description(random.Random(text))
        out[Question(_description(rng), text, (shown, shown))] = None
    return list(out)


def _description(rng: random.Random) -> str:
    woman = rng.random() < 0.5
    accent = rng.choice(("a British", "an American", "a Scottish", "a Caribbean"))
    speed = rng.choice(("slowly", "at a normal speed", "fast"))
    words = f"{rng.choice(_NAMES)} {rng.choice(_DID)} {rng.choice(_THINGS)} {rng.choice(_WHERE)}."
    who = "A female" if woman else "A male"
    return f'{who} speaker with {accent} accent speaks {speed}. {"She" if woman else "He"} says: "{words}"'


def measure(
    llm: Any, tokenizer: Any, count: int, one_by_one: int, max_new_tokens: int, batch_tokens: int
) -> dict[str, Any]:
    """Both ways' seconds, answers per second, ratio, and how many answers of the sample are the same."""
    asked = questions(count)
    teacher = TransformersTeacher(llm, tokenizer, "", Sampling(max_new_tokens), batch_tokens)
    answers: dict[Question, str] = {}
    tokens = 0

    def done(question: Question, answer: str | NoAnswer, new: int) -> None:
        nonlocal tokens
        answers[question] = str(answer)
        tokens += new

    teacher.answer(asked[:8], lambda *_: None)  # what a first call alone costs is no part of either way
    started, cpu = time.perf_counter(), time.process_time()
    teacher.answer(asked, done)
    batched_s, batched_cpu_s = time.perf_counter() - started, time.process_time() - cpu

    sample = [asked[i * count // one_by_one] for i in range(one_by_one)]
    _generate(llm, tokenizer, sample[0], max_new_tokens)
    started, cpu = time.perf_counter(), time.process_time()
    alone = [_generate(llm, tokenizer, question, max_new_tokens) for question in sample]
    alone_s, alone_cpu_s = time.perf_counter() - started, time.process_time() - cpu
    same = sum(text == answers[question] for question, text in zip(sample, alone, strict=True))
    return {
        "answers": count,
        "batched_s": round(batched_s, 2),
        "batched_answers_per_s": round(count / batched_s, 3),
        "batched_tokens_per_s": round(tokens / batched_s, 1),
        "one_by_one_answers": one_by_one,
        "one_by_one_s": round(alone_s, 2),
        "one_by_one_answers_per_s": round(one_by_one / alone_s, 3),
        "ratio": round((count / batched_s) / (one_by_one / alone_s), 2),
        # On a machine with other work to do the processor's time is steadier than the clock's.
        "batched_cpu_s": round(batched_cpu_s, 2),
        "one_by_one_cpu_s": round(alone_cpu_s, 2),
        "ratio_of_cpu_time": round((alone_cpu_s / one_by_one) / (batched_cpu_s / count), 2),
        "same_answers": same,
        "max_new_tokens": max_new_tokens,
        "batch_tokens": batch_tokens,
    }


def _generate(llm: Any, tokenizer: Any, question: Question, max_new_tokens: int) -> str:
    """The library's own greedy answer to one chat."""
    import torch

    inputs = tokenizer.apply_chat_template(
        question.messages(), add_generation_prompt=True, tokenize=True, return_dict=True, return_tensors="pt"
    ).to(llm.device)
    with torch.inference_mode():
        out = llm.generate(**inputs, max_new_tokens=max_new_tokens, do_sample=False)
    return str(tokenizer.decode(out[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True)).strip()


def main() -> None:
    """The command line; see the top of the file."""
    from speech_llm.assets import load_answering_llm
    from speech_llm.recipe_model import EMBEDDED_LLM

    parser = argparse.ArgumentParser(
        prog="python -m speech_llm.targets.benchmark", description=(__doc__ or "").split("\n")[0]
    )
    parser.add_argument("--answers", type=int, default=500, help="answers written in batches")
    parser.add_argument("--one-by-one", type=int, default=40, help="of these, written one by one too")
    parser.add_argument("--llm", default=EMBEDDED_LLM, help="the LLM; default: the embedded one")
    parser.add_argument("--precision", default="auto", choices=("auto", "float32", "bfloat16"))
    parser.add_argument("--threads", type=int, default=None, help="of torch; default: its own choice")
    parser.add_argument("--max-new-tokens", type=int, default=40, help="longest answer")
    parser.add_argument("--batch-tokens", type=int, default=16384, help="as targets.batch_tokens")
    parser.add_argument("--json", type=Path, default=None, help="also write the figures to this file")
    given = parser.parse_args()
    if not 1 <= given.one_by_one <= given.answers:
        parser.error("--one-by-one must be between 1 and --answers")
    import torch

    if given.threads is not None:
        torch.set_num_threads(given.threads)
    try:
        llm, tokenizer = load_answering_llm(given.llm, given.precision)
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        raise SystemExit(2) from None
    found = measure(llm, tokenizer, given.answers, given.one_by_one, given.max_new_tokens, given.batch_tokens)
    found |= {
        "llm": given.llm,
        "dtype": str(llm.dtype).removeprefix("torch."),
        "device": str(llm.device),
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
        "machine": platform.processor() or platform.machine(),
    }
    print(
        f"{found['answers']} answers in batches: {found['batched_s']:.1f} s, {found['batched_answers_per_s']:.2f} a second\n"
        f"{found['one_by_one_answers']} of them one by one: {found['one_by_one_s']:.1f} s, "
        f"{found['one_by_one_answers_per_s']:.2f} a second; {found['same_answers']} answers are the same\n"
        f"ratio {found['ratio']:.1f}, of processor time {found['ratio_of_cpu_time']:.1f} ({found['dtype']}, {found['device']}, {found['threads']} threads)"
    )
    if given.json is not None:
        from speech_llm.files import write_json

        write_json(given.json, found)


if __name__ == "__main__":
    main()
