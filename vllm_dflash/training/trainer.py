# SPDX-License-Identifier: Apache-2.0
"""The training of a drafter against its frozen target, on one device or on many (paper, sections 4.2 and A.1).

`accelerate` runs it: mixed precision, data-parallel ranks, accumulation, checkpoints. A step's batches and anchors
follow from the seed and the step's number, so a run that was killed goes on as if it had not been.
"""

from __future__ import annotations

import copy
import logging
import os
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from datetime import timedelta
from pathlib import Path

import torch
from accelerate import Accelerator, DistributedType, InitProcessGroupKwargs
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from vllm_dflash.hf import DFlashDraftModel
from vllm_dflash.training.batch_plan import BatchPlan
from vllm_dflash.training.blocks import BlockShape, DraftedBlocks, draft_blocks
from vllm_dflash.training.data import collate, sent, target_states
from vllm_dflash.training.evaluate import Acceptance
from vllm_dflash.training.objective import Objective, objective_sums, target_rows
from vllm_dflash.training.read_ahead import ReadAhead, ReadFeatures
from vllm_dflash.training.recipe import Recipe
from vllm_dflash.training.reduced_vocabulary import draft_labels
from vllm_dflash.training.responses import Response
from vllm_dflash.training.run_state import RunState, latest_checkpoint, save_checkpoint
from vllm_dflash.training.saving import save_drafter
from vllm_dflash.training.schedule import cosine_with_warmup

logger = logging.getLogger(__name__)
#: Batches come in many shapes. Of those, torch 2.11's analysis of how to tile a kernel fails in RMSNorm, and its fused
#: gradients of RMSNorm's weights are of the wrong size where the number of rows is a sum: context and blocks.
_COMPILE_OPTIONS = {"triton.coalesce_tiling_analysis": False, "triton.mix_order_reduction": False}
#: Bytes of fp32 logits that exist at a time: those of a large vocabulary are the largest tensors of a step.
_LOGITS_BYTES = 2**29
_REPORT_SECONDS = 10.0

#: Of a drafter in the target's precision, on the held-out prompts.
Evaluate = Callable[[DFlashDraftModel], Acceptance]


@dataclass
class _Seen:
    """What has been since the last line of the log."""

    tokens: int = 0
    loss: Tensor | float = 0.0  # a sum; on the device, so that nobody waits for it
    steps: int = 0
    since: float = 0.0


