# SPDX-License-Identifier: Apache-2.0
"""`vllm-dflash train`: from a target and prompts to a drafter that serves, stage by stage.

prompts -> responses of the target -> features -> training -> the published layout and a model card. What a stage has
done is kept in `work/`; the same command goes on from there.
"""

from __future__ import annotations

import contextlib
import gc
import logging
import os
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import AutoModelForCausalLM, AutoTokenizer, Qwen3Config

from vllm_dflash.checkpoint import resolve_model_dir
from vllm_dflash.hf import DFlashDraftModel, TargetFeatures
from vllm_dflash.hf.sequences import id_list
from vllm_dflash.hf.verification import TargetMasks
from vllm_dflash.training.card import write_card
from vllm_dflash.training.drafter_shape import new_drafter_config
from vllm_dflash.training.evaluate import Acceptance, acceptance
from vllm_dflash.training.feature_cache import FeatureCache
from vllm_dflash.training.feature_plan import cache_fingerprint
from vllm_dflash.training.feature_writing import write_cache
from vllm_dflash.training.held_out import split
from vllm_dflash.training.mask_token import find_mask_token
from vllm_dflash.training.origin import check_origin, hash_of, responses_hash, write_origin
from vllm_dflash.training.prompt_files import prompt_token_ids, read_prompts
from vllm_dflash.training.prompts import Prompt
from vllm_dflash.training.recipe import Recipe
from vllm_dflash.training.reduced_vocabulary import Coverage, choose_vocabulary, coverage, take_rows
from vllm_dflash.training.responding import (
    Asked,
    ResponseJob,
    ask,
    respond_with_transformers,
    respond_with_vllm,
    uses_vllm,
)
from vllm_dflash.training.response_store import ResponseStore
from vllm_dflash.training.responses import Response
from vllm_dflash.training.run_state import drop_checkpoints, finished, latest_checkpoint
from vllm_dflash.training.saving import save_drafter

logger = logging.getLogger(__name__)
_MIN_TOKENS = 2  # of a response: an anchor and one token to predict
_DATA_FIRST = "run this command once without `accelerate launch`, with --only-data"


@dataclass(frozen=True)
class TrainOptions:
    """What the command line says."""

    target: str
    prompts: tuple[str, ...]
    output: Path
    recipe: Recipe
    init_from: str | None = None
    dry_run: bool = False
    only_data: bool = False


