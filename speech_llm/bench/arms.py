"""One way of training over the same rows, timed part by part: `python -m speech_llm.bench.arms SPEC` prints what it measured as JSON.

    plain   as peers do it: every row decodes its clip, pads it to the encoder's native length and encodes it at every epoch; one row a
            prompt, padded to the longest of its batch; logits at all positions
    ours    features encoded once and read from the cache, rows of a clip packed behind it, what all rows begin with run once (both
            counted in the first epoch), logits at answer positions

In: a spec (see `Spec`). Out: seconds by part, rows and tokens, the loss, the LLM's share of the measured matmul peak, peak memory. The
weights are not moved (learning rate 0), so the loss of both ways is that of the same model on the same rows.
"""

from __future__ import annotations

import json
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch.nn import functional

from speech_llm.audio import load_audio
from speech_llm.bench.material import speak
from speech_llm.data.features import FeatureStore
from speech_llm.data.packing import IGNORE, pack_rows, plan_epoch
from speech_llm.kv_cache import run_prefix
from speech_llm.model import build_model
from speech_llm.precision import choose_dtype, matmul_gflops
from speech_llm.recipe_learning import TrainableSection
from speech_llm.recipe_model import ModelSection
from speech_llm.targets.score import row_logits
from speech_llm.training.compiled import CompiledLayers
from speech_llm.training.log import memory_mb
from speech_llm.training.losses import cross_entropy_sum, kl_sum
from speech_llm.training.rows import TrainingSet, build_training_set
from speech_llm.training.student import Student

PARTS = ("decode", "encode", "data wait", "connector", "LLM forward", "teacher", "loss", "backward", "step")


@dataclass(frozen=True)
class Spec:
    """What is measured. `way`: "plain" or "ours". `batch`: rows of a plain batch; ours gets as many tokens as these take.

    `packed`: rows of a clip share a sequence. `loss`: "ce", or "kl" to the base LLM that reads the description. `encode`: see
    `model.encode`. `folder`: where the clips lie. `compiled`: with `optimizer.compile`, whose programs are made before anything is timed.
    """

    way: str
    clips: int
    questions: int
    folder: str
    batch: int = 8
    batch_tokens: int = 512
    packed: bool = True
    loss: str = "ce"
    encode: str = "own_length"
    precision: str = "auto"
    llm: str = ""
    encoder: str = ""
    profile: bool = False
    compiled: bool = False


