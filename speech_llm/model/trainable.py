"""The parts that may be trained, and adapters in the LLM that act only where there is sound.

In: an LLM (or encoder) and LoRA settings (2106.09685). Out: the same module with adapters in place, and a gate that says, row by
row, whether they act. A row without audio gets an exact zero added to every adapted projection, so its logits are the base LLM's.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn

from speech_llm.errors import UserError

# Names that attention projections go by in the LLMs of transformers.
ATTENTION_PROJECTIONS = (
    "q_proj",
    "k_proj",
    "v_proj",
    "o_proj",
    "qkv_proj",
    "out_proj",
    "query_key_value",
    "c_attn",
    "dense",
)

# What a speech LLM consists of: two frozen models, their adapters, and the connector between them.
PARTS = ("encoder", "encoder_adapters", "connector", "adapters", "llm")


def part_of(name: str) -> str:
    """Which of `PARTS` a parameter of the speech LLM belongs to, by its name."""
    module = name.partition(".")[0]
    if "lora_" not in name:
        return module
    return "encoder_adapters" if module == "encoder" else "adapters"


def trained_parts(model: nn.Module) -> dict[str, dict[str, int]]:
    """For each of `PARTS` that there is: how many parameters it has, and how many of them are trained."""
    counts = {part: {"parameters": 0, "trained": 0} for part in PARTS}
    for name, parameter in model.named_parameters():
        count = counts[part_of(name)]
        count["parameters"] += parameter.numel()
        count["trained"] += parameter.numel() * parameter.requires_grad
    return {part: count for part, count in counts.items() if count["parameters"]}


def told_parts(parts: dict[str, dict[str, int]]) -> str:
    """One line: what is trained, what is frozen, and how much that is."""
    trained = [
        f"{part.replace('_', ' ')} {count['trained']:,}" for part, count in parts.items() if count["trained"]
    ]
    frozen = [
        f"{part.replace('_', ' ')} {count['parameters']:,}"
        for part, count in parts.items()
        if not count["trained"]
    ]
    every = sum(count["parameters"] for count in parts.values())
    moved = sum(count["trained"] for count in parts.values())
    share = f"{moved:,} of {every:,} parameters are trained ({100 * moved / every:.2g} %)"
    return f"{share}: {', '.join(trained) or 'none'}; frozen: {', '.join(frozen) or 'none'}"


class AdapterGate:
    """Whether the adapters act: for all rows, for none, or row by row (a bool tensor (rows,))."""

    def __init__(self, on: bool | Tensor = True) -> None:
        self.on: bool | Tensor = on

    @contextlib.contextmanager
    def set(self, on: bool | Tensor) -> Iterator[None]:
        """Set the gate for the time of a block."""
        before = self.on
        self.on = on
        try:
            yield
        finally:
            self.on = before

    def checkpoint_contexts(self) -> tuple[Any, Any]:
        """For activation checkpointing: the recomputed forward sees the gate as it was in the first one."""
        return contextlib.nullcontext(), self.set(self.on)

    def hook(self, _module: nn.Module, _args: Any, output: Tensor) -> Tensor:
        """Forward hook on an adapter's last projection, whose output is added to the base layer's."""
        if self.on is True:
            return output
        if self.on is False:
            return torch.zeros_like(output)
        rows = torch.as_tensor(self.on, device=output.device)
        if output.shape[0] % rows.shape[0]:
            raise ValueError(
                f"the adapter gate is set for {rows.shape[0]} rows, but the LLM was called with {output.shape[0]}"
            )
        # Beam search repeats each row; a layer that flattens rows and positions repeats it too.
        rows = rows.repeat_interleave(output.shape[0] // rows.shape[0])
        return torch.where(rows.view(-1, *[1] * (output.dim() - 1)), output, output.new_zeros(()))


def add_lora(
    llm: nn.Module,
    settings: dict[str, Any],
    gate: AdapterGate,
    reference: str = "the LLM",
    key: str = "lora",
) -> None:
    """Put LoRA adapters into the LLM (or the encoder) in place, listening to `gate`; all else in it is frozen.

    `settings`: `rank`, `alpha`, `dropout`, `target_modules` (default: the attention projections). Adapters stay in float32
    whatever the LLM's dtype, because small updates would be lost in bf16. `key`: what the settings are called in a recipe.
    """
    from peft import LoraConfig, inject_adapter_in_model
    from peft.tuners.lora import LoraLayer

    linear = sorted(
        {name.rpartition(".")[2] for name, module in llm.named_modules() if isinstance(module, nn.Linear)}
    )
    wanted = settings["target_modules"] or [name for name in ATTENTION_PROJECTIONS if name in linear]
    unknown = [name for name in wanted if name.rpartition(".")[2] not in linear]
    if unknown or not wanted:
        raise UserError(
            f"{key}.target_modules: {reference} has no linear layer {unknown[0] if unknown else 'known as an attention projection'!r}; "
            f"it has {', '.join(linear)}"
        )
    inject_adapter_in_model(
        LoraConfig(
            r=settings["rank"],
            lora_alpha=settings["alpha"],
            lora_dropout=settings["dropout"],
            target_modules=list(wanted),
        ),
        llm,
    )
    for name, parameter in llm.named_parameters():
        parameter.requires_grad_("lora_" in name)
    for module in llm.modules():
        if isinstance(module, LoraLayer):
            for part in (*module.lora_A.values(), *module.lora_B.values()):
                part.float()
            for part in module.lora_B.values():
                part.register_forward_hook(gate.hook)


def set_lora_scale(llm: nn.Module, factor: float) -> None:
    """Scale what the adapters add by `factor` (1 = as trained, 0 = the base LLM); for evaluation."""
    from peft.tuners.lora import LoraLayer

    for module in llm.modules():
        if isinstance(module, LoraLayer):
            for adapter in module.active_adapters:
                module.set_scale(adapter, factor)