class DrafterRun:
    """The stages of one run."""

    def __init__(self, options: TrainOptions) -> None:
        self.options, self.recipe = options, options.recipe
        self.output, self.work = options.output, options.output / "work"
        self.is_main = int(os.environ.get("RANK", "0")) == 0
        self.device = (
            torch.device("cuda", int(os.environ.get("LOCAL_RANK", "0"))) if torch.cuda.is_available() else None
        )
        if not self.is_main:
            logging.getLogger("vllm_dflash").setLevel(logging.WARNING)

    def run(self) -> Acceptance | None:
        """All stages. Returns the best drafter's acceptance, if one was trained and this rank has measured it."""
        if self.output.exists() and not self.output.is_dir():
            raise ValueError(f"--output {self.output}: is a file, a folder is needed")
        draft = self.drafter()
        self._check_target(draft)
        if self.options.dry_run:
            save_drafter(draft, dry_run_folder(self.output))
            return None
        prompts, held_out = split(self.enough_prompts(), self.recipe.data.held_out, self.recipe.data.max_prompts)
        responses = self.responses(prompts)
        if self.options.only_data:
            self.feature_cache(draft, responses)
            return None
        vocabulary = self.vocabulary(draft, responses)
        found = self.train(draft, responses, held_out)
        if found is not None:
            write_card(self.output, self.options.target, self.recipe, len(responses), found, vocabulary)
        return found

    # The models.

    @cached_property
    def tokenizer(self) -> Any:
        with _target_errors(self.options.target):
            return AutoTokenizer.from_pretrained(self.options.target)

    @property
    def dtype(self) -> torch.dtype:
        """Of the target, whatever is done with it."""
        return torch.bfloat16 if self.recipe.training.is_bf16(self.device is not None) else torch.float32

    @cached_property
    def target(self) -> nn.Module:
        """Frozen."""
        with _target_errors(self.options.target):
            target = AutoModelForCausalLM.from_pretrained(self.options.target, dtype=self.dtype)
        return target.to(self.device).eval().requires_grad_(False)

    @property
    def end_ids(self) -> list[int]:
        ends = self.target.generation_config.eos_token_id
        return id_list(self.tokenizer.eos_token_id if ends is None else ends)

    def _check_target(self, draft: DFlashDraftModel) -> None:
        """What would otherwise show at the end: layers that cannot be tapped or masked, too few positions."""
        TargetFeatures(self.target, draft.target_layer_ids)
        TargetMasks(self.target)
        data = self.recipe.data
        positions = getattr(self.target.config.get_text_config(decoder=True), "max_position_embeddings", None)
        if positions is None or data.max_length <= positions:
            return
        if "max_length" in data.model_fields_set:
            raise ValueError(f"data.max_length: {data.max_length} is more than the target's {positions} positions")
        logger.info("sequences of up to %d tokens, as many as the target has positions", positions)
        self.recipe = self.recipe.model_copy(update={"data": data.model_copy(update={"max_length": positions})})

    def drafter(self) -> DFlashDraftModel:
        """A new one, or the one to start from."""
        if self.options.init_from is not None:
            if self.recipe.model.model_fields_set:
                raise ValueError("--init-from: that drafter's shape stands, so leave the recipe's `model` section out")
            return started_from(self.options.init_from, self.target)
        mask_token_id = find_mask_token(
            self.tokenizer, self.target.get_input_embeddings().num_embeddings, self.recipe.model.mask_token
        )
        token_ids = self._chosen_tokens(())  # what is wrong with their number shows before responses are written
        torch.manual_seed(self.recipe.training.seed)
        draft = new_drafter(self.target, new_drafter_config(self.target, self.recipe.model, mask_token_id))
        if token_ids is not None:
            take_rows(draft, self.target, token_ids)
        return draft

    def _chosen_tokens(self, responses: Sequence[Response]) -> list[int] | None:
        """The draft vocabulary for these responses; None: the recipe wants no other than the target's."""
        size = self.recipe.model.draft_vocab_size
        if size is None:
            return None
        return choose_vocabulary(responses, size, self.target.get_input_embeddings().num_embeddings, self.end_ids)

    def vocabulary(self, draft: DFlashDraftModel, responses: Sequence[Response]) -> Coverage | None:
        """Give a new drafter the tokens that the responses have most of. What its vocabulary, if it has one, covers."""
        token_ids = self._chosen_tokens(responses)
        if token_ids is not None:
            take_rows(draft, self.target, token_ids)
        found = coverage(draft, responses)
        if found is not None:
            logger.info("draft vocabulary: %s", found)
        return found

    # The data.

    def enough_prompts(self) -> dict[str, list[int]]:
        """All, or as many different ones as the recipe wants."""
        data, found, different = self.recipe.data, {}, set()
        for name, ids in self.prompts():
            found[name] = ids
            different.add(tuple(ids))
            if data.max_prompts is not None and len(different) >= data.max_prompts + data.held_out:
                break
        return found

    def prompts(self) -> Iterator[tuple[str, list[int]]]:
        """Token ids by the prompts' ids. Where files use an id again, it gets a number."""
        thinking = self.recipe.data.thinking
        template = {} if thinking is None else {"enable_thinking": thinking}
        uses: Counter[str] = Counter()
        for source in self.options.prompts:
            for prompt in read_prompts(source):
                uses[prompt.id] += 1
                name = prompt.id if uses[prompt.id] == 1 else f"{prompt.id}#{uses[prompt.id]}"
                yield name, prompt_token_ids(prompt, self.tokenizer, template)

    def responses(self, prompts: Mapping[str, Sequence[int]]) -> list[Response]:
        """The target's, in the prompts' order: what is there, and the rest written now."""
        asked = ask(prompts, self.recipe.data)
        store = ResponseStore(self.work, self._origin_of_responses(asked))
        missing = set(store.missing(each.id for each in asked))
        if missing and not self.is_main:
            raise ValueError(f"{len(missing)} prompts have no response in {self.work} yet: {_DATA_FIRST}")
        self._respond(store, [each for each in asked if each.id in missing])
        found = [store.responses[each.id] for each in asked]
        usable = [response for response in found if len(response.token_ids) >= _MIN_TOKENS]
        if len(usable) < len(found):
            logger.warning("%d responses have less than %d tokens", len(found) - len(usable), _MIN_TOKENS)
        if not usable:
            raise ValueError(f"none of {len(found)} responses has {_MIN_TOKENS} tokens: nothing to train on")
        logger.info("%d responses of %d tokens", len(usable), sum(len(response.token_ids) for response in usable))
        return usable

    def _origin_of_responses(self, asked: Sequence[Asked]) -> dict[str, Any]:
        data = self.recipe.data
        return {
            "target": _place(self.options.target),
            "prompts": hash_of([each.prompt_token_ids for each in asked]),
            "max_new_tokens": data.max_new_tokens,
            "max_length": data.max_length,
            "sampled_share": data.sampled_share,
            "temperatures": list(data.temperatures),
            "seed": data.seed,
        }

    def _respond(self, store: ResponseStore, asked: list[Asked]) -> None:
        if not asked:
            return
        logger.info("%d responses are to be written", len(asked))
        if not uses_vllm(self.recipe.data):
            respond_with_transformers(store, self.target, asked, self.end_ids)
            return
        ends = tuple(self.end_ids)
        del self.target  # vLLM wants the memory
        gc.collect()
        torch.cuda.empty_cache()
        dtype = str(self.dtype).removeprefix("torch.")
        data = self.recipe.data
        memory = data.gpu_memory_utilization
        job = ResponseJob(self.options.target, tuple(asked), ends, data.max_length, dtype, memory)
        respond_with_vllm(store, job, self.work / "vllm.log")

    # The training.

    def train(
        self, draft: DFlashDraftModel, responses: list[Response], held_out: Mapping[str, Sequence[int]]
    ) -> Acceptance | None:
        """Train. How much of the best drafter's drafts is accepted, on the rank that measures."""
        from vllm_dflash.training.trainer import DrafterTrainer

        self._check_run(self._origin_of_run(draft, responses))
        if (done := finished(self.work)) is not None:
            logger.info("this run has come to its end before: nothing is left to do")
            return done.best if self.is_main else None
        prompts = [Prompt(key, "", "", list(ids), "") for key, ids in held_out.items()]

        def evaluate(candidate: DFlashDraftModel) -> Acceptance:
            with torch.device(self.target.device):
                return acceptance(
                    candidate, self.target, prompts, self.recipe.training.evaluate_tokens, self.end_ids or None
                )

        cache = self.feature_cache(draft, responses)
        read_features = cache.batch if cache is not None else None
        trainer = DrafterTrainer(self.target, draft, responses, self.recipe, self.output, evaluate, read_features)
        state = trainer.run()
        if not self.is_main:
            return None
        found = state.best
        state.write(self.work)
        drop_checkpoints(self.work)
        return found

    def _check_run(self, origin: dict[str, Any]) -> None:
        """A run that has come to a checkpoint goes on only as it began."""
        file = self.work / "run.json"
        if latest_checkpoint(self.work) is not None or finished(self.work) is not None:
            check_origin(file, origin, "Choose another --output, or delete run_state.json and checkpoint-* there")
        elif self.is_main:
            write_origin(file, origin)

    def feature_cache(self, draft: DFlashDraftModel, responses: list[Response]) -> FeatureCache | None:
        """The target's features on disk, written now if they are not there, where the recipe wants them."""
        if self.recipe.data.feature_cache_gb is None:
            return None
        folder, max_length, dtype = self.work / "features", self.recipe.data.max_length, self.target.dtype
        directory = resolve_model_dir(self.options.target)
        if not self.is_main:
            origin = cache_fingerprint(directory, responses, draft.target_layer_ids, max_length, dtype)
            try:
                return FeatureCache.open(folder, origin)
            except ValueError as error:
                raise ValueError(f"{error}: {_DATA_FIRST}") from error
        return write_cache(
            folder,
            self.target,
            responses,
            draft.target_layer_ids,
            max_length=max_length,
            dtype=dtype,
            target_dir=directory,
            budget=int(self.recipe.data.feature_cache_gb * 2**30),
            progress=_every_tenth("features"),
        )

    def _origin_of_run(self, draft: DFlashDraftModel, responses: list[Response]) -> dict[str, Any]:
        """All that decides the weights."""
        of_no_weight = {
            "data": {"engine", "gpu_memory_utilization", "feature_cache_gb"},
            "training": {"checkpoint_every", "evaluate_every", "evaluate_tokens"},
        }
        return {
            "target": _place(self.options.target),
            "init_from": None if self.options.init_from is None else _place(self.options.init_from),
            "num_processes": int(os.environ.get("WORLD_SIZE", "1")),
            "responses": responses_hash(responses),
            "mask_token_id": draft.mask_token_id,
            "recipe": self.recipe.model_dump(mode="json", exclude=of_no_weight),
        }


