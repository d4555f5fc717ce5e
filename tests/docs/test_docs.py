"""README and docs tell the truth: links lead somewhere, commands are ones the programs take, Python blocks run, papers
and figures are those of source and records."""

from __future__ import annotations

import json
import re
import shlex
import tomllib
from pathlib import Path

import pytest
import typer

import amphista
from amphista.cli.app import app
from benchmarks.lab.readme_table import SUMMARY, with_table
from tests.talkative import talkative_model
from tests.tiny import byte_tokenizer

ROOT = Path(__file__).parents[2]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
OTHERS = [ROOT / "benchmarks" / "README.md", *ROOT.glob("*.md")]
PROGRAMS = {"curl", "lm_eval", "git", "hf"}  # other people's
LAUNCHERS = {"accelerate", "torchrun", "python"}
NEEDS = {"transformers.md": "a hub", "vllm.md": "vLLM", "serve.md": "a server"}  # tested elsewhere, in full
ARXIV = re.compile(r"\b(\d{4}\.\d{5})\b")


def name(page):
    return page.relative_to(ROOT).as_posix()


def blocks(page, language):
    return re.findall(rf"^```{language}\n(.*?)^```", page.read_text(encoding="utf-8"), re.MULTILINE | re.DOTALL)


def commands():
    for page in PAGES:
        for block in blocks(page, "console"):
            for line in block.replace("\\\n", " ").splitlines():
                if line.startswith("$ "):
                    yield pytest.param(line[2:], id=f"{page.name}: {line[2:60]}")


@pytest.mark.parametrize("page", sorted({*PAGES, *OTHERS}), ids=name)
def test_links_lead_to_files(page):
    links = re.findall(r"\]\(([^)#\s]+)[^)]*\)", page.read_text(encoding="utf-8"))
    dead = [link for link in links if "://" not in link and not (page.parent / link).exists()]
    assert not dead


@pytest.mark.parametrize("line", list(commands()))
def test_commands_are_taken(line):
    """Parsed by the program's own parser; nothing is run."""
    words = shlex.split(re.sub(r"<[^>]*>", "PLACEHOLDER", line), comments=True)
    while "=" in words[0]:
        words.pop(0)
    program = Path(words[0]).name
    if program in LAUNCHERS and "-m" in words:
        at = words.index("-m") + 1
        program, words = words[at], words[at:]
    if program == "amphista":
        parse(words[1:])
    elif program == "make":
        assert re.search(rf"^{words[1]}:", (ROOT / "Makefile").read_text(), re.MULTILINE), words[1]
    elif program.startswith("benchmarks.lab"):
        assert program != "benchmarks.lab" or f'add_parser("{words[1]}"' in lab(), words[1]
    elif program == "pip":
        assert set(re.findall(r"amphista\[(.*?)\]", line)) <= extras().keys()
    elif program == "python":
        assert (ROOT / words[1]).is_file()
    else:
        assert program in PROGRAMS, program


def parse(arguments):
    """By the command line's parser, to its end; raises click's own error."""
    command, context, rest = typer.main.get_command(app), None, list(arguments)
    while True:
        context = command.make_context("amphista", rest, parent=context)
        if not hasattr(command, "commands"):
            return
        rest = [*context._protected_args, *context.args]
        if not rest:
            return
        _, command, rest = command.resolve_command(context, rest)


@pytest.mark.parametrize("page", PAGES, ids=name)
def test_commands_in_sentences_are_there(page):
    """`amphista dev tune` and the like: the command, and every option named with it."""
    text = re.sub(r"^```.*?^```", "", page.read_text(encoding="utf-8"), flags=re.MULTILINE | re.DOTALL)
    for span in re.findall(r"`amphista ([a-z][^`]*)`", text):
        command, words = typer.main.get_command(app), span.split()
        while words and hasattr(command, "commands"):
            assert words[0] in command.commands, span
            command = command.commands[words.pop(0)]
        known = {option for parameter in command.params for option in (*parameter.opts, *parameter.secondary_opts)}
        assert {word for word in words if word.startswith("--")} <= known | {"--help"}, span


