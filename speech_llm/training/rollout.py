"""Learning from the model's own answers: sample a group per prompt, reward each, make the better ones likelier (GRPO).

In: prompts, each with an answer that is known to be right. Out: the loss of a batch of prompts. The answers are sampled by the
model as it is at this step, from a seed that names the step, so that a resumed run samples the same; how likely they are is
measured at the temperature that they were sampled at.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from speech_llm.data.packing import PackBatch, Row, pack_group
from speech_llm.generation import Prompt, end_of_turn_ids, generate
from speech_llm.targets.score import row_logits
from speech_llm.targets.verify import closed_options
from speech_llm.training.losses import group_advantages, grpo_sum
from speech_llm.training.objectives import BatchLoss
from speech_llm.training.rewards import make_verifier
from speech_llm.training.rows import TrainingSet, answer_ids
from speech_llm.training.student import Origin, Student, log_probs_of

# (row id, answer, whether it ended by itself) -> (right, in the right form), each from 0 to 1.
Judge = Callable[[str, str, bool], tuple[float, float]]


def verify_answers(data: TrainingSet) -> Judge:
    """The judge by rule; rows whose answer names nothing that can be checked leave `data` with a reason."""
    options = closed_options([example.attributes for example in data.examples.values()])
    verifiers = {name: make_verifier(example, options) for name, example in data.examples.items()}
    for name, verifier in verifiers.items():
        if verifier is None:
            reason = "its answer names nothing that a rule could check"
            data.rejects.append({"id": name, "reason": reason})
            del data.rows[name]
    data.packs = [pack for pack in data.packs if pack.rows[0] in data.rows]

    def judge(name: str, answer: str, ended: bool) -> tuple[float, float]:
        verifier = verifiers[name]
        assert verifier is not None
        return float(verifier.right(answer)), float(verifier.in_form(answer, ended))

    return judge


class RolloutLoss:
    """GRPO on packs of one prompt each."""

    def __init__(
        self, settings: Any, student: Student, data: TrainingSet, origin: Origin, judge: Judge
    ) -> None:
        self.settings, self.student, self.data, self.origin = settings, student, data, origin
        self.judge = judge
        self.stop_ids = end_of_turn_ids(student.processor.tokenizer, student.model.llm)

    @property
    def told(self) -> dict[str, Any]:
        return {"prompts": len(self.data.packs), "answers": self.settings.answers}

    def begin(self, folder: Path, resumed: bool) -> None:
        """Remember the model as it is where training begins, if that is the reference."""
        if self.settings.reference == "start":
            self.origin.remember_start(folder / "start.safetensors", resumed)

    def weight(self, packs: Sequence[int]) -> float:
        return float(len(packs) * self.settings.answers)

    def loss(self, packs: Sequence[int], place: str) -> BatchLoss:
        prompts = [self.data.rows[self.data.packs[i].rows[0]] for i in packs]
        sampled = self._sample(prompts, place)
        size = self.settings.answers
        rows, rewards, rights, forms, ended_all = [], [], [], [], 0
        for number, prompt in enumerate(prompts):
            for ids, ended in sampled[number * size : (number + 1) * size]:
                text = self.student.processor.tokenizer.decode(ids, skip_special_tokens=True).strip()
                right, form = self.judge(prompt.id, text, ended)
                rights.append(right)
                forms.append(form)
                rewards.append(self.settings.answer_reward * right + self.settings.format_reward * form)
                ended_all += ended
                rows.append(self._answered(prompt, ids, ended, number))
        batch = self.student.batch(
            [
                pack_group(rows[number * size : (number + 1) * size], self.student.prefix_length)
                for number in range(len(prompts))
            ]
        )
        reference = self._reference_log_probs(batch, rows, prompts)
        log_probs = self.student.token_log_probs(batch, self.settings.temperature)
        device = log_probs.device
        advantages = group_advantages(torch.tensor(rewards).view(-1, size)).flatten().to(device)
        loss, divergence = grpo_sum(
            log_probs,
            log_probs.detach(),
            reference.to(device),
            advantages,
            batch.row_of.to(device),
            self.settings.beta,
        )
        count = float(len(rows))
        figures = {
            "reward": (sum(rewards), count),
            "right": (sum(rights), count),
            "form": (sum(forms), count),
            "kl": (float(divergence), count),
            "answer_length": (float(batch.answer_tokens), count),
            "cut_short": (count - ended_all, count),
        }
        return BatchLoss(
            loss, [prompt.id for prompt in prompts], batch.answer_tokens, batch.padding_share, figures
        )

    @torch.no_grad()
    def _sample(self, prompts: Sequence[Row], place: str) -> list[tuple[list[int], bool]]:
        """For every prompt `answers` token lists, and whether each ended by itself."""
        model, size = self.student.model, self.settings.answers
        model.eval()
        out: list[tuple[list[int], bool]] = [([], False)] * (len(prompts) * size)
        for has_audio in (True, False):
            places = [i for i, prompt in enumerate(prompts) if bool(prompt.clips) == has_audio]
            ready = []
            for i in places:
                ids = prompts[i].ids[: prompts[i].spans[-1][0]]
                embeds = None
                if has_audio:
                    tokens = torch.tensor([ids], device=self.student.device)
                    embeds = model.embed(tokens, self.student.vectors(prompts[i].clips))[0]
                ready += [Prompt(ids, embeds, tuple(prompts[i].clips))] * size
            with model.adapters_for(has_audio):
                answers = generate(
                    model.llm,
                    ready,
                    stop_ids=self.stop_ids,
                    max_new_tokens=self.settings.max_new_tokens,
                    temperature=self.settings.temperature,
                    seed=random.Random(f"{place}-{has_audio}").getrandbits(40),
                    batch_tokens=self.settings.batch_tokens,
                    audio_token_id=self.student.processor.audio_token_id,
                )
            for number, ids in enumerate(answers):
                where = places[number // size] * size + number % size
                out[where] = (ids, len(ids) < self.settings.max_new_tokens)
        model.train()
        return out

    def _answered(self, prompt: Row, ids: list[int], ended: bool, number: int) -> Row:
        """The prompt with a sampled answer, the token that ended it included."""
        start = prompt.spans[-1][0]
        closing = prompt.ids[prompt.spans[-1][1] - 1]
        end = [closing if closing in self.stop_ids else self.stop_ids[0]] if ended else []
        return Row(
            prompt.id, [*prompt.ids[:start], *ids, *end], [(start, start + len(ids) + len(end))], prompt.clips
        )

    @torch.no_grad()
    def _reference_log_probs(self, batch: PackBatch, rows: Sequence[Row], prompts: Sequence[Row]) -> Tensor:
        """(n,) how likely the reference finds each token of the sampled answers."""
        self.student.model.eval()
        try:
            if self.settings.reference == "start":
                with self.origin.start():
                    return self.student.token_log_probs(batch, self.settings.temperature)
            told = []
            for row in rows:
                start, end = row.spans[0]
                heard = self.data.teacher[row.id]
                before = heard.ids[: heard.spans[-1][0]]
                told.append(
                    Row(
                        row.id, [*before, *row.ids[start:end]], [(len(before), len(before) + end - start)], []
                    )
                )
            with self.origin.base():
                logits = row_logits(self.student.model.llm, told)
            targets = torch.tensor([token for row in told for token in answer_ids(row)], device=logits.device)
            return log_probs_of(logits, targets, self.settings.temperature)
        finally:
            self.student.model.train()
