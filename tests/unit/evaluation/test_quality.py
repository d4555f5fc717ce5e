"""evaluation/quality.py: the number an answer ends on, and the program an answer means. All problems are invented."""

from __future__ import annotations

import pytest

from amphista.errors import ConfigError, DataError
from amphista.evaluation.quality import gsm8k_correct, gsm8k_reference, humaneval_program, humaneval_score, score
from amphista.evaluation.sandbox import SandboxLimits


@pytest.mark.parametrize(
    ("text", "number"),
    [("so 2+3=5\n#### 5", "5"), ("#### 1,234", "1234"), ("#### $18.50", "18.50"), ("a #### 1 b #### -7", "-7")],
)
def test_references(text, number):
    assert gsm8k_reference(text) == number


@pytest.mark.parametrize("text", ["", "5", "#### none"])
def test_a_reference_without_a_number(text):
    with pytest.raises(DataError, match="####"):
        gsm8k_reference(text)


@pytest.mark.parametrize(
    ("text", "reference", "correct"),
    [
        ("The answer is 18.", "18", True),
        ("The answer is $18.00 a day.", "18", True),
        ("It costs 3 and 4. The answer is: 1,200", "1200", True),
        ("First 5, then 7, so 12", "12", True),
        ("The answer is 5. Check: 2 + 3 = 5 and 9 - 4 = 5, 100% sure", "5", True),
        ("#### 7", "7", True),
        ("We get \\boxed{42} of 100", "42", True),
        ("minus: -3", "-3", True),
        ("10 - 3", "3", True),
        ("0.5", "1/2", True),
        ("The answer is 19.", "18", False),
        ("The answer is 180.", "18", False),
        ("I do not know.", "18", False),
        ("", "18", False),
        ("1/0", "1", False),
    ],
)
def test_which_number_counts(text, reference, correct):
    assert gsm8k_correct(text, reference) is correct


PROMPT = 'from typing import List\n\n\ndef double_all(xs: List[int]) -> List[int]:\n    """Twice each."""\n'
TEST = "def check(f):\n    assert f([1, 2]) == [2, 4]\n    assert f([]) == []\n"
BODY = "    return [2 * x for x in xs]\n"


@pytest.mark.parametrize(
    "answer",
    [
        BODY,
        "return [2 * x for x in xs]",
        f"```python\n{PROMPT}{BODY}```",
        f"Here it is:\n```python\ndef double_all(xs):\n{BODY}```\nIt doubles each element.",
        f"```\n{PROMPT}{BODY}",
        f"def double_all(xs: List[int]):\n{BODY}\nThis works because it doubles.",
        f"```python\ndef double_all(xs):\n{BODY}\nprint(double_all([1]))\ndef unfinis",
        "```python\ndef helper(x):\n    return 2 * x\n\ndef double_all(xs):\n    return [helper(x) for x in xs]\n```",
    ],
)
def test_answers_of_every_shape_pass(answer):
    assert humaneval_score(PROMPT, "double_all", TEST, answer).correct


@pytest.mark.parametrize(
    ("answer", "reason"),
    [
        ("    return xs\n", "failed: AssertionError"),
        ("I cannot do that.", "does not parse"),
        (f"```python\n{PROMPT}```", "failed: "),
        ("    while True:\n        pass\n", "timed out"),
        ("    import sys\n    sys.exit(0)\n", "failed: SystemExit"),
    ],
)
def test_wrong_answers_fail_for_their_own_reason(answer, reason):
    limits = SandboxLimits(wall_seconds=1.0, cpu_seconds=1)
    verdict = humaneval_score(PROMPT, "double_all", TEST, answer, limits)
    assert not verdict.correct and verdict.reason.startswith(reason)


def test_scores_by_kind():
    fields = {"prompt": PROMPT, "entry_point": "double_all", "test": TEST}
    assert score("humaneval", fields, BODY).correct and score("gsm8k", {"reference": "3"}, "The answer is 3.").correct


def test_an_answer_cannot_bring_its_own_tests():
    answer = "```python\ndef double_all(xs):\n    return xs\n\ndef check(f):\n    pass\n```"
    assert not humaneval_score(PROMPT, "double_all", TEST, answer).correct


def test_bad_input():
    with pytest.raises(DataError, match="entry point"):
        humaneval_program(PROMPT, "no name", TEST, BODY)
    with pytest.raises(ConfigError, match="'essay'"):
        score("essay", {}, "")
