"""One process or many: what they share in a training step, and what each of them holds.

Started plainly there is one process. `accelerate launch --multi_gpu` starts several with whole copies of the model (data parallel: the gradients
of a step are summed once, at its end, after all its batches), `--use_fsdp --fsdp_version 2` several that each hold a part of every
layer of the LLM (FSDP2, `torch.distributed.fsdp.fully_shard`; what lies outside the layers stays whole), `--use_deepspeed` several that each hold
a part of what the optimiser keeps, or of the weights too (see `zero`). A step's batches are dealt out among
the processes and weighted by what the whole step weighs, so the number of processes changes no token's weight.
"""

from __future__ import annotations

import contextlib
import datetime
import math
import os
import sys
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from speech_llm.errors import UserError
from speech_llm.training.answers import MOST_LOGITS
from speech_llm.training.checkpoint import load_optimizer, optimizer_tensors, read_moments
from speech_llm.training.zero import Zero, wanted

if TYPE_CHECKING:
    from speech_llm.recipe import Recipe
    from speech_llm.training.objectives import BatchLoss


# The main process may encode every clip, or ask all probes, while the others wait; a process that died is seen by its launcher.
LONGEST_WAIT = datetime.timedelta(days=7)


class Processes:
    """The processes of a run, as accelerate started them."""

    def __init__(self, trackers: Sequence[str] = (), folder: str | os.PathLike[str] = ".") -> None:
        """`trackers`: names that accelerate knows; they write under `folder`. `UserError` where a way to launch is not supported."""
        from accelerate import Accelerator
        from accelerate.utils import InitProcessGroupKwargs

        self.zero = Zero() if wanted() else None
        self.sharded = os.environ.get("ACCELERATE_USE_FSDP", "false").lower() == "true"
        if self.sharded and os.environ.get("FSDP_VERSION", "1") != "2":
            raise UserError("training runs under FSDP2 only: accelerate launch --use_fsdp --fsdp_version 2")
        # Every process loads the whole model: transformers else leaves weights of a model that is to be sharded out at all but the main
        # process, for accelerate to fill in.
        os.environ["FSDP_CPU_RAM_EFFICIENT_LOADING"] = "false"
        # The model is sharded here, and not by accelerate as a whole: parts of it are called on their own.
        with _without("ACCELERATE_USE_FSDP"), _without("ACCELERATE_USE_DEEPSPEED"):
            self.accelerator = Accelerator(
                cpu=not torch.cuda.is_available(),
                log_with=_known(trackers),
                project_dir=str(folder),
                kwargs_handlers=[InitProcessGroupKwargs(timeout=LONGEST_WAIT)],
            )
        self.device: torch.device = self.accelerator.device
        self.main = bool(self.accelerator.is_main_process)
        self.count, self.index = int(self.accelerator.num_processes), int(self.accelerator.process_index)
        self.sharded = self.count > 1 and (self.sharded or (self.zero is not None and self.zero.in_parts))
        if trackers:
            self.accelerator.init_trackers("tracked")

    @contextlib.contextmanager
    def main_first(self) -> Iterator[None]:
        """The main process does a block before the others, which then find what it made."""
        with self.accelerator.main_process_first():
            yield

    def wait(self) -> None:
        """Until every process is here."""
        self.accelerator.wait_for_everyone()

    def track(self, values: dict[str, Any], step: int) -> None:
        """Give the numbers among `values` to the trackers."""
        numbers = {k: v for k, v in values.items() if isinstance(v, int | float) and k != "step"}
        self.accelerator.log(numbers, step=step)

    def close(self) -> None:
        """End the trackers; the processes stay connected, as another phase may follow."""
        for tracker in self.accelerator.trackers:
            tracker.finish()
        if self.zero is not None:
            self.zero.close()

    def mine(self, batches: Sequence[list[int]]) -> list[tuple[int, list[int], float]]:
        """(place in the step, batch, factor) of this process. Shards need the same number of batches everywhere: factor 0 fills up."""
        own = [(place, batches[place], 1.0) for place in range(self.index, len(batches), self.count)]
        if self.sharded and len(own) < -(-len(batches) // self.count):
            own.append((len(batches) - 1, batches[-1], 0.0))
        return own

    # ---------------------------------------------------------------- shards

    def check(self, recipe: Recipe) -> None:
        """Raise `UserError` for what needs the whole model in one process while it is sharded."""
        if not self.sharded:
            return
        loss, zero = recipe.loss, self.zero
        exchanged = loss.l2_start or getattr(loss, "reference", "") == "start"
        reasons = {
            "style": recipe.style == "rollout" and "answers of different lengths are sampled at each process",
            "loss": bool(exchanged or (recipe.trainable.llm and loss.asks_base))
            and "it compares with other weights",
            "loss.type": bool(loss.asks_base and (recipe.data.stream or getattr(loss, "top_k", 0) is None))
            and "the base LLM is asked at each step, for each batch a number of times of its own",
            "trainable.encoder_lora": (zero is not None and recipe.trainable.encoder_lora is not None)
            and "the encoder, in parts too, runs where there is sound only",
            "optimizer.compile": recipe.optimizer.compile
            and "layers whose weights come and go are not compiled; set optimizer.compile to false",
            "eval.probes": bool(recipe.eval.probes)
            and "probes ask the whole model in one process; set eval.probes to []",
        }
        instead = "without --use_fsdp" if zero is None else "with --zero_stage 2"
        for key, why in reasons.items():
            if why:
                raise UserError(f"{key}: this recipe cannot be trained in shards ({why}); launch {instead}")

    @property
    def most_logits(self) -> int:
        """Over how many, logits are made chunk by chunk. An output layer in parts must run as often at every process: once."""
        return sys.maxsize if self.sharded and self.zero is not None else MOST_LOGITS

    def shard(self, model: Any) -> None:
        """Split the LLM's layers among the processes, in place. Must come before the optimiser is made; DeepSpeed splits after that."""
        if not self.sharded or self.zero is not None:
            return
        from torch.distributed.device_mesh import init_device_mesh
        from torch.distributed.fsdp import fully_shard

        mesh = init_device_mesh(self.device.type, (self.count,))
        layers = decoder_layers(model)
        if not layers:
            raise UserError(
                f"{model.config.llm}: its layers are not known, so it cannot be sharded; launch without --use_fsdp"
            )
        for layer in layers:
            fully_shard(layer, mesh=mesh)

    def same_start(self, parameters: Iterable[nn.Parameter]) -> None:
        """Give every process the main one's values."""
        if self.count > 1:
            for parameter in parameters:
                torch.distributed.broadcast(parameter.data, 0)

    def begin(
        self,
        model: Any,
        optimizer: torch.optim.Optimizer,
        names: list[str],
        clip: float,
        found: Path | None,
    ) -> None:
        """Make ready for steps; `names`: the parameters in the optimiser's order, `found`: a checkpoint whose optimiser goes on."""
        if self.zero is not None:
            self.zero.begin(model, optimizer, clip)
            if found is not None:
                self.zero.load_moments(read_moments(found))
        elif found is not None:
            load_optimizer(read_moments(found), optimizer, names)

    def weights(self, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
        """The same parameters, shards gathered. Every process must call it."""
        if self.zero is not None:
            return self.zero.weights(tensors)
        return {name: _full(value) for name, value in tensors.items()}

    def moments(self, optimizer: torch.optim.Optimizer, names: list[str]) -> dict[str, Tensor]:
        """What the optimiser keeps, shards gathered. Every process must call it."""
        if self.zero is not None:
            return self.zero.moments()
        return {name: _full(value) for name, value in optimizer_tensors(optimizer, names).items()}

    # ---------------------------------------------------------------- a step

    def loss(self, work: Callable[[], BatchLoss]) -> BatchLoss:
        """The loss of a batch, which `work` makes."""
        if self.zero is None:
            return work()
        made: list[BatchLoss] = []

        def run() -> Tensor:
            made.append(work())
            return made[0].loss

        self.zero.run(run)
        return made[0]

    def backward(self, loss: Tensor) -> None:
        """Add the gradients of a part of the step's loss."""
        if self.zero is None:
            (loss * self.loss_factor).backward()
        else:
            self.zero.backward(loss * self.loss_factor)

    @contextlib.contextmanager
    def accumulating(self, parameters: Sequence[nn.Parameter]) -> Iterator[None]:
        """Within it the gradients of a step are summed in this process, from none."""
        if self.zero is not None:
            with self.zero.accumulating():
                yield
            return
        for parameter in parameters:
            parameter.grad = None
        yield

    def update(
        self, optimizer: torch.optim.Optimizer, parameters: Sequence[nn.Parameter], clip: float
    ) -> float:
        """Sum gradients over the processes, scale them down to a norm of `clip` at most, and make the optimiser's step.

        Returns the norm before; where it is not finite the weights are no longer of use.
        """
        if self.zero is not None:
            return self.zero.step()
        self.sum_gradients(parameters)
        norm = self.clip(parameters, clip)
        if math.isfinite(norm):
            optimizer.step()
        return norm

    # ---------------------------------------------------------------- sums over processes

    @property
    def loss_factor(self) -> float:
        """What a loss must be multiplied by before its gradient: FSDP and DeepSpeed take the mean over processes, and sums are wanted."""
        return float(self.count) if self.sharded or self.zero is not None else 1.0

    def sum_gradients(self, parameters: Sequence[nn.Parameter]) -> None:
        """Sum the gradients of what every process holds whole; those of shards are summed already."""
        if self.count == 1:
            return
        # What no process has a gradient for keeps none, so that the optimiser passes it over as it does in one process.
        own = [parameter for parameter in parameters if not _is_shard(parameter)]
        known = self.sums([float(parameter.grad is not None) for parameter in own])
        groups: dict[torch.dtype, list[nn.Parameter]] = {}
        for parameter, anywhere in zip(own, known, strict=True):
            if anywhere:
                groups.setdefault(parameter.dtype, []).append(parameter)
        for group in groups.values():
            flat = torch.cat(
                [
                    (torch.zeros_like(p) if p.grad is None else p.grad).flatten() / self.loss_factor
                    for p in group
                ]
            )
            torch.distributed.all_reduce(flat)
            for parameter, part in zip(group, flat.split([p.numel() for p in group]), strict=True):
                parameter.grad = part.view_as(parameter)

    def sums(self, values: Sequence[float]) -> list[float]:
        """Each value summed over the processes."""
        if self.count == 1:
            return [float(value) for value in values]
        tensor = torch.tensor(values, dtype=torch.float32 if self.device.type == "mps" else torch.float64)
        tensor = tensor.to(self.device)
        torch.distributed.all_reduce(tensor)
        return [float(value) for value in tensor.tolist()]

    def gathered(self, value: Any) -> list[Any]:
        """A small object of every process, in their order."""
        if self.count == 1:
            return [value]
        found: list[Any] = [None] * self.count
        torch.distributed.all_gather_object(found, value)
        return found

    def clip(self, parameters: Sequence[nn.Parameter], largest: float) -> float:
        """Scale gradients down to a norm of `largest` at most; returns the norm before, over all shards."""
        if not self.sharded:
            return float(torch.nn.utils.clip_grad_norm_(parameters, largest))
        gradients = [p.grad for p in parameters if p.grad is not None]
        norms = [_full(gradient.norm()).float() for gradient in gradients]
        norm = torch.linalg.vector_norm(torch.stack(norms)) if norms else torch.zeros(())
        factor = min(1.0, largest / (float(norm) + 1e-6))
        for gradient in gradients:
            gradient.mul_(factor)
        return float(norm)


def decoder_layers(model: Any) -> list[nn.Module]:
    """The layers of a speech LLM's LLM, as transformers names what must not be split."""
    names = set(model._no_split_modules)
    return [module for module in model.llm.modules() if type(module).__name__ in names]


def _known(trackers: Sequence[str]) -> list[str] | None:
    from accelerate.tracking import get_available_trackers
    from accelerate.utils import LoggerType

    installed = [str(getattr(name, "value", name)) for name in get_available_trackers()]
    for name in trackers:
        if name not in installed:
            known = [str(kind) for kind in LoggerType.list()]
            why = "is not installed" if name in known else f"is not known; known are {', '.join(known)}"
            raise UserError(f"optimizer.trackers: {name} {why} (installed: {', '.join(installed) or 'none'})")
    return list(trackers) or None


@contextlib.contextmanager
def _without(name: str) -> Iterator[None]:
    value = os.environ.pop(name, None)
    try:
        yield
    finally:
        if value is not None:
            os.environ[name] = value


def _is_shard(tensor: Tensor) -> bool:
    return hasattr(tensor, "full_tensor")


def _full(tensor: Any) -> Tensor:
    full: Tensor = tensor.full_tensor() if _is_shard(tensor) else tensor
    return full
