# SPDX-License-Identifier: Apache-2.0
"""Context features on Transformers: the outputs of the tapped decoder layers of a target."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from types import TracebackType

import torch
from torch import nn


class TargetFeatures:
    """While active, keeps the outputs of decoder layers `layer_ids` of `target`'s latest forward.

    Hooks rather than `output_hidden_states`: that one keeps every layer, and its last entry is normed, so it is not
    the output of the last decoder layer.

        with TargetFeatures(target, layer_ids) as features:
            target(input_ids)
            context = features.take()   # [B, T, F*H]
    """

    def __init__(self, target: nn.Module, layer_ids: Sequence[int]) -> None:
        layers = _decoder_layers(target)
        if layer_ids[-1] >= len(layers):
            raise ValueError(
                f"the drafter's target_layer_ids {list(layer_ids)} reach beyond the {len(layers)} decoder layers of "
                f"{type(target).__name__}: this drafter belongs to another target"
            )
        self._layers = [layers[i] for i in layer_ids]
        self._outputs: list[torch.Tensor | None] = [None] * len(layer_ids)
        self._handles: list[torch.utils.hooks.RemovableHandle] = []

    def __enter__(self) -> TargetFeatures:
        for slot, layer in enumerate(self._layers):
            self._handles.append(layer.register_forward_hook(self._keep(slot)))
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for handle in self._handles:
            handle.remove()
        self._handles.clear()

    def _keep(self, slot: int) -> Callable[..., None]:
        def hook(module: nn.Module, inputs: object, output: torch.Tensor | tuple) -> None:
            self._outputs[slot] = output[0] if isinstance(output, tuple) else output  # [B, T, H]

        return hook

    def take(self) -> torch.Tensor:
        """The features of the latest forward, [B, T, F*H].

        Raises RuntimeError when there was none, and ValueError where layers have outputs of another form.
        """
        outputs = [o for o in self._outputs if o is not None]
        if len(outputs) != len(self._outputs):
            raise RuntimeError("TargetFeatures.take() before a forward of the target")
        self._outputs = [None] * len(outputs)
        if any(output.ndim != 3 for output in outputs):
            raise ValueError(
                f"the tapped decoder layers give tensors of shapes {[list(o.shape) for o in outputs]}, "
                "and a drafter reads hidden states [B, T, H]: this target's layers are not of that kind"
            )
        return torch.cat(outputs, dim=-1)


def _decoder_layers(target: nn.Module) -> nn.ModuleList:
    decoder = target.get_decoder() if hasattr(target, "get_decoder") else getattr(target, "model", target)
    layers = getattr(decoder, "layers", None)
    if not isinstance(layers, nn.ModuleList):
        raise ValueError(f"cannot find the decoder layers of {type(target).__name__}: no .layers on its decoder")
    return layers
