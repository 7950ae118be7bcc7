# SPDX-License-Identifier: Apache-2.0
"""The DFlash draft model on vLLM's parallel layers: draft layers, embedding, logits (paper, section 3).

Qwen3-style layers over the block's rows only. The context is already in the paged cache (context_kv.py), so attention
is vLLM's ordinary paged attention, non-causal. Embedding and LM head are the target's unless the checkpoint brings
its own.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable

import torch
from torch import nn
from vllm.compilation.backends import set_model_tag
from vllm.compilation.decorators import support_torch_compile
from vllm.config import VllmConfig
from vllm.distributed import get_tensor_model_parallel_world_size
from vllm.model_executor.layers.attention import Attention
from vllm.model_executor.layers.layernorm import RMSNorm
from vllm.model_executor.layers.linear import QKVParallelLinear, RowParallelLinear
from vllm.model_executor.layers.logits_processor import LogitsProcessor
from vllm.model_executor.layers.quantization import QuantizationConfig
from vllm.model_executor.layers.rotary_embedding import get_rope
from vllm.model_executor.layers.rotary_embedding.base import RotaryEmbedding
from vllm.model_executor.layers.vocab_parallel_embedding import ParallelLMHead, VocabParallelEmbedding
from vllm.model_executor.models.llama import LlamaMLP
from vllm.model_executor.models.utils import get_draft_quant_config, maybe_prefix
from vllm.triton_utils import HAS_TRITON

from vllm_dflash.config import DFlashConfig, LayerAttention
from vllm_dflash.model_executor.caches import CACHE_DTYPES, CACHE_LAYOUT_BACKENDS
from vllm_dflash.model_executor.context_kv import ContextKV
from vllm_dflash.model_executor.fp8_weights import check_fp8_device, use_fp8_weights
from vllm_dflash.model_executor.weights import load_draft_weights
from vllm_dflash.options import DFlashOptions

#: Token ids [N] -> embeddings [N, H].
Embed = Callable[[torch.Tensor], torch.Tensor]


def is_whole_on_every_rank(vllm_config: VllmConfig) -> bool:
    """Whether the draft layers are not split by tensor parallelism: `"draft_tensor_parallel_size": 1`.

    Embedding and LM head are the target's, and split as these are, whatever the draft layers do.
    """
    draft_size = vllm_config.speculative_config.draft_tensor_parallel_size
    return draft_size == 1 and vllm_config.parallel_config.tensor_parallel_size > 1


class DFlashAttention(nn.Module):
    """Queries, keys and values of the block rows; the context's keys and values wait in the cache."""

    def __init__(
        self,
        config: DFlashConfig,
        rule: LayerAttention,
        max_position: int,
        vllm_config: VllmConfig,
        quant_config: QuantizationConfig | None,
        prefix: str,
        cache_name: str,
    ) -> None:
        super().__init__()
        is_whole = is_whole_on_every_rank(vllm_config)
        self.causal = rule.causal
        self.head_dim = config.head_dim
        self.qkv_proj = QKVParallelLinear(
            config.hidden_size,
            self.head_dim,
            config.num_attention_heads,
            config.num_key_value_heads,
            bias=config.attention_bias,
            quant_config=quant_config,
            prefix=f"{prefix}.qkv_proj",
            disable_tp=is_whole,
        )
        self.num_heads, self.num_kv_heads = self.qkv_proj.num_heads, self.qkv_proj.num_kv_heads
        self.o_proj = RowParallelLinear(
            config.num_attention_heads * self.head_dim,
            config.hidden_size,
            bias=config.attention_bias,
            quant_config=quant_config,
            prefix=f"{prefix}.o_proj",
            disable_tp=is_whole,
        )
        self.q_norm = RMSNorm(self.head_dim, eps=config.rms_norm_eps)
        self.k_norm = RMSNorm(self.head_dim, eps=config.rms_norm_eps)
        self.rotary_emb = get_rope(
            self.head_dim, max_position, config.is_neox_style, rope_parameters=dict(config.rope_parameters)
        )
        self.attn = Attention(
            self.num_heads,
            self.head_dim,
            self.head_dim**-0.5,
            num_kv_heads=self.num_kv_heads,
            cache_config=vllm_config.cache_config,
            quant_config=quant_config,
            per_layer_sliding_window=rule.sliding_window,
            prefix=cache_name,
        )

    def forward(
        self,
        positions: torch.Tensor,  # [R*Q]
        hidden_states: torch.Tensor,  # [R*Q, H]
    ) -> torch.Tensor:
        qkv, _ = self.qkv_proj(hidden_states)
        kv_size = self.num_kv_heads * self.head_dim
        q, k, v = qkv.split([self.num_heads * self.head_dim, kv_size, kv_size], dim=-1)
        q = self.q_norm(q.unflatten(-1, (self.num_heads, self.head_dim))).flatten(-2)
        k = self.k_norm(k.unflatten(-1, (self.num_kv_heads, self.head_dim))).flatten(-2)
        q, k = self.rotary_emb(positions, q, k)
        output, _ = self.o_proj(self.attn(q, k, v))
        return output


