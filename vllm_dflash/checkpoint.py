# SPDX-License-Identifier: Apache-2.0
"""The tensors of a drafter checkpoint: which there are, which there must be. Reads safetensors headers, no weights."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from pickle import UnpicklingError
from typing import TYPE_CHECKING, BinaryIO, NamedTuple

from vllm_dflash.config import DFlashConfig
from vllm_dflash.weight_files import read_header, weight_files

if TYPE_CHECKING:
    import torch

#: A separately trained embedding of the mask token, shipped beside the safetensors.
MASK_EMBEDDING_FILE = "mask_embedding.pt"
#: Written by some trainers, needed by no one at run time.
IGNORED_TENSORS = ("t2d", "rotary_emb.inv_freq")

Shape = tuple[int, ...]


def resolve_model_dir(model: str, revision: str | None = None) -> Path:
    """The local directory of a drafter: itself, or the hub snapshot of the id `model`."""
    path = Path(model)
    if path.is_dir():
        return path
    from huggingface_hub import snapshot_download

    patterns = ["*.json", "*.safetensors", MASK_EMBEDDING_FILE]
    return Path(snapshot_download(model, revision=revision, allow_patterns=patterns))


def read_tensor_shapes(model_dir: Path) -> dict[str, Shape]:
    """name -> shape over a drafter's weight files. Raises ValueError naming a broken or missing file."""
    files, problems = weight_files(model_dir)
    if problems:
        raise ValueError("; ".join(problems))
    if not files:
        raise ValueError(f"no *.safetensors in the drafter's directory {model_dir}")
    return {name: tensor.shape for file in files for name, tensor in read_header(file).items()}


def expected_tensors(config: DFlashConfig) -> dict[str, Shape]:
    """name -> shape of every tensor that a drafter of the published layout must have."""
    hidden, head_dim = config.hidden_size, config.head_dim
    tensors: dict[str, Shape] = {
        "fc.weight": (hidden, config.feature_width),
        "hidden_norm.weight": (hidden,),
        "norm.weight": (hidden,),
    }
    q_size, kv_size = config.num_attention_heads * head_dim, config.num_key_value_heads * head_dim
    layer: dict[str, Shape] = {
        "input_layernorm.weight": (hidden,),
        "post_attention_layernorm.weight": (hidden,),
        "self_attn.q_proj.weight": (q_size, hidden),
        "self_attn.k_proj.weight": (kv_size, hidden),
        "self_attn.v_proj.weight": (kv_size, hidden),
        "self_attn.o_proj.weight": (hidden, q_size),
        "self_attn.q_norm.weight": (head_dim,),
        "self_attn.k_norm.weight": (head_dim,),
        "mlp.gate_proj.weight": (config.intermediate_size, hidden),
        "mlp.up_proj.weight": (config.intermediate_size, hidden),
        "mlp.down_proj.weight": (hidden, config.intermediate_size),
    }
    if config.attention_bias:
        sizes = {"q_proj": q_size, "k_proj": kv_size, "v_proj": kv_size, "o_proj": hidden}
        layer |= {f"self_attn.{name}.bias": (size,) for name, size in sizes.items()}
    for index in range(config.num_hidden_layers):
        tensors |= {f"layers.{index}.{name}": shape for name, shape in layer.items()}
    if config.draft_vocab_size != config.vocab_size:
        tensors |= {"d2t": (config.draft_vocab_size,), "lm_head.weight": (config.draft_vocab_size, hidden)}
    return tensors


def optional_tensors(config: DFlashConfig) -> dict[str, Shape]:
    """name -> shape of what a drafter may bring of its own instead of sharing the target's."""
    return {
        "embed_tokens.weight": (config.vocab_size, config.hidden_size),
        "lm_head.weight": (config.draft_vocab_size, config.hidden_size),
        "d2t": (config.draft_vocab_size,),
    }


class TensorProblem(NamedTuple):
    """Of which kind ("missing", "extra" or "shape"), and what."""

    kind: str
    message: str


def check_tensors(config: DFlashConfig, found: Mapping[str, Shape]) -> None:
    """Compare a checkpoint's tensors with what its config.json implies.

    An extra tensor is refused too: weights that nobody reads mean an architecture other than the config's, and
    acceptance would collapse without a word. Raises ValueError naming the tensors.
    """
    for problem in tensor_problems(config, found):
        raise ValueError(problem.message)


def tensor_problems(config: DFlashConfig, found: Mapping[str, Shape]) -> Iterator[TensorProblem]:
    """All differences between a checkpoint's tensors and what its config.json implies."""
    required, optional = expected_tensors(config), optional_tensors(config)
    missing = sorted(required.keys() - found.keys())
    if missing:
        yield TensorProblem("missing", f"{config.source}: missing tensor(s): {', '.join(missing)}")
    for name, shape in sorted(found.items()):
        expected = required.get(name, optional.get(name))
        if expected is None and not name.endswith(IGNORED_TENSORS):
            yield TensorProblem(
                "extra", f"{config.source}: tensor {name!r} {list(shape)} belongs to no part of this drafter"
            )
        if expected is not None and shape != expected:
            yield TensorProblem(
                "shape",
                f"{config.source}: tensor {name!r} has shape {list(shape)}, config.json implies {list(expected)}",
            )


def read_mask_embedding(model_dir: Path, config: DFlashConfig) -> torch.Tensor | None:
    """The separately trained mask embedding [H], or None where none is shipped. Raises ValueError if it is not ours."""
    file = model_dir / MASK_EMBEDDING_FILE
    if not file.is_file():
        return None
    with file.open("rb") as stream:
        return parse_mask_embedding(stream, str(file), config)


def parse_mask_embedding(stream: BinaryIO, file: str, config: DFlashConfig) -> torch.Tensor:
    """The embedding [H] in an open MASK_EMBEDDING_FILE. Raises ValueError naming the file if it is not ours."""
    import torch

    try:
        state = torch.load(stream, weights_only=True, map_location="cpu")
    except (RuntimeError, EOFError, UnpicklingError) as error:
        raise ValueError(f"{file} is not a readable PyTorch file (truncated download?): {error}") from error
    if isinstance(state, dict):
        token_id = state.get("mask_token_id", config.mask_token_id)
        if token_id != config.mask_token_id:
            raise ValueError(f"{file}: mask_token_id = {token_id}, config.json says {config.mask_token_id}")
        state = state.get("embedding")
    if not isinstance(state, torch.Tensor):
        raise ValueError(f"{file} holds no embedding: neither a tensor nor a dict with the key 'embedding'")
    if state.numel() != config.hidden_size:
        raise ValueError(f"{file}: embedding of shape {list(state.shape)}, hidden_size = {config.hidden_size}")
    return state.reshape(-1)
