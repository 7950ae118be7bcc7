# SPDX-License-Identifier: Apache-2.0
"""What an engine drafts for requests of different temperatures in one batch: against trees in plain torch."""

from __future__ import annotations

import pytest
import torch

from vllm_dflash.calibration import SAMPLES_FROM
from vllm_dflash.compat.ownership import TreeShape
from vllm_dflash.compat.trees.drafting import TreeDrafting
from vllm_dflash.compat.trees.store import TreeStore
from vllm_dflash.kernels.calibrate import GREEDY, SAMPLED
from vllm_dflash.tree import build_tree

NODES, DEPTHS, VOCAB = 6, 3, 12
TEMPERATURES = [0.0, 0.1, SAMPLES_FROM, 1.5]
OF_GREEDY, OF_SAMPLED = 0.5, 0.8  # factors that have been learned


@pytest.mark.parametrize(
    ("is_auto", "scales"),
    [
        (False, [1.0, 1.0, OF_SAMPLED / SAMPLES_FROM, OF_SAMPLED / 1.5]),
        (True, [OF_GREEDY, OF_GREEDY, OF_SAMPLED / SAMPLES_FROM, OF_SAMPLED / 1.5]),
    ],
    ids=["fixed", "auto"],
)
def test_trees_by_temperature(device: str, is_auto: bool, scales: list[float]) -> None:
    """Where the likeliest token is (nearly) always taken, logits are not divided; "auto" has to know how sure it is."""
    shape, num_reqs = TreeShape(NODES, DEPTHS, NODES, is_auto), len(TEMPERATURES)
    drafting = TreeDrafting(shape, num_reqs, 64, torch.device(device))
    store = TreeStore(num_reqs, 64, shape, torch.device(device))
    store.seen.factors[GREEDY], store.seen.factors[SAMPLED] = OF_GREEDY, OF_SAMPLED
    drafting.bind(store, {})
    logits = 3 * torch.randn(DEPTHS, VOCAB, generator=torch.Generator().manual_seed(5))
    rows = torch.arange(num_reqs, device=device)
    drafts = drafting.draft(logits.repeat(num_reqs, 1).to(device), rows, torch.tensor(TEMPERATURES, device=device))
    scaled = logits * torch.tensor(scales)[:, None, None]
    expected = build_tree(*scaled.log_softmax(dim=-1).topk(NODES, dim=-1), NODES)
    assert drafts.token_ids.cpu().tolist() == expected.token_ids.tolist()
    assert store.trees.parents.tolist() == expected.parents.tolist()
    torch.testing.assert_close(store.trees.probs.cpu(), expected.log_probs.exp(), rtol=1e-4, atol=1e-6)
