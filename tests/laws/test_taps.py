"""Taps are the states after the layers they name: the stock model's own, in every form, of prompts, trees and batches.

Law: behind the hidden states, which are those without taps, stand what `output_hidden_states` of the stock model shows;
and a drafter that may read them begins as one that does not.
"""

from __future__ import annotations

import dataclasses

import pytest
import torch

from amphista.drafter.amphista import Amphista, AmphistaConfig
from amphista.errors import ConfigError, TargetError
from amphista.target.captured_forward import CapturedForward
from amphista.target.spans import Span
from amphista.target.target import Target
from amphista.tree.token_tree import TokenTree
from tests.laws.test_fast_path import TOLERANCE, TREE, difference, prompt_of, shaken_model
from tests.laws.test_native import NEEDS_COMPILER
from tests.tiny import FAMILIES, tiny_target

LAYERS = 4
FINAL_NORMS = ("norm", "ln_f", "final_layer_norm")
FORMS = ["fast", "static", pytest.param("native", marks=NEEDS_COMPILER)]
TAPS = [(1,), (2, 3), (1, 2, 3, 4)]


def form_of(name: str, family: str) -> Target:
    target = Target(shaken_model(family, num_hidden_layers=LAYERS), name=name, static=name == "static")
    assert target.speed_up(native=name == "native")
    assert target.path == {"static": "fast-static"}.get(name, name)
    return target


def rows_of(target: Target, taps) -> list[torch.Tensor]:
    """Of a prompt in chunks, a tree, a tree behind its accepted path, a single node, and two sequences side by side."""
    caches = [target.new_cache() for _ in range(2)]
    first = [target.prefill(prompt_of(length), cache, taps) for length, cache in zip((21, 4), caches, strict=True)]
    tree = target.verify(TREE, caches[0], taps).hidden.clone()
    caches[0].commit([0, 2, 5])
    again = target.verify(TREE, caches[0], taps).hidden.clone()
    caches[0].commit([0, 1, 3])
    alone = target.verify(TokenTree([9], [-1]), caches[0], taps).hidden.clone()
    caches[0].commit([0])
    spans = [Span(TREE, caches[0]), Span(TokenTree.chain([5, 6, 7]), caches[1], only_last=True)]
    return [*(output.hidden for output in first), tree, again, alone, *(o.hidden for o in target.forward(spans, taps))]


def worst(ours: Target, theirs: Target, taps) -> float:
    size = ours.spec.hidden_size
    pairs = zip(rows_of(ours, taps), rows_of(theirs, taps), strict=True)
    return max(difference(a, b) for rows in pairs for a, b in zip(*(row.split(size, 1) for row in rows), strict=True))


@pytest.mark.parametrize("family", FAMILIES)
def test_taps_are_what_the_stock_model_shows(family):
    target, ids = tiny_target(family), torch.tensor([prompt_of(12)])
    target.prefill(prompt_of(12), target.new_cache())
    assert list(target._stock_forward._kept._hooks) == [0], "no layer is hooked before its tap is asked for"
    rows = target.hidden_states(ids, (1, 2))
    with torch.inference_mode():
        embedded, first, last = target.model(input_ids=ids, output_hidden_states=True).hidden_states
        norm = next(m for name, m in target.model.named_modules() if name.split(".")[-1] in FINAL_NORMS)
        hidden, tapped, end = rows.split(target.spec.hidden_size, dim=-1)
        for ours, theirs in ((hidden, last), (tapped, first), (norm(end), last)):
            torch.testing.assert_close(ours, theirs, atol=1e-5, rtol=1e-5)
    assert min(difference(tapped, other) for other in (embedded, end)) > 0.01, "a layer off is seen"
    found = target.prefill(prompt_of(12), target.new_cache(), (1, 2)).hidden
    assert difference(found, rows[0]) < TOLERANCE


@pytest.mark.parametrize("taps", TAPS, ids=str)
@pytest.mark.parametrize("family", ["llama", "mistral-windowed"])
@pytest.mark.parametrize("form", FORMS)
def test_every_form_has_the_same_taps(form, family, taps, monkeypatch):
    monkeypatch.setattr("amphista.target.target.PREFILL_CHUNK", 9)
    target, stock = form_of(form, family), Target(shaken_model(family, num_hidden_layers=LAYERS))
    assert worst(target, stock, taps) < TOLERANCE
    plain, size = rows_of(target, ()), target.spec.hidden_size
    for rows, without in zip(rows_of(target, taps), plain, strict=True):
        assert torch.equal(rows[:, :size], without), "a tap changes no bit of what is beside it"


