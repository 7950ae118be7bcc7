# SPDX-License-Identifier: Apache-2.0
"""`vllm-dflash train` and `collect`, from the command line to a folder that loads, with the shipped target."""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path

import pytest
import torch
import yaml
from transformers import AutoModelForCausalLM, GenerationConfig
from typer.testing import CliRunner

from vllm_dflash.cli import app
from vllm_dflash.config import DFlashConfig
from vllm_dflash.console import SHIPPED_PAIR
from vllm_dflash.hf import DFlashDraftModel
from vllm_dflash.train import overrides
from vllm_dflash.training.card import card
from vllm_dflash.training.drafter_shape import new_drafter_config
from vllm_dflash.training.evaluate import Acceptance
from vllm_dflash.training.recipe import ModelRecipe, read_recipe
from vllm_dflash.training.reduced_vocabulary import Coverage
from vllm_dflash.training.responding import Asked, ResponseJob, generated
from vllm_dflash.training.response_store import ResponseStore
from vllm_dflash.training.responses import Response
from vllm_dflash.training.vllm_responses import run_job

TARGET = str(SHIPPED_PAIR / "target")
SETTINGS = {
    "data": {"held_out": 2, "max_new_tokens": 24, "max_length": 64},
    "model": {"num_layers": 1, "target_layer_ids": [1, 6]},
    "training": {"steps": 2, "batch_tokens": 256, "evaluate_tokens": 8},
}


def run(*arguments: object, code: int = 0) -> str:
    result = CliRunner().invoke(app, [str(argument) for argument in arguments])
    assert result.exit_code == code, result.output
    return " ".join(result.output.split())


@pytest.fixture
def prompts(tmp_path: Path) -> Path:
    file = tmp_path / "prompts.jsonl"
    texts = [f"def function_{number}(a, b):\n    " for number in range(8)]
    records = [{"prompt": text} for text in texts[:5]]
    records += [{"messages": [{"role": "user", "content": text}]} for text in texts[5:]]
    file.write_text("".join(json.dumps(record) + "\n" for record in records))
    return file


@pytest.fixture
def recipe(tmp_path: Path) -> Path:
    file = tmp_path / "recipe.yaml"
    file.write_text(yaml.safe_dump(SETTINGS))
    return file


def test_from_prompts_to_a_drafter(tmp_path: Path, prompts: Path, recipe: Path) -> None:
    output = tmp_path / "drafter"
    said = run("train", "--target", TARGET, "--prompts", prompts, "--output", output, "--config", recipe)
    assert "acceptance length" in said
    draft = DFlashDraftModel.from_pretrained(str(output))
    assert draft.target_layer_ids == (1, 6) and draft.mask_token_id == 3  # the tokenizer's <|mask|>
    assert f"base_model: {TARGET}" in (output / "README.md").read_text()
    lines = (output / "work" / "responses.jsonl").read_text().splitlines()
    assert len(lines) == 6  # of 8 prompts, 2 are held out
    # The same again has nothing left to do; other settings do not go on from this run.
    before = (output / "model.safetensors").stat().st_mtime_ns
    said = run("train", "--target", TARGET, "--prompts", prompts, "--output", output, "--config", recipe)
    assert "nothing is left to do" in said and "acceptance length" in said
    assert (output / "model.safetensors").stat().st_mtime_ns == before
    said = run(
        "train", "--target", TARGET, "--prompts", prompts, "--output", output, "--config", recipe,
        "--set", "training.learning_rate=0.1", code=1,
    )  # fmt: skip
    assert "is of another run: recipe.training.learning_rate was 0.0006 there and is 0.1 now. Choose another" in said


def test_features_are_kept_where_the_recipe_wants_it(tmp_path: Path, prompts: Path, recipe: Path) -> None:
    output, base = tmp_path / "drafter", ["train", "--target", TARGET, "--prompts", prompts, "--config", recipe]
    run(*base, "--output", output, "--set", "data.feature_cache_gb=0.01")
    assert (output / "work" / "features" / "index.json").is_file()
    said = run(*base, "--output", tmp_path / "other", "--set", "data.feature_cache_gb=0.00000001", code=1)
    assert "feature_cache_gb" in said


