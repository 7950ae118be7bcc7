# SPDX-License-Identifier: Apache-2.0
"""Calibration against a search for the likeliest factor; rejection against its definition, token by token."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

pytest.importorskip("torch")
pytest.importorskip("transformers")
import torch

from tests.helpers import drafter, target
from vllm_dflash.calibration import PRIOR_INFORMATION, SAMPLES_FROM
from vllm_dflash.hf import SpecGenerateOutput
from vllm_dflash.hf.calibration import Calibration, Choices
from vllm_dflash.hf.choosing import Sampling
from vllm_dflash.hf.drafting import Drafted, DraftRule, chosen
from vllm_dflash.hf.options import Options
from vllm_dflash.hf.rejection import reject
from vllm_dflash.hf.round import learned
from vllm_dflash.hf.sequences import Limits
from vllm_dflash.tree import Walk, chain

pytestmark = pytest.mark.usefixtures("one_thread")

NO_DEVICE = torch.device("cpu")


def observed(true_factors: list[float], num_rounds: int) -> Iterator[tuple[Choices, torch.Tensor]]:
    """Logits of 12 tokens at every depth, and a target that is surer or less sure than they say."""
    generator = torch.Generator().manual_seed(3)
    factors = torch.tensor(true_factors)[:, None]
    for _ in range(num_rounds):
        logits = 2.0 * torch.randn(4, len(true_factors), 12, generator=generator)
        probs = (logits * factors).softmax(dim=-1)
        said = torch.multinomial(probs.flatten(0, 1), 1, generator=generator).view(probs.shape[:2])
        yield Choices(*logits.sort(dim=-1, descending=True)), said


def test_it_finds_how_sure_a_drafter_may_be() -> None:
    """Compared with the factor of greatest likelihood among 200, over all observations at once."""
    calibration = Calibration.fresh(2, NO_DEVICE)
    rounds = list(observed([0.5, 1.3], 400))
    for choices, said in rounds:
        calibration = calibration.learned(choices, said, torch.tensor([2, 2, 2, 1]))
    grid = torch.linspace(0.05, 2.5, 200)
    for depth, rows in ((0, slice(0, 4)), (1, slice(0, 3))):  # the last row's second token did not count
        log_likelihood = torch.zeros(len(grid))
        for choices, said in rounds:
            log_probs = (choices.logits[rows, depth] * grid[:, None, None]).log_softmax(dim=-1)
            hit = choices.token_ids[rows, depth] == said[rows, depth, None]
            log_likelihood += (log_probs * hit).sum(dim=(1, 2))
        assert calibration.factors[depth] == pytest.approx(float(grid[log_likelihood.argmax()]), abs=0.03)


def test_one_step_by_hand() -> None:
    """Two choices of logits 1 and -1: p = 0.8808, mean 0.7616, variance 0.42; the target said the first."""
    choices = Choices(torch.tensor([[[1.0, -1.0]]]), torch.tensor([[[7, 8]]]))
    calibration = Calibration.fresh(1, NO_DEVICE).learned(choices, torch.tensor([[7]]), torch.tensor([1]))
    assert calibration.information.item() == pytest.approx(0.41997, abs=1e-4)
    assert calibration.factors.item() == pytest.approx(1.0 + (1.0 - 0.76159) / (0.41997 + PRIOR_INFORMATION), abs=1e-5)


@pytest.mark.parametrize(("said", "num_said"), [([[9]], [1]), ([[7]], [0])], ids=["not among the choices", "not said"])
def test_what_tells_nothing(said: list, num_said: list) -> None:
    choices = Choices(torch.tensor([[[1.0, -1.0]]]), torch.tensor([[[7, 8]]]))
    calibration = Calibration.fresh(1, NO_DEVICE).learned(choices, torch.tensor(said), torch.tensor(num_said))
    assert (calibration.factors.item(), calibration.information.item()) == (1.0, 0.0)


def test_what_a_round_tells() -> None:
    """One accepted token and the target's own after it: two depths. A text that has ended tells nothing."""
    choices = Choices(torch.randn(2, 3, 4), torch.tensor([[[7, 8, 9, 5]] * 3] * 2))
    tokens = torch.tensor([[7, 8, 9], [7, 8, 9]])
    walked = Walk(torch.tensor([[0, -1, -1], [0, 1, 2]]), torch.tensor([1, 3]), torch.tensor([5, 6]))
    drafted = Drafted(chain(tokens), choices, None)
    got = learned(Calibration.fresh(3, NO_DEVICE), drafted, tokens, walked, torch.tensor([True, False]))
    said = torch.tensor([[7, 5, 0]])
    first = Choices(choices.logits[:1], choices.token_ids[:1])
    expected = Calibration.fresh(3, NO_DEVICE).learned(first, said, torch.tensor([2]))
    assert got.information.tolist() == expected.information.tolist() and got.information[2] == 0.0
    assert got.factors.tolist() == expected.factors.tolist()


def test_samples_are_of_what_the_target_may_say() -> None:
    """top_k of the target holds for the drafter's samples too: others would be rejected for sure."""
    rule = DraftRule(None, Sampling(0.5, top_k=2), is_probabilistic=True, calibrates=True)
    logits = torch.randn(3, 4, 9, generator=torch.Generator().manual_seed(0))
    probs = chosen(logits, Calibration(torch.full((4,), 0.7), torch.zeros(4)), rule).probs
    assert probs is not None
    top = logits.topk(2, dim=-1)
    expected = torch.zeros_like(probs).scatter(2, top.indices, (top.values / 0.5 * 0.7).softmax(dim=-1))
    torch.testing.assert_close(probs, expected)


