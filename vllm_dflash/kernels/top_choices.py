# SPDX-License-Identifier: Apache-2.0
# mypy: allow-untyped-defs, allow-incomplete-defs
"""The likeliest tokens of every row and their log-probabilities, from logits that are read once.

One launch reduces chunks of a row to their maxima and partial sums of exponentials. The C largest logits lie in at most
C chunks, those with the largest maxima, so that a second one, a program for each row, looks at only these again. It
finds the C largest of many numbers by bisection: a threshold that C of them reach.

Letters: M rows, V vocabulary, C choices.
"""

from __future__ import annotations

import torch
from vllm.triton_utils import tl, triton

CHUNK = 64
_CHUNKS = 32  # of a program of the first launch


def top_choices(
    logits: torch.Tensor,  # [M, V]; -inf: cannot be chosen
    scales: torch.Tensor,  # [M] fp32, positive: what the logits are multiplied with
    num_choices: int,  # C <= V
) -> tuple[torch.Tensor, torch.Tensor]:
    """Log-probabilities [M, C] fp32, descending, and token ids [M, C] int64. Of equal ones the lowest ids."""
    num_rows, vocab_size = logits.shape
    assert logits.stride(1) == 1 and scales.shape == (num_rows,), f"{logits.stride()}, {tuple(scales.shape)}"
    assert num_choices <= vocab_size, f"{num_choices} choices of {vocab_size} tokens"
    chunks, programs = triton.cdiv(vocab_size, CHUNK), triton.cdiv(vocab_size, CHUNK * _CHUNKS)
    device = logits.device
    maxima = torch.empty(num_rows, chunks, dtype=torch.float32, device=device)
    partial = torch.empty(2, num_rows, programs, dtype=torch.float32, device=device)
    log_probs = torch.empty(num_rows, num_choices, dtype=torch.float32, device=device)
    token_ids = torch.empty(num_rows, num_choices, dtype=torch.int64, device=device)
    block_choices = triton.next_power_of_2(num_choices)
    scratch = torch.empty(num_rows, block_choices, dtype=torch.int64, device=device)
    if not num_rows:
        return log_probs, token_ids
    _chunk_kernel[(num_rows, programs)](
        logits,
        scales,
        maxima,
        partial[0],
        partial[1],
        logits.stride(0),
        V=vocab_size,
        CHUNK=CHUNK,
        CHUNKS=_CHUNKS,
        NUM_CHUNKS=chunks,
    )
    _choose_kernel[(num_rows,)](
        log_probs,
        token_ids,
        scratch,
        logits,
        scales,
        maxima,
        partial[0],
        partial[1],
        logits.stride(0),
        V=vocab_size,
        C=num_choices,
        CHUNK=CHUNK,
        NUM_CHUNKS=chunks,
        PROGRAMS=programs,
        BLOCK_CHUNKS=triton.next_power_of_2(chunks),
        BLOCK_PROGRAMS=triton.next_power_of_2(programs),
        BLOCK_C=block_choices,
        num_warps=8,
    )
    return log_probs, token_ids


def reference_top_choices(
    logits: torch.Tensor,  # [M, V]
    scales: torch.Tensor,  # [M]
    num_choices: int,  # C
) -> tuple[torch.Tensor, torch.Tensor]:
    """The same as `top_choices` in plain torch. Of equal ones any may be chosen."""
    values, token_ids = logits.float().topk(num_choices, dim=1)
    lse = (logits.float() * scales[:, None]).logsumexp(dim=1, keepdim=True)
    return values * scales[:, None] - lse, token_ids


@triton.jit
def _chunk_kernel(
    logits_ptr,  # [M, V]
    scales_ptr,  # [M]
    maxima_ptr,  # [M, NUM_CHUNKS] of the logits as they are
    tops_ptr,  # [M, programs] largest scaled logit
    sums_ptr,  # [M, programs] of exp(scaled logit - that)
    logits_stride,
    V: tl.constexpr,
    CHUNK: tl.constexpr,
    CHUNKS: tl.constexpr,
    NUM_CHUNKS: tl.constexpr,
):
    row, program = tl.program_id(0).to(tl.int64), tl.program_id(1)
    chunks = program * CHUNKS + tl.arange(0, CHUNKS)
    columns = chunks[:, None] * CHUNK + tl.arange(0, CHUNK)[None, :]
    logits = tl.load(logits_ptr + row * logits_stride + columns, mask=columns < V, other=float("-inf")).to(tl.float32)
    maxima = tl.max(logits, axis=1)
    tl.store(maxima_ptr + row * NUM_CHUNKS + chunks, maxima, mask=chunks < NUM_CHUNKS)
    scale = tl.load(scales_ptr + row)
    top = tl.max(maxima, axis=0) * scale
    finite = tl.where(top == float("-inf"), 0.0, top)
    exps = tl.exp(logits * scale - finite)
    tl.store(tops_ptr + row * tl.num_programs(1) + program, top)
    tl.store(sums_ptr + row * tl.num_programs(1) + program, tl.sum(tl.sum(exps, axis=1), axis=0))


