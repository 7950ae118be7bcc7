# SPDX-License-Identifier: Apache-2.0
"""A random target of a few thousand weights, and responses with an obvious pattern, for tests of the training."""

import math

import torch
from transformers import Qwen3Config, Qwen3ForCausalLM

from vllm_dflash.training.responses import Response

VOCAB_SIZE, MASK_ID = 32, 3


def tiny_target(seed: int = 0) -> Qwen3ForCausalLM:
    torch.manual_seed(seed)
    config = Qwen3Config(
        vocab_size=VOCAB_SIZE,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=4,
        num_attention_heads=2,
        num_key_value_heads=1,
        head_dim=16,
        max_position_embeddings=128,
        rope_parameters={"rope_type": "default", "rope_theta": 10_000.0},
        tie_word_embeddings=True,
        initializer_range=0.5,
        bos_token_id=None,
        eos_token_id=2,
    )
    return Qwen3ForCausalLM(config).eval()


def counting_responses(count: int) -> list[Response]:
    """Tokens that count up from a different start each: 5 6 7 ... 31 4 5 ..."""
    sequences = [[4 + (start + i) % 28 for i in range(40)] for start in range(count)]
    return [Response(sequence[:8], sequence[8:], 0.0) for sequence in sequences]


def plain_loss(logits: torch.Tensor, labels: torch.Tensor, gamma: float) -> float:
    """Cross-entropy of the rows that have a label, in a loop: the mean by weights exp(-(k-1)/gamma), row by row."""
    total = weights = 0.0
    for block, names in zip(logits.flatten(0, -3), labels.flatten(0, -2).tolist(), strict=True):
        for k, name in enumerate(names):
            if name >= 0:
                weight = math.exp(-k / gamma)
                total -= weight * block[k].double().log_softmax(-1)[name].item()
                weights += weight
    return total / weights
