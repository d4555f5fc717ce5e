"""amphista evaluate: questions x methods in one run, interleaved; records, numbers with intervals, a report.

amphista evaluate spec_bench --limit 60 --methods none,hf,hf-lookup,medusa,amphista@16 --out runs/spec-bench
amphista evaluate questions.jsonl --methods none,mine=runs/best@16 --temperature 0.7 --repeats 3 --out runs/mine --json
"""

from __future__ import annotations

import json
import sys
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from amphista.cli import options
from amphista.target import DEFAULT_TARGET

if TYPE_CHECKING:
    from amphista.evaluation.questions import QuestionSet
    from amphista.evaluation.run import EvaluationConfig


FAILED_ANSWERS = 1  # the exit code: the run is whole, but some of its answers are crashes

Methods = Annotated[
    str,
    typer.Option(
        metavar="NAME[=DRAFTER][@TREE],...",
        help="none, hf, hf-lookup, hf-assisted=MODEL, a shipped drafter (amphista, medusa: heads alone), lookup, "
        "amphista+lookup, medusa+lookup, or name=PATH; none is added where it is missing.",
    ),
]


@options.with_records
def evaluate(
    choice: options.ChoiceOptions,
    questions: Annotated[str, typer.Argument(help="mt_bench, spec_bench, humaneval, gsm8k, or a JSONL file.")],
    methods: Methods,
    out: Annotated[Path, typer.Option(help="Folder for records and report; the same command again resumes it.")],
    data: Annotated[
        Path | None, typer.Option(help="Folder with the named sets (or AMPHISTA_DATA); else they are fetched.")
    ] = None,
    limit: Annotated[int | None, typer.Option(help="That many questions, spread evenly over the set.")] = None,
    repeats: Annotated[int, typer.Option(help="Answer everything R times, each time with other seeds.")] = 1,
    batch_size: Annotated[
        int, typer.Option(help="Answer so many questions together; an answer's seconds are then those of shared steps.")
    ] = 1,
    target: options.Target = DEFAULT_TARGET,
    allow_other_target: options.AllowOtherTarget = False,
    device: options.Device = None,
    dtype: options.Dtype = None,
    fast: options.Fast = True,
    native: options.Native = True,
    tree: options.Tree = None,
    system: options.System = None,
    json_lines: Annotated[
        bool, typer.Option("--json", help="Print the numbers as one JSON object at the end.")
    ] = False,
) -> None:
    """Compare methods on questions: the same tokens? how many per forward? how much faster?"""
    from amphista.evaluation.methods import MethodSettings, parse_methods
    from amphista.evaluation.questions import load_questions
    from amphista.evaluation.run import EvaluationConfig
    from amphista.tree.grow import check_tree

    check_tree(tree)
    config = EvaluationConfig(
        methods=tuple(parse_methods(methods)),
        params=replace(choice.params(), seed=choice.seed or 0),
        settings=MethodSettings(tree=tree, allow_other_target=allow_other_target),
        repeats=repeats,
        system=system,
        batch_size=batch_size,
    )
    _run(config, load_questions(questions, data, limit), (target, device, dtype, fast, native), out, json_lines)


def _run(
    config: EvaluationConfig,
    asked: QuestionSet,
    target: tuple[str, str | None, str | None, bool, bool],
    out: Path,
    json_lines: bool,
) -> None:
    """Measure, report, print; `target` is its name, device, dtype and whether it may be fast, and native."""
    from amphista.cli.progress import StepProgress
    from amphista.cli.standard import resumable
    from amphista.evaluation.metrics import contract
    from amphista.evaluation.report import markdown_tables, write_report
    from amphista.evaluation.run import Evaluation
    from amphista.target.loading import load_target

    name, device, dtype, fast, native = target
    loaded = load_target(name, device=device, dtype=dtype, fast=fast, native=native)
    with resumable(out), Evaluation(loaded, asked, config, out) as evaluation:
        with StepProgress() as progress:
            evaluation.run(progress.step)
        summary = evaluation.finish()
        write_report(out, summary)
    print(markdown_tables(summary), file=sys.stderr if json_lines else sys.stdout)
    print(f"amphista: the report is {out / 'report.html'}", file=sys.stderr)
    if json_lines:
        print(json.dumps(contract(summary["measures"], len(asked.questions))))
    failed = len(summary["failures"])
    if failed:
        print(f"amphista: {failed} of {evaluation.num_records} answers failed: the report names them", file=sys.stderr)
        raise typer.Exit(FAILED_ANSWERS)
