"""The house stands: imports point down, third parties stay fenced in, sizes hold, public names are complete."""

from __future__ import annotations

import ast
from pathlib import Path

import amphista

SRC = Path(amphista.__file__).parent
LAYERS = [  # bottom up; what stands on one line does not import each other
    {"errors"},
    {"config", "provenance", "jsonl", "files"},
    {"prompts"},
    {"native"},
    {"tree", "cache", "kernels"},
    {"target"},
    {"accept", "drafter"},
    {"engine"},
    {"llm"},
    {"custom_generate", "vllm_proposer", "train", "evaluation", "serve"},
    {"cli"},
    {"__init__", "__main__"},
]
HEIGHT = {room: height for height, rooms in enumerate(LAYERS) for room in rooms}
FENCES = {
    "typer": ("cli/",),
    "accelerate": ("train/",),
    "transformers": ("target/", "cache/hf.py"),
    "huggingface_hub": ("drafter/hub.py", "drafter/card.py"),
    "matplotlib": ("evaluation/plots.py",),
    "jinja2": ("evaluation/report.py",),
    "fastapi": ("serve/",),
    "uvicorn": ("serve/server.py",),
    "prometheus_client": ("serve/metrics.py",),
    "ray": ("serve/ray_app.py",),
    "llguidance": ("serve/grammar.py",),
    "vllm": ("vllm_proposer.py",),
}
NARROW = {("drafter", "target"): "amphista.target.spec", ("accept", "target"): None}  # None: not at all
MAX_FUNCTION_LINES = 60
MAX_FILE_LINES = 400


def trees():
    for path in sorted(SRC.rglob("*.py")):
        yield path.relative_to(SRC).as_posix(), ast.parse(path.read_text(encoding="utf-8"))


def imports():
    """(file, line, dotted name) of every import anywhere in a file, those inside functions included."""
    for name, tree in trees():
        for node in ast.walk(tree):
            if isinstance(node, ast.Import):
                yield from ((name, node.lineno, alias.name) for alias in node.names)
            elif isinstance(node, ast.ImportFrom):
                assert node.level == 0, f"{name}:{node.lineno}: relative import"
                yield from ((name, node.lineno, f"{node.module}.{alias.name}") for alias in node.names)


def wrong_direction(name: str, imported: str) -> bool:
    here, there = name.removesuffix(".py").split("/")[0], f"{imported}.".split(".")[1]
    if here == there:
        return False
    if there not in HEIGHT:  # `from amphista import load`: the library itself goes to the rooms, not to the door
        return True
    if (here, there) in NARROW:
        allowed = NARROW[here, there]
        return allowed is None or not f"{imported}.".startswith(f"{allowed}.")
    return HEIGHT[there] >= HEIGHT[here]


def test_every_file_has_its_place():
    assert {name.removesuffix(".py").split("/")[0] for name, _ in trees()} <= HEIGHT.keys()


def test_imports_point_down():
    found = [(n, line, what) for n, line, what in imports() if what.split(".")[0] == "amphista"]
    assert len(found) > 100
    wrong = [f"{name}:{line}: {what}" for name, line, what in found if wrong_direction(name, what)]
    assert not wrong, "\n".join(wrong)


def test_third_parties_stay_behind_their_fences():
    wrong = [
        f"{name}:{line}: {what} belongs to {', '.join(FENCES[what.split('.')[0]])}"
        for name, line, what in imports()
        if what.split(".")[0] in FENCES and not name.startswith(FENCES[what.split(".")[0]])
    ]
    assert not wrong, "\n".join(wrong)


def test_sizes():
    wrong = []
    for name, tree in trees():
        num_lines = len((SRC / name).read_text(encoding="utf-8").splitlines())
        if num_lines > MAX_FILE_LINES:
            wrong.append(f"{name}: {num_lines} lines, at most {MAX_FILE_LINES}")
        for node in ast.walk(tree):
            if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
                size = (node.end_lineno or node.lineno) - node.lineno + 1
                if size > MAX_FUNCTION_LINES:
                    wrong.append(f"{name}:{node.lineno}: {node.name} has {size} lines, at most {MAX_FUNCTION_LINES}")
    assert not wrong, "\n".join(wrong)


def test_public_names_are_complete_sorted_and_there():
    names = amphista.__all__
    assert set(names) <= set(dir(amphista))
    assert set(names) == {*amphista._HOMES, "__version__"} and len(set(names)) == len(names)
    order = {True: 0, False: 1}  # constants, classes, the rest: the order that ruff keeps
    assert names == sorted(names, key=lambda n: (order[n.isupper()] if n[0].isupper() else 2, n))
    for name in names:
        assert getattr(amphista, name) is not None
