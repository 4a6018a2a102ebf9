"""The verbs about this machine: doctor, bench."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from speech_llm.cli.app import Out, Set, app


@app.command(
    epilog="""\b
Examples:
  speech-llm doctor
  speech-llm doctor recipes/quickstart.yaml
  speech-llm doctor recipes/quickstart.yaml --json > doctor.json""",
)
def doctor(
    recipe: Annotated[
        Path | None, typer.Argument(metavar="[RECIPE]", help="a recipe to look at", show_default=False)
    ] = None,
    out: Out = None,
    set_: Set = None,
    json_: Annotated[bool, typer.Option("--json", help="print JSON")] = False,
) -> None:
    """What is installed, what a recipe needs, what fits in memory, how long it may take."""
    import json

    from speech_llm.doctor import as_text, examine
    from speech_llm.recipe import load_recipe

    loaded = None if recipe is None else load_recipe(recipe, set_ or ())
    run_dir = None if loaded is None else out or Path("runs") / loaded.name
    findings = examine(loaded, run_dir)
    typer.echo(json.dumps(findings, indent=2, ensure_ascii=False) if json_ else as_text(findings))
    if loaded is not None and findings["recipe"]["problems"]:
        raise typer.Exit(2)


@app.command(
    epilog="""\b
Examples:
  speech-llm bench                              # about 10 minutes on 2 cores
  speech-llm bench --json speed.json --profile
  speech-llm bench --quick --only ours
  speech-llm bench --llm meta-llama/Llama-3.2-1B-Instruct --encoder openai/whisper-small --clips 64""",
)
def bench(
    json_: Annotated[
        Path | None,
        typer.Option("--json", metavar="FILE", help="write the figures there", show_default=False),
    ] = None,
    clips: Annotated[int, typer.Option(min=2, help="clips spoken")] = 8,
    questions: Annotated[int, typer.Option(min=1, help="rows about each clip")] = 5,
    repeats: Annotated[int, typer.Option(min=1, help="turns of all ways")] = 3,
    only: Annotated[
        str | None,
        typer.Option(
            metavar="WAY[;...]",
            help="only these beside the plain way, e.g. 'ours; ours, kl'",
            show_default=False,
        ),
    ] = None,
    llm: Annotated[str, typer.Option(metavar="MODEL", help="another text LLM", show_default=False)] = "",
    encoder: Annotated[str, typer.Option(metavar="MODEL", help="another encoder", show_default=False)] = "",
    precision: Annotated[str, typer.Option(help="auto, float32 or bfloat16")] = "auto",
    batch: Annotated[int, typer.Option(min=1, help="rows of a batch of the plain way")] = 8,
    batch_tokens: Annotated[int, typer.Option(min=1, help="tokens of a batch of ours")] = 512,
    profile: Annotated[
        bool, typer.Option("--profile", help="also print what the LLM's time goes to")
    ] = False,
    quick: Annotated[bool, typer.Option("--quick", help="4 clips, one turn: does it run?")] = False,
) -> None:
    """Speed and memory of training beside a plain loop, in the same run and at equal loss."""
    from speech_llm.bench.arms import Spec
    from speech_llm.bench.run import ARMS, as_text, run
    from speech_llm.files import write_json

    names = list(ARMS) if only is None else [name.strip() for name in only.split(";")]
    base = Spec(
        way="ours",
        clips=4 if quick else clips,
        questions=2 if quick else questions,
        folder="",
        batch=batch,
        batch_tokens=batch_tokens,
        precision=precision,
        llm=llm,
        encoder=encoder,
        profile=profile,
    )
    result = run(base, names, 1 if quick else repeats, say=lambda line: typer.echo(line, err=True))
    if json_ is not None:
        write_json(json_, result)
    typer.echo(as_text(result))
