"""A LoRA recipe: which base learns what, how, and how the result is judged. ``recipes/lora/*.yaml``."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated, Literal

from pydantic import Field, field_validator, model_validator

from toolchain.pipeline.recipe import BUILTIN_CORPUS
from toolchain.pipeline.recipe_file import Strict, read_recipe

SCHEMA_NAME = "lora.schema.json"
EXAMPLE = "recipes/lora/demo.yaml"

EngineName = Literal["torch", "ggml"]
Schedule = Literal["cosine", "linear", "constant"]
Device = Literal["auto", "cpu", "cuda"]
Dtype = Literal["auto", "float32", "bfloat16"]

Positive = Annotated[int, Field(ge=1)]
Fraction = Annotated[float, Field(ge=0, lt=1, strict=False)]
Above = Annotated[float, Field(gt=0, allow_inf_nan=False, strict=False)]


class Base(Strict):
    """The model that the adapter is for: exactly one of recipe, gguf and hub."""

    recipe: str | None = Field(None, description="a quantization recipe, relative to this one; it is made if missing")
    type: str | None = Field(None, description="recipe only: which of its files; its first when left out")
    gguf: str | None = Field(None, description="a GGUF file, quantized or not, relative to this recipe")
    hub: str | None = Field(None, description="a GGUF on the Hugging Face hub, OWNER/NAME:QUANT")

    @model_validator(mode="after")
    def _one_origin(self) -> Base:
        named = [name for name in ("recipe", "gguf", "hub") if getattr(self, name) is not None]
        if len(named) != 1:
            given = f"{' and '.join(named)} are given" if named else "none is given"
            raise ValueError(f"exactly one of recipe, gguf and hub is needed; {given}")
        if self.type is not None and self.recipe is None:
            raise ValueError("type goes with recipe only")
        return self


class Source(Strict):
    """One file of examples: exactly one of text, chat and instruct."""

    text: str | None = Field(None, description="plain text, relative to the recipe; or builtin:python-source")
    chat: str | None = Field(None, description="JSONL of conversations: messages with role and content")
    instruct: str | None = Field(None, description="JSONL of instruction, input and output (or prompt and completion)")
    repeat: Positive = Field(1, description="how often the file counts in an epoch")

    @model_validator(mode="after")
    def _one_kind(self) -> Source:
        named = [name for name in ("text", "chat", "instruct") if getattr(self, name) is not None]
        if len(named) != 1:
            given = f"{' and '.join(named)} are given" if named else "none is given"
            raise ValueError(f"exactly one of text, chat and instruct is needed; {given}")
        return self

    @property
    def kind(self) -> Literal["text", "chat", "instruct"]:
        return "text" if self.text is not None else "chat" if self.chat is not None else "instruct"

    @property
    def file(self) -> str:
        return self.text or self.chat or self.instruct or ""


class Data(Strict):
    """What is learned. A part of every file, never trained on, is kept to judge the result."""

    sources: tuple[Source, ...] = Field(min_length=1, strict=False, description="the files of examples")
    held_out: Fraction = Field(0.1, description="the share that is kept for the evaluation")
    held_out_file: Source | None = Field(None, description="a file of its own for the evaluation, in place of a share")
    packing: bool = Field(True, description="several short examples in one row; they do not see each other")
    learn_prompts: bool = Field(False, description="learn all turns of a conversation, not the assistant's alone")

    @field_validator("sources", mode="before")
    @classmethod
    def _list(cls, value: object) -> object:
        return tuple(value) if isinstance(value, list) else value


class AdapterOptions(Strict):
    """The form of the adapter, in the terms of peft's LoraConfig."""

    rank: Annotated[int, Field(ge=1, le=1024)] = Field(16, description="the width of the low-rank pair")
    alpha: Above | None = Field(None, description="the adapter counts alpha/rank times; 2 x rank when left out")
    dropout: Fraction = Field(0.0, description="the share of the adapter's inputs dropped in training")
    targets: tuple[str, ...] | Literal["all-linear", "attention", "feed-forward"] = Field(
        "all-linear",
        description="all-linear, attention, feed-forward, or names as in attn_q (GGUF) or q_proj (transformers)",
    )
    rslora: bool = Field(False, description="scale by alpha/sqrt(rank), as arXiv 2312.03732")
    dora: bool = Field(False, description="learn magnitudes too, arXiv 2402.09353; the result is a merged model")

    @field_validator("targets", mode="before")
    @classmethod
    def _names(cls, value: object) -> object:
        return tuple(value) if isinstance(value, list) else value

    @property
    def counted_alpha(self) -> float:
        return self.alpha if self.alpha is not None else 2.0 * self.rank


