"""How near a type's target is to the float32 one, over the tokens of prompts: the best token, KL, hidden states.

    python -m benchmarks.lab.nearness gguf int8 int8=CONVERTED bfloat16 --data DIR --questions 24

Each form is a type of the default target, or TYPE=TARGET (a converted folder has weights, not blocks). Questions are
Spec-Bench's first turns, spread over all tasks, at most `--tokens` of each.
"""

from __future__ import annotations

import argparse
import math
from pathlib import Path

import torch

from amphista.evaluation.questions import load_questions
from amphista.llm import LLM
from amphista.target import DEFAULT_TARGET
from amphista.target.loading import load_target
from amphista.target.target import Target
from amphista.tree.token_tree import TokenTree


def read(target: Target, prompt: list[int]) -> tuple[torch.Tensor, torch.Tensor]:
    """Hidden states [N, D] and logarithms of probabilities [N, V] behind every token of a prompt."""
    output = target.verify(TokenTree.chain(prompt), target.new_cache())
    return output.hidden.double(), output.logits.float().log_softmax(-1)


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("forms", nargs="+")
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--questions", type=int, default=24)
    parser.add_argument("--tokens", type=int, default=300)
    options = parser.parse_args()
    exact = load_target(dtype="float32", progress=lambda line: None)
    questions = load_questions("spec_bench", options.data, options.questions).questions
    prompts = [LLM(exact).prompt_ids(question.turns[0])[: options.tokens] for question in questions]
    num_tokens = sum(map(len, prompts))
    print(f"{len(prompts)} prompts, {num_tokens} tokens; beside float32")
    for form in options.forms:
        dtype, _, name = form.partition("=")
        target = load_target(name or DEFAULT_TARGET, dtype=dtype, progress=lambda line: None)
        same, divergence, error, scale = 0, 0.0, 0.0, 0.0
        for prompt in prompts:
            (states, truth), (found, guess) = read(exact, prompt), read(target, prompt)
            same += int((guess.argmax(-1) == truth.argmax(-1)).sum())
            divergence += float((truth.exp() * (truth - guess)).sum())
            error, scale = error + float((found - states).square().sum()), scale + float(states.square().sum())
        print(
            f"  {dtype}{' of rounded weights' if name else ''}: best token the same {same / num_tokens:.2%}, "
            f"KL {divergence / num_tokens:.2e}, hidden states off by {math.sqrt(error / scale):.2e} of their scale"
        )


if __name__ == "__main__":
    main()
