"""The laws of drafters that are asked in rounds: what a head says depends on its own path alone, written out here with
nothing but plain causal layers; nothing that is made for drafted tokens is left behind; and the rounds that are taken
find the best tree of all.

That training and decoding say the same, and that the target's tokens stay, is shown with all other drafters
(test_parity.py, test_lossless.py, test_batch.py).
"""

from __future__ import annotations

import copy
import math

import pytest
import torch
import torch.nn.functional as F

from amphista.drafter import hydra, path_rows, rounds
from amphista.drafter.base import Ask, Calibration
from amphista.drafter.eagle import Eagle, FusedHeads
from amphista.drafter.early_exit import EarlyExit
from amphista.drafter.falcon import Falcon
from amphista.drafter.hydra import Hydra
from amphista.drafter.layers import rotary_tables
from amphista.drafter.proposer import Proposer
from amphista.engine.params import SamplingParams
from amphista.engine.step import Engine
from amphista.errors import NativeError
from amphista.target.lean import LeanModel
from amphista.tree.budget import DraftRow
from amphista.tree.controller import DraftController
from amphista.tree.dynamic import best_first
from amphista.tree.grow import AutoGrower, ChainGrower, DynamicGrower, StaticGrower, parse_tree
from amphista.tree.learned import Forward
from amphista.tree.template import TreeTemplate
from amphista.tree.tune import Costs
from tests.decoding import begin, decode, heads_along, started, step
from tests.tiny import SEQUENTIAL, Steady, real_drafters, tiny_target

IDS = [5, 17, 230, 44, 9, 61, 62, 63, 99, 100, 7, 250]
PATH = [30, 31, 200, 62]


@pytest.fixture(scope="module")
def drafters(target):
    return real_drafters(target)


@pytest.fixture(scope="module")
def precise():
    """In float64: products over few and over many rows then differ by far less than any fault of a path."""
    target = tiny_target(dtype=torch.float64)
    assert target.speed_up()
    return target, real_drafters(target)


def context(target, length=12, taps=()):
    hidden = target.hidden_states(torch.tensor([[*IDS, 1]]), taps)[0, :-1].clone()
    return hidden[:length], torch.tensor([*IDS[1:], 1])[:length]


def fed(target, drafter, length=12, pieces=(4, 1)):
    state, (hidden, next_ids) = started(target, drafter, IDS), context(target, length, drafter.taps)
    for rows in (slice(0, pieces[0]), slice(pieces[0], sum(pieces)), slice(sum(pieces), length)):
        drafter.commit(state, hidden[rows], next_ids[rows])
    return state


# -- the equations, written out --------------------------------------------------------------------------------------


def eagle_plainly(target, drafter, tokens):
    """g of the context, then one row of the path after the other, each time the whole layer from its start."""
    (hidden, *taps), next_ids = context(target, taps=drafter.taps)[0].split(32, -1), context(target)[1]
    stage, embed = drafter.stage, lambda ids: drafter.embedding_norm(target.shared.embed(ids))

    def fuse(state, ids):
        return F.linear(torch.cat([stage.state_norm(state), embed(ids)], -1), stage.fuse.weight)

    rows, states = fuse(hidden, next_ids), []
    if taps:
        normed = [norm(tap) for norm, tap in zip(drafter.tap_norms, taps, strict=True)]
        rows = rows + F.linear(torch.cat(normed, -1), drafter.fuse_taps.weight)
    for token in [*tokens, None]:
        whole = stage.layer(rows[None], positions=torch.arange(len(rows))[None], is_causal=True)[0]
        states.append(drafter.output_norm(whole[-1]))
        if token is not None:
            rows = torch.cat([rows, fuse(whole[-1:], torch.tensor([token]))])
    return torch.stack(states)[: drafter.num_heads]


