# SPDX-License-Identifier: Apache-2.0
"""Whatever stands under a key of either config.json, the checks come to an end and say what they think of it."""

import json
from pathlib import Path
from typing import Any

import pytest

from tests.helpers import drafter_config, target_config, write_config
from vllm_dflash.doctor.diagnosis import diagnose
from vllm_dflash.doctor.facts import Asked
from vllm_dflash.engine_facts import EngineFacts

JUNK: tuple[Any, ...] = (None, "x", -1, 0.5, True, [], ["x"], {}, {"x": {"y": 1}})
DRAFTER = drafter_config(
    layer_types=["full_attention"] * 2,
    rope_parameters={"rope_type": "default", "rope_theta": 1e4},
    rope_scaling=None,
    sliding_window=None,
    use_sliding_window=False,
    dtype="bfloat16",
    quantization_config=None,
    tie_word_embeddings=False,
    speculators_config=None,
    is_causal=None,
)
TARGET = target_config(
    layer_types=["full_attention"] * 6,
    rope_parameters=None,
    partial_rotary_factor=None,
    dtype="bfloat16",
    quantization_config=None,
    eos_token_id=1,
    kv_lora_rank=None,
    text_config=None,
)


def looked_at(tmp_path: Path, target: dict[str, Any], drafter: dict[str, Any]) -> set[str]:
    write_config(tmp_path / "t", target)
    write_config(tmp_path / "d", drafter)
    found = diagnose(str(tmp_path / "t"), str(tmp_path / "d"), Asked(), lambda architectures: EngineFacts())
    return {one.id for one in found.findings}


@pytest.mark.parametrize("key", sorted(DRAFTER))
def test_junk_in_the_drafters_config(tmp_path: Path, key: str) -> None:
    for junk in JUNK:
        assert "drafter-kind" in looked_at(tmp_path, TARGET, DRAFTER | {key: junk})


@pytest.mark.parametrize("key", sorted(TARGET))
def test_junk_in_the_targets_config(tmp_path: Path, key: str) -> None:
    for junk in JUNK:
        assert "drafter-kind" in looked_at(tmp_path, TARGET | {key: junk}, DRAFTER)


@pytest.mark.parametrize("file", ["tokenizer.json", "tokenizer_config.json", "generation_config.json"])
@pytest.mark.parametrize(
    "content",
    [
        [1],
        {"added_tokens": "x", "model": 3, "added_tokens_decoder": ["x"]},
        {"added_tokens": [3, {}], "model": {"vocab": {"a": "b"}}, "added_tokens_decoder": {"x": 1}},
        {"chat_template": 4, "eos_token": [], "mask_token": 7, "eos_token_id": {"a": 1}},
    ],
)
def test_junk_in_the_targets_other_files(tmp_path: Path, file: str, content: Any) -> None:
    (tmp_path / "t").mkdir()
    (tmp_path / "t" / file).write_text(json.dumps(content), encoding="utf-8")
    assert "drafter-kind" in looked_at(tmp_path, TARGET, DRAFTER)
