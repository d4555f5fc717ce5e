"""Law 7 for every objective: its value is the equation written out in plain Python, its gradient that of the equation,
alone and inside the whole loss with depth weights, a draft vocabulary and accept-until-fail. All in float64.

Positions x heads x vocabulary never exist at once: after the forward pass autograd holds nothing of vocabulary size.
"""

from __future__ import annotations

import dataclasses
import gc
import math
import weakref

import pytest
import torch

from amphista.config import build
from amphista.drafter.amphista import Amphista, AmphistaConfig
from amphista.drafter.eagle import Eagle, EagleConfig
from amphista.drafter.early_exit import EarlyExit, EarlyExitConfig
from amphista.drafter.falcon import Falcon, FalconConfig
from amphista.drafter.frozen_head import FrozenHead
from amphista.drafter.hydra import Hydra, HydraConfig
from amphista.drafter.medusa import Medusa, MedusaConfig
from amphista.errors import ConfigError
from amphista.kernels import shapes
from amphista.train import head_loss, losses
from amphista.train.config import TrainConfig
from amphista.train.dataset import HiddenStates, collate, frequent_tokens
from amphista.train.head_loss import AnswerRows, HeadLoss
from amphista.train.losses import LossConfig
from amphista.train.prompts import TokenRow
from amphista.train.validation import validate
from tests.decoding import training_rows
from tests.tiny import EOS, VOCAB, shaken, tiny_target

# -- every objective alone, written out -------------------------------------------------------------------------------


def soft(q, p, label):
    return -sum(pv * math.log(qv) for pv, qv in zip(p, q, strict=True))


def text(q, p, label):
    return -math.log(q[label]) if label >= 0 else 0.0


def variation(q, p, label):
    return 0.5 * sum(abs(pv - qv) for pv, qv in zip(p, q, strict=True))


def acceptance(q, p, label):
    return -math.log(sum(min(pv, qv) for pv, qv in zip(p, q, strict=True)))


def hybrid(q, p, label, eta=3.0):
    alpha = sum(min(pv, qv) for pv, qv in zip(p, q, strict=True))
    divergence = sum(pv * math.log(pv / qv) for pv, qv in zip(p, q, strict=True) if pv > 0)
    return math.exp(-eta * alpha) * divergence + (1 - math.exp(-eta * alpha)) * (1 - alpha)


BY_HAND = {
    "soft_weight": soft,
    "text_weight": text,
    "variation_weight": variation,
    "acceptance_weight": acceptance,
    "hybrid_weight": hybrid,
}
OURS = {
    "soft_weight": lambda q, p, labels: losses.soft_cross_entropy(q, p),
    "text_weight": lambda q, p, labels: losses.text_cross_entropy(q, labels),
    "variation_weight": lambda q, p, labels: losses.total_variation(q, p),
    "acceptance_weight": lambda q, p, labels: losses.negative_log_acceptance(q, p),
    "hybrid_weight": lambda q, p, labels: losses.hybrid_acceptance(q, p, 3.0),
}
ONLY = dict.fromkeys(BY_HAND, 0.0)


def test_no_objective_is_without_its_equation():
    """A new objective is one function, one line of LossConfig, and its equation here."""
    assert losses.objectives().keys() == BY_HAND.keys() == OURS.keys()


def drawn(rows=7, size=11):
    """Logits, target distributions (the last of one token alone) and labels (the first outside the vocabulary)."""
    logits, aims = torch.randn(rows, size).double() * 2, torch.softmax(torch.randn(rows, size).double() * 2, -1)
    aims[-1] = torch.eye(size).double()[3]
    return logits, aims, torch.tensor([-1, 3, 0, size - 1, 5, 5, 3])


def probabilities(logits):
    """Softmax of a row of logits, in plain Python."""
    exponents = [math.exp(z - max(logits)) for z in logits]
    return [e / sum(exponents) for e in exponents]


