# SPDX-License-Identifier: Apache-2.0
"""The model card of a trained drafter: what it is for, what it was made of, what it is worth, how to serve it."""

from __future__ import annotations

from pathlib import Path

import yaml

from vllm_dflash.training.evaluate import Acceptance
from vllm_dflash.training.recipe import Recipe
from vllm_dflash.training.reduced_vocabulary import Coverage


def write_card(
    folder: Path,
    target: str,
    recipe: Recipe,
    num_responses: int,
    found: Acceptance,
    vocabulary: Coverage | None = None,
) -> None:
    """README.md in `folder`."""
    (folder / "README.md").write_text(
        card(folder.resolve().name, target, recipe, num_responses, found, vocabulary), encoding="utf-8"
    )


def card(
    name: str,
    target: str,
    recipe: Recipe,
    num_responses: int,
    found: Acceptance,
    vocabulary: Coverage | None = None,  # None: the target's own
) -> str:
    """In markdown."""
    settings = yaml.safe_dump(recipe.model_dump(mode="json"), sort_keys=False).rstrip()
    shares = " | ".join(f"{share:.2f}" for share in found.per_position)
    numbers = " | ".join(str(k) for k in range(1, len(found.per_position) + 1))
    return f"""---
library_name: vllm
tags: [dflash, speculative-decoding]
base_model: {target}
---

# {name}

A DFlash drafter (arXiv 2602.06036) for `{target}`, and for no other target: it reads that model's hidden states.

    vllm serve {target} --speculative-config '{{"method": "dflash", "model": "{name}"}}'

## Acceptance

Acceptance length **{found.length:.2f}** (the target's own token included; {found.drafts} drafts, temperature 0,
{recipe.data.held_out} held-out prompts, {recipe.training.evaluate_tokens} tokens each). Share of drafts of which the
first k tokens were accepted:

| k | {numbers} |
|---|{"--:|" * len(found.per_position)}
| share | {shares} |
{_vocabulary_section(vocabulary)}
## Training

{num_responses} prompts, answered by the target itself. Made by `vllm-dflash train` with this recipe:

```yaml
{settings}
```
"""


def _vocabulary_section(found: Coverage | None) -> str:
    if found is None:
        return ""
    return f"""
## Draft vocabulary

It can draft {found}, counted in the training responses. Other tokens come from the target alone:
the text is what it would be without drafts.
"""
