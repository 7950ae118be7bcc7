# SPDX-License-Identifier: Apache-2.0
"""What a drafter checkpoint's config.json says, checked and normalised. Torch-free.

Two layouts are read: the published one (z-lab: keys at the top level and in ``dflash_config``) and the one that
speculators writes (``speculators_model_type: dflash`` with a ``transformer_layer_config``).
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from vllm_dflash.whole_numbers import is_whole

FULL_ATTENTION = "full_attention"
SLIDING_ATTENTION = "sliding_attention"

#: Parts of a drafter that vLLM's own dflash has and this implementation has not, with the values that mean "not in
#: use". Checkpoints with such parts are left to vLLM.
_LEFT_TO_VLLM: dict[str, tuple[Any, ...]] = {
    "attention_sink_bias": (None, False),
    "attention_value_scale": (None, 1.0),
    "use_aux_hidden_state": (None, True),
}
#: Keys that change the draft model's arithmetic and that this implementation does not have. Ignoring one would not
#: raise anything later: acceptance would just collapse. Each maps to the values that mean "not in use".
UNSUPPORTED_KEYS: dict[str, tuple[Any, ...]] = {
    **_LEFT_TO_VLLM,
    "sample_from_anchor": (None, False),
    "conv_kernel_size": (None, 0),
    "selector_rank": (None, 0),
    "projector_type": (None, "dflash"),
    "shift_label": (None, False),
}


class ConfigKeyError(ValueError):
    """A key of a drafter's config.json that cannot be used. `key` is its name, dotted where it is nested."""

    def __init__(self, source: str, key: str, problem: str) -> None:
        super().__init__(f"{source}: config.json key {key!r} {problem}")
        self.key = key


@dataclass(frozen=True)
class LayerAttention:
    """What one draft layer's block rows may attend to.

    sliding_window: how many keys back a row sees, itself included; None sees everything.
    causal: whether a block row is blind to the rows after it. DFlash blocks are bidirectional (paper, section 3);
        sliding layers of the published mixed drafters are the exception.
    """

    sliding_window: int | None
    causal: bool


@dataclass(frozen=True)
class DFlashConfig:
    """A drafter's architecture (paper: arXiv 2602.06036, section 3).

    target_layer_ids: i means "output of the target's decoder layer i", counted from 0.
    block_size: anchor + masks; a pass drafts ``block_size - 1`` tokens.
    draft_vocab_size: rows of the draft LM head; below vocab_size where the checkpoint maps ids with ``d2t``.
    target_hidden_size: width of one tapped feature; the fusion reads ``len(target_layer_ids)`` of them.
    rope_parameters: Transformers 5 form, ``rope_theta`` and ``rope_type`` always present.
    source: the directory or hub id it was read from, for error messages.
    """

    block_size: int
    mask_token_id: int
    target_layer_ids: tuple[int, ...]
    hidden_size: int
    intermediate_size: int
    num_hidden_layers: int
    num_attention_heads: int
    num_key_value_heads: int
    head_dim: int
    vocab_size: int
    draft_vocab_size: int
    target_hidden_size: int
    layers: tuple[LayerAttention, ...]
    rms_norm_eps: float = 1e-6
    hidden_act: str = "silu"
    attention_bias: bool = False
    max_position_embeddings: int = 32768
    rope_parameters: Mapping[str, Any] = field(default_factory=dict)
    is_neox_style: bool = True
    num_target_layers: int | None = None
    is_quantized: bool = False
    source: str = "<dict>"

    @property
    def num_speculative_tokens(self) -> int:
        """The longest chain one block drafts: every row but the anchor."""
        return self.block_size - 1

    @property
    def feature_width(self) -> int:
        """Of a row of context features: the tapped layers' hidden states side by side."""
        return len(self.target_layer_ids) * self.target_hidden_size

    @property
    def aux_hidden_state_layer_ids(self) -> tuple[int, ...]:
        """The taps in the numbering of vLLM's aux hidden states and of Transformers' ``hidden_states``.

        Both count the embedding as 0, so the output of decoder layer i is i + 1.
        """
        return tuple(i + 1 for i in self.target_layer_ids)

    @property
    def rotary_dim(self) -> int:
        """How many of a head's channels RoPE turns (partial rotary factor)."""
        return int(self.head_dim * self.rope_parameters.get("partial_rotary_factor", 1.0))

    @classmethod
    def from_pretrained(cls, model: str, revision: str | None = None) -> DFlashConfig:
        """Read the config of a local directory or a hub id. Raises ValueError naming the file or key at fault."""
        return cls.from_dict(read_config_dict(model, revision), source=str(model))

    @classmethod
    def from_dict(cls, raw: Mapping[str, Any], source: str = "<dict>") -> DFlashConfig:
        """Build from a parsed config.json of either layout. Raises ValueError naming the key at fault."""
        return _Parser(published_layout(raw, source), source).parse()


