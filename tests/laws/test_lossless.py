"""Law 1: whatever drafter, tree and sampling, the tokens are those of plain autoregressive decoding.

The oracle decodes without cache or tree on the stock model. Accepted lengths are asserted too, so that no case passes
by never accepting anything.
"""

from __future__ import annotations

from dataclasses import replace
from itertools import islice

import pytest
import torch

from amphista.cache.static import KVCache
from amphista.drafter.proposer import Proposer
from amphista.engine.params import FinishReason, SamplingParams
from amphista.engine.step import Engine
from amphista.errors import CapacityError, TargetError
from amphista.tree.grow import StaticGrower, parse_tree
from amphista.tree.template import TreeTemplate
from amphista.tree.token_tree import TokenTree
from tests.decoding import begin, decode, step
from tests.oracle.decode import decode_plainly
from tests.tiny import (
    AUTO_TREES,
    EOS,
    GRAFTS,
    HOSTILE,
    REAL_DRAFTERS,
    SEQUENTIAL,
    Grafting,
    anew,
    real_drafters,
    tiny_target,
)

PROMPT = [5, 17, 230, 44, 9]
TREES = {
    "chain": parse_tree("chain"),
    "1": parse_tree(1),
    "2": parse_tree(2),
    "7": parse_tree(7),
    "24": parse_tree(24),
    "static": StaticGrower(TreeTemplate.from_paths([[0], [1], [2], [0, 0], [0, 1], [1, 0], [0, 0, 0], [0, 0, 0, 0]])),
    **AUTO_TREES,
}
SAMPLINGS = {
    "greedy": SamplingParams(max_new_tokens=24),
    "sampled": SamplingParams(max_new_tokens=24, temperature=0.7, seed=3),
    "filtered": SamplingParams(max_new_tokens=24, temperature=1.2, top_k=40, top_p=0.9, min_p=0.01, seed=4),
    "penalised": SamplingParams(max_new_tokens=24, repetition_penalty=1.5),
    "penalised-sampled": SamplingParams(max_new_tokens=24, temperature=0.9, repetition_penalty=1.3, seed=2**63),
    "counted": SamplingParams(
        max_new_tokens=24, frequency_penalty=2.0, presence_penalty=6.0, logit_bias={7: 9, 8: 9, EOS: 30}, min_tokens=20
    ),
    "everything": SamplingParams(
        max_new_tokens=24,
        temperature=1.1,
        top_p=0.95,
        repetition_penalty=1.2,
        frequency_penalty=-0.5,
        presence_penalty=3.0,
        logit_bias={"9": 12, EOS: 30},
        suppress_tokens=[28, 119],
        min_tokens=15,
        seed=6,
    ),
}


@pytest.fixture(scope="module")
def expected(target):
    return {name: decode_plainly(target.model, PROMPT, params, {EOS}) for name, params in SAMPLINGS.items()}


@pytest.fixture(scope="module")
def drafters(target):
    return real_drafters(target)


def first_difference(ours, theirs):
    return next((i for i, (a, b) in enumerate(zip(ours, theirs, strict=False)) if a != b), min(len(ours), len(theirs)))


def check(target, drafter, tree, sampling, expected):
    sequence = decode(Engine(target, drafter, anew(TREES[tree])), PROMPT, SAMPLINGS[sampling])
    at = first_difference(sequence.output_ids, expected[sampling])
    assert sequence.output_ids == expected[sampling], f"first divergent position {at}"
    stats = sequence.stats
    assert stats.num_tokens == len(sequence.output_ids) == 1 + sum(n + 1 for n in stats.accepted)
    sequence.rows.cache.check_integrity()
    assert sequence.rows.cache.num_committed == len(PROMPT) + stats.num_tokens - 1
    return sequence


@pytest.mark.parametrize("sampling", SAMPLINGS)
@pytest.mark.parametrize("tree", TREES)
@pytest.mark.parametrize("name", HOSTILE)
def test_hostile_drafters(target, expected, name, tree, sampling):
    drafter = HOSTILE[name](PROMPT + expected[sampling])
    sequence = check(target, drafter, tree, sampling, expected)
    accepted = sequence.stats.accepted
    if name == "always-right" and tree == "chain":
        assert set(accepted[:-1]) == {drafter.num_heads}, "the always-right drafter must reach its full depth"
    if name == "always-wrong":
        assert set(accepted) == {0}, "the always-wrong drafter must never be accepted"


@pytest.mark.parametrize("sampling", ["greedy", "sampled", "penalised-sampled"])
@pytest.mark.parametrize("tree", ["chain", "7", "24", *AUTO_TREES])
@pytest.mark.parametrize("name", REAL_DRAFTERS)
def test_real_drafters(target, drafters, expected, name, tree, sampling):
    check(target, drafters[name], tree, sampling, expected)


