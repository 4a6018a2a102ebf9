"""A small training on tiny models, to be started by `accelerate launch`: python parallel.py FOLDER NAME [key=value ...].

It is made, sent back to its middle checkpoint, and made again from there.
"""

from __future__ import annotations

import os
import shutil
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate import PartialState
from learning import tiny_recipe

from speech_llm.training.loop import train


def main(folder: Path, name: str, *overrides: str) -> None:
    torch.set_num_threads(1)
    os.environ["CUDA_VISIBLE_DEVICES"] = ""
    settings: tuple[Any, ...] = (
        "trainable.lora.rank=2",
        "trainable.lora.dropout=0.2",
        "model.gate_adapters=false",
        "optimizer.max_steps=6",
        "optimizer.batch_tokens=128",
        "optimizer.checkpoint_every=3",
        "optimizer.kl_every=2",
        "eval.probes=[]",
        *overrides,
    )
    recipe = tiny_recipe(pytest.MonkeyPatch(), folder, *settings)
    out = folder / name
    train(recipe, folder / "examples.jsonl", out / "train", out / "model", progress=False)
    if PartialState().is_main_process:
        shutil.rmtree(out / "train" / "checkpoints" / "step-000006")
        shutil.rmtree(out / "model")
    PartialState().wait_for_everyone()
    train(recipe, folder / "examples.jsonl", out / "train", out / "model", progress=False)


if __name__ == "__main__":
    main(Path(sys.argv[1]), *sys.argv[2:])
