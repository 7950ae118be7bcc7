# SPDX-License-Identifier: Apache-2.0
"""Every way in which an engine of ours does less than was asked for, while it runs. The values are metric labels."""

from __future__ import annotations

from enum import Enum


class Fallback(str, Enum):
    """A reason. Counted once an engine, a request or a step, as it says."""

    #: Trees were asked for; the target has recurrent state, so chains are drafted. Once an engine.
    HYBRID_TARGET = "hybrid_target"
    #: The attention backend does not go into CUDA graphs, so drafting runs eagerly. Once an engine.
    EAGER_BACKEND = "eager_backend"
    #: A drafting step for which there are CUDA graphs, but none of its size. Each step.
    NO_GRAPH = "no_graph"
    #: A drafting step of "tree": "auto" without timed costs: nothing was captured, so they are assumed. Once an engine.
    ASSUMED_COSTS = "assumed_costs"
    #: "tree": "auto" drafted nothing, as a step without drafts yields more tokens a second. Each step.
    DOES_NOT_PAY = "does_not_pay"
    #: A request whose sampling looks at the tokens before it runs as a chain among trees. Each request.
    CHAIN_SAMPLING = "chain_sampling"
    #: The same because of a logits processor that vLLM did not bring. Each request.
    CHAIN_LOGITS_PROCESSOR = "chain_logits_processor"
