# SPDX-License-Identifier: Apache-2.0
"""FP8 weights and the reduced LM head, on vLLM's own layers in this process, against plain torch.

float8_e4m3fn by hand: 3 bits of mantissa, so that between 2^e and 2^(e+1) numbers are 2^(e-3) apart; the largest is
448; below 2^-6 they are 2^-9 apart.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any

import pytest

pytest.importorskip("vllm")
import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.nn import functional as F
from vllm.config import VllmConfig, set_current_vllm_config
from vllm.distributed.parallel_state import (
    cleanup_dist_env_and_memory,
    init_distributed_environment,
    initialize_model_parallel,
)
from vllm.model_executor.layers.linear import ColumnParallelLinear, QKVParallelLinear, RowParallelLinear
from vllm.model_executor.layers.logits_processor import LogitsProcessor
from vllm.model_executor.layers.vocab_parallel_embedding import ParallelLMHead, VocabParallelEmbedding

from tests.helpers import drafter_config
from tests.numerics import assert_as_close_as_baseline
from vllm_dflash.config import DFlashConfig
from vllm_dflash.model_executor import fp8_weights
from vllm_dflash.model_executor import reduced_head as module
from vllm_dflash.model_executor.draft_model import DFlashDraftModel
from vllm_dflash.model_executor.fp8_weights import Fp8RowsMethod, quantize_rows, use_fp8_weights, weight_and_scale
from vllm_dflash.model_executor.reduced_head import reduce_head

FP8 = torch.float8_e4m3fn


@pytest.fixture(scope="module")
def vllm_config(tmp_path_factory: pytest.TempPathFactory) -> Iterator[VllmConfig]:
    """A config, and a process that vLLM's parallel layers can be made in: one rank of one."""
    rendezvous = tmp_path_factory.mktemp("distributed") / "rendezvous"
    config = VllmConfig()
    with set_current_vllm_config(config):
        init_distributed_environment(1, 0, f"file://{rendezvous}", 0, "gloo")
        initialize_model_parallel()
    yield config
    cleanup_dist_env_and_memory()


@pytest.fixture(autouse=True)
def seed() -> None:
    torch.manual_seed(0)


# Quantizing.


def steps(scaled: torch.Tensor) -> torch.Tensor:
    """How far apart the FP8 numbers around each value are."""
    exponents = [max(math.floor(math.log2(abs(value))), -6) if value else -6 for value in scaled.flatten().tolist()]
    return torch.tensor([2.0 ** (exponent - 3) for exponent in exponents]).view_as(scaled)


def test_quantized_by_hand() -> None:
    weight = torch.tensor(
        [
            [448.0, 1.0, 17.0, -100.0],  # scale 1: 17 lies halfway between 16 and 18; 96 and 104 are next to 100
            [224.0, -1.0, 0.25, 0.0],  # scale 1/2
            [0.0, 0.0, 0.0, 0.0],
            [-7.0, 7.0, 3.5, 0.5],  # scale 1/64: 0.5 is 32
        ]
    )
    quantized, scale = quantize_rows(weight)
    assert (quantized.dtype, scale.dtype) == (FP8, torch.float32)
    assert (quantized.shape, scale.shape) == ((4, 4), (4,))
    assert scale[[0, 1, 3]].tolist() == [1.0, 0.5, 1 / 64]
    assert quantized.float().tolist() == [
        [448.0, 1.0, 16.0, quantized[0, 3].item()],
        [448.0, -2.0, 0.5, 0.0],
        [0.0, 0.0, 0.0, 0.0],
        [-448.0, 448.0, 224.0, 32.0],
    ]
    assert quantized[0, 3].item() in (-96.0, -104.0)  # 100 is as near to the one as to the other


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_every_element_is_within_half_a_step(dtype: torch.dtype) -> None:
    weight = (torch.randn(24, 40) * torch.logspace(-6, 3, 24)[:, None]).to(dtype)
    quantized, scale = quantize_rows(weight)
    largest = weight.double().abs().amax(dim=1)
    torch.testing.assert_close(scale.double(), largest / 448, rtol=1e-6, atol=0)
    error = (quantized.double() * scale.double()[:, None] - weight.double()).abs()
    scaled = weight.double() / scale.double()[:, None]
    assert (error <= 0.5 * steps(scaled) * scale.double()[:, None] * 1.0001).all()


