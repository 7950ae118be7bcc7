# SPDX-License-Identifier: Apache-2.0
"""Checks as functions of facts: what the planted faults of the shipped pair do not reach."""

from collections.abc import Iterable
from typing import Any

import pytest

from tests.helpers import ABSENT, drafter_config, speculators_config, target_config
from tests.unit.doctor.doctor_facts import facts
from vllm_dflash.doctor.checks.engine import check_target_architecture, check_version
from vllm_dflash.doctor.checks.kind import check_config_keys, check_kind
from vllm_dflash.doctor.checks.layers import check_target_layers
from vllm_dflash.doctor.checks.lengths import check_block_size, check_context_length
from vllm_dflash.doctor.checks.mask_token import check_mask_token
from vllm_dflash.doctor.checks.pair import check_identity, check_pair
from vllm_dflash.doctor.checks.precision import check_dtype, check_kv_cache_dtype, check_quantization
from vllm_dflash.doctor.checks.rope import check_rope, target_rope
from vllm_dflash.doctor.checks.tables import check_tables
from vllm_dflash.doctor.checks.template import check_templates
from vllm_dflash.doctor.checks.windows import check_prefix_cache, check_windows
from vllm_dflash.doctor.facts import Asked, TensorFacts, TokenizerFacts, Weights
from vllm_dflash.doctor.finding import Finding
from vllm_dflash.engine_facts import EngineFacts


def brief(findings: Iterable[Finding]) -> list[tuple[str, str]]:
    return [(one.severity.name.lower(), one.id) for one in findings]


@pytest.mark.parametrize(
    ("engine", "severity"),
    [
        (EngineFacts(), "info"),
        (EngineFacts(version="0.31.0", supported="0.32.x"), "warning"),
        (EngineFacts(version="0.32.0", is_supported=True, is_switched_off=True), "info"),
        (EngineFacts(version="0.32.0", is_supported=True), "ok"),
    ],
)
def test_version(engine: EngineFacts, severity: str) -> None:
    assert brief(check_version(facts(engine=engine))) == [(severity, "vllm-version")]


@pytest.mark.parametrize(
    ("knows", "taps", "severity"),
    [
        (None, None, "info"),
        (False, None, "warning"),
        (True, None, "info"),
        (True, False, "error"),
        (True, True, "ok"),
    ],
)
def test_target_architecture(knows: bool | None, taps: bool | None, severity: str) -> None:
    engine = EngineFacts(knows_target=knows, taps_target=taps)
    assert brief(check_target_architecture(facts(engine=engine))) == [(severity, "target-architecture")]


@pytest.mark.parametrize(
    ("changes", "severity"),
    [
        ({}, "ok"),
        ({"architectures": ["LiLiCorrDraftModel"]}, "warning"),
        ({"architectures": ["Qwen3DSparkModel"]}, "warning"),
        ({"architectures": ["DFlashLagunaForCausalLM"]}, "warning"),
        ({"attention_value_scale": 0.5}, "warning"),
        ({"architectures": ["LlamaForCausalLMEagle3"]}, "error"),
        ({"architectures": ABSENT}, "error"),
    ],
)
def test_kinds(changes: dict[str, Any], severity: str) -> None:
    assert brief(check_kind(facts(drafter=drafter_config(**changes)))) == [(severity, "drafter-kind")]


def test_keys_of_another_kind_are_not_complained_about() -> None:
    found = check_config_keys(facts(drafter=drafter_config(architectures=["DFlash2DraftModel"], conv_kernel_size=2)))
    assert brief(found) == [("info", "drafter-config")]


def test_speculators_layer_ids_are_named_by_their_own_key() -> None:
    (found,) = check_config_keys(facts(drafter=speculators_config(aux_hidden_state_layer_ids=[0, 4])))
    assert (found.severity.name, found.id) == ("ERROR", "target-layers")
    assert "aux_hidden_state_layer_ids" in found.seen


