"""Times decoding while other programs keep so many cores busy.

    python benchmarks/lab/busy.py --busy 0,1,2 --drafters none,amphista+lookup

Other programs are loops of Python in sessions of their own, each with as good a claim to a core as ours. Prints
tokens a second, the medians of several answers.
"""

from __future__ import annotations

import argparse
import itertools
import statistics
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager

import amphista

PROMPT = "Write a story about a dragon and a knight."


@contextmanager
def others(number: int) -> Iterator[None]:
    """So many of them."""
    loops = [
        subprocess.Popen([sys.executable, "-c", "while True: pass"], start_new_session=True) for _ in range(number)
    ]
    try:
        time.sleep(1)
        yield
    finally:
        for loop in loops:
            loop.kill()
            loop.wait()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--dtype", help="of the default target: by default the file's blocks")
    parser.add_argument("--drafters", default="none,amphista+lookup")
    parser.add_argument("--busy", default="0,1,2")
    parser.add_argument("--tokens", type=int, default=100)
    parser.add_argument("--repeats", type=int, default=7)
    given = parser.parse_args()
    cells = list(itertools.product(given.drafters.split(","), given.busy.split(",")))
    if len(cells) > 1:  # each in a process of its own, for what one has learned of the machine is not the next one's
        for drafter, number in cells:
            subprocess.run([*sys.orig_argv, "--drafters", drafter, "--busy", number], check=True)
        return
    ((drafter, number),) = cells
    llm = amphista.load(drafter=drafter, **({"dtype": given.dtype} if given.dtype else {}))
    llm.generate(PROMPT, max_new_tokens=16)
    paces = []
    with others(int(number)):
        for _ in range(given.repeats):
            start = time.perf_counter()
            answer = llm.generate(PROMPT, max_new_tokens=given.tokens)
            paces.append(len(answer.token_ids) / (time.perf_counter() - start))
    median = statistics.median(paces)
    print(f"{drafter}, {number} busy: {median:.1f} tokens/s (from {min(paces):.1f} to {max(paces):.1f})")


if __name__ == "__main__":
    main()