def hydra_plainly(target, drafter, tokens):
    """W c + SiLU(A c), c = [b ; E(pending) ; E(path)]."""
    hidden, next_ids = context(target)
    base, positions, read = hidden, torch.arange(len(hidden))[None], target.shared.embed
    if drafter.config.base == "staged":
        stage, read = drafter.stage, lambda ids: drafter.embedding_norm(target.shared.embed(ids))
        rows = F.linear(torch.cat([stage.state_norm(hidden), read(next_ids)], -1), stage.fuse.weight)
        base = stage.layer(rows[None], positions=positions, is_causal=True)[0]
    elif drafter.config.base == "prefix":
        base = drafter.prefix.norm(drafter.prefix.layer(hidden[None], positions=positions, is_causal=True)[0])
    inputs, states = torch.cat([base[-1], read(next_ids[-1:])[0]]), []
    for k, (first, *others) in enumerate(drafter.heads):
        state = F.linear(inputs, first.residual.weight, first.residual.bias)
        state = state + F.silu(F.linear(inputs, first.linear.weight, first.linear.bias))
        for block in others:
            state = state + F.silu(F.linear(state, block.linear.weight, block.linear.bias))
        states.append(state if drafter.output_norm is None else drafter.output_norm(state))
        inputs = torch.cat([inputs, read(torch.tensor(tokens[k : k + 1]))[0]]) if k < len(tokens) else inputs
    return torch.stack(states)


def tandem_plainly(target, drafter, tokens):
    """Each layer over the target's projected rows and the path's own, whose queries alone count."""
    rows, next_ids = context(target, taps=drafter.taps)
    last, *taps = rows.split(32, -1)
    given, sizes = [int(next_ids[-1]), *tokens][: drafter.num_heads], drafter.layers[0].sizes
    x = F.linear(drafter.embedding_norm(target.shared.embed(torch.tensor(given))), drafter.widen.weight)
    places = torch.arange(len(rows) + len(given))[None]
    tables = rotary_tables(places, sizes.head_size, sizes.rope_theta)
    sees = places[0, len(rows) :, None] >= places
    sees[:, : len(rows)] = drafter.config.reads_target
    for norm, project, layer, source in zip(
        drafter.source_norms, drafter.sources, drafter.layers, [*taps, last], strict=True
    ):
        attention, own = layer.attention, layer.attention_norm(x)
        keys, values = attention.keys_values(torch.cat([F.linear(norm(source), project.weight), own])[None], tables)
        queries = attention.queries(torch.cat([torch.zeros(len(rows), 32), own])[None], tables)[:, :, len(rows) :]
        mixed = F.scaled_dot_product_attention(queries, keys, values, attn_mask=sees, enable_gqa=True)
        x = layer.widened(x + attention.output(mixed[0].transpose(0, 1).flatten(1)))
    return drafter.output_norm(x)


def early_exit_plainly(target, drafter, tokens):
    """The stream beside the stock model's own residuals, over the whole text and path; read at the path's rows."""
    given, size = [*IDS, 1, *tokens], (32,)
    model, kept = target.model.get_decoder(), []
    hooks = [layer.register_forward_hook(lambda *given: kept.append(given[-1][0])) for layer in model.layers]
    model(input_ids=torch.tensor([given]), use_cache=False)
    for hook in hooks:
        hook.remove()
    before, stream = target.shared.embed(torch.tensor(given)), target.shared.embed(torch.tensor(given))
    for number, after in enumerate(kept[: drafter.num_early]):
        added = 0.0
        if drafter.config.rank:
            adapter, inputs = drafter.adapters[number], (F.rms_norm(x, size, eps=1e-6) for x in (stream, after))
            added = F.linear(F.silu(F.linear(torch.cat([*inputs], -1), adapter.down.weight)), adapter.up.weight)
        stream, before = stream + (after - before) + added, after
    return drafter.output_norm(stream)[len(IDS) :][: drafter.num_heads]


