# SPDX-License-Identifier: Apache-2.0
"""Where an engine's speculative config is made: defaults and checks of a DFlash pair, before anything starts.

Patches: `EngineArgs.create_speculative_config` and `create_engine_config`. Reason: vLLM has no default for K with
dflash, never reads the drafter's block size, and checks nothing of the pair. Added: K from the checkpoint, and errors
in the user's terms. Removable when vLLM lets a plugin validate a configuration.
"""

from __future__ import annotations

from types import ModuleType
from typing import TYPE_CHECKING, Any

from vllm.triton_utils import HAS_TRITON

from vllm_dflash.compat import patching
from vllm_dflash.compat.capture_sizes import most_requests
from vllm_dflash.compat.metrics.fallbacks import Fallback
from vllm_dflash.compat.ownership import TreeShape, claim, draft_tree, drafts_here, plan_drafting_slots
from vllm_dflash.compat.refusals import refuse_unsupported
from vllm_dflash.compat.workers.extension import arrange_check
from vllm_dflash.config import DFlashConfig, is_dflash_checkpoint, read_config_dict
from vllm_dflash.draft_vocabulary import Encode, choose_draft_vocabulary
from vllm_dflash.logs import logger
from vllm_dflash.options import AUTO, DFlashOptions, misplaced_options
from vllm_dflash.validation import (
    TargetFacts,
    check_checkpoint,
    check_limits,
    check_pair,
    check_split,
    resolve_num_speculative_tokens,
    resolve_num_tree_nodes,
)

if TYPE_CHECKING:
    from vllm.config import ModelConfig, ParallelConfig, SpeculativeConfig, VllmConfig
    from vllm.engine.arg_utils import EngineArgs


def install(arg_utils: ModuleType) -> None:
    """Patch `vllm.engine.arg_utils`."""
    patching.replace(arg_utils.EngineArgs, "create_speculative_config", create_speculative_config)
    patching.replace(arg_utils.EngineArgs, "create_engine_config", create_engine_config)


def create_speculative_config(
    self: EngineArgs, target_model_config: ModelConfig, target_parallel_config: ParallelConfig
) -> SpeculativeConfig | None:
    """vLLM's method, with the drafter's defaults filled in and the pair checked. Same signature."""
    from vllm.engine.arg_utils import EngineArgs

    make = patching.original(EngineArgs, "create_speculative_config")
    user = _user_config(self)
    raw = _read_drafter(user) if _asks_for_dflash(user) else None
    if raw is None:
        return make(self, target_model_config, target_parallel_config)
    if not is_dflash_checkpoint(raw):
        logger.info("vllm_dflash: standing aside, %s is not a plain DFlash drafter", user["model"])
        return make(self, target_model_config, target_parallel_config)
    config = DFlashConfig.from_dict(raw, source=str(user["model"]))
    options = DFlashOptions.from_additional_config(self.additional_config)
    requested = user.get("num_speculative_tokens")
    num_nodes = _num_tree_nodes(options, target_model_config, requested)
    num_speculative_tokens = num_nodes or _resolve_num_speculative_tokens(config, raw, requested)
    has_fixed_tree = num_nodes is not None and options.tree != AUTO
    check_limits(num_speculative_tokens, target_model_config.max_model_len, user.get("max_model_len"), has_fixed_tree)
    check_pair(config, _facts(target_model_config))
    num_ranks = target_parallel_config.tensor_parallel_size
    if user.get("draft_tensor_parallel_size") in (None, num_ranks):
        check_split(config, num_ranks)
    if self.load_format != "dummy":
        check_checkpoint(config)
    if requested != num_speculative_tokens:
        self.speculative_config = {**(self.speculative_config or {}), "num_speculative_tokens": num_speculative_tokens}
    speculative = make(self, target_model_config, target_parallel_config)
    fallbacks = [Fallback.HYBRID_TARGET] if options.tree is not None and num_nodes is None else []
    vocabulary = _draft_vocabulary(options, target_model_config)
    claim(speculative, config, vocabulary, num_nodes, options.tree == AUTO, fallbacks)
    return speculative


def create_engine_config(self: EngineArgs, *args: Any, **kwargs: Any) -> VllmConfig:
    """vLLM's method, with a check of what only the whole configuration tells. Same signature."""
    from vllm.engine.arg_utils import EngineArgs

    vllm_config: VllmConfig = patching.original(EngineArgs, "create_engine_config")(self, *args, **kwargs)
    is_ours = drafts_here(vllm_config)
    for problem in misplaced_options(self.additional_config, is_ours):
        logger.warning("vllm_dflash: %s", problem)
    if not is_ours:
        return vllm_config
    refuse_unsupported(vllm_config)
    arrange_check(vllm_config.parallel_config)
    shape = draft_tree(vllm_config)
    if shape is not None:
        _prepare_for_trees(vllm_config, shape)
    return vllm_config


def _prepare_for_trees(vllm_config: VllmConfig, shape: TreeShape) -> None:
    """Check that trees can be drafted, and plan for them. Raises ValueError naming the option."""
    if not vllm_config.use_v2_model_runner:
        advice = "set VLLM_USE_V2_MODEL_RUNNER=1 in the environment" if HAS_TRITON else "draft on a GPU"
        raise ValueError(
            '--additional-config\'s "dflash": "tree" needs vLLM\'s V2 model runner, and that Triton, but this engine '
            f'has the V1 runner: {advice}, or leave "tree" out'
        )
    scheduler = vllm_config.scheduler_config
    # The adapter has memory of its own for blocks. What a forward over them takes is profiled for a full step's rows.
    all_fit = most_requests(scheduler, 1 + shape.num_depths) == scheduler.max_num_seqs
    plan_drafting_slots(vllm_config, 0 if all_fit else shape.num_depths)
    if shape.is_auto:
        if vllm_config.lora_config is not None:
            raise ValueError('--additional-config\'s "dflash": "tree" = "auto" does not go together with --enable-lora')
        _plan_for_load(vllm_config, shape.num_nodes)


