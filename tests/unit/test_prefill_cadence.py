# SPDX-License-Identifier: Apache-2.0
"""When vLLM's own scheduler admits prompts, in an engine that this plugin drafts for. No engine starts."""

from __future__ import annotations

from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any

import pytest

pytest.importorskip("vllm")
import torch
from vllm.engine.arg_utils import EngineArgs
from vllm.sampling_params import SamplingParams
from vllm.v1.core.sched.async_scheduler import AsyncScheduler
from vllm.v1.core.sched.scheduler import Scheduler
from vllm.v1.kv_cache_interface import FullAttentionSpec, KVCacheConfig, KVCacheGroupSpec
from vllm.v1.outputs import ModelRunnerOutput
from vllm.v1.request import Request
from vllm.v1.structured_output import StructuredOutputManager

from tests.helpers import target_config, write_config, write_drafter
from vllm_dflash.compat import prefill_cadence
from vllm_dflash.logs import logger

BLOCK_SIZE, PROMPT = 16, 40


@pytest.fixture(scope="module")
def pair(tmp_path_factory: pytest.TempPathFactory) -> tuple[str, str]:
    folder = tmp_path_factory.mktemp("pair")
    return str(write_config(folder / "target", target_config())), str(write_drafter(folder / "drafter"))


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Any:
    """Seconds; a step takes what a test adds."""
    clock = SimpleNamespace(now=0.0)
    monkeypatch.setattr(prefill_cadence.time, "perf_counter", lambda: clock.now)
    return clock


def scheduler_of(
    pair: tuple[str, str], speculates: bool = True, kind: type[Scheduler] = Scheduler, **options: Any
) -> Scheduler:
    target, drafter = pair
    drafting: dict[str, Any] = {"speculative_config": {"method": "dflash", "model": drafter}} if speculates else {}
    vllm_config = EngineArgs(
        model=target, skip_tokenizer_init=True, dtype="float32", max_model_len=128, max_num_seqs=8,
        additional_config={"dflash": options}, enable_prefix_caching=False, **drafting,
    ).create_engine_config()  # fmt: skip
    vllm_config.cache_config.num_gpu_blocks = 1000
    layers = FullAttentionSpec(BLOCK_SIZE, num_kv_heads=1, head_size=1, dtype=torch.float32)
    cache = KVCacheConfig(1000, kv_cache_tensors=[], kv_cache_groups=[KVCacheGroupSpec(["layer"], layers)])
    return kind(vllm_config, cache, StructuredOutputManager(vllm_config), BLOCK_SIZE)


def ask(scheduler: Scheduler, name: str, length: int = 100, prompt: int = PROMPT) -> None:
    sampling = SamplingParams(max_tokens=length, ignore_eos=True)
    scheduler.add_request(Request(name, list(range(prompt)), sampling, None))


def step(scheduler: Scheduler) -> list[str]:
    """One step, in which each request gets a token; the requests that it begins."""
    known = set(scheduler.requests) - {request.request_id for request in scheduler.waiting}
    return [name for name in read(scheduler) if name not in known]


def read(scheduler: Scheduler) -> dict[str, int]:
    """One step: how many tokens of each request are in it. Each gets one once its prompt has been read."""
    plan = scheduler.schedule()
    names = list(plan.num_scheduled_tokens)
    if names:
        index = {name: place for place, name in enumerate(names)}
        said = [[] if scheduler.requests[name].is_prefill_chunk else [1] for name in names]
        scheduler.update_from_output(plan, ModelRunnerOutput(names, index, sampled_token_ids=said))
    return dict(plan.num_scheduled_tokens)


def steps(scheduler: Scheduler, names: Iterator[str], number: int) -> list[int]:
    """So many steps, before each of which a request comes: how many begin in each."""
    begun = []
    for _ in range(number):
        ask(scheduler, next(names), length=6)
        begun.append(len(step(scheduler)))
    return begun


