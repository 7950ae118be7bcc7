# SPDX-License-Identifier: Apache-2.0
"""What a user's engine arguments become, on vLLM's real EngineArgs and tiny checkpoints on disk. No engine starts.

The plugin comes in as for any user: vLLM finds its entry point when engine arguments are made.
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("vllm")
from types import SimpleNamespace

from vllm.config import ModelConfig, ParallelConfig, SpeculativeConfig
from vllm.engine.arg_utils import EngineArgs

from tests.helpers import (
    ABSENT,
    drafter_config,
    speculators_config,
    target_config,
    truncate,
    write_config,
    write_drafter,
)
from vllm_dflash.compat import engine_args as engine_args_module
from vllm_dflash.compat.engine_args import planned_nodes
from vllm_dflash.compat.metrics.fallbacks import Fallback
from vllm_dflash.compat.ownership import draft_tree, drafts_here, startup_fallbacks
from vllm_dflash.compat.refusals import refuse_unsupported
from vllm_dflash.logs import logger


@pytest.fixture(scope="module")
def target(tmp_path_factory: pytest.TempPathFactory) -> str:
    """A target's config.json. Its weights are never looked at."""
    return str(write_config(tmp_path_factory.mktemp("target"), target_config()))


@pytest.fixture(scope="module")
def drafter(tmp_path_factory: pytest.TempPathFactory) -> str:
    """A drafter for the target, block size 16. The name must not say "dflash": vLLM would infer the method."""
    return str(write_drafter(tmp_path_factory.mktemp("drafter")))


def engine_args(target: str, **arguments: Any) -> EngineArgs:
    return EngineArgs(model=target, skip_tokenizer_init=True, dtype="float32", max_model_len=128, **arguments)


def speculative(target: str, drafter: str, additional_config: Any = None, **config: Any) -> SpeculativeConfig:
    """The speculative config of an engine with method dflash."""
    arguments = {} if additional_config is None else {"additional_config": additional_config}
    config = {"method": "dflash", "model": drafter} | config
    made = engine_args(target, speculative_config=config, **arguments).create_engine_config().speculative_config
    assert made is not None
    return made


def complaint(target: str, drafter: str, **config: Any) -> str:
    with pytest.raises(ValueError) as caught:
        speculative(target, drafter, **config)
    return str(caught.value)


# K.


def test_k_defaults_to_the_block(target: str, drafter: str) -> None:
    config = speculative(target, drafter)
    assert (config.method, config.num_speculative_tokens) == ("dflash", 15)


@pytest.mark.parametrize("given", [1, 7, 15])
def test_k_given_is_kept(target: str, drafter: str, given: int) -> None:
    assert speculative(target, drafter, num_speculative_tokens=given).num_speculative_tokens == given


def test_k_of_another_block(target: str, tmp_path: Path) -> None:
    assert speculative(target, str(write_drafter(tmp_path, block_size=4))).num_speculative_tokens == 3


def test_k_of_a_speculators_drafter(target: str, tmp_path: Path) -> None:
    write_config(write_drafter(tmp_path, block_size=8), speculators_config(block_size=8))
    assert speculative(target, str(tmp_path)).num_speculative_tokens == 7


def test_k_defaults_when_vllm_infers_the_method(target: str, tmp_path: Path) -> None:
    named = write_drafter(tmp_path / "Qwen3-DFlash-b16")
    args = engine_args(target, speculative_config={"model": str(named)})
    made = args.create_engine_config().speculative_config
    assert (made.method, made.num_speculative_tokens) == ("dflash", 15)


def test_the_users_own_dict_is_not_changed(target: str, drafter: str) -> None:
    config = {"method": "dflash", "model": drafter}
    engine_args(target, speculative_config=config).create_engine_config()
    assert config == {"method": "dflash", "model": drafter}


@pytest.mark.parametrize("given", [16, 40])
def test_k_beyond_the_block_is_refused(target: str, drafter: str, given: int) -> None:
    message = complaint(target, drafter, num_speculative_tokens=given)
    assert f'"num_speculative_tokens" = {given}' in message
    assert "block_size = 16" in message


