# SPDX-License-Identifier: Apache-2.0
"""What flows through one drafting step, as small frozen records.

Letters: R requests, T target rows of this step, K draft tokens, Q = 1 + K query rows a request, G KV-cache groups that
hold draft layers, F tapped target layers, H hidden size.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

#: A slot that no kernel writes to.
PADDING_SLOT = -1


@dataclass(frozen=True)
class AnchorSource:
    """Where a runner keeps its requests' tokens by row of its state, for anchors that nobody has gathered yet."""

    state_index: torch.Tensor  # [R] row of each request in the state of S rows
    num_sampled: torch.Tensor  # [R] 0: the request is in mid-prefill
    last_sampled: torch.Tensor  # [S, 1]
    next_prompt_token: torch.Tensor  # [S]

    def gather(self) -> torch.Tensor:
        """The anchors [R]: the token just sampled, or in mid-prefill the next prompt token."""
        sampled = self.last_sampled.flatten()[self.state_index]
        return torch.where(self.num_sampled > 0, sampled, self.next_prompt_token[self.state_index])


@dataclass(frozen=True)
class StepInputs:
    """What a runner knows after the target ran and its tokens were sampled.

    The T rows are the target's rows of this step, request after request. Of a request that verified drafts, the last
    `num_rejected` rows hold rejected tokens: they are padding.
    """

    features: torch.Tensor  # [T, F*H] hidden states of the tapped layers
    positions: torch.Tensor  # [T]
    query_start_loc: torch.Tensor  # [R+1] first row of each request
    seq_lens: torch.Tensor  # [R] context rows in the cache after this step, rejected rows included
    num_rejected: torch.Tensor | None  # [R]; None: no row was rejected
    # [R] the token after the context; of a request in mid-prefill any token, since its drafts are dropped
    anchors: torch.Tensor | AnchorSource
    block_tables: tuple[torch.Tensor, ...]  # G tensors [R, blocks per request]
    max_seq_len: int  # upper bound of seq_lens, known on the host
    seq_lens_upper_bound: torch.Tensor | None = None  # [R] on the host; the same bound for each request


@dataclass(frozen=True)
class ContextRows:
    """Where the T target rows go in the draft layers' caches. Rejected rows have padding slots."""

    positions: torch.Tensor  # [T]
    slot_mappings: torch.Tensor  # [G, T]


@dataclass(frozen=True)
class BlockInputs:
    """The query rows of all requests: [anchor, mask x K] each, at positions n .. n+K past n context rows."""

    input_ids: torch.Tensor  # [R*Q]
    positions: torch.Tensor  # [R*Q]
    slot_mappings: tuple[torch.Tensor, ...]  # G tensors [R*Q]
    query_start_loc: torch.Tensor  # [R+1]
    seq_lens: torch.Tensor  # [R] context + own block
    num_query_rows: int  # Q
    block_tables: tuple[torch.Tensor, ...]  # G tensors [R, blocks per request]
    max_seq_len: int  # upper bound of seq_lens, known on the host
    seq_lens_upper_bound: torch.Tensor | None = None  # [R] on the host; the same bound for each request

    @classmethod
    def made_up(cls, num_reqs: int, num_query_rows: int, device: torch.device) -> BlockInputs:
        """Rows of the right number and no meaning, without a cache: for memory profiling and warm-up."""
        zeros = torch.zeros(num_reqs * num_query_rows, dtype=torch.int64, device=device)
        return cls(
            input_ids=zeros.int(),
            positions=zeros,
            slot_mappings=(),
            query_start_loc=torch.arange(num_reqs + 1, device=device) * num_query_rows,
            seq_lens=zeros[:num_reqs],
            num_query_rows=num_query_rows,
            block_tables=(),
            max_seq_len=num_query_rows,
        )


@dataclass(frozen=True)
class Drafts:
    """The drafted tokens."""

    token_ids: torch.Tensor  # [R, K]; of trees [R, N]
