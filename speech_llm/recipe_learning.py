"""The sections of a recipe that say how is learned: `loss`, `trainable`, `style`, `optimizer`, and what cannot stand together.

In: keys of a recipe. Out: checked sections; `check_learning` refuses contradictions, naming two keys and why.
"""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import Field, model_validator

from speech_llm.recipe_section import NotNegative, Positive, Section, Share, Text, contradiction

Style = Literal["sft", "pretrain", "preference", "rollout"]
Weight = Annotated[float, Field(ge=0)]
L2_START = "weight of half the squared distance from where training began (L2-SP); 0 = none"
REFERENCE = (
    "what answers are compared with: start = the model as training began (adapters off, as fresh ones add nothing); "
    "context = the base LLM reading the description in place of the sound"
)


class _OfTokens(Section):
    """What every loss over tokens can do: leave out the tokens that the base LLM finds hardest."""

    mask: Literal["none", "threshold", "share"] = Field(
        default="none",
        description="which answer tokens are not learned, by how hard the base LLM, told the description, finds them: "
        "threshold = harder than tau (STM), share = the hardest share of all",
    )
    tau: float = Field(default=2.5, ge=1, description="for mask threshold: largest perplexity learned")
    share: Share = Field(default=0.2, description="for mask share: share of all answer tokens left out")
    l2_start: Weight = Field(default=0.0, description=L2_START)

    @property
    def asks_base(self) -> bool:
        """Whether the base LLM, told the description, scores the answers."""
        return self.mask != "none"


class CrossEntropy(_OfTokens):
    """Each token of the answer is made likely."""

    type: Literal["ce"] = Field(default="ce", description="cross-entropy of the answer")


class Divergence(_OfTokens):
    """The student's distribution at each answer token is drawn to the teacher's (DiVA, Ultravox)."""

    type: Literal["kl"] = Field(description="divergence from the teacher's distribution")
    temperature: float = Field(default=2.0, gt=0, description="of both distributions (Ultravox: 2)")
    top_k: Positive | None = Field(
        default=64,
        description="most likely tokens stored per place before training, the rest as one bucket; "
        "null = the full distribution, computed at every step",
    )
    kl: Weight = Field(default=1.0, description="weight of the divergence")
    ce: Weight = Field(default=0.0, description="weight of the cross-entropy beside it")

    @property
    def asks_base(self) -> bool:
        """Always: it is the teacher."""
        return True


class Preference(Section):
    """The right answer is made likelier than the wrong one, relative to a reference (DPO)."""

    type: Literal["dpo"] = Field(description="direct preference optimisation, on pairs")
    beta: float = Field(default=0.1, gt=0, description="how far from the reference a pair may pull")
    reference: Literal["start", "context"] = Field(default="start", description=REFERENCE)
    ce: Weight = Field(
        default=0.0, description="weight of the right answer's cross-entropy, mean over its tokens"
    )
    l2_start: Weight = Field(default=0.0, description=L2_START)

    @property
    def asks_base(self) -> bool:
        """Whether the base LLM, told the description, scores the answers."""
        return self.reference == "context"


class PolicyGradient(Section):
    """Sampled answers are made likelier the better they are than others to the same prompt (GRPO)."""

    type: Literal["grpo"] = Field(description="group-relative policy gradient, on the model's own answers")
    answers: int = Field(default=8, ge=2, description="answers sampled per prompt, the group")
    temperature: float = Field(default=1.0, gt=0, description="of the sampling")
    max_new_tokens: Positive = Field(
        default=48, description="longest answer, tokens; one cut there has no right form"
    )
    batch_tokens: Positive = Field(default=4096, description="tokens generated side by side")
    answer_reward: Weight = Field(default=1.0, description="what a right answer is worth")
    format_reward: Weight = Field(default=0.5, description="what the right form (JSON, an end) is worth")
    beta: Weight = Field(default=0.04, description="weight of the divergence from the reference")
    reference: Literal["start", "context"] = Field(default="start", description=REFERENCE)
    l2_start: Weight = Field(default=0.0, description=L2_START)

    @property
    def asks_base(self) -> bool:
        """Whether the base LLM, told the description, scores the answers."""
        return self.reference == "context"


LossSection = CrossEntropy | Divergence | Preference | PolicyGradient