@pytest.mark.parametrize("name", BY_HAND)
def test_an_objective_is_its_equation(name):
    logits, aims, labels = drawn()
    found = OURS[name](torch.log_softmax(logits, -1), aims, labels).tolist()
    expected = [
        BY_HAND[name](probabilities(z), p, label)
        for z, p, label in zip(logits.tolist(), aims.tolist(), labels.tolist(), strict=True)
    ]
    assert found == pytest.approx(expected, rel=1e-12, abs=1e-12)
    assert len({round(value, 6) for value in found}) > 4


def detached_blend(logits, aims):
    """The hybrid form with its blend held fast, which is what its gradient is taken of."""
    with torch.no_grad():
        blend = torch.exp(-3.0 * losses.overlap(torch.log_softmax(logits, -1), aims))

    def function(z):
        q = torch.softmax(z, -1)
        kl = torch.xlogy(aims, aims).sum(-1) - (aims * q.log()).sum(-1)
        return blend * kl + (1 - blend) * 0.5 * (aims - q).abs().sum(-1)

    return function


@pytest.mark.parametrize("name", BY_HAND)
def test_an_objectives_gradient_is_that_of_finite_differences(name):
    logits, aims, labels = drawn()
    logits.requires_grad_(True)
    if name != "hybrid_weight":
        assert torch.autograd.gradcheck(lambda z: OURS[name](torch.log_softmax(z, -1), aims, labels), (logits,))
        return
    function = detached_blend(logits, aims)
    assert torch.autograd.gradcheck(function, (logits,))
    (expected,) = torch.autograd.grad(function(logits).sum(), logits)
    (found,) = torch.autograd.grad(OURS[name](torch.log_softmax(logits, -1), aims, labels).sum(), logits)
    torch.testing.assert_close(found, expected, atol=1e-12, rtol=1e-10)


def test_limits_of_the_hybrid_form():
    """eta 0 is KL, a large eta total variation."""
    logits, aims, _ = drawn()
    q = torch.log_softmax(logits, -1)
    entropy = -torch.xlogy(aims, aims).sum(-1)
    kl = losses.soft_cross_entropy(q, aims) - entropy
    torch.testing.assert_close(losses.hybrid_acceptance(q, aims, 0.0), kl)
    torch.testing.assert_close(losses.hybrid_acceptance(q, aims, 1e6), losses.total_variation(q, aims))


def test_a_head_without_any_overlap_has_a_finite_loss():
    logits, aims = torch.zeros(1, 4), torch.tensor([[0.0, 0.0, 0.0, 1.0]])
    logits[0, 0] = 300.0  # float32: the last token's probability is 0
    found = losses.negative_log_acceptance(torch.log_softmax(logits, -1), aims)
    assert math.isfinite(float(found)) and float(found) > 50


# -- inside the whole loss --------------------------------------------------------------------------------------------

ROWS = [
    TokenRow("a", "a", [5, 17, 230, 44, 9, 61, 9, 63, 250, 100, 7, EOS], [0] * 4 + [1] * 8),
    TokenRow("b", "b", [1, 2, 3, 4, 5, 6, 7, 8, 9, 10], [0, 0, 1, 1, 1, 0, 0, 2, 2, 2]),
]
NUM_HEADS = 3
CONFIGS = {
    "default": LossConfig(),
    "decay": LossConfig(depth_decay=0.5),
    "paths-alone": LossConfig(depth_decay=0.5, path_share=1.0),
    **{name: LossConfig(**{**ONLY, name: 1.0}) for name in BY_HAND},
    "all": LossConfig(
        soft_weight=0.7,
        text_weight=0.3,
        variation_weight=0.4,
        acceptance_weight=0.2,
        hybrid_weight=0.6,
        depth_decay=0.8,
    ),
    "until-fail": LossConfig(accept_until_fail=True),
    "until-fail-all": LossConfig(
        text_weight=0.5, variation_weight=0.5, hybrid_weight=0.5, depth_decay=0.9, accept_until_fail=True
    ),
    "chunks": LossConfig(depth_decay=0.8, chunk_rows=3),
    "chunks-until-fail": LossConfig(hybrid_weight=0.5, accept_until_fail=True, chunk_rows=4),
}
DRAFTERS = {
    "shared": lambda target: Amphista(AmphistaConfig(num_heads=NUM_HEADS), target.spec, target.shared),
    "draft-vocabulary": lambda target: Amphista(
        AmphistaConfig(num_heads=NUM_HEADS, draft_vocab=120), target.spec, target.shared
    ),
    "own": lambda target: Medusa(
        MedusaConfig(num_heads=NUM_HEADS, lm_head="own", draft_vocab=120), target.spec, target.shared
    ),
    "paths": lambda target: Amphista(
        AmphistaConfig(num_heads=NUM_HEADS, draft_vocab=120, path_rank=4, path_shortlist=9), target.spec, target.shared
    ),
    "own-paths": lambda target: Medusa(
        MedusaConfig(num_heads=NUM_HEADS, lm_head="own", path_rank=4, path_shortlist=9), target.spec, target.shared
    ),
    "hydra": lambda target: Hydra(
        HydraConfig(num_heads=NUM_HEADS, base="prefix", lm_head="own", draft_vocab=120, head_bias=True),
        target.spec,
        target.shared,
    ),
    "eagle": lambda target: Eagle(EagleConfig(num_heads=NUM_HEADS, draft_vocab=120), target.spec, target.shared),
    "early-exit": lambda target: EarlyExit(
        EarlyExitConfig(num_heads=NUM_HEADS, draft_vocab=120, exit_layer=2), target.spec, target.shared
    ),
    "falcon": lambda target: Falcon(
        FalconConfig(num_heads=NUM_HEADS, draft_vocab=120, mixer="lstm"), target.spec, target.shared
    ),
}


