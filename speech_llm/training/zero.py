"""DeepSpeed's ZeRO: what the optimiser keeps, and from stage 3 on the weights too, is held in parts by the processes of a run.

In: a model, its optimiser, and DeepSpeed's settings as `accelerate launch --use_deepspeed` (or an accelerate config file) gives them. Out: the
same steps, and the same checkpoints, as without it: `moments` and `weights` gather what is held in parts.

    stages 1, 2   each process sums its own gradients, as copies of the model do; at the step's end they are reduced to the process whose part
                  of the optimiser they are for. So batches may differ in what they train, and processes in how many they have.
    stage 3       the layers' weights are fetched from all processes whenever one is run, and gradients reduced as they arise, so every process
                  must run the same layers: as many batches, each with sound or a stand-in for it (see `Student`).
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from speech_llm.errors import UserError

# What AdamW keeps of every parameter besides its count of steps.
_MOMENTS = ("exp_avg", "exp_avg_sq")


def wanted() -> bool:
    """Whether the launcher asks for DeepSpeed."""
    return os.environ.get("ACCELERATE_USE_DEEPSPEED", "false").lower() == "true"


class _Work(nn.Module):
    """A module whose forward is whatever it is given: parts of the model are called on their own, all within one forward of the engine."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, work: Callable[[], Tensor]) -> Tensor:
        return work()


