# SPDX-License-Identifier: Apache-2.0
"""A training's settings: what a recipe file may say, its defaults, and which of it is wrong.

Defaults follow the paper where it tells (arXiv 2602.06036, sections 4.2 and A.1): 5 layers, blocks of 16, 512 anchors a
sequence, AdamW at 6e-4 with a warm-up of 4 %, six epochs, sequences of up to 3072 tokens.
"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any, Literal, get_args

import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError, ValidationInfo, field_validator, model_validator

Positive = Annotated[int, Field(gt=0)]
Share = Annotated[float, Field(ge=0, le=1)]


class _Section(BaseModel):
    """Keys that are not known are errors: a misspelt one would leave its default in force."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    @field_validator("*", mode="before")
    @classmethod
    def _no_yes_for_a_number(cls, value: Any, info: ValidationInfo) -> Any:
        """YAML's `on` and `true` are 1 to pydantic."""
        wanted = cls.model_fields[str(info.field_name)].annotation
        if isinstance(value, bool) and wanted is not bool and bool not in get_args(wanted):
            raise ValueError("yes or no is not a value of this key")
        return value


class DataRecipe(_Section):
    """Prompts, and the responses that the target gives to them."""

    max_prompts: Positive | None = None  # of the files'; None: all
    held_out: Positive = 32  # prompts kept out of the training, for the evaluation
    max_new_tokens: Annotated[int, Field(ge=2)] = 1024
    max_length: Positive = 3072  # tokens of prompt and response; what is longer is cut
    thinking: bool | None = None  # `enable_thinking` of the chat template; None: as the template has it
    sampled_share: Share = 0.25  # of the responses, at a temperature between these two; the others are greedy
    temperatures: tuple[float, float] = (0.7, 1.0)
    engine: Literal["auto", "vllm", "transformers"] = "auto"  # auto: vLLM on a GPU
    gpu_memory_utilization: Annotated[float, Field(gt=0, le=1)] | None = None  # of that vLLM; None: its own default
    feature_cache_gb: Annotated[float, Field(gt=0)] | None = None  # GiB on disk; None: computed at every step
    seed: int = 0


class ModelRecipe(_Section):
    """The drafter's shape."""

    num_layers: Positive = 5
    block_size: Annotated[int, Field(ge=2)] = 16
    target_layer_ids: tuple[int, ...] | None = None  # None: as many as layers, evenly from the 2nd to the 3rd-to-last
    intermediate_size: Positive | None = None  # None: the target's
    sliding_window: Positive | None = None  # of all layers, bidirectional inside the block; None: full attention
    draft_vocab_size: Positive | None = None  # tokens that can be drafted; None: all of the target's
    mask_token: str | int | None = None  # a token of the target's tokenizer or its id; None: an unused one


class ObjectiveRecipe(_Section):
    """What the drafter is to get better at."""

    kind: Literal["decay", "d-pace"] = "decay"
    gamma: Annotated[float, Field(gt=0)] | None = None  # of "decay"; None: 7 for blocks of 16, 5 for 10, 4 for 8
    alpha: Annotated[float, Field(gt=0, le=1)] = 0.5  # of "d-pace"
    kl_weight: Share = 0.0  # of the distance to the target's distribution, beside the cross-entropy


class TrainingRecipe(_Section):
    """The optimizer's way."""

    epochs: Annotated[float, Field(gt=0)] = 6.0
    steps: Positive | None = None  # instead of epochs
    batch_tokens: Positive = 16384  # padded tokens of a batch, on each device
    accumulation: Positive = 1  # batches of a step
    anchors: Positive = 512  # blocks of a sequence, at most
    tokens_per_anchor: Positive = 6  # one block for so many padded tokens of a sequence
    learning_rate: Annotated[float, Field(gt=0)] = 6e-4
    weight_decay: Annotated[float, Field(ge=0)] = 0.01
    warmup: Share = 0.04  # of the steps
    clip: Annotated[float, Field(gt=0)] = 1.0  # norm of the gradients
    precision: Literal["auto", "bf16", "fp32"] = "auto"  # auto: bf16 on a GPU
    compile: bool | None = None  # None: on a GPU
    checkpoint_every: Positive = 500  # steps
    evaluate_every: Positive | None = None  # steps; None: at the end only
    evaluate_tokens: Annotated[int, Field(ge=2)] = 128  # of each held-out prompt
    seed: int = 0

    def is_bf16(self, on_gpu: bool) -> bool:
        """Whether the target and the forward are in bfloat16; else in float32."""
        return self.precision == "bf16" or (self.precision == "auto" and on_gpu)


class Recipe(_Section):
    """All of it."""

    data: DataRecipe = DataRecipe()
    model: ModelRecipe = ModelRecipe()
    objective: ObjectiveRecipe = ObjectiveRecipe()
    training: TrainingRecipe = TrainingRecipe()

    @model_validator(mode="after")
    def _fits(self) -> Recipe:
        low, high = self.data.temperatures
        if not 0 < low <= high:
            raise ValueError(f"data.temperatures: two rising numbers above 0 are needed, found [{low}, {high}]")
        ids = self.model.target_layer_ids
        if ids is not None and (not ids or min(ids) < 0 or list(ids) != sorted(set(ids))):
            raise ValueError(f"model.target_layer_ids: rising numbers from 0 on are needed, found {list(ids)}")
        if self.objective.kl_weight and self.data.feature_cache_gb is not None:
            raise ValueError(
                f"objective.kl_weight = {self.objective.kl_weight} needs the target's own distribution, which "
                "data.feature_cache_gb does not keep: leave one of them out"
            )
        return self

    def gamma(self, block_size: int) -> float:
        """The decay that goes with the block (paper, section 4.2), unless the recipe says another."""
        if self.objective.gamma is not None:
            return self.objective.gamma
        return 7.0 if block_size > 10 else 5.0 if block_size > 8 else 4.0


def read_recipe(
    file: Path | None, overrides: dict[str, dict[str, Any]] | None = None, flag: str = "--config"
) -> Recipe:
    """The recipe of a YAML file (None: all defaults), under settings given elsewhere, by section and key.

    `flag`: by which the file was given. Raises ValueError naming the file, the key and the value that is wrong.
    """
    raw = _parsed(file, flag) if file is not None else {}
    for section, keys in (overrides or {}).items():
        given = raw.get(section) or {}
        raw[section] = given | keys if isinstance(given, dict) else given
    try:
        return Recipe.model_validate(raw)
    except ValidationError as error:
        problems = "; ".join(_problem(dict(found)) for found in error.errors())
        raise ValueError(f"{file or 'the recipe'}: {problems}") from error


def _parsed(file: Path, flag: str) -> dict[str, Any]:
    try:
        raw = yaml.safe_load(file.read_text(encoding="utf-8"))
    except OSError as error:
        raise ValueError(f"{flag} {file}: cannot be read: {error.strerror}") from error
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise ValueError(f"{flag} {file}: not YAML: {error}") from error
    if raw is None:
        return {}
    if not isinstance(raw, dict):
        raise ValueError(f"{flag} {file}: sections are needed ({', '.join(Recipe.model_fields)}), found {raw!r}")
    return raw


def _problem(found: dict[str, Any]) -> str:
    key = ".".join(str(part) for part in found["loc"])
    if found["type"] == "extra_forbidden":
        return f"{key}: no such key"
    if not key:  # of the recipe as a whole: its message names the key
        return str(found["ctx"]["error"])
    return f"{key}: {found['msg'][0].lower()}{found['msg'][1:]}, found {found['input']!r}"
