"""Install this project, with its `dev` and `demo` extras, into a virtual environment: `install.py VENV`.

By uv, which takes a quarter of pip's time, told what the user's own pip settings say (index, certificates, constraints, ...);
by pip itself wherever that does not work.
"""

from __future__ import annotations

import ast
import os
import subprocess
import sys
from pathlib import Path

WHAT = ".[dev,demo]"
# Packages that come with a library of their own on some platforms and without it as `any`: where one version's files lie in
# several indexes, uv looks at the first index alone and can bring the wrong one; pip chooses among all of them.
WITH_LIBRARY = ("soundfile", "torchaudio")
# A setting of pip -> the variable by which uv is told the same, and what stands between several values.
TOLD = {
    "index-url": ("UV_DEFAULT_INDEX", " "),
    "extra-index-url": ("UV_INDEX", " "),
    "find-links": ("UV_FIND_LINKS", ","),
    "constraint": ("UV_CONSTRAINT", " "),
    "trusted-host": ("UV_INSECURE_HOST", " "),
    "no-index": ("UV_NO_INDEX", " "),
    "timeout": ("UV_HTTP_TIMEOUT", " "),
    "default-timeout": ("UV_HTTP_TIMEOUT", " "),
    "cert": ("SSL_CERT_FILE", " "),
    "proxy": ("ALL_PROXY", " "),
}


def uv_environment(config: str) -> dict[str, str]:
    """uv's variables for what `pip config list` prints; a command's own settings and variables go before global ones."""
    found: dict[str, tuple[int, list[str]]] = {}
    for line in config.splitlines():
        key, separator, value = line.partition("=")
        section, _, name = key.strip().rpartition(".")
        rank = {"global": 0, "install": 1, ":env:": 2}.get(section)
        if not separator or rank is None or name not in TOLD:
            continue
        values = str(ast.literal_eval(value.strip())).split()
        if rank >= found.get(name, (-1, []))[0]:
            found[name] = (rank, values)
    # pip looks for the best version everywhere, and so shall uv.
    told = {"UV_INDEX_STRATEGY": "unsafe-best-match"}
    for name, (_, values) in found.items():
        variable, between = TOLD[name]
        told[variable] = between.join(values)
    return told


def loads(python: Path, package: str) -> bool:
    return (
        subprocess.run([str(python), "-c", f"import {package}"], check=False, capture_output=True).returncode
        == 0
    )


def version(python: Path, package: str) -> str:
    code = f"import importlib.metadata; print(importlib.metadata.version({package!r}))"
    return subprocess.run(
        [str(python), "-c", code], check=True, capture_output=True, text=True
    ).stdout.strip()


def repair(python: Path, pip: list[str]) -> int:
    """Bring again by pip what uv brought without the library that it needs; pip's exit code."""
    broken = [package for package in WITH_LIBRARY if not loads(python, package)]
    if not broken:
        return 0
    print(
        f"uv brought {' and '.join(broken)} without the library it needs; once more with pip", file=sys.stderr
    )
    same = [f"{package}=={version(python, package)}" for package in broken]
    again = [*pip, "install", "--quiet", "--no-compile", "--force-reinstall", "--no-deps", *same]
    return subprocess.run(again, check=False).returncode


def main() -> int:
    folder = Path(sys.argv[1])
    python = next(p for p in (folder / "bin" / "python", folder / "Scripts" / "python.exe") if p.exists())
    pip = [str(python), "-m", "pip", "--disable-pip-version-check"]
    if subprocess.run([*pip, "install", "--quiet", "uv"], check=False).returncode == 0:
        config = subprocess.run([*pip, "config", "list"], check=True, capture_output=True, text=True).stdout
        command = [str(python), "-m", "uv", "pip", "install", "--quiet", "--python", str(python), "-e", WHAT]
        told = {name: value for name, value in uv_environment(config).items() if name not in os.environ}
        if subprocess.run(command, env={**os.environ, **told}, check=False).returncode == 0:
            return repair(python, pip)
        print("uv could not install everything; once more with pip", file=sys.stderr)
    # Without byte code, which is written where it is used: a minute less.
    return subprocess.run([*pip, "install", "--quiet", "--no-compile", "-e", WHAT], check=False).returncode


if __name__ == "__main__":
    sys.exit(main())