def test_a_row_of_zeros_stays_so() -> None:
    quantized, scale = quantize_rows(torch.zeros(2, 8))
    assert (quantized.float() == 0).all()
    assert torch.isfinite(scale).all() and (scale > 0).all()


def test_an_outlier_spoils_its_own_row_only() -> None:
    weight = torch.randn(8, 64)
    alone, _ = quantize_rows(weight)
    weight[3, 5] = 1e5
    quantized, scale = quantize_rows(weight)
    others = [0, 1, 2, 4, 5, 6, 7]
    assert torch.equal(quantized[others].float(), alone[others].float())
    assert quantized[3, 5].item() == 448
    assert scale[others].max() < 0.02 < 200 < scale[3]


# Linear layers.


def filled(layer: nn.Module) -> nn.Module:
    """With random weights. A fresh layer's are whatever the memory held."""
    for parameter in layer.parameters():
        parameter.data.normal_()
    return layer


class Layers(nn.Module):
    """One of each kind that a drafter has, and some that are to stay as they are."""

    def __init__(self) -> None:
        super().__init__()
        self.column = filled(ColumnParallelLinear(48, 32, bias=True))
        self.inner = nn.ModuleDict(
            {"row": filled(RowParallelLinear(48, 16, bias=False)), "qkv": filled(QKVParallelLinear(48, 16, 2, 1))}
        )
        self.embedding = VocabParallelEmbedding(96, 48)
        self.head = ParallelLMHead(96, 48)
        self.plain = nn.Linear(48, 8)

    @property
    def linear(self) -> list[nn.Module]:
        return [self.column, self.inner["row"], self.inner["qkv"]]


@pytest.fixture
def layers(vllm_config: VllmConfig) -> Layers:
    with set_current_vllm_config(vllm_config):
        return Layers()


def test_every_linear_layer_and_nothing_else(layers: Layers) -> None:
    before = layers.embedding.quant_method, layers.head.quant_method
    use_fp8_weights(layers)
    assert all(isinstance(layer.quant_method, Fp8RowsMethod) for layer in layers.linear)
    assert (layers.embedding.quant_method, layers.head.quant_method) == before


def test_weight_and_scale(layers: Layers) -> None:
    weight = layers.column.weight
    assert weight_and_scale(layers.column) == (weight, None)
    use_fp8_weights(layers)
    layers.column.quant_method.process_weights_after_loading(layers.column)
    quantized, scale = weight_and_scale(layers.column)
    assert (quantized.dtype, quantized.shape) == (FP8, (32, 48))
    assert scale is not None and scale.shape == (32,)
    assert "row_scale" not in layers.column.state_dict()  # no checkpoint has one


@pytest.mark.parametrize("shape", [(1, 48), (5, 48), (2, 3, 48)])
@pytest.mark.parametrize("index", [0, 1, 2], ids=["bias", "row parallel", "fused"])
def test_fp8_layer_multiplies(layers: Layers, index: int, shape: tuple[int, ...]) -> None:
    """By the stored numbers exactly; by the original weights as nearly as they are stored."""
    layer, x = layers.linear[index], torch.randn(shape)
    original, bias = layer.weight.data.double(), getattr(layer, "bias", None)
    use_fp8_weights(layers)
    layer.quant_method.process_weights_after_loading(layer)
    quantized, scale = quantize_rows(original.float())
    stored = quantized.double() * scale.double()[:, None]
    with torch.no_grad():
        got, _ = layer(x)
        wide_bias = None if bias is None else bias.double()
        truth = F.linear(x.double(), stored, wide_bias)
        assert_as_close_as_baseline("stored", got, truth, F.linear(x, stored.float(), bias))
        # a number is stored within 1/16 of itself, or within 2^-10 scales where it is very small
        bound = x.double().abs() @ (original.abs() / 16 + scale.double()[:, None] * 2**-10).T + 1e-5
        assert ((got - F.linear(x.double(), original, wide_bias)).abs() <= bound).all()


def test_fp8_layer_keeps_the_precision_of_its_input(layers: Layers) -> None:
    layer = layers.inner["row"]
    use_fp8_weights(layers)
    layer.quant_method.process_weights_after_loading(layer)
    assert layer(torch.randn(3, 48, dtype=torch.bfloat16))[0].dtype == torch.bfloat16


