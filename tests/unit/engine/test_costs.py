"""Measured costs: kept in the cache folder, measured anew for anything else, damaged or not there."""

from __future__ import annotations

import json
import os
import time
from dataclasses import replace

import pytest
import torch

from amphista.drafter.amphista import Amphista, AmphistaConfig
from amphista.drafter.captured_drafter import AskRegion, FeedRegion
from amphista.drafter.falcon import Falcon, FalconConfig
from amphista.drafter.hydra import Hydra, HydraConfig
from amphista.drafter.medusa import Medusa, MedusaConfig
from amphista.drafter.proposer import Proposer
from amphista.engine import cost_cache, costs, timing
from amphista.engine.costs import costs_for, target_key, tune
from amphista.engine.timing import Asking, Cell, ForwardSeconds
from amphista.native.crew import Crew
from amphista.target.captured_forward import NODES, VerifyRegion
from amphista.target.target import Target
from amphista.tree.learned import Forward, StepCosts
from amphista.tree.tune import NOTHING_PAYS, Costs
from tests.tiny import tiny_model, tiny_target


@pytest.fixture
def spreads():
    """How disturbed what is measured says it was."""
    return {"verify": 1.1, "draft": 1.1}


@pytest.fixture
def measured(tmp_path, monkeypatch, spreads):
    """A cache folder of its own, and what was measured instead of timed."""
    monkeypatch.setenv("AMPHISTA_CACHE", str(tmp_path))
    monkeypatch.setattr(cost_cache, "_not_kept", {})
    calls = []

    def verify(target):
        calls.append("verify")
        return ForwardSeconds({1: 1.0, 2: 1.0 + 0.5 * len(calls), 4: 1.5}, 256, 0.02, 0.001, spreads["verify"])

    def draft(target, drafter):
        calls.append("draft")
        return Asking(0.25, 0.05, 0.1, spreads["draft"])

    monkeypatch.setattr(costs, "verify_seconds", verify)
    monkeypatch.setattr(costs, "draft_ratio", draft)
    return calls


def medusa(target, *, lookup=False, **settings):
    return Proposer(Medusa(MedusaConfig(**settings), target.spec, target.shared), use_lookup=lookup)


def test_measured_with_all_threads(target, measured, monkeypatch):
    """Fewer of them, while other programs have the cores, are steady and slow: what they take would be kept."""
    crew, found = Crew(), []
    monkeypatch.setattr(torch, "get_num_threads", lambda: 2)
    monkeypatch.setattr(costs, "CREW", crew)
    for name in ("verify_seconds", "draft_ratio"):
        measure = getattr(costs, name)
        monkeypatch.setattr(costs, name, lambda *given, m=measure: (found.append(crew.num_threads()), m(*given))[1])
    for _ in range(20):
        crew.note(2, 0.004, 0.005)
    assert crew.num_threads() == 1
    costs_for(target, medusa(target))
    assert found == [2, 2] and crew.num_threads() == 1


def test_measured_once(target, measured, tmp_path):
    first = costs_for(target, medusa(target))
    assert first == costs_for(target, medusa(target)) and measured == ["verify", "draft"]
    assert (first.draft, first.drafted, first.further_round) == (0.25, 0.05, 0.1)
    assert (first.sequence, first.cached_row, first.context) == (0.02, 0.001, 256)
    assert first.verify == [1.0, 1.5, 1.5, 1.5]
    assert len(list((tmp_path / "costs").glob("*.json"))) == len(list((tmp_path / "costs").iterdir())) == 2


def test_forwards_are_shared_by_all_drafters(target, measured):
    costs_for(target, Proposer(use_lookup=True))
    with_heads = costs_for(target, medusa(target))
    assert measured == ["verify", "draft"]
    assert costs_for(target, medusa(target, lookup=True)) == with_heads and measured == [
        "verify",
        "draft",
    ]
    assert costs_for(target, Proposer(use_lookup=True)).draft == 0.0
    costs_for(target, medusa(target, num_heads=2))
    assert measured == ["verify", "draft", "draft"]


def test_no_drafter_measures_nothing(target, measured):
    assert costs_for(target, Proposer()) == NOTHING_PAYS and measured == []