def names() -> Iterator[str]:
    return (f"request {number}" for number in range(10_000))


def test_prompts_wait_for_every_third_step(pair: tuple[str, str]) -> None:
    scheduler = scheduler_of(pair, prefill_schedule_interval=3)
    assert steps(scheduler, names(), 10) == [1, 0, 0, 3, 0, 0, 3, 0, 0, 3]


def test_vllm_admits_prompts_at_once(pair: tuple[str, str]) -> None:
    for scheduler in (scheduler_of(pair), scheduler_of(pair, prefill_schedule_interval=1)):
        assert steps(scheduler, names(), 5) == [1] * 5
        assert prefill_cadence.prefill_cadence(scheduler) is None


def test_an_engine_without_drafts_is_left_alone(pair: tuple[str, str]) -> None:
    assert steps(scheduler_of(pair, speculates=False, prefill_schedule_interval=3), names(), 5) == [1] * 5


def test_nothing_waits_where_nothing_decodes(pair: tuple[str, str]) -> None:
    scheduler = scheduler_of(pair, prefill_schedule_interval=50)
    for name in ("first", "second"):
        ask(scheduler, name, length=1)
        assert step(scheduler) == [name]


def test_nothing_waits_for_a_request_that_only_ends(pair: tuple[str, str]) -> None:
    """Asynchronous scheduling plans a step while the last one, the first request's, is under way."""
    scheduler = scheduler_of(pair, kind=AsyncScheduler, prefill_schedule_interval=50)
    ask(scheduler, "first", length=1)
    assert scheduler.schedule().num_scheduled_tokens == {"first": PROMPT}
    ask(scheduler, "second", length=1)
    assert [request.request_id for request in scheduler.running] == ["first"]
    assert scheduler.schedule().num_scheduled_tokens == {"second": PROMPT}


def test_prompts_wait_while_another_request_goes_on(pair: tuple[str, str]) -> None:
    scheduler = scheduler_of(pair, kind=AsyncScheduler, prefill_schedule_interval=50)
    ask(scheduler, "first", length=1)
    ask(scheduler, "other", length=9)
    assert scheduler.schedule().num_scheduled_tokens == {"first": PROMPT, "other": PROMPT}
    ask(scheduler, "second", length=1)
    assert set(scheduler.schedule().num_scheduled_tokens) == {"other"}


def test_more_than_can_be_admitted_do_not_wait(pair: tuple[str, str]) -> None:
    """And the interval in force says so."""
    scheduler = scheduler_of(pair, prefill_schedule_interval=50)
    for number in range(9):  # of which eight run at once
        ask(scheduler, f"request {number}", length=2 + number)
    assert len(step(scheduler)) == 8
    assert prefill_cadence.interval_in_force(scheduler) == 1
    scheduler.prefill_capacity_bound = False
    assert prefill_cadence.interval_in_force(scheduler) == 50
    scheduler.prefill_capacity_bound = True
    assert [step(scheduler) for _ in range(2)] == [[], ["request 8"]]


def test_what_a_step_holds(pair: tuple[str, str], monkeypatch: pytest.MonkeyPatch) -> None:
    """A prompt of one token, or of which all but one are cached, is a step like any other's."""
    scheduler = scheduler_of(pair, prefill_schedule_interval="auto")
    ask(scheduler, "first")
    step(scheduler)
    noted: list[tuple[int, ...]] = []
    monkeypatch.setattr(prefill_cadence.prefill_cadence(scheduler), "note", lambda *said: noted.append(said))
    ask(scheduler, "short", prompt=1)
    ask(scheduler, "second")
    assert step(scheduler) == ["short", "second"]
    # Tokens of prompts, prompts begun, requests begun, and all.
    assert noted == [(PROMPT, 1, 2, 3)]


