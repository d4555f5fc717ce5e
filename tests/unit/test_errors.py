"""errors.py: what is told of other people's errors."""

from __future__ import annotations

import pytest

from amphista.errors import MOST_OF_REST, first_line


@pytest.mark.parametrize(
    ("said", "told"),
    [
        ("no such file\nand more", "no such file"),
        ("", "ValueError"),
        ("Cannot be had from one of: \n(1) a\n\n(2) b", "Cannot be had from one of: (1) a (2) b"),
        ("nothing behind:", "nothing behind"),
        ("long:\n" + "x" * 999, "long: " + "x" * MOST_OF_REST + "..."),
    ],
)
def test_a_line_that_ends_with_a_colon_goes_on(said, told):
    assert first_line(ValueError(said)) == told