def test_everything_else_measures_anew(target, measured, monkeypatch):
    drafter = Proposer(use_lookup=True)
    costs_for(target, drafter)
    others = [tiny_target("qwen3"), tiny_target(dtype=torch.float64), tiny_target()]  # the last one: on the stock path
    for number, other in enumerate(others, start=2):
        costs_for(other, drafter)
        assert len(measured) == number
    threads = torch.get_num_threads()
    try:
        torch.set_num_threads(threads + 1)
        costs_for(target, drafter)
    finally:
        torch.set_num_threads(threads)
    assert len(measured) == 5
    for name, value in (("machine", {"processor": "another"}), ("versions", {"torch": "9", "transformers": "9"})):
        with monkeypatch.context() as patch:
            patch.setattr(costs.provenance, name, lambda value=value: value)
            costs_for(target, drafter)
    assert len(measured) == 7
    monkeypatch.setattr(costs, "_code_sha256", lambda: "other code")
    costs_for(target, drafter)
    assert len(measured) == 8


def test_refresh_measures_anew_and_is_kept(target, measured):
    drafter = medusa(target)
    old = tune(target, drafter)
    new = tune(target, drafter, refresh=True)
    assert measured == ["verify", "draft"] * 2 and new.forward != old.forward
    assert tune(target, drafter) == new and len(measured) == 4


