"""Probe rows ride on a forward and change nothing of it: no token sees a probe, whatever a drafter has put there.

Law: logits, hidden states and committed rows of all tokens are those of the same forward without probes, in every
family and form; what the probes give is what they give behind the text read alone (the training form); the same checks
must see each fault below.
"""

from __future__ import annotations

import dataclasses

import pytest
import torch

from amphista.drafter.bita import MOST
from amphista.errors import TargetError
from amphista.target import probe_rows
from amphista.target.attention import Layout
from amphista.target.spans import Span
from amphista.target.spec import Probes
from amphista.target.target import Target
from amphista.tree.token_tree import TokenTree
from tests.laws.test_fast_path import TREE, difference, prompt_of, shaken_model
from tests.laws.test_native import NEEDS_COMPILER
from tests.tiny import FAMILIES, WINDOW

NUM_PROBES, PREFIX, NODES, PATH = 3, 4, [0, 3, 9, 1], [0, 1, 3]
TOLERANCE = 1e-5
FAST = ["llama", "mistral-windowed", "qwen2-windowed", "qwen3", "gemma2", "gemma3-by-kind", "phi3-half"]
FAST += ["granite", "glm4"]
FORMS = [*((family, "stock") for family in FAMILIES), *((family, "fast") for family in FAST), ("llama", "static")]
FORMS += [pytest.param(family, "native", marks=NEEDS_COMPILER) for family in ("llama", "gemma2", "phi3-half", "glm4")]


def target_of(family: str, form: str) -> Target:
    target = Target(shaken_model(family), name=family, static=form == "static")
    if form != "stock":
        assert target.speed_up(native=form == "native")
    return target


def probes_for(target: Target, scale: float = 1.0, prefix: int = PREFIX) -> Probes:
    spec, generator = target.spec, torch.Generator().manual_seed(1)
    rows = (spec.num_layers, 2, spec.num_key_value_heads, prefix, spec.head_size)
    parts = ((NUM_PROBES, spec.embedding_size), rows)
    return Probes(*(scale * torch.randn(part, generator=generator).clamp(-1, 1) for part in parts))


def rode(target: Target, probes: Probes, length: int = 20):
    """(without, with) probes below some nodes of a tree: outputs, and the cache with the path committed."""
    found = []
    for nodes in ([], NODES):
        cache = target.new_cache()
        target.prefill(prompt_of(length), cache)
        (output,) = target.forward([Span(TREE, cache).probed(nodes, probes)])
        output = dataclasses.replace(output, logits=output.logits.clone(), hidden=output.hidden.clone())
        assert cache.num_rows == length + len(output.hidden)
        cache.commit(PATH), cache.check_integrity()
        found.append((output, cache))
    return found


def rows_of(cache) -> torch.Tensor:
    end = cache.num_committed
    return torch.stack([part[:, :, :end] for layer in cache.layers for part in (layer.keys, layer.values)])


def changed(target: Target, probes: Probes, length: int = 20) -> float:
    """By how much what belongs to tokens is another with probes."""
    (plain, kept), (probed, other) = rode(target, probes, length)
    size = TREE.num_nodes
    assert len(probed.logits) == size and len(probed.hidden) == size + NUM_PROBES * len(NODES)
    parts = [(probed.logits, plain.logits), (probed.hidden[:size], plain.hidden), (rows_of(other), rows_of(kept))]
    return max(difference(*part) for part in parts)


def apart(target: Target, probes: Probes) -> float:
    """By how much probes of decoding give something else than in training: below three nodes of a path."""
    _, (probed, _) = rode(target, probes)
    text = [*prompt_of(20), *(TREE.tokens[node] for node in PATH), 5, 6]
    with torch.no_grad():
        alone = target.probe_rows(text, torch.tensor([20, 21, 22]), probes)
    groups = probed.hidden[TREE.num_nodes :].view(len(NODES), NUM_PROBES, -1)
    below = [groups[NODES.index(node)] for node in PATH]
    return max(difference(*pair) for pair in zip(below, alone, strict=True))


@pytest.mark.parametrize(("family", "form"), FORMS)
def test_tokens_do_not_feel_the_probes(family, form):
    target = target_of(family, form)
    for probes in (probes_for(target), probes_for(target, prefix=0), probes_for(target, MOST)):
        assert changed(target, probes) < TOLERANCE
    assert changed(target, probes_for(target), 3 * WINDOW + 1) < TOLERANCE


@pytest.mark.parametrize(("family", "form"), FORMS)
def test_probes_give_in_decoding_what_they_give_in_training(family, form):
    target = target_of(family, form)
    assert apart(target, probes_for(target)) < TOLERANCE
    assert apart(target, probes_for(target, prefix=0)) < TOLERANCE


@pytest.mark.parametrize("form", ["fast", pytest.param("native", marks=NEEDS_COMPILER)])
@pytest.mark.parametrize("family", FAST)
def test_both_forms_give_the_same(family, form):
    stock, fast = target_of(family, "stock"), target_of(family, form)
    ours, theirs = (rode(target, probes_for(stock, 3.0))[1][0].hidden for target in (fast, stock))
    assert difference(ours, theirs) < TOLERANCE
    without = rode(fast, probes_for(stock, 3.0, prefix=0))[1][0].hidden
    assert difference(without[TREE.num_nodes :], ours[TREE.num_nodes :]) > 0.01, "the prefix is seen"


