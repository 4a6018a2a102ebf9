"""The verbs about this machine: doctor."""

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
