# SPDX-License-Identifier: Apache-2.0
"""The draft forward's kernels on one GPU, each and in a chain, beside plain torch. Every result is checked first.

    python benchmarks/draft_kernels.py [--quick] [--seconds 55] [--rows 16,32,64,128]

The shapes are those of Qwen3-8B's drafter: hidden 4096, intermediate 12288, 32 query and 8 KV heads of 128, 5 layers,
LM head of 151936 rows. A launch is timed in a CUDA graph of many, over weights of which each set is used once and all
of which are larger than L2 together. GB/s count the weights' bytes only; the fraction is of a measured copy, which
counts bytes read and bytes written. The chain is the forward of `--rows` rows without its attention.

Tile sweeps stop when --seconds are over; what was left out is said. The last line is JSON. Exit code 1: a kernel is
WRONG.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import statistics
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch.nn import functional as F

from vllm_dflash.kernels.lm_head import argmax_linear, choose_head_tile
from vllm_dflash.kernels.qkv import norm_rope_cache, reference_norm_rope_cache
from vllm_dflash.kernels.skinny_linear import Tile, choose_tile, reference_skinny_linear, skinny_linear

HIDDEN, INTERMEDIATE, HEADS, KV_HEADS, HEAD_DIM, VOCAB, LAYERS = 4096, 12288, 32, 8, 128, 151936, 5
REDUCED_VOCAB = 32768
BLOCK = 16  # query rows of a request
EPS = 1e-6
DEVICE = "cuda"
ROTATED_BYTES = 400e6  # of weights that a timing goes through; L2 holds 50 MB
MIN_LAUNCHES = 24
FP8 = torch.float8_e4m3fn


@dataclass(frozen=True)
class Case:
    """One product of the forward."""

    name: str
    n: int
    k: int
    norm: bool = False
    residual: bool = False
    silu: bool = False
    argmax: bool = False


CASES = (
    Case("qkv", (HEADS + 2 * KV_HEADS) * HEAD_DIM, HIDDEN, norm=True),
    Case("o_proj", HIDDEN, HEADS * HEAD_DIM, residual=True),
    Case("gate_up", 2 * INTERMEDIATE, HIDDEN, norm=True, silu=True),
    Case("down", HIDDEN, INTERMEDIATE, residual=True),
    Case("lm_head", VOCAB, HIDDEN, norm=True, argmax=True),
)


class Weights:
    """Distinct weights of any shape out of one large pool of random numbers."""

    def __init__(self, num_elements: int) -> None:
        pool = torch.empty(num_elements, dtype=torch.bfloat16, device=DEVICE).normal_(0, 0.02)
        self.pools = {torch.bfloat16: pool, FP8: (pool * 50).to(FP8)}
        self.scales = torch.rand(max(VOCAB, 2 * INTERMEDIATE), device=DEVICE) * 0.01 + 0.015

    def get(self, n: int, k: int, dtype: torch.dtype, index: int) -> torch.Tensor:
        """Set `index` of [n, k] weights; after the last set comes the first."""
        return self.at(index % (self.pools[dtype].numel() // (n * k)) * n * k, n, k, dtype)

    def at(self, first: int, n: int, k: int, dtype: torch.dtype) -> torch.Tensor:
        """[n, k] weights that begin at element `first` of the pool."""
        return self.pools[dtype][first : first + n * k].view(n, k)

    def scale(self, n: int, dtype: torch.dtype) -> torch.Tensor | None:
        return self.scales[:n] if dtype == FP8 else None


def graph_seconds(launch: Callable[[int], Any], launches: int) -> float:
    """Seconds per launch, in a CUDA graph of `launches`; `launch` gets the number of each."""
    for index in range(2):
        launch(index)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for index in range(launches):
            launch(index)
    times = []
    for _ in range(8):
        start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        start.record()
        graph.replay()
        end.record()
        torch.cuda.synchronize()
        times.append(start.elapsed_time(end) / 1e3 / launches)
    return statistics.median(times[2:])


def copy_bytes_per_second() -> float:
    source = torch.empty(1 << 30, dtype=torch.uint8, device=DEVICE).random_()
    target = torch.empty_like(source)
    return 2 * source.numel() / graph_seconds(lambda _: target.copy_(source), 4)


class Problem:
    """One case at one number of rows and one weight type: inputs, the kernel, torch's counterpart and a check."""

    def __init__(self, case: Case, num_rows: int, dtype: torch.dtype, weights: Weights) -> None:
        self.case, self.num_rows, self.dtype, self.weights = case, num_rows, dtype, weights
        self.x = torch.randn(num_rows, case.k, device=DEVICE, dtype=torch.bfloat16)
        ones = torch.rand(case.k, device=DEVICE, dtype=torch.bfloat16) + 0.5
        self.norm = ones if case.norm else None
        self.residual = torch.randn(num_rows, case.n, device=DEVICE, dtype=torch.bfloat16) if case.residual else None
        self.num_bytes = case.n * case.k * dtype.itemsize
        self.launches = max(MIN_LAUNCHES if not case.argmax else 6, int(ROTATED_BYTES / self.num_bytes))

    @property
    def default_tile(self) -> Tile:
        if self.case.argmax:
            return choose_head_tile(self.num_rows, self.dtype)
        return choose_tile(self.num_rows, self.case.n, self.case.k, self.dtype)

    def kernel(self, index: int, tile: Tile | None, use_pdl: bool | None = None) -> torch.Tensor:
        case = self.case
        weight = self.weights.get(case.n, case.k, self.dtype, index)
        scale = self.weights.scale(case.n, self.dtype)
        if case.argmax:
            return argmax_linear(
                self.x,
                weight,
                weight_scale=scale,
                norm_weight=self.norm,
                num_query_rows=BLOCK,
                tile=tile,
                use_pdl=use_pdl,
            )
        return skinny_linear(
            self.x,
            weight,
            weight_scale=scale,
            norm_weight=self.norm,
            eps=EPS,
            residual=self.residual,
            silu_and_mul=case.silu,
            tile=tile,
            use_pdl=use_pdl,
        )

    def torch(self, index: int) -> torch.Tensor:
        """What plain torch would launch: norm, product and what comes after, in bf16."""
        case, x = self.case, self.x
        if self.norm is not None:
            x = F.rms_norm(x, (case.k,), self.norm, EPS)
        out = F.linear(x, self.weights.get(case.n, case.k, torch.bfloat16, index))
        if case.silu:
            gate, up = out.chunk(2, dim=1)
            out = F.silu(gate) * up
        if case.argmax:
            return out.argmax(dim=1)
        return out if self.residual is None else out + self.residual

    def linear(self, index: int) -> torch.Tensor:
        """The bare product."""
        return F.linear(self.x, self.weights.get(self.case.n, self.case.k, torch.bfloat16, index))

    def is_wrong(self, tile: Tile) -> str:
        """What is wrong with the kernel's result; empty if nothing."""
        first, again = self.kernel(0, tile), self.kernel(0, tile)
        if not torch.equal(first, again):
            return "two runs differ"
        case = self.case
        weight = self.weights.get(case.n, case.k, self.dtype, 0).float()
        arguments = {
            "weight_scale": self.weights.scale(case.n, self.dtype),
            "norm_weight": self.norm if self.norm is None else self.norm.float(),
            "eps": EPS,
        }
        if case.argmax:
            return wrong_argmax(self.x.float(), weight, first, **arguments)
        residual = None if self.residual is None else self.residual.float()
        truth = reference_skinny_linear(self.x.float(), weight, residual=residual, silu_and_mul=case.silu, **arguments)
        error = relative_error(first, truth)
        return "" if error < 1e-2 else f"relative error {error:.2g}"