@pytest.mark.parametrize("form", ["stock", "fast"])
def test_several_sequences_are_probed_as_each_alone(form):
    target = target_of("mistral-windowed", form)
    probes, spans = probes_for(target), []
    for together in (True, False):
        for length, tree, nodes in ((11, TREE, NODES), (2, TokenTree([9], [-1]), []), (30, TokenTree([8], [-1]), [0])):
            cache = target.new_cache()
            target.prefill(prompt_of(length), cache)
            spans.append(Span(tree, cache).probed(nodes, probes))
        chunk = Span(TokenTree.chain([4, 5, 6]), target.new_cache(), only_last=True)
        spans.append(chunk)
        if together:
            outputs, spans = target.forward(spans), []
    alone = [target.forward([span])[0] for span in spans]
    for ours, theirs in zip(outputs, alone, strict=True):
        assert difference(ours.logits, theirs.logits) < TOLERANCE
        assert difference(ours.hidden, theirs.hidden) < TOLERANCE


@pytest.mark.parametrize("form", ["stock", "fast"])
def test_a_gradient_reaches_the_probes_and_nothing_else(form):
    target = target_of("llama", form)
    probes = probes_for(target)
    inputs, prefix = probes.inputs.clone().requires_grad_(), probes.prefix.clone().requires_grad_()
    text, positions = prompt_of(100), torch.arange(2, 90)  # more groups than are done at once

    def loss(inputs, prefix):
        return target.probe_rows(text, positions, Probes(inputs, prefix)).pow(2).mean()

    loss(inputs, prefix).backward()
    assert all(p.grad is None for p in target.model.parameters())
    for which, gradient in ((0, inputs.grad), (1, prefix.grad)):
        given = [probes.inputs.clone(), probes.prefix.clone()]
        step = torch.randn(given[which].shape, generator=torch.Generator().manual_seed(2))
        ends = []
        for sign in (1, -1):
            given[which] = (probes.inputs, probes.prefix)[which] + sign * 2e-3 * step
            with torch.no_grad():
                ends.append(float(loss(*given)))
        assert float((gradient * step).sum()) == pytest.approx((ends[0] - ends[1]) / 4e-3, rel=0.02, abs=1e-5)


def test_groups_at_the_end_of_the_context_stand_in_it():
    target = Target(shaken_model("gpt2", n_positions=16))
    with torch.no_grad():
        states = target.probe_rows(prompt_of(16), torch.tensor([9, 12, 14]), probes_for(target))
    assert torch.isfinite(states).all()
    with pytest.raises(TargetError, match="for 3 layers: 2 keep"):
        target.probe_rows([1, 2], torch.tensor([0]), Probes(torch.zeros(1, 32), torch.zeros(3, 2, 4, 1, 8)))


# -- faults that must be seen -----------------------------------------------------------------------------------------


def _positions_late(patch):
    positions = Span.positions.fget
    late = lambda span: [at + (t < 0) for at, t in zip(positions(span), span.tree.tokens, strict=True)]  # noqa: E731
    patch.setattr(Span, "positions", property(late))


def _prefix_seen_by_tokens(patch):
    of = Layout.of.__func__

    def all_see(cls, span, device):
        layout = of(cls, span, device)
        return layout if layout.free is None else dataclasses.replace(layout, visible=layout.visible | layout.free)

    patch.setattr(Layout, "of", classmethod(all_see))


def _prefix_in_no_window(patch):
    of = Layout.of.__func__
    patch.setattr(Layout, "of", classmethod(lambda *args: dataclasses.replace(of(*args), free=None)))


def _prefix_counted(patch):
    append = probe_rows.RowsWithTail.append

    def counted(self, keys, values):
        views = append(self, keys, values)
        self._rows.num_rows = views[0].shape[2]
        return views

    patch.setattr(probe_rows.RowsWithTail, "append", counted)


def _prefix_not_in_pairs(patch):
    tails = probe_rows.tails
    patch.setattr(probe_rows, "tails", lambda prefix, num, in_pairs: tails(prefix, num, in_pairs=False))


def _groups_see_each_other(patch):
    layout = probe_rows.Groups._layout

    def open_to_all(self, positions, num_read):
        found = layout(self, positions, num_read)
        return dataclasses.replace(found, visible=torch.ones_like(found.visible))

    patch.setattr(probe_rows.Groups, "_layout", open_to_all)


FAULTS = {
    "positions": (_positions_late, "llama", "fast"),
    "seen": (_prefix_seen_by_tokens, "llama", "fast"),
    "window": (_prefix_in_no_window, "mistral-windowed", "fast"),
    "counted": (_prefix_counted, "llama", "stock"),
    "groups": (_groups_see_each_other, "llama", "stock"),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_a_fault_is_seen(fault, monkeypatch):
    make, family, form = FAULTS[fault]
    target = target_of(family, form)
    probes = probes_for(target)
    with monkeypatch.context() as patch:
        make(patch)
        try:
            worst = max(changed(target, probes), apart(target, probes))
        except AssertionError:  # rows that were counted
            return
    assert worst > 1e-3


def test_keys_in_another_order_are_seen(monkeypatch):
    stock, fast = target_of("llama", "stock"), target_of("llama", "fast")
    _prefix_not_in_pairs(monkeypatch)
    ours, theirs = (rode(target, probes_for(stock))[1][0].hidden for target in (fast, stock))
    assert difference(ours, theirs) > 1e-3
