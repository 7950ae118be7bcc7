# SPDX-License-Identifier: Apache-2.0
"""FP8 weights for the drafter, made when it is loaded: half the bytes to read for every block.

Weights are stored as float8_e4m3fn with one scale a row. Few rows multiply in their own precision (weight-only
quantization); many rows are quantized too, row by row, and multiply on the FP8 tensor cores. The target is not touched
and verifies every draft: only how many drafts it accepts can change.
"""

from __future__ import annotations

import torch
from torch import nn
from torch.nn import functional as F
from vllm import _custom_ops as ops
from vllm.model_executor.layers.linear import LinearBase, LinearMethodBase
from vllm.platforms import current_platform
from vllm.utils.torch_utils import direct_register_custom_op

from vllm_dflash.kernels.skinny_linear import MAX_SKINNY_ROWS, skinny_linear

_FP8 = torch.float8_e4m3fn


def quantize_rows(
    weight: torch.Tensor,  # [N, K]
) -> tuple[torch.Tensor, torch.Tensor]:
    """float8_e4m3fn [N, K] and scales [N] fp32: weight = quantized * scale."""
    largest = torch.finfo(_FP8).max
    scale = weight.abs().amax(dim=1).float().clamp(min=1e-12) / largest
    scaled = (weight.float() / scale[:, None]).clamp(-largest, largest)
    return scaled.to(_FP8), scale


def check_fp8_device() -> None:
    """Raise ValueError on a device that cannot multiply FP8 numbers."""
    if current_platform.is_cpu() or (current_platform.is_cuda() and current_platform.has_device_capability(89)):
        return
    raise ValueError(
        '--additional-config\'s "dflash": "draft_weights" = "fp8" needs an NVIDIA GPU of compute capability 8.9 or '
        f"later, and this is {current_platform.get_device_name()}"
    )


def use_fp8_weights(module: nn.Module) -> None:
    """Have every linear layer inside `module` turn its weights to FP8 once they are loaded, and multiply so."""
    for child in module.modules():
        if isinstance(child, LinearBase):
            child.quant_method = Fp8RowsMethod()


def weight_and_scale(linear: nn.Module) -> tuple[torch.Tensor, torch.Tensor | None]:
    """A layer's weight [N, K] and, where it is FP8, its rows' scales [N]."""
    return linear.weight, getattr(linear, "row_scale", None)


class Fp8RowsMethod(LinearMethodBase):
    """vLLM's hook for how a layer multiplies."""

    def create_weights(self, layer: nn.Module, *args: object, **kwargs: object) -> None:
        """The layer has its weights already, those of the method it was made with."""

    def process_weights_after_loading(self, layer: nn.Module) -> None:
        """vLLM's loaders call this when the weights are there."""
        weight, scale = quantize_rows(layer.weight.data)
        layer.weight = nn.Parameter(weight, requires_grad=False)
        layer.register_buffer("row_scale", scale, persistent=False)

    def apply(
        self,
        layer: nn.Module,
        x: torch.Tensor,  # [..., K]
        bias: torch.Tensor | None = None,  # [N]
    ) -> torch.Tensor:
        """`x @ weight.T + bias`, [..., N]."""
        out = torch.ops.vllm.dflash_fp8_linear(x.flatten(0, -2), layer.weight, layer.row_scale)
        out = out.unflatten(0, x.shape[:-1])
        return out if bias is None else out + bias


def _fp8_linear(
    x: torch.Tensor,  # [M, K]
    weight: torch.Tensor,  # [N, K] float8_e4m3fn
    scale: torch.Tensor,  # [N] fp32
) -> torch.Tensor:
    """One op for the compiler, since how to multiply depends on the number of rows."""
    if not x.is_cuda:
        return F.linear(x, (weight.to(torch.float32) * scale[:, None]).to(x.dtype))
    if x.shape[0] <= MAX_SKINNY_ROWS:
        return skinny_linear(x, weight, weight_scale=scale)
    quantized, row_scale = ops.scaled_fp8_quant(x.contiguous(), use_per_token_if_dynamic=True)
    return ops.cutlass_scaled_mm(quantized, weight.t(), row_scale, scale[None, :], x.dtype)


def _fp8_linear_fake(
    x: torch.Tensor,  # [M, K]
    weight: torch.Tensor,  # [N, K]
    scale: torch.Tensor,  # [N]
) -> torch.Tensor:
    return x.new_empty((x.shape[0], weight.shape[0]))


direct_register_custom_op(op_name="dflash_fp8_linear", op_func=_fp8_linear, fake_impl=_fp8_linear_fake)
