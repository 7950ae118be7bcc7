# SPDX-License-Identifier: Apache-2.0
"""Batch inference on Ray Data: a JSONL of prompts in, a JSONL of completions with their acceptance out. Resumable.

    python examples/ray_batch/batch.py --input prompts.jsonl --output out

The rows are cut into shards. An engine answers a shard at a time, and the driver writes each answered shard as it
comes. A run that was killed goes on when the same command is given again: it computes the shards that are missing.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

from shards import COMPLETIONS, SHARDS, Row, claimed, cut, join, missing, read_rows

from vllm_dflash.benchmark.clients.streams import ABORTED
from vllm_dflash.benchmark.offline import acceptance_counts
from vllm_dflash.benchmark.templates import prompt_ids
from vllm_dflash.console import CommandError, require_packages, resolve_pair, value_errors
from vllm_dflash.files import write_whole

#: What the answers depend on. Everything else may be another when a job goes on.
SETTINGS = (
    "target", "drafter", "num_speculative_tokens", "max_tokens", "temperature", "seed", "sampling", "chat",
    "engine_args", "rows_per_shard",
)  # fmt: skip
#: Has an option of its own, or is what this script rests on.
OWN_ENGINE_ARGS = (
    "model", "speculative_config", "tensor_parallel_size", "disable_log_stats", "per_request_spec_decode_metrics",
)  # fmt: skip
OWN_SAMPLING = ("max_tokens", "temperature", "seed", "n", "output_kind")
#: A shard is computed again this often after its engine's process died. It may be what kills the engine.
RETRIES = 3


def main() -> None:
    args = parse_arguments()
    try:
        with value_errors():
            run(args)
    except CommandError as error:
        sys.exit(f"error: {error}")
    except KeyboardInterrupt:
        sys.exit("interrupted; the same command goes on where this one stopped")


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--input", type=Path, required=True, help="JSONL: prompt, text or messages, and an id if any")
    parser.add_argument("--output", type=Path, required=True, help="folder: a new one, or one that this job has begun")
    parser.add_argument("--target", help="directory or hub id; default: the shipped pair")
    parser.add_argument("--drafter", help="directory or hub id of the DFlash drafter")
    parser.add_argument("-k", "--num-speculative-tokens", type=positive, help="default: all that the block holds")
    parser.add_argument("--max-tokens", type=positive, default=256)
    parser.add_argument("--temperature", type=float, default=0.0)
    parser.add_argument("--seed", type=int, default=0, help="a row samples by seed + line, whichever engine gets it")
    parser.add_argument("--sampling", type=json_object, default={}, metavar="JSON", help="more SamplingParams")
    parser.add_argument("--chat", action=argparse.BooleanOptionalAction, help="default: if there is a chat template")
    parser.add_argument("--engine-args", type=json_object, default={}, metavar="JSON", help="more of LLM(...)'s")
    parser.add_argument(
        "--rows-per-shard", type=positive, default=2048, help="what a kill loses of each engine at most"
    )
    where = parser.add_argument_group("where it runs (may be another place when a job goes on)")
    where.add_argument("--address", help='of a Ray cluster; default: a running one, or else a new one here ("local")')
    where.add_argument("--engines", type=positive, default=1)
    where.add_argument("-tp", "--tensor-parallel-size", type=positive, default=1)
    where.add_argument("--gpus-per-engine", type=int, help="default: as many as -tp, or 0 if the cluster has none")
    where.add_argument("--cpus-per-engine", type=positive, default=1, help="without GPUs, also its threads")
    return parser.parse_args()


def positive(text: str) -> int:
    if (number := int(text)) < 1:
        raise argparse.ArgumentTypeError(f"{text}: 1 or more is needed")
    return number


def json_object(text: str) -> dict[str, Any]:
    try:
        value = json.loads(text)
    except ValueError as error:
        raise argparse.ArgumentTypeError(f"{text}: not JSON: {error}") from error
    if not isinstance(value, dict):
        raise argparse.ArgumentTypeError(f"{text}: a JSON object is needed")
    return value


def run(args: argparse.Namespace) -> None:
    require_packages(("ray",), "ray")
    for flag, given, own in (
        ("--engine-args", args.engine_args, OWN_ENGINE_ARGS),
        ("--sampling", args.sampling, OWN_SAMPLING),
    ):
        if taken := sorted(set(given) & set(own)):
            raise CommandError(f"{flag}: {taken[0]} is set by this script itself; see --help")
    pair = resolve_pair(args.target, args.drafter)
    args.target, args.drafter = (str(Path(m).resolve()) if Path(m).is_dir() else m for m in pair)
    rows = read_rows(args.input)
    shards = cut(rows, args.rows_per_shard)
    with claimed(args.output, rows, {name: getattr(args, name) for name in SETTINGS}):
        todo = missing(args.output, shards)
        print(f"{len(shards) - len(todo)} of {len(shards)} shards are there already", flush=True)
        if todo:
            compute(args, todo)
        summary = join(args.output, list(shards))
    length = summary["acceptance_length_pooled"]
    print(f"{summary['rows']} rows, {summary['failed']} of them failed: {args.output / COMPLETIONS}")
    print("nothing was drafted" if length is None else f"acceptance length {length:.2f}, pooled")


def compute(args: argparse.Namespace, shards: Mapping[str, list[Row]]) -> None:
    """Have the shards answered, and write each as it comes. Raises CommandError if an engine fails."""
    import ray
    from ray.exceptions import RayError

    try:
        ray.init(address=args.address)
    except ConnectionError as error:
        raise CommandError(f"--address {args.address}: {error}") from error
    if args.gpus_per_engine is None:
        args.gpus_per_engine = args.tensor_parallel_size if ray.cluster_resources().get("GPU") else 0
    engines = min(args.engines, len(shards))
    check_room(engines, {"CPU": args.cpus_per_engine, "GPU": args.gpus_per_engine})
    ray.data.DataContext.get_current().enable_progress_bars = False
    # One block a shard, so that each is a task of its own. Rows travel as JSON: a table would change types in them.
    items = [{"shard": name, "rows": json.dumps(rows)} for name, rows in shards.items()]
    answers = ray.data.from_items(items, override_num_blocks=len(items)).map_batches(
        Engine,
        fn_constructor_kwargs={"args": vars(args)},
        batch_size=1,
        batch_format="numpy",
        compute=ray.data.ActorPoolStrategy(size=engines),
        num_cpus=args.cpus_per_engine,
        num_gpus=args.gpus_per_engine,
        max_task_retries=RETRIES,
    )
    try:
        # With prefetching, an answered shard would be held back until the next one is there.
        for number, answer in enumerate(answers.iter_batches(batch_size=None, prefetch_batches=0), start=1):
            name = str(answer["shard"][0])
            write_whole(args.output / SHARDS / name, answer["result"][0])
            print(f"{name} is written, {number} of {len(shards)}", flush=True)
    except RayError as error:
        raise CommandError(
            f"{error}\nAn engine failed: see above. The same command goes on from what is there"
        ) from error


def check_room(engines: int, needs: Mapping[str, int]) -> None:
    """Raises CommandError if the cluster is too small: Ray would wait for ever. An engine needs one node."""
    import ray

    nodes = [node["Resources"] for node in ray.nodes() if node["Alive"]]
    room = sum(min(int(node.get(kind, 0) // need) for kind, need in needs.items() if need) for node in nodes)
    if room < engines:
        each = ", ".join(f"{need} {kind}" for kind, need in needs.items() if need)
        raise CommandError(f"--engines {engines}, each with {each}: the cluster has room for {room}")


class Engine:
    """One vLLM engine in one Ray actor."""

    def __init__(self, args: dict[str, Any]) -> None:
        # The engine's core in this process: whatever kills the one ends the other.
        os.environ.setdefault("VLLM_ENABLE_V1_MULTIPROCESSING", "0")
        os.environ.setdefault("VLLM_CPU_KVCACHE_SPACE", "1")  # GiB; vLLM would take half of the memory
        from vllm import LLM

        self.args = args
        self.sampling(line=0)  # what is wrong with it shows before the engine starts
        speculation = {"method": "dflash", "model": args["drafter"]}
        if args["num_speculative_tokens"]:
            speculation["num_speculative_tokens"] = args["num_speculative_tokens"]
        parallel = {"tensor_parallel_size": args["tensor_parallel_size"]}
        if args["tensor_parallel_size"] > 1:
            parallel["distributed_executor_backend"] = "mp"  # on the GPUs that Ray gave this actor
        self.llm = LLM(
            model=args["target"],
            speculative_config=speculation,
            disable_log_stats=False,  # or there are no counters to read
            per_request_spec_decode_metrics="summary",
            **parallel | args["engine_args"],
        )
        self.tokenizer = self.llm.get_tokenizer()
        self.chat = bool(getattr(self.tokenizer, "chat_template", None)) if args["chat"] is None else args["chat"]

    def sampling(self, line: int) -> Any:
        from vllm import SamplingParams

        seed = self.args["seed"] + line if self.args["temperature"] > 0 else None
        common = {"max_tokens": self.args["max_tokens"], "temperature": self.args["temperature"]}
        return SamplingParams(seed=seed, **common | self.args["sampling"])

    def __call__(self, batch: dict[str, Any]) -> dict[str, Any]:
        """One shard. Its acceptance is what vLLM's counters grew by."""
        before = acceptance_counts(self.llm)
        rows = self.answered(json.loads(batch["rows"][0]))
        grown = acceptance_counts(self.llm) - before
        return {"shard": batch["shard"], "result": [json.dumps({"rows": rows, "acceptance": asdict(grown)})]}

    def answered(self, rows: list[Row]) -> list[Row]:
        """Every row's answer, or why there is none, in their order."""
        from vllm.exceptions import VLLMClientError

        # A prompt beyond the model's length, say, or one that the chat template or the tokenizer does not take.
        refusals = (VLLMClientError, ValueError, TypeError)
        answers, asked = {}, []
        for row in rows:
            try:
                ids = prompt_ids(self.tokenizer, row["messages"], self.chat, thinking=None)
                self.llm.enqueue({"prompt_token_ids": ids}, self.sampling(row["line"]), use_tqdm=False)
                asked.append(row["line"])
            except refusals as error:
                answers[row["line"]] = {"error": f"{type(error).__name__}: {error}"}
        outputs = self.llm.wait_for_completion(use_tqdm=False)
        answers |= {line: answer(output) for line, output in zip(asked, outputs, strict=True)}
        return [{"line": row["line"], "id": row["id"]} | answers[row["line"]] for row in rows]


def answer(output: Any) -> Row:
    """Of a RequestOutput."""
    completion = output.outputs[0]
    if completion.finish_reason in ABORTED:
        return {"error": f"the engine ended it: finish_reason {completion.finish_reason}"}
    told = completion.spec_decode_metrics.to_dict() if completion.spec_decode_metrics else None
    return {
        "text": completion.text,
        "finish_reason": completion.finish_reason,
        "prompt_tokens": len(output.prompt_token_ids),
        "output_tokens": len(completion.token_ids),
        "drafts": told["num_spec_steps"] if told else 0,
        "drafted_tokens": told["num_draft_tokens"] if told else 0,
        "accepted_tokens": told["num_accepted_draft_tokens"] if told else 0,
        "acceptance_length": told["mean_acceptance_length"] if told and told["num_spec_steps"] else None,
    }


if __name__ == "__main__":
    main()
