"""What comes before training on answers: soft words, and the connector drawn to them.

In: described clips and the packs of the Examples. Out: a connector whose vectors the LLM can already read.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import safetensors.torch

from speech_llm.data.packing import Pack
from speech_llm.files import atomic_write, read_json, write_json
from speech_llm.training.losses import cross_entropy_sum
from speech_llm.training.student import Student

if TYPE_CHECKING:
    from speech_llm.recipe import Recipe


def fixed_vectors(model: Any) -> bool:
    """Whether every clip becomes the same number of vectors, so that each can have a meaning of its own."""
    return model.config.connector["type"] == "qformer"


def warm_up(
    recipe: Recipe,
    packs: list[Pack],
    student: Student,
    described: Path,
    out_dir: Path,
    log: Callable[[dict[str, Any]], None],
    progress: bool,
) -> dict[str, Any]:
    """What comes before training on answers: tune soft words, then draw the connector to them; returns what it did.

    Tuned soft words are kept in `out_dir`, so that a run killed during the alignment need not tune them again.
    """
    from speech_llm.targets.questions import read_described
    from speech_llm.training.align import align
    from speech_llm.training.soft_words import SoftWords, learn_soft_words

    settings, model, processor = recipe.optimizer, student.model, student.processor
    features = student.features
    clips = read_described(described)
    features.fill([clip["audio"] for clip in clips], progress=progress)
    soft = SoftWords(
        clips,
        processor.tokenizer,
        model.llm.get_input_embeddings().weight,
        model.connector.num_vectors(1),
        [name for name in recipe.describe.labels.values() if name != "transcript"],
    )
    tuned: dict[str, Any] | None = None
    if settings.soft_word_epochs and soft.names:
        kept = out_dir / "soft_words.safetensors"
        if kept.exists():
            soft.load_state_dict(safetensors.torch.load_file(kept))
            tuned, told = (read_json(kept.with_suffix(".json"))[key] for key in ("counts", "log"))
            for row in told:
                log(row)
        else:
            told = []

            def keep_and_log(row: dict[str, Any]) -> None:
                told.append(row)
                log(row)

            tuned = learn_soft_words(
                soft,
                model,
                [pack for pack in packs if pack.clips],
                {clip["audio"]: clip["attributes"] for clip in clips},
                lambda batch, vectors: cross_entropy_sum(*student.answer_logits(batch, vectors)),
                prefix_length=student.prefix_length,
                pad_id=processor.pad_token_id,
                epochs=settings.soft_word_epochs,
                learning_rate=settings.soft_word_lr,
                batch_tokens=settings.batch_tokens,
                seed=recipe.seed,
                log=keep_and_log,
                progress=progress,
            )
            write_json(kept.with_suffix(".json"), {"counts": tuned, "log": told})
            with atomic_write(kept, "wb") as handle:
                handle.write(
                    safetensors.torch.save({k: v.detach().cpu() for k, v in soft.state_dict().items()})
                )
    aligned = align(
        model,
        soft,
        clips,
        features,
        tuned=tuned is not None,
        epochs=settings.align_epochs,
        learning_rate=settings.align_lr,
        seed=recipe.seed,
        log=log,
        progress=progress,
    )
    return {**aligned, "soft_words": tuned}