def relative_error(got: torch.Tensor, truth: torch.Tensor) -> float:
    error = float((got.double() - truth.double()).norm() / truth.double().norm())
    return error if error == error else float("inf")  # NaN passes no check


def wrong_argmax(
    x: torch.Tensor,  # [M, K] fp32
    weight: torch.Tensor,  # [V, K] fp32
    ids: torch.Tensor,  # what the kernel says, anchors left out
    weight_scale: torch.Tensor | None,
    norm_weight: torch.Tensor | None,
    eps: float,
) -> str:
    """The kernel may pick another of nearly equal logits, but none that is clearly smaller than the largest."""
    x = x.unflatten(0, (-1, BLOCK))[:, 1:].flatten(0, 1)
    if norm_weight is not None:
        x = F.rms_norm(x, (x.shape[1],), norm_weight, eps)
    logits = F.linear(x, weight)
    if weight_scale is not None:
        logits = logits * weight_scale
    if ids.shape != logits.shape[:1] or ids.min() < 0 or ids.max() >= logits.shape[1]:
        return f"ids out of range: {ids.tolist()}"
    best = logits.max(dim=1).values
    missing = (best - logits.gather(1, ids[:, None])[:, 0]) / logits.std()
    return "" if float(missing.max()) < 2e-2 else f"a chosen logit is {float(missing.max()):.2g} sigma below the best"


