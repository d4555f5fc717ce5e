"""Answer quality where an answer can be checked by machine: GSM8K by its final number, HumanEval by running its tests.

Sources: GSM8K, arXiv 2110.14168 (the final answer stands after `####`; exact match). HumanEval, arXiv 2107.03374
(pass@1 with one sample per problem: the share of problems whose tests pass; completions end where a new top-level
statement begins, section 2).
"""

from __future__ import annotations

import ast
import re
import textwrap
import warnings
from collections.abc import Iterator
from dataclasses import dataclass
from fractions import Fraction

from amphista.errors import ConfigError, DataError
from amphista.evaluation.sandbox import DEFAULT_LIMITS, PASSED, SandboxLimits, run_python

MAX_STARTS = 20  # lines of one text that are tried as the beginning of its code
NUMBER = re.compile(
    r"""(?:(?<![\w.)\]])(?P<sign>[-\u2212\u2013]))?     # a minus behind a word or a number subtracts or joins
        (?:\\?[$€£¥]\s?)? (?P<inner_sign>(?<=[$€£¥])[-\u2212])?
        (?<![A-Za-z0-9_.])
        (?P<digits>[0-9]{1,3}(?:,[0-9]{3})+(?![0-9])(?:\.[0-9]+)? | [0-9]+(?:\.[0-9]+)? | \.[0-9]+)
        (?P<divisor>/[0-9]+(?![0-9/.]))?""",
    re.VERBOSE,
)
HASHES = re.compile(r"####[\s*:=(\\]*(?=[-\u2212\u2013$€£¥.0-9])")
ORDINAL = re.compile(r"[.):]\s*[A-Za-z*]")
MARKER = re.compile(r"answer[\s*_]*(?:\bis\b|:|=)|\\boxed\s*(?P<brace>\{)", re.IGNORECASE)
LATEX = (
    (re.compile(r"\\[dt]?frac\{(-?[0-9]+)\}\{([0-9]+)\}"), r"\1/\2"),
    (re.compile(r"\{,\}"), ","),
    (re.compile(r"\\[,!]"), ""),
)


@dataclass(frozen=True)
class Score:
    """Whether an answer is correct, and in a few words why."""

    correct: bool
    reason: str


def score(kind: str, fields: dict[str, str], answer_text: str) -> Score:
    """The verdict on one answer to a question of that kind; raises ConfigError for an unknown kind."""
    if kind == "gsm8k":
        return gsm8k_score(answer_text, fields["reference"])
    if kind == "humaneval":
        return humaneval_score(fields["prompt"], fields["entry_point"], fields["test"], answer_text)
    raise ConfigError(f"answers of kind {kind!r} cannot be scored: expected gsm8k or humaneval")


# -- GSM8K: numbers -----------------------------------------------------------------------------------------------


def gsm8k_reference(answer: str) -> str:
    """The number behind `####`, without commas and currency; raises DataError if there is none."""
    _, mark, tail = answer.rpartition("####")
    found = NUMBER.search(tail)
    if not mark or found is None:
        raise DataError("a reference answer of GSM8K must end with '####' and a number, but this one has none")
    return _plain(found)


def gsm8k_correct(answer_text: str, reference: str) -> bool:
    """Whether the number an answer ends on equals the reference; raises DataError if that is no number."""
    return gsm8k_score(answer_text, reference).correct


def gsm8k_score(answer_text: str, reference: str) -> Score:
    """Exact match of values (18 equals 18.00); the reason tells another number from none."""
    wanted = NUMBER.fullmatch(reference.strip())
    expected = _value(wanted) if wanted else None
    if expected is None:
        raise DataError(f"the reference {reference!r} is not a number")
    found = _final_number(answer_text)
    if found is None:
        return Score(False, "no number")
    return Score(True, PASSED) if _value(found) == expected else Score(False, "another number")


def _final_number(text: str) -> re.Match[str] | None:
    """First that exists: the number at the last `####`, at the last "answer is" or boxed one, the last number at all.

    `####` is also a heading of markdown: it counts only with a number right behind it that does not count steps.
    """
    for pattern, replacement in LATEX:
        text = pattern.sub(replacement, text)
    for mark in reversed(list(HASHES.finditer(text))):
        found = NUMBER.match(text, mark.end())
        if found and not ORDINAL.match(text, found.end()):
            return found
    for mark in reversed(list(MARKER.finditer(text))):
        end = text.find("}", mark.end()) if mark["brace"] else -1
        found = NUMBER.search(text, mark.end(), end if end >= 0 else len(text))
        if found:
            return found
    return next(reversed(list(NUMBER.finditer(text))), None)


def _plain(number: re.Match[str]) -> str:
    sign = "-" if number["sign"] or number["inner_sign"] else ""
    return sign + number["digits"].replace(",", "") + (number["divisor"] or "")


def _value(number: re.Match[str]) -> Fraction | None:
    """None for a division by zero, and for the thousands of digits of an answer that loops."""
    try:
        return Fraction(_plain(number))
    except (ValueError, ZeroDivisionError):
        return None


# -- HumanEval: programs ------------------------------------------------------------------------------------------


def humaneval_score(
    prompt: str, entry_point: str, test: str, answer_text: str, limits: SandboxLimits = DEFAULT_LIMITS
) -> Score:
    """Whether the answer's function passes the tests in the sandbox; reasons are those of `SandboxResult`."""
    result = run_python(humaneval_program(prompt, entry_point, test, answer_text), limits)
    return Score(result.passed, result.reason)


