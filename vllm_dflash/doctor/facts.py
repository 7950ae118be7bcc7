# SPDX-License-Identifier: Apache-2.0
"""All that the checks look at, as plain data. Torch-free."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from vllm_dflash.config import ConfigKeyError, DFlashConfig
from vllm_dflash.engine_facts import EngineFacts
from vllm_dflash.whole_numbers import is_whole


@dataclass(frozen=True)
class TensorFacts:
    """One tensor of a checkpoint.

    dtype: safetensors' name of it, such as "BF16".
    is_zero, is_finite: of the sampled values; None: not looked at.
    digest: of the sampled bytes, to tell whether two tables are the same.
    """

    shape: tuple[int, ...]
    dtype: str
    num_bytes: int
    is_zero: bool | None = None
    is_finite: bool | None = None
    digest: str | None = None


def bare_key(key: str) -> str:
    """Of "dflash_config.mask_token_id" or "layer_types[2]": the key itself."""
    return key.split("[")[0].removeprefix("dflash_config.")


@dataclass(frozen=True)
class Weights:
    """The tensors of a checkpoint. problems: what is wrong with its files. has_headers: whether any could be read."""

    tensors: Mapping[str, TensorFacts] = field(default_factory=dict)
    problems: tuple[str, ...] = ()
    has_headers: bool = True

    @property
    def num_bytes(self) -> int:
        return sum(tensor.num_bytes for tensor in self.tensors.values())


@dataclass(frozen=True)
class TokenizerFacts:
    """A target's tokenizer, as far as its files tell without loading it.

    tokens: text by id, added tokens included. special: ids that no plain text becomes.
    mask_token: the one that the tokenizer names as such. chat_templates: their sources, none if there is none.
    problem: why its files cannot be read; empty where they can.
    """

    tokens: Mapping[int, str] = field(default_factory=dict)
    special: frozenset[int] = frozenset()
    mask_token: str | None = None
    roles: Mapping[str, int] = field(default_factory=dict)  # such as "eos_token": its id
    chat_templates: tuple[str, ...] = ()
    problem: str = ""

    @property
    def has_thinking_switch(self) -> bool:
        return any("enable_thinking" in template for template in self.chat_templates)


@dataclass(frozen=True)
class Target:
    """The target's side. text: the part of `raw` (its config.json) that is about its decoder."""

    source: str
    raw: Mapping[str, Any]
    text: Mapping[str, Any]
    weights: Weights = Weights()
    tokenizer: TokenizerFacts | None = None
    end_token_ids: tuple[int, ...] = ()

    @property
    def architectures(self) -> tuple[str, ...]:
        names = self.raw.get("architectures")
        return tuple(str(name) for name in names) if isinstance(names, list) else ()

    def number(self, key: str) -> int | None:
        """A positive integer of the decoder's config; None where it is missing or something else."""
        value = self.text.get(key)
        return value if is_whole(value) else None


@dataclass(frozen=True)
class Drafter:
    """The drafter's side.

    raw: its config.json. flat: the same in the published layout. config: its checked view, with stand-ins for the keys
        in `unreadable`; None where there are too few left to go on with.
    config_errors: one for each key that cannot be used. other_errors: what is no single key's fault.
    """

    source: str
    raw: Mapping[str, Any]
    flat: Mapping[str, Any]
    config: DFlashConfig | None
    config_errors: tuple[ConfigKeyError, ...] = ()
    other_errors: tuple[str, ...] = ()
    weights: Weights = Weights()

    @property
    def unreadable(self) -> frozenset[str]:
        """Names of the keys at fault, without what they are nested in."""
        names = {bare_key(error.key) for error in self.config_errors}
        # Layer ids have another name in the layout of speculators.
        return frozenset(names | ({"target_layer_ids"} if "aux_hidden_state_layer_ids" in names else set()))

    def can_read(self, *keys: str) -> bool:
        """Whether there is a config whose values under these keys are the checkpoint's own."""
        return self.config is not None and not self.unreadable & set(keys)


@dataclass(frozen=True)
class Asked:
    """What the user means to run with; None and "auto": vLLM's default."""

    num_speculative_tokens: int | None = None
    max_model_len: int | None = None
    dtype: str = "auto"
    kv_cache_dtype: str = "auto"
    tensor_parallel_size: int = 1


@dataclass(frozen=True)
class Machine:
    """GPUs seen: names and bytes of memory, none on a machine without."""

    gpus: tuple[tuple[str, int], ...] = ()


@dataclass(frozen=True)
class Facts:
    """Everything about one pair."""

    target: Target
    drafter: Drafter
    asked: Asked = Asked()
    engine: EngineFacts = EngineFacts()
    machine: Machine = Machine()

    @property
    def context_length(self) -> int | None:
        """Tokens of the longest request: as asked for, else what the target has positions for."""
        return self.asked.max_model_len or self.target.number("max_position_embeddings")
