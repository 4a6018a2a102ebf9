r"""How far the model has moved from the base LLM, without any labels.

    held-out clips, described   -> the base LLM's own answers -> KL(base reading the description || model hearing the clip)
    prompts nobody trains on    -> the base LLM's own answers -> cross-entropy of the model to the base, and KL(base || model)

The first is the divergence on the new task that predicts forgetting (2509.04259, "RL's Razor"), here from the base LLM that reads
what a perfect ear would hear; before training it is large, because nothing is heard yet. The second is forgetting itself: the
cross-entropy $-\sum_v p_{base}(v) \log p_{model}(v)$ a token, which is the base LLM's own entropy while nothing is forgotten.

What the base LLM says and its 64 most likely tokens at every place (the others are one bucket, as in `training.losses`) are kept in
`train/probes/`, so they are the same after a kill and after the weights have moved.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from eval.stats import mean_rate
from speech_llm.examples import Example, read_examples, user_turn
from speech_llm.files import write_jsonl
from speech_llm.generation import answer_chats
from speech_llm.kv_cache import run_prefix
from speech_llm.probes.form import TEXT, Now, Series
from speech_llm.targets.prompts import PoolPrompt
from speech_llm.targets.questions import asked_first, read_described, run_questioner
from speech_llm.targets.score import AnswerScores
from speech_llm.training.losses import kl_top_k
from speech_llm.training.objectives import score_teacher
from speech_llm.training.rows import TrainingSet, build_training_set, teacher_messages
from speech_llm.training.student import Student, check_kept

if TYPE_CHECKING:
    from speech_llm.recipe import Recipe

TOP_K = 64
HEARD = "What can you hear?"
HELD_OUT = Path(__file__).parent / "held_out.jsonl"
MAX_TOKENS = 2048


class ForgettingProbe:
    name = "forgetting"

    def __init__(self, recipe: Recipe, run_dir: Path) -> None:
        self.recipe, self.settings = recipe, recipe.eval.forgetting_probe
        self.run_dir = run_dir
        self._data: TrainingSet | None = None
        self._base: dict[str, AnswerScores] = {}

    def begin(self, now: Now) -> Series:
        examples = [*self._spoken(), *self._written()]
        with now.model.adapters_off():
            answers = answer_chats(
                now.model.llm,
                now.processor.tokenizer,
                [teacher_messages(example) or [] for example in examples],
                max_new_tokens=self.settings.max_new_tokens,
                batch_tokens=now.batch_tokens,
            )
        for example, answer in zip(examples, answers, strict=True):
            example.messages.append({"role": "assistant", "content": answer})
        kept = [example for example, answer in zip(examples, answers, strict=True) if answer.strip()]
        write_jsonl(now.folder / "forgetting.jsonl", (example.to_row() for example in kept))
        data, base = self._load(now)
        text = [name for name, row in data.rows.items() if not row.clips]
        tokens = [float(data.rows[name].answer_tokens) for name in text]
        series: Series = {}
        if text:
            entropies = [float(_entropy(base[name]).sum()) for name in text]
            series[f"{TEXT} cross-entropy"] = mean_rate(entropies, tokens)
            series[f"{TEXT} KL"] = mean_rate([0.0] * len(text), tokens)
        return series

    def run(self, now: Now, base: Series) -> Series:
        data, scores = self._load(now)
        wanted = [pack for pack in data.packs if pack.clips or not now.text_is_base]
        found = self._divergences(now, data, wanted, scores)
        series: Series = {}
        for name, has_sound in (("audio", True), (TEXT, False)):
            rows = [row for row in found if bool(data.rows[row].clips) == has_sound]
            if not rows:
                continue
            tokens = [float(data.rows[row].answer_tokens) for row in rows]
            series[f"{name} KL"] = mean_rate([found[row] for row in rows], tokens)
            if not has_sound:
                entropies = [float(_entropy(scores[row]).sum()) for row in rows]
                series[f"{name} cross-entropy"] = mean_rate(
                    [found[row] + entropy for row, entropy in zip(rows, entropies, strict=True)], tokens
                )
        return (base if now.text_is_base else {}) | series

    @torch.no_grad()
    def _divergences(
        self, now: Now, data: TrainingSet, packs: Sequence[Any], scores: dict[str, AnswerScores]
    ) -> dict[str, float]:
        """The summed divergence of each row's answer from the base LLM's."""
        student = Student(
            now.model, now.processor, now.features, run_prefix(now.model.llm, data.prefix), len(data.prefix)
        )
        found: dict[str, float] = {}
        for batch in student.batches(packs, MAX_TOKENS):
            logits, _ = student.answer_logits(batch)
            told = [scores[row] for row in batch.rows]
            ids = torch.cat([score.top_ids for score in told if score.top_ids is not None])
            values = torch.cat([s.top_log_probs for s in told if s.top_log_probs is not None])
            each = kl_top_k(logits, ids.to(logits.device), values.to(logits.device)).cpu()
            sizes = [len(score.ids) for score in told]
            for row, part in zip(batch.rows, each.split(sizes), strict=True):
                found[row] = max(0.0, float(part.sum()))
        return found

    def _load(self, now: Now) -> tuple[TrainingSet, dict[str, AnswerScores]]:
        """The rows and what the base LLM found likely; scored in `begin`, read from the file afterwards."""
        if self._data is None:
            path = now.folder / "forgetting.jsonl"
            scored = now.folder / "forgetting.safetensors"
            check_kept(path)
            if now.epoch is not None:
                check_kept(scored)
            rejects: list[dict[str, Any]] = []
            self._data = build_training_set(
                list(read_examples(path, rejects)),
                now.processor,
                now.features,
                MAX_TOKENS,
                use_prefix=False,
                progress=False,
                needs_context=True,
            )
            with now.model.adapters_off():
                self._base = score_teacher(now.model.llm, self._data.teacher, scored, top_k=TOP_K)
        return self._data, self._base

    def _spoken(self) -> list[Example]:
        """Held-out clips, by chance but always the same, with what the base LLM reads in their place."""
        recipe = self.recipe
        clips = {clip["id"]: clip for clip in read_described(self.run_dir / "describe" / "test.jsonl")}
        questioner = run_questioner(recipe, self.run_dir, worked_example=False)
        prompt = PoolPrompt("heard", HEARD, ())
        out = []
        for clip_id in asked_first(list(clips), recipe.seed)[: self.settings.limit]:
            clip = clips[clip_id]
            context = questioner.context(clip["attributes"], prompt, clip_id)
            audio = {"path": clip["audio"], "transcript": clip["attributes"].get("transcript", "")}
            if context.strip():
                out.append(
                    Example(
                        id=f"heard/{clip_id}",
                        messages=[user_turn(HEARD, audio)],
                        context=context,
                        attributes=clip["attributes"],
                        source={"probe": self.name},
                    )
                )
        return out

    def _written(self) -> list[Example]:
        prompts = [json.loads(line) for line in HELD_OUT.read_text(encoding="utf-8").splitlines()]
        return [
            Example(
                id=f"held-out/{row['id']}",
                messages=[{"role": "user", "content": row["prompt"]}],
                context=None,
                attributes={},
                source={"probe": self.name},
            )
            for row in prompts[: self.settings.limit]
        ]


def _entropy(score: AnswerScores) -> Tensor:
    """(n,) entropy at each place of an answer, nats, the tokens after the most likely ones as one bucket."""
    assert score.top_log_probs is not None
    inside = score.top_log_probs.float()
    rest = (1 - inside.exp().sum(-1)).clamp(min=0)
    tail = torch.where(rest > 1e-6, -rest * rest.clamp(min=1e-12).log(), torch.zeros_like(rest))
    return -(inside.exp() * inside).sum(-1) + tail
