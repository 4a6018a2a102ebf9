"""The features of all clips computed ahead: what the verb `cache` does.

In: a recipe and its finished corpus stage. Out: an entry of the feature cache for every clip.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from pathlib import Path

from speech_llm.corpus import split_tables
from speech_llm.errors import UserError
from speech_llm.files import read_jsonl
from speech_llm.phases import phase_dir
from speech_llm.recipe import Recipe


def cache_features(
    recipe: Recipe, run_dir: Path, progress: bool = True, say: Callable[[str], None] = print
) -> dict[str, int]:
    """Encode every clip of a finished corpus stage (of all phases) into the feature cache; returns how many were new, found, rejected.

    `say` gets what the features will take on disk before the first is computed, and what they take in the end.
    """
    parts = [(phase, phase_dir(run_dir, i, phase)) for i, phase in enumerate(recipe.phase_recipes)]
    folders = [folder for part, folder in parts or [(recipe, run_dir)] if part.trainable.encoder_lora is None]
    if not folders:
        raise UserError(
            f"{recipe.path}: trainable.encoder_lora trains the encoder, so its features cannot be cached; "
            "`train` computes them as it goes"
        )
    import torch

    from speech_llm.audio import AudioError, duration_s
    from speech_llm.model import build_model
    from speech_llm.precision import choose_dtype
    from speech_llm.training.loop import open_features

    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    model, processor = build_model(
        recipe.model, recipe.trainable, dtype=choose_dtype(recipe.optimizer.precision, device)
    )
    model.to(device)
    store = open_features(recipe, model, processor)
    tables = [table for folder in folders for table in split_tables(folder / "corpus")]
    paths = [str((table.parent / row["audio"]).resolve()) for table in tables for _, row in read_jsonl(table)]
    lengths = []
    for path in dict.fromkeys(paths):
        with contextlib.suppress(AudioError):  # it will be rejected when it is read
            lengths.append(duration_s(path))
    bound = (
        "no bound (cache.max_gb)" if recipe.cache.max_gb is None else f"cache.max_gb {recipe.cache.max_gb:g}"
    )
    say(
        f"the features of {len(lengths):,} clips ({sum(lengths) / 60:,.1f} minutes) take about "
        f"{store.predicted_bytes(lengths) / 1e6:,.1f} MB in {store.folder}; {bound}"
    )
    counts = store.fill(paths, progress)
    say(f"all features in {store.entries.root} take {store.entries.size_bytes() / 1e6:,.1f} MB")
    return counts
