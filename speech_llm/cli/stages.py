"""The verbs that run the stages of a recipe: run, targets, mixture, cache, train; and export of what training keeps."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from speech_llm.cli.app import Out, Quiet, RecipePath, Set, app, typed_command


def _print_keys(wanted: bool) -> None:
    if wanted:
        from speech_llm.recipe import Recipe
        from speech_llm.recipe_errors import describe_keys

        rows = list(describe_keys(Recipe))
        width = max(len(name) for name, _, _ in rows)
        for name, default, meaning in rows:
            typer.echo(
                f"{name:{width}}  {default}\n{'':{width}}    {meaning}"
                if default
                else f"{name:{width}}  {meaning}"
            )
        raise typer.Exit


@app.command(
    epilog="""\b
Examples:
  speech-llm run recipes/quickstart.yaml
  speech-llm run recipes/quickstart.yaml --set optimizer.max_steps=20 --set data.limit=40 --out runs/try
  speech-llm run recipes/real_speech.yaml --set "data.manifests=[my/metadata.jsonl]"
  speech-llm run --keys | less
Finished stages are skipped; a run that was stopped goes on with the same command.""",
)
def run(
    recipe: RecipePath,
    out: Out = None,
    set_: Set = None,
    quiet: Quiet = False,
    keys: Annotated[
        bool,
        typer.Option(
            "--keys", is_eager=True, callback=_print_keys, help="list every key a recipe may have, and exit"
        ),
    ] = False,
) -> None:
    """All stages of a recipe: corpus, describe, targets, train, eval, report."""
    from speech_llm.files import read_json
    from speech_llm.summary import results_table

    run_dir = _run_stages(recipe, out, set_, quiet, "report")
    results = read_json(run_dir / "results.json")
    typer.echo(f"\n{results_table(results)}\n")
    typer.echo(f"report: {run_dir / 'report.html'}")
    typer.echo(f'try it: speech-llm chat {run_dir / "model"} some.wav "What can you hear?"')
    typer.echo(f"on a page: speech-llm demo {run_dir} --open")


@app.command(
    epilog="""\b
Examples:
  speech-llm targets recipes/quickstart.yaml
  speech-llm targets recipes/quickstart.yaml --set targets.clips=20 --out runs/look   # then read runs/look/targets/examples.jsonl""",
)
def targets(recipe: RecipePath, out: Out = None, set_: Set = None, quiet: Quiet = False) -> None:
    """Up to the answers to learn: corpus, describe, targets."""
    run_dir = _run_stages(recipe, out, set_, quiet, "targets")
    typer.echo(f"answers: {run_dir / 'targets' / 'examples.jsonl'}")


@app.command(
    epilog="""\b
Example:
  speech-llm mixture recipes/quickstart.yaml --out runs/mixed --set trainable.lora.rank=8 --set model.gate_adapters=false --set "mixture.sources=[{type: replay}]"
Then read runs/mixed/mixture/examples.jsonl.""",
)
def mixture(recipe: RecipePath, out: Out = None, set_: Set = None, quiet: Quiet = False) -> None:
    """Up to the text rows that are mixed in: corpus, describe, targets, mixture."""
    run_dir = _run_stages(recipe, out, set_, quiet, "mixture")
    typer.echo(f"mixed in: {run_dir / 'mixture' / 'examples.jsonl'}")


@app.command(
    epilog="""\b
Examples:
  speech-llm cache recipes/quickstart.yaml
  speech-llm cache recipes/quickstart.yaml --set cache.max_gb=20
Training and evaluation fill the cache by themselves; this does it ahead, for instance on another machine, and says first
what it takes on disk.""",
)
def cache(recipe: RecipePath, out: Out = None, set_: Set = None, quiet: Quiet = False) -> None:
    """Encode every clip of a recipe once and keep the encoder's features."""
    from speech_llm.caching import cache_features
    from speech_llm.recipe import load_recipe

    run_dir = _run_stages(recipe, out, set_, quiet, "corpus")
    counts = cache_features(load_recipe(recipe, set_ or ()), run_dir, not quiet, typer.echo)
    told = (f"{count:,} {name.replace('_', ' ')}" for name, count in counts.items())
    typer.echo(f"clips: {', '.join(told)}")


@app.command(
    epilog="""\b
Examples:
  speech-llm train recipes/quickstart.yaml
  speech-llm train recipes/quickstart.yaml --set optimizer.lr=5e-4 --out runs/slower""",
)
def train(recipe: RecipePath, out: Out = None, set_: Set = None, quiet: Quiet = False) -> None:
    """Up to a trained model: corpus, describe, targets, train."""
    run_dir = _run_stages(recipe, out, set_, quiet, "train")
    typer.echo(f"model: {run_dir / 'model'}")


@app.command(
    epilog="""\b
Examples:
  speech-llm export runs/quickstart/train/checkpoints/step-000050 --out models/earlier
  speech-llm export runs/quickstart --out models/newest     # the newest checkpoint of a run that is still going on
The best checkpoint by a probe is kept beside the newest with --set "optimizer.best=json.audio answer".""",
)
def export(
    checkpoint: Annotated[
        Path,
        typer.Argument(metavar="CHECKPOINT", help="a checkpoint's folder, or a run's", show_default=False),
    ],
    out: Annotated[Path, typer.Option("--out", metavar="DIR", help="the model's folder", show_default=False)],
) -> None:
    """Make a model of any checkpoint, without its optimiser."""
    from speech_llm.errors import UserError
    from speech_llm.training.checkpoint import export_checkpoint, latest_checkpoint

    found: Path | None = checkpoint
    if (checkpoint / "train" / "checkpoints").is_dir():
        found = latest_checkpoint(checkpoint / "train" / "checkpoints")
    if found is None:
        raise UserError(f"{checkpoint}: it has no checkpoint yet")
    if out.exists():
        raise UserError(f"{out}: there is something already; give another --out")
    state = export_checkpoint(found, out)
    typer.echo(f"model after step {state['step']}: {out}")


def _run_stages(recipe: Path, out: Path | None, overrides: list[str] | None, quiet: bool, until: str) -> Path:
    """Run a recipe's stages up to `until`; returns the run folder. Of several processes only the main one returns."""
    from speech_llm.launch import launched
    from speech_llm.pipeline import run_stages
    from speech_llm.recipe import load_recipe

    loaded = load_recipe(recipe, overrides or ())
    run_dir = out or Path("runs") / loaded.name
    launch = launched()
    run_stages(
        loaded,
        run_dir,
        until,
        progress=not quiet,
        say=typer.echo,
        command=typed_command(),
        launch=launch,
    )
    launch.end()
    if not launch.main:
        raise typer.Exit
    return run_dir
