"""What is drafted inside vLLM is what our own drafter drafts of the same tokens and hidden states: in any order of a
batch, through chunks, rejected drafts, preemption, shared prefixes. `make test-vllm` decodes with vLLM itself."""

from __future__ import annotations

import json
import os
import random
import runpy
from dataclasses import dataclass
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from amphista.cli.export import Program, export
from amphista.drafter.base import Ask
from amphista.drafter.checkpoint import shipped_folder
from amphista.errors import AmphistaError, ConfigError
from amphista.tree.template import TreeTemplate
from amphista.vllm_proposer import ChainDrafts, ChainProposer, StepRows
from tests.tiny import VOCAB, real_drafters, tiny_target

NUM_TOKENS = 4
NAMES = ["amphista-full", "amphista-paths", "medusa-shared", "hydra-staged", "eagle-full", "falcon-pairs"]


@pytest.fixture(scope="module")
def precise():
    target = tiny_target(dtype=torch.float64)
    return target, real_drafters(target)


@dataclass
class Request:
    """A text that vLLM reads and decodes, as far as it has come."""

    truth: list[int]
    hidden: torch.Tensor
    num_known: int  # tokens: the prompt's, then those sampled
    num_computed: int = 0

    def step(self, chance) -> StepRows:
        """A chunk of the prompt, or the last token and drafts of which some are accepted."""
        start, left = self.num_computed, self.num_known - self.num_computed
        if left > 1 and chance.random() < 0.7:
            size = chance.randint(1, left)
            self.num_computed += size
            num_rejected, self.num_known = 0, self.num_known + (size == left)
        else:
            size, num_accepted = left, chance.randint(0, NUM_TOKENS) if left == 1 else 0
            num_rejected = NUM_TOKENS - num_accepted if left == 1 else 0
            self.num_known += num_accepted + 1
            self.num_computed, size = self.num_known - 1, size + num_accepted
        junk = torch.randn(num_rejected, self.hidden.shape[1], dtype=self.hidden.dtype)
        rows = torch.cat([self.hidden[start : start + size], junk])
        return StepRows(np.array(self.truth[: self.num_known]), start, rows, self.num_known == self.num_computed + 1)


def request(target, truth, prompt_len, num_computed=0):
    with torch.inference_mode():
        return Request(truth, target.hidden_states(torch.tensor([truth]))[0].clone(), prompt_len, num_computed)


def expected(heads, request, first=0):
    """What the drafter says that has read all rows from `first` on at once."""
    known = request.num_known
    state = heads.start()
    ask = Ask(state, NUM_TOKENS, hidden=request.hidden[first : known - 1], next_ids=request.truth[first + 1 : known])
    (candidates,) = heads.draft_all([ask], 1)
    return TreeTemplate.chain(NUM_TOKENS).fill(request.truth[known - 1], candidates, NUM_TOKENS).tokens[1:]


def take_steps(drafts, heads, requests, chance, num_steps=12, first=0):
    """Steps of some of the requests in any order; True where all drafts were those of the drafter alone."""
    same, num_drafts = True, 0
    for _ in range(num_steps):
        batch = [r for r in chance.sample(requests, len(requests)) if chance.random() < 0.8]
        rows = [r.step(chance) for r in batch]
        for drafted, asked, r in zip(drafts.propose(rows), rows, batch, strict=True):
            assert bool(drafted) == asked.wants_draft and len(drafted) <= NUM_TOKENS
            num_drafts += asked.wants_draft
            same &= not drafted or drafted == expected(heads, r, first)
    assert num_drafts > num_steps / 3
    return same


def texts(seed=0):
    """Three: the second is like the first as far as its prompt goes and beyond, the third has nothing of them."""
    chance = random.Random(seed)
    shared, *others = ([chance.randrange(VOCAB) for _ in range(80)] for _ in range(3))
    return [shared, shared[:30] + others[0], others[1]], chance