@pytest.mark.parametrize("given", [0, -1, "7"])
def test_k_that_is_no_number_of_tokens_is_refused(target: str, drafter: str, given: Any) -> None:
    message = complaint(target, drafter, num_speculative_tokens=given)
    assert f'"num_speculative_tokens" must be a positive integer, found {given!r}' in message


# Trees: a slot of the scheduler for each node.


def treed(target: str, drafter: str, num_nodes: int | str, **config: Any) -> SpeculativeConfig:
    """The speculative config alone: an engine needs the V2 runner, which needs Triton."""
    config = {"method": "dflash", "model": drafter} | config
    args = engine_args(target, speculative_config=config, additional_config={"dflash": {"tree": num_nodes}})
    made = args.create_speculative_config(args.create_model_config(), ParallelConfig())
    assert made is not None
    return made


@pytest.mark.parametrize(
    ("tree", "num_nodes", "num_depths", "is_auto"), [(31, 31, 15, False), (6, 6, 6, False), ("auto", 63, 15, True)]
)
def test_a_tree_says_how_many_tokens_are_verified(
    target: str, drafter: str, tree: int | str, num_nodes: int, num_depths: int, is_auto: bool
) -> None:
    config = treed(target, drafter, tree)
    assert config.num_speculative_tokens == num_nodes
    shape = draft_tree(SimpleNamespace(speculative_config=config))
    assert shape == (num_nodes, num_depths, num_nodes, is_auto)


def test_trees_that_follow_the_load_may_have_a_most(target: str, drafter: str) -> None:
    config = treed(target, drafter, "auto", num_speculative_tokens=24)
    assert config.num_speculative_tokens == 24
    assert draft_tree(SimpleNamespace(speculative_config=config)) == (24, 15, 24, True)
    with pytest.raises(ValueError, match='"num_speculative_tokens" = 128: .* from 1 to 127'):
        treed(target, drafter, "auto", num_speculative_tokens=128)


