# SPDX-License-Identifier: Apache-2.0
"""vLLM's draft model == the Transformers oracle, layer by layer, in fp32, inside a real engine.

The oracle in fp64 is the truth, the oracle in fp32 the baseline whose error sets the tolerance. Every variant is a
checkpoint in a published layout, so this also shows that each loads and drafts.
"""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from tests.e2e.engines import TIMEOUT_S, environment
from tests.numerics import assert_as_close_as_baseline
from tests.parity.drafters import BLOCK, MASK, VARIANTS, write_drafter, write_target

pytestmark = pytest.mark.engine

CHILD = Path(__file__).with_name("capture_child.py")


@pytest.fixture(scope="module")
def target_dir(tmp_path_factory):
    return write_target(tmp_path_factory.mktemp("target"))


def capture(target_dir: Path, drafter: Path, folder: Path) -> dict:
    out, log = folder / "steps.pt", folder / "engine.log"
    with log.open("w") as stream:
        done = subprocess.run(
            [sys.executable, str(CHILD), str(target_dir), str(drafter), str(out)],
            env=environment(VLLM_ENABLE_V1_MULTIPROCESSING="0", PYTHONPATH=os.getcwd()),
            stdout=stream, stderr=subprocess.STDOUT, stdin=subprocess.DEVNULL, timeout=TIMEOUT_S,
        )  # fmt: skip
    assert done.returncode == 0, "\n".join(log.read_text().splitlines()[-30:])
    return torch.load(out)


class Oracle:
    """The Transformers draft model in one dtype, with the residual stream after every layer."""

    def __init__(self, target_dir: Path, drafter: Path, dtype: torch.dtype) -> None:
        from transformers import AutoModelForCausalLM

        from vllm_dflash.hf import DFlashDraftModel

        self.target = AutoModelForCausalLM.from_pretrained(target_dir, dtype=dtype).eval()
        self.draft = DFlashDraftModel.from_pretrained(str(drafter), dtype=dtype).eval()
        self.dtype, self.layers = dtype, []
        for layer in self.draft.layers:
            layer.register_forward_hook(lambda module, inputs, output: self.layers.append(output[0]))

    @torch.no_grad()
    def block(self, features: torch.Tensor, anchor: int) -> tuple[list[torch.Tensor], list[int]]:
        """Residual streams and final hidden states of one block behind all the context, and its drafts."""
        self.layers.clear()
        ids = torch.full((1, BLOCK), MASK)
        ids[0, 0] = anchor
        hidden = self.draft(
            position_ids=torch.arange(len(features) + BLOCK)[None],
            noise_embedding=self.draft.embed(ids, self.target),
            target_hidden=features[None].to(self.dtype),
        )
        drafts = self.draft.draft_logits(hidden[:, 1:], self.target).argmax(dim=-1)[0].tolist()
        return [*self.layers, hidden[0]], drafts


@pytest.mark.parametrize("variant", VARIANTS)
def test_every_layer_of_every_step(variant, target_dir, tmp_path):
    drafter = write_drafter(tmp_path / "drafter", variant)
    captured = capture(target_dir, drafter, tmp_path)
    truth = Oracle(target_dir, drafter, torch.float64)
    baseline = Oracle(target_dir, drafter, torch.float32)
    context = torch.empty(0)
    assert len(captured["steps"]) >= 4
    for number, step in enumerate(captured["steps"]):
        context = torch.cat([context.reshape(-1, step["features"].shape[1]), step["features"]])
        assert step["positions"].tolist() == list(range(len(context) - len(step["positions"]), len(context)))
        true_layers, true_drafts = truth.block(context, step["anchor"])
        base_layers, _ = baseline.block(context, step["anchor"])
        assert len(step["layers"]) == len(true_layers)
        for index, (got, true, base) in enumerate(zip(step["layers"], true_layers, base_layers, strict=True)):
            assert_as_close_as_baseline(f"{variant}, step {number}, output {index}", got, true, base)
        assert step["drafts"] == true_drafts, f"step {number}"