def test_an_existing_drafter_goes_on(tmp_path: Path, prompts: Path, recipe: Path) -> None:
    output, shipped = tmp_path / "drafter", SHIPPED_PAIR / "drafter"
    base = ["train", "--target", TARGET, "--prompts", prompts, "--output", output, "--config", recipe]
    base += ["--init-from", shipped]
    assert "leave the recipe's `model` section out" in run(*base, code=1)
    recipe.write_text(yaml.safe_dump(SETTINGS | {"model": {}}))
    run(*base, "--set", "training.learning_rate=1.0e-12", "--set", "training.weight_decay=0.0")
    before = DFlashDraftModel.from_pretrained(str(shipped), dtype=torch.float32).state_dict()
    for name, weight in DFlashDraftModel.from_pretrained(str(output), dtype=torch.float32).state_dict().items():
        assert torch.equal(weight, before[name]), name


def test_a_draft_vocabulary_from_the_responses(tmp_path: Path, prompts: Path, recipe: Path) -> None:
    output, base = tmp_path / "drafter", ["train", "--target", TARGET, "--prompts", prompts]
    said = run(*base, "--config", recipe, "--output", output, "--set", "model.draft_vocab_size=40")
    records = [json.loads(line) for line in (output / "work" / "responses.jsonl").read_text().splitlines()]
    counts = Counter(token for record in records for token in record["token_ids"][1:])
    ends = AutoModelForCausalLM.from_pretrained(TARGET).generation_config.eos_token_id
    ranked = [*ends, *sorted(counts, key=lambda token: (-counts[token], token)), *range(2048)]
    chosen = sorted(list(dict.fromkeys(ranked))[:40])
    draft = DFlashDraftModel.from_pretrained(str(output), dtype=torch.float32)
    assert (draft.d2t + torch.arange(40)).tolist() == chosen
    share = f"{sum(counts[token] for token in chosen) / counts.total():.2%}"
    assert f"draft vocabulary: 40 of the target's 2048 tokens, {share} of what is to be drafted" in said
    assert f"40 of the target's 2048 tokens, {share} of what" in (output / "README.md").read_text()
    # Trained on, it keeps both vocabulary and rows.
    recipe.write_text(yaml.safe_dump(SETTINGS | {"model": {}}))
    said = run(*base, "--config", recipe, "--output", tmp_path / "on", "--init-from", output)
    assert f"draft vocabulary: 40 of the target's 2048 tokens, {share}" in said
    on = DFlashDraftModel.from_pretrained(str(tmp_path / "on"), dtype=torch.float32)
    assert torch.equal(on.d2t, draft.d2t) and torch.equal(on.lm_head.weight, draft.lm_head.weight)
    assert not torch.equal(on.fc.weight, draft.fc.weight)


def test_a_draft_vocabulary_that_cannot_be_shows_before_responses_are_written(
    tmp_path: Path, prompts: Path, recipe: Path
) -> None:
    output = tmp_path / "out"
    base = ["train", "--target", TARGET, "--prompts", prompts, "--output", output, "--config", recipe]
    said = run(*base, "--set", "model.draft_vocab_size=2049", code=1)
    assert "model.draft_vocab_size = 2049, but the target has 2048 tokens" in said
    assert not output.exists()


