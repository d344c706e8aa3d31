"""Greedy answers of one device, and how they compare with another's.

``python bench/greedy.py --device cpu --json cpu.json`` records them;
``python bench/greedy.py --device cuda --against cpu.json`` tells where they part, and how close the
two best tokens were there (natural-log gap on the device that runs now).
"""

import argparse
import json
import sys
from pathlib import Path
from typing import Any

from squall import LLM, SamplingParams
from squall.bench.machine import describe
from squall.kernels.backends.device import resolve_device

PROMPTS = (
    "Why is the sky blue?",
    "Write a haiku about the sea.",
    "What is the capital of France?",
    "List three prime numbers.",
    "Explain what a compiler does in one sentence.",
    "Translate 'good morning' into Spanish.",
    "Who wrote Romeo and Juliet?",
    "How many legs does a spider have?",
    "Give me a recipe for pancakes.",
    "What is the difference between a list and a tuple in Python?",
)


def answers(llm: LLM, tokens: int) -> list[dict[str, Any]]:
    """Each prompt's greedy ids, text, and the gap between the two best tokens at each place."""
    params = SamplingParams(temperature=0.0, max_tokens=tokens, logprobs=2)
    rows = []
    for prompt in PROMPTS:
        output = llm.generate([{"role": "user", "content": prompt}], params)[0]
        (completion,) = output.completions
        gaps = [round(p.top[0].logprob - p.top[1].logprob, 4) for p in completion.logprobs]
        ids = list(completion.token_ids)
        rows.append({"prompt": prompt, "ids": ids, "gaps": gaps, "text": completion.text})
    return rows


def compare(rows: list[dict[str, Any]], others: list[dict[str, Any]]) -> int:
    """Print where the answers part; returns how many are equal."""
    equal = 0
    for row, other in zip(rows, others, strict=True):
        pairs = zip(row["ids"], other["ids"], strict=False)
        part = next((i for i, (a, b) in enumerate(pairs) if a != b), None)
        if part is None and len(row["ids"]) == len(other["ids"]):
            equal += 1
            continue
        place = min(len(row["ids"]), len(other["ids"])) if part is None else part
        gap = row["gaps"][place] if place < len(row["gaps"]) else float("nan")
        print(f"{row['prompt']!r} parts at token {place}: the two best are {gap} apart there")
    print(f"{equal} of {len(rows)} answers are equal")
    return equal


def main() -> int:
    parser = argparse.ArgumentParser(prog="bench/greedy.py", description=__doc__.split("\n")[0])
    parser.add_argument("-m", "--model", help="model file, folder or hub id (default: demo model)")
    parser.add_argument("--device", default="auto")
    parser.add_argument("--dtype", default="auto")
    parser.add_argument("--tokens", type=int, default=24)
    parser.add_argument("--json", type=Path, help="write the answers to this file")
    parser.add_argument("--against", type=Path, help="a file --json wrote, to compare with")
    args = parser.parse_args()
    with LLM(args.model, device=args.device, dtype=args.dtype, max_seq_len=1024) as llm:
        rows = answers(llm, args.tokens)
        card = llm.card
    if args.json:
        head = {**describe(resolve_device(args.device)), "model": card.name, "dtype": card.dtype}
        args.json.write_text(json.dumps({**head, "answers": rows}, indent=1) + "\n")
    if args.against:
        compare(rows, json.loads(args.against.read_text())["answers"])
    return 0


if __name__ == "__main__":
    sys.exit(main())