def test_a_wrong_flag_would_be_found():
    with pytest.raises(Exception, match="--tre"):
        parse(["generate", "--tre", "4", "Hello"])


def lab():
    return (ROOT / "benchmarks" / "lab" / "__main__.py").read_text()


def extras():
    return tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A saved target that answers in printable characters, in the place of the default one."""
    made = tmp_path_factory.mktemp("docs-target")
    talkative_model(end_bias=-1e4).save_pretrained(made)
    byte_tokenizer().save_pretrained(made)
    return made


@pytest.mark.parametrize(
    "page", [page for page in PAGES if blocks(page, "python") and page.name not in NEEDS], ids=name
)
def test_python_blocks_run(page, folder, tmp_path, monkeypatch, capsys):
    """In the order of the page, in one namespace, on a tiny target."""
    load = amphista.load
    monkeypatch.setattr(amphista, "load", lambda *_, **__: load(folder), raising=False)
    space = {"llm": load(folder)}
    monkeypatch.chdir(tmp_path)
    for block in blocks(page, "python"):
        exec(compile(block, name(page), "exec"), space)


def test_every_paper_of_the_source_stands_in_the_index():
    listed = set(ARXIV.findall((ROOT / "docs" / "papers.md").read_text()))
    source = [path for path in (ROOT / "src").rglob("*") if path.suffix in {".py", ".c", ".h"}]
    cited = {found for path in source for found in re.findall(r"arXiv[ :]([\d., ]+)", path.read_text())}
    assert listed == {paper for text in cited for paper in ARXIV.findall(text)}


def test_the_reference_has_all_public_names():
    listed = re.findall(r"^::: ([\w.]+)$", (ROOT / "docs" / "reference.md").read_text(), re.MULTILINE)
    homes = {f"{getattr(amphista, one).__module__}.{one}" for one in amphista.__all__ if not one.startswith("_")}
    assert set(listed) == {*homes, "amphista.engine.stats.DecodeStats"}  # which answers have


@pytest.mark.parametrize("page", PAGES[:1] + [ROOT / "docs" / "index.md"], ids=name)
def test_the_first_command_decodes_the_target_as_it_is(page):
    first = next(line for line in blocks(page, "console")[0].splitlines() if line.startswith("$ amphista"))
    assert "--compare" in first and "--dtype" not in first


def test_the_first_drafters_output_is_its_records():
    """Decoded in the type that the page's command asks for, float32 then being the default."""
    page, record = ROOT / "docs" / "first-drafter.md", ROOT / "benchmarks" / "zen4-2-cores" / "first-drafter.txt"
    shown = "".join(blocks(page, "text")).splitlines()
    assert not [line for line in shown if line not in record.read_text(encoding="utf-8")]
    assert "--compare" in blocks(page, "console")[-1] and "--dtype float32" in blocks(page, "console")[-1]


def test_the_readme_has_the_table_of_its_record():
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    assert with_table(readme, json.loads((ROOT / SUMMARY).read_text(encoding="utf-8"))) == readme


def test_no_paragraph_of_the_readme_has_more_than_three_figures():
    text = re.sub(r"```.*?```|<!-- table.*?end of table -->", "", (ROOT / "README.md").read_text(), flags=re.DOTALL)
    text = re.sub(r"`[^`]*`|\]\([^)]*\)|arXiv [\d.]+|Apache-[\d.]+", "", text)
    figures = {
        part: re.findall(r"(?<![\w.-])\d+(?:\.\d+)*", part)
        for part in re.split(r"\n\s*\n|^- ", text, flags=re.MULTILINE)
    }
    assert not {part: found for part, found in figures.items() if len(found) > 3}


def test_the_site_builds_without_a_dead_link(tmp_path):
    """As `make docs` does it."""
    pytest.importorskip("material", reason="the site needs amphista[docs]")
    from mkdocs.commands.build import build
    from mkdocs.config import load_config

    build(load_config(str(ROOT / "mkdocs.yml"), site_dir=str(tmp_path / "site"), strict=True))
    page = (tmp_path / "site" / "cli" / "index.html").read_text()
    assert "amphista dev export" in page and "--drafter" in page
