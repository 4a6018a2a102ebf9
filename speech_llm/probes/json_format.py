"""The JSON probe: does it still answer in JSON, and rightly, about a sound and about a text?

In: the test clips. Out: rates of strict parse, parse after repair, right schema and right answer (`eval.json_probe`): with the
wording that training may have seen and with others, whose keys and shapes it never saw. Without sound the description stands in its
place: what the base LLM reaches there is what it can do at all.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from eval.json_probe import OTHER_WORDINGS, PLAIN, JsonScore, Wording, grid, json_series, score_json
from eval.stats import rate
from speech_llm.examples import Message, user_turn
from speech_llm.files import write_jsonl
from speech_llm.probes.form import TEXT, Now, Series
from speech_llm.targets.prompts import PoolPrompt
from speech_llm.targets.questions import Questioner, read_described, run_questioner
from speech_llm.targets.verify import closed_options, options_synonyms

if TYPE_CHECKING:
    from speech_llm.recipe import Recipe


@dataclass(frozen=True)
class Item:
    """One question: a clip, an attribute, a wording."""

    id: str
    wording: Wording
    name: str
    label: str
    options: list[str]
    synonyms: dict[str, Any]
    audio: dict[str, Any]

    @property
    def text(self) -> str:
        return self.wording.prompt(self.name.replace("_", " "))

    def spoken(self) -> list[Message]:
        return [user_turn(self.text, self.audio)]

    def written(self) -> list[Message]:
        return [{"role": "user", "content": f"{self.audio['description']}\n{self.text}"}]

    def score(self, answer: str) -> JsonScore:
        name = self.name.replace("_", " ")
        return score_json(
            answer,
            self.wording.schema(name),
            label=self.label,
            options=self.options,
            synonyms=self.synonyms,
            path=self.wording.keys(name),
        )


class JsonProbe:
    name = "json"

    def __init__(self, recipe: Recipe, run_dir: Path) -> None:
        self.settings = recipe.eval.json_probe
        clips = read_described(run_dir / "describe" / "test.jsonl")
        questioner = run_questioner(recipe, run_dir, worked_example=False)
        options = closed_options([clip["attributes"] for clip in [*questioner.clips, *clips]])
        self.names = [name for name in self.settings.attributes if name in options]
        self.items = self._items(clips, questioner, options, [PLAIN], self.settings.limit)
        if self.items:
            self.items += self._items(
                clips, questioner, options, OTHER_WORDINGS, self.settings.other_wordings
            )

    def _items(
        self,
        clips: Sequence[dict[str, Any]],
        questioner: Questioner,
        options: dict[str, list[str]],
        wordings: Sequence[Wording],
        limit: int,
    ) -> list[Item]:
        """Clips in order, their attributes and wordings in turn."""
        out: list[Item] = []
        for number, clip in enumerate(clips):
            if not self.names or len(out) >= limit:
                break
            name = self.names[number % len(self.names)]
            if name not in clip["attributes"]:
                continue
            # As many wordings as clips of an attribute pass before the next, so that each is asked about all attributes.
            wording = wordings[number // len(self.names) % len(wordings)]
            prompt = PoolPrompt("json-probe", wording.prompt(name.replace("_", " ")), (name,))
            audio: dict[str, Any] = {
                "path": clip["audio"],
                "description": questioner.context(clip["attributes"], prompt, clip["id"]),
                "transcript": clip["attributes"].get("transcript", ""),
            }
            label = str(clip["attributes"][name])
            out.append(
                Item(
                    clip["id"],
                    wording,
                    name,
                    label,
                    options[name],
                    options_synonyms(name, options[name]),
                    audio,
                )
            )
        return out

    def begin(self, now: Now) -> Series:
        return self._text(now)

    def run(self, now: Now, base: Series) -> Series:
        series = self._measure(now, "audio", [item.spoken() for item in self.items])
        return series | (base if now.text_is_base else self._text(now))

    def _text(self, now: Now) -> Series:
        return self._measure(now, TEXT, [item.written() for item in self.items])

    def _measure(self, now: Now, name: str, conversations: list[list[Message]]) -> Series:
        answers = now.responder(self.settings.max_new_tokens).respond(conversations)
        scores = [item.score(str(answer)) for item, answer in zip(self.items, answers, strict=True)]
        write_jsonl(
            now.folder / f"json-{now.label}-{name}.jsonl",
            (
                {
                    "id": item.id,
                    "wording": item.wording.id,
                    "prompt": item.text,
                    "label": item.label,
                    "response": answer,
                    **vars(score),
                }
                for item, answer, score in zip(self.items, answers, scores, strict=True)
            ),
        )
        plain = [score for item, score in zip(self.items, scores, strict=True) if item.wording is PLAIN]
        other = [score for item, score in zip(self.items, scores, strict=True) if item.wording is not PLAIN]
        series = json_series(plain, name)
        cells = grid(plain)
        # The two cells that the rates above do not tell: a right answer without the format, the format without it.
        for cell in ("answer only", "format only"):
            series |= {f"{name} {cell}": rate(cells[cell], len(plain), better="lower")}
        return series | (json_series(other, f"{name}, other words:") if other else {})
