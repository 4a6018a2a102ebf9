"""Does it still know what it knew? Small sets of choices about text: knowledge, reasoning, arithmetic, code, tool calls, translation.

In: `sets/general/NAME.yaml`, tasks in the form of lm-evaluation-harness, so that it can run them too (`eval.harness`). Out: items
that anything can answer that tells how likely it finds a text (`Chooser`). An answer is the choice with the largest
log-likelihood, as the harness counts `acc`; chance is a quarter.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import jinja2
import yaml

from eval.stats import Rate, rate
from eval.tasks import Instance, Task
from speech_llm.errors import UserError, nearest
from speech_llm.examples import Message, user_turn
from speech_llm.files import read_jsonl

FOLDER = Path(__file__).parent / "sets" / "general"
SETS = ("knowledge", "reasoning", "arithmetic", "code", "tool_call", "translation")
# The metric of a task whose answers are picked so.
CHOICE = "choice"
# Between context and choice, as the harness puts it.
DELIMITER = " "


class Chooser(Protocol):
    """Anything that tells how likely it finds texts."""

    def choose(
        self, contexts: Sequence[str | list[Message]], choices: Sequence[Sequence[str]]
    ) -> list[list[float]]:
        """The summed log-likelihood (natural logarithm) of each choice as it follows its context.

        A context that is a text is followed by the choice as it stands; one that is a conversation, by an answer turn.
        """


@dataclass(frozen=True)
class Item:
    """One question. `context`: the text before the answer. `answer`: the place of the right one among `choices`."""

    id: str
    context: str
    choices: tuple[str, ...]
    answer: int

    @property
    def continuations(self) -> list[str]:
        """The choices as they follow the context."""
        return [DELIMITER + choice for choice in self.choices]


@dataclass(frozen=True)
class GeneralSet:
    name: str
    items: tuple[Item, ...]


def load_sets(names: Sequence[str] | None = None) -> list[GeneralSet]:
    """The sets by name, all of them by default. Raises `UserError` for one that there is not."""
    out = []
    for name in SETS if names is None else names:
        if name not in SETS:
            raise UserError(
                f"there is no general set {name!r}; choose among {', '.join(SETS)}.{nearest(name, list(SETS))}"
            )
        task = yaml.safe_load((FOLDER / f"{name}.yaml").read_text(encoding="utf-8"))
        # As the harness renders it: an end of line at the end of a text is kept.
        text = jinja2.Environment(undefined=jinja2.StrictUndefined, keep_trailing_newline=True).from_string(
            task["doc_to_text"]
        )
        rows = [row for _, row in read_jsonl(FOLDER / task["dataset_kwargs"]["data_files"]["test"])]
        items = tuple(
            Item(str(row["id"]), text.render(row), tuple(row["choices"]), int(row["answer"])) for row in rows
        )
        out.append(GeneralSet(name, items))
    return out


def pick(likelihoods: Sequence[float]) -> int:
    """The place of the likeliest choice; of equals the first."""
    return max(range(len(likelihoods)), key=lambda place: likelihoods[place])


def general_tasks(names: Sequence[str] | None = None) -> list[Task]:
    """The sets as tasks of the runner."""
    return [
        Task(
            found.name,
            "general text",
            [
                Instance(
                    id=item.id,
                    messages=[{"role": "user", "content": item.context}],
                    label=item.choices[item.answer],
                    task=found.name,
                    metric=CHOICE,
                    options=list(item.choices),
                )
                for item in found.items
            ],
            CHOICE,
            list(found.items[0].choices),
        )
        for found in load_sets(names)
    ]


def pick_choices(model: Any, instances: Sequence[Instance]) -> list[str]:
    """What a model picks of each instance's options: the likeliest after the text of its last turn.

    Raises `UserError` for a model that cannot tell how likely it finds a text.
    """
    if not instances:
        return []
    if not hasattr(model, "choose"):
        raise UserError(
            f"task {instances[0].task}: its answers are picked by how likely they are, which this model cannot tell "
            "(a server gives texts only); leave the task out, or name a checkpoint or text:LLM"
        )
    contexts = [instance.messages[-1]["content"] for instance in instances]
    options = [list(instance.options or []) for instance in instances]
    told = model.choose(contexts, [[DELIMITER + option for option in own] for own in options])
    return [own[pick(each)] for own, each in zip(options, told, strict=True)]


def probe(chooser: Chooser, names: Sequence[str] | None = None, limit: int | None = None) -> dict[str, Rate]:
    """`{NAME: rate}`: the share of right answers of each set (of its first `limit` items)."""
    return {
        found.name: _share_right(
            chooser,
            found.items[:limit],
            [item.context for item in found.items[:limit]],
            [item.continuations for item in found.items[:limit]],
        )
        for found in load_sets(names)
    }


def probe_with_sound(
    chooser: Chooser,
    sounds: Sequence[Mapping[str, Any]],
    names: Sequence[str] | None = None,
    limit: int | None = None,
) -> dict[str, Rate]:
    """The same questions in a conversation that also holds a sound, by turns of `sounds` (audio parts): adapters are on.

    With no `sounds` the conversations hold none: what to compare with.
    """
    return {
        found.name: _share_right(
            chooser,
            found.items[:limit],
            [
                [user_turn(item.context, dict(sounds[number % len(sounds)]) if sounds else None)]
                for number, item in enumerate(found.items[:limit])
            ],
            [item.choices for item in found.items[:limit]],
        )
        for found in load_sets(names)
    }


def _share_right(
    chooser: Chooser,
    items: Sequence[Item],
    contexts: Sequence[str | list[Message]],
    choices: Sequence[Sequence[str]],
) -> Rate:
    told = chooser.choose(contexts, choices)
    return rate(sum(pick(t) == item.answer for item, t in zip(items, told, strict=True)), len(items))