@pytest.fixture(scope="module")
def precise():
    target = tiny_target(dtype=torch.float64)
    assert target.speed_up()
    return target


def case(target, kind):
    """(drafter, batch, answer rows): labels are moved so that heads are right here and there, or nothing would last."""
    drafter = shaken(DRAFTERS[kind](target).double(), scale=0.2)
    if drafter.draft_ids is not None:
        drafter.set_draft_ids(frequent_tokens(ROWS, 120, [EOS]))
    hidden = [training_rows(target, drafter, row.token_ids)[0] for row in ROWS]
    batch = collate(ROWS, hidden)
    rows = batch.answer_rows
    with torch.no_grad():
        logits = drafter.head_logits(drafter(batch.hidden, batch.next_ids, rows.rows))
    best = logits.argmax(-1) if drafter.draft_ids is None else drafter.draft_ids[logits.argmax(-1)]
    labels = rows.next_ids.clone()
    for at in range(1, len(labels)):
        if at % 4:  # head 1 of the row before is right, and every third time head 2 of the row before that instead
            labels[at] = best[at - 1, 0] if at % 3 or at < 2 else best[at - 2, 1]
    return drafter, batch, AnswerRows(rows.rows, labels, rows.answers)


def forms_of(drafter, batch, rows, config):
    """The logits [Q, K, N] that count, each with its share by head: what heads say alone, and given the token above."""
    states = drafter(batch.hidden, batch.next_ids, rows.rows)
    logits = drafter.head_logits(states)
    if drafter.path is None:
        return [([1.0] * NUM_HEADS, logits)]
    given = [logits[:, 0]]
    for k in range(1, NUM_HEADS):
        above = torch.roll(rows.next_ids, -k)  # the text's token at the depth above is x_{t+1} of row q + k
        fresh = drafter.head_logits(
            states[:, k] + drafter.path(states[:, k], drafter.path.read(drafter._shared.embed(above))), k
        )
        named = torch.zeros_like(fresh, dtype=torch.bool)
        named.scatter_(-1, logits[:, k].argsort(-1, descending=True)[:, : drafter.config.path_shortlist], True)
        given.append(torch.where(named, fresh, logits[:, k]))
    share = config.path_share
    return [([1.0] + [1 - share] * (NUM_HEADS - 1), logits), ([0.0] + [share] * (NUM_HEADS - 1), torch.stack(given, 1))]