def test_speculators_note_of_another_target() -> None:
    of_llama = target_config(architectures=["LlamaForCausalLM"])
    assert brief(check_identity(facts(of_llama, speculators_config()))) == [("warning", "target-identity")]
    assert brief(check_identity(facts(drafter=speculators_config()))) == [("ok", "target-identity")]


def test_a_target_that_does_not_tell_its_width() -> None:
    found = brief(check_pair(facts(target_config(hidden_size=ABSENT))))
    assert ("info", "hidden-size") in found
    assert not [one for one in found if one[0] == "error"]


def test_the_decoder_of_a_multimodal_target_counts() -> None:
    nested = {"architectures": ["Vision"], "hidden_size": 7, "text_config": target_config()}
    assert {severity for severity, _ in brief(check_pair(facts(nested)))} == {"ok"}


@pytest.mark.parametrize(
    # Of 6 layers and 2 taps the formula says 1 and 3.
    ("ids", "severity"),
    [([1, 3], "ok"), ([2, 4], "warning"), ([0, 2], "info"), ([1, 5], "info")],
)
def test_target_layers(ids: list[int], severity: str) -> None:
    raw = drafter_config(dflash_config={"target_layer_ids": ids})
    assert brief(check_target_layers(facts(drafter=raw))) == [(severity, "target-layers")]


TOKENS = {0: "<end>", 1: "<user>", 5: "dog", 94: "<|mask|>"}


def tokenizer(mask_token: str | None = None) -> TokenizerFacts:
    return TokenizerFacts(TOKENS, frozenset({0, 1, 94}), mask_token, {"eos_token": 0}, ("<user>{{ m }}",))


@pytest.mark.parametrize(
    ("mask", "named", "expected"),
    [
        (95, None, ("ok", "mask-token")),  # a free row
        (94, None, ("ok", "mask-token")),
        (94, "<|mask|>", ("ok", "mask-token")),
        (95, "<|mask|>", ("warning", "mask-token")),
        (5, None, ("warning", "mask-token-text")),
        (1, None, ("warning", "mask-token-text")),
        (0, None, ("warning", "mask-token-text")),
    ],
)
def test_mask_token(mask: int, named: str | None, expected: tuple[str, str]) -> None:
    raw = drafter_config(dflash_config={"mask_token_id": mask})
    assert brief(check_mask_token(facts(drafter=raw, tokenizer=tokenizer(named)))) == [expected]


def test_an_end_token_of_the_generation_config_is_no_mask() -> None:
    raw = drafter_config(dflash_config={"mask_token_id": 94})
    found = check_mask_token(facts(drafter=raw, tokenizer=tokenizer(), end_token_ids=(94,)))
    assert brief(found) == [("warning", "mask-token-text")]


@pytest.mark.parametrize(
    ("of_target", "of_drafter", "expected"),
    [
        ({}, {}, ("ok", "rope")),
        # Not told by the drafter: 10000 is taken.
        ({"rope_theta": 1e6}, {"rope_theta": ABSENT}, ("warning", "rope-theta")),
        ({"rope_theta": ABSENT}, {}, ("info", "rope-theta")),
        ({"partial_rotary_factor": 0.25}, {}, ("info", "rope-partial")),
        ({"partial_rotary_factor": 0.25}, {"partial_rotary_factor": 0.5}, ("warning", "rope-partial")),
        ({"partial_rotary_factor": 1.0}, {}, ("ok", "rope")),
        ({"rope_scaling": {"type": "linear", "factor": 2.0}}, {}, ("warning", "rope-scaling")),
        (
            {"rope_scaling": {"type": "linear", "factor": 2.0}},
            {"rope_scaling": {"rope_type": "linear", "factor": 2.0}},
            ("ok", "rope"),
        ),
        ({"rope_scaling": {"type": "mrope", "mrope_section": [1, 2]}}, {}, ("ok", "rope")),
    ],
)
def test_rope(of_target: dict[str, Any], of_drafter: dict[str, Any], expected: tuple[str, str]) -> None:
    assert brief(check_rope(facts(target_config(**of_target), drafter_config(**of_drafter)))) == [expected]