class Training(Strict):
    """Schedule and means. A step learns ``batch`` rows of ``n_ctx`` tokens."""

    n_ctx: Annotated[int, Field(ge=8)] = Field(512, description="tokens in a row")
    batch: Positive = Field(8, description="rows in an optimizer step, over all processes")
    micro_batch: Positive | None = Field(None, description="rows computed at once; chosen by memory when left out")
    epochs: Above = Field(1.0, description="how often all of the data is seen, unless steps says it")
    steps: Positive | None = Field(None, description="optimizer steps, in place of epochs")
    learning_rate: Above = Field(2e-4, description="the highest, after the warmup")
    schedule: Schedule = Field("cosine", description="how the rate falls to zero")
    warmup: Fraction = Field(0.03, description="the share of the steps in which the rate rises")
    weight_decay: Annotated[float, Field(ge=0, strict=False)] = Field(0.0, description="AdamW's")
    max_grad_norm: Above = Field(1.0, description="gradients are scaled down to this norm")
    seed: int = Field(1, description="of the adapter's start, the order of the data and dropout")
    checkpoint_steps: Positive = Field(50, description="a checkpoint after each so many steps")
    gradient_checkpointing: bool | Literal["auto"] = Field(
        "auto", description="compute activations twice in place of keeping them; auto: when memory asks for it"
    )
    processes: Positive = Field(1, description="processes of this machine that share the work")
    device: Device = Field("auto", description="auto: a GPU where there is one")
    dtype: Dtype = Field("auto", description="of the products; auto: float32 on a CPU, bfloat16 on a GPU")


class Budget(Strict):
    """What the training may cost; it is planned to stay within."""

    minutes: Above | None = Field(None, description="fewer steps where the probe says that all would take longer")
    memory_gib: Above | None = Field(None, description="less than what the machine has free")


class Judging(Strict):
    """What the result is judged by."""

    n_ctx: Annotated[int, Field(ge=8)] = Field(512, description="window length in tokens")
    chunks: Positive | None = Field(None, description="at most so many windows")
    unrelated: str = Field(BUILTIN_CORPUS, description=f"text on which nothing should change, or {BUILTIN_CORPUS}")
    max_drift_kld: Above | None = Field(None, description="fail when the drift on it is larger")
    prompts: tuple[str, ...] = Field((), strict=False, description="answered by base and adapter, side by side")
    reply_tokens: Positive = Field(64, description="how long such an answer may be")

    @field_validator("prompts", mode="before")
    @classmethod
    def _list(cls, value: object) -> object:
        return tuple(value) if isinstance(value, list) else value


class Merging(Strict):
    """How ``inv merge`` writes the merged model."""

    type: str | None = Field(None, description="a llama-quantize type; the base's own tensor types when left out")
    max_mean_kld: Above = Field(0.05, description="between merged model and base with adapter; fail when it is larger")


class LoraRecipe(Strict):
    """What ``inv lora`` trains: ``models/NAME/NAME-lora.gguf``."""

    name: str = Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]*$", description="names the folder and the files")
    base: Base
    data: Data
    engine: EngineName = Field("torch", description="torch, or ggml: llama.cpp's trainer of 2023")
    adapter: AdapterOptions = AdapterOptions.model_validate({})
    train: Training = Training.model_validate({})
    budget: Budget = Budget.model_validate({})
    evaluate: Judging = Judging.model_validate({})
    merge: Merging = Merging.model_validate({})


def load_lora_recipe(path: Path) -> LoraRecipe:
    """Read and check the recipe at ``path``; UsageError with line numbers for all that is wrong with it."""
    return read_recipe(path, LoraRecipe, schema=f"recipes/lora/{SCHEMA_NAME}", example=EXAMPLE)


def schema_text() -> str:
    """The JSON schema of a LoRA recipe, as it is kept in ``recipes/lora/lora.schema.json``."""
    return json.dumps(LoraRecipe.model_json_schema(), indent=2) + "\n"