@pytest.mark.parametrize("form", ["fast", "static", "stock"])
def test_a_tap_of_another_layer_is_seen(form, monkeypatch):
    stock = Target(shaken_model("llama", num_hidden_layers=LAYERS))
    target = Target(shaken_model("llama", num_hidden_layers=LAYERS)) if form == "stock" else form_of(form, "llama")
    if form == "stock":
        keep, other = target._stock_forward._kept._keep, {2: 3, 3: 2}
        monkeypatch.setattr(target._stock_forward._kept, "_keep", lambda which: keep(other.get(which, which)))
    else:
        target._lean.layers = [dataclasses.replace(layer, number=layer.number + 1) for layer in target._lean.layers]
        assert isinstance(target._captured, CapturedForward) == (form == "static")
    assert worst(target, stock, (2, 3)) > 0.01


def test_half_precision_reads_taps_of_its_own_type():
    target = Target(shaken_model("llama", num_hidden_layers=LAYERS).bfloat16())
    fast = Target(shaken_model("llama", num_hidden_layers=LAYERS).bfloat16())
    fast.speed_up()
    ours, theirs = (t.prefill(prompt_of(9), t.new_cache(), (2,)).hidden for t in (fast, target))
    assert ours.dtype is theirs.dtype is torch.bfloat16
    assert difference(ours.float(), theirs.float()) < 0.05


def test_layers_that_keep_no_hidden_states_are_refused():
    target = tiny_target()
    target.model.get_decoder().layers[0].register_forward_hook(lambda module, args, output: output[..., :8])
    with pytest.raises((TargetError, RuntimeError)):
        target.hidden_states(torch.tensor([[1, 2]]), (1,))
    other = tiny_target()
    other.model.get_decoder().layers = torch.nn.Sequential(*other.model.get_decoder().layers)
    with pytest.raises(TargetError, match="no list of layers"):
        other.prefill([1, 2], other.new_cache(), (1,))


# -- what reads them --------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def pair(target):
    """The same untrained drafter with and without taps."""
    made = []
    for taps in ((), (1, 2)):
        torch.manual_seed(3)
        made.append(Amphista(AmphistaConfig(num_heads=3, taps=taps), target.spec, target.shared))
    plain, tapped = made
    weights = {name: tensor for name, tensor in plain.state_dict().items() if "stages.0.fuse" not in name}
    tapped.load_state_dict(weights, strict=False)
    return plain, tapped


def states(target, drafter, scale=1.0):
    ids, size = torch.tensor([prompt_of(10)]), target.spec.hidden_size
    hidden = target.hidden_states(ids, drafter.taps).clone()
    hidden[..., size:] *= scale
    return drafter.head_states(hidden, ids.roll(-1, 1), torch.arange(10))


def test_an_untrained_switch_changes_nothing_and_learns(target, pair):
    plain, tapped = pair
    assert tapped.num_weights > plain.num_weights
    assert torch.equal(*(states(target, drafter) for drafter in pair))
    states(target, tapped).pow(3).sum().backward()
    gradient = tapped.stages[0].fuse.weight.grad[:, 2 * target.spec.hidden_size :]
    assert (gradient.abs().sum(1) > 0).all()
    tapped.zero_grad()


def test_huge_taps_are_normed(target, pair):
    """In some rows they are: nothing that is read of them grows with them."""
    drafter = pair[1]
    with torch.no_grad():
        drafter.stages[0].fuse.weight.normal_(0, 0.2, generator=torch.Generator().manual_seed(1))
        as_they_are, huge, other = (states(target, drafter, scale) for scale in (1.0, 1e4, -1.0))
    torch.testing.assert_close(as_they_are, huge, atol=1e-3, rtol=1e-3)
    assert float((as_they_are - other).abs().max()) > 0.1, "they are read"


@pytest.mark.parametrize("taps", [(0,), (3,), (2, 1), (1, 1)], ids=str)
def test_what_is_no_layer_is_refused(target, taps):
    with pytest.raises(ConfigError, match=r"taps are .*numbers of layers, 1 to 2, ascending"):
        Amphista(AmphistaConfig(taps=taps), target.spec, target.shared)


def test_without_a_stage_nobody_reads_them():
    with pytest.raises(ConfigError, match="stages is 0"):
        AmphistaConfig(stages=0, taps=(1,))
