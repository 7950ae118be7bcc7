# SPDX-License-Identifier: Apache-2.0
"""Which attention backends a drafter can have, and the errors that name the flag to change."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest

pytest.importorskip("vllm")
from vllm.v1.attention.backends.registry import AttentionBackendEnum

from tests.helpers import drafter_config
from vllm_dflash.compat import draft_loading
from vllm_dflash.compat.draft_loading import check_attention_backend, non_causal_backends
from vllm_dflash.config import DFlashConfig

#: By name: whether it can see rows behind it, or None if its package is not installed.
MACHINE = {"FLASH_ATTN": True, "FLASHINFER": None, "TRITON_ATTN": False, "FLEX_ATTENTION": True, "CPU_ATTN": False}


@pytest.fixture
def machine(monkeypatch: pytest.MonkeyPatch) -> None:
    """A machine whose backends are those of MACHINE, and no others."""

    def get_class(backend: AttentionBackendEnum) -> Any:
        if MACHINE[backend.name] is None:
            raise ImportError(f"no package for {backend.name}")
        return SimpleNamespace(supports_non_causal=lambda: MACHINE[backend.name])

    monkeypatch.setattr(AttentionBackendEnum, "get_class", get_class)


def engine(backend: str | None, use_non_causal: bool = True) -> Any:
    """The part of a draft layer's config that is looked at."""
    chosen = None if backend is None else AttentionBackendEnum[backend]
    return SimpleNamespace(attention_config=SimpleNamespace(backend=chosen, use_non_causal=use_non_causal))


def test_backends_are_named_that_can_and_are_there(machine: None) -> None:
    assert non_causal_backends() == ["FLASH_ATTN", "FLEX_ATTENTION"]


def test_backends_of_this_vllm() -> None:
    """No fakes: vLLM has these two on every machine, and answers for them."""
    assert {"TRITON_ATTN", "FLEX_ATTENTION"} <= set(non_causal_backends())


@pytest.mark.parametrize("backend", [None, "FLASH_ATTN", "FLEX_ATTENTION"])
def test_backend_that_can(machine: None, backend: str | None) -> None:
    check_attention_backend(engine(backend))


@pytest.mark.parametrize("backend", ["TRITON_ATTN", "FLASHINFER", "CPU_ATTN"])
def test_backend_that_cannot(machine: None, backend: str) -> None:
    with pytest.raises(ValueError) as caught:
        check_attention_backend(engine(backend))
    message = str(caught.value)
    assert message.startswith(f"--attention-backend {backend} cannot do the non-causal attention")
    assert "These can: FLASH_ATTN, FLEX_ATTENTION." in message
    assert '--speculative-config\'s "attention_backend"' in message


@pytest.mark.parametrize("backend", ["TRITON_ATTN", "FLASHINFER"])
def test_a_causal_drafter_can_have_any(machine: None, backend: str) -> None:
    check_attention_backend(engine(backend, use_non_causal=False))


# Where vLLM finds no backend itself.


@pytest.fixture
def load_failing_with(monkeypatch: pytest.MonkeyPatch, machine: None) -> Any:
    """Load a drafter with a loader that raises `error`, and return what comes of it."""

    def load(error: Exception) -> str:
        config = SimpleNamespace(
            cache_config=SimpleNamespace(cache_dtype="fp8_e5m2"),
            speculative_config=SimpleNamespace(draft_model_config=None),
            **vars(engine(None)),
        )

        def load_model(*arguments: Any) -> Any:
            raise error

        monkeypatch.setattr(draft_loading, "draft_vllm_config", lambda *arguments: config)
        monkeypatch.setattr(draft_loading, "get_draft_load_config", lambda config: None)
        monkeypatch.setattr(draft_loading, "get_model_loader", lambda config: SimpleNamespace(load_model=load_model))
        dflash = DFlashConfig.from_dict(drafter_config(), source="/drafters/tiny")
        with pytest.raises(ValueError) as caught:
            draft_loading.load_draft_model(SimpleNamespace(), dflash, SimpleNamespace())  # type: ignore[arg-type]
        return str(caught.value)

    return load


def test_no_backend_serves_the_drafter(load_failing_with: Any) -> None:
    message = load_failing_with(ValueError("No valid attention backend found for cpu with AttentionSelectorConfig"))
    assert "the drafter /drafters/tiny with --kv-cache-dtype fp8_e5m2" in message
    assert "--attention-backend" in message
    assert "(FLASH_ATTN, FLEX_ATTENTION)" in message
    assert message.endswith("vLLM says: No valid attention backend found for cpu with AttentionSelectorConfig")


def test_other_errors_of_the_loader_are_passed_on(load_failing_with: Any) -> None:
    assert load_failing_with(ValueError("no such tensor")) == "no such tensor"