def humaneval_program(prompt: str, entry_point: str, test: str, answer_text: str) -> str:
    """The answer's function, its tests, and the call that runs them; raises DataError if entry_point is no name.

    Candidates, the first wins that parses and defines entry_point with more than a docstring:
    1. each fenced block, in order, as the whole function behind the prompt's imports and helpers;
    2. each fenced block as the function's body behind the prompt: as it is, with the first line's lost indentation
       put back, indented as a whole;
    3. the text as the whole function, from each line that looks like the beginning of code;
    4. the text as the function's body, as in 2.
    Each may lose its end, from a top-level line on: prose, or what the token limit cut off. Behind the function only
    further definitions and imports are kept. Without a candidate it is the prompt with the first block or the text.
    """
    if not entry_point.isidentifier():
        raise DataError(f"the entry point is {entry_point!r}: expected the name of a function")
    prompt, text = _unix(prompt), _unix(answer_text)
    candidates = _candidates(prompt, entry_point, text)
    defined = next(filter(None, (_definition(source, entry_point) for source in candidates)), None)
    if defined is None:
        defined = prompt + next(iter(_blocks(text)), text)
    return f"{defined}\n\n{test}\n\ncheck({entry_point})\n"


def _unix(text: str) -> str:
    return text.replace("\r\n", "\n").replace("\r", "\n")


def _candidates(prompt: str, entry_point: str, text: str) -> Iterator[str]:
    head = re.split(rf"^(?:async )?def {entry_point}\b", prompt, maxsplit=1, flags=re.MULTILINE)[0]
    blocks = _blocks(text)
    for pieces in (blocks, [text]):
        for piece in pieces:
            whole = textwrap.dedent(piece)
            starts = re.finditer(r"^(?:(?:async )?def|class|import|from|@\w+)\b", whole, re.MULTILINE)
            begins = [match.start() for match in starts][:MAX_STARTS]
            if pieces is blocks:
                begins = [0, *begins]
            yield from (f"{head}\n{whole[begin:]}" for begin in begins)
        for piece in pieces:
            yield from _as_body(prompt, piece)


def _as_body(prompt: str, code: str) -> Iterator[str]:
    yield prompt + code
    above = prompt.rstrip()
    last_line = above.rpartition("\n")[2]
    indentation = last_line[: len(last_line) - len(last_line.lstrip())] or "    "
    yield f"{above}\n{indentation}{code.strip()}"
    yield f"{above}\n{textwrap.indent(textwrap.dedent(code), indentation)}"


def _blocks(text: str) -> list[str]:
    """Contents of fenced blocks; the last may lack its closing fence, and a closing one may end a line of code."""
    blocks: list[str] = []
    lines: list[str] | None = None
    fence = ""
    for line in text.split("\n"):
        opening = re.match(r"\s*(```|~~~)", line)
        if lines is None:
            if opening:
                fence, lines = opening[1], []
        elif line.rstrip().endswith(fence):
            blocks.append("\n".join([*lines, line.rstrip().removesuffix(fence)]))
            lines = None
        else:
            lines.append(line)
    return blocks if lines is None else [*blocks, "\n".join(lines)]


def _definition(source: str, entry_point: str) -> str | None:
    """The usable part of a source, or None if that does not define entry_point."""
    lines = source.split("\n")
    tree = _parse_beginning(lines)
    if tree is None:
        return None
    places = [i for i, node in enumerate(tree.body) if _defines(node, entry_point)]
    if not places or _is_stub(tree.body[places[-1]]):
        return None
    future: list[str] = []
    for i, node in enumerate(tree.body):
        from_future = isinstance(node, ast.ImportFrom) and node.module == "__future__"
        if from_future or (i > places[-1] and not isinstance(node, _KEPT)):
            where = slice(node.lineno - 1, node.end_lineno)
            future += lines[where] if from_future else []  # they must come first, but the prompt's head stands there
            lines[where] = [""] * len(lines[where])
    return "\n".join([*future, *lines])


_KEPT = (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef, ast.Import, ast.ImportFrom)


def _parse_beginning(lines: list[str]) -> ast.Module | None:
    """Parse, after cutting `lines` in place at the top-level line that holds the first error, until none is left."""
    while lines:
        try:
            with warnings.catch_warnings():  # an odd escape in an answer is not our concern
                warnings.simplefilter("ignore")
                return ast.parse("\n".join(lines))
        except SyntaxError as error:
            bad = min(error.lineno or len(lines), len(lines)) - 1
        except (ValueError, RecursionError, MemoryError):
            return None
        while bad > 0 and not re.match(r"\S", lines[bad]):
            bad -= 1
        del lines[max(bad, 0) :]
    return None


def _defines(node: ast.stmt, name: str) -> bool:
    if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
        return node.name == name
    return isinstance(node, ast.Assign) and any(isinstance(t, ast.Name) and t.id == name for t in node.targets)


def _is_stub(node: ast.stmt) -> bool:
    """A signature that only repeats the question: nothing but a docstring, `...` or `pass`."""
    body = getattr(node, "body", None) if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef) else None
    return body is not None and all(
        isinstance(s, ast.Pass) or (isinstance(s, ast.Expr) and isinstance(s.value, ast.Constant)) for s in body
    )
