"""Sound in the page: files as data addresses, within a size, and clips with what was answered to them."""

from __future__ import annotations

import base64
from pathlib import Path
from typing import Any

from eval.report.runs import Run

CLIPS = 12
# A clip longer than this is not put into the page, and no more than this of all.
MAX_CLIP_BYTES = 3 << 20
MAX_PAGE_BYTES = 12 << 20
_MIME = {
    ".wav": "audio/wav",
    ".flac": "audio/flac",
    ".mp3": "audio/mpeg",
    ".ogg": "audio/ogg",
    ".opus": "audio/ogg",
}


class Sounds:
    """Sound files as addresses that a page can play, until `budget_bytes` of them are in it."""

    def __init__(self, budget_bytes: int = MAX_PAGE_BYTES) -> None:
        self.left = budget_bytes

    def address(self, path: Any) -> str | None:
        """None when the file is not there, too big, of another kind, or the page is full."""
        if not isinstance(path, str) or not path:
            return None
        file = Path(path)
        mime = _MIME.get(file.suffix.lower())
        if mime is None or not file.is_file():
            return None
        size = file.stat().st_size
        if size > min(MAX_CLIP_BYTES, self.left):
            return None
        self.left -= size
        return f"data:{mime};base64,{base64.b64encode(file.read_bytes()).decode()}"


def is_right(row: dict[str, Any]) -> bool:
    """Right, or for words not one of them wrong."""
    return bool(row["errors"] == 0) if "errors" in row else bool(row["score"] == 1)


def clips(run: Run, sounds: Sounds, count: int = CLIPS) -> list[dict[str, Any]]:
    """Test clips with prompt and answers, taken at even distances from each task: neither the best nor the worst."""
    answers = run.predictions
    by_task: dict[str, list[tuple[tuple[str, str], dict[str, Any]]]] = {}
    for key, row in answers.get(run.main, {}).items():
        by_task.setdefault(key[0], []).append((key, row))
    picked: list[dict[str, Any]] = []
    used: set[str] = set()
    tasks = list(by_task.values())
    turn = 0
    while tasks and len(picked) < count and turn < 50 * count:
        rows = tasks[turn % len(tasks)]
        place = (turn // len(tasks)) * 7 + 3 * (turn % len(tasks))
        key, row = rows[place % len(rows)]
        turn += 1
        audio = str(row.get("audio"))
        sound = sounds.address(audio) if audio not in used else None
        if sound is None:
            continue
        used.add(audio)
        others = [
            {"name": name, "text": other.get("response") or "", "good": is_right(other)}
            for name in run.peers
            if (other := answers.get(name, {}).get(key)) is not None
        ]
        picked.append(
            {
                **row,
                "response": row.get("response") or "",
                "sound": sound,
                "good": is_right(row),
                "others": others,
            }
        )
    return picked