@triton.jit
def _ordered(values):
    """Integers in the order of these fp32 numbers. The least one stands for none."""
    bits = values.to(tl.int32, bitcast=True)
    return tl.where(bits < 0, bits ^ 0x7FFFFFFF, bits)


@triton.jit
def _places_of_largest(
    numbers,  # [X] int32
    wanted,  # how many; at most X
):
    """Where each of the `wanted` largest goes, in the order that they stand in, [X]; -1: it is none of them.

    Of equal ones the first count.
    """
    low = tl.min(numbers, axis=0).to(tl.int64)  # so many, or more, reach it
    high = tl.max(numbers, axis=0).to(tl.int64) + 1  # fewer reach it
    reach = tl.sum((numbers >= low).to(tl.int32), axis=0)
    while (high - low > 1) & (reach != wanted):
        middle = (low + high) // 2
        count = tl.sum((numbers >= middle).to(tl.int32), axis=0)
        if count >= wanted:
            low = middle
            reach = count
        else:
            high = middle
    above, at = numbers > low, numbers == low
    left = wanted - tl.sum(above.to(tl.int32), axis=0)
    chosen = above | (at & (tl.cumsum(at.to(tl.int32), axis=0) <= left))
    return tl.where(chosen, tl.cumsum(chosen.to(tl.int32), axis=0) - 1, -1)


@triton.jit
def _choose_kernel(
    log_probs_ptr,  # [M, C]
    token_ids_ptr,  # [M, C]
    scratch_ptr,  # [M, BLOCK_C]
    logits_ptr,  # [M, V]
    scales_ptr,  # [M]
    maxima_ptr,  # [M, NUM_CHUNKS]
    tops_ptr,  # [M, PROGRAMS]
    sums_ptr,  # [M, PROGRAMS]
    logits_stride,
    V: tl.constexpr,
    C: tl.constexpr,
    CHUNK: tl.constexpr,
    NUM_CHUNKS: tl.constexpr,
    PROGRAMS: tl.constexpr,
    BLOCK_CHUNKS: tl.constexpr,
    BLOCK_PROGRAMS: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    scratch_ptr += row * BLOCK_C
    choices = tl.arange(0, BLOCK_C)

    # Which chunks: all, if there are not more.
    tl.store(scratch_ptr + choices, tl.where(choices < NUM_CHUNKS, choices, NUM_CHUNKS).to(tl.int64))
    tl.debug_barrier()
    if NUM_CHUNKS > C:
        chunks = tl.arange(0, BLOCK_CHUNKS)
        none = float("-inf")
        maxima = tl.load(maxima_ptr + row * NUM_CHUNKS + chunks, mask=chunks < NUM_CHUNKS, other=none)
        numbers = tl.where(chunks < NUM_CHUNKS, _ordered(maxima), -2147483648)
        places = _places_of_largest(numbers, C)
        tl.store(scratch_ptr + places, chunks.to(tl.int64), mask=places >= 0)
        tl.debug_barrier()
    own_chunks = tl.load(scratch_ptr + choices)
    is_chunk = (choices < C) & (own_chunks < NUM_CHUNKS)
    ids = (own_chunks[:, None] * CHUNK + tl.arange(0, CHUNK)[None, :]).to(tl.int32)
    is_token = is_chunk[:, None] & (ids < V)
    logits = tl.load(logits_ptr + row * logits_stride + ids, mask=is_token, other=float("-inf")).to(tl.float32)
    numbers = tl.where(is_token, _ordered(logits), -2147483648)

    # Of their tokens the largest, sorted by the number's bits and then by what the id lacks: low ids come first.
    numbers, ids = tl.reshape(numbers, [BLOCK_C * CHUNK]), tl.reshape(ids, [BLOCK_C * CHUNK])
    places = _places_of_largest(numbers, C)
    packed = (numbers.to(tl.int64) << 32) | (0x7FFFFFFF - ids).to(tl.int64)
    tl.debug_barrier()  # the chunks have been read by all
    tl.store(scratch_ptr + places, packed, mask=places >= 0)
    tl.debug_barrier()
    least = -9223372036854775807
    packed = tl.load(scratch_ptr + choices, mask=choices < C, other=least)
    packed = tl.sort(packed, descending=True)
    numbers = (packed >> 32).to(tl.int32)
    ids = 0x7FFFFFFF - (packed & 0xFFFFFFFF)
    values = tl.where(numbers < 0, numbers ^ 0x7FFFFFFF, numbers).to(tl.float32, bitcast=True)

    programs = tl.arange(0, BLOCK_PROGRAMS)
    is_program = programs < PROGRAMS
    tops = tl.load(tops_ptr + row * PROGRAMS + programs, mask=is_program, other=float("-inf"))
    sums = tl.load(sums_ptr + row * PROGRAMS + programs, mask=is_program, other=0.0)
    top = tl.max(tops, axis=0)
    finite = tl.where(top == float("-inf"), 0.0, top)
    lse = finite + tl.log(tl.sum(sums * tl.exp(tops - finite), axis=0))
    scale = tl.load(scales_ptr + row)
    tl.store(log_probs_ptr + row * C + choices, values * scale - lse, mask=choices < C)
    tl.store(token_ids_ptr + row * C + choices, ids, mask=choices < C)
