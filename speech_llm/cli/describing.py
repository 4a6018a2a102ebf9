"""The verbs from sound to words: describe, fit-describer."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from speech_llm.cli.app import Quiet, app, names_of, pair_of
from speech_llm.errors import UserError


@app.command(
    epilog="""\b
Examples:
  speech-llm describe recordings/ --out described.jsonl
  speech-llm describe my/metadata.jsonl --out described.jsonl --use duration,transcript,labels --label sex=gender --label emotion=emotion
  speech-llm describe recordings/ --out described.jsonl --use duration,pitch,volume,speed,pauses,noise,reverberation
  speech-llm describe recordings/ --out described.jsonl --use gender,age_group,emotion=my/emotion.safetensors,event=OWNER/MODEL
  speech-llm describe my/metadata.jsonl --out described.jsonl --use gender --check sex=gender
  speech-llm describe openslr/librispeech_asr:clean/test --out described.jsonl --use duration
  speech-llm describe recordings/ --out described.jsonl --use gender,transcript --form desta --include gender,transcript
Inputs that cannot be used go to described.rejects.jsonl with the reason. A stopped run goes on with the same command, and
what was found in a sound before is not computed again.""",
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
    include: Annotated[
        str | None,
        typer.Option(
            "--include",
            metavar="NAMES",
            help="attributes that a description tells, in this order (default: all)",
            show_default=False,
        ),
    ] = None,
    random_order: Annotated[
        bool, typer.Option("--random-order", help="tell them in another order in each description")
    ] = False,
    dropout: Annotated[
        float,
        typer.Option("--dropout", min=0, max=1, metavar="P", help="leave each out with this probability"),
    ] = 0.0,
    wording: Annotated[
        Path | None,
        typer.Option(
            "--wording",
            metavar="FILE",
            help='JSON object: other words for parts of a sentence, {"emotion": "and sounds {value}"}',
            show_default=False,
        ),
    ] = None,
    seed: Annotated[int, typer.Option("--seed", metavar="N", help="for --dropout and --random-order")] = 0,
    no_cache: Annotated[
        bool, typer.Option("--no-cache", help="ask every describer again, and keep nothing for another run")
    ] = False,
    quiet: Quiet = False,
) -> None:
    """Describe recordings in words: one JSON line each, in order."""
    from describers.run import DEFAULT_ASR, describe_inputs
    from describers.scoring import check_text
    from describers.wording import check_wording
    from speech_llm.files import read_json

    words = read_json(wording) if wording else {}
    check_wording(words)

    columns = dict(pair_of(item) for item in label or [])
    maps = dict(pair_of(item, "--map", "emotion=labels.json", "ATTRIBUTE=FILE") for item in map_ or [])
    names = names_of(use, "--use")
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
        label_maps={attribute: _label_map(path) for attribute, path in maps.items()},
        checks=dict(pair_of(item, "--check", "sex=gender") for item in check or []),
        telling={
            "use": names_of(include, "--include") if include is not None else None,
            "shuffle": random_order,
            "drop": dropout,
            "wording": words,
            "seed": seed,
        },
        cache=not no_cache,
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
    if report.cached:
        known = [f"{name} of {count:,}" for name, count in report.cached.items()]
        typer.echo("known from before: " + ", ".join(known))
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
        where=dict(pair_of(item, "--where", "split=train", "COLUMN=VALUE") for item in where or []),
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


def _label_map(path: str) -> dict[str, str | None]:
    """What a classifier's labels mean, from a file; raises `UserError` for anything but an object of texts and nulls."""
    from speech_llm.files import read_json

    found = read_json(path)
    if not isinstance(found, dict) or not all(isinstance(v, str) or v is None for v in found.values()):
        raise UserError(
            f'{path}: expected a JSON object, what each label means, null for nothing: {{"hap": "happy", "oth": null}}'
        )
    return found
