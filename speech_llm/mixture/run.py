"""The mixture stage: text rows that are trained on beside the audio Examples, against forgetting.

In: the audio Examples (`targets/examples.jsonl`, counted only) and the sources of `mixture.sources`. Out: `examples.jsonl`, and
`journal.jsonl` with every turn that the LLM wrote. All of it is made before training, by the model as it was: replay rows are
what a later model is kept close to.
"""

from __future__ import annotations

import itertools
from collections import Counter
from pathlib import Path
from typing import TYPE_CHECKING, Any

from speech_llm.errors import UserError
from speech_llm.examples import Example, read_examples, write_examples
from speech_llm.mixture.replay import PACKAGED, TextRows, fill_replay, fill_safety, text_rows
from speech_llm.mixture.share import Budget, learned_tokens, promised
from speech_llm.mixture.writer import Writer

if TYPE_CHECKING:
    from speech_llm.recipe import Recipe

# Demonstrations that pairs are drawn from: enough for a hundred thousand pairs.
MOST_DEMONSTRATIONS = 400


def write_mixture(recipe: Recipe, audio: Path, out_dir: Path, progress: bool = True) -> dict[str, Any]:
    """Write `examples.jsonl` under `out_dir`; returns the counts of the stage.

    `audio`: the audio Examples. Raises `UserError`: a source that has too few rows, an LLM that writes nothing usable.
    """
    from speech_llm.assets import load_answering_llm

    mixture = recipe.mixture

    def load() -> tuple[Any, Any]:
        return load_answering_llm(recipe.model.llm, recipe.optimizer.precision)

    rows: list[Example] = []
    told: list[dict[str, Any]] = []
    with Writer(
        load, out_dir / "journal.jsonl", reference=recipe.model.llm, seed=recipe.seed, progress=progress
    ) as writer:
        amount = _amount(audio, mixture.count, writer)
        for name, settings in zip(source_names(recipe), mixture.sources, strict=True):
            budget = Budget(promised(settings.ratio, amount), unit=mixture.count)
            if mixture.count == "tokens":
                budget.size = lambda example: learned_tokens(example, writer.tokenizer)
            counts = _fill(recipe, settings, name, budget, writer)
            rows += budget.rows
            told.append(
                {
                    "source": name,
                    "ratio": settings.ratio,
                    f"promised_{mixture.count}": budget.wanted,
                    f"kept_{mixture.count}": budget.taken,
                    "rows": len(budget.rows),
                    **counts,
                }
            )
        write_examples(out_dir / "examples.jsonl", rows)
        return {
            "audio_" + mixture.count: amount,
            "mixed_in": len(rows),
            "share": round(sum(row[f"kept_{mixture.count}"] for row in told) / amount, 4),
            "generated_tokens": writer.tokens,
            "tokens_per_s": round(writer.tokens / writer.seconds, 1) if writer.seconds else None,
            "sources": told,
        }


def source_names(recipe: Recipe) -> list[str]:
    """A name for each source, which its rows' ids begin with: its type, with a number where a type comes again."""
    met: Counter[str] = Counter()
    names = []
    for settings in recipe.mixture.sources:
        met[settings.type] += 1
        names.append(settings.type if met[settings.type] == 1 else f"{settings.type}{met[settings.type]}")
    return names


def _amount(audio: Path, count: str, writer: Writer) -> int:
    """Rows of the audio Examples, or the tokens of theirs that are learned."""
    total = 0
    for example in read_examples(audio):
        total += 1 if count == "rows" else learned_tokens(example, writer.tokenizer)
    if not total:
        raise UserError(f"{audio}: there are no audio Examples that a mixture could be a share of")
    return total


def _fill(recipe: Recipe, settings: Any, name: str, budget: Budget, writer: Writer) -> dict[str, Any]:
    """Fill the budget from one source; returns what is told of it."""
    from speech_llm.mixture import written

    if settings.type in ("replay", "safety"):
        file = recipe.resolve_path(settings.rows) if settings.rows else None
        texts = text_rows(settings, file, _folder(recipe, settings), recipe.seed)
        if settings.type == "replay":
            dropped = fill_replay(budget, texts, settings.repeat)
        else:
            dropped = fill_safety(budget, settings, texts)
        for example in budget.rows:
            example.source |= {"strategy": settings.type, "seed": recipe.seed}
            example.id = f"{name}/{example.id}"
        kinds = Counter(
            str(example.source.get("kind")) for example in budget.rows if "kind" in example.source
        )
        return {"dropped": dict(dropped), **({"kinds": dict(kinds)} if kinds else {})}
    source = {
        "strategy": settings.type,
        "teacher": recipe.model.llm,
        "seed": recipe.seed,
        "dataset": recipe.name,
    }
    if settings.type == "magpie":
        made = written.magpie(settings, name, budget, writer, source)
    elif settings.type == "pseudo_replay":
        made = written.pseudo_replay(settings, name, budget, writer, source)
    else:
        made = written.self_synthesized(
            settings, name, budget, writer, _demonstrations(recipe, settings), source
        )
    return {
        "tried": made.tried,
        "acceptance": round((made.tried - sum(made.dropped.values())) / max(1, made.tried), 4),
        "dropped": dict(made.dropped.most_common()),
        "spare": made.spare,
    }


def _folder(recipe: Recipe, settings: Any) -> str | None:
    """The dataset: a folder's path where there is one, else the name as it is."""
    path = recipe.mixture_paths({"dataset": settings.dataset}).get("dataset")
    return str(path) if path is not None else settings.dataset


def _demonstrations(recipe: Recipe, settings: Any) -> list[Example]:
    """Rows of one question and one answer: of the recipe's file, or of the package."""
    file = recipe.resolve_path(settings.demonstrations) if settings.demonstrations else PACKAGED["general"]
    rows = TextRows(file, None, None, "train", {}, recipe.seed)
    short = (row for row in rows if [turn["role"] for turn in row.messages] == ["user", "assistant"])
    return list(itertools.islice(short, MOST_DEMONSTRATIONS))
