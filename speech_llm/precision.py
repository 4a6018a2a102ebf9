"""Which number format the frozen parts run in: bf16 where it helps, which is measured, not assumed."""

from __future__ import annotations

import time

import torch

from speech_llm.errors import UserError

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}


def matmul_gflops(dtype: torch.dtype, device: torch.device | str = "cpu", seconds: float = 0.15) -> float:
    """Measured matrix-product speed in GFLOP/s, on a shape like an LLM's feed-forward layer."""
    device = torch.device(device)
    cuda = device.type == "cuda"
    # A GPU needs larger ones to be filled, and works on after it was asked.
    rows, inner, columns = (8192, 4096, 4096) if cuda else (512, 576, 1536)
    left = torch.randn(rows, inner, device=device).to(dtype)
    right = torch.randn(columns, inner, device=device).to(dtype)
    for _ in range(2):
        torch.nn.functional.linear(left, right)
    wait = torch.cuda.synchronize if cuda else (lambda: None)
    wait()
    count, started = 0, time.perf_counter()
    while time.perf_counter() - started < seconds:
        torch.nn.functional.linear(left, right)
        wait()
        count += 1
    return 2 * rows * inner * columns * count / (time.perf_counter() - started) / 1e9


def choose_dtype(precision: str, device: torch.device | str = "cpu") -> torch.dtype:
    """`"float32"`, `"bfloat16"`, or `"auto"`: bf16 on a GPU that has it, and on a CPU where it is clearly faster.

    Many CPUs emulate bf16 at a fraction of float32's speed; those with AMX or AVX512-BF16 run it several times faster.
    """
    if precision in DTYPES:
        return DTYPES[precision]
    if precision != "auto":
        raise UserError(f"optimizer.precision is {precision!r}; choose one of auto, {', '.join(DTYPES)}")
    device = torch.device(device)
    if device.type == "cuda":
        return torch.bfloat16 if torch.cuda.is_bf16_supported() else torch.float32
    with torch.inference_mode():
        faster = matmul_gflops(torch.bfloat16, device) > 1.3 * matmul_gflops(torch.float32, device)
    return torch.bfloat16 if faster else torch.float32
