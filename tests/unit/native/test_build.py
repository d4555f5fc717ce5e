"""The C step is built once, by whatever compiler is there, warns of nothing, and says in a line why it is not used."""

from __future__ import annotations

import asyncio
import os
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch

from amphista.engine.scheduler import Limits
from amphista.errors import NativeError
from amphista.llm import LLM
from amphista.native.build import BASE_FLAGS, BEST_FLAGS, SOURCES, build, find_compiler, leave_team, load
from amphista.serve.worker import Worker
from amphista.tree.token_tree import TokenTree
from tests.tiny import tiny_target

HERE = Path(__file__).parent
FAST = ("-O0",)  # the last -O counts


def compiler() -> list[str]:
    try:
        return find_compiler()
    except NativeError:
        pytest.skip("no C compiler")


@pytest.mark.parametrize("march", ["native", "x86-64-v3", "x86-64"])
def test_nothing_to_warn_of(march, tmp_path):
    flags = ["-Wall", "-Wextra", "-Werror", "-fopenmp", f"-march={march}", "-O1", "-shared", "-fPIC", "-std=c11"]
    command = [*compiler(), *flags, str(SOURCES / "native.c"), "-o", str(tmp_path / "step.so"), "-lm"]
    result = subprocess.run(command, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr


@pytest.mark.parametrize("march", ["native", "x86-64"])
def test_sanitizers_find_nothing(march, tmp_path):
    sanitizers = ["-fsanitize=address,undefined", "-fno-sanitize-recover=all", "-fno-omit-frame-pointer"]
    flags = ["-std=c11", "-O1", "-g", "-fopenmp", f"-march={march}", f"-I{SOURCES}", *sanitizers]
    program = tmp_path / "sanitized"
    command = [*compiler(), *flags, str(HERE / "sanitized.c"), "-o", str(program), "-lm"]
    result = subprocess.run(command, capture_output=True, text=True)
    if result.returncode and "san" in result.stderr and "cannot find" in result.stderr:
        pytest.skip("the compiler comes without sanitizers")
    assert result.returncode == 0, result.stderr
    ran = subprocess.run([str(program)], capture_output=True, text=True, env={"ASAN_OPTIONS": "detect_leaks=0"})
    assert (ran.returncode, ran.stdout) == (0, "ok\n"), ran.stderr


def test_built_once_and_by_two_at_once(tmp_path):
    compiler()
    with ThreadPoolExecutor(3) as pool:
        paths = set(pool.map(lambda _: build(FAST, tmp_path), range(3)))
    assert len(paths) == 1 and [path.name for path in tmp_path.iterdir()] == [paths.pop().name]
    written = next(tmp_path.iterdir()).stat().st_mtime_ns
    assert build(FAST, tmp_path).stat().st_mtime_ns == written
    assert (
        build((*FAST, "-DOTHER"), tmp_path).name != next(tmp_path.iterdir()).name or len(list(tmp_path.iterdir())) == 2
    )


def test_flags_of_another_processor_are_another_library(tmp_path, monkeypatch):
    compiler()
    first = build(FAST, tmp_path)
    monkeypatch.setattr("amphista.native.build._processor", lambda: "another one")
    assert build(FAST, tmp_path) != first


def test_no_compiler_says_so(monkeypatch):
    monkeypatch.delenv("CC", raising=False)
    monkeypatch.setenv("PATH", "/nowhere")
    with pytest.raises(NativeError, match=r"no C compiler \(looked for"):
        find_compiler()
    monkeypatch.setenv("CC", "never-installed-cc -O3")
    with pytest.raises(NativeError, match="never-installed-cc"):
        find_compiler()


@pytest.mark.parametrize("body", ["echo 'step.c: fatal error: no such thing' >&2; exit 1", "exit 7"])
def test_a_broken_compiler_says_so_and_leaves_nothing(body, tmp_path, monkeypatch):
    broken = tmp_path / "cc-broken"
    broken.write_text(f"#!/bin/sh\n{body}\n")
    broken.chmod(0o755)
    monkeypatch.setenv("CC", str(broken))
    with pytest.raises(NativeError, match=r"no such thing|exit code 7"):
        build(folder=tmp_path / "cache")
    assert not list((tmp_path / "cache").iterdir())


def test_a_compiler_that_writes_rubbish_is_not_loaded(tmp_path, monkeypatch):
    rubbish = tmp_path / "cc-rubbish"
    rubbish.write_text(
        '#!/bin/sh\nwhile [ "$1" != -o ] && [ $# -gt 0 ]; do shift; done\n[ -z "$2" ] || echo junk > "$2"\n'
    )
    rubbish.chmod(0o755)
    monkeypatch.setenv("CC", str(rubbish))
    with pytest.raises(NativeError, match="cannot be loaded"):
        load(folder=tmp_path / "cache")


@pytest.mark.parametrize("text", ["#!/nowhere/sh\n", "exit 1\n", "#!/bin/sh\nprintf 'error \\351\\n' >&2; exit 1\n"])
def test_a_compiler_that_cannot_be_run_or_read_says_so(text, tmp_path, monkeypatch):
    odd = tmp_path / "cc-odd"
    odd.write_text(text)
    odd.chmod(0o755)
    monkeypatch.setenv("CC", str(odd))
    with pytest.raises(NativeError, match=r"cannot be run|error \ufffd"):
        load(folder=tmp_path / "cache")


def test_a_blank_cc_names_no_compiler(monkeypatch):
    monkeypatch.setenv("PATH", "/nowhere")
    monkeypatch.setenv("CC", " ")
    with pytest.raises(NativeError, match=r"looked for \$CC"):
        find_compiler()


@pytest.mark.parametrize("damaged", [b"", b"junk"])
def test_a_damaged_library_is_built_again(damaged, tmp_path):
    compiler()
    path = build(FAST, tmp_path)
    path.write_bytes(damaged)
    load.__wrapped__(FAST, tmp_path)
    assert [found.name for found in tmp_path.iterdir()] == [path.name]


def test_a_library_that_can_never_be_loaded_is_built_once_more_only(tmp_path, monkeypatch):
    builds = []

    def built(flags, folder):
        builds.append(flags)
        (tmp_path / "step.so").write_text("junk")
        return tmp_path / "step.so"

    monkeypatch.setattr("amphista.native.build.build", built)
    for count in (2, 3):
        with pytest.raises(NativeError, match="cannot be loaded"):
            load.__wrapped__(FAST, tmp_path)
        assert len(builds) == count


def test_a_build_that_takes_too_long_is_not_tried_twice(tmp_path, monkeypatch):
    tried, run = [], subprocess.run

    def slow(command, **settings):
        if "--version" in command:
            return run(command, **settings)
        tried.append(command)
        raise subprocess.TimeoutExpired(command, settings["timeout"])

    monkeypatch.setattr(subprocess, "run", slow)
    with pytest.raises(NativeError, match="took more than"):
        load(folder=tmp_path)
    assert len(tried) == 1


def test_a_cache_folder_that_cannot_be_written_says_so(tmp_path):
    compiler()
    (tmp_path / "file").write_text("")
    with pytest.raises(NativeError, match="cannot be built in"):
        build(FAST, tmp_path / "file" / "native")


@pytest.fixture
def two_threads():
    try:
        build(BEST_FLAGS)
    except NativeError:
        pytest.skip("OpenMP cannot be had")
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    yield
    torch.set_num_threads(before)


def num_threads() -> int:
    return len(os.listdir("/proc/self/task"))


def settles_at(number: int) -> bool:
    """A thread that was told to end may take a moment."""
    return any(num_threads() == number or time.sleep(0.01) for _ in range(300))


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="threads are counted in /proc")
def test_who_leaves_its_team_ends_it_and_may_come_back(two_threads):
    """More threads than cores never wait awake, which made every step of a server a tenth longer."""
    target, chain = tiny_target(), TokenTree.chain([3, 5, 7])
    assert target.speed_up(native=True) and target.is_native

    def decoded():
        return target.verify(chain, target.new_cache()).logits

    leave_team()
    alone = num_threads()
    expected = decoded()
    assert num_threads() > alone
    leave_team()
    assert settles_at(alone)
    with ThreadPoolExecutor(1) as other:
        assert torch.equal(other.submit(decoded).result(), expected) and torch.equal(decoded(), expected)
    leave_team()


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="threads are counted in /proc")
@pytest.mark.parametrize("serves", [True, False])
def test_who_lets_another_thread_decode_leaves_its_team(two_threads, serves):
    """A server, and `async for`."""
    target = tiny_target()
    assert target.speed_up(native=True) and target.is_native
    llm = LLM(target, tree="4")

    async def begin() -> None:
        leave_team()
        alone = num_threads()
        target.verify(TokenTree.chain([3, 5, 7]), target.new_cache())
        assert num_threads() > alone
        if not serves:
            assert llm.worker and settles_at(alone)
            return
        worker = Worker(llm.engine, Limits(kv_bytes=1 << 20, row_bytes=llm.engine.row_bytes))
        worker.start()
        try:
            assert settles_at(alone + 1)  # the engine's
        finally:
            await worker.close(1.0)

    asyncio.run(begin())


def test_sources_are_in_the_package():
    assert {path.name for path in SOURCES.glob("*.[ch]")} == {
        "native.c",
        "training.c",
        "weights.c",
        "step.c",
        "drafter.c",
        "noise.c",
        *(f"{name}.h" for name in ("layer", "experts", "attention", "team", "products")),
        *(f"{name}.h" for name in ("lanes", "blocks", "tiles", "packed")),
    }
    assert "-ffp-contract=fast" in BASE_FLAGS and sys.maxsize > 2**32