def test_the_new_settings_are_felt(expected):
    """Without this the cases above might compare answers that no penalty, bias or ban has changed."""
    counted, everything = expected["counted"], expected["everything"]
    assert len(counted) == 21 and counted[-1] == EOS and len(everything) == 16 and everything[-1] == EOS
    assert counted[:20] != expected["greedy"][:20] and {7, 8} & set(counted) and not {28, 119} & set(everything)


def wide(name):
    return 60 if name.removesuffix("+lookup") in SEQUENTIAL else 200  # below each of so many, so many in each round


def test_real_drafters_are_accepted_somewhere(target, drafters, expected):
    """With a wide tree even random weights hit now and then; otherwise the cases above would prove nothing."""
    accepted = (
        n
        for name in REAL_DRAFTERS
        if not name.startswith("none")
        for n in decode(
            Engine(target, drafters[name], parse_tree(wide(name))), PROMPT, SAMPLINGS["greedy"]
        ).stats.accepted
        if n > 0
    )
    assert len(list(islice(accepted, 10))) == 10


@pytest.mark.parametrize("sampling", ["greedy", "penalised-sampled"])
@pytest.mark.parametrize("tree", ["chain", "7", "static", *AUTO_TREES])
@pytest.mark.parametrize("name", ["none", "always-right", "always-wrong", "ends-early"])
@pytest.mark.parametrize("graft", GRAFTS)
def test_hostile_grafts(target, expected, graft, name, tree, sampling):
    """Beside heads that help, that mislead and that are not there."""
    tokens = PROMPT + expected[sampling]
    inner = None if name == "none" else HOSTILE[name](tokens)
    sequence = check(target, Grafting(inner, tokens, GRAFTS[graft]), tree, sampling, expected)
    if graft == "right" and tree in ("chain", "auto-cheap"):
        assert max(sequence.stats.accepted) > 4, "a right graft goes deeper than any heads"
    if graft == "wrong" and name in ("always-wrong", "none"):
        assert set(sequence.stats.accepted) == {0}


@pytest.mark.parametrize("tree", ["chain", "7", *AUTO_TREES])
@pytest.mark.parametrize("inner", ["none", "random", "always-right"])
def test_lookup_is_accepted_where_the_target_repeats_itself(inner, tree):
    """Real lookup beside heads finds what comes, deeper than they reach, and the tokens stay."""
    repeating = tiny_target(tie_word_embeddings=True)
    params = SamplingParams(max_new_tokens=100, temperature=0.3, seed=1)
    prompt = [5, 17, 230, 44, 9] * 3
    expected = decode_plainly(repeating.model, prompt, params, {EOS})
    heads = None if inner == "none" else HOSTILE[inner](prompt + expected)
    sequence = decode(Engine(repeating, Proposer(heads, use_lookup=True), TREES[tree]), prompt, params)
    assert sequence.output_ids == expected
    assert max(sequence.stats.accepted) > 4 and sum(sequence.stats.accepted) > 20


def test_the_dear_tree_rests_its_heads_and_the_cheap_one_does_not(target, expected):
    """So that the cases above cover steps without heads, and steps after them whose rows were fed late."""
    for tree, name, least, most in (("auto-cheap", "always-right", 0.8, 1.0), ("auto-dear", "always-wrong", 0.01, 0.5)):
        drafted = check(target, HOSTILE[name](PROMPT + expected["greedy"]), tree, "greedy", expected).stats.drafted
        assert least <= sum(drafted) / len(drafted) <= most


def test_what_stands_behind_the_end_fails_nobody():
    """A penalty that rewards repetition until it overflows: the answer ends before, a drafted tree looks beyond."""
    target, prompt = tiny_target(with_text=True), [5, 17, 230, 44, 9]
    assert target.speed_up()
    params = SamplingParams(max_new_tokens=30, frequency_penalty=-1.2e38, stop=(target.text.decode([119] * 3),))
    plain = decode(Engine(target, None, TREES["chain"]), prompt, params)
    drafter = HOSTILE["always-right"](prompt + plain.output_ids + [7] * 9)
    drafted = decode(Engine(target, drafter, TREES["chain"]), prompt, params)
    assert plain.output_ids == drafted.output_ids == [119] * 3 and drafted.finish_reason == "stop"
    with pytest.raises(TargetError, match="no finite numbers"):
        decode(Engine(target, drafter, TREES["chain"]), prompt, replace(params, stop=()))


@pytest.mark.parametrize("seed", range(6))
def test_many_seeds(target, seed):
    params = SamplingParams(max_new_tokens=20, temperature=1.0, seed=seed)
    expected = decode_plainly(target.model, PROMPT, params, {EOS})
    for name in ("always-right", "random", "ends-early"):
        drafter = HOSTILE[name](PROMPT + expected)
        assert decode(Engine(target, drafter, parse_tree(9)), PROMPT, params).output_ids == expected


