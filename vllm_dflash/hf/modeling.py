# SPDX-License-Identifier: Apache-2.0
"""The DFlash draft model on Transformers: Qwen3 plus these differences (paper, section 3):

- context enters as K/V only: target features are fused once, then every layer projects them with its own k/v weights;
- the block's rows attend to the context and, in both directions, to each other;
- embedding and LM head are the target's, unless the checkpoint brings its own.

Letters: B batch, T new context rows, Q block rows, F tapped layers, H hidden size, D head dim, N cached rows.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import nn
from torch.nn.attention.flex_attention import BlockMask
from transformers import Cache, LogitsProcessorList, PreTrainedModel, Qwen3Config
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS
from transformers.models.qwen3.modeling_qwen3 import Qwen3MLP

from vllm_dflash.checkpoint import check_tensors, read_mask_embedding, read_tensor_shapes, resolve_model_dir
from vllm_dflash.config import DFlashConfig
from vllm_dflash.hf.budget import RoundCosts
from vllm_dflash.hf.calibration import Calibration
from vllm_dflash.hf.choosing import Sampling
from vllm_dflash.hf.generation import SpecGenerateOutput, spec_generate
from vllm_dflash.hf.graphs import Workspace
from vllm_dflash.hf.masks import attention, combined
from vllm_dflash.hf.options import Options
from vllm_dflash.hf.sequences import Limits, id_list
from vllm_dflash.hf.slot_cache import SlotCache


class DFlashRotaryEmbedding(nn.Module):
    """cos/sin of the first `rotary_dim` channels; scaled RoPE types through Transformers' own init functions.

    The frequencies are computed at the first forward on a device and are no buffer: `from_pretrained` builds modules
    without memory and fills what a checkpoint holds, so a buffer would stay garbage, and a cast would round it. Later
    forwards copy nothing from the host, which no CUDA graph could.
    """

    def __init__(self, config: DFlashConfig, hf_config: Qwen3Config) -> None:
        super().__init__()
        self.config, self.hf_config = config, hf_config
        self.known: dict[torch.device, tuple[torch.Tensor, float]] = {}

    def _frequencies(self, device: torch.device) -> tuple[torch.Tensor, float]:
        if device not in self.known:
            self.known[device] = self._computed(device)
        return self.known[device]

    def _computed(self, device: torch.device) -> tuple[torch.Tensor, float]:
        """Radians a position [rotary_dim / 2], fp32, and the factor on cos and sin."""
        rope, rotary_dim = self.config.rope_parameters, self.config.rotary_dim
        if rope["rope_type"] != "default":
            return ROPE_INIT_FUNCTIONS[rope["rope_type"]](self.hf_config, device)
        exponents = torch.arange(0, rotary_dim, 2, dtype=torch.float, device=device) / rotary_dim
        return 1.0 / (rope["rope_theta"] ** exponents), 1.0

    def forward(
        self,
        position_ids: torch.Tensor,  # [B, S]
        dtype: torch.dtype,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """cos and sin, each [B, 1, S, rotary_dim], computed in fp32."""
        inv_freq, scaling = self._frequencies(position_ids.device)
        angles = position_ids[..., None].float() * inv_freq  # [B, S, rotary_dim / 2]
        angles = torch.cat((angles, angles), dim=-1).unsqueeze(1)
        return (angles.cos() * scaling).to(dtype), (angles.sin() * scaling).to(dtype)


def rotate(
    x: torch.Tensor,  # [B, heads, S, D]
    cos: torch.Tensor,  # [B, 1, S, rotary_dim]
    sin: torch.Tensor,  # [B, 1, S, rotary_dim]
) -> torch.Tensor:
    """NeoX-style RoPE on the first rotary_dim channels; the rest pass unchanged."""
    rotary_dim = cos.shape[-1]
    turned = x[..., :rotary_dim]
    first, second = turned.chunk(2, dim=-1)
    turned = turned * cos + torch.cat((-second, first), dim=-1) * sin
    return turned if rotary_dim == x.shape[-1] else torch.cat((turned, x[..., rotary_dim:]), dim=-1)


class DFlashAttention(nn.Module):
    """Block rows as queries; K/V from the context states and from the block rows."""

    def __init__(self, config: DFlashConfig, index: int) -> None:
        super().__init__()
        hidden, bias, self.head_dim = config.hidden_size, config.attention_bias, config.head_dim
        self.index, self.rule = index, config.layers[index]
        self.q_proj = nn.Linear(hidden, config.num_attention_heads * self.head_dim, bias=bias)
        self.k_proj = nn.Linear(hidden, config.num_key_value_heads * self.head_dim, bias=bias)
        self.v_proj = nn.Linear(hidden, config.num_key_value_heads * self.head_dim, bias=bias)
        self.o_proj = nn.Linear(config.num_attention_heads * self.head_dim, hidden, bias=bias)
        self.q_norm = nn.RMSNorm(self.head_dim, eps=config.rms_norm_eps)
        self.k_norm = nn.RMSNorm(self.head_dim, eps=config.rms_norm_eps)

    def _heads(
        self,
        x: torch.Tensor,  # [B, S, heads*D]
    ) -> torch.Tensor:
        return x.unflatten(-1, (-1, self.head_dim))  # [B, S, heads, D]

    def forward(
        self,
        hidden_states: torch.Tensor,  # [B, Q, H]
        context_states: torch.Tensor,  # [B, T, H]
        rope: tuple[torch.Tensor, torch.Tensor],  # each [B, 1, T+Q, rotary_dim]
        mask: torch.Tensor | BlockMask | None,  # bool [B, 1, Q, N+T+Q]; None: all see all
        cache: Cache | None,
    ) -> torch.Tensor:
        num_rows = hidden_states.shape[1]
        cos, sin = rope
        source = torch.cat((context_states, hidden_states), dim=1)  # [B, T+Q, H]
        q = self.q_norm(self._heads(self.q_proj(hidden_states))).transpose(1, 2)
        k = self.k_norm(self._heads(self.k_proj(source))).transpose(1, 2)
        v = self._heads(self.v_proj(source)).transpose(1, 2)
        q = rotate(q, cos[:, :, -num_rows:], sin[:, :, -num_rows:])
        k = rotate(k, cos, sin)
        if cache is not None:
            k, v = cache.update(k, v, self.index)
        out = attention(q, k, v, mask)
        return self.o_proj(out.transpose(1, 2).flatten(2))


class DFlashDecoderLayer(nn.Module):
    """A pre-norm Qwen3 layer whose attention also reads the context states."""

    def __init__(self, config: DFlashConfig, hf_config: Qwen3Config, index: int) -> None:
        super().__init__()
        self.self_attn = DFlashAttention(config, index)
        self.mlp = Qwen3MLP(hf_config)
        self.input_layernorm = nn.RMSNorm(config.hidden_size, eps=config.rms_norm_eps)
        self.post_attention_layernorm = nn.RMSNorm(config.hidden_size, eps=config.rms_norm_eps)

    def forward(
        self,
        hidden_states: torch.Tensor,  # [B, Q, H]
        context_states: torch.Tensor,  # [B, T, H]
        rope: tuple[torch.Tensor, torch.Tensor],
        mask: torch.Tensor | BlockMask | None,  # bool [B, 1, Q, N+T+Q]; None: all see all
        cache: Cache | None,
    ) -> torch.Tensor:
        normed = self.input_layernorm(hidden_states)
        hidden_states = hidden_states + self.self_attn(normed, context_states, rope, mask, cache)
        return hidden_states + self.mlp(self.post_attention_layernorm(hidden_states))


class DFlashDraftModel(PreTrainedModel):
    """A DFlash drafter in the published checkpoint layout.

    Built from a Transformers `Qwen3Config` that carries `block_size` and `dflash_config`, like the published
    config.json files. `dflash` is its checked, torch-free view.
    """

    config_class = Qwen3Config
    base_model_prefix = ""
    mask_embedding: torch.Tensor | None
    workspace: Workspace | None = None  # what `spec_generate(compile=True)` keeps for the next call
    round_costs: WeakKeyDictionary[nn.Module, dict[tuple[int, bool], RoundCosts]] | None = None  # of "auto"
    _supports_sdpa = True

    def __init__(self, config: Qwen3Config) -> None:
        super().__init__(config)
        self.dflash = dflash = DFlashConfig.from_dict(_raw_config(config), source=config.name_or_path or "<config>")
        if not dflash.is_neox_style:
            raise ValueError(f"{dflash.source}: is_neox_style = false is not supported by the Transformers backend")
        self.layers = nn.ModuleList(DFlashDecoderLayer(dflash, config, i) for i in range(dflash.num_hidden_layers))
        self.fc = nn.Linear(dflash.feature_width, dflash.hidden_size, bias=False)
        self.hidden_norm = nn.RMSNorm(dflash.hidden_size, eps=dflash.rms_norm_eps)
        self.norm = nn.RMSNorm(dflash.hidden_size, eps=dflash.rms_norm_eps)
        self.rotary_emb = DFlashRotaryEmbedding(dflash, config)
        own = set(getattr(config, "own_tensors", ()))
        self.embed_tokens = (
            nn.Embedding(dflash.vocab_size, dflash.hidden_size) if "embed_tokens.weight" in own else None
        )
        self.lm_head = (
            nn.Linear(dflash.hidden_size, dflash.draft_vocab_size, bias=False) if "lm_head.weight" in own else None
        )
        self.d2t = nn.Buffer(torch.zeros(dflash.draft_vocab_size, dtype=torch.long)) if "d2t" in own else None
        self.register_buffer("mask_embedding", None, persistent=False)  # [H]
        self.post_init()

    @property
    def block_size(self) -> int:
        return self.dflash.block_size

    @property
    def mask_token_id(self) -> int:
        return self.dflash.mask_token_id

    @property
    def target_layer_ids(self) -> tuple[int, ...]:
        return self.dflash.target_layer_ids

    @property
    def draft_token_ids(self) -> torch.Tensor | None:
        """Of a reduced draft vocabulary, the target's id of every row of the LM head, [D]; None: row i is token i."""
        return None if self.d2t is None else torch.arange(len(self.d2t), device=self.d2t.device) + self.d2t

    @classmethod
    def from_pretrained(cls, model: str, *, revision: str | None = None, **kwargs: Any) -> DFlashDraftModel:
        """Load a drafter directory or hub id. `dtype`, `device_map`, ... as in Transformers.

        Raises ValueError naming the file, key or tensor that is wrong or missing.
        """
        model_dir = resolve_model_dir(str(model), revision)
        dflash = DFlashConfig.from_pretrained(str(model_dir))
        shapes = read_tensor_shapes(model_dir)
        check_tensors(dflash, shapes)
        config = _hf_config(dflash)
        config.own_tensors = sorted({"embed_tokens.weight", "lm_head.weight", "d2t"} & shapes.keys())
        draft = super().from_pretrained(model_dir, config=config, **kwargs)
        mask_embedding = read_mask_embedding(model_dir, dflash)
        if mask_embedding is not None:
            draft.mask_embedding = mask_embedding.to(draft.device, draft.dtype)
        return draft

    def forward(
        self,
        position_ids: torch.Tensor,  # [B, T+Q]: the new context rows, then the block rows
        noise_embedding: torch.Tensor,  # [B, Q, H]
        target_hidden: torch.Tensor,  # [B, T, F*H]
        attention_mask: torch.Tensor | BlockMask | None = None,  # bool [B, 1, Q, N+T+Q], True = may attend
        past_key_values: Cache | None = None,
        **_: Any,
    ) -> torch.Tensor:
        """Hidden states of the block rows, [B, Q, H], ready for the LM head.

        With a `DynamicCache`, the N rows it holds must be the context positions 0..N-1; the block's own K/V are
        appended like the context's, so the caller crops them afterwards. With a `SlotCache`, N+T+Q is its number of
        visible slots, and `attention_mask` must leave out those that no row of the sequence is in.

        A `BlockMask` is for training, without a cache: attention then holds no [Q, T+Q] tensor. Either kind of mask is
        narrowed by each layer's own rule. The CPU has no gradients with a `BlockMask`.
        """
        num_rows = noise_embedding.shape[1]
        context_states = self.hidden_norm(self.fc(target_hidden))
        rope = self.rotary_emb(position_ids, noise_embedding.dtype)
        key_positions = _key_positions(position_ids, past_key_values)  # [B, N+T+Q]
        # Most drafters have one rule or two for all layers.
        masks = {
            rule: combined(attention_mask, rule, position_ids[:, -num_rows:], key_positions)
            for rule in {layer.self_attn.rule for layer in self.layers}
        }
        hidden_states = noise_embedding
        for layer in self.layers:
            hidden_states = layer(hidden_states, context_states, rope, masks[layer.self_attn.rule], past_key_values)
        return self.norm(hidden_states)

    def embed(
        self,
        token_ids: torch.Tensor,  # [B, Q]
        target: nn.Module,
    ) -> torch.Tensor:
        """Embeddings of block tokens [B, Q, H]: own table and mask embedding where shipped, else the target's."""
        table = self.embed_tokens if self.embed_tokens is not None else target.get_input_embeddings()
        embeds = table(token_ids)
        if self.mask_embedding is not None:
            embeds = torch.where((token_ids == self.mask_token_id)[..., None], self.mask_embedding, embeds)
        return embeds

    def draft_logits(
        self,
        hidden_states: torch.Tensor,  # [B, Q, H]
        target: nn.Module,
    ) -> torch.Tensor:
        """Logits over the target's vocabulary [B, Q, V]; ids outside a reduced draft vocabulary get -inf."""
        head = self.lm_head if self.lm_head is not None else target.get_output_embeddings()
        logits = head(hidden_states)
        target_ids = self.draft_token_ids
        if target_ids is None:
            return logits
        full = logits.new_full((*logits.shape[:-1], self.dflash.vocab_size), float("-inf"))
        full[..., target_ids] = logits
        return full

    def __getstate__(self) -> dict[str, Any]:
        """For copies and pickles: CUDA graphs and measured times belong to this object alone."""
        kept = {"workspace", "round_costs"}
        return {name: value for name, value in super().__getstate__().items() if name not in kept}

    def costs_with(self, target: nn.Module, num_sequences: int, compile: bool) -> RoundCosts:
        """What rounds with this target have taken so far."""
        if self.round_costs is None:
            self.round_costs = WeakKeyDictionary()
        return self.round_costs.setdefault(target, {}).setdefault((num_sequences, compile), RoundCosts())

    @torch.inference_mode()
    def spec_generate(
        self,
        input_ids: torch.Tensor | Mapping[str, torch.Tensor],  # [B, P]; or what a tokenizer returns
        target: nn.Module,
        max_new_tokens: int,
        temperature: float = 0.0,
        stop_token_ids: list[int] | int | None = None,
        return_stats: bool = False,
        *,
        mask_token_id: int | None = None,
        attention_mask: torch.Tensor | None = None,  # [B, P]; 0: padding, on either side
        top_k: int | None = None,
        top_p: float | None = None,
        generator: torch.Generator | None = None,
        logits_processor: LogitsProcessorList | None = None,
        tree_budget: int | str | None = None,
        draft_sample_method: str | None = None,
        calibration: Calibration | None = None,
        streamer: Any = None,
        compile: bool = False,
    ) -> torch.Tensor | SpecGenerateOutput:
        """Generate with `target`, drafting with this model: up to `max_new_tokens` tokens a sequence.

        At temperature 0 a text is greedy decoding of the target; above, every token is a sample of its distribution.

        stop_token_ids: a text ends at the first of these, which is kept.
        mask_token_id: need not be given; one that is not the drafter's raises ValueError.
        top_k, top_p, generator, logits_processor, streamer: as in `generate`. Processors see one sequence at a time.
        tree_budget: None verifies a chain of K tokens; N the N likeliest continuations; "auto" as many as pay.
        draft_sample_method: of a chain's tokens above temperature 0. "probabilistic" (the default) accepts more than
            "greedy", which keeps a likeliest token exactly when the target's own sample is the same.
        calibration: that of an earlier call's output, to go on with what it learned. Without it a call that samples
            learns afresh, so that a seed decides a text (not with "auto"), and a greedy tree takes probabilities as
            they are. A chain of likeliest tokens has nothing to learn.
        compile: make a round one CUDA graph. Graphs and caches stay with this model for the next call like this one.

        Returns token ids [B, P+n], or with `return_stats` a `SpecGenerateOutput`. Raises ValueError for a prompt, an
        option or a pair that cannot be, naming it and what was seen.
        """
        if mask_token_id is not None and mask_token_id != self.mask_token_id:
            raise ValueError(
                f"mask_token_id = {mask_token_id}, and {self.dflash.source} was trained with {self.mask_token_id}: "
                "leave the argument out"
            )
        if isinstance(input_ids, Mapping):  # Transformers' chat templates give ids and mask together since version 5
            attention_mask = input_ids.get("attention_mask") if attention_mask is None else attention_mask
            input_ids = input_ids["input_ids"]
        options = Options(
            limits=Limits(max_new_tokens, frozenset(id_list(stop_token_ids))),
            sampling=Sampling(temperature, top_k, top_p, generator),
            tree_budget=tree_budget,
            draft_sample_method=draft_sample_method,
            calibration=calibration,
            logits_processor=LogitsProcessorList(logits_processor or ()),
            streamer=streamer,
            compile=compile,
        )
        output = spec_generate(self, target, input_ids, attention_mask, options)
        return output if return_stats else output.sequences


