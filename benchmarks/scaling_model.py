# SPDX-License-Identifier: Apache-2.0
"""Tokens a second on several GPUs, MODELLED: replicas or tensor parallelism, with and without drafts, by users.

    python benchmarks/scaling_model.py                      # the shape of Qwen3-8B on H200s
    python benchmarks/scaling_model.py --pair DIR --gpus 4  # another pair (target/ and drafter/, config.json)

The first table holds the arithmetic (`scaling/model.py`) against the measured steps in --measured: only there figures
are measured. The others say what --gpus GPUs give to so many users who all wait for an answer, as replicas of one GPU
and as fewer engines of several (TP: ranks of tensor parallelism); each has its share of the users, and drafts that
number of --draft-tokens which gives most. The last one is what drafting costs.
"""

from __future__ import annotations

import argparse
import csv
import statistics
from collections.abc import Iterator
from pathlib import Path

from arguments import numbers
from gpu.decode import shape
from gpu.pair import read_pair
from scaling.model import H200, Shape, acceptance_rate, draft_ms, step_ms, tokens_of_step

MEASURED = Path(__file__).parent / "results" / "decode_steps_h200.csv"


def main() -> None:
    args = parse_arguments()
    pair = read_pair(args.pair) if args.pair else (shape.TARGET, shape.DRAFTER)
    plan = Plan(args, *(Shape.of(config) for config in pair))
    tables = [plan.by_replicas(), plan.by_ranks(), plan.drafting()]
    if args.pair is None:
        tables.insert(0, check_table(args.measured, plan.target, plan.drafter))
    print("\n\n".join("\n".join(table) for table in tables))


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--pair", type=Path, help="folder with target/config.json and drafter/config.json")
    parser.add_argument("--measured", type=Path, default=MEASURED, help="CSV of steps of the default shape")
    parser.add_argument("--gpus", type=int, default=8, choices=(1, 2, 4, 8))
    parser.add_argument("--users", type=numbers, default=[1, 8, 32, 128, 512])
    parser.add_argument("--context", type=int, default=1024, help="tokens of a request, on average")
    parser.add_argument("--acceptance", type=float, default=6.0, help="acceptance length of the most --draft-tokens")
    parser.add_argument("--draft-tokens", type=numbers, default=[0, 3, 7, 15])
    return parser.parse_args()


def check_table(measured: Path, target: Shape, drafter: Shape) -> Iterator[str]:
    """Every measured step beside the arithmetic's, which knows nothing of blocks that requests share."""
    yield "| GPUs | context | requests | draft tokens | measured, ms | modelled, ms | modelled to measured |"
    yield "|--:|--:|--:|--:|--:|--:|--:|"
    ratios = []
    with measured.open(newline="") as file:
        for row in csv.DictReader(file):
            ranks, context, requests, drafts = (
                int(row[key]) for key in ("ranks", "context", "requests", "draft_tokens")
            )
            mean = context + int(row["output_tokens"]) / 2
            modelled, ms = step_ms(H200, target, drafter, requests, mean, drafts, ranks), float(row["ms_step"])
            is_shared = row["prompts_shared"] == "yes" and requests > 1
            ratios += [] if is_shared else [modelled / ms]
            named = f"{context}, shared" if is_shared else str(context)
            yield f"| {ranks} | {named} | {requests} | {drafts} | {ms:.2f} | {modelled:.2f} | {modelled / ms:.2f} |"
    yield ""
    yield (
        f"Modelled to measured, where each request reads a context of its own: median {statistics.median(ratios):.2f}, "
        f"{min(ratios):.2f} to {max(ratios):.2f} ({len(ratios)} steps)."
    )


class Plan:
    """What so many users get, in Markdown."""

    def __init__(self, args: argparse.Namespace, target: Shape, drafter: Shape) -> None:
        self.args, self.target, self.drafter = args, target, drafter
        self.rate = acceptance_rate(args.acceptance, max(args.draft_tokens))
        self.sizes = [size for size in (1, 2, 4, 8) if size <= args.gpus]

    def by_replicas(self) -> Iterator[str]:
        """More and more replicas of one GPU each."""
        yield "Tokens/s a GPU (draft tokens), modelled, by replicas of one GPU each:\n"
        names = ["1 replica", *(f"{size} replicas" for size in self.sizes[1:])]
        yield from self._table(dict(zip(names, [(size, 1) for size in self.sizes], strict=True)), per_user=False)

    def by_ranks(self) -> Iterator[str]:
        """All GPUs, as engines of one or more of them."""
        yield f"Tokens/s a user (draft tokens), modelled, {self.args.gpus} GPUs:\n"
        ways = [(self.args.gpus // size, size) for size in self.sizes]
        yield from self._table({f"{count} x TP {ranks}": (count, ranks) for count, ranks in ways}, per_user=True)

    def drafting(self) -> Iterator[str]:
        """The draft layers dealt out as the target's are, or whole on every rank."""
        most, ranks = max(self.args.draft_tokens), self.sizes[1:]
        yield f"Drafting {most} tokens, ms a step, modelled: draft layers dealt out to the ranks / whole on each:\n"
        yield "| requests | " + " | ".join(f"TP {size}" for size in self.sizes) + " |"
        yield "|--:|" + "--:|" * len(self.sizes)
        for requests in self.args.users:
            given = (H200, self.drafter, requests, self.args.context, most)
            cells = [f"{draft_ms(*given):.2f}"]
            cells += [f"{draft_ms(*given, size):.2f} / {draft_ms(*given, size, is_whole=True):.2f}" for size in ranks]
            yield f"| {requests} | " + " | ".join(cells) + " |"

    def _table(self, ways: dict[str, tuple[int, int]], per_user: bool) -> Iterator[str]:
        """`ways`: replicas, and ranks of each, by name."""
        yield "| users | " + " | ".join(ways) + " |"
        yield "|--:|" + "--:|" * len(ways)
        for users in self.args.users:
            cells = []
            for replicas, ranks in ways.values():
                most, drafts = max((self.tokens_s(users, replicas, ranks, k), k) for k in self.args.draft_tokens)
                cells.append(f"{most / (users if per_user else replicas * ranks):,.0f} ({drafts})")
            yield f"| {users} | " + " | ".join(cells) + " |"

    def tokens_s(self, users: int, replicas: int, ranks: int, draft_tokens: int) -> float:
        """Of all users, dealt out evenly; a replica without any does nothing."""
        total = 0.0
        for replica in range(min(users, replicas)):
            share = users // replicas + (replica < users % replicas)
            ms = step_ms(H200, self.target, self.drafter, share, self.args.context, draft_tokens, ranks)
            total += 1e3 * share * tokens_of_step(self.rate, draft_tokens) / ms
        return total


if __name__ == "__main__":
    main()