def writes_in_one_launch(attention: DFlashAttention) -> bool:
    """Whether one of this package's kernels can norm, rotate and write the keys of all draft layers."""
    known_layout = attention.attn.attn_backend.get_name() in CACHE_LAYOUT_BACKENDS
    known_rotation = type(attention.rotary_emb).forward_cuda is RotaryEmbedding.forward_cuda
    return HAS_TRITON and known_layout and known_rotation and attention.attn.kv_cache_dtype in CACHE_DTYPES


class DFlashDecoderLayer(nn.Module):
    """A pre-norm Qwen3 layer."""

    def __init__(
        self,
        config: DFlashConfig,
        attention: DFlashAttention,
        vllm_config: VllmConfig,
        quant_config: QuantizationConfig | None,
        prefix: str,
    ) -> None:
        super().__init__()
        self.self_attn = attention
        self.mlp = LlamaMLP(
            config.hidden_size,
            config.intermediate_size,
            config.hidden_act,
            quant_config=quant_config,
            prefix=f"{prefix}.mlp",
            disable_tp=is_whole_on_every_rank(vllm_config),
        )
        self.input_layernorm = RMSNorm(config.hidden_size, eps=config.rms_norm_eps)
        self.post_attention_layernorm = RMSNorm(config.hidden_size, eps=config.rms_norm_eps)

    def forward(
        self,
        positions: torch.Tensor,  # [R*Q]
        hidden_states: torch.Tensor,  # [R*Q, H]
        residual: torch.Tensor | None,  # [R*Q, H]
    ) -> tuple[torch.Tensor, torch.Tensor]:
        if residual is None:
            residual = hidden_states
            hidden_states = self.input_layernorm(hidden_states)
        else:
            hidden_states, residual = self.input_layernorm(hidden_states, residual)
        hidden_states = self.self_attn(positions, hidden_states)
        hidden_states, residual = self.post_attention_layernorm(hidden_states, residual)
        return self.mlp(hidden_states), residual


@support_torch_compile(dynamic_arg_dims={"positions": 0, "inputs_embeds": 0})
class DFlashBackbone(nn.Module):
    """The draft layers and their final norm: what a compiled graph or a CUDA graph holds."""

    def __init__(self, *, vllm_config: VllmConfig, config: DFlashConfig, prefix: str = "") -> None:
        super().__init__()
        quant_config = get_draft_quant_config(vllm_config)
        num_target_layers = vllm_config.model_config.get_total_num_hidden_layers()
        # Drafts go as far as the target does, whatever the drafter's own limit says.
        max_position = max(config.max_position_embeddings, vllm_config.model_config.max_model_len)

        def make_layer(index: int, rule: LayerAttention) -> DFlashDecoderLayer:
            attention = DFlashAttention(
                config,
                rule,
                max_position,
                vllm_config,
                quant_config,
                prefix=f"layers.{index}.self_attn",
                # vLLM orders K/V caches by the number in the name, which must differ from all of the target's.
                cache_name=maybe_prefix(prefix, f"layers.{num_target_layers + index}.self_attn.attn"),
            )
            return DFlashDecoderLayer(config, attention, vllm_config, quant_config, prefix=f"layers.{index}")

        self.layers = nn.ModuleList(make_layer(index, rule) for index, rule in enumerate(config.layers))
        self.norm = RMSNorm(config.hidden_size, eps=config.rms_norm_eps)

    def forward(
        self,
        positions: torch.Tensor,  # [R*Q]
        inputs_embeds: torch.Tensor,  # [R*Q, H]
    ) -> torch.Tensor:
        hidden_states, residual = inputs_embeds, None
        for layer in self.layers:
            hidden_states, residual = layer(positions, hidden_states, residual)
        hidden_states, _ = self.norm(hidden_states, residual)
        return hidden_states


