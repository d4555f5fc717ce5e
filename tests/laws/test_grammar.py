"""Grammars, plainly decoded requests among drafted ones, traces: none changes a token, whatever is drafted."""

from __future__ import annotations

import contextlib
import json

import pytest

from amphista.drafter.proposer import Proposer
from amphista.engine.params import SamplingParams
from amphista.engine.step import Engine
from amphista.engine.trace import Source
from amphista.errors import RequestError
from amphista.serve.grammar import Grammars, Matched
from amphista.tree.candidates import NgramDraft, with_forced
from amphista.tree.grow import DynamicGrower, parse_tree
from tests.decoding import step
from tests.talkative import talkative_target
from tests.tiny import AUTO_TREES, EOS, GRAFTS, HOSTILE, Grafting, anew

PLAIN = DynamicGrower(1)
SCHEMA = {
    "type": "object",
    "properties": {
        "name": {"type": "string", "maxLength": 12},
        "ages": {"type": "array", "items": {"type": "integer"}, "minItems": 1, "maxItems": 3},
        "kind": {"enum": ["cat", "caterpillar", "dog"]},
    },
    "required": ["name", "ages", "kind"],
    "additionalProperties": False,
}
FORMATS = {
    "schema": {"type": "json_schema", "json_schema": {"name": "pet", "schema": SCHEMA}},
    "object": {"type": "json_object"},
    "regex": {"type": "grammar", "syntax": "regex", "definition": "[a-f]{3,9}(-[0-9]+)*"},
    "lark": {"type": "grammar", "syntax": "lark", "definition": 'start: ("ab" | "ac" start | "b")'},
}
SETTINGS = {
    "greedy": SamplingParams(max_new_tokens=60),
    "sampled": SamplingParams(max_new_tokens=60, temperature=1.0, seed=5),
    "penalised": SamplingParams(max_new_tokens=60, frequency_penalty=1.5, temperature=0.8, seed=7, logit_bias={3: 2.0}),
}
PROMPT = [5, 6, 7, 8, 9]


@pytest.fixture(scope="module")
def target():
    return talkative_target()


@pytest.fixture(scope="module")
def grammars(target):
    return Grammars(target)


def decode(engine, params, make=None, prompt=PROMPT, **settings):
    sequence = engine.new_sequence(prompt, params)
    sequence.chooser.grammar = None if make is None else make()
    for name, value in settings.items():
        setattr(sequence, name, value)
    results = []
    while not sequence.is_finished:
        results.append(step(engine, sequence))
    return sequence, results


@pytest.mark.parametrize("settings", SETTINGS)
@pytest.mark.parametrize("form", FORMATS)
def test_tree_equals_plain_under_any_grammar(target, grammars, form, settings):
    make, params = grammars.compiled(FORMATS[form]), SETTINGS[settings]
    plain, _ = decode(Engine(target, Proposer(), PLAIN), params, make)
    known, accepted = PROMPT + plain.output_ids, {}
    for name, drafter in HOSTILE.items():
        drafted, _ = decode(Engine(target, drafter(known), DynamicGrower(12)), params, make)
        assert drafted.output_ids == plain.output_ids, name
        accepted[name] = sum(drafted.stats.accepted)
    for name, graft in GRAFTS.items():
        proposer = Grafting(HOSTILE["misled"](known), known, graft)
        drafted, _ = decode(Engine(target, proposer, anew(AUTO_TREES["auto-cheap"])), params, make)
        assert drafted.output_ids == plain.output_ids, name
    assert accepted["always-right"] > accepted["always-wrong"]  # which has what the form forces
    free, _ = decode(Engine(target, Proposer(), PLAIN), params)
    assert free.output_ids != plain.output_ids, "the grammar forbade nothing"


@pytest.mark.parametrize("settings", SETTINGS)
@pytest.mark.parametrize("form", FORMATS)
def test_what_a_form_leaves_no_choice_about_is_drafted_and_not_trusted(target, grammars, monkeypatch, form, settings):
    make, params = grammars.compiled(FORMATS[form]), SETTINGS[settings]
    plain, _ = decode(Engine(target, Proposer(), PLAIN), params, make)
    engine = Engine(target, Proposer(), DynamicGrower(12))
    drafted, results = decode(engine, params, make)
    assert drafted.output_ids == plain.output_ids
    if form == "schema":
        assert sum(drafted.stats.accepted) > 10 and len(results) < len(plain.output_ids) - 10
        assert {source for result in results for source in result.sources} == {Source.FORM, Source.TARGET}
    forced = Matched.forced
    beside = Proposer(HOSTILE["always-right"](PROMPT + plain.output_ids), use_lookup=True)
    for lie, proposer, tree in (
        (lambda told: [token + 1 for token in told], Proposer(), anew(AUTO_TREES["auto-cheap"])),
        (lambda told: [*told, 5, 5], beside, DynamicGrower(12)),
        (lambda told: [7] * 40, beside, parse_tree("chain")),
    ):
        monkeypatch.setattr(Matched, "forced", lambda self, index, lie=lie: lie(forced(self, index)))
        misled, _ = decode(Engine(target, proposer, tree), params, make)
        assert misled.output_ids == plain.output_ids


def test_a_graft_begins_with_what_is_certain():
    graft = NgramDraft([1, 2, 3], [-0.5, -0.6, -0.7])
    assert with_forced(graft, []) is graft and with_forced(None, []) is None
    assert with_forced(None, [1]) == NgramDraft([1], [0.0], 1)
    assert with_forced(graft, [9, 2]) == NgramDraft([9, 2], [0.0, 0.0], 2)
    assert with_forced(graft, [1, 2]) == NgramDraft([1, 2, 3], [0.0, 0.0, -0.7], 2)
    assert with_forced(graft, [1, 2, 3, 4]) == NgramDraft([1, 2, 3, 4], [0.0] * 4, 4)