def counted(drafter, logits, rows, config):
    """[(row, head from 0)] that count, by the rule in words: same answer; and none behind the first wrong head."""
    vocabulary = list(range(VOCAB)) if drafter.draft_ids is None else drafter.draft_ids.tolist()
    found = []
    for q in range(len(rows.answers)):
        for k in range(NUM_HEADS):
            aim = q + k + 1
            if aim >= len(rows.answers) or rows.answers[aim] != rows.answers[q]:
                break
            found.append((q, k))
            if config.accept_until_fail and vocabulary[int(logits[q, k].argmax())] != int(rows.next_ids[aim]):
                break
    return found


def number_of_aims(rows, head):
    answers = rows.answers.tolist()
    return sum(q + head + 1 < len(answers) and answers[q + head + 1] == answers[q] for q in range(len(answers)))


def own_rows(batch, rows):
    """The target's hidden states of answer rows, without what a drafter reads beside them."""
    return batch.hidden.flatten(0, 1)[rows.rows, :32]


def loss_by_hand(drafter, batch, rows, config):
    """The loss and each head's, in plain Python floats."""
    vocabulary = list(range(VOCAB)) if drafter.draft_ids is None else drafter.draft_ids.tolist()
    with torch.no_grad():
        forms = forms_of(drafter, batch, rows, config)
        aims = drafter.target_logits(own_rows(batch, rows))
    sums, numbers = [0.0] * NUM_HEADS, [0] * NUM_HEADS
    for q, k in counted(drafter, forms[-1][1], rows, config):
        p = probabilities(aims[q + k + 1].tolist())
        token = int(rows.next_ids[q + k + 1])
        label = vocabulary.index(token) if token in vocabulary else -1
        for shares, logits in forms:
            z = probabilities(logits[q, k].tolist())
            found = sum(weight * BY_HAND[name](z, p, label) for name, weight in config.weights.items() if weight)
            sums[k] += shares[k] * found
        numbers[k] += 1
    means = [s / n if n else 0.0 for s, n in zip(sums, numbers, strict=True)]
    weights = [config.depth_decay**k * numbers[k] / number_of_aims(rows, k) for k in range(NUM_HEADS)]
    return sum(w * m for w, m in zip(weights, means, strict=True)) / sum(weights), means, numbers


@pytest.mark.parametrize("kind", DRAFTERS)
@pytest.mark.parametrize("name", CONFIGS)
def test_the_loss_is_written_out(precise, kind, name):
    drafter, batch, rows = case(precise, kind)
    expected, heads, numbers = loss_by_hand(drafter, batch, rows, CONFIGS[name])
    sums = HeadLoss(drafter, CONFIGS[name])(batch.hidden, batch.next_ids, rows)
    loss, per_head = sums.loss(CONFIGS[name]), sums.per_head()
    assert float(loss.detach()) == pytest.approx(expected, rel=1e-10)
    assert per_head.tolist() == pytest.approx(heads, rel=1e-10)
    all_rows = [number_of_aims(rows, k) for k in range(NUM_HEADS)]
    if CONFIGS[name].accept_until_fail:
        assert numbers[0] == all_rows[0] and all_rows[1] > numbers[1] > numbers[2] > 0, "nothing failed, or all did"
    else:
        assert numbers == all_rows


def reference_loss(drafter, batch, rows, config):
    """The same in one plain graph of all logits at once, none of the code under test."""
    forms = forms_of(drafter, batch, rows, config)
    with torch.no_grad():
        aims = torch.softmax(drafter.target_logits(own_rows(batch, rows)), -1)
    vocabulary = list(range(VOCAB)) if drafter.draft_ids is None else drafter.draft_ids.tolist()
    terms, numbers = [[] for _ in range(NUM_HEADS)], [0] * NUM_HEADS
    for q, k in counted(drafter, forms[-1][1].detach(), rows, config):
        p, token = aims[q + k + 1], int(rows.next_ids[q + k + 1])
        terms[k].append(0.0)
        for shares, logits in forms:
            z = torch.log_softmax(logits[q, k], -1)
            alpha = 1 - 0.5 * (p - z.exp()).abs().sum()
            blend = torch.exp(-config.hybrid_eta * alpha.detach())
            terms[k][-1] += shares[k] * (
                -config.soft_weight * (p * z).sum()
                - config.text_weight * (z[vocabulary.index(token)] if token in vocabulary else 0.0)
                + config.variation_weight * (1 - alpha)
                - config.acceptance_weight * alpha.log()
                + config.hybrid_weight * (blend * (p * (p.log() - z)).sum() + (1 - blend) * (1 - alpha))
            )
        numbers[k] += 1
    weights = [config.depth_decay**k * numbers[k] / number_of_aims(rows, k) for k in range(NUM_HEADS)]
    means = [torch.stack(of_head).mean() for of_head in terms]
    return sum(w * m for w, m in zip(weights, means, strict=True)) / sum(weights)