@pytest.mark.parametrize("name", NAMES)
def test_drafts_are_those_of_the_drafter_that_has_read_all_tokens(precise, name):
    target, drafters = precise
    heads, ((one, twin, other), chance) = drafters[name], texts()
    drafts = ChainDrafts(heads, NUM_TOKENS, capacity=8)
    requests = [request(target, one, 20), request(target, twin, 20), request(target, other, 1)]
    assert take_steps(drafts, heads, requests, chance)
    requests[0].num_computed = 0  # preempted: all its tokens are read again
    assert take_steps(drafts, heads, requests, chance, num_steps=6)
    late = request(target, one, 25, num_computed=16)  # 16 rows are in vLLM's prefix cache, and known here
    assert take_steps(drafts, heads, [late], chance, num_steps=6)


def late_by_16_rows(precise):
    """Whether a request drafts as it should whose first 16 rows nobody here has seen, but vLLM's prefix cache has."""
    target, drafters = precise
    heads, ((one, _, other), chance) = drafters["amphista-full"], texts()
    drafts = ChainDrafts(heads, NUM_TOKENS, capacity=8)
    take_steps(drafts, heads, [request(target, other, 20)], chance)
    return take_steps(drafts, heads, [request(target, one, 25, num_computed=16)], chance, first=16)


def test_rows_that_nobody_has_seen_cost_context_only(precise):
    assert late_by_16_rows(precise)


def test_no_more_states_are_held_than_was_said(precise):
    target, drafters = precise
    heads, (texts_, chance) = drafters["amphista-full"], texts()
    drafts = ChainDrafts(heads, NUM_TOKENS, capacity=2)
    take_steps(drafts, heads, [request(target, text, 20) for text in texts_], chance)
    assert len(drafts._known) == 2


def test_a_state_of_other_tokens_would_be_seen(precise, monkeypatch):
    monkeypatch.setattr("amphista.vllm_proposer._Known.starts", lambda known, rows: rows.start < len(known.token_ids))
    assert not late_by_16_rows(precise)


def test_rows_of_the_wrong_next_token_would_be_seen(precise, monkeypatch):
    target, drafters = precise
    heads, ((one, twin, other), chance) = drafters["amphista-full"], texts()
    monkeypatch.setattr(StepRows, "next_ids", property(lambda r: r.token_ids[r.start :][: len(r.hidden)].tolist()))
    drafts = ChainDrafts(heads, NUM_TOKENS, capacity=8)
    assert not take_steps(drafts, heads, [request(target, text, 20) for text in (one, twin, other)], chance)


def test_the_export_names_its_drafter(tmp_path, capsys):
    out, folder = tmp_path / "out", shipped_folder() / "smollm2-135m-instruct-medusa"
    export(Program.VLLM, out, os.path.relpath(folder))
    settings = json.loads(capsys.readouterr().out.partition("'")[2].rpartition("'")[0])
    module, name = settings["model"].split(".")
    proposer = runpy.run_path(str(out / f"{module}.py"))[name]
    assert issubclass(proposer, ChainProposer) and proposer.drafter == str(folder.resolve())
    with pytest.raises(ConfigError, match="not empty"):
        export(Program.VLLM, out, None)


@pytest.mark.parametrize(
    ("changes", "reason"), [({"devices": 2}, "several devices"), ({"family": "gemma2"}, "gemma2"), ({}, "ngram")]
)
def test_what_it_cannot_draft_for_is_refused(monkeypatch, changes, reason):
    asked = {"devices": 1, "family": "llama", **changes}
    config = SimpleNamespace(
        model_config=SimpleNamespace(hf_config=SimpleNamespace(model_type=asked["family"])),
        speculative_config=SimpleNamespace(num_speculative_tokens=4),
        scheduler_config=SimpleNamespace(max_num_seqs=4),
        parallel_config=SimpleNamespace(tensor_parallel_size=asked["devices"], pipeline_parallel_size=1),
    )
    monkeypatch.setattr(ChainProposer, "drafter", "amphista+lookup")
    with pytest.raises(AmphistaError, match=reason):
        ChainProposer(config)
