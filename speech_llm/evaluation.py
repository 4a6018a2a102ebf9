"""What a run learned and what it forgot: its tasks, its probes, and the peers that stand beside it.

In: a recipe and a run folder with described test splits and a trained model. Out: `eval/tasks/*.jsonl`,
`eval/<model>/predictions.jsonl` and `results.json`.

The peers answer the same questions: the *ceiling* (the text LLM given the description in place of the sound), the
*teacher* (the ceiling with its worked example, which is what wrote the targets) and the *cascade* (transcript only).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from eval.json_probe import score_json, summarise_json
from eval.runner import evaluate
from eval.tasks import Instance, Task, load_tasks, write_task
from speech_llm.errors import UserError
from speech_llm.examples import Message, user_turn
from speech_llm.files import read_json, read_jsonl, write_json, write_jsonl
from speech_llm.targets.prompts import PoolPrompt, load_pool
from speech_llm.targets.questions import Questioner, needs, read_described
from speech_llm.targets.verify import closed_options, options_synonyms

if TYPE_CHECKING:
    from speech_llm.recipe import Recipe

# Asked by the JSON probe.
JSON_PROMPT = 'Tell me the {name} of the speaker. Answer in JSON with the key "answer".'


def build_tasks(recipe: Recipe, run_dir: Path) -> list[Task]:
    """One task per test split and attribute (and one for the words), each with seen and unseen instructions."""
    pool = load_pool(recipe.resolve_path(recipe.eval.prompts))
    asked = asked_in_training(recipe)
    pool = [replace(prompt, seen=prompt.seen and prompt.text in asked) for prompt in pool]
    questioner = _questioner(recipe, run_dir)
    train = questioner.clips
    tasks = []
    for split in test_splits(run_dir):
        clips = read_described(run_dir / "describe" / f"{split}.jsonl")
        labels = _label_rows(run_dir / "corpus" / f"{split}.jsonl")
        options = closed_options([clip["attributes"] for clip in [*train, *clips]])
        for name in recipe.eval.attributes:
            if name not in options:
                continue
            instances = [
                _instance(recipe, split, clip, prompt, name, questioner, options[name])
                for number, clip in enumerate(clips)
                if clip["attributes"].get(name) in options[name]
                for prompt in _asked(pool, name, number, clip["attributes"], recipe.eval.prompts_per_clip)
            ]
            if instances:
                tasks.append(Task(task_name(split, name), split, instances, "option", list(options[name])))
        if recipe.eval.transcript:
            column = recipe.eval.text_column
            instances = [
                _instance(
                    recipe,
                    split,
                    clip,
                    prompt,
                    "transcript",
                    questioner,
                    None,
                    str(labels[clip["id"]][column]),
                )
                for number, clip in enumerate(clips)
                if labels.get(clip["id"], {}).get(column)
                for prompt in _asked(
                    pool, "transcript", number, clip["attributes"], recipe.eval.prompts_per_clip
                )
            ]
            if instances:
                tasks.append(Task(task_name(split, "words"), split, instances, "wer", None))
    if not tasks:
        raise UserError(
            f"{recipe.path}: nothing to evaluate: no test clip has any of eval.attributes = {recipe.eval.attributes}"
        )
    return tasks


def asked_in_training(recipe: Recipe) -> set[str]:
    """The prompts whose very words this recipe's targets ask; none of a pool's where a multi-task set is asked instead."""
    if recipe.targets.tasks is not None:
        return set()
    return {prompt.text for prompt in load_pool(recipe.resolve_path(recipe.targets.prompts))}


def test_splits(run_dir: Path) -> list[str]:
    """The described splits that are not trained on, `test` first."""
    found = {
        path.stem for path in (run_dir / "describe").glob("*.jsonl") if not path.stem.endswith("rejects")
    }
    return sorted(found - {"train"}, key=lambda name: (name != "test", name))


def task_name(split: str, name: str) -> str:
    return name if split == "test" else f"{split}-{name}"


def _label_rows(manifest: Path) -> dict[str, dict[str, Any]]:
    rows: dict[str, dict[str, Any]] = {}
    for _, row in read_jsonl(manifest, lambda *_: None):
        rows[str(row.get("id"))] = row
    return rows


def _questioner(recipe: Recipe, run_dir: Path) -> Questioner:
    train = read_described(run_dir / "describe" / "train.jsonl")
    return Questioner(train, recipe.describe.form, True, recipe.seed, recipe.describe.telling(dropout=False))


def _asked(
    pool: Sequence[PoolPrompt], name: str, number: int, attributes: dict[str, Any], per_clip: int | None
) -> list[PoolPrompt]:
    """The prompts of the pool that ask for an attribute; `per_clip` of them in turn, so all are asked equally often."""
    able = [prompt for prompt in pool if name in prompt.asks and needs(prompt) <= set(attributes)]
    if per_clip is None or per_clip >= len(able):
        return able
    return [able[(number * per_clip + k) % len(able)] for k in range(per_clip)]


def _instance(
    recipe: Recipe,
    split: str,
    clip: dict[str, Any],
    prompt: PoolPrompt,
    name: str,
    questioner: Questioner,
    options: Sequence[str] | None,
    label: str | None = None,
) -> Instance:
    question = questioner.question(clip["attributes"], prompt, clip["id"])
    audio: dict[str, Any] = {"path": clip["audio"], "description": question.context}
    audio["transcript"] = clip["attributes"].get("transcript", "")
    if question.example is not None:
        audio["example"] = {"context": question.example[0], "answer": question.example[1]}
    task = task_name(split, "words" if name == "transcript" else name)
    return Instance(
        id=f"{clip['id']}/{prompt.id}",
        messages=[user_turn(prompt.text, audio)],
        label=str(clip["attributes"][name]) if label is None else label,
        task=task,
        metric="wer" if options is None else "option",
        options=None if options is None else list(options),
        synonyms=None if options is None else options_synonyms(name, options),
        attributes=clip["attributes"],
        seen=prompt.seen,
        prompt_id=prompt.id,
    )


class JsonProbe:
    """ "Does it still answer in JSON, and rightly?" asked on audio and on text, before training and after every epoch."""

    def __init__(self, recipe: Recipe, run_dir: Path) -> None:
        settings = recipe.eval.json_probe
        clips = read_described(run_dir / "describe" / "test.jsonl")
        questioner = _questioner(recipe, run_dir)
        options = closed_options([clip["attributes"] for clip in [*questioner.clips, *clips]])
        names = [name for name in settings.attributes if name in options]
        self.items: list[dict[str, Any]] = []
        for number, clip in enumerate(clips):
            if not names or len(self.items) >= settings.limit:
                break
            name = names[number % len(names)]
            if name not in clip["attributes"]:
                continue
            text = JSON_PROMPT.format(name=name.replace("_", " "))
            prompt = PoolPrompt(
                "json-probe", text, (name,), f'{{{{"answer": "{{{name}}}"}}}}', {"answer": name}
            )
            question = questioner.question(clip["attributes"], prompt, clip["id"])
            audio: dict[str, Any] = {
                "path": clip["audio"],
                "description": question.context,
                "transcript": clip["attributes"].get("transcript", ""),
            }
            if question.example is not None:
                audio["example"] = {"context": question.example[0], "answer": question.example[1]}
            self.items.append(
                {
                    "id": clip["id"],
                    "messages": [user_turn(text, audio)],
                    "label": clip["attributes"][name],
                    "options": options[name],
                    "synonyms": options_synonyms(name, options[name]),
                }
            )

    def conversations(self) -> list[list[Message]]:
        return [item["messages"] for item in self.items]

    def text_conversations(self) -> list[list[Message]]:
        """The same questions with the description in place of the sound."""
        out = []
        for item in self.items:
            parts = item["messages"][0]["content"]
            out.append([{"role": "user", "content": f"{parts[0]['description']}\n{parts[1]['text']}"}])
        return out

    def score(self, answers: Sequence[str]) -> dict[str, Any]:
        """Rates of strict parse, parse after repair, right keys, right answer; see `eval.json_probe`."""
        schema = {"type": "object", "required": ["answer"], "properties": {"answer": {"type": "string"}}}
        return summarise_json(
            [
                score_json(
                    answer, schema, label=item["label"], options=item["options"], synonyms=item["synonyms"]
                )
                for item, answer in zip(self.items, answers, strict=True)
            ]
        )

    def rows(self, answers: Sequence[str], texts: Sequence[str]) -> list[dict[str, Any]]:
        return [
            {"id": item["id"], "label": item["label"], "audio_answer": answer, "text_answer": text}
            for item, answer, text in zip(self.items, answers, texts, strict=True)
        ]


def make_probe(recipe: Recipe, run_dir: Path) -> Callable[[Any, Any, float], dict[str, Any]] | None:
    """The probe that the training loop calls before the first step, after the warm-up and after every epoch; None when switched off."""
    if not recipe.eval.json_probe.limit:
        return None
    probe = JsonProbe(recipe, run_dir)
    if not probe.items:
        return None
    text_results: dict[str, Any] = {}

    def run(model: Any, processor: Any, epoch: float) -> dict[str, Any]:
        from speech_llm.responders import SpeechResponder
        from speech_llm.training.loop import open_features

        features = open_features(recipe, model, processor)
        responder = SpeechResponder(
            model, processor, features, recipe.eval.json_probe.max_new_tokens, recipe.eval.batch_tokens
        )
        answers = responder.respond(probe.conversations())
        # With a frozen LLM, or adapters that only audio switches on, the text path cannot change: asked once.
        if not text_results or not model.text_path_is_base:
            texts = responder.respond(probe.text_conversations())
            text_results.update(texts=texts, scores=probe.score(texts))
        write_jsonl(
            run_dir / "train" / "probes" / f"json-{epoch:g}.jsonl",
            probe.rows(answers, text_results["texts"]),
        )
        return {
            "audio": probe.score(answers),
            "text": text_results["scores"],
            "text_path_is_base": bool(model.text_path_is_base),
        }

    return run


def evaluate_run(recipe: Recipe, run_dir: Path, progress: bool = True) -> dict[str, Any]:
    """Evaluate the run's model and its peers on all tasks; writes `results.json`; resumable per answer."""
    from speech_llm.assets import load_answering_llm
    from speech_llm.responders import TextResponder, load_speech_model

    out = run_dir / "eval"
    tasks = build_tasks(recipe, run_dir)
    for task in tasks:
        write_task(task, out / "tasks" / f"{task.name}.jsonl")
    tasks = [task for path in sorted((out / "tasks").glob("*.jsonl")) for task in load_tasks(f"jsonl:{path}")]
    settings = recipe.eval
    results: dict[str, Any] = {}
    probe = JsonProbe(recipe, run_dir)
    base_probe: dict[str, Any] = {}
    base: tuple[Any, Any] | None = None
    for name in settings.models:
        if name == "speech_llm":
            responder: Any = load_speech_model(
                run_dir / "model",
                settings.max_new_tokens,
                settings.batch_tokens,
                lora_scale=settings.lora_scale,
            )
        else:
            base = base or load_answering_llm(recipe.model.llm, recipe.optimizer.precision)
            responder = TextResponder(
                *base,
                reads="transcript" if name == "cascade" else "description",
                worked_example=name == "teacher",
                max_new_tokens=settings.max_new_tokens,
                batch_tokens=settings.batch_tokens,
            )
        results[name] = evaluate(
            responder, tasks, out / name, limit=settings.limits.get(name, settings.limit), progress=progress
        )
        if name in ("ceiling", "teacher") and probe.items:
            base_probe[name] = probe.score(responder.respond(probe.conversations()))
    probes = [
        {"epoch": row["epoch"], **row["probe"]}
        for _, row in read_jsonl(run_dir / "train" / "log.jsonl")
        if "probe" in row
    ]
    summary: dict[str, Any] = {"models": results, "probes": probes, "base_probe": base_probe}
    if settings.lora_scale is not None:
        summary["lora_scale"] = settings.lora_scale
    training = run_dir / "model" / "training.json"
    if training.exists():
        summary["training"] = read_json(training)
    write_json(run_dir / "results.json", summary)
    return {
        "tasks": len(tasks),
        "instances": sum(len(task.instances) for task in tasks),
        "models": list(results),
    }
