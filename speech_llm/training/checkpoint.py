"""Checkpoints of a training run: what was trained, the optimiser's state, the place in the plan.

Everything is safetensors and JSON (nothing is pickled). A checkpoint is a folder written aside and renamed, so a kill
at any instant leaves either the whole of it or none. The newest `keep` are kept, and the best. Whatever is by chance is drawn anew at every
step from seed and step (see `step`), so there is no random state to keep.

Beside them lies `model/`, what a model's folder holds besides its weights: with it any checkpoint is exported as a model without the optimiser
and without loading anything else.
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
from speech_llm.files import atomic_write, explain_os_error, read_json, write_json

WEIGHTS = "trained.safetensors"
FORM = "model"


def save_checkpoint(
    folder: Path,
    step: int,
    weights: dict[str, Tensor],
    optimizer: dict[str, Tensor],
    state: dict[str, Any],
    keep: int = 2,
    best: int | None = None,
) -> Path:
    """Write `folder/step-NNNNNN`. `optimizer`: as `optimizer_tensors` gave them. `best`: a step whose checkpoint stays."""
    target = folder / _name(step)
    aside = folder / f".{target.name}.part"
    shutil.rmtree(aside, ignore_errors=True)
    try:
        aside.mkdir(parents=True)
        for name, tensors in ((WEIGHTS, weights), ("optimizer.safetensors", optimizer)):
            with atomic_write(aside / name, "wb") as handle:  # on the disk before the folder has its name
                handle.write(
                    safetensors.torch.save({k: v.detach().cpu().contiguous() for k, v in tensors.items()})
                )
        write_json(aside / "state.json", {**state, "step": step})
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
    for old in sorted(folder.glob("step-*"), key=_step)[: -max(1, keep)]:
        if best is None or old.name != _name(best):
            _remove(old)
    return target


def latest_checkpoint(folder: Path) -> Path | None:
    """The newest whole checkpoint under `folder`."""
    whole = (path for path in folder.glob("step-*") if (path / "state.json").exists())
    found = sorted(whole, key=_step)
    return found[-1] if found else None


def load_weights(path: Path) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """The trained weights and the state of a checkpoint, without the optimiser."""
    try:
        return safetensors.torch.load_file(path / WEIGHTS), read_json(path / "state.json")
    except (FileNotFoundError, safetensors.SafetensorError) as error:
        raise UserError(f"{path}: not a whole checkpoint ({error})") from None


def read_moments(path: Path) -> dict[str, dict[str, Tensor]]:
    """What a checkpoint's optimiser kept of each parameter: name -> key -> tensor."""
    entries: dict[str, dict[str, Tensor]] = {}
    for key, value in safetensors.torch.load_file(path / "optimizer.safetensors").items():
        name, _, kind = key.rpartition("|")
        entries.setdefault(name, {})[kind] = value
    return entries


def load_optimizer(
    entries: dict[str, dict[str, Tensor]], optimizer: torch.optim.Optimizer, names: list[str]
) -> None:
    """Restore the optimiser from `read_moments`; `names` are the trained parameters in its order. Shards take their part."""
    parameters = [p for group in optimizer.param_groups for p in group["params"]]
    for name, parameter in zip(names, parameters, strict=True):
        if name in entries:
            optimizer.state[parameter] = {
                # Adam keeps its count of steps on the CPU; what is kept of a parameter lies beside it.
                key: value if key == "step" else _like(parameter, value)
                for key, value in entries[name].items()
            }


def optimizer_tensors(optimizer: torch.optim.Optimizer, names: list[str]) -> dict[str, Tensor]:
    """What the optimiser keeps of each parameter, as "name|key" -> tensor."""
    parameters = [p for group in optimizer.param_groups for p in group["params"]]
    return {
        f"{name}|{key}": value
        for name, parameter in zip(names, parameters, strict=True)
        for key, value in optimizer.state.get(parameter, {}).items()
        if isinstance(value, Tensor)
    }


def save_form(folder: Path, model: Any, processor: Any) -> None:
    """Write `folder/model/`: configuration and processor, what a model needs besides a checkpoint's weights."""
    target, aside = folder / FORM, folder / f".{FORM}.part"
    shutil.rmtree(aside, ignore_errors=True)
    model.config.architectures = [type(model).__name__]
    model.config.save_pretrained(aside)
    processor.save_pretrained(aside)
    shutil.rmtree(target, ignore_errors=True)
    os.replace(aside, target)


def export_checkpoint(path: Path, model_dir: Path, training: dict[str, Any] | None = None) -> dict[str, Any]:
    """Write a checkpoint as a model's folder, aside and renamed; returns the checkpoint's state.

    `path`: a checkpoint. `training`: what `training.json` says (default: the checkpoint's state). `UserError` when it is none.
    """
    weights, state = load_weights(path)
    form = path.parent / FORM
    if not (form / "config.json").exists():
        raise UserError(f"{form}: there is no config.json, so {path.name} cannot be made a model")
    aside = model_dir.with_name(f".{model_dir.name}.part")
    try:
        shutil.rmtree(aside, ignore_errors=True)
        shutil.copytree(form, aside)
        safetensors.torch.save_file(weights, aside / "model.safetensors", metadata={"format": "pt"})
        write_json(aside / "training.json", training or state)
        shutil.rmtree(model_dir, ignore_errors=True)
        os.replace(aside, model_dir)
    except OSError as error:
        raise explain_os_error(error, model_dir) from error
    return state


def _name(step: int) -> str:
    return f"step-{step:06d}"


def _step(folder: Path) -> int:
    """The step of a checkpoint's folder; as text a million would stand before 999,999."""
    number = folder.name.removeprefix("step-")
    return int(number) if number.isdigit() else -1


def _remove(folder: Path) -> None:
    """Take a checkpoint's name off before its files, so that a kill leaves no half of it under that name."""
    aside = folder.with_name(f".{folder.name}.old")
    shutil.rmtree(aside, ignore_errors=True)
    os.replace(folder, aside)
    shutil.rmtree(aside, ignore_errors=True)


def _like(parameter: Any, value: Tensor) -> Tensor:
    if not hasattr(parameter, "device_mesh"):
        return value.to(parameter.device)
    from torch.distributed.tensor import distribute_tensor

    return distribute_tensor(value.to(parameter.device), parameter.device_mesh, parameter.placements)