def falcon_plainly(target, drafter, tokens):
    """Pass by pass: k rows of all there are ask all there are, and what they become makes the next k."""
    (hidden, *taps), next_ids = context(target, taps=drafter.taps)[0].split(32, -1), context(target)[1]
    stage, size, layer, cell = drafter.stage, drafter.config.block_size, drafter.stage.layer, torch.nn.LSTMCell(32, 32)
    embed = lambda ids: drafter.embedding_norm(target.shared.embed(ids))  # noqa: E731
    if drafter.recurrence is not None:  # torch's own order of gates: write, keep, new, show
        for rows, weight in zip(
            (cell.weight_ih, cell.weight_hh, cell.bias_ih),
            (drafter.recurrence.read.weight, drafter.recurrence.carry.weight, drafter.recurrence.read.bias),
            strict=True,
        ):
            rows.data = weight[[*range(32, 64), *range(32), *range(96, 128), *range(64, 96)]]
        cell.bias_hh.data.zero_()

    def mixed(states, ids, memory, extra=0):
        found = []
        for row in F.linear(torch.cat([stage.state_norm(states), embed(ids)], -1), stage.fuse.weight) + extra:
            if drafter.recurrence is not None:
                added, cell_state = cell(row, memory)
                row = row + added
                memory = row, cell_state
            found.append(row)
        return torch.stack(found), memory

    extra, states = 0, []
    if taps:
        normed = [norm(tap) for norm, tap in zip(drafter.tap_norms, taps, strict=True)]
        extra = F.linear(torch.cat(normed, -1), drafter.fuse_taps.weight)
    rows, memory = mixed(hidden, next_ids, (torch.zeros(32), torch.zeros(32)), extra)
    while len(states) < drafter.num_heads:
        asking = rows[-size:] if drafter.slot_positions is None else rows[-1:] + drafter.slot_positions
        tables = rotary_tables(torch.arange(len(rows))[None], layer.sizes.head_size, layer.sizes.rope_theta)
        keys, values = layer.attention.keys_values(layer.attention_norm(rows)[None], tables)
        padded = torch.cat([rows[:-size] * 0, layer.attention_norm(asking)])
        queries = layer.attention.queries(padded[None], tables)[:, :, -size:]
        mix = F.scaled_dot_product_attention(queries, keys, values, enable_gqa=True)
        made = layer.widened(asking + layer.attention.output(mix[0].transpose(0, 1).flatten(1)))
        read, tokens = torch.tensor([*tokens[:size], *[0] * size][:size]), tokens[size:]
        further, memory = mixed(made, read, memory)
        rows, states = torch.cat([rows, further]), [*states, *drafter.output_norm(made)]
    return torch.stack(states[: drafter.num_heads])


PLAINLY = {
    "eagle": eagle_plainly,
    "falcon": falcon_plainly,
    "hydra": hydra_plainly,
    "tandem": tandem_plainly,
    "early-exit": early_exit_plainly,
}


def check_equations(target, drafters, name):
    drafter = drafters[name]
    plainly = PLAINLY[drafter.name]
    with torch.inference_mode():
        expected = plainly(target, drafter, PATH[: drafter.num_heads - 1])
    found = heads_along(drafter, fed(target, drafter), PATH)
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("name", SEQUENTIAL)
def test_heads_say_what_the_equations_say(target, drafters, name):
    check_equations(target, drafters, name)


# -- a node of a wide tree is as on its path alone -------------------------------------------------------------------


def paths_looked_below(candidates):
    """(tokens of a path, the children on offer below it, their log-probabilities), the root's empty path first."""
    yield [], candidates.tokens[0], candidates.log_probs[0]
    paths = [[token] for token in candidates.tokens[0]]
    for depth in range(1, candidates.num_heads):
        following = [None] * len(candidates.tokens[depth])
        for path, places, logs in zip(
            paths, candidates.below.ranks[depth - 1], candidates.below.log_probs[depth - 1], strict=True
        ):
            if places:
                tokens = [candidates.tokens[depth][place] for place in places]
                yield path, tokens, logs
                for place, token in zip(places, tokens, strict=True):
                    following[place] = [*path, token]
        paths = following
        assert None not in paths, "all that is on offer stands below something"


def check_wide_trees(target, drafters, name):
    drafter = drafters[name]
    states = [fed(target, drafter), fed(target, drafter, 7), fed(target, drafter, 12, (1, 1))]
    asks = [Ask(states[0], drafter.num_heads), Ask(states[1], 2), Ask(states[2], drafter.num_heads)]
    widths = []
    some = lambda drafts: [[0, 2, len(draft.tokens[-1]) - 1] for draft in drafts]  # noqa: E731
    for ask, candidates in zip(asks, drafter.draft_all(asks, 9, some), strict=True):
        divisors = drafter.head_temperatures()
        assert candidates.num_heads == ask.max_depth
        assert candidates.num_rounds == math.ceil(ask.max_depth / drafter.heads_a_round)
        for number, (path, tokens, logs) in enumerate(paths_looked_below(candidates)):
            head = len(path)
            state = heads_along(drafter, ask.state, path)[-1 if head else 0]
            with torch.inference_mode():
                alone = drafter.head_logits(state, head).float() / divisors[head]
                ids, values = drafter.top_ranks(alone, 9)
            assert tokens == ids.tolist() and logs == pytest.approx(values.tolist(), abs=2e-5)
            widths.append(number)
    assert max(widths) >= 6, "several nodes of a round are looked below"


