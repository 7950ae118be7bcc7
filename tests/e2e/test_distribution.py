# SPDX-License-Identifier: Apache-2.0
"""At temperature 1 the distribution of outputs is the target's: a chi-square test against exact probabilities.

A toy target over 8 tokens, so that the probability of every continuation can be computed by Transformers. False-alarm
rate of the test: ALPHA. Its power is shown by a planted bias that it must reject.
"""

from __future__ import annotations

import itertools
from collections import Counter

import pytest
import torch
from scipy.stats import chisquare
from transformers import Qwen3Config, Qwen3ForCausalLM

from tests.e2e.engines import dflash, run_engine
from vllm_dflash.hf import DFlashDraftModel

pytestmark = pytest.mark.engine

ALPHA = 1e-4
VOCAB, MASK, LENGTH, SAMPLES = 8, 7, 4, 6000
PROMPT = [1, 2, 3, 4, 5, 6]
SHAPE = {
    "vocab_size": VOCAB, "hidden_size": 64, "intermediate_size": 64, "num_attention_heads": 2,
    "num_key_value_heads": 1, "head_dim": 32, "max_position_embeddings": 64,
}  # fmt: skip


@pytest.fixture(scope="module")
def pair(tmp_path_factory):
    folder = tmp_path_factory.mktemp("toy")
    torch.manual_seed(7)
    Qwen3ForCausalLM(Qwen3Config(**SHAPE, num_hidden_layers=4, initializer_range=0.3)).save_pretrained(
        folder / "target"
    )
    config = Qwen3Config(
        **SHAPE, num_hidden_layers=1, initializer_range=0.3, architectures=["DFlashDraftModel"], block_size=4,
        num_target_layers=4, dflash_config={"mask_token_id": MASK, "target_layer_ids": [1, 2]},
    )  # fmt: skip
    DFlashDraftModel(config).save_pretrained(folder / "drafter")
    return folder


@pytest.fixture(scope="module")
def exact(pair):
    """P(continuation) of every sequence of LENGTH tokens, by the chain rule over Transformers' probabilities."""
    target = Qwen3ForCausalLM.from_pretrained(pair / "target", dtype=torch.float32).eval()
    continuations = list(itertools.product(range(VOCAB), repeat=LENGTH))
    with torch.no_grad():
        ids = torch.tensor([PROMPT + list(c) for c in continuations])
        log_probs = target(ids).logits[:, len(PROMPT) - 1 : -1].log_softmax(dim=-1)
    chosen = torch.tensor(continuations)[..., None]
    return dict(zip(continuations, log_probs.gather(-1, chosen).sum(dim=(1, 2)).exp().tolist(), strict=True))


def sample(pair, folder, plant_bias=0.0):
    run = {"name": "t1", "prompts": [PROMPT] * SAMPLES, "max_tokens": LENGTH, "temperature": 1.0}
    llm = {
        "model": str(pair / "target"), "dtype": "float32", "max_model_len": 64, "max_num_seqs": 256, "seed": 1234,
    }  # fmt: skip
    return run_engine(folder, llm | dflash(pair / "drafter"), [run], plant_bias=plant_bias)["t1"]


def p_value(token_ids, exact) -> float:
    """Chi-square of the observed continuations; rare ones pooled so that every cell expects at least 10."""
    counts = Counter(map(tuple, token_ids))
    total = len(token_ids)
    common = [c for c, p in exact.items() if p * total >= 10]
    observed = [counts[c] for c in common]
    expected = [exact[c] * total for c in common]
    observed.append(total - sum(observed))
    expected.append(total - sum(expected))
    return chisquare(observed, expected).pvalue


def test_distribution_is_the_targets(pair, exact, tmp_path):
    run = sample(pair, tmp_path)
    accepted = run.counters["vllm:spec_decode_num_accepted_tokens"]
    assert accepted > SAMPLES / 20, "too few accepted drafts for the test to mean anything"
    assert p_value(run.token_ids, exact) > ALPHA


def test_planted_bias_is_noticed(pair, exact, tmp_path):
    assert p_value(sample(pair, tmp_path, plant_bias=0.5).token_ids, exact) < ALPHA
