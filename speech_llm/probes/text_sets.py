"""The probes of general text and of safety: `eval.general` and `eval.safety`, asked of the model as it is.

Each is asked without sound, where a gated model is the base LLM, and with sound, where whatever was trained is on: general
questions in a conversation that also holds a clip, and requests that are spoken.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from eval import general, safety
from speech_llm.probes.form import TEXT, Now, Series
from speech_llm.targets.questions import asked_first, read_described

if TYPE_CHECKING:
    from speech_llm.recipe import Recipe

SOUNDS = 8


class GeneralProbe:
    name = "general"

    def __init__(self, recipe: Recipe, run_dir: Path) -> None:
        self.settings = recipe.eval.general_probe
        clips = {clip["id"]: clip for clip in read_described(run_dir / "describe" / "test.jsonl")}
        chosen = asked_first(list(clips), recipe.seed)[:SOUNDS]
        self.sounds: list[dict[str, Any]] = [
            {"path": clips[i]["audio"], "transcript": clips[i]["attributes"].get("transcript", "")}
            for i in chosen
        ]

    def begin(self, now: Now) -> Series:
        return self._text(now)

    def run(self, now: Now, base: Series) -> Series:
        series = dict(base) if now.text_is_base else self._text(now)
        if self.settings.with_sound and self.sounds:
            found = general.probe_with_sound(
                now.responder(), self.sounds, self.settings.sets, self.settings.limit
            )
            series |= {f"audio {name}": value for name, value in found.items()}
        return series

    def _text(self, now: Now) -> Series:
        """As plain text, and (to compare with what is asked beside a sound) in a conversation without one."""
        model = now.responder()
        found = general.probe(model, self.settings.sets, self.settings.limit)
        series = {f"{TEXT} {name}": value for name, value in found.items()}
        if self.settings.with_sound:
            chat = general.probe_with_sound(model, [], self.settings.sets, self.settings.limit)
            series |= {f"{TEXT}, in a chat: {name}": value for name, value in chat.items()}
        return series


class SafetyProbe:
    name = "safety"

    def __init__(self, recipe: Recipe, run_dir: Path) -> None:
        self.settings = recipe.eval.safety_probe

    def begin(self, now: Now) -> Series:
        return self._ask(now, None)

    def run(self, now: Now, base: Series) -> Series:
        from speech_llm.assets import cache_dir

        series = dict(base) if now.text_is_base else self._ask(now, None)
        return series | (self._ask(now, cache_dir() / "spoken") if self.settings.spoken else {})

    def _ask(self, now: Now, spoken: Path | None) -> Series:
        model = now.responder(self.settings.max_new_tokens)
        return safety.probe(model.respond, self.settings.limit, spoken)
