"""Every causal-LM class of the installed `transformers`, built tiny: does it decode as stock, or is it refused?

    python -m tests.families                     # all of them, a few minutes on one thread; the table goes to docs/
    python -m tests.families llama gemma3_text   # some, to the screen

Each is read through the door of `load_target` (configuration, check, the fast path where it qualifies) and decoded with
drafters that put wrong siblings before right ones, draft chains, look up the text, or guess. Its tokens must be those
of `transformers`' own `generate` and of a forward over the whole text without any cache. Exit code 1 where one is not.
"""

from __future__ import annotations

import random
import sys
import warnings
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from transformers import CONFIG_MAPPING, GenerationConfig, __version__
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES
from transformers.utils import logging

from amphista.drafter.proposer import Proposer
from amphista.engine.params import SamplingParams
from amphista.engine.step import Engine
from amphista.errors import TargetError, first_line
from amphista.target.exactness import check_exactness
from amphista.target.families import refuse_unsupported
from amphista.target.target import Target
from amphista.target.tiny import tiny_model
from amphista.tree.grow import parse_tree
from tests.decoding import decode
from tests.tiny import Scripted

TABLE = Path(__file__).parents[1] / "docs" / "families.md"
NUM_TOKENS = 28
PROMPT = [5, 17, 130, 44, 9, 61, 100, 3, 77, 201, 12, 5, 17, 130, 18, 44, 90, 31, 250, 6, 8, 5, 17, 130]
ROPE = {"rope_type": "default", "rope_theta": 10000.0}
DECODERS = (
    "bert bert-generation big_bird camembert data2vec-text electra ernie megatron-bert rembert roberta "
    "roberta-prelayernorm roc_bert roformer xlm-roberta xlm-roberta-xl"
)
INTRODUCTION = """# Families

Every causal-LM class of `transformers` {version}, and some that read images beside text and are given text alone: built
tiny and random (float64 where the class can), then decoded with drafters that put wrong siblings before right ones,
draft chains, look up the text, or guess. The tokens must be those of `generate` and of a whole forward without a cache.
Made by `python -m tests.families`; a real checkpoint is checked again whenever it is loaded.
"""
IMAGES = "aya_vision idefics3 internvl llava mistral3 paligemma qwen2_vl qwen2_5_vl qwen3_vl smolvlm"
SETTINGS: dict[str, dict[str, Any]] = {  # where a class's defaults make no whole decoder
    **{family: {"is_decoder": True} for family in DECODERS.split()},
    "codegen": {"rotary_dim": 8},
    "gptj": {"rotary_dim": 8},
    "cohere_compass_text": {"rope_parameters": {"full_attention": ROPE, "sliding_attention": ROPE}},
    "deepseek_v2": {"num_experts_per_tok": 2, "n_group": 1, "topk_group": 1},
    "dots1": {
        "n_routed_experts": 4,
        "num_experts_per_tok": 2,
        "n_group": 1,
        "topk_group": 1,
        "n_shared_experts": 1,
        "sliding_window": 7,
    },
    "hunyuan_v1_dense": {"head_dim": 16},
    "hunyuan_v1_moe": {"head_dim": 16},
    "lfm2_moe": {"layer_types": ["full_attention", "conv"] * 2, "num_hidden_layers": 4},
    "longcat_flash": {"hidden_size": 64, "num_attention_heads": 4},
    "ministral": {"head_dim": 16},
    "nemotron": {"num_key_value_heads": 4},
    "qwen2_vl": {"vision_config": {"embed_dim": 32, "hidden_size": 32, "depth": 1, "num_heads": 2}},
    "qwen2": {"use_sliding_window": True, "max_window_layers": 2},
    "qwen3": {"use_sliding_window": True, "max_window_layers": 2},
    "reformer": {"is_decoder": True, "axial_pos_embds": False},
    "xlm": {"causal": True},
    "xmod": {"is_decoder": True, "default_language": "en_XX"},
}


@dataclass(frozen=True)
class Verdict:
    """What became of one family: `equal`, `refused`, `unbuilt`, `wrong` or `crash`."""

    family: str
    result: str
    why: str = ""
    num_different: int = 0


def configuration(family: str) -> Any:
    """A configuration of the family's class."""
    return CONFIG_MAPPING[family](**SETTINGS.get(family, {}))


def judge(family: str) -> Verdict:
    """Build, load, decode, compare."""
    try:
        config = configuration(family)
        refuse_unsupported(config)
    except TargetError as error:
        return Verdict(family, "refused", str(error))
    except Exception as error:
        return Verdict(family, "unbuilt", first_line(error))
    try:
        model = tiny_model(config)
    except TargetError as error:
        return Verdict(family, "unbuilt", str(error))
    try:
        return compare(family, model)
    except TargetError as error:
        return Verdict(family, "refused", str(error))
    except Exception as error:
        return Verdict(family, "crash", f"{type(error).__name__}: {first_line(error)}")


