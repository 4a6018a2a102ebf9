"""Errors that a person caused and can mend.

Everything a user can get wrong raises `UserError` with one sentence: what was wrong, where (file, line, id),
and what to do. The command line prints that sentence and exits with 2; it never shows a traceback for it.
"""

from __future__ import annotations


class UserError(Exception):
    """A user's mistake, told in one sentence."""


def nearest(name: str, choices: list[str]) -> str:
    """`" Did you mean 'x'?"` for the choice most like `name`, or an empty string when none is close."""
    import difflib

    close = difflib.get_close_matches(name, choices, n=1, cutoff=0.5)
    return f" Did you mean {close[0]!r}?" if close else ""