def test_rope_of_a_target_with_two_kinds_of_layers() -> None:
    by_kind = {"sliding_attention": {"rope_theta": 10.0}, "full_attention": {"rope_theta": 5e5, "rope_type": "default"}}
    raw = target_config(rope_theta=ABSENT, rope_parameters=by_kind)
    assert target_rope(facts(raw).target) == {"rope_theta": 5e5, "rope_type": "default"}


MIXED = {"layer_types": ["sliding_attention", "full_attention"], "sliding_window": 32}


@pytest.mark.parametrize(
    ("changes", "windows", "prefixes", "told"),
    [
        ({}, "ok", "ok", "all 2 layers see the whole context"),
        (MIXED, "ok", "info", "1 of 2 layers see 32 tokens back"),
        (MIXED | {"layer_types": ["sliding_attention"] * 2}, "ok", "info", "all 2 layers see 32 tokens back"),
        ({"sliding_window": 32, "use_sliding_window": False}, "ok", "ok", "none"),
        ({"sliding_window": 32, "use_sliding_window": True}, "warning", "ok", "all layers see everything"),
    ],
)
def test_windows(changes: dict[str, Any], windows: str, prefixes: str, told: str) -> None:
    these = facts(drafter=drafter_config(**changes))
    (found,) = check_windows(these)
    assert (found.severity.name.lower(), told in found.seen) == (windows, True)
    assert brief(check_prefix_cache(these)) == [(prefixes, "prefix-cache")]


def test_prefix_caching_of_a_target_with_recurrent_layers() -> None:
    hybrid = target_config(layer_types=["linear_attention", "full_attention"])
    assert brief(check_prefix_cache(facts(hybrid))) == [("info", "prefix-cache")]


@pytest.mark.parametrize(
    ("asked", "expected"),
    [
        (Asked(), [("ok", "block-size")]),
        (Asked(num_speculative_tokens=15), [("ok", "block-size")]),
        (Asked(num_speculative_tokens=16), [("error", "block-size")]),
        (Asked(max_model_len=15), [("ok", "block-size"), ("error", "context-length")]),
    ],
)
def test_block_size(asked: Asked, expected: list[tuple[str, str]]) -> None:
    assert brief(check_block_size(facts(asked=asked))) == expected


@pytest.mark.parametrize(
    ("of_target", "of_drafter", "asked", "severity"),
    [
        (256, 256, None, "ok"),
        (256, 128, None, "warning"),
        (256, 128, 128, "ok"),
        (256, 512, 300, "error"),
        (256, ABSENT, None, "info"),
    ],
)
def test_context_length(of_target: int, of_drafter: Any, asked: int | None, severity: str) -> None:
    these = facts(
        target_config(max_position_embeddings=of_target),
        drafter_config(max_position_embeddings=of_drafter),
        asked=Asked(max_model_len=asked),
    )
    assert brief(check_context_length(these)) == [(severity, "context-length")]


@pytest.mark.parametrize(
    ("own", "asked", "severity", "told"),
    [
        ("bfloat16", "auto", "ok", "bfloat16, target and drafter"),
        ("bfloat16", "float16", "info", "smaller"),
        ("float32", "auto", "info", "are float32, the engine computes in bfloat16"),
        (ABSENT, "auto", "info", "tells no dtype"),
    ],
)
def test_dtype(own: Any, asked: str, severity: str, told: str) -> None:
    these = facts(target_config(torch_dtype="bfloat16"), drafter_config(dtype=own), asked=Asked(dtype=asked))
    (found,) = check_dtype(these)
    assert (found.severity.name.lower(), told in found.seen) == (severity, True)


