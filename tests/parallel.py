"""A small training on tiny models, to be started by `accelerate launch`: python parallel.py FOLDER NAME [key=value ...].

It is made, sent back to its middle checkpoint, and made again from there.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate import PartialState
from learning import tiny_examples, tiny_recipe

import speech_llm.model
from speech_llm.examples import Example, write_examples
from speech_llm.training.loop import train

COPIES = ("--multi_gpu",)
SHARDS = ("--use_fsdp", "--fsdp_version", "2")


def accelerate_launch(
    options: Sequence[str], *command: str, **variables: str
) -> subprocess.CompletedProcess[str]:
    """`accelerate launch OPTIONS COMMAND` with two processes, `variables` in their environment."""
    here = Path(__file__).parent
    path = os.pathsep.join([str(here.parent), str(here), os.environ.get("PYTHONPATH", "")])
    plain = ["--num_processes", "2", "--num_machines", "1", "--mixed_precision", "no", "--dynamo_backend", "no"]  # fmt: skip
    return subprocess.run(
        [
            sys.executable,
            "-m",
            "accelerate.commands.launch",
            *options,
            *plain,
            "--main_process_port",
            "0",
            *command,
        ],
        env={**os.environ, "PYTHONPATH": path, "OMP_NUM_THREADS": "1", **variables},
        capture_output=True,
        text=True,
        timeout=300,
    )


def launch(folder: Path, name: str, options: Sequence[str], *overrides: str) -> None:
    """`main` in two new processes of `accelerate launch`; a forked one would share the threads that its parent no longer has."""
    done = accelerate_launch(
        options, str(Path(__file__).parent / "parallel.py"), str(folder), name, *overrides
    )
    assert done.returncode == 0, done.stderr[-3000:]


def alone(folder: Path, more: Sequence[Example] = (), changes: Sequence[str] = ()) -> None:
    """Rows with answers of very different lengths, and `more`, in `folder`, and in "one" what one process makes of them in accumulated batches."""
    examples = tiny_examples(folder / "clips", 8)
    for example in examples[::3]:
        example.messages[-1]["content"] = "A much longer answer, so that batches weigh differently."
    write_examples(folder / "examples.jsonl", [*examples, *more])
    before = torch.get_num_threads()
    with pytest.MonkeyPatch.context() as patch:  # what it sets is unset
        patch.setenv("CUDA_VISIBLE_DEVICES", os.environ.get("CUDA_VISIBLE_DEVICES", ""))
        patch.setattr(speech_llm.model, "build_model", speech_llm.model.build_model)
        patch.setenv("SPEECH_LLM_CACHE", "")
        main(folder, "one", "optimizer.accumulate=2", *changes)
    torch.set_num_threads(before)


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