@pytest.mark.parametrize("name", SEQUENTIAL)
def test_a_node_in_a_wide_tree_is_as_alone_on_its_path(precise, name):
    check_wide_trees(*precise, name)


# -- nothing of a draft is left --------------------------------------------------------------------------------------


def snapshot(state):
    """The target's cache is among those of a drafter that reads it: all its layers, and what was never written."""
    caches = [(cache.num_rows, cache.storage[..., : cache.num_rows, :].clone()) for cache in state.caches]
    for layer in state.target_cache.layers:
        caches += [(layer.num_rows, rows.nan_to_num().clone()) for rows in (layer.keys, layer.values)]
    return state.num_rows, copy.deepcopy(state.features), caches


def check_leaves_nothing(target, drafters, name):
    drafter, state = drafters[name], fed(target, drafters[name])
    before = snapshot(state)
    first = drafter.draft(state, 9)
    num_rows, features, caches = snapshot(state)
    assert num_rows == before[0] and (features is before[1] is None or torch.equal(features, before[1]))
    for (rows, kept), (rows_before, kept_before) in zip(caches, before[2], strict=True):
        assert rows == rows_before and torch.equal(kept, kept_before)
    assert drafter.draft(state, 9) == first, "drafting twice is as drafting once"


@pytest.mark.parametrize("name", SEQUENTIAL)
def test_a_draft_leaves_nothing_behind(target, drafters, name):
    check_leaves_nothing(target, drafters, name)


# -- mutations -------------------------------------------------------------------------------------------------------


def _position_off_by_one(monkeypatch):
    tables = path_rows.rotary_tables
    monkeypatch.setattr(path_rows, "rotary_tables", lambda positions, *sizes: tables(positions + 1, *sizes))


def _a_row_of_the_context_too_few(monkeypatch):
    of_one = path_rows._mix_of_one
    monkeypatch.setattr(path_rows, "_mix_of_one", lambda q, k, v, seen, context: of_one(q, k, v, seen - 1, context))


def _a_sibling_is_seen(monkeypatch):
    """The rows of the neighbouring path in place of its own."""
    of_one = path_rows._mix_of_one
    monkeypatch.setattr(
        path_rows, "_mix_of_one", lambda q, k, v, *others: of_one(q, k.roll(1, 0), v.roll(1, 0), *others)
    )


def _a_drafted_row_is_kept(monkeypatch):
    for kind in (Eagle, Falcon):

        def begin(drafter, states, first=kind.first):
            drafter.__dict__["asked"] = states
            return first(drafter, states)

        def keep(drafter, paths, tokens, following=kind.next):
            found = following(drafter, paths, tokens)
            drafter.__dict__["asked"][0].caches[0].append(found.keys[:1, :, -1:], found.values[:1, :, -1:])
            return found

        monkeypatch.setattr(kind, "first", begin)
        monkeypatch.setattr(kind, "next", keep)


def _positions_of_the_target_off_by_one(monkeypatch):
    read = LeanModel.read_early
    monkeypatch.setattr(
        LeanModel, "read_early", lambda lean, ids, at, *given: read(lean, ids, [place + 1 for place in at], *given)
    )


def _residuals_a_layer_off(monkeypatch):
    read = LeanModel.read_early
    monkeypatch.setattr(LeanModel, "read_early", lambda *given: (lambda found: [found[0], *found[:-1]])(read(*given)))


def _a_row_of_the_targets_cache_is_written(monkeypatch):
    before = EarlyExit._before

    def written(drafter, layer, paths, firsts):
        paths.sequences[0].target_cache.layers[layer].append(*(rows[:1, layer] for rows in (paths.keys, paths.values)))
        return before(drafter, layer, paths, firsts)

    monkeypatch.setattr(EarlyExit, "_before", written)


def _reads_the_token_before(monkeypatch):
    monkeypatch.setattr(Hydra, "next", lambda drafter, paths, tokens: hydra.Hydra._paths(
        drafter, paths.base, torch.cat([paths.read, paths.read[:, -drafter.spec.embedding_size :]], -1)))  # fmt: skip


def _another_path_is_gone_on_from(monkeypatch):
    at = rounds.Paths.at
    monkeypatch.setattr(rounds.Paths, "at", lambda paths, index: at(paths, (index - 1).clamp_min(0)))