class Lora(Section):
    rank: Positive = Field(default=16, description="rank of the update")
    alpha: float | None = Field(default=None, gt=0, description="its scale is alpha / rank; null = 2 x rank")
    dropout: Share = Field(default=0.0, description="dropout on the adapter's input")
    target_modules: list[Text] | None = Field(
        default=None, description="names of the linear layers; null = the attention projections"
    )


class TrainableSection(Section):
    connector: bool = Field(default=True, description="train the connector")
    lora: Lora | None = Field(
        default=None, description="train LoRA adapters in the LLM; null = the LLM is frozen"
    )
    encoder_lora: Lora | None = Field(
        default=None,
        description="train LoRA adapters in the encoder, whose features are then not cached; null = it is frozen",
    )
    llm: bool = Field(default=False, description="train every weight of the LLM")

    @model_validator(mode="after")
    def _something(self) -> TrainableSection:
        if self.llm and self.lora is not None:
            raise contradiction(
                ("trainable.llm", "trainable.lora"),
                "trainable.llm trains every weight of the LLM and trainable.lora adapters beside frozen weights; keep one "
                "(on the command line: --set trainable.lora=null)",
            )
        if not self.connector and self.lora is None and self.encoder_lora is None and not self.llm:
            raise contradiction(
                ("trainable.connector", "trainable.lora"),
                "trainable.connector is false and trainable.lora is null, so nothing would be trained",
            )
        return self


class PartRates(Section):
    """Peak learning rates of single parts."""

    connector: float | None = Field(default=None, gt=0, description="of the connector; null = optimizer.lr")
    lora: float | None = Field(default=None, gt=0, description="of the LLM's adapters")
    encoder: float | None = Field(default=None, gt=0, description="of the encoder's adapters")
    llm: float | None = Field(default=None, gt=0, description="of the LLM's own weights")


class OptimizerSection(Section):
    lr: float = Field(
        default=1e-3, gt=0, description="peak learning rate (linear warm-up, then cosine to zero)"
    )
    part_lr: PartRates = Field(default_factory=PartRates, description="peak learning rates per part")
    epochs: Positive = Field(default=3, description="passes over the Examples")
    max_steps: Positive | None = Field(
        default=None, description="stop after so many steps; null = all epochs"
    )
    batch_tokens: Positive = Field(default=2048, description="tokens of a batch, padding included")
    accumulate: Positive = Field(default=1, description="batches per optimiser step")
    max_tokens: Positive = Field(default=1024, description="longer rows are left out and counted, never cut")
    warmup_ratio: Share = Field(default=0.05, description="share of the steps that warm up")
    weight_decay: float = Field(default=0.01, ge=0, description="AdamW's weight decay")
    clip: float = Field(default=1.0, gt=0, description="largest gradient norm")
    soft_word_epochs: NotNegative = Field(
        default=0,
        description="passes over the Examples that first tune, without sound, the vectors that stand for each attribute; "
        "0 = the LLM's own words",
    )
    soft_word_lr: float = Field(
        default=0.5, gt=0, description="their learning rate, relative to the distance between words"
    )
    align_epochs: NotNegative = Field(
        default=4, description="warm-up passes that draw the connector to these vectors; 0 = none"
    )
    align_lr: float = Field(default=1e-3, gt=0, description="learning rate of that warm-up")
    precision: Literal["auto", "float32", "bfloat16"] = Field(
        default="auto", description="auto = bfloat16 where it is faster"
    )
    checkpoint_every: Positive = Field(default=50, description="steps between checkpoints")
    keep: Positive = Field(default=2, description="newest checkpoints kept")
    best: Text | None = Field(
        default=None,
        description='series of a probe whose best checkpoint is kept too, as PROBE.SERIES, for instance "json.audio answer"',
    )
    workers: NotNegative = Field(
        default=1, description="threads that read the features of coming batches; 0 = read when they are used"
    )
    gradient_checkpointing: bool = Field(
        default=False,
        description="compute the LLM's activations again in the backward pass instead of keeping them: less memory, more time",
    )
    compile: bool = Field(
        default=False,
        description="compile the LLM's layers for training with torch.compile, which takes a while at the start: less time a step; "
        "needs a C++ compiler",
    )
    trackers: list[Text] = Field(
        default_factory=list,
        description="trackers, by the names that accelerate has for them (tensorboard, wandb, ...), that get every step's figures",
    )
    kl_every: NotNegative = Field(
        default=50,
        description="steps between measurements of the divergence from the base LLM on the batch; 0 = never",
    )