def published_layout(raw: Mapping[str, Any], source: str = "<dict>") -> dict[str, Any]:
    """A copy of a raw config.json of either layout, in the published one. Raises ValueError naming the key at fault."""
    return _from_speculators(raw, source) if raw.get("speculators_model_type") else dict(raw)


def read_config_dict(model: str, revision: str | None = None) -> dict[str, Any]:
    """The raw config.json of a local directory or a hub id. Raises ValueError when there is none or it is not JSON."""
    path = Path(model)
    if not path.is_dir():
        return _read_hub_config(model, revision)
    file = path / "config.json"
    if not file.is_file():
        raise ValueError(
            f"no config.json in the drafter's directory {path}: is --speculative-config's \"model\" right?"
        )
    try:
        raw = json.loads(file.read_text(encoding="utf-8"))
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise ValueError(f"{file} is not valid JSON: {error}") from error
    if not isinstance(raw, dict):
        raise ValueError(f"{file} must hold a JSON object, found a {type(raw).__name__}")
    return raw


def _read_hub_config(model: str, revision: str | None) -> dict[str, Any]:
    from transformers import PretrainedConfig

    try:
        raw, _ = PretrainedConfig.get_config_dict(model, revision=revision)
    except OSError as error:
        raise ValueError(
            f'--speculative-config\'s "model": {model!r} is neither a local directory nor a readable hub id: {error}'
        ) from error
    if not raw:
        raise ValueError(f'--speculative-config\'s "model": {model!r} has no config.json')
    return dict(raw)


def is_dflash_checkpoint(raw: Mapping[str, Any]) -> bool:
    """Whether a raw config.json describes a plain DFlash drafter: the kind this package drafts for.

    DFlash2, LiLiCorr and DSpark checkpoints, and drafters of other backbones, carry other architecture names. Plain
    ones with parts that only vLLM's own dflash has are not ours either.
    """
    nested = raw.get("dflash_config")
    settings = {**raw, **(nested if isinstance(nested, Mapping) else {})}
    if any(settings.get(key) not in unused for key, unused in _LEFT_TO_VLLM.items()):
        return False
    if raw.get("speculators_model_type"):
        return raw["speculators_model_type"] == "dflash"
    return raw.get("architectures") == ["DFlashDraftModel"]


def _from_speculators(raw: Mapping[str, Any], source: str) -> dict[str, Any]:
    """Translate speculators' layout into the published one.

    Its layer ids count the embedding as 0. It trains full layers bidirectional always, and sliding ones as
    `sliding_window_non_causal` says.
    """
    if not isinstance(raw.get("transformer_layer_config"), Mapping):
        raise ValueError(f"{source}: config.json has speculators_model_type but no transformer_layer_config")
    aux_ids = raw.get("aux_hidden_state_layer_ids")
    if aux_ids is not None and not _are_layer_ids(aux_ids, first=1):
        raise ConfigKeyError(
            source,
            "aux_hidden_state_layer_ids",
            f"must be a strictly increasing list of integers >= 1 (0 is the embedding), found {aux_ids!r}",
        )
    flat = dict(raw["transformer_layer_config"])
    for key in ("block_size", "draft_vocab_size", "target_hidden_size", "quantization_config", *UNSUPPORTED_KEYS):
        if raw.get(key) is not None:
            flat[key] = raw[key]
    flat["dflash_config"] = {
        "mask_token_id": raw.get("mask_token_id"),
        "target_layer_ids": None if aux_ids is None else [i - 1 for i in aux_ids],
        "causal": False if raw.get("sliding_window_non_causal", True) else None,
    }
    return flat


