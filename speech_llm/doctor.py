"""`speech-llm doctor`: what is installed, what a recipe needs, whether it can be had, what it may cost.

In: nothing, or a recipe and its run folder. Out: one dictionary of plain values (`--json`), and the same as readable
text. Nothing is downloaded; of a hub model that is not here, only its description is asked for.
"""

from __future__ import annotations

import contextlib
import importlib.metadata
import os
import platform
import shutil
from pathlib import Path
from typing import Any

from speech_llm.needs import GB, recipe_needs
from speech_llm.recipe import Recipe

PACKAGES = (
    "torch", "transformers", "accelerate", "peft", "datasets", "safetensors", "soundfile", "numpy", "onnxruntime",
)  # fmt: skip
EXTRAS = {
    "vllm": ("vllm",),
    "openai": ("openai",),
    "lm-eval": ("lm-eval",),
    "tensorboard": ("tensorboard",),
    "deepspeed": ("deepspeed",),
}


def examine(recipe: Recipe | None = None, run_dir: Path | None = None) -> dict[str, Any]:
    """Look at the machine and, when given, at what a recipe needs.

    Returns `{"python", "platform", "cores", "memory_gb", "memory_free_gb", "disk_free_gb", "device", "gflops", "compile_needs",
    "versions", "extras", "cache", "describers", "recipe"?}`; `recipe` has `models`, `clips`, `estimate`, `notes` and `problems`,
    the last being what keeps the recipe from running.
    """
    from speech_llm.assets import cache_dir

    total_gb, free_gb = _memory_gb()
    findings: dict[str, Any] = {
        "python": platform.python_version(),
        "platform": f"{platform.system()} {platform.machine()}",
        "cores": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count(),
        "memory_gb": total_gb,
        "memory_free_gb": free_gb,
        "disk_free_gb": round(shutil.disk_usage(_existing(cache_dir())).free / GB, 1),
        "device": _device(),
        "gflops": _gflops(),
        "compile_needs": _compile_needs(),
        "versions": {name: _version(name) for name in ("speech-llm", *PACKAGES)},
        "extras": {extra: {name: _version(name) for name in names} for extra, names in EXTRAS.items()},
        "cache": {"folder": str(cache_dir()), "assets": _assets()},
        "describers": _describers(),
    }
    if recipe is not None:
        findings["recipe"] = recipe_needs(recipe, run_dir, findings)
    return findings


def _assets() -> list[dict[str, Any]]:
    from speech_llm.assets import describe_asset, is_cached
    from speech_llm.packages import known

    out = []
    for reference in known():
        info = describe_asset(reference)
        out.append(
            {
                "reference": reference,
                "name": info.name,
                "what": info.what,
                "licence": info.licence,
                "cached": is_cached(reference),
                "download_mb": None if info.download_bytes is None else round(info.download_bytes / 1e6),
            }
        )
    return out


def _describers() -> dict[str, Any]:
    from describers.named import overview
    from describers.run import DESCRIBERS

    return {"ready": list(DESCRIBERS), "learned": overview()}


def _device() -> dict[str, Any]:
    import torch

    if torch.cuda.is_available():
        properties = torch.cuda.get_device_properties(0)
        return {
            "accelerator": True,
            "name": properties.name,
            "count": torch.cuda.device_count(),
            "memory_gb": round(properties.total_memory / GB, 1),
        }
    return {"accelerator": False, "name": "CPU", "count": 1, "memory_gb": None}


def _compile_needs() -> str | None:
    """What `optimizer.compile` lacks here; None when nothing."""
    import torch

    from speech_llm.training.compiled import missing_compiler

    return missing_compiler(torch.cuda.is_available())


def _gflops() -> dict[str, float]:
    """Measured speed of a matrix product in both number formats."""
    import torch

    from speech_llm.precision import DTYPES, matmul_gflops

    device = "cuda" if torch.cuda.is_available() else "cpu"
    with torch.inference_mode():
        return {name: round(matmul_gflops(dtype, device), 1) for name, dtype in DTYPES.items()}


def _memory_gb() -> tuple[float, float]:
    """Total and available memory; a container's own limit counts where there is one."""
    total = free = 0.0
    with contextlib.suppress(ValueError, OSError, AttributeError):
        page = os.sysconf("SC_PAGE_SIZE")
        total, free = page * os.sysconf("SC_PHYS_PAGES") / GB, page * os.sysconf("SC_AVPHYS_PAGES") / GB
    with contextlib.suppress(OSError, ValueError, StopIteration):
        lines = Path("/proc/meminfo").read_text().splitlines()
        free = int(next(line for line in lines if line.startswith("MemAvailable")).split()[1]) * 1024 / GB
    with contextlib.suppress(OSError, ValueError):
        limit = int(Path("/sys/fs/cgroup/memory.max").read_text()) / GB
        used = int(Path("/sys/fs/cgroup/memory.current").read_text()) / GB
        if limit < total:
            total, free = limit, min(free, limit - used)
    return round(total, 1), round(free, 1)


def _version(name: str) -> str | None:
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return None


def _existing(path: Path) -> Path:
    """The nearest folder of a path that is there."""
    return next(folder for folder in (path, *path.absolute().parents) if folder.exists())