# Which losses teach what each style gives.
LOSSES_OF: dict[str, tuple[str, ...]] = {
    "sft": ("ce", "kl"),
    "pretrain": ("ce",),
    "preference": ("dpo",),
    "rollout": ("grpo",),
}
_GIVES = {
    "sft": "one answer to each prompt",
    "pretrain": "plain text without a description to tell a teacher",
    "preference": "pairs of a right and a wrong answer",
    "rollout": "answers that the model samples itself",
}


def check_learning(recipe: Any) -> None:
    """Raise a `contradiction` when `loss`, `trainable`, `style`, `optimizer`, `model` and `eval` cannot stand together."""
    loss, trainable, style, optimizer = recipe.loss, recipe.trainable, recipe.style, recipe.optimizer
    if loss.type not in LOSSES_OF[style]:
        raise contradiction(
            ("loss.type", "style"),
            f"loss.type is {loss.type} and style is {style}, which gives {_GIVES[style]}; "
            f"it is learned by loss.type {' or '.join(LOSSES_OF[style])}",
        )
    if style == "pretrain" and loss.mask != "none":
        raise contradiction(
            ("loss.mask", "style"),
            "loss.mask asks how hard the base LLM, told the description, finds an answer, and style pretrain has neither "
            "description nor answer; set loss.mask to none",
        )
    if isinstance(loss, Divergence) and loss.kl == 0:
        raise contradiction(
            ("loss.kl", "loss.type"), "loss.type is kl and loss.kl, its weight, is 0; use loss.type ce"
        )
    if isinstance(loss, PolicyGradient) and not loss.answer_reward + loss.format_reward:
        raise contradiction(
            ("loss.answer_reward", "loss.format_reward"),
            "loss.answer_reward and loss.format_reward are both 0, so no answer is better than another",
        )
    if trainable.llm and recipe.model.gate_adapters:
        raise contradiction(
            ("trainable.llm", "model.gate_adapters"),
            "trainable.llm changes the LLM's own weights, which model.gate_adapters cannot switch off where there is no sound; "
            "set model.gate_adapters to false",
        )
    if optimizer.soft_word_epochs:
        for wrong, key, why in (
            (
                trainable.llm,
                "trainable.llm",
                "soft words are what the frozen LLM reads, and it would move on",
            ),
            (not trainable.connector, "trainable.connector", "only the connector could learn to make them"),
            (style != "sft", "style", f"they are tuned on answers, and style {style} gives none as such"),
        ):
            if wrong:
                raise contradiction(
                    ("optimizer.soft_word_epochs", key),
                    f"optimizer.soft_word_epochs is {optimizer.soft_word_epochs} and {key} is "
                    f"{str(_at(recipe, key)).lower()}: {why}; set optimizer.soft_word_epochs to 0",
                )
    if optimizer.compile and optimizer.gradient_checkpointing:
        raise contradiction(
            ("optimizer.compile", "optimizer.gradient_checkpointing"),
            "optimizer.compile fuses the layers whose activations optimizer.gradient_checkpointing would compute again one by one; "
            "set one of them to false",
        )
    trained = {
        "connector": ("trainable.connector", trainable.connector),
        "lora": ("trainable.lora", trainable.lora is not None),
        "encoder": ("trainable.encoder_lora", trainable.encoder_lora is not None),
        "llm": ("trainable.llm", trainable.llm),
    }
    for part, (key, on) in trained.items():
        if getattr(optimizer.part_lr, part) is not None and not on:
            raise contradiction(
                (f"optimizer.part_lr.{part}", key),
                f"optimizer.part_lr.{part} is a learning rate for what {key} does not train; give one of them up",
            )
    if recipe.eval.lora_scales and trainable.lora is None:
        raise contradiction(
            ("eval.lora_scales", "trainable.lora"),
            "eval.lora_scales scales the LLM's adapters, and trainable.lora is null, so there are none",
        )


def _at(recipe: Any, key: str) -> Any:
    for name in key.split("."):
        recipe = getattr(recipe, name)
    return recipe