def compare(family: str, model: Any) -> Verdict:
    """Decode with every drafter, on the stock path and on the fast one; raises TargetError where it is refused."""
    model.generation_config = GenerationConfig(pad_token_id=0)
    target = Target(model)
    check_exactness(target)
    expected = generated(model, PROMPT, NUM_TOKENS)
    note = ""
    if differs_from_whole_forward(model, PROMPT, expected):
        expected = by_whole_forwards(model, PROMPT, NUM_TOKENS)
        note = "; `generate` departs from the model's own whole forwards, which are the law here"
    paths = ["stock"]
    found = differing(target, expected)
    if not found and target.speed_up():
        paths.append("fast")
        found = differing(target, expected)
    if found:
        return Verdict(family, "wrong", f"on the {paths[-1]} path with drafter {', '.join(found)}")
    why = f"{model.config._attn_implementation} attention, {' and '.join(paths)} path{note}"
    return Verdict(family, "equal", why, len(set(expected)))


@torch.no_grad()
def generated(model: Any, prompt: list[int], num_tokens: int) -> list[int]:
    """Greedy tokens of `transformers`' own `generate`."""
    ids = torch.tensor([prompt])
    output = model.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=num_tokens, do_sample=False)
    return output[0, len(prompt) :].tolist()


@torch.no_grad()
def differs_from_whole_forward(model: Any, prompt: list[int], tokens: list[int]) -> bool:
    """Whether a forward over the whole text, without a cache, would have chosen other tokens."""
    logits = model(input_ids=torch.tensor([prompt + tokens]), use_cache=False).logits[0, len(prompt) - 1 : -1]
    return bool(logits.argmax(-1).tolist() != tokens)


@torch.no_grad()
def by_whole_forwards(model: Any, prompt: list[int], num_tokens: int) -> list[int]:
    """Greedy tokens, one forward over the whole text for each."""
    ids = list(prompt)
    for _ in range(num_tokens):
        ids.append(int(model(input_ids=torch.tensor([ids]), use_cache=False).logits[0, -1].argmax()))
    return ids[len(prompt) :]


def differing(target: Target, expected: list[int]) -> list[str]:
    """The drafters with which other tokens come out."""
    params = SamplingParams(max_new_tokens=len(expected), ignore_eos=True)
    found = []
    for name, (drafter, tree) in drafters(target.spec.vocab_size, PROMPT + expected).items():
        sequence = decode(Engine(target, drafter, parse_tree(tree)), PROMPT, params)
        if sequence.output_ids != expected:
            found.append(name)
        if name == "siblings":
            assert sequence.stats.num_steps < len(expected), "no accepted row ever had to be moved"
    return found


def drafters(vocab_size: int, tokens: list[int]) -> dict[str, tuple[Any, Any]]:
    """Drafters that know what is coming, and their trees."""
    source = random.Random(0)

    def coming(state, depth):
        at = state.num_rows + depth
        return tokens[at] if at < len(tokens) else 0

    def siblings(state, depth, num_ranks):
        return [(coming(state, depth) + 1) % vocab_size, coming(state, depth)][:num_ranks]

    def chain(state, depth, num_ranks):
        return [(coming(state, depth) + (state.num_rows + depth) // 3 % 2) % vocab_size]

    def guess(state, depth, num_ranks):
        return source.sample(range(vocab_size), min(num_ranks, 5))

    return {
        "siblings": (Scripted(4, siblings), 24),
        "chain": (Scripted(4, chain), "chain"),
        "guess": (Scripted(4, guess), 24),
        "lookup": (Proposer(use_lookup=True), "chain"),
    }


def table(verdicts: list[Verdict]) -> str:
    """The page of docs."""
    counts = Counter(verdict.result for verdict in verdicts)
    lines = [INTRODUCTION.format(version=__version__)]
    lines += [
        f"{counts['equal']} equal stock, {counts['refused']} are refused, {counts['unbuilt']} could not be built tiny "
        f"here, {counts['wrong']} wrong, {counts['crash']} crashes.",
        "",
        "| family | result | |",
        "|---|---|---|",
    ]
    words = {"equal": "equals stock", "unbuilt": "not built"}
    for verdict in verdicts:
        why = verdict.why.replace("|", "/")
        lines.append(f"| {verdict.family} | {words.get(verdict.result, verdict.result)} | {why} |")
    return "\n".join(lines) + "\n"


def main(families: list[str]) -> int:
    """Judge the named families, or all of them, which also writes the table."""
    torch.set_num_threads(1)
    logging.set_verbosity_error()
    warnings.simplefilter("ignore")
    verdicts = []
    for family in families or sorted({*MODEL_FOR_CAUSAL_LM_MAPPING_NAMES, *IMAGES.split()}):
        verdicts.append(judge(family))
        sys.stdout.write(f"{verdicts[-1].result:8} {family}: {verdicts[-1].why}\n")
        sys.stdout.flush()
    if not families:
        TABLE.write_text(table(verdicts))
    return int(any(verdict.result in ("wrong", "crash") for verdict in verdicts))


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
