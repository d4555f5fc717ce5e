from __future__ import annotations

import dataclasses
from typing import Any, Literal

import pytest

from amphista.config import apply_overrides, build, read_recipe
from amphista.errors import ConfigError


@dataclasses.dataclass(frozen=True, kw_only=True)
class Inner:
    rate: float = 0.5
    steps: int | None = None
    is_on: bool = False
    files: tuple[str, ...] = ()


@dataclasses.dataclass(frozen=True, kw_only=True)
class Outer:
    kind: Literal["a", "b"] = "a"
    name: str = "x"
    inner: Inner = Inner()
    anything: dict[str, Any] = dataclasses.field(default_factory=dict)
    values: list[float] = dataclasses.field(default_factory=list)
    limit: int = 3


@dataclasses.dataclass(frozen=True, kw_only=True)
class Needy:
    must: int


def test_values_arrive_with_their_types():
    built = build(
        Outer, {"kind": "b", "inner": {"rate": 2, "steps": 4, "is_on": True, "files": ["f", "g"]}, "limit": 7}
    )
    assert built == Outer(kind="b", inner=Inner(rate=2.0, steps=4, is_on=True, files=("f", "g")), limit=7)
    assert isinstance(built.inner.rate, float)
    assert build(Outer, {"inner": {"steps": None}}).inner.steps is None


def test_what_ran_can_be_written_and_read_back():
    built = build(Outer, {"inner": {"rate": 0.1}, "anything": {"deep": 1}})
    assert build(Outer, dataclasses.asdict(built)) == built


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"limt": 1}, "unknown setting 'limt': did you mean 'limit'?"),
        ({"inner": {"step": 1}}, "unknown setting 'inner.step': did you mean 'steps'?"),
        ({"zzzzzz": 1}, "unknown setting 'zzzzzz': known: kind, name, inner"),
        ({"limit": 1.5}, "limit is 1.5: expected int"),
        ({"limit": "1"}, "limit is '1': expected int"),
        ({"limit": True}, "limit is True: expected int"),
        ({"limit": None}, "limit is None: expected int"),
        ({"name": 3}, "name is 3: expected str"),
        ({"kind": "c"}, "kind is 'c': expected one of 'a', 'b'"),
        ({"inner": {"rate": "fast"}}, "inner.rate is 'fast': expected float"),
        ({"inner": {"rate": True}}, "inner.rate is True: expected float"),
        ({"inner": {"steps": 1.5}}, "inner.steps is 1.5: expected int"),
        ({"inner": {"is_on": 1}}, "inner.is_on is 1: expected bool"),
        ({"inner": {"files": "one.jsonl"}}, "inner.files is 'one.jsonl': expected a list"),
        ({"values": "12"}, "values is '12': expected a list"),
        ({"anything": 3}, "anything is 3: expected a section"),
        ({"inner": 3}, "inner is 3: expected Inner"),
    ],
)
def test_what_cannot_be_is_refused_by_name(values, message):
    with pytest.raises(ConfigError) as caught:
        build(Outer, values)
    assert message in str(caught.value)


def test_a_missing_value_is_named():
    with pytest.raises(ConfigError, match=r"Needy.*'must'"):
        build(Needy, {})


def test_overrides_are_toml_and_bare_words_are_strings():
    before = {"inner": {"rate": 1.0, "steps": 2}, "limit": 1}
    after = apply_overrides(
        before,
        ["inner.rate=5e-4", "name=word", 'kind="b"', "inner.is_on=true", "inner.files=['f']", "new.deep.key=a=b"],
    )
    assert after == {
        "inner": {"rate": 5e-4, "steps": 2, "is_on": True, "files": ["f"]},
        "limit": 1,
        "name": "word",
        "kind": "b",
        "new": {"deep": {"key": "a=b"}},
    }
    assert before == {"inner": {"rate": 1.0, "steps": 2}, "limit": 1}, "the recipe itself stays as it was"


def test_later_overrides_win():
    assert apply_overrides({}, ["limit=1", "limit=2"]) == {"limit": 2}


@pytest.mark.parametrize("override", ["limit", "=3", ""])
def test_an_override_without_key_or_value_is_refused(override):
    with pytest.raises(ConfigError, match="expected key=value"):
        apply_overrides({}, [override])


def test_an_override_below_a_plain_value_is_refused():
    with pytest.raises(ConfigError, match="'limit' is the value 1, not a section"):
        apply_overrides({"limit": 1}, ["limit.deep=2"])


def test_recipe(tmp_path):
    file = tmp_path / "recipe.toml"
    file.write_text("limit = 2\n[inner]\nrate = 2e-5\n")
    assert build(Outer, read_recipe(file)) == Outer(limit=2, inner=Inner(rate=2e-5))
    file.write_text("limit = ")
    with pytest.raises(ConfigError, match="is not TOML"):
        read_recipe(file)
    with pytest.raises(ConfigError, match="cannot read recipe"):
        read_recipe(tmp_path / "none.toml")
