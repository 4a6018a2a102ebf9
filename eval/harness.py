"""lm-evaluation-harness as a library: any of its tasks on the text path of any model that hands out its LLM.

In: a model with `text_llm(adapters)` (a text LLM, or ours with its adapters on or off) and names of tasks: the harness's own, or YAML
files in its form. Out: results beside those of the other tasks, and every sample in a file. The harness is an extra:
`pip install speech-llm[lm-eval]`.
"""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import yaml

from eval.general import FOLDER, SETS
from eval.stats import wilson_interval
from speech_llm.errors import UserError
from speech_llm.files import write_jsonl

DIMENSION = "lm-evaluation-harness"
OWN = "speech_llm_"


def run_harness(
    model: Any,
    tasks: dict[str, Any],
    out_dir: Path,
    *,
    limit: int | None = None,
    adapters: bool | None = None,
    batch_size: int = 8,
) -> dict[str, dict[str, Any]]:
    """Results of `build_harness`'s tasks by name, as `eval.runner` gives them; samples in `out_dir/lm-eval-NAME.jsonl`.

    `model.text_llm(adapters)` gives its LLM and tokenizer for the time of a block; `adapters`: on, off, or (None) as they act on
    text. Raises `UserError` when the model has none to give or the harness cannot ask a task.
    """
    if not hasattr(model, "text_llm"):
        raise UserError(
            "lm-eval tasks need the LLM itself, which this model does not give (a server gives texts only); "
            "leave them out, or name a checkpoint or text:LLM"
        )
    import lm_eval
    from lm_eval.models.huggingface import HFLM

    with model.text_llm(adapters) as (llm, tokenizer), _explained(tasks):
        found = lm_eval.simple_evaluate(
            model=HFLM(pretrained=llm, tokenizer=tokenizer, batch_size=batch_size),
            tasks=list(tasks.values()),
            limit=limit,
            task_manager=lm_eval.tasks.TaskManager(include_defaults=False),
            bootstrap_iters=0,
            log_samples=True,
        )
    assert found is not None
    results: dict[str, dict[str, Any]] = {}
    for name, metrics in found["results"].items():
        samples = found["samples"][name]
        write_jsonl(out_dir / f"lm-eval-{name}.jsonl", (_sample(row) for row in samples))
        results[f"lm-eval:{name.removeprefix(OWN)}"] = _result(metrics, len(samples))
    return results


def build_harness(names: Sequence[str]) -> dict[str, Any]:
    """The harness's tasks by their own names, those of groups among them, with their data fetched.

    Called before anything is asked, so that a wrong name costs no work. Raises `UserError` when the harness is not installed, a
    task is unknown, or its data cannot be had.
    """
    try:
        from lm_eval.tasks import TaskManager
    except ImportError as error:
        raise UserError(
            f"tasks of lm-evaluation-harness need it installed: pip install 'speech-llm[lm-eval]' ({error})"
        ) from None
    logging.getLogger("lm_eval").setLevel(logging.ERROR)
    tasks = [_task(name) for name in names]
    manager = TaskManager(include_defaults=any(isinstance(task, str) for task in tasks))
    with _explained(names):
        return dict(manager.load(tasks)["tasks"])


@contextlib.contextmanager
def _explained(names: Iterable[str]) -> Iterator[None]:
    try:
        yield
    except (KeyError, ValueError, OSError) as error:
        raise UserError(
            f"lm-evaluation-harness could not run {', '.join(names)}: {type(error).__name__}: {error}; "
            "its tasks are listed by `lm_eval ls tasks`, and their data come from the hub"
        ) from error


def _task(name: str) -> str | dict[str, Any]:
    """The harness's own name, or the contents of a YAML file (ours by name) with its data files found."""
    path = FOLDER / f"{name}.yaml" if name in SETS else Path(name)
    if path.suffix not in (".yaml", ".yml"):
        return name
    if not path.exists():
        raise UserError(f"{path}: no such task file")
    task = yaml.safe_load(path.read_text(encoding="utf-8"))
    files = (task.get("dataset_kwargs") or {}).get("data_files") or {}
    for split, file in files.items() if isinstance(files, dict) else ():
        if isinstance(file, str) and (path.parent / file).exists():
            files[split] = str((path.parent / file).resolve())
    return task


def _result(metrics: dict[str, Any], n: int) -> dict[str, Any]:
    """The harness's figures; `accuracy` with its interval where it counts right answers."""
    told = {
        key.removesuffix(",none"): value
        for key, value in metrics.items()
        if isinstance(value, (int, float)) and "stderr" not in key
    }
    out: dict[str, Any] = {
        "dimension": DIMENSION,
        "n": n,
        "unparsed": 0,
        "harness": told,
        "seen": None,
        "unseen": None,
    }
    right = told.get("acc", next((v for k, v in told.items() if k.startswith("exact_match")), None))
    if right is None:
        name = next((key for key in told if key not in ("alias", "sample_len")), "score")
        return {
            **out,
            "metric": name,
            name: told.get(name),
            "interval": None,
            "chance": None,
            "majority": None,
        }
    interval = [round(value, 4) for value in wilson_interval(round(right * n), n)]
    return {
        **out,
        "metric": "accuracy",
        "accuracy": round(right, 4),
        "interval": interval,
        "chance": None,
        "majority": None,
    }


def _sample(row: dict[str, Any]) -> dict[str, Any]:
    kept = {key: row.get(key) for key in ("doc_id", "doc", "target", "filtered_resps")}
    return {**kept, **{name: row[name] for name in row.get("metrics", []) if name in row}}