def _plan_for_load(vllm_config: VllmConfig, num_nodes: int) -> None:
    """Have vLLM's scheduler plan for fewer nodes a request where many requests would fill its step by themselves."""
    speculative, scheduler = vllm_config.speculative_config, vllm_config.scheduler_config
    assert speculative is not None
    # vLLM's schedule by batch size is not for data parallelism, whose ranks have batches of their own.
    if speculative.num_speculative_tokens_per_batch_size or vllm_config.parallel_config.data_parallel_size > 1:
        return
    speculative.num_speculative_tokens_per_batch_size = planned_nodes(
        num_nodes, scheduler.max_num_seqs, scheduler.max_num_batched_tokens
    )


def planned_nodes(num_nodes: int, max_num_seqs: int, max_num_batched_tokens: int) -> list[tuple[int, int, int]]:
    """Nodes a request by batch size, as vLLM's `num_speculative_tokens_per_batch_size`.

    Verifications take at most half of a step's tokens, so that prompts get the other. Example: 63 nodes, 256 requests
    and 8192 tokens give (1, 64, 63), (65, 128, 31), (129, 256, 15).
    """
    schedule: list[tuple[int, int, int]] = []
    first = 1
    while first <= max_num_seqs:
        most = max_num_batched_tokens // 2 // (1 + num_nodes)
        if num_nodes == 1:
            most = max_num_seqs
        if most >= first:
            schedule.append((first, min(most, max_num_seqs), num_nodes))
            first = schedule[-1][1] + 1
        num_nodes = max(1, num_nodes // 2)
    return schedule


def _user_config(args: EngineArgs) -> dict[str, Any]:
    """What the user asked for, whether by --speculative-config or by the --spec-* flags."""
    user = {key.replace("-", "_"): value for key, value in (args.speculative_config or {}).items()}
    flags = {"method": args.spec_method, "model": args.spec_model, "num_speculative_tokens": args.spec_tokens}
    return user | {key: value for key, value in flags.items() if value is not None}


def _asks_for_dflash(user: dict[str, Any]) -> bool:
    """Explicitly, or, as vLLM infers it, by a drafter whose name says so."""
    name, method = str(user.get("model") or "").lower(), user.get("method")
    if method == "dflash":
        return True
    inferred = "dflash" in name and "eagle-" not in name and "eagle3" not in name
    return inferred and method in (None, "draft_model")


def _read_drafter(user: dict[str, Any]) -> dict[str, Any] | None:
    """The drafter's raw config, or None where only vLLM can fetch it (object stores)."""
    model = user.get("model")
    if model is None:
        raise ValueError(
            '--speculative-config with "method": "dflash" needs a "model": the drafter\'s directory or hub id'
        )
    return None if "://" in str(model) else read_config_dict(model, user.get("revision"))


def _num_tree_nodes(options: DFlashOptions, target: ModelConfig, requested: int | None) -> int | None:
    """Of the largest tree that is verified; None: chains."""
    if options.tree is None:
        return None
    if target.is_hybrid:
        # What a recurrent layer remembers of one branch of a tree cannot be taken back for another.
        logger.warning("vllm_dflash: %s has recurrent state, so chains are drafted, no trees", target.model)
        return None
    return resolve_num_tree_nodes(options, requested)


def _resolve_num_speculative_tokens(config: DFlashConfig, raw: dict[str, Any], requested: int | None) -> int:
    """K. A checkpoint that itself proposes more than its block holds is corrected; a user who does is refused."""
    proposals = (raw.get("speculators_config") or {}).get("proposal_methods") or [{}]
    if requested is not None and requested == proposals[0].get("speculative_tokens") == config.block_size:
        logger.warning(
            "vllm_dflash: %s proposes %d speculative_tokens, its block of %d holds %d: using those",
            config.source, requested, config.block_size, config.num_speculative_tokens,
        )  # fmt: skip
        return config.num_speculative_tokens
    return resolve_num_speculative_tokens(config, requested)


def _draft_vocabulary(options: DFlashOptions, target: ModelConfig) -> list[int] | None:
    """The token ids that may be drafted; None: all. Ends of sequence are always among them."""
    if options.draft_vocab_size is None:
        return None

    def encode() -> Encode:
        from transformers import AutoTokenizer

        tokenizer = AutoTokenizer.from_pretrained(target.tokenizer, revision=target.tokenizer_revision)
        return lambda text: tokenizer.encode(text, add_special_tokens=False)

    return choose_draft_vocabulary(
        options.draft_vocab_size, target.get_vocab_size(), options.draft_vocab_file, _stop_tokens(target), encode
    )


def _stop_tokens(target: ModelConfig) -> list[int]:
    found = (
        getattr(target.hf_text_config, "eos_token_id", None),
        target.try_get_generation_config().get("eos_token_id"),
    )
    return [token for ids in found if ids is not None for token in (ids if isinstance(ids, list) else [ids])]


def _facts(target: ModelConfig) -> TargetFacts:
    return TargetFacts(
        model=target.model,
        num_hidden_layers=target.get_total_num_hidden_layers(),
        hidden_size=target.get_hidden_size(),
        vocab_size=target.get_vocab_size(),
    )
