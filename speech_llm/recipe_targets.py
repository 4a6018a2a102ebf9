"""The section of a recipe that says who writes the answers: `targets`, with its `teacher`.

In: keys of a recipe. Out: checked sections; keys that cannot stand together are refused, naming both and why.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Literal

from pydantic import Field, model_validator

from speech_llm.recipe_section import NotNegative, Positive, Section, Text, contradiction

if TYPE_CHECKING:
    from speech_llm.targets.teacher import Sampling


class TeacherSection(Section):
    backend: Literal["transformers", "vllm", "openai"] = Field(
        default="transformers",
        description="what runs it: this process, vLLM's engine, or a server that speaks OpenAI's protocol",
    )
    model: Text | None = Field(
        default=None, description="the LLM, or its name on the server; null = the base LLM, model.llm"
    )
    url: Text | None = Field(default=None, description="of the server, as in http://127.0.0.1:8000/v1")
    api_key_env: Text | None = Field(
        default=None, description="environment variable that holds the server's key; null = no key"
    )
    concurrency: Positive = Field(default=8, description="requests to the server at a time")
    retries: NotNegative = Field(default=4, description="further tries of a request, after growing pauses")
    timeout_s: float = Field(default=120.0, gt=0, description="longest wait for the server, seconds")
    engine: dict[str, Any] = Field(
        default_factory=dict,
        description="further arguments of vllm.LLM, as in {tensor_parallel_size: 2, max_model_len: 4096}",
    )

    @model_validator(mode="after")
    def _server(self) -> TeacherSection:
        if self.backend == "openai" and self.url is None:
            raise contradiction(
                ("targets.teacher.backend", "targets.teacher.url"),
                "targets.teacher.backend is 'openai', but targets.teacher.url is missing; say where the server is",
            )
        for key in ("url", "api_key_env"):
            if self.backend != "openai" and getattr(self, key) is not None:
                raise contradiction(
                    (f"targets.teacher.{key}", "targets.teacher.backend"),
                    f"targets.teacher.{key} is given, but targets.teacher.backend is {self.backend!r}, which asks no server; "
                    "set the backend to openai or leave the key out",
                )
        if self.engine and self.backend != "vllm":
            raise contradiction(
                ("targets.teacher.engine", "targets.teacher.backend"),
                f"targets.teacher.engine is given, but targets.teacher.backend is {self.backend!r}; "
                "set the backend to vllm or leave the key out",
            )
        if "trust_remote_code" in self.engine:
            raise ValueError(
                "targets.teacher.engine: trust_remote_code would run code that came with a model; leave it out"
            )
        if set(self.engine) & {"model", "seed"}:
            raise ValueError(
                "targets.teacher.engine: model is targets.teacher.model and seed is the recipe's; leave them out"
            )
        return self


# Strategies that only the base LLM can carry out, by definition.
OF_THE_BASE_LLM = ("self", "continuation", "rewrite", "self_output")
# Those that start from a person's answer.
OF_LABELS = ("given", "rewrite", "self_output", "minimum_change")


class TargetsSection(Section):
    strategy: Literal[
        "self", "given", "continuation", "rewrite", "self_output", "minimum_change", "teacher"
    ] = Field(
        default="self",
        description="who writes the answers: self = the base LLM from the description, verified; given = the labels; "
        "continuation = the base LLM goes on with the words; rewrite = it paraphrases the label's answer; self_output = a right "
        "one of several of its own, else the label's; minimum_change = its own, corrected; teacher = another LLM",
    )
    prompts: Text = Field(description="prompt pool, relative to the recipe file")
    tasks: Literal["quickstart"] | None = Field(
        default=None,
        description="ask the multi-task set of the synthetic corpus (25 tasks in Dynamic-SUPERB's form) instead of the prompts",
    )
    clips: Positive | None = Field(
        default=None, description="at most so many training clips are asked anything; null = all"
    )
    prompts_per_clip: Positive = Field(default=4, description="prompts that each clip is asked")
    worked_example: bool = Field(
        default=True, description="show the teacher (never the student) one worked example"
    )
    attempts: Positive = Field(
        default=2, description="how often a prompt is asked until its answer passes verification"
    )
    max_new_tokens: Positive = Field(default=64, description="longest answer, tokens")
    batch_tokens: Positive = Field(
        default=4096, description="tokens generated side by side; less takes less memory"
    )
    wording: Literal["template", "label"] = Field(
        default="template",
        description="how labels become a person's answer: the pool's example sentence, or the bare label",
    )
    samples: Positive | None = Field(
        default=None, description="answers drawn at most, for self_output; null = 8"
    )
    temperature: float | None = Field(
        default=None, ge=0, description="0 = the likeliest words; null = 0.7 for self_output, else 0"
    )
    top_p: float = Field(
        default=0.95, gt=0, le=1, description="share of the probability that is drawn from, where it is drawn"
    )
    teacher: TeacherSection | None = Field(
        default=None, description="who answers (for minimum_change: who edits); null = the base LLM, here"
    )
    perplexity_rows: NotNegative = Field(
        default=50, description="targets whose perplexity under the base LLM is measured; 0 = none"
    )

    @model_validator(mode="after")
    def _one_strategy(self) -> TargetsSection:
        strategy, model = self.strategy, self.teacher.model if self.teacher is not None else None
        if self.samples is not None and self.samples > 1 and strategy != "self_output":
            raise contradiction(
                ("targets.samples", "targets.strategy"),
                f"targets.samples is {self.samples}, but targets.strategy is {strategy!r}, which takes one answer; "
                "set the strategy to self_output or leave samples out",
            )
        if strategy == "self_output" and self.temperature == 0 and self.drawn_samples > 1:
            raise contradiction(
                ("targets.temperature", "targets.samples"),
                f"targets.temperature is 0, so all {self.drawn_samples} targets.samples would be the same answer; "
                "set temperature above 0 or samples to 1",
            )
        if strategy == "teacher" and model is None:
            raise contradiction(
                ("targets.strategy", "targets.teacher"),
                "targets.strategy is 'teacher', but targets.teacher names no model; "
                "give targets.teacher.model, or take the strategy self for the base LLM's own answers",
            )
        if strategy in OF_THE_BASE_LLM and model is not None:
            raise contradiction(
                ("targets.teacher.model", "targets.strategy"),
                f"targets.teacher.model is {model!r}, but targets.strategy is {strategy!r}, in which the base LLM itself writes; "
                "leave the model out (the backend may stay) or set the strategy to teacher",
            )
        if strategy == "given" and self.teacher is not None:
            raise contradiction(
                ("targets.teacher", "targets.strategy"),
                "targets.teacher is given, but targets.strategy is 'given', in which no LLM is asked; leave one out",
            )
        return self

    @property
    def drawn_samples(self) -> int:
        return (self.samples or 8) if self.strategy == "self_output" else 1

    @property
    def drawn_temperature(self) -> float:
        if self.temperature is None:
            return 0.7 if self.strategy == "self_output" else 0.0
        return self.temperature

    def sampling(self, seed: int) -> Sampling:
        """How answers are drawn."""
        from speech_llm.targets.teacher import Sampling

        return Sampling(self.max_new_tokens, self.drawn_temperature, self.top_p, seed)