def test_a_prompt_that_is_begun_is_read_to_its_end(pair: tuple[str, str]) -> None:
    """Of 40 tokens, of which a step has room for 11 beside the request that decodes."""
    scheduler = scheduler_of(pair, prefill_schedule_interval=3)
    scheduler.max_num_scheduled_tokens = 12
    ask(scheduler, "first")
    assert [read(scheduler)["first"] for _ in range(5)] == [12, 12, 12, 4, 1]
    ask(scheduler, "second")
    parts = [read(scheduler).get("second", 0) for _ in range(7)]
    assert parts == [0, 11, 11, 11, 7, 1, 1]


def test_vllms_own_word_counts_too(pair: tuple[str, str]) -> None:
    scheduler = scheduler_of(pair, prefill_schedule_interval=2)
    ask(scheduler, "first")
    step(scheduler)
    step(scheduler)
    ask(scheduler, "second")
    assert not scheduler.schedule(throttle_prefills=True).scheduled_new_reqs
    assert [new.req_id for new in scheduler.schedule(throttle_prefills=False).scheduled_new_reqs] == ["second"]


def test_dear_prompts_are_admitted_together(
    pair: tuple[str, str], clock: Any, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One comes each step and takes six: with 2 ms a step and 20 more for reading, every eighth step is best."""
    monkeypatch.setattr(logger, "propagate", True)
    scheduler, coming = scheduler_of(pair, prefill_schedule_interval="auto"), names()
    for _ in range(300):
        ask(scheduler, next(coming), length=6)
        clock.now += 2e-3 + 20e-3 * bool(step(scheduler))
    cadence = prefill_cadence.prefill_cadence(scheduler)
    assert cadence is not None and cadence.interval > 4
    told = [record.getMessage() for record in caplog.records if "prompts are admitted" in record.getMessage()]
    assert told and "20.0 ms longer" in told[0]
    begun = steps(scheduler, coming, 40)
    assert 40 / 8 - 1 <= len(list(filter(None, begun))) <= 40 / 4 + 1


def test_an_idle_engine_is_no_long_step(pair: tuple[str, str], clock: Any) -> None:
    scheduler = scheduler_of(pair, prefill_schedule_interval="auto")
    for name in ("first", "second", "third"):
        clock.now += 100.0
        ask(scheduler, name, length=3)
        while scheduler.has_requests():
            step(scheduler)
            clock.now += 2e-3
    cadence = prefill_cadence.prefill_cadence(scheduler)
    assert cadence is not None
    assert [seen.ms for seen in cadence._steps] == pytest.approx([2.0] * 6)  # all but the last of each


def test_a_step_without_work_is_none(pair: tuple[str, str], clock: Any) -> None:
    """All that runs has been scheduled to its end; outputs are waited for."""
    scheduler = scheduler_of(pair, kind=AsyncScheduler, prefill_schedule_interval="auto")
    ask(scheduler, "first", length=1)
    for scheduled in ({"first": PROMPT}, {}, {}):
        assert scheduler.schedule().num_scheduled_tokens == scheduled
        clock.now += 2e-3
    cadence = prefill_cadence.prefill_cadence(scheduler)
    assert cadence is not None
    assert [seen.ms for seen in cadence._steps] == pytest.approx([2.0])


def test_trees_that_follow_the_load_learn_the_interval(pair: tuple[str, str]) -> None:
    shapes = {
        "auto": SimpleNamespace(is_auto=True), "fixed": SimpleNamespace(is_auto=False), "chain": None
    }  # fmt: skip
    for name, shape in shapes.items():
        scheduler = scheduler_of(pair)
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(prefill_cadence, "draft_tree", lambda _, shape=shape: shape)
            assert (prefill_cadence.cadence_of(scheduler.vllm_config) is not None) == (name == "auto")


def test_data_parallel_ranks_are_vllms_to_pace(pair: tuple[str, str]) -> None:
    config = scheduler_of(pair, prefill_schedule_interval=4).vllm_config
    assert prefill_cadence.cadence_of(config) is not None
    config.parallel_config.data_parallel_size = 2
    assert prefill_cadence.cadence_of(config) is None