def test_recurrent_targets_keep_the_chain(
    target: str, drafter: str, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(logger, "propagate", True)
    monkeypatch.setattr(ModelConfig, "is_hybrid", True)
    config = treed(target, drafter, 31)
    assert config.num_speculative_tokens == 15
    assert draft_tree(SimpleNamespace(speculative_config=config)) is None
    assert "has recurrent state, so chains are drafted" in caplog.text
    assert startup_fallbacks(SimpleNamespace(speculative_config=config)) == (Fallback.HYBRID_TARGET,)


@pytest.mark.parametrize(
    ("sizes", "expected"),
    [
        ((63, 256, 8192), [(1, 64, 63), (65, 128, 31), (129, 256, 15)]),
        ((63, 64, 8192), [(1, 64, 63)]),
        ((63, 1024, 8192), [(1, 64, 63), (65, 128, 31), (129, 256, 15), (257, 512, 7), (513, 1024, 3)]),
        ((63, 8, 64), [(1, 1, 31), (2, 2, 15), (3, 4, 7), (5, 8, 3)]),
        ((63, 100, 64), [(1, 1, 31), (2, 2, 15), (3, 4, 7), (5, 8, 3), (9, 100, 1)]),
    ],
)
def test_what_the_scheduler_plans_for(sizes: tuple[int, int, int], expected: list[tuple[int, int, int]]) -> None:
    """Half of a step's tokens at most, as long as there is a node a request."""
    assert planned_nodes(*sizes) == expected


def test_chains_have_no_tree(target: str, drafter: str) -> None:
    assert draft_tree(SimpleNamespace(speculative_config=speculative(target, drafter))) is None


def test_a_tree_and_another_number_of_tokens(target: str, drafter: str) -> None:
    assert treed(target, drafter, 31, num_speculative_tokens=31).num_speculative_tokens == 31
    with pytest.raises(ValueError, match='"num_speculative_tokens" = 15.* "tree" of 31 nodes'):
        treed(target, drafter, 31, num_speculative_tokens=15)


@pytest.mark.parametrize(
    ("has_triton", "advice"), [(True, "set VLLM_USE_V2_MODEL_RUNNER=1"), (False, "draft on a GPU")]
)
def test_a_tree_needs_the_v2_runner(
    target: str, drafter: str, has_triton: bool, advice: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("VLLM_USE_V2_MODEL_RUNNER", "0")
    monkeypatch.setattr(engine_args_module, "HAS_TRITON", has_triton)
    message = complaint(target, drafter, additional_config={"dflash": {"tree": 31}})
    assert '"tree" needs' in message
    assert advice in message


@pytest.mark.parametrize(
    ("additional_config", "warned"),
    [
        ({"dflash": {}, "others": 1, "dflash2": {"draft_weights": "fp8", "more": 1}, "flash": {}}, None),
        ({"dlfash": {"tree": "auto"}}, "has 'dlfash', which has no effect there: is it meant to be \"dflash\"?"),
        ({"DFlash": {"tree": "auto"}}, "has 'DFlash', which has no effect"),
        ({"dflash": {}, "tree": "auto"}, "is it meant to be in \"dflash\": {'tree': ...}?"),
    ],
)
def test_options_that_are_misplaced(
    target: str,
    drafter: str,
    additional_config: dict[str, Any],
    warned: str | None,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    monkeypatch.setattr(logger, "propagate", True)
    speculative(target, drafter, additional_config=additional_config)
    assert "has no effect" not in caplog.text if warned is None else warned in caplog.text


def test_options_of_an_engine_that_drafts_nothing(
    target: str, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(logger, "propagate", True)
    engine_args(target, additional_config={"other": 1}).create_engine_config()
    assert "has no effect" not in caplog.text
    engine_args(target, additional_config={"dflash": {"tree": 31}}).create_engine_config()
    assert '"dflash" has no effect: --speculative-config names no drafter' in caplog.text


# Parallelism.


def parallel(target: str, drafter: str, flags: dict[str, int], **config: Any) -> Any:
    config = {"method": "dflash", "model": drafter} | config
    return engine_args(
        target, distributed_executor_backend="mp", speculative_config=config, **flags
    ).create_engine_config()


def test_no_pipelines(target: str, drafter: str) -> None:
    with pytest.raises(ValueError, match="does not draft with --pipeline-parallel-size 2 on vLLM's V1 runner"):
        parallel(target, drafter, {"pipeline_parallel_size": 2})


@pytest.mark.parametrize("runner", ["V1", "V2"])
@pytest.mark.parametrize("kind", ["pipeline_parallel", "decode_context_parallel", "prefill_context_parallel"])
def test_sizes_that_must_be_one(kind: str, runner: str) -> None:
    sizes = dict.fromkeys(
        (
            "pipeline_parallel_size",
            "decode_context_parallel_size",
            "prefill_context_parallel_size",
            "data_parallel_size",
        ),
        1,
    )
    config: Any = SimpleNamespace(
        parallel_config=SimpleNamespace(**sizes),
        speculative_config=SimpleNamespace(draft_sample_method="greedy"),
        use_v2_model_runner=runner == "V2",
        additional_config={},
    )
    refuse_unsupported(config)
    setattr(config.parallel_config, f"{kind}_size", 4)
    with pytest.raises(ValueError) as caught:
        refuse_unsupported(config)
    flag = f"--{kind.replace('_', '-')}-size"
    assert str(caught.value) == f"vllm_dflash does not draft with {flag} 4 on vLLM's {runner} runner: set it to 1"


def test_an_interval_of_prompts_is_for_one_engine(target: str, drafter: str) -> None:
    """Data parallel ranks must admit them in the same steps."""
    config = {"speculative_config": {"method": "dflash", "model": drafter}, "data_parallel_size": 2}
    for interval in (4, "auto"):
        with pytest.raises(ValueError, match="take vLLM's own --prefill-schedule-interval") as caught:
            options = {"dflash": {"prefill_schedule_interval": interval}}
            engine_args(target, additional_config=options, **config).create_engine_config()
        assert f'"prefill_schedule_interval" = {interval!r} does not go together with --data-parallel-size 2' in str(
            caught.value
        )


def test_probabilistic_drafts_need_the_v2_runner(target: str, drafter: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("VLLM_USE_V2_MODEL_RUNNER", "0")
    assert "\"draft_sample_method\" = 'probabilistic' is not supported on vLLM's V1 runner" in complaint(
        target, drafter, draft_sample_method="probabilistic"
    )


def test_a_drafter_that_cannot_be_split(target: str, tmp_path: Path) -> None:
    drafter = str(write_drafter(tmp_path, num_attention_heads=6, num_key_value_heads=3))
    tp2 = {"tensor_parallel_size": 2}
    with pytest.raises(ValueError, match='num_key_value_heads = 3 .* "draft_tensor_parallel_size" to 1'):
        parallel(target, drafter, tp2)
    assert (
        parallel(target, drafter, tp2, draft_tensor_parallel_size=1).speculative_config.draft_tensor_parallel_size == 1
    )
    with pytest.raises(ValueError, match="draft_tensor_parallel_size=3 cannot be other value than 1 or target"):
        parallel(target, drafter, tp2, draft_tensor_parallel_size=3)


def test_compiled_graphs_of_whole_and_of_split_drafters_are_kept_apart(target: str, drafter: str) -> None:
    """vLLM keeps them by this hash, which would otherwise not tell these apart."""
    sizes = {"tensor_parallel_size": 2}
    split, whole = (parallel(target, drafter, sizes, draft_tensor_parallel_size=size) for size in (2, 1))
    assert split.compute_hash() != whole.compute_hash()


# Workers that Ray places. vLLM refuses its Ray executor on a CPU when it starts, not here.


@pytest.mark.parametrize("claimed", [True, False])
def test_workers_that_ray_places_get_a_check(target: str, drafter: str, claimed: bool) -> None:
    arguments = {"speculative_config": {"method": "dflash", "model": drafter}} if claimed else {}
    config = engine_args(target, distributed_executor_backend="ray", **arguments).create_engine_config()
    name = "vllm_dflash.compat.workers.extension.CheckedWorker" if claimed else ""
    assert config.parallel_config.worker_extension_cls == name


# The --spec-* flags.


def from_flags(*flags: str) -> EngineArgs:
    parser = EngineArgs.add_cli_args(argparse.ArgumentParser())
    return EngineArgs.from_cli_args(parser.parse_args(flags))


def common_flags(target: str) -> tuple[str, ...]:
    return ("--model", target, "--skip-tokenizer-init", "--dtype", "float32", "--max-model-len", "128")


@pytest.mark.parametrize(("flags", "expected"), [((), 15), (("--spec-tokens", "7"), 7)])
def test_spec_flags(target: str, drafter: str, flags: tuple[str, ...], expected: int) -> None:
    args = from_flags(*common_flags(target), "--spec-method", "dflash", "--spec-model", drafter, *flags)
    made = args.create_engine_config().speculative_config
    assert (made.method, made.model, made.num_speculative_tokens) == ("dflash", drafter, expected)


def test_spec_flags_are_checked(target: str, drafter: str) -> None:
    flags = ("--spec-method", "dflash", "--spec-model", drafter, "--spec-tokens", "16")
    with pytest.raises(ValueError, match="block_size = 16"):
        from_flags(*common_flags(target), *flags).create_engine_config()


def test_json_and_flags_together(target: str, drafter: str) -> None:
    config = f'{{"method": "dflash", "model": "{drafter}"}}'
    args = from_flags(*common_flags(target), "--speculative-config", config, "--spec-tokens", "5")
    assert args.create_engine_config().speculative_config.num_speculative_tokens == 5


# Pairs and checkpoints that do not fit. Without these checks most of them would draft rubbish without a word.


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({"dflash_config": {"target_layer_ids": [1, 6]}}, ["dflash_config.target_layer_ids", "layer 6", "0..5"]),
        ({"num_target_layers": 12}, ["num_target_layers = 12", "has 6"]),
        ({"target_hidden_size": 56}, ["target_hidden_size", "56", "hidden_size = 48"]),
        ({"hidden_size": 56}, ["hidden_size", "56", "hidden_size = 48"]),
        ({"vocab_size": 100}, ["vocab_size = 100", "96"]),
        ({"block_size": ABSENT}, ["'block_size'", "None"]),
        ({"dflash_config": {"mask_token_id": ABSENT}}, ["dflash_config.mask_token_id", "missing"]),
        ({"dflash_config": {"mask_token_id": 96}}, ["dflash_config.mask_token_id", "96"]),
        ({"num_hidden_layers": 3}, ["missing tensor(s)", "layers.2.input_layernorm.weight"]),
        ({"intermediate_size": 64}, ["layers.0.mlp.down_proj.weight", "[48, 80]", "[48, 64]"]),
        ({"hidden_size": 56, "target_hidden_size": 48}, ["fc.weight", "[48, 96]", "[56, 96]"]),
    ],
)
def test_a_drafter_that_does_not_fit_is_refused(
    target: str, tmp_path: Path, changes: dict[str, Any], expected: list[str]
) -> None:
    """The tensors are the plain drafter's throughout; its config.json says something else."""
    message = complaint(target, str(write_config(write_drafter(tmp_path), drafter_config(**changes))))
    assert str(tmp_path) in message
    for part in expected:
        assert part in message


def test_another_width_needs_tables_of_its_own(target: str, tmp_path: Path) -> None:
    bare = write_drafter(tmp_path / "bare", hidden_size=56, target_hidden_size=48)
    assert "its own embed_tokens.weight and lm_head.weight" in complaint(target, str(bare))
    tables = ["embed_tokens.weight", "lm_head.weight"]
    whole = write_drafter(tmp_path / "whole", hidden_size=56, target_hidden_size=48, own_tensors=tables)
    assert speculative(target, str(whole)).num_speculative_tokens == 15


def test_directory_without_config_json(target: str, tmp_path: Path) -> None:
    message = complaint(target, str(tmp_path))
    assert f"no config.json in the drafter's directory {tmp_path}" in message
    assert "--speculative-config" in message


def test_config_json_that_is_not_json(target: str, tmp_path: Path) -> None:
    (write_drafter(tmp_path) / "config.json").write_text("{", encoding="utf-8")
    assert f"{tmp_path / 'config.json'} is not valid JSON" in complaint(target, str(tmp_path))


def test_truncated_weights(target: str, tmp_path: Path) -> None:
    file = write_drafter(tmp_path) / "model.safetensors"
    truncate(file)
    message = complaint(target, str(tmp_path))
    assert str(file) in message
    assert "truncated download" in message


def test_directory_without_weights(target: str, tmp_path: Path) -> None:
    message = complaint(target, str(write_config(tmp_path, drafter_config())))
    assert f"no *.safetensors in the drafter's directory {tmp_path}" in message


def test_weights_are_not_looked_for_where_they_are_made_up(target: str, tmp_path: Path) -> None:
    drafter = str(write_config(tmp_path, drafter_config()))
    args = engine_args(target, speculative_config={"method": "dflash", "model": drafter}, load_format="dummy")
    assert args.create_engine_config().speculative_config.num_speculative_tokens == 15


# Limits.


def test_no_model_is_refused(target: str) -> None:
    with pytest.raises(ValueError, match='needs a "model"'):
        engine_args(target, speculative_config={"method": "dflash"}).create_engine_config()


def test_a_limit_of_the_drafters_own_is_refused(target: str, drafter: str) -> None:
    message = complaint(target, drafter, max_model_len=64)
    assert "max_model_len" in message
    assert "64" in message


def test_a_block_longer_than_any_request_is_refused(target: str, drafter: str) -> None:
    args = EngineArgs(
        model=target,
        skip_tokenizer_init=True,
        max_model_len=12,
        speculative_config={"method": "dflash", "model": drafter},
    )
    with pytest.raises(ValueError, match="--max-model-len 12 leaves no room for a block of 1 \\+ 15 rows"):
        args.create_engine_config()


@pytest.mark.parametrize(
    ("tree", "advice"),
    [(127, 'a tree of 1 \\+ 127 rows: lower .* "tree"'), ("auto", '1 \\+ 63 rows: lower .* "num_speculative_tokens"')],
)
def test_a_tree_longer_than_any_request_is_refused(target: str, drafter: str, tree: int | str, advice: str) -> None:
    args = EngineArgs(
        model=target,
        skip_tokenizer_init=True,
        max_model_len=60,
        speculative_config={"method": "dflash", "model": drafter},
        additional_config={"dflash": {"tree": tree}},
    )
    with pytest.raises(ValueError, match=f"--max-model-len 60 leaves no room for .*{advice}"):
        args.create_engine_config()


def test_a_checkpoint_that_proposes_its_whole_block_is_corrected(target: str, tmp_path: Path) -> None:
    """Some write block_size where speculative_tokens belongs, and vLLM takes K from there."""
    raw = speculators_config(block_size=8)
    raw["speculators_config"]["proposal_methods"][0]["speculative_tokens"] = 8
    write_config(write_drafter(tmp_path, block_size=8), raw)
    assert speculative(target, str(tmp_path), num_speculative_tokens=8).num_speculative_tokens == 7


# Options.


def test_unknown_option_is_refused(target: str, drafter: str) -> None:
    message = complaint(target, drafter, additional_config={"dflash": {"nope": 1}})
    assert "--additional-config" in message
    assert "['nope']" in message


def test_options_of_others_are_none_of_ours(target: str, drafter: str) -> None:
    additional_config = {"another_plugin": {"nope": 1}, "dflash": {}}
    assert speculative(target, drafter, additional_config=additional_config).num_speculative_tokens == 15


# What is vLLM's stays vLLM's.


def claimed(config: SpeculativeConfig) -> bool:
    return drafts_here(SimpleNamespace(speculative_config=config))  # type: ignore[arg-type]


def test_a_plain_drafter_is_ours(target: str, drafter: str) -> None:
    assert claimed(speculative(target, drafter))


@pytest.mark.parametrize("key", ["attention_sink_bias", "attention_value_scale"])
def test_parts_that_only_vllm_has_stay_with_vllm(target: str, tmp_path: Path, key: str) -> None:
    raw = drafter_config()
    raw["dflash_config"][key] = 0.5 if key == "attention_value_scale" else True
    drafter = str(write_config(tmp_path, raw))
    assert not claimed(speculative(target, drafter, num_speculative_tokens=15))


def test_a_drafter_in_an_object_store_stays_with_vllm() -> None:
    assert engine_args_module._read_drafter({"model": "s3://bucket/drafter"}) is None


def test_dflash2_is_passed_on_untouched(target: str, tmp_path: Path) -> None:
    """K beyond the block, and no weights at all: none of our checks was made.

    Not through a whole engine config: vLLM's V1 runner does not draft with DFlash2 either.
    """
    drafter = str(write_config(tmp_path, drafter_config(architectures=["DFlash2DraftModel"], conv_kernel_size=2)))
    config = {"method": "dflash", "model": drafter, "num_speculative_tokens": 20}
    args = engine_args(target, speculative_config=config)
    made = args.create_speculative_config(args.create_model_config(), ParallelConfig())
    assert (made.method, made.num_speculative_tokens) == ("dflash", 20)


def test_dflash2_gets_no_default_k(target: str, tmp_path: Path) -> None:
    drafter = str(write_config(tmp_path, drafter_config(architectures=["DFlash2DraftModel"])))
    assert "`num_speculative_tokens` was not provided" in complaint(target, drafter)


def test_other_methods_are_passed_on_untouched(target: str) -> None:
    config = {"method": "ngram", "num_speculative_tokens": 40, "prompt_lookup_max": 4}
    args = engine_args(target, speculative_config=config, additional_config={"dflash": {"nope": 1}})
    made = args.create_engine_config().speculative_config
    assert (made.method, made.num_speculative_tokens) == ("ngram", 40)


def test_without_speculation(target: str) -> None:
    assert engine_args(target).create_engine_config().speculative_config is None