def candidates(problem: Problem, quick: bool) -> Iterator[Tile]:
    """The default first, then a handful of others."""
    yield problem.default_tile
    case, wide = problem.case, problem.dtype != FP8
    large = problem.num_rows > 32
    shapes: tuple[tuple[int, int, int, int, bool], ...]
    if wide:
        shapes = (  # block_n, block_k, num_warps, num_stages, weights_left
            (128, 64, 4, 6, True),
            (128, 128, 4, 4, True),
            (64, 128, 4, 4, True),
            (64, 256, 4, 3, True),
            (64, 64, 4, 8, True),
            (128, 128, 4, 3, False),
            (64, 128, 4, 4, False),
            (32, 256, 4, 4, False),
            (128, 128, 8, 3, True),
        )
    else:
        shapes = (
            (128, 128, 4, 5, False),
            (128, 256, 4, 3, False),
            (64, 256, 4, 4, False),
            (128, 256, 8, 4, False),
            (64, 128, 4, 6, False),
            (64, 512, 8, 3, False),
            (128, 128, 8, 4, True),
            (64, 128, 4, 4, True),
        )
    for block_n, block_k, num_warps, num_stages, left in shapes[: 3 if quick else None]:
        programs = -(-case.n // block_n)
        stage = block_k * (block_n * problem.dtype.itemsize + 2 * problem.num_rows)
        stages = min(num_stages, 220_000 // stage)
        if stages < 2:
            continue
        warps = 8 if large and block_n == 128 else num_warps
        for split in (1,) if case.argmax else (1, 2, 4, 8):
            if (split > 1 and programs * split > 600) or (programs * split < 90 and split < 8):
                continue
            if case.k // split >= 4 * block_k:
                yield Tile(block_n, block_k, split, warps, stages, weights_left=left)


def tile_name(tile: Tile) -> str:
    side = "L" if tile.weights_left else "R"
    return f"{tile.block_n}x{tile.block_k}/{tile.split_k} w{tile.num_warps} s{tile.num_stages} {side}"


class Report:
    """What has been measured, and whether anything was wrong."""

    def __init__(self, seconds: float) -> None:
        self.started, self.seconds = time.monotonic(), seconds
        self.wrong: list[str] = []
        self.skipped: list[str] = []
        self.results: dict[str, Any] = {}
        self.best: dict[tuple[str, int, torch.dtype], Tile] = {}

    @property
    def is_late(self) -> bool:
        return time.monotonic() - self.started > self.seconds

    def mark_wrong(self, what: str) -> None:
        self.wrong.append(what)
        print(f"  WRONG: {what}", flush=True)


def try_tile(problem: Problem, tile: Tile, report: Report, label: str) -> float | None:
    """Seconds a launch with this tile, if it compiles and is right."""
    try:
        if wrong := problem.is_wrong(tile):
            report.mark_wrong(f"{label} {tile_name(tile)}: {wrong}")
            return None
        return graph_seconds(lambda index: problem.kernel(index, tile), problem.launches)
    except Exception as error:
        torch.cuda.synchronize()
        print(f"  {label} {tile_name(tile)}: skipped, {type(error).__name__}: {str(error)[:90]!r}", flush=True)
        return None


def measure(problem: Problem, report: Report, copy: float, quick: bool) -> None:
    """One row of the table: torch, the default tile, and the best of a sweep."""
    case = problem.case
    label = f"{case.name} M={problem.num_rows} {'fp8' if problem.dtype == FP8 else 'bf16'}"
    linear = graph_seconds(problem.linear, problem.launches)
    plain = graph_seconds(problem.torch, problem.launches)
    times: dict[Tile, float] = {}
    for tile in dict.fromkeys(candidates(problem, quick)):
        if times and report.is_late:
            report.skipped.append(label)
            break
        if seconds := try_tile(problem, tile, report, label):
            times[tile] = seconds
    if not times:
        return
    ranking = sorted(times, key=lambda tile: times[tile])
    best = ranking[0]
    report.best[case.name, problem.num_rows, problem.dtype] = best
    no_pdl = graph_seconds(lambda index: problem.kernel(index, best, False), problem.launches)
    default = times.get(problem.default_tile)

    def rate(seconds: float) -> str:
        return f"{problem.num_bytes / seconds / 1e9:5.0f} GB/s {problem.num_bytes / seconds / copy:4.0%}"

    print(
        f"{label:<22} torch {plain * 1e6:7.2f} us, F.linear {linear * 1e6:7.2f} | default "
        f"{default * 1e6 if default else float('nan'):7.2f} | best {times[best] * 1e6:7.2f} us {rate(times[best])}, "
        f"without PDL {no_pdl * 1e6:7.2f}",
        flush=True,
    )
    print("    " + "; ".join(f"{tile_name(tile)}: {times[tile] * 1e6:.2f}" for tile in ranking[:6]), flush=True)
    report.results[label] = {
        "linear_us": round(linear * 1e6, 2),
        "default_us": default and round(default * 1e6, 2),
        "best_us": round(times[best] * 1e6, 2),
        "no_pdl_us": round(no_pdl * 1e6, 2),
        "of_copy": round(problem.num_bytes / times[best] / copy, 3),
        "tile": tile_name(best),
    }


class Chain:
    """The draft forward without its attention: 5 layers and the LM head, by these kernels and by plain torch."""

    def __init__(self, num_rows: int, dtype: torch.dtype, weights: Weights, vocab_size: int) -> None:
        self.dtype, self.weights, self.vocab_size, self.num_rows = dtype, weights, vocab_size, num_rows
        self.x = torch.randn(num_rows, HIDDEN, device=DEVICE, dtype=torch.bfloat16)
        self.norm = torch.rand(HIDDEN, device=DEVICE, dtype=torch.bfloat16) + 0.5
        self.head_norm = torch.rand(HEAD_DIM, device=DEVICE, dtype=torch.bfloat16) + 0.5
        angles = torch.rand(2048, HEAD_DIM // 2, device=DEVICE) * 6
        self.cos_sin = torch.cat((angles.cos(), angles.sin()), dim=1).to(torch.bfloat16)
        self.positions = torch.arange(num_rows, device=DEVICE) + 700
        self.slots = torch.arange(num_rows, device=DEVICE) + 16
        shape = (num_rows // 16 + 2, KV_HEADS, 16, 2 * HEAD_DIM)
        self.caches = [torch.zeros(shape, dtype=torch.bfloat16, device=DEVICE) for _ in range(LAYERS)]
        self.inputs = {case.name: torch.randn(num_rows, case.k, device=DEVICE, dtype=torch.bfloat16) for case in CASES}
        # One behind the other, so that no product finds in L2 what another has read.
        self.num_weights = 0
        self.products = {case.name: [self._next(case) for _ in range(1 if case.argmax else LAYERS)] for case in CASES}

    def _next(self, case: Case) -> torch.Tensor:
        n = self.vocab_size if case.argmax else case.n
        first = self.num_weights
        self.num_weights += n * case.k
        return self.weights.at(first, n, case.k, self.dtype)

    def kernels(self, tiles: dict[str, Tile], use_pdl: bool) -> tuple[torch.Tensor, torch.Tensor]:
        """Hidden states and tokens, by these kernels."""
        x = self.x

        def linear(name: str, x: torch.Tensor, layer: int, **epilogue: Any) -> torch.Tensor:
            weight = self.products[name][layer]
            scale = self.weights.scale(weight.shape[0], self.dtype)
            tile = tiles.get(name)
            return skinny_linear(x, weight, weight_scale=scale, eps=EPS, tile=tile, use_pdl=use_pdl, **epilogue)

        for layer in range(LAYERS):
            qkv = linear("qkv", x, layer, norm_weight=self.norm)
            q = norm_rope_cache(
                qkv,
                self.head_norm,
                self.head_norm,
                EPS,
                self.cos_sin,
                self.positions,
                self.slots,
                self.caches[layer],
                use_pdl=use_pdl,
            )
            x = linear("o_proj", q.flatten(1), layer, residual=x)
            inner = linear("gate_up", x, layer, norm_weight=self.norm, silu_and_mul=True)
            x = linear("down", inner, layer, residual=x)
        head = self.products["lm_head"][0]
        scale = self.weights.scale(head.shape[0], self.dtype)
        ids = argmax_linear(
            x,
            head,
            weight_scale=scale,
            norm_weight=self.norm,
            num_query_rows=BLOCK,
            tile=tiles.get("lm_head"),
            use_pdl=use_pdl,
        )
        return x, ids

    def dequantized(self, name: str, layer: int, dtype: torch.dtype) -> torch.Tensor:
        weight = self.products[name][layer]
        scale = self.weights.scale(weight.shape[0], self.dtype)
        return weight.to(dtype) if scale is None else (weight.float() * scale[:, None]).to(dtype)

    def torch(self, dtype: torch.dtype = torch.bfloat16) -> tuple[torch.Tensor, torch.Tensor]:
        """The same in plain torch."""
        x, norm, head_norm = self.x.to(dtype), self.norm.to(dtype), self.head_norm.to(dtype)
        cos, sin = self.cos_sin[self.positions].to(dtype)[:, None].chunk(2, dim=-1)
        for layer in range(LAYERS):
            qkv = F.linear(F.rms_norm(x, (HIDDEN,), norm, EPS), self.dequantized("qkv", layer, dtype))
            heads = qkv.view(self.num_rows, -1, HEAD_DIM)
            q, k, v = heads.split([HEADS, KV_HEADS, KV_HEADS], dim=1)
            qk = F.rms_norm(torch.cat((q, k), dim=1), (HEAD_DIM,), head_norm, EPS)
            first, second = qk.chunk(2, dim=-1)
            qk = torch.cat((first * cos - second * sin, second * cos + first * sin), dim=-1)
            q, k = qk.split([HEADS, KV_HEADS], dim=1)
            entries = torch.cat((k, v), dim=-1).to(torch.bfloat16)
            self.caches[layer][self.slots // 16, :, self.slots % 16] = entries
            x = x + F.linear(q.flatten(1), self.dequantized("o_proj", layer, dtype))
            inner = F.linear(F.rms_norm(x, (HIDDEN,), norm, EPS), self.dequantized("gate_up", layer, dtype))
            gate, up = inner.chunk(2, dim=1)
            x = x + F.linear(F.silu(gate) * up, self.dequantized("down", layer, dtype))
        logits = F.linear(F.rms_norm(x, (HIDDEN,), norm, EPS), self.dequantized("lm_head", 0, dtype))
        return x, logits.unflatten(0, (-1, BLOCK))[:, 1:].flatten(0, 1).argmax(dim=1)

    def linears(self) -> None:
        """Nothing but its products, as F.linear has them in bf16."""
        for layer in range(LAYERS):
            for name in ("qkv", "o_proj", "gate_up", "down"):
                F.linear(self.inputs[name], self.products[name][layer])
        F.linear(self.inputs["lm_head"], self.products["lm_head"][0])

    def is_wrong(self, tiles: dict[str, Tile]) -> str:
        """What is wrong with the chain; empty if nothing. Many runs, since a missing wait shows only sometimes."""
        truth = self.torch(torch.float32)[0]
        truth_caches = [cache.clone() for cache in self.caches]
        baseline = relative_error(self.torch()[0], truth)
        for cache in self.caches:
            cache.zero_()
        x, ids = self.kernels(tiles, use_pdl=False)
        error = relative_error(x, truth)
        if error > 2 * baseline + 1e-3:
            return f"relative error {error:.2g}, of plain torch {baseline:.2g}"
        for cache, expected in zip(self.caches, truth_caches, strict=True):
            if relative_error(cache, expected) > 5e-2:
                return "K/V caches differ"
        head = self.dequantized("lm_head", 0, torch.float32)
        if wrong := wrong_argmax(x.float(), head, ids, None, self.norm.float(), EPS):
            return wrong
        graph = torch.cuda.CUDAGraph()
        self.kernels(tiles, use_pdl=True)
        with torch.cuda.graph(graph):
            overlapped = self.kernels(tiles, use_pdl=True)
        for run in range(50):
            overlapped[0].zero_()
            overlapped[1].zero_()
            graph.replay()
            torch.cuda.synchronize()
            if not (torch.equal(overlapped[0], x) and torch.equal(overlapped[1], ids)):
                return f"run {run} with PDL differs from the run without"
        return ""


def measure_chain(
    chain: Chain, label: str, tiles: dict[str, Tile], report: Report, copy: float, with_torch: bool = False
) -> None:
    """One line: milliseconds of the whole chain, and the time in which its weights alone can be read."""
    try:
        if wrong := chain.is_wrong(tiles):
            report.mark_wrong(f"{label}: {wrong}")
            return
        result = {
            "pdl_ms": graph_seconds(lambda _: chain.kernels(tiles, True), 1) * 1e3,
            "no_pdl_ms": graph_seconds(lambda _: chain.kernels(tiles, False), 1) * 1e3,
            "weights_ms": chain.num_weights * chain.dtype.itemsize / copy * 1e3,
        }
        if with_torch and chain.dtype != FP8:
            result["torch_ms"] = graph_seconds(lambda _: chain.torch(), 1) * 1e3
            result["linears_ms"] = graph_seconds(lambda _: chain.linears(), 1) * 1e3
    except Exception as error:
        torch.cuda.synchronize()
        print(f"{label}: skipped, {type(error).__name__}: {str(error)[:200]!r}", flush=True)
        return
    print(f"{label:<44} " + ", ".join(f"{name} {value:.3f}" for name, value in result.items()), flush=True)
    report.results[label] = {name: round(value, 4) for name, value in result.items()}


def overlap_variants(tiles: dict[str, Tile]) -> Iterator[tuple[str, dict[str, Tile]]]:
    """How far ahead to prefetch, and when to let the successor start."""
    for prefetch_k, release_steps in ((0, 4), (256, 4), (1024, 4), (512, 1), (512, 8), (512, 1000), (0, 1000)):
        changed = {
            name: dataclasses.replace(tile, prefetch_k=prefetch_k, release_steps=release_steps)
            for name, tile in tiles.items()
        }
        yield f"prefetch {prefetch_k} release {release_steps}", changed


def check_norm_rope_cache(num_rows: int, report: Report) -> None:
    qkv = torch.randn(num_rows, (HEADS + 2 * KV_HEADS) * HEAD_DIM, device=DEVICE, dtype=torch.bfloat16)
    weight = torch.rand(HEAD_DIM, device=DEVICE, dtype=torch.bfloat16) + 0.5
    angles = torch.rand(2048, HEAD_DIM // 2, device=DEVICE) * 6
    cos_sin = torch.cat((angles.cos(), angles.sin()), dim=1)
    positions = torch.arange(num_rows, device=DEVICE) + 700
    slots = torch.arange(num_rows, device=DEVICE) + 16
    slots[::5] = -1
    shape = (num_rows // 16 + 2, KV_HEADS, 16, 2 * HEAD_DIM)
    for dtype in (torch.bfloat16, FP8):
        got, truth = torch.zeros(shape, device=DEVICE).to(dtype), torch.zeros(shape, device=DEVICE).to(dtype)
        scale = torch.tensor(0.05, device=DEVICE) if dtype == FP8 else None
        common = (weight, weight, EPS, cos_sin, positions, slots)
        q = norm_rope_cache(qkv, *common, got, scale, scale)
        expected = reference_norm_rope_cache(qkv, *common, truth, scale, scale)
        errors = relative_error(q, expected), relative_error(got.float(), truth.float())
        if max(errors) > 1e-2:
            report.mark_wrong(f"norm_rope_cache {dtype}: relative errors {errors}")


def time_norm_rope_cache(num_rows: int, report: Report) -> None:
    qkv = torch.randn(num_rows, (HEADS + 2 * KV_HEADS) * HEAD_DIM, device=DEVICE, dtype=torch.bfloat16)
    weight = torch.ones(HEAD_DIM, device=DEVICE, dtype=torch.bfloat16)
    cos_sin = torch.rand(2048, HEAD_DIM, device=DEVICE, dtype=torch.bfloat16)
    positions, slots = torch.arange(num_rows, device=DEVICE), torch.arange(num_rows, device=DEVICE) + 16
    cache = torch.zeros(num_rows // 16 + 2, KV_HEADS, 16, 2 * HEAD_DIM, device=DEVICE, dtype=torch.bfloat16)
    result = {}
    for name, use_pdl in (("pdl_us", True), ("no_pdl_us", False)):

        def launch(_: int, use_pdl: bool = use_pdl) -> None:
            norm_rope_cache(qkv, weight, weight, EPS, cos_sin, positions, slots, cache, use_pdl=use_pdl)

        result[name] = graph_seconds(launch, MIN_LAUNCHES) * 1e6
    label = f"norm_rope_cache M={num_rows}"
    print(f"{label:<22} " + ", ".join(f"{name} {value:.2f}" for name, value in result.items()), flush=True)
    report.results[label] = {name: round(value, 2) for name, value in result.items()}


def measure_best_chains(chains: dict[str, Chain], report: Report, copy: float) -> None:
    """The chains again, with the tiles that were found best, and with other ways of overlapping their launches."""
    for name, chain in chains.items():
        label = f"chain M={chain.num_rows} {name}"
        found = {case.name: report.best.get((case.name, chain.num_rows, chain.dtype)) for case in CASES}
        tiles = {case: tile for case, tile in found.items() if tile is not None}
        measure_chain(chain, f"{label} best tiles", tiles, report, copy)
        for variant, changed in overlap_variants(tiles):
            if report.is_late:
                report.skipped.append(f"{label} {variant}")
                continue
            measure_chain(chain, f"{label} {variant}", changed, report, copy)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="few tiles, 16 rows only")
    parser.add_argument("--seconds", type=float, default=55.0, help="no new tile is tried after this")
    parser.add_argument("--rows", default="16,32,64,128", help="numbers of input rows, multiples of 16")
    arguments = parser.parse_args()
    torch.manual_seed(0)
    torch.backends.cuda.matmul.allow_tf32 = False
    report = Report(arguments.seconds)
    copy = copy_bytes_per_second()
    print(f"{torch.cuda.get_device_name()}, torch {torch.__version__}; copy {copy / 1e12:.2f} TB/s", flush=True)
    row_counts = [16] if arguments.quick else [int(rows) for rows in arguments.rows.split(",")]
    weights = Weights(sum(case.n * case.k * (1 if case.argmax else LAYERS) for case in CASES))

    first = row_counts[0]
    check_norm_rope_cache(first + 3, report)
    chains = {
        "bf16": Chain(first, torch.bfloat16, weights, VOCAB),
        f"fp8 vocabulary {REDUCED_VOCAB}": Chain(first, FP8, weights, REDUCED_VOCAB),
    }
    for name, chain in chains.items():
        measure_chain(chain, f"chain M={first} {name} default tiles", {}, report, copy, with_torch=True)
    for num_rows in row_counts:
        time_norm_rope_cache(num_rows, report)
        for dtype in (torch.bfloat16, FP8):
            for case in CASES:
                measure(Problem(case, num_rows, dtype, weights), report, copy, arguments.quick or num_rows != first)
        if num_rows == first:
            measure_best_chains(chains, report, copy)
    if report.skipped:
        print(f"out of time, sweeps cut short: {', '.join(dict.fromkeys(report.skipped))}")
    for what in report.wrong:
        print(f"WRONG: {what}")
    print(json.dumps({"copy_tb_s": copy / 1e12, "wrong": report.wrong, "results": report.results}))
    return 1 if report.wrong else 0


if __name__ == "__main__":
    sys.exit(main())