def _place(model: str) -> str:
    """A directory however it was written, or a hub id."""
    return str(Path(model).resolve()) if Path(model).is_dir() else model


@contextlib.contextmanager
def _target_errors(target: str) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise ValueError(f"--target {target}: not a model's directory nor a readable hub id: {error}") from error
    except ValueError as error:
        raise ValueError(f"--target {target}: {error}") from error


def _every_tenth(what: str) -> Callable[[int, int], None]:
    """Progress in the log, ten lines of it."""
    shown = -1

    def show(done: int, total: int) -> None:
        nonlocal shown
        if done * 10 // total != shown:
            shown = done * 10 // total
            logger.info("%s: %d of %d", what, done, total)

    return show


def new_drafter(target: nn.Module, config: Qwen3Config) -> DFlashDraftModel:
    """Random weights but for the last norm's: the target's LM head expects hidden states of its own norm's size."""
    draft = DFlashDraftModel(config).float()
    norm = getattr(target.get_decoder(), "norm", None)
    if norm is not None:
        with torch.no_grad():  # of ones, whose size is one; some families keep 1 + weight
            ones = torch.ones_like(draft.norm.weight, device=target.device, dtype=target.dtype)
            draft.norm.weight.copy_(norm(ones))
    return draft


def dry_run_folder(output: Path) -> Path:
    """Of its own: an untrained drafter never takes the place of a trained one."""
    return output / "dry-run"


def started_from(drafter: str, target: nn.Module) -> DFlashDraftModel:
    """An existing drafter, to be trained on. Raises ValueError where it is another target's, or not trainable here."""
    draft = DFlashDraftModel.from_pretrained(drafter, dtype=torch.float32)
    of_target = target.config.get_text_config(decoder=True)
    for name, own, theirs in (
        ("hidden_size", draft.dflash.target_hidden_size, of_target.hidden_size),
        ("vocab_size", draft.dflash.vocab_size, target.get_input_embeddings().num_embeddings),
    ):
        if own != theirs:
            raise ValueError(f"--init-from {drafter}: made for a target of {name} {own}, and --target has {theirs}")
    if draft.target_layer_ids[-1] >= of_target.num_hidden_layers:
        raise ValueError(
            f"--init-from {drafter}: taps layers {list(draft.target_layer_ids)}, and --target has "
            f"{of_target.num_hidden_layers}"
        )
    if draft.embed_tokens is not None or draft.mask_embedding is not None:
        part = "an embedding table" if draft.embed_tokens is not None else "a mask embedding"
        raise ValueError(f"--init-from {drafter}: has {part} of its own, and only the target's is trained with")
    return draft
