"""Which checkpoint is the best so far, by one series of a probe.

In: what probes find. Out: the step whose checkpoint is kept beside the newest ones, however old it grows.
"""

from __future__ import annotations

from typing import Any

from speech_llm.errors import UserError


class Best:
    """`state`: `{"step", "value"}` of the best so far, part of every checkpoint; None before the first."""

    def __init__(self, series: str | None, state: dict[str, Any] | None = None) -> None:
        """`series`: "PROBE.SERIES", for instance "json.audio answer"; None: nothing is compared."""
        self.series, self.state = series, state

    @property
    def step(self) -> int | None:
        return None if self.state is None else int(self.state["step"])

    def see(self, found: dict[str, Any], step: int) -> bool:
        """Compare what a probe found after `step`; whether it is the best so far. Raises `UserError` for an unknown series."""
        if self.series is None or "probe" not in found:
            return False
        probe, _, name = self.series.partition(".")
        told = found["probe"].get(probe, {})
        if name not in told:
            known = [f"{one}.{other}" for one, values in found["probe"].items() for other in values]
            raise UserError(
                f"optimizer.best: no probe tells {self.series!r}; there are {', '.join(known) or 'none'}"
            )
        value = float(told[name]["value"])
        sign = -1 if told[name].get("better", "higher") == "lower" else 1
        better = self.state is None or sign * value > sign * float(self.state["value"])
        if better:
            self.state = {"step": step, "value": value}
        return better
