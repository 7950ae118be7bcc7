# SPDX-License-Identifier: Apache-2.0
"""A branch runs after what was there before it, and what follows its join runs after it; eagerly and in a graph."""

from __future__ import annotations

import pytest

torch = pytest.importorskip("torch")

pytestmark = pytest.mark.gpu

A_WHILE = 20_000_000  # cycles, about 10 ms: far more than a launch takes


def test_a_branch_is_between_its_start_and_its_join() -> None:
    from vllm_dflash.proposer.side_branch import SideBranch

    branch = SideBranch(torch.device("cuda"))
    before, inside, after = (torch.zeros(1 << 20, device="cuda") for _ in range(3))

    def work() -> None:
        torch.cuda._sleep(A_WHILE)
        inside.copy_(before * 2)

    def step() -> None:
        torch.cuda._sleep(A_WHILE)
        before.add_(1)
        branch.start(work)
        branch.join()
        after.copy_(inside + 1)

    step()
    torch.cuda.synchronize()
    assert after.unique().tolist() == [3]
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        step()
    for expected in (5, 7):
        graph.replay()
        torch.cuda.synchronize()
        assert after.unique().tolist() == [expected]
