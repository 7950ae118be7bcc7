# SPDX-License-Identifier: Apache-2.0
"""What may stand under `dflash` in vLLM's additional config: every refusal names the key and the value."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from vllm_dflash.options import DFlashOptions

FLAG = '--additional-config\'s "dflash"'


def parse(**options: Any) -> DFlashOptions:
    return DFlashOptions.from_additional_config({"dflash": options})


def complaint(**options: Any) -> str:
    with pytest.raises(ValueError) as caught:
        parse(**options)
    return str(caught.value)


@pytest.mark.parametrize(
    "additional_config", [None, {}, {"dflash": {}}, {"dflash": None}, {"another_plugin": {"x": 1}}]
)
def test_no_options(additional_config: Any) -> None:
    options = DFlashOptions.from_additional_config(additional_config)
    assert options == DFlashOptions(draft_weights=None, draft_vocab_size=None, draft_vocab_file=None, tree=None)


def test_all_options(tmp_path: Path) -> None:
    file = tmp_path / "frequencies.json"
    file.touch()
    options = parse(draft_weights="fp8", draft_vocab_size=512, draft_vocab_file=str(file))
    assert (options.draft_weights, options.draft_vocab_size) == ("fp8", 512)
    assert options.draft_vocab_file == str(file)


@pytest.mark.parametrize("options", [{"draft_weights": "fp8"}, {"draft_vocab_size": 1}, {"draft_weights": None}])
def test_each_option_stands_alone(options: dict[str, Any]) -> None:
    parsed = parse(**options)
    assert {key: getattr(parsed, key) for key in options} == options


# Keys.


def test_unknown_options_are_all_named() -> None:
    message = complaint(nope=1, budget_=2)
    assert f"{FLAG} has unknown key(s) ['budget_', 'nope']" in message
    known = "['draft_vocab_file', 'draft_vocab_size', 'draft_weights', 'prefill_schedule_interval', 'tree']"
    assert known in message


def test_an_unknown_option_is_not_hidden_by_a_known_one() -> None:
    assert "['draft_vocabulary_size']" in complaint(draft_weights="fp8", draft_vocabulary_size=3)


@pytest.mark.parametrize("options", ["nope", ["nope"], 1, True])
def test_options_that_are_no_object(options: Any) -> None:
    with pytest.raises(ValueError) as caught:
        DFlashOptions.from_additional_config({"dflash": options})
    assert f"{FLAG} must be an object" in str(caught.value)
    assert repr(options) in str(caught.value)


# Values.


@pytest.mark.parametrize("value", ["fp4", "FP8", "", 8, True, ["fp8"]])
def test_draft_weights(value: Any) -> None:
    message = complaint(draft_weights=value)
    assert f'{FLAG}: "draft_weights" must be "fp8" or absent' in message
    assert message.endswith(f"found {value!r}")


@pytest.mark.parametrize("value", [0, -1, True, False, "512", 512.0, [512]])
def test_draft_vocab_size(value: Any) -> None:
    message = complaint(draft_vocab_size=value)
    assert f'{FLAG}: "draft_vocab_size" must be a positive integer' in message
    assert message.endswith(f"found {value!r}")


def test_draft_vocab_file_alone(tmp_path: Path) -> None:
    file = tmp_path / "frequencies.json"
    file.touch()
    message = complaint(draft_vocab_file=str(file))
    assert f'{FLAG}: "draft_vocab_file" needs a "draft_vocab_size"' in message


def test_draft_vocab_file_that_is_missing(tmp_path: Path) -> None:
    missing = str(tmp_path / "missing.json")
    assert f'{FLAG}: "draft_vocab_file" = {missing!r} is not a file' in complaint(
        draft_vocab_size=512, draft_vocab_file=missing
    )


def test_draft_vocab_file_that_is_a_directory(tmp_path: Path) -> None:
    message = complaint(draft_vocab_size=512, draft_vocab_file=str(tmp_path))
    assert f'{FLAG}: "draft_vocab_file" = {str(tmp_path)!r} is not a file' in message


@pytest.mark.parametrize("value", [1, True, ["a.json"]])
def test_draft_vocab_file_that_is_no_path(value: Any) -> None:
    message = complaint(draft_vocab_size=512, draft_vocab_file=value)
    assert f'{FLAG}: "draft_vocab_file" = {value!r} is not a file' in message


# Trees.


@pytest.mark.parametrize("nodes", [1, 31, 127])
def test_a_tree_has_so_many_nodes(nodes: int) -> None:
    assert parse(tree=nodes).num_tree_nodes == nodes


def test_a_tree_of_as_many_nodes_as_pay() -> None:
    assert parse(tree="auto").num_tree_nodes == 63
    assert parse().num_tree_nodes is None


@pytest.mark.parametrize("nodes", [0, 128, -1, True, 2.5, "31", "Auto"])
def test_a_tree_of_what(nodes: Any) -> None:
    found = f'{FLAG}: "tree" must be "auto" or a number of nodes from 1 to 127, found {nodes!r}'
    assert found in complaint(tree=nodes)


# When prompts are admitted.


@pytest.mark.parametrize("interval", [1, 8, "auto"])
def test_prompts_at_every_so_many_steps(interval: Any) -> None:
    assert parse(prefill_schedule_interval=interval).prefill_schedule_interval == interval


@pytest.mark.parametrize("interval", [0, -2, True, 2.0, "8", "never", []])
def test_prompts_at_every_how_many_steps(interval: Any) -> None:
    message = complaint(prefill_schedule_interval=interval)
    assert f'"prefill_schedule_interval" must be "auto" or a positive integer, found {interval!r}' in message
