"""Checkpoints of a training run: what was trained, the optimiser's state, the place in the plan.

Everything is safetensors and JSON (nothing is pickled). A checkpoint is a folder written aside and renamed, so a kill
at any instant leaves either the whole of it or none. The newest `keep` are kept.
"""

from __future__ import annotations

import os
import shutil
from pathlib import Path
from typing import Any

import safetensors.torch
import torch
from torch import Tensor

from speech_llm.errors import UserError
from speech_llm.files import explain_os_error, read_json, write_json


def save_checkpoint(
    folder: Path,
    step: int,
    weights: dict[str, Tensor],
    optimizer: torch.optim.Optimizer,
    names: list[str],
    state: dict[str, Any],
    keep: int = 2,
) -> Path:
    """Write `folder/step-NNNNNN`; `names` are the trained parameters in the optimiser's order."""
    target = folder / f"step-{step:06d}"
    aside = folder / f".{target.name}.part"
    shutil.rmtree(aside, ignore_errors=True)
    try:
        aside.mkdir(parents=True)
        safetensors.torch.save_file(
            {k: v.detach().cpu().contiguous() for k, v in weights.items()}, aside / "trained.safetensors"
        )
        safetensors.torch.save_file(_optimizer_tensors(optimizer, names), aside / "optimizer.safetensors")
        safetensors.torch.save_file({"torch": torch.get_rng_state()}, aside / "random.safetensors")
        write_json(aside / "state.json", {"step": step, **state})
        shutil.rmtree(target, ignore_errors=True)
        os.replace(aside, target)
    except OSError as error:
        raise explain_os_error(error, target) from error
    except safetensors.SafetensorError as error:
        raise UserError(
            f"{target}: the checkpoint could not be written ({error}); is the disk full?"
        ) from error
    finally:
        shutil.rmtree(aside, ignore_errors=True)
    for old in sorted(folder.glob("step-*"))[: -max(1, keep)]:
        shutil.rmtree(old, ignore_errors=True)
    return target


def latest_checkpoint(folder: Path) -> Path | None:
    """The newest whole checkpoint under `folder`."""
    found = sorted(path for path in folder.glob("step-*") if (path / "state.json").exists())
    return found[-1] if found else None


def load_checkpoint(
    path: Path, optimizer: torch.optim.Optimizer, names: list[str]
) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Restore optimiser and random state; returns the trained weights and the saved state."""
    tensors = safetensors.torch.load_file(path / "optimizer.safetensors")
    parameters = [p for group in optimizer.param_groups for p in group["params"]]
    for name, parameter in zip(names, parameters, strict=True):
        entry = {
            key.rsplit("|", 1)[1]: value for key, value in tensors.items() if key.rsplit("|", 1)[0] == name
        }
        if entry:
            optimizer.state[parameter] = {
                # Adam keeps its count of steps on the CPU; what is kept of a parameter lies beside it.
                key: value if key == "step" else value.to(parameter.device)
                for key, value in entry.items()
            }
    torch.set_rng_state(safetensors.torch.load_file(path / "random.safetensors")["torch"])
    return safetensors.torch.load_file(path / "trained.safetensors"), read_json(path / "state.json")


def _optimizer_tensors(optimizer: torch.optim.Optimizer, names: list[str]) -> dict[str, Tensor]:
    parameters = [p for group in optimizer.param_groups for p in group["params"]]
    return {
        f"{name}|{key}": value.detach().cpu().contiguous()
        for name, parameter in zip(names, parameters, strict=True)
        for key, value in optimizer.state.get(parameter, {}).items()
        if isinstance(value, Tensor)
    }