def test_the_compiler_is_told_the_right_shape() -> None:
    x, (weight, scale) = torch.randn(3, 16), quantize_rows(torch.randn(8, 16))
    real = torch.ops.vllm.dflash_fp8_linear(x, weight, scale)
    with FakeTensorMode() as mode:
        operands = [mode.from_tensor(operand) for operand in (x, weight, scale)]
        made_up = torch.ops.vllm.dflash_fp8_linear(*operands)
    assert (made_up.shape, made_up.dtype, made_up.stride()) == (real.shape, real.dtype, real.stride())


# The LM head.


def loaded(head: nn.Module) -> nn.Module:
    """With random weights, as a loader leaves it."""
    filled(head).quant_method.process_weights_after_loading(head)
    return head


IDS = [2, 5, 17, 40, 41, 63, 64, 95]


def draft_model(vllm_config: VllmConfig, head: nn.Module | None = None, bias: bool = False) -> DFlashDraftModel:
    """A drafter of its logits half alone: the layers before it play no part here."""
    model = DFlashDraftModel.__new__(DFlashDraftModel)
    nn.Module.__init__(model)
    model.config, model.vllm_config = DFlashConfig.from_dict(drafter_config(), source="/drafters/tiny"), vllm_config
    model.register_buffer("draft_id_to_target_id", None, persistent=False)
    with set_current_vllm_config(vllm_config):
        model.logits_processor = LogitsProcessor(96)
        model.lm_head = head or loaded(ParallelLMHead(96, 48, bias=bias))
    return model


def tied(vllm_config: VllmConfig) -> nn.Module:
    """An embedding that is the LM head, too."""
    with set_current_vllm_config(vllm_config):
        return loaded(VocabParallelEmbedding(96, 48))


@pytest.mark.parametrize("make_head", [lambda config: None, tied], ids=["own", "tied"])
@torch.no_grad()
def test_reduced_head_has_rows_of_the_whole(vllm_config: VllmConfig, make_head: Any) -> None:
    model, hidden = draft_model(vllm_config, make_head(vllm_config)), torch.randn(20, 48)
    weight = model.lm_head.weight.data.clone()
    whole = model.compute_logits(hidden)
    reduce_head(model, IDS)
    assert torch.equal(model.lm_head.weight[: len(IDS)], weight[IDS])
    logits = model.compute_logits(hidden)
    assert logits.shape == (20, len(IDS))
    truth = hidden.double() @ weight[IDS].double().T
    assert_as_close_as_baseline("logits", logits, truth, whole[:, IDS])


@torch.no_grad()
def test_the_likeliest_of_the_reduced_head_in_ids_of_the_target(vllm_config: VllmConfig) -> None:
    model, hidden = draft_model(vllm_config), torch.randn(200, 48)
    whole = model.compute_logits(hidden)
    reduce_head(model, IDS)
    allowed = torch.full((96,), -math.inf)
    allowed[IDS] = 0.0
    best = model.get_top_tokens(hidden)
    assert best.tolist() == (whole + allowed).argmax(dim=-1).tolist()
    assert set(best.tolist()) == set(IDS)
    assert best.tolist() != whole.argmax(dim=-1).tolist()


def test_draft_ids_are_mapped(vllm_config: VllmConfig) -> None:
    model = draft_model(vllm_config)
    reduce_head(model, IDS)
    assert model.to_target_ids(torch.tensor([0, 7, 2, 2])).tolist() == [2, 95, 17, 17]


def test_logits_of_tokens_that_cannot_be_drafted(vllm_config: VllmConfig) -> None:
    model = draft_model(vllm_config)
    reduce_head(model, [4, 90])
    wide = model.to_target_logits(torch.tensor([[1.0, 2.0], [3.0, 4.0]]))
    assert wide.shape == (2, 96)
    assert wide[:, [4, 90]].tolist() == [[1.0, 2.0], [3.0, 4.0]]
    rest = [token for token in range(96) if token not in (4, 90)]
    assert (wide[:, rest] == -math.inf).all()


@torch.no_grad()
def test_the_targets_head_is_left_as_it_was(vllm_config: VllmConfig) -> None:
    head = draft_model(vllm_config).lm_head
    assert head is not None
    before = head.weight.data.clone()
    model = draft_model(vllm_config, head)
    reduce_head(model, IDS, Fp8RowsMethod())
    model.lm_head.weight.data.zero_()
    assert torch.equal(head.weight, before)
    assert not hasattr(head, "row_scale")