def default_target_layer_ids(depth: int, taps: int) -> tuple[int, ...]:
    """`taps` of a target's `depth` layers, spread evenly from the 2nd to the 3rd-to-last (paper, section 4.1).

    A target with too few layers gives ids that repeat or fall.
    """
    if taps == 1:
        return (depth // 2,)
    first, last = 1, depth - 3
    return tuple(round(first + i * (last - first) / (taps - 1)) for i in range(taps))


def _are_layer_ids(ids: Any, first: int) -> bool:
    """Whether `ids` is a non-empty, strictly increasing list of integers from `first` on."""
    return (
        isinstance(ids, list | tuple)
        and bool(ids)
        and all(is_whole(i, first) for i in ids)
        and list(ids) == sorted(set(ids))
    )


class _Parser:
    """Reads one flat config, naming the key in every complaint."""

    def __init__(self, flat: dict[str, Any], source: str) -> None:
        self.flat, self.source = flat, source
        self.dflash: Mapping[str, Any] = flat.get("dflash_config") or {}
        if not isinstance(self.dflash, Mapping):
            raise self._error("dflash_config", f"must be an object, found {self.dflash!r}")

    def parse(self) -> DFlashConfig:
        self._refuse_unsupported()
        hidden_size = self._positive("hidden_size")
        num_heads = self._positive("num_attention_heads")
        vocab_size = self._positive("vocab_size")
        layer_types = self._layer_types()
        # Some checkpoints say "sliding" once for all layers instead of layer by layer.
        slide_all = bool(self.dflash.get("use_swa")) and SLIDING_ATTENTION not in layer_types
        return DFlashConfig(
            block_size=self._block_size(),
            mask_token_id=self._mask_token_id(vocab_size),
            target_layer_ids=self._target_layer_ids(),
            hidden_size=hidden_size,
            intermediate_size=self._positive("intermediate_size"),
            num_hidden_layers=len(layer_types),
            num_attention_heads=num_heads,
            num_key_value_heads=self._positive("num_key_value_heads", num_heads),
            head_dim=self._positive("head_dim", hidden_size // num_heads),
            vocab_size=vocab_size,
            draft_vocab_size=self._positive("draft_vocab_size", vocab_size),
            target_hidden_size=self._positive("target_hidden_size", hidden_size),
            layers=tuple(self._layer_attention(kind, slide_all) for kind in layer_types),
            rms_norm_eps=float(self.flat.get("rms_norm_eps", 1e-6)),
            hidden_act=self.flat.get("hidden_act", "silu"),
            attention_bias=bool(self.flat.get("attention_bias", False)),
            max_position_embeddings=self._positive("max_position_embeddings", 32768),
            rope_parameters=self._rope_parameters(),
            is_neox_style=bool(self.flat.get("is_neox_style", True)),
            num_target_layers=self._num_target_layers(),
            is_quantized=bool(self.flat.get("quantization_config")),
            source=self.source,
        )

    def _error(self, key: str, problem: str) -> ConfigKeyError:
        return ConfigKeyError(self.source, key, problem)

    def _positive(self, key: str, default: int | None = None) -> int:
        value = self.flat.get(key)
        value = default if value is None else value
        if not is_whole(value):
            raise self._error(key, f"must be a positive integer, found {value!r}")
        return value

    def _refuse_unsupported(self) -> None:
        for key, unused in UNSUPPORTED_KEYS.items():
            value = self.dflash.get(key, self.flat.get(key))
            if value not in unused:
                raise self._error(key, f"= {value!r} is not supported by this drafter implementation")

    def _block_size(self) -> int:
        key = "block_size"
        value = self.flat.get(key, self.dflash.get(key))
        if not is_whole(value, 2):
            raise self._error(key, f"must be an integer >= 2 (anchor + at least one mask), found {value!r}")
        return value

    def _mask_token_id(self, vocab_size: int) -> int:
        key = "dflash_config.mask_token_id"
        value = self.dflash.get("mask_token_id", self.flat.get("mask_token_id"))
        if value is None:
            raise self._error(key, "is missing: without the id the drafter was trained with, nothing is accepted")
        if not is_whole(value, 0, vocab_size - 1):
            raise self._error(key, f"= {value!r} is not a token id below vocab_size = {vocab_size}")
        return value

    def _target_layer_ids(self) -> tuple[int, ...]:
        key = "dflash_config.target_layer_ids"
        ids = self.dflash.get("target_layer_ids")
        if ids is None:
            return self._default_target_layer_ids()
        if not _are_layer_ids(ids, first=0):
            raise self._error(key, f"must be a strictly increasing list of decoder layer indices >= 0, found {ids!r}")
        return tuple(ids)

    def _num_target_layers(self) -> int | None:
        return None if self.flat.get("num_target_layers") is None else self._positive("num_target_layers")

    def _default_target_layer_ids(self) -> tuple[int, ...]:
        """The published taps, as many as draft layers."""
        key, depth = "dflash_config.target_layer_ids", self._num_target_layers()
        if depth is None:
            raise self._error(key, "is missing, and so is num_target_layers to derive it")
        taps = self._positive("num_hidden_layers")
        ids = default_target_layer_ids(depth, taps)
        if not _are_layer_ids(ids, first=0):
            raise self._error(
                key, f"is missing, and num_target_layers = {depth} leaves no room for {taps} default taps"
            )
        return ids

    def _layer_types(self) -> list[str]:
        count = self._positive("num_hidden_layers")
        kinds = self.flat.get("layer_types") or [FULL_ATTENTION] * count
        if len(kinds) != count:
            raise self._error("layer_types", f"names {len(kinds)} layers, but num_hidden_layers = {count}")
        for index, kind in enumerate(kinds):
            if kind not in (FULL_ATTENTION, SLIDING_ATTENTION):
                raise self._error(
                    f"layer_types[{index}]",
                    f"= {kind!r} is not supported: {FULL_ATTENTION!r} and {SLIDING_ATTENTION!r} are",
                )
        return list(kinds)

    def _layer_attention(self, kind: str, slide_all: bool) -> LayerAttention:
        """A layer's window and causality. An explicit causality wins; else layers declared sliding are causal."""
        sliding = kind == SLIDING_ATTENTION
        causal = self.flat.get("is_causal")
        causal = self.dflash.get("causal") if causal is None else causal
        return LayerAttention(
            sliding_window=self._sliding_window() if sliding or slide_all else None,
            causal=sliding if causal is None else bool(causal),
        )

    def _sliding_window(self) -> int:
        window = self.dflash.get("swa_window_size", self.flat.get("sliding_window"))
        if not is_whole(window):
            raise self._error("sliding_window", f"must be a positive integer for sliding layers, found {window!r}")
        if "swa_window_size" not in self.dflash and self.flat.get("use_sliding_window") is False:
            raise self._error("use_sliding_window", f"= false contradicts layer_types with sliding_window = {window}")
        return window

    def _rope_parameters(self) -> dict[str, Any]:
        """One dict from either home of the RoPE settings: top-level keys, or Transformers 5's rope_parameters."""
        rope: dict[str, Any] = dict(self.flat.get("rope_parameters") or self.flat.get("rope_scaling") or {})
        if any(isinstance(value, Mapping) for value in rope.values()):
            raise self._error("rope_parameters", "differs between layer types, which is not supported")
        if "type" in rope:  # the older spelling of the same key
            rope.setdefault("rope_type", rope.pop("type"))
        rope.setdefault("rope_type", "default")
        for key, default in (("rope_theta", 10000.0), ("partial_rotary_factor", None)):
            value = rope.get(key, self.flat.get(key, default))
            if value is not None:
                rope[key] = value
        return rope
