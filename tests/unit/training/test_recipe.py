# SPDX-License-Identifier: Apache-2.0
"""What a recipe file may say, and which of it is wrong."""

from __future__ import annotations

from pathlib import Path

import pytest

from vllm_dflash.training.recipe import Recipe, read_recipe


def read(tmp_path: Path, text: str, **overrides: dict) -> Recipe:
    file = tmp_path / "recipe.yaml"
    file.write_text(text)
    return read_recipe(file, overrides)


def test_defaults_are_the_paper_s() -> None:
    recipe = read_recipe(None)
    assert (recipe.model.num_layers, recipe.model.block_size) == (5, 16)
    assert (recipe.training.learning_rate, recipe.training.warmup, recipe.training.epochs) == (6e-4, 0.04, 6.0)
    assert recipe.training.anchors == 512 == recipe.data.max_length // recipe.training.tokens_per_anchor


@pytest.mark.parametrize(("block_size", "gamma"), [(16, 7.0), (11, 7.0), (10, 5.0), (9, 5.0), (8, 4.0), (4, 4.0)])
def test_the_decay_goes_with_the_block(tmp_path: Path, block_size: int, gamma: float) -> None:
    assert read_recipe(None).gamma(block_size) == gamma
    assert read(tmp_path, "objective: {gamma: 2.5}").gamma(block_size) == 2.5


def test_settings_of_the_command_line_win(tmp_path: Path) -> None:
    recipe = read(tmp_path, "training: {steps: 5, warmup: 0.1}", training={"steps": 9}, data={"seed": 3})
    assert (recipe.training.steps, recipe.training.warmup, recipe.data.seed) == (9, 0.1, 3)


def test_an_empty_file_is_all_defaults(tmp_path: Path) -> None:
    assert read(tmp_path, "# nothing yet\n") == read_recipe(None)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("training: {learning_rate: fast}", r"training.learning_rate: .*valid number.* found 'fast'"),
        ("training: {evaluate_tokens: 1}", r"training.evaluate_tokens: .*found 1"),
        ("objective: {alpha: 0}", r"objective.alpha: .*greater than 0, found 0"),
        ("training: {steps: 0}", r"training.steps: .*greater than 0, found 0"),
        ("training: {epochz: 3}", r"training.epochz: no such key"),
        ("trainer: {}", r"trainer: no such key"),
        ("model: {block_size: 1}", r"model.block_size: .*found 1"),
        ("model: {target_layer_ids: [3, 1]}", r"model.target_layer_ids: rising numbers from 0 on .*\[3, 1\]"),
        ("model: {draft_vocab_size: 0}", r"model.draft_vocab_size: .*greater than 0, found 0"),
        ("model: {draft_vocab_size: on}", r"model.draft_vocab_size: .*yes or no is not a value.* found True"),
        ("data: {gpu_memory_utilization: yes}", r"data.gpu_memory_utilization: .*found True"),
        ("data: {gpu_memory_utilization: 1.5}", r"data.gpu_memory_utilization: .*found 1.5"),
        ("model: {target_layer_ids: []}", r"model.target_layer_ids"),
        ("data: {temperatures: [1.0, 0.2]}", r"data.temperatures: two rising numbers .*\[1.0, 0.2\]"),
        ("data: {sampled_share: 1.5}", r"data.sampled_share: .*found 1.5"),
        ("data: [1]", r"data: .*found \[1\]"),
        ("objective: {kind: best}", r"objective.kind: .*'decay' or 'd-pace'.*found 'best'"),
        (
            "objective: {kl_weight: 0.5}\ndata: {feature_cache_gb: 2}",
            r"objective.kl_weight = 0.5 needs .* data.feature_cache_gb",
        ),
        ("- 1\n- 2", r"sections are needed \(data, model, objective, training\), found \[1, 2\]"),
        ("training: {steps: [}", r"not YAML"),
    ],
)
def test_what_is_wrong_is_named(tmp_path: Path, text: str, message: str) -> None:
    with pytest.raises(ValueError, match=message) as caught:
        read(tmp_path, text)
    assert "recipe.yaml" in str(caught.value)


def test_yes_and_no_are_values_of_switches(tmp_path: Path) -> None:
    found = read(tmp_path, "data: {thinking: off}\ntraining: {compile: true}")
    assert (found.data.thinking, found.training.compile) == (False, True)


def test_a_missing_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"--config .*nowhere.yaml: cannot be read: No such file"):
        read_recipe(tmp_path / "nowhere.yaml")