class Zero:
    """DeepSpeed's engine around the model of a run. `stage`: 1 to 3."""

    def __init__(self) -> None:
        """Read the launcher's settings. `UserError` for those that a recipe cannot be trained with, or without DeepSpeed."""
        from accelerate.utils import DeepSpeedPlugin, is_deepspeed_available

        if not is_deepspeed_available():
            raise UserError("training under DeepSpeed needs the package: pip install 'speech-llm[deepspeed]'")
        try:
            self._plugin = DeepSpeedPlugin()
        except (ValueError, OSError) as error:
            raise UserError(f"DeepSpeed's settings: {' '.join(str(error).split())}") from None
        self.config: dict[str, Any] = self._plugin.deepspeed_config
        self.stage = int(self.config["zero_optimization"].get("stage", 0))
        self._engine: Any = None
        self._named: dict[str, nn.Parameter] = {}
        self._shapes: dict[str, torch.Size] = {}
        self._check()

    @property
    def in_parts(self) -> bool:
        """Whether the weights themselves are held in parts."""
        return self.stage == 3

    def _check(self) -> None:
        if self.stage not in (1, 2, 3):
            raise UserError(
                f"DeepSpeed's stage {self.stage} holds nothing in parts; launch with --multi_gpu, or give --zero_stage 1, 2 or 3"
            )
        for key in ("optimizer", "scheduler"):
            if key in self.config:
                raise UserError(
                    f"DeepSpeed's config file has {key!r}, but the recipe's optimizer decides; remove it from the file"
                )
        for key in ("bf16", "fp16"):
            if self.config.get(key, {}).get("enabled") is True:
                raise UserError(
                    f"DeepSpeed's config file enables {key!r}, but the recipe's optimizer.precision decides; remove it from the file"
                )

    def _settings(self, clip: float, width: int) -> dict[str, Any]:
        """DeepSpeed's settings with everything filled in that the recipe decides. `width`: of the LLM's states."""
        config = self.config
        config.setdefault("zero_force_ds_cpu_optimizer", False)  # its own optimisers must be compiled
        self._plugin.set_mixed_precision("no")
        for key in ("train_batch_size", "train_micro_batch_size_per_gpu"):
            config.pop(key, None)
        config.update(
            train_micro_batch_size_per_gpu=1,
            gradient_accumulation_steps=1,
            gradient_clipping=clip,
            zero_allow_untested_optimizer=True,
            gradient_allreduce_op="mean",
            # Whether `step` is the boundary between steps, or a number of backward passes.
            managed_gradient_accumulation=not self.in_parts,
        )
        self._plugin.deepspeed_config_process(
            must_match=False,
            **{
                "zero_optimization.reduce_bucket_size": width * width,
                "zero_optimization.stage3_prefetch_bucket_size": int(0.9 * width * width),
                "zero_optimization.stage3_param_persistence_threshold": 10 * width,
                "zero_optimization.stage3_gather_16bit_weights_on_model_save": False,
            },
        )
        return config

    def begin(self, model: Any, optimizer: torch.optim.Optimizer, clip: float) -> None:
        """Take over model and optimiser, in place. `clip`: the largest norm of a step's gradient."""
        import deepspeed

        if (
            model.device.type == "cpu"
        ):  # no search for compilers and GPUs, and nothing compiled that only inference would call
            setattr(deepspeed.ops, "__compatible_ops__", {})  # noqa: B010 (a name that a class would mangle)
        self._named = {name: p for name, p in model.named_parameters() if p.requires_grad}
        for parameter in self._named.values():
            parameter.grad = None
        width = int(model.config.get_text_config().hidden_size)
        self._shapes = {name: p.shape for name, p in model.named_parameters()}
        for parameter in model.parameters():
            if not parameter.dim():  # what has no dimension it cannot send
                parameter.data = parameter.data.view(1)
        self._engine, *_ = deepspeed.initialize(
            model=_Work(model),
            optimizer=optimizer,
            config=self._settings(clip, width),
            dist_init_required=False,
        )

    def close(self) -> None:
        """Let go of the model."""
        if self._engine is not None:
            self._engine.destroy()
            self._engine = None

    # ---------------------------------------------------------------- a step

    def run(self, work: Callable[[], Tensor]) -> Tensor:
        """A loss: what `work` gives, which may call any part of the model."""
        loss: Tensor = self._engine(work)
        return loss

    def backward(self, loss: Tensor) -> None:
        self._engine.backward(loss)

    @contextlib.contextmanager
    def accumulating(self) -> Iterator[None]:
        """Within it backward passes of a step; at its end gradients are reduced."""
        if self.in_parts:
            yield
            return
        with self._engine.coalesce_grad_reduction():
            try:
                yield
            except BaseException:
                for parameter in (
                    self._named.values()
                ):  # so that nothing is left to reduce together with processes that go on
                    parameter.grad = None
                raise
            for parameter in self._named.values():  # all processes must reduce the same
                if parameter.grad is None:
                    parameter.grad = torch.zeros_like(parameter)

    def step(self) -> float:
        """Make the optimiser's step; returns the gradient's norm before it was clipped."""
        self._engine.step()
        return float(self._engine.get_global_grad_norm())

    # ---------------------------------------------------------------- what is held in parts

    def moments(self) -> dict[str, Tensor]:
        """What the optimiser keeps, as `checkpoint.optimizer_tensors` tells it. Every process must call it."""
        from deepspeed.utils import safe_get_full_optimizer_state

        states = [state for state in map(self._state.get, self._flat) if state]
        if not states:
            return {}
        self._link()
        found = {}
        for name, parameter in self._named.items():
            found[f"{name}|step"] = states[0]["step"].clone()  # all of them have made every step
            for key in _MOMENTS:
                whole = safe_get_full_optimizer_state(parameter, key)
                found[f"{name}|{key}"] = whole.cpu().view(self._shapes[name])
        return found

    def load_moments(self, entries: dict[str, dict[str, Tensor]]) -> None:
        """Restore what `moments` gave: name -> key -> tensor."""
        if not entries:
            return
        step = max(float(entry["step"]) for entry in entries.values())
        for flat in self._flat:
            self._state[flat] = {
                "step": torch.tensor(step),
                **{key: torch.zeros_like(flat) for key in _MOMENTS},
            }
        self._link()
        for name, parameter in self._named.items():
            for key in _MOMENTS:
                if name in entries:
                    self._set(parameter, entries[name][key].to(parameter.device), key)

    def _set(self, parameter: Any, value: Tensor, key: str) -> None:
        from deepspeed.utils import safe_set_full_optimizer_state, safe_set_local_optimizer_state

        if not self.in_parts:
            safe_set_full_optimizer_state(parameter, value, key)
            return
        # Given the whole of a parameter it forgets that the last part may be filled up.
        size = parameter.ds_tensor.ds_numel
        filled = value.new_zeros(size * torch.distributed.get_world_size())
        filled[: value.numel()] = value.flatten()
        own = filled.narrow(0, size * torch.distributed.get_rank(), size)
        safe_set_local_optimizer_state(parameter, own, key)

    def _link(self) -> None:
        """Let parameters know where the optimiser keeps what belongs to them."""
        from deepspeed.utils import lazy_init_hp_params_optimizer_state

        if not self.in_parts:
            for group, flat in zip(self._engine.optimizer.bit16_groups, self._flat, strict=True):
                lazy_init_hp_params_optimizer_state(group, flat, self._state)

    def weights(self, parameters: dict[str, Tensor]) -> dict[str, Tensor]:
        """The whole of each of the model's parameters, by its name. Every process must call it."""
        import deepspeed

        found = {}
        for name, parameter in parameters.items():
            with deepspeed.zero.GatheredParameters([parameter], enabled=self.in_parts):
                found[name] = parameter.detach().cpu().view(self._shapes[name]).clone()
        return found

    @property
    def _flat(self) -> Sequence[Tensor]:
        """This process's parts of the parameters, as the optimiser has them."""
        inner = self._engine.optimizer
        parts: Sequence[Tensor] = (
            inner.fp32_partitioned_groups_flat if self.in_parts else inner.single_partition_of_fp32_groups
        )
        return parts

    @property
    def _state(self) -> Any:
        return self._engine.optimizer.optimizer.state