def test_seeds_differ(target):
    outputs = {
        tuple(decode_plainly(target.model, PROMPT, SamplingParams(max_new_tokens=8, temperature=1.0, seed=seed)))
        for seed in range(6)
    }
    assert len(outputs) > 1


def test_equals_transformers_generate(target, expected):
    ids = torch.tensor([PROMPT])
    theirs = target.model.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=24, do_sample=False)
    assert theirs[0, len(PROMPT) :].tolist() == expected["greedy"]


# -- the end of an answer, inside an accepted path --------------------------------------------------------------------


@pytest.mark.parametrize("limit", range(1, 12))
def test_limit_inside_an_accepted_path(target, expected, limit):
    drafter = HOSTILE["always-right"](PROMPT + expected["greedy"])
    params = SamplingParams(max_new_tokens=limit)
    sequence = decode(Engine(target, drafter, parse_tree("chain")), PROMPT, params)
    assert sequence.output_ids == expected["greedy"][:limit]
    assert sequence.finish_reason is FinishReason.LENGTH


@pytest.mark.parametrize("index", [0, 1, 2, 3, 4, 5, 9])
def test_end_token_inside_an_accepted_path(target, expected, index):
    """Ask for an end at the token at `index`: nothing behind it is emitted, counted or cached."""
    answer = expected["greedy"]
    end = answer[index]
    drafter = HOSTILE["always-right"](PROMPT + answer)
    engine = Engine(target, drafter, parse_tree("chain"))
    sequence = decode(engine, PROMPT, replace(SAMPLINGS["greedy"], stop_token_ids=(end,)))
    assert sequence.output_ids == answer[: answer.index(end) + 1]
    assert sequence.finish_reason is FinishReason.STOP
    assert sequence.rows.cache.num_committed == len(PROMPT) + len(sequence.output_ids) - 1


@pytest.mark.parametrize("name", ["always-right", "random", "always-wrong"])
def test_context_end_is_a_length_finish(name):
    """Reaching the context's end finishes with `length` at the same token with and without drafts."""
    small = tiny_target(max_position_embeddings=20)
    params = SamplingParams(max_new_tokens=100)
    expected = decode_plainly(small.model, PROMPT, params)
    drafter = HOSTILE[name](PROMPT + expected)
    small.__dict__["eos_ids"] = frozenset()
    sequence = decode(Engine(small, drafter, parse_tree(12)), PROMPT, params)
    assert sequence.output_ids == expected and len(PROMPT) + len(expected) == 21
    assert sequence.finish_reason is FinishReason.LENGTH


# -- two generations at once ------------------------------------------------------------------------------------------


def test_interleaved_generations_do_not_disturb_each_other(target, drafters, expected):
    engine = Engine(target, drafters["amphista-full"], parse_tree(7))
    sequences = [begin(engine, PROMPT, SAMPLINGS[name]) for name in SAMPLINGS]
    while not all(sequence.is_finished for sequence in sequences):
        for sequence in sequences:
            if not sequence.is_finished:
                step(engine, sequence)
    assert [sequence.output_ids for sequence in sequences] == list(expected.values())


def test_threads_do_not_disturb_each_other(target, drafters, expected):
    from concurrent.futures import ThreadPoolExecutor

    engine = Engine(target, drafters["amphista-full"], parse_tree(7))
    with ThreadPoolExecutor(4) as pool:
        outputs = list(pool.map(lambda name: decode(engine, PROMPT, SAMPLINGS[name]).output_ids, list(SAMPLINGS) * 4))
    assert outputs == list(expected.values()) * 4


# -- mutations --------------------------------------------------------------------------------------------------------


def _follows_any_child(monkeypatch):
    """A draft is taken at its word."""
    monkeypatch.setattr(
        TokenTree, "child", lambda tree, node, token: tree.parents.index(node) if node in tree.parents else None
    )


def _positions_of_a_chain(monkeypatch):
    """Every node of the tree is given the next position, siblings too."""
    monkeypatch.setattr(TokenTree, "depths", property(lambda tree: list(range(tree.num_nodes))))


def _commits_the_first_rows(monkeypatch):
    """The rows of other nodes are kept for those of the accepted path."""
    commit = KVCache.commit
    monkeypatch.setattr(KVCache, "commit", lambda cache, path: commit(cache, range(len(path))))


@pytest.mark.parametrize("tree", ["24", "static"])
@pytest.mark.parametrize("mutation", [_follows_any_child, _positions_of_a_chain, _commits_the_first_rows])
def test_a_mutation_is_seen(target, expected, monkeypatch, mutation, tree):
    """Heads that are right beside a graft that is wrong, so that what is accepted does not come first in the tree."""
    tokens = PROMPT + expected["greedy"]
    drafter = Grafting(HOSTILE["always-right"](tokens), tokens, GRAFTS["wrong"])
    mutation(monkeypatch)
    with pytest.raises((AssertionError, CapacityError)):
        check(target, drafter, tree, "greedy", expected)