def _a_row_of_the_block_is_unseen(monkeypatch):
    of_one = path_rows._mix_of_one
    monkeypatch.setattr(
        path_rows, "_mix_of_one", lambda q, k, v, *others: of_one(q, k[:, :, :-1], v[:, :, :-1], *others)
    )


def _taps_a_layer_off(monkeypatch):
    fused = FusedHeads.fused
    off = lambda drafter, hidden, ids: fused(drafter, hidden.roll(drafter.spec.hidden_size, -1), ids)  # noqa: E731
    monkeypatch.setattr(FusedHeads, "fused", off)


def _memory_is_forgotten(monkeypatch):
    mixed = Falcon._mixed
    monkeypatch.setattr(Falcon, "_mixed", lambda drafter, rows, memory: mixed(drafter, rows, memory * 0))


MUTATIONS = [
    (_position_off_by_one, check_equations, "eagle-full"),
    (_a_row_of_the_context_too_few, check_equations, "eagle-full"),
    (_a_sibling_is_seen, check_wide_trees, "eagle-full"),
    (_position_off_by_one, check_equations, "tandem-taps"),
    (_a_sibling_is_seen, check_wide_trees, "tandem-taps"),
    (_positions_of_the_target_off_by_one, check_equations, "early-exit-full"),
    (_residuals_a_layer_off, check_equations, "early-exit-full"),
    (_residuals_a_layer_off, check_equations, "early-exit-bare"),
    (_a_row_of_the_context_too_few, check_equations, "early-exit-full"),
    (_a_sibling_is_seen, check_wide_trees, "early-exit-full"),
    (_another_path_is_gone_on_from, check_wide_trees, "early-exit-full"),
    (_a_row_of_the_targets_cache_is_written, check_leaves_nothing, "early-exit-full"),
    (_a_drafted_row_is_kept, check_leaves_nothing, "eagle-full"),
    (_position_off_by_one, check_equations, "falcon-pairs"),
    (_a_row_of_the_context_too_few, check_equations, "falcon-last"),
    (_a_row_of_the_block_is_unseen, check_equations, "falcon-pairs"),
    (_taps_a_layer_off, check_equations, "falcon-triples"),
    (_memory_is_forgotten, check_equations, "falcon-pairs"),
    (_a_sibling_is_seen, check_wide_trees, "falcon-pairs"),
    (_another_path_is_gone_on_from, check_wide_trees, "falcon-pairs"),
    (_a_drafted_row_is_kept, check_leaves_nothing, "falcon-triples"),
    (_reads_the_token_before, check_equations, "hydra-staged"),
    (_another_path_is_gone_on_from, check_wide_trees, "hydra-hidden"),
]


@pytest.mark.parametrize(("mutation", "check", "name"), MUTATIONS, ids=lambda value: getattr(value, "__name__", value))
def test_a_mutation_is_seen(target, drafters, monkeypatch, mutation, check, name):
    mutation(monkeypatch)
    with pytest.raises(AssertionError):
        check(target, drafters, name)


# -- the rounds that are taken ---------------------------------------------------------------------------------------


def everything(drafter, state, num_ranks, max_depth):
    """All that could ever be on offer: a look below every token."""
    every = lambda drafts: [range(len(draft.tokens[-1])) for draft in drafts]  # noqa: E731
    return drafter.draft_all([Ask(state, max_depth)], num_ranks, every)[0]


@pytest.mark.parametrize("num_nodes", [2, 5, 9])
@pytest.mark.parametrize("name", ["hydra-staged", "eagle-full", "falcon-pairs"])
def test_the_rounds_find_the_best_tree_of_all(target, drafters, name, num_nodes):
    drafter, grower = drafters[name], DynamicGrower(num_nodes)
    state = fed(target, drafter)
    asked = drafter.draft_all([Ask(state, 3)], grower.num_ranks, looks_of(grower, max_depth=3))[0]
    found = grower.grow(7, asked, 3)
    best = best_first(7, everything(drafter, state, grower.num_ranks, 3), num_nodes, 3)
    assert found.tree == best.tree() and found.scores == pytest.approx(best.scores, abs=1e-5)


def looks_of(grower, max_depth, looked=None):
    def look(drafts):
        rows = [DraftRow(DraftController(), None, max_depth, 7) for _ in drafts]
        places = grower.look_below(rows, drafts, range(len(drafts)), Forward(len(drafts), len(drafts)))
        if looked is not None:
            looked.append(places)
        return places

    return look


