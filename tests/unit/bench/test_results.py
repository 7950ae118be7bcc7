# SPDX-License-Identifier: Apache-2.0
"""Results on disk, and results beside each other."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest

from tests.unit.bench.samples import results
from vllm_dflash.benchmark.results import load_results, merged_results, save_results, with_baseline


def test_what_is_saved_is_what_is_loaded(tmp_path: Path) -> None:
    path = tmp_path / "results.json"
    save_results(results(), path)
    assert load_results(path) == results()
    assert [file.name for file in tmp_path.iterdir()] == ["results.json"]


def test_the_file_tells_the_measures_too(tmp_path: Path) -> None:
    path = tmp_path / "results.json"
    save_results(results(), path)
    summaries = json.loads(path.read_text())["summaries"]
    assert summaries[1]["tokens_per_second"] == pytest.approx(256 / (4.0 / 2.4))
    assert summaries[1]["speedup"] == pytest.approx(2.4)
    assert summaries[-1]["errors"] == {"timeout": 1}


@pytest.mark.parametrize(
    ("text", "error"),
    [
        ("{", "results.json: not JSON"),
        ("[]", "results.json: format = None: not a result of vllm-dflash bench"),
        ('{"format": "other/2"}', "format = 'other/2'"),
    ],
)
def test_another_file_is_refused(tmp_path: Path, text: str, error: str) -> None:
    path = tmp_path / "results.json"
    path.write_text(text)
    with pytest.raises(ValueError, match=error):
        load_results(path)


def test_a_wrong_value_is_named_by_its_key(tmp_path: Path) -> None:
    path = tmp_path / "results.json"
    save_results(results(), path)
    content = json.loads(path.read_text())
    content["runs"][0]["seconds"] = "long"
    path.write_text(json.dumps(content))
    with pytest.raises(ValueError, match=r"results.json: runs\.0\.seconds: .*the value: long"):
        load_results(path)
    with pytest.raises(ValueError, match="cannot be read"):
        load_results(tmp_path / "none.json")


def test_an_earlier_run_is_the_baseline() -> None:
    whole = results()
    mine = replace(whole, baseline=None, runs=tuple(run for run in whole.runs if run.system == "server"))
    theirs = replace(whole, runs=tuple(run for run in whole.runs if run.system == "baseline"))
    compared = with_baseline(mine, theirs, "old.json")
    assert [summary.speedup for summary in compared.summaries] == pytest.approx([2.4, 1.7, 2.4, 1.7])
    assert compared.baseline == "baseline (old.json)"
    assert compared.notes == ()


def test_a_baseline_of_other_settings_or_prompts_is_told() -> None:
    other = results()
    other = replace(
        other,
        settings=replace(other.settings, max_tokens=64),
        prompt_sets=(replace(other.prompt_sets[0], prompts=3), other.prompt_sets[1]),
    )
    notes = with_baseline(results(), other, "old.json").notes
    assert notes == (
        "The baseline in old.json used max_tokens = 64, these runs used 128.",
        "The baseline in old.json used other prompts of mini.",
    )


def test_a_baseline_of_several_systems_is_refused() -> None:
    other = replace(results(), baseline=None)
    with pytest.raises(ValueError, match="--baseline old.json: holds runs of baseline, server: one system is needed"):
        with_baseline(results(), other, "old.json")


def test_results_side_by_side_keep_the_same_system_apart() -> None:
    merged = merged_results([(results(), "a.json"), (results(), "dir/b.json")])
    systems = [run.system for run in merged.runs]
    assert systems[:2] == ["baseline", "server"]
    assert systems[8:10] == ["baseline (b)", "server (b)"]
    assert merged_results([(results(), "a.json")]) == results()


def test_results_with_baselines_of_their_own_are_told_to_share_one() -> None:
    merged = merged_results([(results(), "a.json"), (replace(results(), baseline="server"), "b.json")])
    assert merged.baseline == "baseline"
    assert merged.notes == ("Speed-ups are over baseline in all of these results, not over baseline, server each.",)