def test_tokens_that_cannot_be_drafted() -> None:
    """A reduced vocabulary's other tokens have logits of -inf, and a target may say them."""
    choices = Choices(torch.tensor([[[1.0, -1.0, float("-inf")]]]), torch.tensor([[[7, 8, 9]]]))
    fresh = Calibration.fresh(1, NO_DEVICE)
    two = Choices(choices.logits[..., :2], choices.token_ids[..., :2])
    one = torch.tensor([1])
    assert fresh.learned(choices, torch.tensor([[7]]), one).factors.item() == pytest.approx(
        fresh.learned(two, torch.tensor([[7]]), one).factors.item()
    )
    assert fresh.learned(choices, torch.tensor([[9]]), one).factors.item() == 1.0


def test_a_call_goes_on_where_another_ended() -> None:
    """An unsure target and a random drafter: surer about its unsureness with every call."""
    model, draft = target(), drafter(block_size=5)
    ids = torch.tensor([[5, 9, 2, 40, 7]])

    def call(calibration: Calibration | None) -> SpecGenerateOutput:
        torch.manual_seed(0)
        output = draft.spec_generate(
            ids, model, 60, temperature=1.0, tree_budget=8, return_stats=True, calibration=calibration
        )
        assert isinstance(output, SpecGenerateOutput)
        return output

    first = call(None)
    assert torch.equal(first.sequences, call(None).sequences), "a call must not depend on the one before"
    assert (first.calibration.information > 0.0).any()
    second = call(first.calibration)
    assert (second.calibration.information >= first.calibration.information).all()
    assert second.calibration.information.sum() > 1.5 * first.calibration.information.sum()


def test_a_greedy_call_learns_only_if_it_is_given_something_to_go_on_with() -> None:
    model, draft = target(), drafter(block_size=5)
    ids = torch.tensor([[5, 9, 2, 40, 7]])
    fresh = Calibration.fresh(4, NO_DEVICE)
    for calibration, learns in ((None, False), (fresh, True)):
        output = draft.spec_generate(ids, model, 60, tree_budget=60, return_stats=True, calibration=calibration)
        assert isinstance(output, SpecGenerateOutput)
        assert bool((output.calibration.information > 0.0).any()) == learns


@pytest.mark.parametrize(
    ("temperature", "second"),
    [(0.0, -8.0), (0.1, -8.0), (SAMPLES_FROM - 0.01, -8.0), (SAMPLES_FROM, -16.0), (1.0, -8.0)],
)
def test_trees_of_low_temperatures_are_those_of_zero(temperature: float, second: float) -> None:
    """The first choice leads by 8. Divided by 0.1 only one way would be left: a second choice's log-probability -80."""
    logits = torch.tensor([8.0, 0.0, -1.0, -2.0]).expand(1, 3, 4)
    rule = DraftRule(4, Sampling(temperature), is_probabilistic=False, calibrates=True)
    tree = chosen(logits, Calibration.fresh(3, NO_DEVICE), rule).tree
    assert tree.log_probs.min().item() == pytest.approx(second, abs=0.01)


def test_low_temperatures_learn_no_more_than_zero() -> None:
    for temperature, learns in ((0.0, False), (0.3, False), (SAMPLES_FROM, True)):
        options = Options(Limits(4, frozenset()), Sampling(temperature), tree_budget=3)
        assert options.rule.calibrates == learns


def test_rejection_is_its_definition() -> None:
    """The same uniform numbers, a loop over tokens: min(1, p/q), and the first that fails is replaced."""
    generator = torch.Generator().manual_seed(2)
    draft_probs = torch.randn(64, 3, 6, generator=generator).softmax(dim=-1)
    logits = torch.randn(64, 4, 6, generator=generator)
    token_ids = torch.multinomial(draft_probs.flatten(0, 1), 1, generator=generator).view(64, 3)
    walked = reject(token_ids, draft_probs, logits, Sampling(1.0, generator=torch.Generator().manual_seed(5)))
    uniform = torch.empty(64, 3).uniform_(generator=torch.Generator().manual_seed(5))
    probs = logits.softmax(dim=-1)
    counts = set()
    for row in range(64):
        kept = 0
        while kept < 3:
            token = token_ids[row, kept]
            if uniform[row, kept] >= probs[row, kept, token] / draft_probs[row, kept, token]:
                break
            kept += 1
        counts.add(kept)
        assert walked.num_accepted[row] == kept
        assert walked.nodes[row].tolist() == [*range(kept), *[-1] * (3 - kept)]
        if kept < 3:  # a token that the drafter thinks too likely can be no replacement
            token = walked.next_token_ids[row]
            assert probs[row, kept, token] > draft_probs[row, kept, token]
    assert counts == {0, 1, 2, 3}


def test_a_drafter_that_knows_the_target_is_never_rejected() -> None:
    logits = torch.randn(50, 4, 6, generator=torch.Generator().manual_seed(0))
    probs = logits.softmax(dim=-1)[:, :3]
    token_ids = torch.multinomial(probs.flatten(0, 1), 1).view(50, 3)
    assert reject(token_ids, probs, logits, Sampling(1.0)).num_accepted.tolist() == [3] * 50
