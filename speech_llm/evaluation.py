"""What a run learned and what it forgot: its tasks, its probes, and the peers that stand beside it.

In: a recipe and a run folder with described test splits and a trained model. Out: `eval/tasks/*.jsonl`,
`eval/<model>/predictions.jsonl` and `results.json`.

The peers answer the same questions: the *ceiling* (the text LLM given the description in place of the sound), the
*teacher* (the ceiling with its worked example, which is what wrote the targets) and the *cascade* (transcript only).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from eval.ifeval_set import run_tasks
from eval.runner import evaluate
from eval.tasks import Instance, Task, load_tasks, write_task
from speech_llm.errors import UserError
from speech_llm.examples import user_turn
from speech_llm.files import read_json, read_jsonl, write_json
from speech_llm.probes import make_probes, read_probes
from speech_llm.targets.prompts import PoolPrompt, load_pool
from speech_llm.targets.questions import Questioner, needs, read_described, run_questioner
from speech_llm.targets.verify import closed_options, options_synonyms

if TYPE_CHECKING:
    from speech_llm.recipe import Recipe


def build_tasks(recipe: Recipe, run_dir: Path) -> list[Task]:
    """One task per test split and attribute (and one for the words), each with seen and unseen instructions."""
    pool = load_pool(recipe.resolve_path(recipe.eval.prompts))
    asked = asked_in_training(recipe)
    pool = [replace(prompt, seen=prompt.seen and prompt.text in asked) for prompt in pool]
    questioner = run_questioner(recipe, run_dir, worked_example=True)
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


def _at_strengths(
    recipe: Recipe, run_dir: Path, tasks: list[Task], results: dict[str, Any], progress: bool
) -> list[dict[str, Any]]:
    """The trained model with its adapters at each of `eval.lora_scales`: tasks into `results`, and what the probes find."""
    from speech_llm.responders import load_speech_model

    settings = recipe.eval
    responder = load_speech_model(run_dir / "model", settings.max_new_tokens, settings.batch_tokens)
    probes = make_probes(recipe, run_dir, progress)
    found = []
    for scale in settings.lora_scales:
        responder.model.set_lora_scale(scale)
        name = f"speech_llm@{scale:g}"
        limit = settings.limits.get("speech_llm", settings.limit)
        results[name] = evaluate(responder, tasks, run_dir / "eval" / name, limit=limit, progress=progress)
        told = {} if probes is None else probes.at_strength(responder, scale)
        found.append({"scale": scale, **told})
    return found


def evaluate_run(recipe: Recipe, run_dir: Path, progress: bool = True) -> dict[str, Any]:
    """Evaluate the run's model and its peers on all tasks; writes `results.json`; resumable per answer."""
    from speech_llm.assets import load_answering_llm
    from speech_llm.responders import TextResponder, load_speech_model

    out = run_dir / "eval"
    tasks = build_tasks(recipe, run_dir)
    if recipe.eval.ifeval:
        tasks += run_tasks(run_dir, recipe.eval.ifeval)
    for task in tasks:
        write_task(task, out / "tasks" / f"{task.name}.jsonl")
    tasks = [task for path in sorted((out / "tasks").glob("*.jsonl")) for task in load_tasks(f"jsonl:{path}")]
    settings = recipe.eval
    results: dict[str, Any] = {}
    base: tuple[Any, Any] | None = None
    for name in settings.models:
        if name == "speech_llm":
            responder: Any = load_speech_model(
                run_dir / "model",
                settings.max_new_tokens,
                settings.batch_tokens,
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
    probes, base_probe = read_probes(run_dir)
    summary: dict[str, Any] = {"models": results, "probes": probes, "base_probe": base_probe}
    if settings.lora_scales:
        summary["lora_scales"] = _at_strengths(recipe, run_dir, tasks, results, progress)
    training = run_dir / "model" / "training.json"
    if training.exists():
        summary["training"] = read_json(training)
    write_json(run_dir / "results.json", summary)
    return {
        "tasks": len(tasks),
        "instances": sum(len(task.instances) for task in tasks),
        "models": list(results),
    }