@pytest.mark.parametrize(
    "damage",
    [
        lambda text: "",
        lambda text: text[: len(text) // 2],
        lambda text: "[]",
        lambda text: "null",
        lambda text: text.replace('"seconds"', '"minutes"'),
        lambda text: text.replace("1.5", '"fast"'),
        lambda text: text.replace("1.5", "-1.5"),
        lambda text: text.replace("1.5", "NaN"),
        lambda text: text.replace('"1": 1.0,', ""),
        lambda text: text.replace("torch.float32", "torch.int3"),
        lambda text: "\x00\xff",
    ],
)
def test_a_damaged_file_is_measured_again(target, measured, damage):
    drafter = Proposer(use_lookup=True)
    costs_for(target, drafter)
    (file,) = cost_cache.costs_folder().glob("*.json")
    damaged = damage(file.read_text())
    assert damaged != file.read_text()
    file.write_bytes(damaged.encode("latin-1"))
    costs_for(target, drafter)
    assert measured == ["verify"] * 2
    assert json.loads(file.read_text())["key"] == json.loads(json.dumps({"what": "verify", **target_key(target)}))
    costs_for(target, drafter)
    assert measured == ["verify"] * 2


def test_a_folder_that_cannot_be_written_is_said_and_no_more(target, measured, tmp_path, caplog):
    (tmp_path / "costs").write_text("a file where the folder should be")
    assert costs_for(target, Proposer(use_lookup=True)).max_nodes == 4
    assert "cannot be kept" in caplog.text
    costs_for(target, Proposer(use_lookup=True))
    assert measured == ["verify"], "this process goes on with what it has"


@pytest.mark.parametrize("what", ["verify", "draft"])
def test_what_was_disturbed_serves_its_process_and_is_measured_again(target, measured, spreads, what, caplog):
    drafter = medusa(target)
    spreads[what] = 2.59
    first = costs_for(target, drafter)
    assert measured == ["verify", "draft"] and "the next start measures again" in caplog.text
    assert costs_for(target, drafter) == first and measured == ["verify", "draft"], "not once a method"
    cost_cache._not_kept.clear()  # the next start
    spreads[what] = 1.1
    costs_for(target, drafter)
    assert measured == ["verify", "draft", what]
    cost_cache._not_kept.clear()
    costs_for(target, drafter)
    assert measured == ["verify", "draft", what]


def test_a_disturbed_record_of_another_version_is_not_believed(target, measured, tmp_path):
    costs_for(target, Proposer(use_lookup=True))
    (path,) = (tmp_path / "costs").iterdir()
    path.write_text(json.dumps(json.loads(path.read_text()) | {"spread": 2.59}))
    costs_for(target, Proposer(use_lookup=True))
    assert measured == ["verify", "verify"] and json.loads(path.read_text())["spread"] == 1.1


def test_what_is_old_is_measured_again(target, measured, tmp_path):
    costs_for(target, Proposer(use_lookup=True))
    (path,) = (tmp_path / "costs").iterdir()
    for days, times in ((29, 1), (31, 2), (0, 2)):
        os.utime(path, (time.time() - 86400 * days,) * 2) if days else None
        costs_for(target, Proposer(use_lookup=True))
        assert measured == ["verify"] * times


def test_a_disturbed_refresh_leaves_the_quiet_record(target, measured, spreads):
    drafter = medusa(target)
    old = tune(target, drafter)
    spreads["verify"] = 2.0
    assert tune(target, drafter, refresh=True) != old
    assert tune(target, drafter) == old


def test_a_write_that_is_killed_leaves_the_old_record(target, measured, monkeypatch):
    drafter = Proposer(use_lookup=True)
    old = tune(target, drafter)

    def killed(*where):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr("amphista.files.os.fsync", killed)
        with pytest.raises(KeyboardInterrupt):
            tune(target, drafter, refresh=True)
    assert tune(target, drafter) == old


# -- the clock itself -------------------------------------------------------------------------------------------------


def test_real_seconds(target, tmp_path, monkeypatch):
    monkeypatch.setenv("AMPHISTA_CACHE", str(tmp_path))
    monkeypatch.setattr("amphista.engine.timing.BUDGET_SECONDS", 0.2)
    rows = target.spec.max_positions // 2
    found = tune(target, medusa(target, lookup=True))
    assert found.costs.max_nodes > 2 and found.costs.max_nodes + rows <= target.spec.max_positions
    assert found.costs.verify == sorted(found.costs.verify) and found.costs.draft > 0 and found.forward.spread >= 1


@pytest.mark.parametrize("blip", [None, 2, 3])
def test_sizes_end_where_a_tree_costs_too_much(target, monkeypatch, blip):
    """And not where another program came between once."""

    class Slow(Cell):
        def time(self, device):
            self.run()
            self.reset()
            self.times = getattr(self, "times", 0) + 1
            return 100.0 if self.size == blip and self.times == 2 else float(self.size)

    def forward(target, num_nodes, cache, rows):
        cell = Slow(lambda: None)
        cell.size = num_nodes
        return cell

    monkeypatch.setattr(timing, "_forward", forward)
    monkeypatch.setattr(
        timing, "_several", lambda target, cache, num_cached: Cell(lambda: time.sleep(1e-4 * num_cached))
    )
    found = timing.verify_seconds(target)
    assert found.by_rows == {1: 1, 2: 2, 3: 3, 4: 4, 6: 6}


def test_disturbed_rates_leave_every_step_its_time(target, monkeypatch):
    """A step is divided by what it should have taken: with no row cached that is less, and never nothing."""
    monkeypatch.setattr(timing, "BUDGET_SECONDS", 0.1)
    monkeypatch.setattr(
        timing, "_several", lambda target, cache, num_cached: Cell(lambda: time.sleep(num_cached / 5e3))
    )
    found = timing.verify_seconds(target)
    expected = StepCosts(
        replace(Costs.measured(found.by_rows, 0.0), cached_row=found.cached_row, context=found.context)
    )
    assert found.cached_row * found.context == found.by_rows[1] / 2
    assert expected.seconds(Forward(num_rows=1)) > 0


def test_measuring_leaves_cache_and_drafter_as_they_were(target):
    cache, rows = timing._filled(target)
    before = cache.layers[0].keys[:, :, :rows].clone()
    timing._forward(target, 4, cache, rows).time(target.device)
    assert cache.num_committed == cache.num_rows == rows and torch.equal(cache.layers[0].keys[:, :, :rows], before)


# -- a target that verifies in fixed shapes ---------------------------------------------------------------------------


@pytest.fixture(scope="module")
def static():
    target = Target(tiny_model(), static=True)
    assert target.speed_up() and target.is_static
    return target


def test_between_two_sizes_a_tree_costs_what_the_larger_one_does(static, measured):
    """It is padded to it."""
    assert costs_for(static, medusa(static)).verify == [1.0, 1.5, 1.5, 1.5]
    assert Costs.measured({1: 1.0, 4: 2.0, 6: 3.0}, in_steps=True).verify == [1.0, 2.0, 2.0, 2.0, 3.0, 3.0]
    assert Costs.measured({1: 1.0, 4: 2.5, 6: 3.5}).verify == [1.0, 1.5, 2.0, 2.5, 3.0, 3.5]
    assert target_key(static)["path"] == "fast-static"


def test_what_is_timed_is_what_decodes(static, monkeypatch):
    """Recorded forwards at the sizes there are, and the heads asked and fed the way the engine does."""
    replayed = []
    for kind in (VerifyRegion, AskRegion, FeedRegion):

        def run(region, original=kind.run, kind=kind):
            replayed.append((kind, getattr(region, "num_nodes", None)))
            original(region)

        monkeypatch.setattr(kind, "run", run)
    fresh = Target(tiny_model(), static=True)
    assert fresh.speed_up()
    del replayed[:]
    monkeypatch.setattr(timing, "DEAREST", 1e9)
    seconds = timing.verify_seconds(fresh).by_rows
    assert list(seconds) == [size for size in NODES if size <= 256]
    assert {size for kind, size in replayed if kind is VerifyRegion} == set(seconds)
    drafter = Amphista(AmphistaConfig(), fresh.spec, fresh.shared).eval()
    assert timing.draft_ratio(fresh, drafter).further_round == 0
    assert {kind for kind, _ in replayed} == {VerifyRegion, AskRegion, FeedRegion}


def test_a_drafter_that_is_asked_in_rounds_is_timed_by_them(target, monkeypatch):
    """Each round of one sequence, and the first of several; all heads of the others come in one. A forward takes 2, a
    further round 1."""
    sizes, clock, forward = set(), [0.0], Target.forward

    def passing(seconds, inner):
        def passed(*given):
            clock[0] += seconds
            return inner(*given)

        return passed

    for kind in (Hydra, Falcon):
        monkeypatch.setattr(kind, "next", passing(1.0, kind.next))
    monkeypatch.setattr(Target, "forward", passing(2.0, forward))
    monkeypatch.setattr(timing, "now", lambda device: clock[0])
    drafter = Hydra(HydraConfig(num_heads=3), target.spec, target.shared).eval()
    assert (drafter.heads_a_round, Amphista(AmphistaConfig(), target.spec, target.shared).heads_a_round) == (1, 5)
    following = Hydra.next
    monkeypatch.setattr(Hydra, "next", lambda *given: sizes.add(len(given[2])) or following(*given))
    asking = timing.draft_ratio(target, drafter)
    assert asking.further_round == 0.5 and asking.ratio > 0 and sizes == {timing.LOOKED}
    pairs = Falcon(FalconConfig(num_heads=3), target.spec, target.shared).eval()
    assert timing.draft_ratio(target, pairs).further_round == 0.5, "the last pass gives one depth of two"


def test_what_follows_its_like_is_run_before_it_is_timed():
    told = []
    cell = Cell(lambda: told.append("run"), lambda: told.append("reset"), before=2)
    assert 0 <= cell.time(torch.device("cpu")) < 1
    assert told == ["run", "reset"] * 3


def test_asking_costs_what_it_adds_to_the_forward_behind_it(monkeypatch):
    """Heads that draft in no time and make the forward behind them slower cost that."""
    target, clock = tiny_target(), [0.0]
    heads = Medusa(MedusaConfig(num_heads=2), target.spec, target.shared).eval()
    monkeypatch.setattr(timing, "now", lambda device: clock[0])
    is_cold, forward, draft_all = [False], target.forward, heads.draft_all

    def slower(spans, *rest):
        clock[0] += 3.0 if is_cold[0] and len(spans) == 1 else 2.0
        is_cold[0] = False
        return forward(spans, *rest)

    def draft(*parts):
        is_cold[0] = True
        return draft_all(*parts)

    monkeypatch.setattr(target, "forward", slower)
    monkeypatch.setattr(heads, "draft_all", draft)
    assert timing.draft_ratio(target, heads).ratio == 0.5
