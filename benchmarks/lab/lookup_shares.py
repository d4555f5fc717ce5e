"""How often a token of a lookup draft is right: the shares that `drafter/lookup.py` starts from (PRIOR).

python -m benchmarks.lab.lookup_shares prompts.jsonl.gz --number 160    (some minutes, with the default target)

Answers to prompts that are evenly spread over a file of conversations, every other one greedy, the rest at a
temperature of 0.8. At each of their tokens the draft is compared with what came, up to its first mistake.
"""

from __future__ import annotations

import argparse
import gzip
import json
import sys
from pathlib import Path

from amphista.drafter.lookup import PRIOR
from amphista.drafter.ngrams import NgramIndex
from amphista.engine.params import SamplingParams
from amphista.llm import load

DEPTH, NEW_TOKENS, LONGEST_PROMPT = 8, 224, 1200
Counts = dict[bool | None, dict[int, list[int]]]


def count(counts: Counts, text: list[int], num_prompt: int) -> None:
    """Add (right, all) of one answer, by what the draft's token repeats and by how many tokens agree."""
    index = NgramIndex()
    for known in range(num_prompt, len(text)):
        index.extend(text[len(index) : known])
        if (found := index.match()) is None:
            continue
        place, length = found
        for ahead, (source, came) in enumerate(zip(index.continuation(place, DEPTH), text[known:], strict=False)):
            shares = counts[index.repeats[source]]
            share = shares[max(start for start in shares if start <= length + ahead)]
            share[0] += index.tokens[source] == came
            share[1] += 1
            if index.tokens[source] != came:
                break


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("prompts", type=Path, help="a JSON object with `messages` a line")
    parser.add_argument("--number", type=int, default=160)
    options = parser.parse_args()
    opened = gzip.open if options.prompts.suffix == ".gz" else open
    with opened(options.prompts, "rt", encoding="utf-8") as lines:
        prompts = [json.loads(line)["messages"][0]["content"] for line in lines]
    llm = load(drafter="none", dtype="int8")
    counts: Counts = {repeats: {start: [0, 0] for start in shares} for repeats, shares in PRIOR.items()}
    for number, prompt in enumerate(prompts[:: max(1, len(prompts) // options.number)][: options.number]):
        ids = llm.prompt_ids(prompt)[:LONGEST_PROMPT]
        params = SamplingParams(max_new_tokens=NEW_TOKENS, temperature=0.8 * (number % 2), seed=number)
        count(counts, [*ids, *llm.engine.decode(ids, params).output_ids], len(ids))
    for repeats, shares in counts.items():
        cells = (f"{start}: {right / max(1, total):.2f} of {total}" for start, (right, total) in shares.items())
        sys.stdout.write(f"{repeats!s:5} " + ", ".join(cells) + "\n")


if __name__ == "__main__":
    main()
