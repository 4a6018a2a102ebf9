"""What packing rows of text gains: `python -m speech_llm.data.packing_speed [ROWS.jsonl]`.

In: rows of text (default: the package's general rows, those of `mixture.sources: [{type: replay}]`). Out: padding share, tokens that
are computed and rows per second, forward and backward through adapters that are not gated, one row a sequence and
several; in turns within one run, so that other work on the machine hits both.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from speech_llm.data.packing import Pack, Row, pack_group, pack_rows, padding_share, plan_epoch
from speech_llm.errors import UserError
from speech_llm.examples import read_examples
from speech_llm.mixture.replay import PACKAGED
from speech_llm.training.losses import cross_entropy_sum
from speech_llm.training.rows import Unusable, render_row
from speech_llm.training.student import Student


def one_pass(student: Student, packs: Sequence[Pack], batch_tokens: int) -> dict[str, float]:
    """Forward and backward over all packs once; returns `{"rows_per_s", "padding", "tokens", "loss"}` (loss a token)."""
    batches = plan_epoch(list(packs), batch_tokens, seed=0, epoch=0)
    rows = tokens = answers = 0
    total = 0.0
    started = time.perf_counter()
    for numbers in batches:
        batch = student.batch([packs[i] for i in numbers])
        loss = cross_entropy_sum(*student.answer_logits(batch))
        loss.backward()
        rows, tokens, answers = (
            rows + len(batch.rows),
            tokens + batch.ids.numel(),
            answers + batch.answer_tokens,
        )
        total += float(loss.detach())
    return {
        "rows_per_s": rows / (time.perf_counter() - started),
        "padding": padding_share(packs, batches),
        "tokens": tokens,
        "loss": total / answers,
    }


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m speech_llm.data.packing_speed", description=__doc__)
    parser.add_argument("rows", type=Path, nargs="?", default=PACKAGED["general"], help="JSONL of text rows")
    parser.add_argument("--batch-tokens", type=int, default=2048)
    parser.add_argument("--passes", type=int, default=3)
    parser.add_argument(
        "--sizes", type=int, nargs="+", default=[256, 512, 1024], help="longest packs to try, tokens"
    )
    given = parser.parse_args()
    from speech_llm.model import build_model
    from speech_llm.precision import choose_dtype
    from speech_llm.recipe_learning import Lora, TrainableSection
    from speech_llm.recipe_model import ModelSection

    dtype = choose_dtype("auto")
    model, processor = build_model(
        ModelSection(gate_adapters=False), TrainableSection(lora=Lora(rank=8)), dtype=dtype
    )
    model.train()
    rows: list[Row] = []
    nothing: Any = None  # no features: there is no sound
    try:
        for example in read_examples(given.rows):
            rows.append(render_row(example, processor, nothing, "sft"))  # noqa: PERF401
    except (UserError, Unusable) as error:
        raise SystemExit(str(error)) from None
    student = Student(model, processor, nothing, [], 0)
    arms = {"one row a sequence": [pack_group([row], 0) for row in rows]}
    arms |= {f"packs up to {size}": pack_rows(rows, 0, size) for size in given.sizes}
    one_pass(student, arms["one row a sequence"][:8], given.batch_tokens)
    found: dict[str, list[dict[str, float]]] = {name: [] for name in arms}
    for _ in range(given.passes):
        for name, packs in arms.items():
            found[name].append(one_pass(student, packs, given.batch_tokens))
    print(
        f"{len(rows)} rows, batches of {given.batch_tokens} tokens, {dtype}, {torch.get_num_threads()} threads"
    )
    first = _median(found["one row a sequence"])
    for name, passes in found.items():
        last, speed = passes[-1], _median(passes)
        print(
            f"{name:20} {len(arms[name]):>5} sequences, {last['tokens']:>7.0f} tokens, padding {100 * last['padding']:4.1f} %, "
            f"{speed:5.2f} rows/s ({speed / first:.2f} x), loss {last['loss']:.4f}"
        )


def _median(passes: Sequence[dict[str, float]]) -> float:
    return sorted(one["rows_per_s"] for one in passes)[len(passes) // 2]


if __name__ == "__main__":
    main()
