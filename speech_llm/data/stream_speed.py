"""How soon training on streamed rows begins and what memory it takes: `python -m speech_llm.data.stream_speed`.

In: how many rows. Out: for a small number and for that one, in a process of its own each: seconds from opening the rows to the first
step being ready (the model is loaded before), rows rendered per second, and by how much memory has grown after the first step and
after all steps. Rows are the package's general ones, again and again, as JSONL or parquet.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import os
import tempfile
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from speech_llm.files import read_jsonl
from speech_llm.mixture.replay import PACKAGED


def write_rows(path: Path, rows: int) -> None:
    """A file of so many rows, each with an id of its own."""
    texts = [row["messages"] for _, row in read_jsonl(PACKAGED["general"])]
    if path.suffix == ".parquet":
        import datasets

        table = datasets.Dataset.from_generator(
            _numbered,
            # A tuple: a list would be taken for shards, each to be gone through.
            gen_kwargs={"texts": tuple(texts), "rows": rows},
            cache_dir=str(path.parent / "made"),
        )
        table.to_parquet(str(path))
        return
    with open(path, "w", encoding="utf-8") as handle:
        for row in _numbered(texts, rows):
            handle.write(json.dumps(row) + "\n")


def _numbered(texts: Sequence[Any], rows: int) -> Iterator[dict[str, Any]]:
    for number in range(rows):
        yield {"id": f"row-{number}", "messages": texts[number % len(texts)]}


def measure(path: Path, steps: int, answer: Any) -> None:
    """Open the rows of a file and render some steps; puts `{"rows", "first_s", "first_mb", "rows_per_s", "last_mb"}` into `answer`."""
    from speech_llm.data.live import LiveFeatures
    from speech_llm.data.stream import open_stream
    from speech_llm.model import build_model
    from speech_llm.recipe import Recipe
    from speech_llm.recipe_data import RowsSource
    from speech_llm.recipe_eval import EvalSection
    from speech_llm.recipe_learning import TrainableSection
    from speech_llm.recipe_model import ModelSection

    model, processor = build_model(ModelSection(), TrainableSection())
    recipe = Recipe.model_validate(
        {
            "name": "stream",
            "data": {
                "stream": True,
                "rows": [RowsSource(path=str(path))],
                "manifests": ["none.jsonl"],
                "train": {"split": "train"},
                "test": {"split": "test"},
            },
            "targets": {"prompts": "none"},
            "eval": EvalSection(prompts="none"),
        }
    )
    os.environ["SPEECH_LLM_CACHE"] = str(path.parent / "cache")  # what parquet becomes is thrown away after
    before = _memory_mb()
    started = time.perf_counter()
    out = path.parent / f"out-{path.stem}"
    data, plan = open_stream(recipe, [], processor, LiveFeatures(model, processor), out, True)
    plan.batches(0)
    first = time.perf_counter() - started
    grown = [_memory_mb() - before]
    started, rendered = time.perf_counter(), 0
    for number in range(1, min(steps, len(plan))):
        plan.batches(number)
        rendered += len(data.rows)
        grown.append(_memory_mb() - before)
    answer.put(
        {
            "rows": data.pool.total,
            "first_s": round(first, 2),
            "first_mb": round(grown[0]),
            "rows_per_s": round(rendered / (time.perf_counter() - started)),
            "last_mb": round(max(grown)),
        }
    )


def _memory_mb() -> float:
    """Memory that this process holds now (Linux)."""
    return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE") / 1e6


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m speech_llm.data.stream_speed", description=__doc__)
    parser.add_argument("--rows", type=int, default=1_000_000)
    parser.add_argument("--small", type=int, default=10_000, help="rows to compare with")
    parser.add_argument("--steps", type=int, default=150, help="steps of 64 rows that are rendered")
    parser.add_argument("--form", choices=["jsonl", "parquet"], default="jsonl")
    given = parser.parse_args()
    context = multiprocessing.get_context("spawn")
    with tempfile.TemporaryDirectory() as folder:
        for rows in (given.small, given.rows):
            path = Path(folder) / f"{rows}.{given.form}"
            write_rows(path, rows)
            for again in range(1 + (given.form == "parquet")):
                answers = context.Queue()
                process = context.Process(target=measure, args=(path, given.steps, answers))
                process.start()
                told = answers.get(timeout=600)
                process.join()
                note = f", the {'first' if not again else 'second'} time" if given.form == "parquet" else ""
                print(
                    f"{told['rows']:>9,} rows ({path.stat().st_size / 1e6:,.0f} MB of {given.form}{note}): first step after {told['first_s']:.2f} s "
                    f"and {told['first_mb']} MB more memory; {told['rows_per_s']:,} rows/s rendered; {told['last_mb']} MB at most in the end",
                    flush=True,
                )


if __name__ == "__main__":
    main()