class DFlashDraftModel(nn.Module):
    """The whole drafter, as vLLM's model loader builds it.

    Its calls in the order of a step: `context_kv`, `embed`, `forward`, `get_top_tokens` or `compute_logits`.
    """

    def __init__(self, *, vllm_config: VllmConfig, prefix: str = "") -> None:
        super().__init__()
        draft_config = vllm_config.speculative_config.draft_model_config
        self.config = config = DFlashConfig.from_pretrained(draft_config.model, draft_config.revision)
        self.vllm_config = vllm_config
        options = DFlashOptions.from_additional_config(vllm_config.additional_config)
        # Each is compiled apart, and vLLM keeps compiled graphs apart by tag.
        with set_model_tag("dflash_backbone"):
            self.backbone = DFlashBackbone(vllm_config=vllm_config, config=config, prefix=maybe_prefix(prefix, "draft"))
        with set_model_tag("dflash_context"):
            self.context_kv = ContextKV(
                vllm_config=vllm_config,
                config=config,
                projections=[attention.qkv_proj for attention in self.attentions],
                rotary_emb=self.attentions[0].rotary_emb,
                raw=writes_in_one_launch(self.attentions[0]),
            )
        self.uses_fp8_weights = options.draft_weights == "fp8"
        if self.uses_fp8_weights:
            self._use_fp8_weights()
        self.logits_processor = LogitsProcessor(config.draft_vocab_size)
        self.embed_tokens: nn.Module | None = None
        self._target_embed: Embed | None = None
        self.lm_head: nn.Module | None = None
        self.register_buffer("draft_id_to_target_id", None, persistent=False)  # [draft_vocab_size]
        self.register_buffer("mask_embedding", None, persistent=False)  # [H]

    def _use_fp8_weights(self) -> None:
        if self.config.is_quantized:
            raise ValueError(
                f'{self.config.source} is quantized already: leave out --additional-config\'s "dflash": "draft_weights"'
            )
        check_fp8_device()
        use_fp8_weights(self.backbone)
        use_fp8_weights(self.context_kv)

    @property
    def attentions(self) -> list[DFlashAttention]:
        """The attention of every draft layer, in order."""
        return [layer.self_attn for layer in self.backbone.layers]

    def share_with_target(self, embed_input_ids: Embed, lm_head: nn.Module) -> None:
        """Use the target's embedding and LM head where the checkpoint brought none of its own.

        `embed_input_ids` is the target's whole embedding step, not its bare table: some targets scale it.
        """
        self._target_embed = embed_input_ids
        if self.lm_head is None:
            self.lm_head = lm_head

    def embed(
        self,
        input_ids: torch.Tensor,  # [R*Q]
    ) -> torch.Tensor:
        """Embeddings of the block rows [R*Q, H]."""
        embed = self.embed_tokens if self.embed_tokens is not None else self._target_embed
        assert embed is not None, "embed() before share_with_target()"
        embeds = embed(input_ids)
        if self.mask_embedding is not None:
            embeds = torch.where((input_ids == self.config.mask_token_id)[:, None], self.mask_embedding, embeds)
        return embeds

    def forward(
        self,
        positions: torch.Tensor,  # [R*Q]
        inputs_embeds: torch.Tensor,  # [R*Q, H]
    ) -> torch.Tensor:
        """Hidden states of the block rows [R*Q, H]. Needs vLLM's forward context for the paged attention."""
        return self.backbone(positions=positions, inputs_embeds=inputs_embeds)

    def compute_logits(
        self,
        hidden_states: torch.Tensor,  # [N, H]
    ) -> torch.Tensor:
        """Logits over the draft vocabulary, [N, draft_vocab_size]; `to_target_ids` maps its ids."""
        return self.logits_processor(self.lm_head, hidden_states)

    def get_top_tokens(
        self,
        hidden_states: torch.Tensor,  # [N, H]
    ) -> torch.Tensor:
        """The likeliest target token of every row, [N]. Under TP each rank reduces its own part of the vocabulary."""
        if get_tensor_model_parallel_world_size() > 1:
            draft_ids = self.logits_processor.get_top_tokens(self.lm_head, hidden_states)
        else:
            # max() rather than argmax(): several times faster on a CPU in bf16
            draft_ids = self.compute_logits(hidden_states).max(dim=-1).indices
        return self.to_target_ids(draft_ids)

    def to_target_ids(
        self,
        draft_ids: torch.Tensor,  # [N]
    ) -> torch.Tensor:
        """Ids of a reduced draft vocabulary as the target's ids, [N]."""
        return draft_ids if self.draft_id_to_target_id is None else self.draft_id_to_target_id[draft_ids]

    def to_target_logits(
        self,
        logits: torch.Tensor,  # [N, draft_vocab_size]
    ) -> torch.Tensor:
        """Logits over the target's vocabulary, [N, V]: a token that the drafter cannot draft has -inf."""
        if self.draft_id_to_target_id is None:
            return logits
        wide = logits.new_full((logits.shape[0], self.config.vocab_size), float("-inf"))
        wide[:, self.draft_id_to_target_id] = logits
        return wide

    def load_weights(self, weights: Iterable[tuple[str, torch.Tensor]]) -> set[str]:
        """Load the published layout. Raises ValueError naming a missing, extra or misshapen tensor."""
        return load_draft_weights(self, weights)

    def new_embedding(self) -> VocabParallelEmbedding:
        """An embedding table of the drafter's own."""
        return VocabParallelEmbedding(self.config.vocab_size, self.config.hidden_size)

    def new_lm_head(self) -> ParallelLMHead:
        """An LM head of the drafter's own."""
        return ParallelLMHead(self.config.draft_vocab_size, self.config.hidden_size)
