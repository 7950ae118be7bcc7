# SPDX-License-Identifier: Apache-2.0
"""Trains drafters: anchors, masks, loss, data, loop; and, in `pair`, a small target to go with one.

In the order data flows: corpus, tokenizer, target -> prompts, responses -> data, anchors, masks, loss, train ->
evaluate. Imports neither the vLLM adapters nor the proposer.
"""