class Clock:
    """Seconds by part; on a GPU what was asked for is waited for before a clock is read."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.seconds: dict[str, float] = dict.fromkeys(PARTS, 0.0)

    def now(self) -> float:
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
        return time.perf_counter()

    @contextmanager
    def __call__(self, part: str) -> Iterator[None]:
        started = self.now()
        yield
        self.seconds[part] += self.now() - started

    def wrap(self, part: str, call: Callable[..., Any]) -> Callable[..., Any]:
        def timed(*args: Any, **kwargs: Any) -> Any:
            with self(part):
                return call(*args, **kwargs)

        return timed


@dataclass
class Work:
    """What went through the LLM. `operations`: of its matrix products, forward and back to its input."""

    rows: int = 0
    tokens: int = 0
    answer_tokens: int = 0
    loss: float = 0.0
    operations: float = 0.0


class Arm:
    """Model, rows and clock of one measurement."""

    def __init__(self, spec: Spec) -> None:
        self.spec = spec
        self.device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        dtype = choose_dtype(spec.precision, self.device)
        named = {name: value for name, value in (("llm", spec.llm), ("encoder", spec.encoder)) if value}
        encode = spec.encode if spec.way == "ours" else "padded"
        section = ModelSection.model_validate({**named, "use_transcript": False, "encode": encode})
        torch.manual_seed(0)
        self.model, self.processor = build_model(section, TrainableSection(), dtype=dtype)
        self.model.to(self.device).train()
        self.dtype = dtype
        self.examples = speak(Path(spec.folder), spec.clips, spec.questions)
        self.clock = Clock(self.device)
        # Rates of 0: the cost of a step without moving the weights.
        trained = [p for p in self.model.parameters() if p.requires_grad]
        self.optimizer = torch.optim.AdamW(trained, lr=0.0, weight_decay=0.0)
        self.features = FeatureStore(
            Path(tempfile.mkdtemp(dir=spec.folder)), self.model, self.processor, section.encode
        )
        config: Any = self.model.llm.config.get_text_config()
        embedded = self.model.llm.get_input_embeddings().weight
        self.head = embedded.numel()
        tied = self.model.llm.get_output_embeddings().weight is embedded
        everything = sum(p.numel() for p in self.model.llm.parameters())
        self.body = everything - self.head * (1 if tied else 2)
        self.layers, self.width = config.num_hidden_layers, config.hidden_size
        self.compiled = CompiledLayers(self.model) if spec.compiled else None

    def rows(self, fill: bool) -> TrainingSet:
        """The rows, and (`fill`: as part of what is measured) the cache behind them."""
        if fill:
            plain = self.features._decode, self.features._encode
            self.features._decode = self.clock.wrap("decode", plain[0])  # type: ignore[method-assign]
            self.features._encode = self.clock.wrap("encode", plain[1])  # type: ignore[method-assign]
        paths = [part["path"] for example in self.examples for part in example.audio_parts()]
        self.features.fill(paths, progress=False)
        data = build_training_set(
            self.examples,
            self.processor,
            self.features,
            4096,
            use_prefix=self.spec.way == "ours",
            progress=False,
            needs_context=self.spec.loss == "kl",
        )
        self.prefix = run_prefix(self.model.llm, data.prefix)  # the LLM is frozen: once for all epochs
        return data

    def count(self, work: Work, tokens: int, context: int, logits: int) -> None:
        """Add the LLM's operations on `tokens` that see `context` others: two a weight forward, two back to its input."""
        attention = 4 * self.layers * self.width * tokens * context
        work.operations += 2 * (2 * self.body * tokens + 2 * self.head * logits + attention)
        work.tokens += tokens

    def finish(self, loss: torch.Tensor, weight: int) -> None:
        with self.clock("backward"):
            (loss / weight).backward()
        with self.clock("step"):
            self.optimizer.step()
            self.optimizer.zero_grad(set_to_none=True)


def plain_epoch(arm: Arm, data: TrainingSet, limit: int | None = None) -> Work:
    """One epoch over all rows (or the first `limit`) as a plain loop does it."""
    work, clock, model = Work(), arm.clock, arm.model
    rows = list(data.rows.values())[:limit]
    pad = arm.processor.pad_token_id
    for start in range(0, len(rows), arm.spec.batch):
        batch = rows[start : start + arm.spec.batch]
        with clock("decode"):
            sounds = [load_audio(row.clips[0], arm.processor.sample_rate_hz) for row in batch]
        with clock("encode"), torch.no_grad():
            mel, counts = arm.processor.mel_features(sounds)
            encoded, counts = model.encode_audio(mel.to(arm.device), counts.to(arm.device), padded=True)
        longest = max(len(row.ids) for row in batch)
        ids = torch.full((len(batch), longest), pad)
        labels = torch.full((len(batch), longest), IGNORE)
        mask = torch.zeros(len(batch), longest, dtype=torch.long)
        for place, row in enumerate(batch):
            ids[place, : len(row.ids)] = torch.tensor(row.ids)
            mask[place, : len(row.ids)] = 1
            for first, last in row.spans:
                labels[place, first:last] = ids[place, first:last]
        ids, labels, mask = ids.to(arm.device), labels.to(arm.device), mask.to(arm.device)
        with clock("connector"):
            embeds = model.embed(ids, model.audio_vectors(encoded.float(), counts)[0])
        with clock("LLM forward"):
            rows_with_sound = torch.ones(len(batch), dtype=torch.bool, device=arm.device)
            logits = model(inputs_embeds=embeds, attention_mask=mask, has_audio=rows_with_sound).logits
        answers = sum(row.answer_tokens for row in batch)
        with clock("loss"):
            loss = functional.cross_entropy(
                logits[:, :-1].float().flatten(0, 1),
                labels[:, 1:].flatten(),
                ignore_index=IGNORE,
                reduction="sum",
            )
        arm.finish(loss, answers)
        work.rows += len(batch)
        work.answer_tokens += answers
        work.loss += float(loss.detach())
        arm.count(work, ids.numel(), longest, ids.numel())
    return work


