"""Figures as SVG: speedup by task, acceptance by depth, time by phase."""

from __future__ import annotations

import io
from collections.abc import Callable
from typing import Any

import matplotlib
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from amphista.evaluation.metrics import ALL

COLOURS = ["#8a94a6", "#4c78a8", "#72b7b2", "#f58518", "#e45756", "#54a24b", "#b279a2", "#9d755d"]
PHASES = ("prefill", "draft", "tree", "verify", "accept", "commit", "generate")
STYLE = {
    "font.size": 10,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "svg.hashsalt": "amphista",
    "text.parse_math": False,
}


def figures(summary: dict[str, Any]) -> list[tuple[str, str]]:
    """(caption, SVG) of every figure that has data."""
    drawn: list[tuple[str, Callable[[Axes, dict[str, Any]], None]]] = [
        ("Speedup over none by task, 95 % bootstrap intervals", _speedup_by_task),
        ("Share of steps that accept at least d draft tokens", _acceptance),
        ("Where the seconds go", _phases),
    ]
    return [(caption, _svg(draw, summary)) for caption, draw in drawn]


def _svg(draw: Callable[[Axes, dict[str, Any]], None], summary: dict[str, Any]) -> str:
    with matplotlib.rc_context(STYLE):
        figure = Figure(figsize=(6.4, 3.6), layout="constrained")
        draw(figure.add_subplot(), summary)
        stream = io.StringIO()
        figure.savefig(stream, format="svg", metadata={"Date": None})
    text = stream.getvalue()
    return text[text.index("<svg") :]


def _coloured(summary: dict[str, Any]) -> dict[str, str]:
    return {name: COLOURS[i % len(COLOURS)] for i, name in enumerate(summary["measures"][ALL])}


def _speedup_by_task(axes: Axes, summary: dict[str, Any]) -> None:
    tasks = [task for task in summary["measures"] if task != ALL]
    tasks = tasks if len(tasks) == 1 else [*tasks, ALL]
    methods = {name: colour for name, colour in _coloured(summary).items() if name != "none"}
    width = 0.8 / max(1, len(methods))
    for i, (name, colour) in enumerate(methods.items()):
        for j, task in enumerate(tasks):
            measures = summary["measures"][task][name]
            if measures["speedup"] is None:
                continue
            low, high = measures["speedup_interval"]
            value = measures["speedup"]
            axes.bar(
                j + (i - (len(methods) - 1) / 2) * width,
                value,
                width,
                color=colour,
                yerr=[[max(0.0, value - low)], [max(0.0, high - value)]],
                error_kw={"elinewidth": 0.8},
                label=name if name not in axes.get_legend_handles_labels()[1] else None,
            )
    axes.axhline(1, color="#333333", linewidth=0.8)
    axes.set_xticks(range(len(tasks)), [task.replace("_", "\n") for task in tasks], fontsize=7 if len(tasks) > 5 else 9)
    axes.set_ylabel("speedup over none")
    if axes.get_legend_handles_labels()[0]:
        axes.legend(frameon=False, ncols=min(4, len(methods)), fontsize=8, loc="upper left", bbox_to_anchor=(0, 1.16))


def _acceptance(axes: Axes, summary: dict[str, Any]) -> None:
    for name, colour in _coloured(summary).items():
        shares = summary["measures"][ALL][name]["acceptance_by_depth"]
        if shares:
            axes.plot(range(1, len(shares) + 1), shares, marker="o", color=colour, label=name)
    axes.set_xlabel("depth d")
    axes.set_ylim(0, 1)
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    if axes.get_legend_handles_labels()[0]:
        axes.legend(frameon=False)


def _phases(axes: Axes, summary: dict[str, Any]) -> None:
    names = list(summary["measures"][ALL])
    tokens = [max(1, summary["measures"][ALL][name]["num_tokens"]) for name in names]
    left = [0.0] * len(names)
    for i, phase in enumerate(PHASES):
        seconds = [summary["measures"][ALL][name]["phase_seconds"].get(phase, 0.0) for name in names]
        if any(seconds):
            per_token = [1000 * s / n for s, n in zip(seconds, tokens, strict=True)]
            axes.barh(names, per_token, left=left, color=COLOURS[(i + 1) % len(COLOURS)], label=phase)
            left = [a + b for a, b in zip(left, per_token, strict=True)]
    axes.invert_yaxis()
    axes.set_xlabel("milliseconds per token")
    if axes.get_legend_handles_labels()[0]:
        axes.legend(frameon=False, ncols=6, fontsize=8, loc="upper left", bbox_to_anchor=(0, 1.14))
