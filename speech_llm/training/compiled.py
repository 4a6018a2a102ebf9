"""The LLM's layers compiled for training: one program for all that are alike, whatever the size of a batch.

In: a speech LLM and the batches that a `Student` runs with gradients. Out: the same logits and gradients from fused loops (`torch.compile`).
Without gradients (generation, probes, the teacher) and outside of training the layers run as they always do, and no name of a parameter
changes.

Layer by layer, not the LLM whole: a program is made in seconds instead of minutes. What a compiler makes of a function depends on the
sizes that it first sees, which after a kill are not those of the beginning. So before a kind of batch (one pack or several, with or without
gradients to its embeddings, with or without dropout) is first run, batches of always the same sizes are: a resumed run gets the same
program, and computes the same bits, as one that was never interrupted.
"""

from __future__ import annotations

import contextlib
import os
import shutil
import sys
import time
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from transformers.cache_utils import Cache

from speech_llm.data.packing import IGNORE, Pack
from speech_llm.errors import UserError
from speech_llm.model.trainable import AdapterGate

if TYPE_CHECKING:
    from speech_llm.training.student import Student

# Sizes that a program is made for: rows and tokens of an ordinary batch.
ROWS, TOKENS = 6, 84
# Kinds of batch (8) times kinds of layer in one LLM; over PyTorch's default of 8 layers would silently run uncompiled.
MOST_PROGRAMS = 64
Kind = tuple[bool, bool, bool]


def missing_compiler(cuda: bool = False) -> str | None:
    """What has to be installed before anything can be compiled here; None where it is all there."""
    name = os.environ.get("CXX", "clang++" if sys.platform == "darwin" else "g++")
    if sys.platform != "win32" and shutil.which(name) is None:
        return f"a C++ compiler ({name}, or another that the environment variable CXX names)"
    if cuda:
        from importlib.util import find_spec

        return None if find_spec("triton") else "the package triton"
    return None


class _Prefix:
    """One layer's keys and values (1, heads, length, width) of the constant prefix, in the place of a cache."""

    def __init__(self, keys: Tensor, values: Tensor) -> None:
        self.keys, self.values = keys, values

    def update(self, keys: Tensor, values: Tensor, *_: Any, **__: Any) -> tuple[Tensor, Tensor]:
        rows = keys.shape[0]
        return (
            torch.cat([self.keys.expand(rows, -1, -1, -1), keys], dim=2),
            torch.cat([self.values.expand(rows, -1, -1, -1), values], dim=2),
        )


class CompiledLayers:
    """Programs for the layers of a model's LLM. `seconds`: spent on making them; `programs`: how many there are."""

    def __init__(self, model: Any) -> None:
        """Nothing is compiled yet. `UserError` where nothing can be, or the LLM's layers are not known."""
        from speech_llm.training.processes import decoder_layers

        missing = missing_compiler(torch.cuda.is_available())
        if missing is not None:
            raise UserError(
                f"optimizer.compile is true, which needs {missing}; install it, or set optimizer.compile to false"
            )
        self.name = model.config.llm or "the LLM"
        self.layers = decoder_layers(model)
        if not self.layers:
            raise UserError(f"{self.name}: its layers are not known; set optimizer.compile to false")
        self.gate: AdapterGate = model.gate
        self.kinds: set[Kind] = set()
        self.seconds, self.programs = 0.0, 0
        torch._dynamo.reset()  # programs of another model would be tried first
        torch._dynamo.config.recompile_limit = max(torch._dynamo.config.recompile_limit, MOST_PROGRAMS)

        self._run = torch.compile(_layer, dynamic=True, fullgraph=True, backend=self._program)

    def _program(self, graph: Any, inputs: Any) -> Any:
        from torch._inductor.compile_fx import compile_fx

        # Dropout draws what it draws uncompiled.
        program = compile_fx(graph, inputs, config_patches={"fallback_random": True})
        self.programs += 1  # what is begun anew is not counted
        return program

    @property
    def told(self) -> dict[str, Any]:
        return {"programs": self.programs, "seconds": round(self.seconds, 1)}

    @contextlib.contextmanager
    def on(self, student: Student, embeds: Tensor) -> Iterator[None]:
        """Within it the layers of the student's LLM run compiled on `embeds` (rows, tokens, width), with gradients."""
        if embeds.shape[1] < 2:
            yield
            return
        kind = (len(embeds) == 1, embeds.requires_grad, bool(self.layers[0].training))
        if kind not in self.kinds:
            self.kinds.add(kind)
            self._make(student, kind)
        for number, layer in enumerate(self.layers):
            prefix = _Prefix(*student.prefix[number]) if student.prefix else None
            layer.forward = self._forward(layer, prefix)
        try:
            yield
        finally:
            for layer in self.layers:
                del layer.forward

    def _forward(self, layer: nn.Module, prefix: _Prefix | None) -> Callable[..., Any]:
        def forward(*args: Any, **kwargs: Any) -> Any:
            for name, value in kwargs.items():
                if isinstance(value, Cache):
                    kwargs[name] = prefix
            return self._run(layer, self.gate, self.gate.on, *args, **kwargs)

        return forward

    def _make(self, student: Student, kind: Kind) -> None:
        """Have the programs of a kind of batch made, forward and back, for sizes that depend on nothing but the model."""
        one, sounding, _ = kind
        started = time.perf_counter()
        model = student.model
        packs = _packs(student, 1 if one else None, model.config.audio_token_id if sounding else 0)
        batch = student.batch(packs)
        device, width = student.device, model.config.llm_width
        vectors = torch.zeros(len(packs), width, device=device, requires_grad=True) if sounding else None
        wanted = [p for p in model.llm.parameters() if p.requires_grad]
        try:
            with torch.random.fork_rng():
                logits, _ = student.answer_logits(batch, vectors)
                # Gradients of the step that is under way are left as they are.
                torch.autograd.grad(
                    logits.sum(), [*wanted, *([] if vectors is None else [vectors])], allow_unused=True
                )
        except torch._dynamo.exc.TorchDynamoException as error:
            said = next(
                (line.strip() for line in str(error).splitlines() if line.strip()), type(error).__name__
            )
            raise UserError(
                f"{self.name}: its layers cannot be compiled ({said[:200]}); set optimizer.compile to false"
            ) from error
        self.seconds += time.perf_counter() - started


def _layer(layer: nn.Module, gate: AdapterGate, on: bool | Tensor, *args: Any, **kwargs: Any) -> Any:
    gate.on = (
        on  # an argument may have any number of rows; what a module's hook holds would be taken as fixed
    )
    return type(layer).forward(layer, *args, **kwargs)


def _packs(student: Student, rows: int | None, first: int) -> list[Pack]:
    """Packs that begin with the token `first` (a sound of one vector); no two of a batch's sizes are alike by accident.

    Sizes that are alike would be taken to be one size, and another program made where they are not.
    """
    config = student.model.config.get_text_config()
    taken = {student.prefix_length, *(v for v in vars(config).values() if isinstance(v, int))}
    if student.prefix:
        taken |= set(student.prefix[0][0].shape)
    count = rows or next(n for n in range(ROWS, 10**6) if n not in taken)
    taken.add(count)
    tokens = next(
        n for n in range(TOKENS, 10**6) if n not in taken and n + student.prefix_length not in taken
    )
    start = student.prefix_length
    return [
        Pack(
            rows=[str(number)],
            clips=[],
            ids=[first] + [0] * (tokens - 1),
            positions=list(range(start, start + tokens)),
            branch=[0] * tokens,
            targets=[IGNORE] * (tokens - 1) + [0],
        )
        for number in range(count)
    ]
