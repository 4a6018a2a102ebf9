"""The page as one file, and the policy that lets a browser run nothing else in it."""

from __future__ import annotations

import base64
import hashlib
from pathlib import Path

FOLDER = Path(__file__).parent / "web"
SCRIPTS = ("draw.js", "sound.js", "talk.js", "page.js")


class Page:
    """`body`: the HTML with style and scripts in it. `policy`: its Content-Security-Policy, which knows both by their hashes."""

    def __init__(self) -> None:
        style = _read("page.css")
        script = "\n".join(["'use strict';", *(_read(name) for name in SCRIPTS)])
        html = _read("page.html").replace("/* style */", style).replace("/* script */", script)
        self.body = html.encode()
        self.policy = "; ".join(
            [
                "default-src 'none'",
                f"style-src {_hash(style)}",
                # The microphone's samples are collected by a worklet, which a page in one file can only make as a blob.
                f"script-src {_hash(script)} blob:",
                "connect-src 'self'",
                "media-src blob:",
                "img-src data:",
                "base-uri 'none'",
                "form-action 'none'",
            ]
        )


def _read(name: str) -> str:
    return (FOLDER / name).read_text(encoding="utf-8")


def _hash(text: str) -> str:
    return f"'sha256-{base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()}'"
