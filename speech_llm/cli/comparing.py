"""The verbs that look at answers that were given: judge, compare, report."""

from __future__ import annotations

from enum import Enum
from pathlib import Path
from typing import Annotated

import typer

from speech_llm.chat_server import ServerSettings
from speech_llm.cli.app import ApiKeyEnv, Concurrency, Quiet, Retries, TimeoutS, app, identity_of, names_of


class Form(str, Enum):
    """What a judge is asked; `eval.judge.FORMS` has the words."""

    answer = "answer"
    reasoning = "reasoning"
    refusal = "refusal"


@app.command(
    epilog="""\b
Examples:
  speech-llm judge results/peer --judge openai:http://127.0.0.1:8000/v1#NAME
  speech-llm judge results/kept --judge openai:http://127.0.0.1:8000/v1#NAME --form refusal
  speech-llm judge results/peer --judge openai:https://api.example.com/v1#NAME --api-key-env MY_KEY --tasks gender --limit 200
Verdicts are kept as they come; the same command goes on where it stopped.""",
)
def judge(
    folder: Annotated[
        Path, typer.Argument(metavar="DIR", help="what `eval` or `score` wrote, or a run", show_default=False)
    ],
    judge_model: Annotated[
        str,
        typer.Option(
            "--judge", metavar="MODEL", help="who judges: openai:URL#NAME, text:LLM", show_default=False
        ),
    ],
    form: Annotated[
        Form,
        typer.Option(
            "--form", help="is the answer right, is there reasoning beyond a direct answer, or does it refuse"
        ),
    ] = Form.answer,
    tasks: Annotated[
        str | None,
        typer.Option(
            "--tasks",
            metavar="NAME[,...]",
            help="only these (default: all that the form is about, such as those with a right answer in words)",
            show_default=False,
        ),
    ] = None,
    limit: Annotated[
        int | None,
        typer.Option(
            "--limit", min=1, metavar="N", help="at most so many answers per task", show_default=False
        ),
    ] = None,
    max_new_tokens: Annotated[
        int, typer.Option("--max-new-tokens", min=1, metavar="N", help="longest reply of the judge")
    ] = 512,
    api_key_env: ApiKeyEnv = None,
    concurrency: Concurrency = 8,
    retries: Retries = 4,
    timeout_s: TimeoutS = 120.0,
    quiet: Quiet = False,
) -> None:
    """Let an LLM judge saved answers, and see how far it agrees with the rules."""
    from eval.compare import predictions_path
    from eval.judge import judge_folder, judged_table
    from speech_llm.responders import load_responder
    from speech_llm.served import tell_trouble

    path = predictions_path(folder)
    named = None if tasks is None else names_of(tasks, "--tasks")
    settings = ServerSettings(api_key_env, concurrency, retries, timeout_s)
    responder = load_responder(judge_model, max_new_tokens=max_new_tokens, server=settings)
    name = str(getattr(responder, "name", judge_model))
    identity = identity_of(name, max_new_tokens)
    judged = judge_folder(
        responder, name, folder, form.value, named, limit, progress=not quiet, identity=identity
    )
    if judged.rejects:
        first = judged.rejects[0]
        typer.echo(
            f"{path}: {len(judged.rejects):,} lines set aside, e.g. line {first['line']}: {first['reason']}",
            err=True,
        )
    typer.echo(judged_table(judged.found))
    typer.echo(f"results: {path.parent / judged.file}")
    tell_trouble(responder, lambda text: typer.echo(text, err=True))


@app.command(
    epilog="""\b
Example:
  speech-llm compare results/before results/after
  speech-llm compare results/cascade results/model --relative
A folder is what `speech-llm eval` or `score` wrote, or a run.""",
)
def compare(
    first: Annotated[Path, typer.Argument(metavar="FIRST", help="folder of one model", show_default=False)],
    second: Annotated[Path, typer.Argument(metavar="SECOND", help="folder of the other", show_default=False)],
    out: Annotated[
        Path | None,
        typer.Option("--out", metavar="FILE.json", help="write the figures there", show_default=False),
    ] = None,
    relative: Annotated[
        bool,
        typer.Option(
            "--relative", help="also by dimension, relative to FIRST as the baseline (Dynamic-SUPERB phase 2)"
        ),
    ] = False,
) -> None:
    """Compare two models on the instances that both answered, task by task."""
    from eval.compare import compare as compare_folders
    from eval.compare import comparison_table, ifeval_forgetting
    from speech_llm.files import write_json

    results = compare_folders(first, second)
    alike = first.resolve().name == second.resolve().name
    names = (str(first), str(second)) if alike else (first.resolve().name, second.resolve().name)
    typer.echo(comparison_table(results, names))
    if relative:
        from eval.relative import relative_scores, relative_table

        by_dimension = relative_scores(first, second)
        typer.echo(f"\n{relative_table(by_dimension, names)}")
        results["relative"] = by_dimension
    if out is not None:
        write_json(out, results)
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
