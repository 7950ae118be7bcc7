# SPDX-License-Identifier: Apache-2.0
"""The memory estimate against sums worked out by hand."""

import pytest

from tests.helpers import drafter_config, target_config
from tests.unit.doctor.doctor_facts import facts
from vllm_dflash.doctor.checks.memory import (
    check_memory,
    check_tensor_parallel,
    kv_bytes_per_token,
    kv_value_bytes,
    size_text,
    target_kv_values,
)
from vllm_dflash.doctor.facts import Asked, Machine, TensorFacts, Weights

GIB = 2**30


def weights(num_bytes: int) -> Weights:
    return Weights({"w": TensorFacts((1,), "BF16", num_bytes)})


def test_kv_bytes_of_the_tiny_pair() -> None:
    # Target: 6 layers x (K and V) x 2 heads x 32 = 768 values; drafter: 2 layers, 256 values. Two bytes each.
    assert kv_bytes_per_token(facts()) == (1536, 512)
    assert kv_bytes_per_token(facts(asked=Asked(kv_cache_dtype="fp8"))) == (768, 256)
    assert kv_bytes_per_token(facts(asked=Asked(dtype="float32"))) == (3072, 1024)


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        # Qwen3-8B: 36 layers, 8 KV heads of 128.
        ({"num_hidden_layers": 36, "num_attention_heads": 32, "num_key_value_heads": 8, "head_dim": 128}, 73728),
        # DeepSeek-V3: 61 layers of latents of 512 + 64.
        ({"num_hidden_layers": 61, "num_attention_heads": 128, "kv_lora_rank": 512, "qk_rope_head_dim": 64}, 35136),
        # One attention layer in four, 2 KV heads of 256.
        (
            {
                "num_hidden_layers": 4,
                "num_attention_heads": 16,
                "num_key_value_heads": 2,
                "head_dim": 256,
                "layer_types": ["linear_attention"] * 3 + ["full_attention"],
            },
            1024,
        ),
        # No head_dim, no KV heads: 8 heads of 64 / 8.
        ({"num_hidden_layers": 1, "num_attention_heads": 8, "hidden_size": 64}, 128),
        ({}, None),
        ({"num_hidden_layers": 1, "num_attention_heads": 8, "hidden_size": 64, "num_key_value_heads": "x"}, None),
        ({"num_hidden_layers": 1, "num_attention_heads": 8, "head_dim": "x"}, None),
    ],
)
def test_values_that_a_target_caches(changes: dict, expected: int | None) -> None:
    assert target_kv_values(changes) == expected


QWEN3_8B = {"num_hidden_layers": 36, "num_attention_heads": 32, "num_key_value_heads": 8, "head_dim": 128}
DEEPSEEK_V3 = {
    "num_hidden_layers": 61,
    "num_attention_heads": 128,
    "num_key_value_heads": 128,
    "kv_lora_rank": 512,
    "qk_rope_head_dim": 64,
}


@pytest.mark.parametrize(
    ("target", "ranks", "expected"),
    [
        # 36 layers x (K and V) x 8, 4, 1 heads x 128; with 16 ranks two of them hold the same head.
        (QWEN3_8B, 1, 73728),
        (QWEN3_8B, 2, 36864),
        (QWEN3_8B, 8, 9216),
        (QWEN3_8B, 16, 9216),
        # Every rank holds the latents whole.
        (DEEPSEEK_V3, 8, 35136),
    ],
)
def test_values_that_a_rank_caches(target: dict, ranks: int, expected: int) -> None:
    assert target_kv_values(target, ranks) == expected


def test_kv_bytes_of_a_rank() -> None:
    # Each of 2 ranks has 1 of 2 heads; 4 ranks hold two copies of each, so one of them has no less.
    assert kv_bytes_per_token(facts(asked=Asked(tensor_parallel_size=2))) == (768, 256)
    assert kv_bytes_per_token(facts(asked=Asked(tensor_parallel_size=4))) == (768, 256)


@pytest.mark.parametrize(
    ("kv_cache_dtype", "dtype", "expected"),
    [("auto", "bfloat16", 2), ("auto", "float32", 4), ("fp8_e5m2", "float32", 1), ("nvfp4", "bfloat16", 0.5)],
)
def test_bytes_of_a_cached_value(kv_cache_dtype: str, dtype: str, expected: float) -> None:
    assert kv_value_bytes(kv_cache_dtype, dtype) == expected