def test_no_depth_beyond_the_heads_is_asked_for(target, drafters):
    drafter = drafters["hydra-hidden"]
    assert drafter.draft(fed(target, drafter), 2, 99).num_heads == 3


def test_growers_look_below_what_may_have_children(target, drafters):
    drafter = drafters["eagle-full"]
    state = fed(target, drafter)
    template = TreeTemplate.from_paths([[0], [1], [2], [0, 0], [0, 1], [2, 0], [2, 0, 1]])
    for grower, numbers, size in ((ChainGrower(), [1, 1, 1], 5), (StaticGrower(template), [2, 1], 8)):
        looked, depth = [], min(4, grower.max_depth)
        (found,) = drafter.draft_all([Ask(state, depth)], grower.num_ranks, looks_of(grower, 9, looked))
        assert [len(places) for (places,) in looked] == numbers
        assert grower.grow(7, found, 9).tree.num_nodes == size


COSTS = Costs([1.0 + 0.02 * n for n in range(24)], draft=0.1)


def surer(drafter, divisor):
    """It names the same tokens."""
    sure, divisors = copy.copy(drafter), [divisor] * drafter.num_heads
    sure.calibration = Calibration(greedy=divisors, sampled=divisors)
    return sure


@pytest.mark.parametrize(("seconds", "least", "most"), [(1e-4, 3, 4), (0.35, 1, 3), (9.0, 1, 1)])
def test_a_round_is_taken_as_far_as_it_pays(target, drafters, seconds, least, most):
    drafter = surer(drafters["hydra-staged"], 0.2)
    state = fed(target, drafter)
    grower = AutoGrower(Costs(COSTS.verify, draft=0.1, further_round=seconds))
    (found,) = drafter.draft_all([Ask(state, 4)], 6, looks_of(grower, 4))
    assert least <= found.num_rounds <= most


@pytest.mark.parametrize(("seconds", "depth", "num_rounds"), [(1e-4, 4, 2), (9.0, 2, 1)])
def test_a_depth_of_the_same_pass_costs_no_round(target, drafters, seconds, depth, num_rounds):
    drafter = surer(drafters["falcon-pairs"], 0.2)
    grower = AutoGrower(Costs(COSTS.verify, draft=0.1, further_round=seconds))
    (found,) = drafter.draft_all([Ask(fed(target, drafter), 4)], 6, looks_of(grower, 4))
    assert (found.num_heads, found.num_rounds, found.further_round) == (depth, num_rounds, True)


def test_tokens_of_a_block_have_the_same_children(target, drafters):
    drafter = drafters["falcon-pairs"]
    found = everything(drafter, fed(target, drafter), 3, 4)
    assert [len(tokens) for tokens in found.tokens] == [3, 9, 27, 81]
    assert [len({*map(tuple, given)}) for given in found.below.log_probs] == [1, 9, 9]


def test_what_rounds_cost_is_weighed_and_learned(target, drafters):
    """Steps know how many rounds they took; a batch asks all its sequences in the same ones."""
    drafter = surer(drafters["hydra-staged"], 0.1)
    grower = Steady(Costs([1.0 + 0.01 * n for n in range(40)], draft=0.01, further_round=0.001))
    engine = Engine(target, drafter, grower)
    calls, following = [], Hydra.next
    sequences = [begin(engine, [9 + i, 17, 30], SamplingParams(max_new_tokens=9)) for i in range(3)]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Hydra, "next", lambda *given: calls.append(len(given[2])) or following(*given))
        engine.step(sequences)
    assert 1 <= len(calls) <= 3 and calls[0] >= 3, "one call a round, whatever the number of sequences"
    assert grower.rounds.number > 1
    costs = grower.costs
    assert costs.drafting(1, 3) == pytest.approx(0.012) and costs.drafting(1, 1) == 0.01
    assert Costs([1.0], 0.1, drafted=0.05, further_round=0.02).drafting(3, 2) == pytest.approx(0.24)