@pytest.mark.parametrize("kind", DRAFTERS)
@pytest.mark.parametrize("name", ["default", "all", "until-fail-all", "chunks", "chunks-until-fail"])
def test_every_parameters_gradient_is_that_of_the_plain_graph(precise, kind, name):
    """Taking each head's gradient in the forward pass changes where it is computed, not what it is."""
    drafter, batch, rows = case(precise, kind)
    parameters = dict(drafter.named_parameters())
    expected = torch.autograd.grad(
        reference_loss(drafter, batch, rows, CONFIGS[name]), list(parameters.values()), allow_unused=True
    )
    loss = HeadLoss(drafter, CONFIGS[name])(batch.hidden, batch.next_ids, rows).loss(CONFIGS[name])
    (loss * 3).backward()  # whatever comes from above is passed on
    for (where, parameter), gradient in zip(parameters.items(), expected, strict=True):
        assert gradient is not None and float(gradient.abs().max()) > 0, where
        torch.testing.assert_close(parameter.grad, 3 * gradient, atol=1e-10, rtol=1e-8, msg=where)


@pytest.mark.parametrize("kind", ["draft-vocabulary", "eagle", "early-exit"])
def test_states_are_drawn_to_the_targets_own(precise, kind):
    """Smooth L1 by hand: head k's state of row q and the target's of row q + k + 1, of the rows that count."""
    drafter, batch, rows = case(precise, kind)
    plain, drawn_to = LossConfig(depth_decay=0.8), LossConfig(depth_decay=0.8, feature_weight=0.5)
    before, after = (HeadLoss(drafter, config)(batch.hidden, batch.next_ids, rows) for config in (plain, drawn_to))
    with torch.no_grad():
        states = drafter(batch.hidden, batch.next_ids, rows.rows)
        logits = drafter.head_logits(states)
    own, sums = own_rows(batch, rows), [0.0] * NUM_HEADS
    for q, k in counted(drafter, logits, rows, plain):
        gaps = (states[q, k] - own[q + k + 1]).abs().tolist()
        sums[k] += 0.5 * sum(gap**2 / 2 if gap < 1 else gap - 0.5 for gap in gaps) / len(gaps)
    assert min(sums) > 0
    assert (after.losses - before.losses).tolist() == pytest.approx(sums, rel=1e-6)
    after.loss(drawn_to).backward()
    assert all(p.grad is not None for p in drafter.parameters())


def test_both_cross_entropies_at_once_are_their_sum():
    logits, aims, labels = drawn()
    logits.requires_grad_(True)
    config = LossConfig(soft_weight=0.7, text_weight=0.3)
    weights = torch.linspace(1, 2, len(labels)).double()
    (losses.head_losses(logits, aims, labels, config) * weights).sum().backward()
    found, logits.grad = logits.grad, None
    log_probs = torch.log_softmax(logits, -1)
    plain = 0.7 * losses.soft_cross_entropy(log_probs, aims) + 0.3 * losses.text_cross_entropy(log_probs, labels)
    torch.testing.assert_close(losses.head_losses(logits, aims, labels, config), plain)
    (plain * weights).sum().backward()
    torch.testing.assert_close(found, logits.grad)


def test_no_autocast_reaches_the_sums():
    logits, aims, labels = drawn()
    values = [logits.float(), aims.float(), labels, LossConfig()]
    with torch.autocast("cpu", dtype=torch.bfloat16):
        inside = losses.head_losses(*values)
    assert torch.equal(inside, losses.head_losses(*values))


# -- memory -----------------------------------------------------------------------------------------------------------