def test_what_a_schema_makes_is_of_it(target, grammars):
    make = grammars.compiled(FORMATS["schema"])
    engine = Engine(target, Proposer(use_lookup=True), parse_tree("6"))
    num_ended = 0
    for seed in range(8):
        params = SamplingParams(max_new_tokens=200, temperature=1.0, seed=seed)
        sequence, _ = decode(engine, params, make, prompt=PROMPT + [seed])
        if sequence.output_ids[-1] == EOS:
            value = json.loads(target.text.decode(sequence.output_ids[:-1]))
            assert set(value) == {"name", "ages", "kind"} and value["kind"] in ("cat", "caterpillar", "dog")
            num_ended += 1
    assert num_ended > 3


def test_a_step_that_breaks_off_is_done_again_under_a_grammar(target, grammars, monkeypatch):
    make, params = grammars.compiled(FORMATS["schema"]), SETTINGS["sampled"]
    plain, _ = decode(Engine(target, Proposer(), PLAIN), params, make)
    engine = Engine(target, HOSTILE["always-right"](PROMPT + plain.output_ids), DynamicGrower(12))
    sequence = engine.new_sequence(PROMPT, params)
    sequence.chooser.grammar = make()
    take, broken = type(sequence).take, []

    def breaks(self, tokens, ending):
        take(self, tokens, ending)
        if len(broken) < 5 and len(tokens) > 1:
            broken.append(tokens)
            raise KeyboardInterrupt

    monkeypatch.setattr(type(sequence), "take", breaks)
    while not sequence.is_finished:
        with contextlib.suppress(KeyboardInterrupt):
            step(engine, sequence)
    assert len(broken) == 5
    assert sequence.output_ids == plain.output_ids


@pytest.mark.parametrize(
    "given",
    [
        {"type": "json_schema", "json_schema": {"schema": {"type": "strin"}}},
        {"type": "json_schema", "json_schema": {"schema": {"$ref": "http://127.0.0.1:1/x"}}},
        {"type": "json_schema", "json_schema": {"schema": {"type": "object", "not": {}}}},
        {"type": "json_schema", "json_schema": {"schema": {"enum": ["x" * 70_000]}}},
        {"type": "grammar", "syntax": "regex", "definition": "a(b"},
        {"type": "grammar", "syntax": "lark", "definition": "start: nobody"},
    ],
)
def test_grammars_that_are_none_are_refused(grammars, given):
    with pytest.raises(RequestError, match="response_format"):
        grammars.compiled(given)


@pytest.mark.parametrize("tree", ["12", "static", "chain", *AUTO_TREES])
def test_plain_among_drafted_is_plain_and_changes_nobody(target, tree):
    from amphista.tree.grow import StaticGrower
    from amphista.tree.template import TreeTemplate

    grower = StaticGrower(TreeTemplate.chain(3)) if tree == "static" else None
    grower = grower or (anew(AUTO_TREES[tree]) if tree in AUTO_TREES else parse_tree(tree))
    params = SamplingParams(max_new_tokens=40, temperature=1.0, seed=3, ignore_eos=True)
    alone, _ = decode(Engine(target, Proposer(), PLAIN), params)
    engine = Engine(target, HOSTILE["always-right"](PROMPT + alone.output_ids), grower)
    batch = [engine.new_sequence(PROMPT, params) for _ in range(3)]
    batch[1].drafts = False
    while running := [sequence for sequence in batch if not sequence.is_finished]:
        assert not any(isinstance(result, Exception) for result in engine.step(running))
    assert all(sequence.output_ids == alone.output_ids for sequence in batch)
    assert set(batch[1].stats.tree_nodes) == {1} and sum(batch[1].stats.accepted) == 0
    assert sum(batch[0].stats.accepted) > 0 and sum(batch[2].stats.accepted) > 0


def test_a_trace_tells_the_tree_and_who_guessed(target):
    params = SamplingParams(max_new_tokens=40, ignore_eos=True)
    plain, _ = decode(Engine(target, Proposer(), PLAIN), params)
    known = PROMPT + plain.output_ids
    proposer = Grafting(HOSTILE["always-right"](known), known, lambda told, coming: coming[:1])
    engine = Engine(target, proposer, DynamicGrower(12))
    drafted, untold = decode(engine, params)
    traced, results = decode(engine, params, is_traced=True)
    assert traced.output_ids == drafted.output_ids == plain.output_ids
    assert all(result.trace is None for result in untold) and untold[-1].sources == results[-1].sources
    assert {source for result in results for source in result.sources} == {Source.HEADS, Source.BOTH, Source.TARGET}
    for result in results[1:]:
        trace = result.trace
        assert len(result.sources) == len(result.token_ids) and result.sources[-1] is Source.TARGET
        assert result.num_nodes == trace.tree.num_nodes == len(trace.sources) == len(trace.scores)
        assert [trace.tree.tokens[node] for node in trace.path[1:]] == result.token_ids[:-1]
        assert [trace.sources[node] for node in trace.path[1:]] == result.sources[:-1]
        assert trace.scores[0] == 0 and all(score <= 0 for score in trace.scores)
    looked_up = Grafting(None, known, GRAFTS["right-then-wrong"])
    _, results = decode(Engine(target, looked_up, DynamicGrower(12)), params)
    assert {source for result in results for source in result.sources} == {Source.LOOKUP, Source.TARGET}