def test_a_dry_run_writes_an_untrained_drafter_and_serves_it(
    tmp_path: Path, prompts: Path, recipe: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    served = []
    monkeypatch.setattr("vllm_dflash.train._serve", lambda target, drafter, console: served.append((target, drafter)))
    output = tmp_path / "drafter"
    run("train", "--target", TARGET, "--prompts", prompts, "--output", output, "--config", recipe, "--dry-run")
    assert served == [(TARGET, output / "dry-run")] and not (output / "work").exists()
    assert not (output / "model.safetensors").exists()  # where a trained one may be
    assert DFlashDraftModel.from_pretrained(str(output / "dry-run")).block_size == 16


def test_a_target_s_directory_may_be_written_in_other_ways(
    tmp_path: Path, prompts: Path, recipe: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    base = ["train", "--prompts", prompts, "--output", tmp_path / "d", "--config", recipe]
    run(*base, "--target", TARGET)
    monkeypatch.chdir(SHIPPED_PAIR)
    assert "nothing is left to do" in run(*base, "--target", "target")


def test_an_id_that_comes_again_is_another_prompt(tmp_path: Path, recipe: Path) -> None:
    file = tmp_path / "prompts.jsonl"
    file.write_text("".join(json.dumps({"id": "same", "prompt": f"def f{number}" * 3}) + "\n" for number in range(4)))
    output = tmp_path / "drafter"
    run("train", "--target", TARGET, "--prompts", file, "--output", output, "--config", recipe, "--only-data")
    assert len((output / "work" / "responses.jsonl").read_text().splitlines()) == 2


def test_a_share_of_the_gpu_is_vllm_s_and_changes_no_run(
    tmp_path: Path, prompts: Path, recipe: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    jobs: list[ResponseJob] = []

    def respond(store: ResponseStore, job: ResponseJob, log: Path) -> None:
        jobs.append(job)
        store.add({each.id: Response(list(each.prompt_token_ids), [5, 6, 7, 2], 0.0) for each in job.asked})

    monkeypatch.setattr("vllm_dflash.training.command.uses_vllm", lambda data: True)
    monkeypatch.setattr("vllm_dflash.training.command.respond_with_vllm", respond)
    base = ["train", "--target", TARGET, "--prompts", prompts, "--output", tmp_path / "d", "--config", recipe]
    run(*base, "--set", "data.gpu_memory_utilization=0.25")
    assert [job.gpu_memory_utilization for job in jobs] == [0.25]
    assert "nothing is left to do" in run(*base, "--set", "data.gpu_memory_utilization=0.5")


@pytest.mark.parametrize(("share", "expected"), [(0.25, {"gpu_memory_utilization": 0.25}), (None, {})])
def test_vllm_gets_the_share(share: float | None, expected: dict[str, float], monkeypatch: pytest.MonkeyPatch) -> None:
    vllm = pytest.importorskip("vllm")
    engines: list[dict[str, object]] = []
    monkeypatch.setattr(vllm, "LLM", lambda **arguments: engines.append(arguments))
    assert list(run_job(ResponseJob("target", (), (2,), 64, "float32", share))) == [None]
    assert engines == [{"model": "target", "dtype": "float32", "max_model_len": 64} | expected]


def test_what_was_too_large_can_be_made_smaller(tmp_path: Path, prompts: Path, recipe: Path) -> None:
    """Before the first checkpoint nothing holds a run to its recipe; from there on, the number of processes too."""
    output = tmp_path / "drafter"
    base = ["train", "--target", TARGET, "--prompts", prompts, "--output", output, "--config", recipe]
    said = run(*base, "--set", "data.feature_cache_gb=0.00000001", code=1)
    assert "feature_cache_gb" in said
    run(*base, "--set", "data.feature_cache_gb=0.01", "--set", "training.batch_tokens=128")


def test_a_run_goes_on_with_as_many_processes(
    tmp_path: Path, prompts: Path, recipe: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    output = tmp_path / "drafter"
    base = ["train", "--target", TARGET, "--prompts", prompts, "--output", output, "--config", recipe]
    run(*base)
    monkeypatch.setenv("WORLD_SIZE", "2")
    assert "num_processes was 1 there and is 2 now" in run(*base, code=1)


def test_other_ranks_want_the_data_to_be_there(
    tmp_path: Path, prompts: Path, recipe: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    output = tmp_path / "drafter"
    base = ["train", "--target", TARGET, "--prompts", prompts, "--output", output, "--config", recipe]
    base += ["--set", "data.feature_cache_gb=0.01"]
    with monkeypatch.context() as patch:
        patch.setenv("RANK", "1")
        assert "6 prompts have no response" in run(*base, code=1)
    run(*base, "--only-data")
    assert (output / "work" / "features" / "index.json").is_file() and not (output / "model.safetensors").exists()
    (output / "work" / "features" / "index.json").unlink()
    monkeypatch.setenv("RANK", "1")
    assert "without `accelerate launch`, with --only-data" in run(*base, code=1)


def test_positions_that_the_target_has_not(tmp_path: Path, prompts: Path, recipe: Path) -> None:
    base = ["train", "--target", TARGET, "--prompts", prompts, "--output", tmp_path / "out", "--config", recipe]
    said = run(*base, "--set", "data.max_length=2000", code=1)
    assert "data.max_length: 2000 is more than the target's 1024 positions" in said


def test_no_more_prompts_are_read_than_are_wanted(tmp_path: Path, prompts: Path, recipe: Path) -> None:
    with prompts.open("a") as file:
        file.write("not JSON\n")
    output = tmp_path / "drafter"
    base = ["train", "--target", TARGET, "--prompts", prompts, "--output", output, "--config", recipe, "--only-data"]
    run(*base, "--set", "data.max_prompts=5")
    assert len((output / "work" / "responses.jsonl").read_text().splitlines()) == 5
    assert "prompts.jsonl:9: not JSON" in run(*base, "--set", "data.max_prompts=7", code=1)


def test_only_data(tmp_path: Path, prompts: Path, recipe: Path) -> None:
    output = tmp_path / "drafter"
    run("train", "--target", TARGET, "--prompts", prompts, "--output", output, "--config", recipe, "--only-data")
    assert (output / "work" / "responses.jsonl").is_file() and not (output / "config.json").exists()


@pytest.mark.parametrize(
    ("text", "arguments", "message"),
    [
        ("", [], "prompts.jsonl"),
        ('{"prompt": "a"}\n{"prompt": \n', [], "prompts.jsonl:2: not JSON"),
        ('{"prompt": "a"}\n', [], "1 different prompts, of which data.held_out = 2"),
        (
            None,
            ["--set", "model.target_layer_ids=[2, 8]"],
            "target_layer_ids: [2, 8] reach beyond the target's 8",
        ),
        (None, ["--set", "model.mask_token=nothing"], "model.mask_token: 'nothing' is not one token"),
        (None, ["--set", "steps=3"], "--set steps=3: SECTION.KEY=VALUE is needed"),
        (None, ["--set", "model.mask_token=[MASK"], "--set model.mask_token=[MASK: what is behind the = is not YAML"),
        (None, ["--set", "training.steps=-1"], "training.steps: input should be greater than 0, found -1"),
        (None, ["--target", "nowhere/at/all"], "--target nowhere/at/all: not a model's directory"),
        (None, ["--config", "nowhere.yaml"], "--config nowhere.yaml: cannot be read"),
    ],
)
def test_what_is_wrong_is_named(
    tmp_path: Path, prompts: Path, recipe: Path, text: str | None, arguments: list[str], message: str
) -> None:
    if text is not None:
        prompts.write_text(text)
    base = ["train", "--target", TARGET, "--prompts", prompts, "--output", tmp_path / "out", "--config", recipe]
    assert message in run(*base, *arguments, code=1)


def test_a_drafter_of_another_target_does_not_go_on(tmp_path: Path, prompts: Path, recipe: Path) -> None:
    config = json.loads((SHIPPED_PAIR / "drafter" / "config.json").read_text()) | {"vocab_size": 4096}
    other = tmp_path / "other"
    other.mkdir()
    (other / "config.json").write_text(json.dumps(config))
    (other / "model.safetensors").symlink_to(SHIPPED_PAIR / "drafter" / "model.safetensors")
    recipe.write_text(yaml.safe_dump(SETTINGS | {"model": {}}))
    base = ["train", "--target", TARGET, "--prompts", prompts, "--output", tmp_path / "out", "--config", recipe]
    said = run(*base, "--init-from", other, code=1)
    assert "made for a target of vocab_size 4096, and --target has 2048" in said


def test_a_log_becomes_prompts(tmp_path: Path) -> None:
    log, output = tmp_path / "log.jsonl", tmp_path / "prompts.jsonl"
    bodies = [{"messages": [{"role": "user", "content": "Hello"}]}] * 2 + [{"prompt": [1, 2]}]
    log.write_text("".join(json.dumps({"body": body}) + "\n" for body in bodies))
    said = run("collect", log, "--output", output)
    assert "1 prompts written" in said and "1 duplicates" in said and "token ids" in said
    assert json.loads(output.read_text())["messages"] == [{"role": "user", "content": "Hello"}]
    assert "exists" in run("collect", log, "--output", output, code=1)


# Parts.


def test_responses_are_what_the_target_says_alone() -> None:
    """Batched and padded, in fp32, against one prompt at a time."""
    target = AutoModelForCausalLM.from_pretrained(TARGET, dtype=torch.float32).eval()
    prompts = [[5, 6, 7], [8, 9, 10, 11, 12, 13], [20]]
    ends = [int(target.generate(torch.tensor([prompts[0]]), max_new_tokens=6, do_sample=False)[0, 3 + 4])]
    asked = [Asked(str(i), tuple(ids), 5 + i, 0.0, 1) for i, ids in enumerate(prompts)]
    own = target.generation_config = GenerationConfig(repetition_penalty=5.0, eos_token_id=ends)
    texts = generated(target, asked, ends)
    assert target.generation_config is own  # whose penalty was not to change the text
    target.generation_config = GenerationConfig()
    for each, text in zip(asked, texts, strict=True):
        alone = target.generate(
            torch.tensor([each.prompt_token_ids]), max_new_tokens=each.max_tokens, do_sample=False, eos_token_id=ends
        )
        assert text == alone[0, len(each.prompt_token_ids) :].tolist()


def test_a_drafter_is_as_wide_as_its_target() -> None:
    target = AutoModelForCausalLM.from_pretrained(TARGET)
    config = new_drafter_config(target, ModelRecipe(num_layers=2, sliding_window=32, intermediate_size=100), 3)
    dflash = DFlashConfig.from_dict(config.to_dict())
    assert (dflash.hidden_size, dflash.num_attention_heads, dflash.head_dim) == (192, 4, 64)
    assert (dflash.vocab_size, dflash.intermediate_size, dflash.block_size) == (2048, 100, 16)
    assert dflash.target_layer_ids == (1, 5)  # 2nd to 3rd-to-last of 8
    assert all(layer.sliding_window == 32 and not layer.causal for layer in dflash.layers)
    assert dflash.rope_parameters["rope_theta"] == 10_000.0
    with pytest.raises(ValueError, match=r"recipe's model.target_layer_ids: .*no room for 8 default taps"):
        new_drafter_config(target, ModelRecipe(num_layers=8), 3)


def test_settings_from_the_command_line() -> None:
    given = ["training.steps=20", "data.thinking=false", "model.mask_token=<m>", "training.warmup=0.5"]
    assert overrides(given) == {
        "training": {"steps": 20, "warmup": 0.5}, "data": {"thinking": False}, "model": {"mask_token": "<m>"}
    }  # fmt: skip


def test_the_card_tells_the_draft_vocabulary() -> None:
    found = Acceptance(8, (6, 4, 2))
    text = card("mine", "org/target", read_recipe(None), 1234, found, Coverage(32768, 151936, 0.98765))
    assert "It can draft 32768 of the target's 151936 tokens, 98.77% of what is to be drafted" in text
    assert "## Draft vocabulary" not in card("mine", "org/target", read_recipe(None), 1234, found)


def test_the_card_tells_acceptance() -> None:
    text = card("mine", "org/target", read_recipe(None), 1234, Acceptance(8, (6, 4, 2)))
    assert "Acceptance length **2.50**" in text and "| share | 0.75 | 0.50 | 0.25 |" in text
    assert "vllm serve org/target --speculative-config" in text and "1234 prompts" in text