def test_sizes_are_written_in_their_unit() -> None:
    assert [size_text(n) for n in (0, 1023, 1536, 3 * GIB)] == ["0 B", "1023 B", "1.5 KiB", "3.0 GiB"]


def memory(target: int, drafter: int, gpus: tuple[tuple[str, int], ...], ranks: int = 1) -> tuple[str, str]:
    (found,) = check_memory(
        facts(
            asked=Asked(tensor_parallel_size=ranks),
            machine=Machine(gpus),
            target_weights=weights(target),
            drafter_weights=weights(drafter),
        )
    )
    return found.severity.name.lower(), found.seen


def test_room_for_the_cache() -> None:
    # 0.92 x 10 GiB - 8 GiB = 1.2 GiB, by 2048 bytes a token: 629,145.
    severity, seen = memory(7 * GIB, GIB, (("GPU", 10 * GIB),))
    assert severity == "ok"
    assert "room for about 629,145 tokens" in seen


def test_no_room() -> None:
    severity, seen = memory(10 * GIB, GIB, (("GPU", 10 * GIB),))
    assert severity == "warning"
    assert "more than 9.2 GiB" in seen


def test_ranks_share_the_weights() -> None:
    # (0.92 x 10 - 5.5) GiB a rank, by 1024 bytes a token: 3.7 GiB / 1 KiB.
    severity, seen = memory(10 * GIB, GIB, (("GPU", 10 * GIB),) * 2, ranks=2)
    assert severity == "ok"
    assert "room for about 3,879,731 tokens" in seen


def test_ranks_beyond_the_kv_heads_share_no_more_of_the_cache() -> None:
    # (0.92 x 10 - 2.75) GiB a rank, by 1024 bytes a token, as with two ranks: 6.45 GiB / 1 KiB.
    _, seen = memory(10 * GIB, GIB, (("GPU", 10 * GIB),) * 4, ranks=4)
    assert "KV cache 768 B + 256 B (drafter) a token on each rank" in seen
    assert "room for about 6,763,315 tokens" in seen


def test_without_a_gpu_the_numbers_alone() -> None:
    severity, seen = memory(7 * GIB, GIB, ())
    assert severity == "ok"
    assert seen == "weights 7.0 GiB + 1.0 GiB (drafter), KV cache 1.5 KiB + 512 B (drafter) a token; no GPU here"


def test_heads_that_do_not_divide() -> None:
    (found,) = check_tensor_parallel(facts(target_config(num_attention_heads=6), asked=Asked(tensor_parallel_size=4)))
    assert found.severity.name == "ERROR"
    assert "the target has 6" in found.seen
    assert "drafter" not in found.seen


def tensor_parallel(target: dict, drafter: dict, ranks: int) -> list[tuple[str, str]]:
    these = facts(target_config(**target), drafter_config(**drafter), asked=Asked(tensor_parallel_size=ranks))
    return [(one.severity.name, one.seen) for one in check_tensor_parallel(these)]


def test_kv_heads_that_ranks_cannot_share() -> None:
    ((severity, seen),) = tensor_parallel(
        {"num_attention_heads": 12, "num_key_value_heads": 3},
        {"num_attention_heads": 12, "num_key_value_heads": 6},
        ranks=4,
    )
    assert severity == "ERROR"
    assert "neither divides the KV heads nor is a multiple of them: the target has 3, the drafter has 6" in seen


@pytest.mark.parametrize(
    ("target", "drafter"),
    [
        # Two ranks hold the same head; two heads a rank.
        ({"num_attention_heads": 16, "num_key_value_heads": 2}, {"num_attention_heads": 16, "num_key_value_heads": 8}),
        # Latents are no heads.
        (
            {"num_attention_heads": 16, "num_key_value_heads": 3, "kv_lora_rank": 512},
            {"num_attention_heads": 16, "num_key_value_heads": 4},
        ),
    ],
)
def test_kv_heads_that_ranks_can_share(target: dict, drafter: dict) -> None:
    assert tensor_parallel(target, drafter, ranks=4) == [("OK", "4 ranks, heads dealt out evenly")]


def test_more_ranks_than_gpus() -> None:
    these = facts(asked=Asked(tensor_parallel_size=2), machine=Machine((("GPU", GIB),)))
    assert [one.severity.name for one in check_tensor_parallel(these)] == ["OK", "WARNING"]