SWITCHES = [
    {"stages": 0},
    {"stages": 1},
    {"stage_split": 0, "num_encoder_layers": 2},
    {"slot_mask": "causal", "position_encoding": False},
    {"slot_mask": "own", "num_encoder_layers": 2},
    {"auto_embedding": False},
]


@pytest.mark.parametrize("switches", SWITCHES, ids=str)
@pytest.mark.parametrize("until_fail", [False, True])
def test_heads_asked_one_by_one_are_heads_asked_at_once(precise, monkeypatch, switches, until_fail):
    """Whatever the drafter's form: rows that nobody asks for are in no loss, no count and no gradient."""
    form = lambda target: Amphista(  # noqa: E731
        AmphistaConfig(num_heads=NUM_HEADS, draft_vocab=120, **switches), target.spec, target.shared
    )
    monkeypatch.setitem(DRAFTERS, "switched", form)
    check_one_by_one(precise, "switched", until_fail)


@pytest.mark.parametrize("kind", ["hydra", "eagle", "falcon", "early-exit"])
@pytest.mark.parametrize("until_fail", [False, True])
def test_heads_that_go_on_from_each_other_are_asked_for_fewer_and_fewer_rows(precise, kind, until_fail):
    check_one_by_one(precise, kind, until_fail)


def check_one_by_one(precise, kind, until_fail):
    drafter, batch, rows = case(precise, kind)
    config = LossConfig(accept_until_fail=until_fail, chunk_rows=5)
    found = {}
    for one_by_one in (True, False):
        sums = HeadLoss(drafter, config, one_by_one=one_by_one)(batch.hidden, batch.next_ids, rows)
        drafter.zero_grad()
        sums.loss(config).backward()
        found[one_by_one] = [*sums, *(p.grad.clone() for p in drafter.parameters())]
    torch.testing.assert_close(found[True], found[False])
    assert (float(found[True][1][1]) < float(found[True][2][1])) == until_fail


@pytest.mark.parametrize("kind", DRAFTERS)
@pytest.mark.parametrize("until_fail", [False, True])
def test_even_numbers_of_rows_change_no_loss_and_no_gradient(precise, monkeypatch, kind, until_fail):
    """Rows that make a number even are in no loss, no count and no gradient, whatever the drafter."""
    drafter, batch, rows = case(precise, kind)
    config = LossConfig(accept_until_fail=until_fail, chunk_rows=9)
    monkeypatch.setattr(shapes, "LEAST_STEP", 4)
    found, lengths = [], set()
    for is_even in (False, True):
        with monkeypatch.context() as patch:
            if is_even:
                patch.setattr(shapes, "is_compiled_for", lambda rows: True)
                patch.setattr(head_loss, "evened", lambda index: noted(shapes.evened(index), lengths))
            sums = HeadLoss(drafter, config)(batch.hidden, batch.next_ids, rows)
        drafter.zero_grad()
        sums.loss(config).backward()
        found.append([*sums, *(p.grad.clone() for p in drafter.parameters())])
    torch.testing.assert_close(found[1], found[0])
    assert lengths and all(length % 4 == 0 for length in lengths)


def noted(index, lengths):
    lengths.add(len(index))
    return index


@pytest.mark.parametrize("kind", ["draft-vocabulary", "medusa"])
def test_nothing_is_computed_behind_a_wrong_head(precise, monkeypatch, kind):
    """Rows that meet the vocabulary, forwards and back, and rows that heads are asked for: those that count."""
    form = lambda target: Medusa(MedusaConfig(num_heads=NUM_HEADS, draft_vocab=120), target.spec, target.shared)  # noqa: E731
    monkeypatch.setitem(DRAFTERS, "medusa", form)
    drafter, batch, rows = case(precise, kind)
    seen = {"logits": 0, "gradient": 0}

    def counting(name, plain):
        def count(head, tensor):
            seen[name] += len(tensor)
            return plain(head, tensor)

        return count

    for name in seen:
        monkeypatch.setattr(FrozenHead, name, counting(name, getattr(FrozenHead, name)))
    asked = []
    plain = type(drafter).states_one_by_one

    def watched(self, features):
        state = plain(self, features)
        return lambda head, index: asked.append(len(index)) or state(head, index)

    monkeypatch.setattr(type(drafter), "states_one_by_one", watched)
    config = LossConfig(accept_until_fail=True)
    sums = HeadLoss(drafter, config)(batch.hidden, batch.next_ids, rows)
    counted, aims = int(sums.counted.sum()), int(sums.aims.sum())
    assert sum(asked) == seen["gradient"] == counted < aims
    assert seen["logits"] == counted + len(rows.rows) - 1, "the target's own, once a row"