def as_text(findings: dict[str, Any]) -> str:
    """The findings as a person reads them."""
    device, speed = findings["device"], findings["gflops"]
    lines = [
        f"Python {findings['python']} on {findings['platform']}, {findings['cores']} cores, "
        f"{findings['memory_free_gb']:.1f} of {findings['memory_gb']:.1f} GB memory free, "
        f"{findings['disk_free_gb']:.1f} GB disk free",
        f"computes on {device['count']} x {device['name']}"
        + (f" ({device['memory_gb']} GB)" if device["memory_gb"] else "")
        + f": {speed['float32']:,.0f} GFLOP/s in float32, {speed['bfloat16']:,.0f} in bfloat16",
        f"optimizer.compile: needs {findings['compile_needs']}"
        if findings["compile_needs"]
        else "optimizer.compile: can be set, a compiler is here",
        "packages: "
        + ", ".join(f"{name} {version or 'MISSING'}" for name, version in findings["versions"].items()),
        "optional: "
        + ", ".join(
            f"{extra} ({', '.join(f'{name} {version}' if version else f'{name} not installed' for name, version in names.items())})"
            for extra, names in findings["extras"].items()
        ),
        "",
        f"Embedded assets ({findings['cache']['folder']}):",
    ]
    for asset in findings["cache"]["assets"]:
        state = "cached" if asset["cached"] else f"fetched when needed, {asset['download_mb']} MB"
        lines.append(f"  {asset['name']:28} {asset['what']:40} {state} ({asset['licence']})")
    lines += _describer_lines(findings["describers"])
    return "\n".join(lines + (_recipe_lines(findings["recipe"]) if "recipe" in findings else []))


def _describer_lines(describers: dict[str, Any]) -> list[str]:
    from describers.scoring import percent

    lines = [
        "",
        f"Describers (speech-llm describe --use ...): {', '.join(describers['ready'])}; and learned:",
    ]
    learned = [row for row in describers["learned"] if row["available"]]
    lines += [
        f"  {row['attribute']:16} {', '.join(row['labels'])}: comes with the package, fitted on {row['clips']:,} clips "
        f"({row['licence']}); on speakers left out it told {100 * row['coverage']:.0f} % of clips, "
        f"{percent(row['precision_on_folds'])} of them right"
        for row in learned
        if "labels" in row
    ]
    lines += [
        f"  {row['attribute']:16} by {row['model']} ({row['licence']}), "
        + ("cached" if row["cached"] else f"fetched when first needed, {row['download_mb']} MB")
        for row in learned
        if "model" in row
    ]
    missing = [row["attribute"] for row in describers["learned"] if not row["available"]]
    if missing:
        lines.append(f"  {', '.join(missing)}: none comes with the package")
        lines.append(
            "    fit one:        speech-llm fit-describer ATTRIBUTE MANIFEST --out FILE.safetensors, then --use ATTRIBUTE=FILE.safetensors"
        )
        lines.append(
            "    or a classifier: --use ATTRIBUTE=OWNER/NAME, any audio-classification model of transformers (hub id or folder)"
        )
    return lines


def _recipe_lines(recipe: dict[str, Any]) -> list[str]:
    lines = ["", f"Recipe {recipe['name']} ({recipe['path']}):"]
    for model in recipe["models"]:
        size = f", {model['parameters'] / 1e6:,.0f} M parameters" if model.get("parameters") else ""
        fetch = f"to be fetched, {model['download_mb']:,} MB" if model.get("download_mb") else "not here"
        lines.append(
            f"  {model['role']:18} {model['reference']}{size}: {'cached' if model['cached'] else fetch}"
        )
    clips = recipe["clips"]
    if "train" in clips:
        splits = ", ".join(
            f"{clips[name]:,} {name}" for name in ("train", "test", "natural") if clips.get(name)
        )
        lines.append(f"  {'clips':18} {splits}, about {clips['mean_s']} s each ({clips['source']})")
    if recipe["finished"]:
        done = ", ".join(f"{stage} ({seconds:.0f} s)" for stage, seconds in recipe["finished"].items())
        lines.append(f"  {'already done':18} {done}, in {recipe['run_dir']}")
    estimate = recipe["estimate"]
    if estimate is not None:
        minutes = ", ".join(f"{stage} {value:g}" for stage, value in estimate["minutes"].items())
        lines.append(
            f"  {'memory, disk':18} about {estimate['memory_gb']:g} GB, {estimate['disk_gb']:g} GB ({estimate['precision']})"
        )
        lines.append(f"  {'feature cache':18} about {estimate['features_gb']:.3g} GB")
        lines.append(
            f"  {'time':18} about {sum(estimate['minutes'].values()):.0f} minutes ({minutes}); a rough guess, within a factor of 3, more on a busy machine"
        )
    elif not recipe["problems"]:
        lines.append("  no estimate: the models' sizes are known once they are fetched")
    lines += [f"  note: {note}" for note in recipe["notes"]]
    lines += [f"  PROBLEM: {problem}" for problem in recipe["problems"]]
    if not recipe["problems"]:
        lines.append(f"Ready: speech-llm run {recipe['path']}")
    return lines