class DrafterTrainer:
    """One run, from its last checkpoint on, to `output`: the best drafter so far, in the published layout."""

    def __init__(
        self,
        target: nn.Module,
        draft: DFlashDraftModel,
        sequences: Sequence[Response],
        recipe: Recipe,
        output: Path,
        evaluate: Evaluate,
        read_features: ReadFeatures | None = None,  # None: the target computes them
    ) -> None:
        training, wants_gpu = recipe.training, torch.cuda.is_available()
        self.accelerator = Accelerator(
            mixed_precision="bf16" if training.is_bf16(wants_gpu) else "no",
            gradient_accumulation_steps=training.accumulation,
            log_with="tensorboard",
            project_dir=output / "logs",
            # The other ranks wait while the first one measures.
            kwargs_handlers=[InitProcessGroupKwargs(timeout=timedelta(hours=2))],
        )
        _check_ranks(self.accelerator.num_processes)
        self.recipe, self.output, self.sequences = recipe, output, sequences
        self.evaluate = evaluate
        self.target = target.eval().requires_grad_(False).to(self.accelerator.device)
        self.layer_ids = draft.target_layer_ids
        self.shape = BlockShape(draft.block_size, draft.mask_token_id, training.anchors, training.tokens_per_anchor)
        objective = recipe.objective
        self.objective = Objective(objective.kind, recipe.gamma(draft.block_size), objective.alpha, objective.kl_weight)
        if draft.lm_head is not None:  # frozen, as the target's is for a drafter without one
            if self.accelerator.distributed_type == DistributedType.FSDP:
                raise ValueError("an LM head of the drafter's own (model.draft_vocab_size) is not trained under FSDP")
            draft.lm_head.requires_grad_(False)
        optimizer = torch.optim.AdamW(
            draft.parameters(), lr=training.learning_rate, weight_decay=training.weight_decay, fused=wants_gpu
        )
        compiles = training.compile if training.compile is not None else wants_gpu
        for layer in draft.layers if compiles else ():
            layer.compile(dynamic=True, options=_COMPILE_OPTIONS)
        self.draft, self.optimizer = self.accelerator.prepare(draft.float().train(), optimizer)
        lengths = [len(each.sequence) for each in sequences]
        self.plan = BatchPlan(lengths, recipe.data.max_length, training.batch_tokens, training.seed)
        self.features: ReadAhead | None = None
        if read_features is not None:
            ranks = self.accelerator.num_processes
            self.features = ReadAhead(read_features, self.plan, ranks, self.accelerator.device)
        self.state = RunState()
        self._seen = _Seen(since=time.monotonic())

    @property
    def batches_per_step(self) -> int:
        """Of all ranks."""
        return self.recipe.training.accumulation * self.accelerator.num_processes

    @property
    def num_steps(self) -> int:
        """Of the whole run."""
        training = self.recipe.training
        return training.steps or max(1, round(training.epochs * self.plan.epoch_size / self.batches_per_step))

    def run(self) -> RunState:
        """Train to the end."""
        self._resume()
        self.accelerator.init_trackers("drafter")
        while self.state.step < self.num_steps:
            self.state.step += 1
            self._train_step(self.state.step)
            is_last, every = self.state.step == self.num_steps, self.recipe.training.evaluate_every
            if every and self.state.step % every == 0 and not is_last:
                self._evaluate()
            if is_last or self.state.step % self.recipe.training.checkpoint_every == 0:
                save_checkpoint(self.accelerator, self._work, self.state)
        self._evaluate()  # behind the checkpoint: what goes wrong in it does not cost the training
        self.accelerator.end_training()
        return self.state

    @property
    def _own(self) -> DFlashDraftModel:
        """The drafter without what `accelerate` has put around it."""
        return self.accelerator.unwrap_model(self.draft)

    @property
    def _work(self) -> Path:
        return self.output / "work"

    def _resume(self) -> None:
        folder = latest_checkpoint(self._work)
        if folder is not None:
            self.accelerator.load_state(str(folder))
            self.state = RunState.read(folder)
            logger.info("going on from step %d of %d", self.state.step, self.num_steps)

    def _train_step(self, step: int) -> None:
        training = self.recipe.training
        factor = cosine_with_warmup(step, self.num_steps, training.warmup)
        for group in self.optimizer.param_groups:
            group["lr"] = training.learning_rate * factor
        for number in range(training.accumulation):
            with self.accelerator.accumulate(self.draft):
                loss = self._loss(step, number)
                self.accelerator.backward(loss)
                if self.accelerator.sync_gradients:
                    self.accelerator.clip_grad_norm_(self.draft.parameters(), training.clip)
                self.optimizer.step()
                self.optimizer.zero_grad()
            self._seen.loss = self._seen.loss + loss.detach() / training.accumulation
        self._seen.steps += 1
        if time.monotonic() - self._seen.since > _REPORT_SECONDS or step in (1, self.num_steps):
            self._report(step)

    def _loss(self, step: int, number: int) -> Tensor:
        """Of this rank's `number`-th batch of the step."""
        place = number * self.accelerator.num_processes + self.accelerator.process_index
        index = (step - 1) * self.batches_per_step + place
        planned = self.plan.batch(index)
        batch = collate([self.sequences[i] for i in planned.indices], planned.padded_length)
        generator = torch.Generator().manual_seed(self.recipe.training.seed * 1_000_003 + index)
        anchors, valid = self.shape.choose_anchors(batch, generator)
        self._seen.tokens += int(batch.lengths.sum())
        # All that the host needs to know of it is known by now: the device is never waited for.
        device = self.accelerator.device
        batch, anchors, valid = batch.to(device), sent(anchors, device), sent(valid, device)
        with self.accelerator.autocast():
            features, last = self._states(index, batch.token_ids)
            blocks = draft_blocks(self.draft, self.target, batch, features, anchors, valid, self.shape)
            return self._blocks_loss(blocks, last)

    def _states(
        self,
        index: int,
        token_ids: Tensor,  # [B, S] of the `index`-th batch
    ) -> tuple[Tensor, Tensor | None]:
        """Features [B, S, F*H], and the last hidden states [B, S, H] where the target computes them."""
        if self.features is None:
            return target_states(self.target, token_ids, self.layer_ids)
        return sent(self.features.take(index), token_ids.device), None

    def _blocks_loss(
        self,
        blocks: DraftedBlocks,
        last: Tensor | None,  # [B, S, H] the target's last hidden states
    ) -> Tensor:
        """The objective over all blocks, without all their logits at a time."""
        token_ids = self._own.draft_token_ids
        if token_ids is not None:
            blocks = replace(blocks, labels=draft_labels(blocks.labels, token_ids, self._own.dflash.vocab_size))
        rows = None
        if self.objective.kl_weight and last is not None:
            rows = target_rows(last, blocks.anchors, self.shape.block_size).flatten(0, 1)  # [B*N, K, H]
        total, weight = [], []
        vocab_size = self.target.get_output_embeddings().weight.shape[0]
        for piece, hidden, labels in blocks.chunks(_LOGITS_BYTES // (4 * vocab_size)):
            of_target = None if rows is None else rows[piece]
            loss, count = checkpoint(self._sums, hidden, labels, of_target, use_reentrant=False)
            total.append(loss)
            weight.append(count)
        return torch.stack(total).sum() / torch.stack(weight).sum().clamp(min=1e-9)

    def _sums(
        self,
        hidden: Tensor,  # [M, K, H]
        labels: Tensor,  # [M, K] rows of the head
        of_target: Tensor | None,  # [M, K, H]
    ) -> tuple[Tensor, Tensor]:
        """What cannot be drafted has no part in either distribution: the KL's softmax makes the rest sum to one."""
        whole_head, own = self.target.get_output_embeddings(), self._own
        head = whole_head if own.lm_head is None else own.lm_head
        target_logits = None if of_target is None else whole_head(of_target)
        if target_logits is not None and own.draft_token_ids is not None:
            target_logits = target_logits[..., own.draft_token_ids]
        return objective_sums(head(hidden), labels, self.objective, target_logits)

    def _report(self, step: int) -> None:
        seen = self._seen
        loss = float(seen.loss) / max(1, seen.steps)  # waits for the device, so the time is read behind it
        speed = seen.tokens * self.accelerator.num_processes / (time.monotonic() - seen.since)
        logger.info("step %d of %d: loss %.3f, %.0f tokens/s", step, self.num_steps, loss, speed)
        rate = self.optimizer.param_groups[0]["lr"]
        self.accelerator.log({"loss": loss, "learning_rate": rate, "tokens_per_second": speed}, step=step)
        self._seen = _Seen(since=time.monotonic())

    def _evaluate(self) -> None:
        """Measure, and keep the drafter if none before it was better."""
        weights = self.accelerator.get_state_dict(self.draft)  # of all ranks' shards
        if self.accelerator.is_main_process:
            draft = DFlashDraftModel(self._own.config).float()
            draft.load_state_dict(weights)
            found = self.evaluate(copy.deepcopy(draft).to(self.accelerator.device, self.target.dtype).eval())
            self.accelerator.log(_logged(found), step=self.state.step)
            logger.info("step %d of %d: acceptance length %.3f", self.state.step, self.num_steps, found.length)
            if self.state.note(found):
                save_drafter(draft, self.output)
        self.accelerator.wait_for_everyone()


def _logged(found: Acceptance) -> dict[str, float]:
    """For TensorBoard. Position k: in which share of the drafts the first k tokens were accepted, as on the card."""
    by_position = {f"acceptance/position_{k}": share for k, share in enumerate(found.per_position, start=1)}
    return {"acceptance_length": found.length} | by_position


def _check_ranks(num_processes: int) -> None:
    """Raises ValueError where ranks do not know of each other: each would train, and write, the same drafter."""
    launched = int(os.environ.get("WORLD_SIZE", "1"))
    if num_processes != launched:
        raise ValueError(
            f"WORLD_SIZE is {launched}, and accelerate has joined {num_processes} of these processes: its launch "
            "configuration does not fit this machine (FSDP, for one, needs GPUs)"
        )
