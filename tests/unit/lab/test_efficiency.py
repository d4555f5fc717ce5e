"""benchmarks/lab/efficiency.py: what was possible and what was lost, worked out by hand."""

from __future__ import annotations

import pytest

from benchmarks.lab.efficiency import efficiencies
from tests.unit.evaluation.test_metrics import record

COSTS = {"fast": {"verify_ms": [10.0, 11.0, 12.0, 13.0], "draft_ms": 2.0}}
NONE = record(
    "none", "a1", tokens=5, seconds=1.048, accepted=[0] * 4, step_seconds=[0.012] * 4, phase_seconds={"verify": 0.048}
)


def drafting(**fields):
    """Two steps of two tokens: 4 rows with heads asked, 2 rows without; 36 ms in all."""
    phases = {"prefill": 1.0, "draft": 0.003, "tree": 0.001, "verify": 0.026, "accept": 0.001, "commit": 0.001}
    base = dict(tokens=5, seconds=1.036, accepted=[1, 1], tree_nodes=[4, 2], drafted=[1, 0], phase_seconds=phases)
    return record("fast", "a1", **base | fields)


def test_by_hand():
    found = efficiencies([NONE, drafting()], COSTS)["fast"]
    promised_step = (13 + 2 + 11) / 2 / 10  # 1.3 forwards of one row
    assert found["promised_step"] == pytest.approx(promised_step)
    assert found["promised"] == pytest.approx(2 / promised_step)
    assert found["realised"] == pytest.approx((4 / 0.036) / (4 / 0.048))
    assert found["share"] == pytest.approx((0.048 / 0.036) / (2 / promised_step))
    assert found["step"] == pytest.approx(18 / 12)  # 18 ms a step, one of none takes 12
    assert found["lost_drafting"] == pytest.approx(2 / 12 - 1 / 10)
    assert found["lost_forwards"] == pytest.approx(14 / 12 - 12 / 10)
    assert found["lost_between"] == pytest.approx(2 / 12)
    lost = found["lost_drafting"] + found["lost_forwards"] + found["lost_between"]
    assert lost == pytest.approx(found["step"] - found["promised_step"])
    assert found["share_interval"] == pytest.approx((found["share"], found["share"]))  # a single question


def test_what_is_as_fast_as_promised_has_a_share_of_one():
    plain = record("none", "a1", tokens=5, seconds=1.04, accepted=[0] * 4)
    phases = {"verify": 0.024, "draft": 0.002}
    found = efficiencies([plain, drafting(seconds=1.026, phase_seconds=phases)], COSTS)["fast"]
    assert found["share"] == pytest.approx(1)
    assert [found[f"lost_{part}"] for part in ("drafting", "forwards", "between")] == pytest.approx([0, 0, 0], abs=1e-9)


@pytest.mark.parametrize(
    "records",
    [
        [NONE],
        [drafting()],
        [NONE, drafting(error="x")],
        [NONE, drafting(tree_nodes=[5, 2])],  # no cost is known for 5 rows
        [NONE, drafting(drafted=[])],  # an older record, which does not say where heads were asked
        [record("none", "a1", tokens=1, seconds=1.0), record("fast", "a1", tokens=1, seconds=1.0)],  # no step
    ],
)
def test_what_is_not_known_is_not_told(records):
    assert efficiencies(records, COSTS) == {}


def test_lookup_alone_asks_no_heads():
    costs = {"fast": {"verify_ms": [10.0, 11.0, 12.0, 13.0], "draft_ms": 0.0}}
    assert efficiencies([NONE, drafting(drafted=[])], costs)["fast"]["promised_step"] == pytest.approx(1.2)