class _Kept:
    def __init__(self, tensor):
        self.tensor = tensor


def vocabulary_sized_tensors_kept(drafter, batch, rows):
    """How many tensors [rows, N] autograd holds between the forward and the backward pass."""
    kept = weakref.WeakSet()

    def pack(tensor):
        holder = _Kept(tensor)
        kept.add(holder)
        return holder

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda holder: holder.tensor):
        loss = HeadLoss(drafter, CONFIGS["all"])(batch.hidden, batch.next_ids, rows).loss(CONFIGS["all"])
    gc.collect()
    shapes = [tuple(holder.tensor.shape) for holder in kept]
    assert shapes and loss.requires_grad
    return sum(len(shape) == 2 and shape[1] == drafter.draft_vocab and 1 < shape[0] < 32 for shape in shapes)


@pytest.mark.parametrize("kind", DRAFTERS)
def test_nothing_of_vocabulary_size_waits_for_the_backward_pass(precise, kind, monkeypatch):
    drafter, batch, rows = case(precise, kind)
    assert vocabulary_sized_tensors_kept(drafter, batch, rows) == 0
    monkeypatch.setattr(
        head_loss, "_at_once", lambda function, *inputs: function(*inputs)
    )  # autograd's own way: the count sees it
    assert vocabulary_sized_tensors_kept(drafter, batch, rows) >= NUM_HEADS


# -- settings ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"variation_weight": -0.1}, "must not be negative"),
        (ONLY, "nor all 0"),
        ({"hybrid_eta": -1.0}, "hybrid_eta is -1.0"),
        ({"depth_decay": 0.0}, "depth_decay is 0.0"),
        ({"chunk_rows": -1}, "chunk_rows is -1"),
        ({"hybrid": 1.0}, "did you mean 'hybrid_eta'|did you mean 'hybrid_weight'"),
        ({"accept_until_fail": 1}, "accept_until_fail is 1: expected bool"),
    ],
)
def test_settings_that_cannot_be_are_refused(values, message):
    with pytest.raises(ConfigError, match=message):
        build(TrainConfig, {"loss": values})


def test_a_recipe_chooses_objectives():
    config = build(TrainConfig, {"loss": {"soft_weight": 0, "hybrid_weight": 1, "accept_until_fail": True}})
    assert config.loss.weights["hybrid_weight"] == 1.0 and config.loss.accept_until_fail


def test_validation_measures_every_head_everywhere(target):
    """Accept-until-fail is a rule for training: a head's validated loss is over all its positions."""
    drafter = shaken(DRAFTERS["shared"](target), scale=0.2)
    found = [
        validate(drafter, ROWS, HiddenStates(target, ROWS, None), config).head_loss
        for config in (CONFIGS["default"], dataclasses.replace(CONFIGS["default"], accept_until_fail=True))
    ]
    assert found[0] == found[1]


@pytest.mark.parametrize("name", ["variation_weight", "acceptance_weight", "hybrid_weight", "until-fail"])
def test_descending_an_objective_lowers_it(target, name):
    drafter = shaken(DRAFTERS["own"](target), scale=0.05)
    batch = collate(ROWS, HiddenStates(target, ROWS, None).get(ROWS))
    loss_of = HeadLoss(drafter, CONFIGS[name])
    optimizer = torch.optim.AdamW(drafter.parameters(), lr=1e-2)
    seen = []
    for _ in range(25):
        loss = loss_of(batch.hidden, batch.next_ids, batch.answer_rows).loss(CONFIGS[name])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        seen.append(float(loss.detach()))
    assert seen[-1] < 0.9 * seen[0]
