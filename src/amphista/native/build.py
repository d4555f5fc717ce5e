"""Builds the C step once on this machine, into the user's cache folder, and loads it.

The library's name is a hash of its source, the compiler with its version, the flags and the processor: a change of any
of them builds anew. It is written aside and renamed, so that a killed build leaves nothing and two at once do no harm.
Whatever goes wrong ends in a `NativeError` that says so in a line; the torch form decodes then.
"""

from __future__ import annotations

import ctypes
import functools
import hashlib
import os
import platform
import shutil
import subprocess
import tempfile
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path

from amphista.errors import NativeError

SOURCES = Path(__file__).parent
COMPILERS = ("cc", "gcc", "clang")
# Loops are not split in two: kernels for each kind of block and number of rows take half as long again to compile so.
BASE_FLAGS = ("-std=c11", "-O3", "-fno-split-loops", "-ffp-contract=fast", "-fPIC", "-shared")
# GCC leaves multiply-adds of some loops apart where it tunes for AMD (from 13 on for others, too): a row's bits would
# hang on how many are beside it. Only GCC for x86 knows the setting.
FUSED_FLAGS = ("--param=avoid-fma-max-bits=0",)
BEST_FLAGS = ("-march=native", "-fopenmp")
WITHOUT_OPENMP = ("-march=native",)
TIMEOUT_SECONDS = 600  # half a minute where nothing else runs


def cache_folder() -> Path:
    """Where built libraries live: $AMPHISTA_CACHE, else $XDG_CACHE_HOME/amphista, else ~/.cache/amphista."""
    if os.environ.get("AMPHISTA_CACHE"):
        return Path(os.environ["AMPHISTA_CACHE"]) / "native"
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "amphista" / "native"


def find_compiler() -> list[str]:
    """The command of $CC, or of the first compiler there is."""
    if command := os.environ.get("CC", "").split():
        if shutil.which(command[0]) is None:
            raise NativeError(f"there is no C compiler {command[0]!r}, which CC names")
        return command
    for name in COMPILERS:
        if shutil.which(name):
            return [name]
    raise NativeError(f"there is no C compiler (looked for $CC, {', '.join(COMPILERS)})")


def build(flags: Sequence[str] = BEST_FLAGS, folder: Path | None = None) -> Path:
    """The library built with these flags, found in the folder or built into it. raises NativeError."""
    compiler = find_compiler()
    folder = folder or cache_folder()
    path = folder / f"step-{_identity(compiler, flags)}.so"
    try:
        if path.is_file():
            return path
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(prefix=".building-", dir=folder) as aside:
            built = Path(aside) / path.name
            _compile([*compiler, *base_flags(compiler), *flags, str(SOURCES / "native.c"), "-o", str(built), "-lm"])
            built.replace(path)
    except OSError as error:
        raise NativeError(f"the C step cannot be built in {folder}: {error.strerror or error}") from error
    return path


def _compile(command: list[str]) -> None:
    result = _run(command)
    if result.returncode != 0:
        lines = result.stderr.strip().splitlines() or [f"exit code {result.returncode}"]
        line = next((line for line in lines if "error" in line), lines[0])
        raise NativeError(f"{command[0]} cannot build the C step: {line}")


def _run(command: Sequence[str]) -> subprocess.CompletedProcess[str]:
    try:
        return subprocess.run(command, capture_output=True, text=True, errors="replace", timeout=TIMEOUT_SECONDS)
    except subprocess.TimeoutExpired as error:
        raise NativeError(f"{command[0]} took more than {TIMEOUT_SECONDS} s") from error
    except OSError as error:
        raise NativeError(f"{command[0]} cannot be run: {error.strerror or error}") from error


def base_flags(compiler: Sequence[str]) -> tuple[str, ...]:
    """The flags that every build with this compiler has."""
    is_gcc = "Free Software Foundation" in _version(tuple(compiler))
    return BASE_FLAGS + (FUSED_FLAGS if is_gcc and platform.machine() in ("x86_64", "AMD64") else ())


@functools.cache
def _version(compiler: tuple[str, ...]) -> str:
    return _run([*compiler, "--version"]).stdout


def _identity(compiler: Sequence[str], flags: Sequence[str]) -> str:
    version = _version(tuple(compiler))
    digest = hashlib.sha256(
        "\0".join([*compiler, version, *base_flags(compiler), *flags, _processor()]).encode(errors="replace")
    )
    for source in sorted([*SOURCES.glob("*.c"), *SOURCES.glob("*.h")]):
        digest.update(source.read_bytes())
    return digest.hexdigest()[:20]


def _processor() -> str:
    """What -march=native may depend on: a cache folder may be shared by several machines."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return f"{platform.machine()} {platform.processor()}"
    wanted = ("model name", "flags", "Features")
    found = {line.split(":")[0].strip(): line for line in lines if line.startswith(wanted)}
    return "\n".join([platform.machine(), *sorted(found.values())])


def leave_team() -> None:
    """End the threads that multiply with the calling one: for those who let another thread decode from now on.

    Each thread that calls has its own, and OpenMP lets them wait awake for the next call only while there are no more
    of them than cores: to wake them in each step took a tenth of the step.
    """
    if load.cache_info().currsize:
        with suppress(NativeError):
            load().amphista_leave_team()


@functools.cache
def load(flags: tuple[str, ...] | None = None, folder: Path | None = None) -> ctypes.CDLL:
    """The library, built where it is not yet. None: the best flags that the compiler takes. raises NativeError.

    One that cannot be loaded (empty behind a power cut) is put aside and built once more. It lies there for as long as
    the new one cannot be loaded either, as where nothing may run: else every start would build in vain.
    """
    path = _built(flags, folder)
    aside = path.with_suffix(".damaged")
    try:
        return _opened(path)
    except NativeError:
        if aside.exists():
            raise
    with suppress(OSError):
        path.replace(aside)
    library = _opened(_built(flags, folder))
    with suppress(OSError):
        aside.unlink()
    return library


def _built(flags: tuple[str, ...] | None, folder: Path | None) -> Path:
    if flags is not None:
        return build(flags, folder)
    try:
        return build(BEST_FLAGS, folder)
    except NativeError as error:
        if isinstance(error.__cause__, subprocess.TimeoutExpired):
            raise  # the other would take as long
        return build(WITHOUT_OPENMP, folder)


def _opened(path: Path) -> ctypes.CDLL:
    try:
        return ctypes.CDLL(str(path))
    except OSError as error:
        raise NativeError(f"the C step cannot be loaded: {error}") from error