@pytest.mark.parametrize("tree", ["chain", "9", "auto"])
@pytest.mark.parametrize("name", ["hydra-staged", "eagle-full", "falcon-pairs", "early-exit-bare"])
def test_expected_equals_realised_where_the_target_is_the_drafter(target, drafters, name, tree):
    """Sampled from the drafter's own words along the path, tokens are accepted as often as promised."""
    drafter = drafters[name]
    grower = AutoGrower(COSTS) if tree == "auto" else parse_tree(tree)
    source, expected, realised, draws = torch.Generator().manual_seed(0), 0.0, 0, 150
    for length in (5, 7, 9, 12):
        state = fed(target, drafter, length, (2, 1))
        depth = min(drafter.num_heads, grower.max_depth)
        (found,) = drafter.draft_all([Ask(state, depth)], grower.num_ranks, looks_of(grower, depth))
        growth = grower.grow(7, found, depth)
        expected += draws * growth.expected
        probs = {}
        for _ in range(draws):
            node, path = 0, []
            while node is not None and len(path) < depth:
                if tuple(path) not in probs:
                    with torch.inference_mode():
                        state_k = heads_along(drafter, state, path)[len(path)]
                        probs[tuple(path)] = drafter.head_logits(state_k, len(path)).softmax(-1)
                place = int(torch.multinomial(probs[tuple(path)], 1, generator=source))
                token = place if drafter.draft_ids is None else int(drafter.draft_ids[place])
                node, path = growth.tree.child(node, token), [*path, token]
                realised += node is not None
    assert realised == pytest.approx(expected, rel=0.15, abs=3 * math.sqrt(draws))
    assert expected > 0


@pytest.mark.parametrize("name", ["hydra-staged", "eagle-full", "falcon-pairs", "early-exit-full"])
def test_a_draft_that_is_broken_off_is_as_if_it_had_never_begun(target, drafters, name, monkeypatch):
    """In the second round, when rows were fed already."""
    drafter = drafters[name]
    params = SamplingParams(max_new_tokens=12)
    expected = decode(Engine(target, drafter, parse_tree(7)), IDS[:4], params)
    sequence = begin(engine := Engine(target, drafter, parse_tree(7)), IDS[:4], params)
    step(engine, sequence)
    following = type(drafter).next

    def break_off(*given):
        monkeypatch.setattr(type(drafter), "next", following)
        raise KeyboardInterrupt

    monkeypatch.setattr(type(drafter), "next", break_off)
    with pytest.raises(KeyboardInterrupt):
        engine.step([sequence])
    while not sequence.is_finished:
        step(engine, sequence)
    assert sequence.output_ids == expected.output_ids and sequence.stats.accepted == expected.stats.accepted


# -- products in C ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", SEQUENTIAL)
def test_products_in_c_give_what_torch_gives(target, drafters, name):
    drafter = drafters[name]
    exact = copy.deepcopy(drafter).freeze(native=True, exact=True)
    rounded = copy.deepcopy(drafter).to(torch.bfloat16).freeze(native=True)
    assert exact.why_not_native is rounded.why_not_native is None and rounded.num_weights == drafter.num_weights
    assert exact.cost_key["form"] == "native" and rounded.row_bytes == drafter.row_bytes
    states = [fed(target, one) for one in (drafter, exact, rounded)]
    with torch.inference_mode():
        expected, found, near = (
            torch.stack([one.head_logits(row, k) for k, row in enumerate(heads_along(one, state, PATH))])
            for one, state in zip((drafter, exact, rounded), states, strict=True)
        )
    torch.testing.assert_close(found, expected, atol=1e-4, rtol=1e-5)
    assert 0 < float((near - expected).norm() / expected.norm()) < 0.15
    assert exact.draft(states[1], 7).tokens == drafter.draft(states[0], 7).tokens
    assert not any(isinstance(module, torch.nn.Linear) for module in rounded.modules())
    params = SamplingParams(max_new_tokens=16)
    plain = decode(Engine(target, Proposer(), parse_tree(1)), IDS[:5], params).output_ids
    assert decode(Engine(target, rounded, parse_tree(9)), IDS[:5], params).output_ids == plain


def test_without_a_compiler_torch_multiplies(target, drafters, monkeypatch, caplog):
    def none(*_):
        raise NativeError("there is no compiler")

    monkeypatch.setattr("amphista.native.weights.load", none)
    drafter = copy.deepcopy(drafters["hydra-prefix"]).freeze(native=True)
    assert drafter.why_not_native == "there is no compiler" and "slower" in caplog.text
    state = fed(target, drafter)
    assert drafter.draft(state, 5) == drafters["hydra-prefix"].draft(fed(target, drafters["hydra-prefix"]), 5)
