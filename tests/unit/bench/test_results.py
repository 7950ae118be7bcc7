# SPDX-License-Identifier: Apache-2.0
"""Results on disk, and results beside each other."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest

from tests.unit.bench.samples import results
from vllm_dflash.benchmark.results import load_results, save_results
from vllm_dflash.benchmark.side_by_side import distinct_names, merged_results, with_baseline


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


def test_each_file_keeps_the_speed_ups_that_it_had() -> None:
    """The second machine is half as fast, and there the other system is the baseline: 1 / 2.4 and 1 / 1.7."""
    slower = tuple(replace(run, seconds=2 * run.seconds) for run in results().runs)
    merged = merged_results([(results(), "a.json"), (replace(results(), baseline="server", runs=slower), "b.json")])
    speedups = [summary.speedup for summary in merged.summaries]
    assert speedups[:8] == [None, pytest.approx(2.4), None, pytest.approx(1.7)] * 2
    assert speedups[8:] == [pytest.approx(1 / 2.4), None, pytest.approx(1 / 1.7), None] * 2
    assert merged.notes == (
        "Speed-ups are over each file's own baseline: those of a.json over baseline, of b.json over server.",
    )


def test_a_file_without_a_baseline_gets_none_from_another() -> None:
    alone = replace(results(), baseline=None, runs=(replace(results().runs[3], concurrency=1, system="other"),))
    assert merged_results([(results(), "a.json"), (alone, "b.json")]).summaries[-1].speedup is None


def test_merged_results_are_saved_and_compared_as_others_are(tmp_path: Path) -> None:
    merged = merged_results([(results(), "a.json"), (results(), "b.json")])
    save_results(merged, tmp_path / "r.json")
    assert load_results(tmp_path / "r.json").summaries == merged.summaries
    plain = replace(results(), runs=(replace(results().runs[0], seconds=8.0),))  # mini at 1: half of the baseline's 4 s
    speedups = [summary.speedup for summary in with_baseline(merged, plain, "c.json").summaries]
    assert speedups[:3] == [2.0, pytest.approx(4.8), None]


def test_files_are_told_apart_by_as_much_of_their_paths_as_it_takes() -> None:
    assert distinct_names(["a.json", "x/b.json"]) == ["a", "b"]
    assert distinct_names(["b/r.json", "c/r.json", "c/s.json"]) == ["b/r", "c/r", "c/s"]
    merged = merged_results([(results(), "b/r.json"), (results(), "c/r.json"), (results(), "d/r.json")])
    assert list(dict.fromkeys(run.system for run in merged.runs)) == [
        "baseline", "server", "baseline (c/r)", "server (c/r)", "baseline (d/r)", "server (d/r)",
    ]  # fmt: skip


def test_the_same_file_twice_is_refused() -> None:
    with pytest.raises(ValueError, match=r"--from r.json --from x/../r.json: the same file twice"):
        merged_results([(results(), "r.json"), (results(), "x/../r.json")])


def test_another_model_and_another_machine_are_told() -> None:
    mine = replace(
        results(), settings=replace(results().settings, model="big", num_speculative_tokens=15, dtype="auto")
    )
    theirs = replace(
        results(),
        settings=replace(mine.settings, model="small", num_speculative_tokens=7, dtype=None, engine_args={"a": 1}),
        environment={"vllm_dflash": "0.1.0", "CPU": "another", "GPU": "1 x fast", "vllm": "0.32.0"},
    )
    mine = replace(mine, environment=mine.environment | {"vllm": "0.31.0"})
    notes = with_baseline(mine, replace(theirs, runs=theirs.runs[1:2], baseline=None), "old.json").notes
    assert notes == (
        "The baseline in old.json used model = small, these runs used big.",
        "The baseline in old.json used num_speculative_tokens = 7, these runs used 15.",
        "The baseline in old.json used engine_args = {'a': 1}, these runs used {}.",
        "The baseline in old.json was measured with CPU: another, these runs with hand-made.",
        "The baseline in old.json was measured with GPU: 1 x fast, these runs with none.",
        "The baseline in old.json was measured with vllm: 0.32.0, these runs with 0.31.0.",
    )
    without_drafts = with_baseline(mine, replace(theirs, runs=theirs.runs[:1]), "old.json").notes
    assert without_drafts == tuple(note for note in notes if "num_speculative_tokens" not in note)