def _key_positions(
    position_ids: torch.Tensor,  # [B, T+Q]
    cache: Cache | None,
) -> torch.Tensor:
    """Positions of all keys that attention gets, [B, N+T+Q]. In a `SlotCache` a slot's number is its position."""
    if isinstance(cache, SlotCache):
        return torch.arange(cache.plan.num_visible, device=position_ids.device).expand(position_ids.shape[0], -1)
    cached = cache.get_seq_length() if cache is not None else 0
    past = torch.arange(cached, device=position_ids.device).expand(position_ids.shape[0], -1)
    return torch.cat((past, position_ids), dim=1)


def _raw_config(config: Qwen3Config) -> dict[str, Any]:
    """A Qwen3Config as a raw config.json. Qwen3Config forgets sliding_window unless use_sliding_window is set."""
    raw = config.to_dict()
    raw.pop("use_sliding_window", None)
    return raw


def _hf_config(dflash: DFlashConfig) -> Qwen3Config:
    """The Transformers config of a checked drafter config, whichever layout it came from."""
    fields = asdict(dflash)
    layers = fields.pop("layers")
    window = next((layer["sliding_window"] for layer in layers if layer["sliding_window"]), None)
    kinds = ["full_attention" if layer["sliding_window"] is None else "sliding_attention" for layer in layers]
    causal = {layer["causal"] for layer in layers}
    dflash_keys = {key: fields.pop(key) for key in ("mask_token_id", "target_layer_ids")}
    if len(causal) == 1:
        dflash_keys["causal"] = causal.pop()
    for derived in ("is_quantized", "source"):
        fields.pop(derived)
    return Qwen3Config(
        **fields | {"rope_parameters": dict(dflash.rope_parameters)},
        architectures=["DFlashDraftModel"],
        layer_types=kinds,
        use_sliding_window=window is not None,
        sliding_window=window,
        max_window_layers=len(kinds),
        tie_word_embeddings=False,
        dflash_config=dflash_keys | {"target_layer_ids": list(dflash.target_layer_ids)},
        name_or_path=dflash.source,
    )
