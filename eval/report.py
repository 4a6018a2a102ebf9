"""placeholder being written."""

from pathlib import Path


def write_report(runs: list[Path], out: Path) -> None:
    raise NotImplementedError