def test_a_float32_target_is_computed_in_16_bits() -> None:
    (found,) = check_dtype(facts(target_config(dtype="float32"), drafter_config(dtype="bfloat16")))
    assert (found.severity.name, found.seen) == ("OK", "bfloat16, target and drafter")


def test_quantization_of_either_side() -> None:
    quantized = {"quantization_config": {"quant_method": "awq"}}
    assert brief(check_quantization(facts())) == [("ok", "quantization")]
    both = list(check_quantization(facts(target_config(**quantized), drafter_config(**quantized))))
    assert brief(both) == [("info", "quantization")] * 2
    assert "the target is quantized (awq)" in both[0].seen


@pytest.mark.parametrize(("wanted", "severity"), [("auto", "ok"), ("fp8", "info"), ("int2", "error")])
def test_kv_cache_dtype(wanted: str, severity: str) -> None:
    engine = EngineFacts(kv_cache_dtypes={"A": frozenset({"auto", "fp8"}), "B": frozenset({"auto"})})
    (found,) = check_kv_cache_dtype(facts(asked=Asked(kv_cache_dtype=wanted), engine=engine))
    assert found.severity.name.lower() == severity
    assert wanted != "fp8" or "of those backends A can read it" in found.seen


def test_kv_cache_dtype_without_vllm_is_unknown() -> None:
    assert brief(check_kv_cache_dtype(facts(asked=Asked(kv_cache_dtype="fp8")))) == [("info", "kv-cache-dtype")]


def table(digest: str, rows: int = 96) -> TensorFacts:
    return TensorFacts((rows, 48), "BF16", rows * 48 * 2, False, True, digest)


def tables_of(drafter_tensors: dict[str, TensorFacts], **changes: Any) -> list[Finding]:
    of_target = Weights({"model.embed_tokens.weight": table("a")})
    these = facts(
        target_config(tie_word_embeddings=True),
        drafter_config(**changes),
        target_weights=of_target,
        drafter_weights=Weights(drafter_tensors),
    )
    return list(check_tables(these))


def test_tables_of_the_target() -> None:
    assert brief(tables_of({})) == [("ok", "embedding"), ("ok", "lm-head")]


def test_a_copy_of_the_targets_tied_head_is_told_from_a_trained_one() -> None:
    _, copy = tables_of({"lm_head.weight": table("a")})
    _, trained = tables_of({"lm_head.weight": table("b")})
    assert "with the target's values" in copy.seen
    assert "leave it out" in copy.change
    assert "other values than the target's" in trained.seen


def test_a_reduced_head() -> None:
    found = tables_of({"lm_head.weight": table("b", 24), "d2t": table("c")}, draft_vocab_size=24)
    assert ("info", "draft-vocabulary") in brief(found)
    assert "drafts 24 of 96 tokens (25%)" in found[-1].seen


def test_a_tied_head_of_the_drafters_own() -> None:
    found = tables_of({"embed_tokens.weight": table("b")}, tie_word_embeddings=True)
    assert ("warning", "lm-head") in brief(found)


def test_another_width_needs_own_tables() -> None:
    found = tables_of({}, hidden_size=64, target_hidden_size=48)
    assert brief(found) == [("error", "lm-head")]


@pytest.mark.parametrize(
    ("these", "expected"),
    [
        (None, [("info", "chat-template")]),
        (TokenizerFacts(TOKENS), [("info", "chat-template")]),
        (TokenizerFacts(problem="no JSON"), [("error", "tokenizer")]),
        (tokenizer(), [("ok", "chat-template"), ("ok", "thinking")]),
        (
            TokenizerFacts(TOKENS, chat_templates=("{% if enable_thinking %}",)),
            [("ok", "chat-template"), ("info", "thinking")],
        ),
    ],
)
def test_templates(these: TokenizerFacts | None, expected: list[tuple[str, str]]) -> None:
    assert brief(check_templates(facts(tokenizer=these))) == expected