@torch.no_grad()
def test_reduced_head_of_fp8(vllm_config: VllmConfig) -> None:
    model, hidden = draft_model(vllm_config), torch.randn(20, 48)
    rows = model.lm_head.weight.data[IDS].clone()
    reduce_head(model, IDS, Fp8RowsMethod())
    assert model.lm_head.weight.dtype == FP8
    quantized, scale = quantize_rows(rows)
    stored = quantized.double() * scale.double()[:, None]
    logits = model.compute_logits(hidden)
    assert_as_close_as_baseline("logits", logits, hidden.double() @ stored.T, hidden @ stored.float().T)


def test_reduced_head_keeps_a_bias(vllm_config: VllmConfig) -> None:
    model = draft_model(vllm_config, bias=True)
    bias = model.lm_head.bias.data.clone()
    reduce_head(model, IDS)
    assert model.lm_head.bias[: len(IDS)].tolist() == bias[IDS].tolist()


def test_rows_of_a_head_that_two_ranks_share(monkeypatch: pytest.MonkeyPatch) -> None:
    """Each brings what it has, and nothing where the other does: their sum is the rows of the whole."""
    table = torch.randn(96, 4)
    monkeypatch.setattr(module, "get_tensor_model_parallel_world_size", lambda: 2)
    monkeypatch.setattr(module, "tensor_model_parallel_all_reduce", lambda rows: rows)

    def brought(start: int, end: int, values: torch.Tensor) -> torch.Tensor:
        head = SimpleNamespace(shard_indices=SimpleNamespace(org_vocab_start_index=start, org_vocab_end_index=end))
        padding = torch.full((8, *values.shape[1:]), math.nan)
        return module._rows(head, torch.cat([values[start:end], padding]), torch.tensor(IDS))  # type: ignore[arg-type]

    assert torch.equal(brought(0, 64, table) + brought(64, 96, table), table[IDS])
    bias = table[:, 0]
    assert torch.equal(brought(0, 64, bias) + brought(64, 96, bias), bias[IDS])
    assert brought(64, 96, bias)[:6].tolist() == [0.0] * 6


# Heads that cannot be reduced.

OPTION = '--additional-config\'s "dflash": "draft_vocab_size"'


def complaint(model: DFlashDraftModel) -> str:
    head = model.lm_head
    with pytest.raises(ValueError) as caught:
        reduce_head(model, IDS)
    assert model.lm_head is head
    return str(caught.value)


def test_a_drafter_with_its_own_vocabulary(vllm_config: VllmConfig) -> None:
    model = draft_model(vllm_config)
    model.config = DFlashConfig.from_dict(drafter_config(draft_vocab_size=40), source="/drafters/tiny")
    model.draft_id_to_target_id = torch.arange(40)
    message = complaint(model)
    assert "/drafters/tiny brings a draft vocabulary of its own (40 tokens)" in message
    assert OPTION in message


@pytest.mark.parametrize(
    "weight", [None, torch.zeros(96, 48, dtype=FP8), torch.zeros(96, 6, dtype=torch.int32)], ids=["none", "fp8", "int4"]
)
def test_a_quantized_head(vllm_config: VllmConfig, weight: torch.Tensor | None) -> None:
    head = nn.Module()
    head.quant_method = SomeQuantizedMethod()
    if weight is not None:
        head.weight = nn.Parameter(weight, requires_grad=False)
    message = complaint(draft_model(vllm_config, head))
    assert message.startswith(OPTION)
    assert "this one is quantized (SomeQuantizedMethod)" in message


class SomeQuantizedMethod:
    """What a quantized layer multiplies with."""


def test_a_device_without_fp8_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    def platform(capable: bool) -> Any:
        return SimpleNamespace(
            is_cpu=lambda: False,
            is_cuda=lambda: True,
            has_device_capability=lambda capability: capable and capability == 89,
            get_device_name=lambda: "NVIDIA A100",
        )

    monkeypatch.setattr(fp8_weights, "current_platform", platform(capable=True))
    fp8_weights.check_fp8_device()
    monkeypatch.setattr(fp8_weights, "current_platform", platform(capable=False))
    with pytest.raises(ValueError, match='"draft_weights" = "fp8" needs .* 8.9 or later, and this is NVIDIA A100'):
        fp8_weights.check_fp8_device()