def our_epoch(arm: Arm, data: TrainingSet, limit: int | None = None) -> Work:
    """One epoch over all packs (or the first `limit`) as the engine does it."""
    work, clock, model = Work(), arm.clock, arm.model
    if not arm.spec.packed:
        data.packs = [pack for row in data.rows.values() for pack in pack_rows([row], len(data.prefix), 4096)]
    prefix = len(data.prefix)
    student = Student(model, arm.processor, arm.features, arm.prefix, prefix, compiled=arm.compiled)
    packs = data.packs[:limit]
    for numbers in plan_epoch(packs, arm.spec.batch_tokens, 0, 0):
        batch = student.batch([packs[i] for i in numbers])
        with clock("data wait"):
            stacked, counts = arm.features.stacked(batch.clips, arm.device)
        with clock("connector"):
            vectors = model.audio_vectors(stacked, counts)[0]
        with clock("LLM forward"):
            logits, targets = student.answer_logits(batch, vectors)
        teacher = None
        if arm.spec.loss == "kl":
            with clock("teacher"), model.adapters_off():
                teacher = row_logits(model.llm, [data.teacher[row] for row in batch.rows])
        with clock("loss"):
            loss = cross_entropy_sum(logits, targets) if teacher is None else kl_sum(logits, teacher)
        arm.finish(loss, batch.answer_tokens)
        work.rows += len(batch.rows)
        work.answer_tokens += batch.answer_tokens
        work.loss += float(loss.detach())
        context = batch.ids.shape[1] + prefix
        arm.count(work, batch.ids.numel(), context, batch.answer_tokens)
    return work


def measure(spec: Spec) -> dict[str, Any]:
    """Time one epoch of a spec; of "ours" the first (the cache is filled) and one that reads the cache."""
    arm = Arm(spec)
    epoch = plain_epoch if spec.way == "plain" else our_epoch
    filling = arm.clock.now()
    data = arm.rows(fill=spec.way == "ours")
    fill_s = arm.clock.now() - filling
    filled = dict(arm.clock.seconds)
    packs = data.packs
    # What is made at the first call only; a batch of one pack has a program of its own.
    epoch(arm, data, 2 if arm.compiled is None else None)
    data.packs = packs
    arm.clock.seconds = dict.fromkeys(PARTS, 0.0)
    # Measured before and after: some machines change their speed within seconds.
    peak = matmul_gflops(arm.dtype, arm.device, seconds=0.5)
    cuda = arm.device.type == "cuda"
    if cuda:
        torch.cuda.reset_peak_memory_stats()
    profiler = torch.profiler.profile() if spec.profile else None
    if profiler is not None:
        profiler.start()
    started = arm.clock.now()
    work = epoch(arm, data)
    seconds = arm.clock.now() - started
    told = ""
    if profiler is not None:
        profiler.stop()
        told = profiler.key_averages().table(sort_by="self_cpu_time_total", row_limit=14)
    memory = torch.cuda.max_memory_allocated() / 2**20 if cuda else memory_mb()
    peak = max(peak, matmul_gflops(arm.dtype, arm.device, seconds=0.5))
    parts = arm.clock.seconds
    llm_s = parts["LLM forward"] + parts["backward"]
    return {
        "spec": asdict(spec),
        "seconds": seconds,
        "fill_seconds": fill_s if spec.way == "ours" else 0.0,
        "compile_seconds": 0.0 if arm.compiled is None else arm.compiled.seconds,
        "fill_parts": {name: filled[name] for name in ("decode", "encode")},
        "parts": parts,
        "rows": work.rows,
        "tokens": work.tokens,
        "answer_tokens": work.answer_tokens,
        "loss": work.loss / max(1, work.answer_tokens),
        "peak_gflops": peak,
        "llm_gflops": work.operations / max(1e-9, llm_s) / 1e9,
        "share_of_peak": work.operations / max(1e-9, llm_s) / 1e9 / peak,
        "memory_mb": memory,
        "dtype": str(arm.dtype).removeprefix("torch."),
        "device": torch.cuda.get_device_name() if cuda else "cpu",
        "threads": torch.get_num_threads(),
        "profile": told,
    }


if __name__ == "__main__":
    print(json.dumps(measure(Spec(**json.loads(sys.argv[1])))))
