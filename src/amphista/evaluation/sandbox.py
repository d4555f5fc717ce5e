"""Running model-written Python in a process of its own, with limits on time, memory, files and the network.

This is no defence against a determined attacker. It stops the accidents of model-written code: endless loops, memory
hogs, stray writes and deletions, downloads, child processes, and leaving before the tests have run. The program can
still read what the user can read, and code that means harm finds a way past an audit hook or reads the token below
out of the interpreter. For hostile code use a virtual machine.

How it works: a fresh interpreter starts in an empty temporary folder with an environment of our own, leads its own
process group, and then confines itself before it runs the program: a network namespace where the kernel allows one,
resource limits, and an audit hook (PEP 578) in every case. Success is a random token that the child sends on a pipe
of its own, and only once the program has run to its end.
"""

from __future__ import annotations

import contextlib
import importlib.util
import inspect
import json
import os
import secrets
import selectors
import signal
import subprocess
import sys
import tempfile
import time
import types
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, BinaryIO

from amphista.errors import ConfigError

PASSED = "passed"
TIMED_OUT = "timed out"
STARTUP_SECONDS = 60  # for the interpreter alone: a busy machine is no fault of the program
CHUNK_BYTES = 65536


@dataclass(frozen=True, kw_only=True)
class SandboxLimits:
    """What one program may use; raises ConfigError for a limit that is not above zero.

    wall_seconds counts from the program's first line. memory_bytes is address space, the interpreter's own included.
    file_bytes holds for each file, output_bytes for what is kept of the printed text (the rest is read and dropped).
    """

    wall_seconds: float = 10.0
    cpu_seconds: int = 5
    memory_bytes: int = 2**30
    file_bytes: int = 2**20
    output_bytes: int = 4096

    def __post_init__(self) -> None:
        for name, value in vars(self).items():
            whole = name == "wall_seconds" or isinstance(value, int)
            if not whole or not value > 0:
                raise ConfigError(f"the sandbox limit {name} is {value!r}: expected a whole number above 0")


@dataclass(frozen=True)
class SandboxResult:
    """`passed` means that the program ran to its end. `network`: cut off by a "namespace" or by the "audit hook" alone.

    reason: "passed", "does not parse", "timed out", "out of memory", "refused: <audit event>" or "failed: <why>".
    """

    passed: bool
    reason: str
    network: str
    output: str = ""


DEFAULT_LIMITS = SandboxLimits()


def run_python(source: str, limits: SandboxLimits = DEFAULT_LIMITS) -> SandboxResult:
    """Run a program to its end in a process of its own; raises ConfigError where no sandbox can be set up."""
    if importlib.util.find_spec("resource") is None:
        raise ConfigError(f"running model-written code needs resource limits, which {sys.platform} lacks: use Linux")
    token = secrets.token_hex(16)
    with tempfile.TemporaryDirectory(prefix="amphista-", ignore_cleanup_errors=True) as folder:
        with tempfile.TemporaryFile() as order:  # a file, not a pipe: no deadlock whatever the length
            order.write(json.dumps({"token": token, "limits": _resource_limits(limits), "source": source}).encode())
            order.seek(0)
            process, verdict_fd = _start(folder, order)
        try:
            watch = _Watch(token, limits)
            watch.run(verdict_fd, process)
        finally:
            os.close(verdict_fd)
            _end(process)
    if watch.network is None:
        told = watch.output.decode(errors="replace").strip().splitlines()
        raise ConfigError(f"the sandbox cannot be set up here: {told[-1] if told else 'its process gave no answer'}")
    reason = watch.reason or _reason_of_exit(process.returncode)
    return SandboxResult(reason == PASSED, reason, watch.network, watch.output.decode(errors="replace"))


# -- the side that watches ----------------------------------------------------------------------------------------


def _resource_limits(limits: SandboxLimits) -> dict[str, tuple[int, int]]:
    """Soft and hard values; the processor's hard one comes later, so that its signal tells what happened."""
    return {
        "RLIMIT_CPU": (limits.cpu_seconds, limits.cpu_seconds + 1),
        "RLIMIT_AS": (limits.memory_bytes, limits.memory_bytes),
        "RLIMIT_FSIZE": (limits.file_bytes, limits.file_bytes),
        "RLIMIT_CORE": (0, 0),
        "RLIMIT_NPROC": (0, 0),  # no effect on root, whom the audit hook alone keeps from forking
    }


def _start(folder: str, order: BinaryIO) -> tuple[subprocess.Popen[bytes], int]:
    """The child, and the end of its verdict pipe that we read."""
    verdict_fd, child_fd = os.pipe()
    # -I without its -E: the environment is ours alone, and only -E would hide the hash seed, without which the order
    # of a set, and so the verdict on one and the same answer, changes from run to run
    command = [sys.executable, "-s", "-P", "-B", "-c", f"{_child_source()}\n_child({child_fd})\n"]
    environment = {"LANG": "C.UTF-8", "HOME": folder, "TMPDIR": folder, "PYTHONHASHSEED": "0"}
    environment |= {"OPENBLAS_NUM_THREADS": "1", "OMP_NUM_THREADS": "1"}
    try:
        process = subprocess.Popen(
            command,
            stdin=order,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            cwd=folder,
            env=environment,
            pass_fds=(child_fd,),
            start_new_session=True,
        )
    except BaseException:
        os.close(verdict_fd)
        raise
    finally:
        os.close(child_fd)
    return process, verdict_fd


class _Watch:
    """What the child has sent so far: its state, its verdict, and the beginning of its output."""

    def __init__(self, token: str, limits: SandboxLimits) -> None:
        self.network: str | None = None
        self.reason: str | None = None
        self.output = b""
        self._token, self._limits = token, limits
        self._sent = b""
        self._deadline = time.monotonic() + STARTUP_SECONDS

    def run(self, verdict_fd: int, process: subprocess.Popen[bytes]) -> None:
        """Until there is a verdict, the child has closed its pipe, or time is up."""
        assert process.stdout is not None
        with selectors.DefaultSelector() as selector:
            selector.register(verdict_fd, selectors.EVENT_READ, self._take_verdict)
            selector.register(process.stdout.fileno(), selectors.EVENT_READ, self._take_output)
            while self.reason is None:
                left = self._deadline - time.monotonic()
                if left <= 0:
                    self.reason = TIMED_OUT
                    return
                for key, _ in selector.select(left):
                    chunk = os.read(key.fd, CHUNK_BYTES)
                    if chunk:
                        key.data(chunk)
                        continue
                    selector.unregister(key.fd)
                    if key.fd == verdict_fd:
                        _await_exit(process)
                        return

    def _take_output(self, chunk: bytes) -> None:
        self.output += chunk[: max(0, self._limits.output_bytes - len(self.output))]

    def _take_verdict(self, chunk: bytes) -> None:
        """Lines: `ready <network>` before the program runs, `<token> <reason>` behind it; all others are forged."""
        *lines, rest = (self._sent + chunk).split(b"\n")
        self._sent = rest[:CHUNK_BYTES]
        for line in lines:
            first, _, text = line.decode(errors="replace").partition(" ")
            if self.network is None and first == "ready":
                self.network = text
                self._deadline = time.monotonic() + self._limits.wall_seconds
            elif self.reason is None and first == self._token:
                self.reason = text


def _await_exit(process: subprocess.Popen[bytes]) -> None:
    """A pipe closes just before its process is gone; the exit code must be its own, not that of our kill."""
    with contextlib.suppress(subprocess.TimeoutExpired):
        process.wait(timeout=1.0)


def _end(process: subprocess.Popen[bytes]) -> None:
    with contextlib.suppress(ProcessLookupError, PermissionError):  # gone already
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()
    if process.stdout is not None:
        process.stdout.close()


def _reason_of_exit(code: int) -> str:
    if code == -signal.SIGXCPU:
        return TIMED_OUT
    if code < 0:
        return f"failed: killed by signal {-code}"
    return "failed: exited before its end"


# -- the side that is watched: these functions travel as text and use nothing else of this module -------------------


def _child_source() -> str:
    names = ("contextlib", "ctypes", "json", "os", "resource", "sys", "types")
    parts = (_RefusedError, _leave_network, _limit_self, _audit_hook, _block_spawning, _outcome, _child)
    header = "from __future__ import annotations\nimport " + ", ".join(names)
    return "\n\n".join([header, *(inspect.getsource(part) for part in parts)])


class _RefusedError(PermissionError):
    pass


def _leave_network() -> str:
    """Cut the network off by a namespace if possible, and make the child die with the process that watches it."""
    import ctypes

    new_network, new_user, die_with_parent, sigkill = 0x40000000, 0x10000000, 1, 9
    libc = ctypes.CDLL(None)
    isolated = False
    if hasattr(libc, "unshare"):  # root keeps its right to read files of others if no user namespace is made
        isolated = libc.unshare(new_network) == 0 or libc.unshare(new_user | new_network) == 0
    if hasattr(libc, "prctl"):
        libc.prctl(die_with_parent, sigkill)
    return "namespace" if isolated else "audit hook"


def _limit_self(limits: dict[str, list[int]]) -> None:
    import resource

    for name, wanted in limits.items():
        kind = getattr(resource, name)
        highest = resource.getrlimit(kind)[1]
        soft, hard = wanted if highest == resource.RLIM_INFINITY else (min(value, highest) for value in wanted)
        resource.setrlimit(kind, (soft, hard))


def _audit_hook(folder: str) -> Callable[[str, tuple[Any, ...]], None]:
    """Refuses network, processes, foreign functions, and changes to files outside the folder."""
    realpath, join, fsdecode, readlink = os.path.realpath, os.path.join, os.fsdecode, os.readlink
    root, separator, null_device = realpath(folder), os.sep, os.devnull
    writing = os.O_WRONLY | os.O_RDWR | os.O_CREAT | os.O_TRUNC | os.O_APPEND
    families = frozenset(("ctypes", "socket", "subprocess", "pty", "syslog", "webbrowser"))
    refused = {f"os.{name}" for name in ("exec", "fork", "forkpty", "kill", "killpg", "posix_spawn", "spawn", "system")}
    refused |= {"os.startfile", "resource.setrlimit", "resource.prlimit"}
    # where the paths stand, each with its folder descriptor (-1: none)
    changes: dict[str, tuple[tuple[int, int], ...]] = {
        "os.remove": ((0, 1),),
        "os.rmdir": ((0, 1),),
        "os.mkdir": ((0, 2),),
        "os.rename": ((0, 2), (1, 3)),
        "os.link": ((0, 2), (1, 3)),
        "os.symlink": ((1, 2),),
        "os.chmod": ((0, 2),),
        "os.chown": ((0, 3),),
        "os.utime": ((0, 3),),
        "os.truncate": ((0, -1),),
        "os.setxattr": ((0, -1),),
        "os.removexattr": ((0, -1),),
        "shutil.rmtree": ((0, -1),),
    }

    def is_inside(path: Any, folder_fd: int = -1) -> bool:
        if isinstance(path, int):  # a file that is open already
            return True
        name = fsdecode(path)
        if folder_fd >= 0:
            name = join(readlink(f"/proc/self/fd/{folder_fd}"), name)
        real = realpath(name)
        return real == root or real.startswith(root + separator) or name == null_device

    def hook(event: str, args: tuple[Any, ...]) -> None:
        if event == "open":
            path, _, flags = args
            if flags & writing and not is_inside(path):
                raise _RefusedError("writing outside the folder")
        elif event in changes:
            for path_at, fd_at in changes[event]:
                if not is_inside(args[path_at], args[fd_at] if fd_at >= 0 else -1):
                    raise _RefusedError(event)
        elif (
            event in refused
            or event.partition(".")[0] in families
            or (event == "sqlite3.connect" and args[0] != ":memory:" and not is_inside(args[0]))
        ):
            raise _RefusedError(event)

    return hook


def _block_spawning() -> None:
    """`multiprocessing` starts processes by a function that no audit event guards."""
    import _posixsubprocess

    def fork_exec(*_: Any) -> int:
        raise _RefusedError("fork_exec")

    _posixsubprocess.fork_exec = fork_exec


def _outcome(source: str) -> str:
    module = types.ModuleType("program")  # a main guard's example of use stays out, as in an import
    sys.modules["program"] = module
    try:
        code = compile(source, "program.py", "exec")
    except (SyntaxError, ValueError, RecursionError, MemoryError, OverflowError):
        return "does not parse"
    try:
        exec(code, module.__dict__)
    except MemoryError:
        return "out of memory"
    except _RefusedError as error:
        return f"refused: {error}"
    except BaseException as error:  # SystemExit too: who leaves before the end has not passed
        return "failed: " + type(error).__name__[:80].replace("\n", " ")
    return "passed"


def _child(verdict_fd: int) -> None:
    """Confine this process, run the program it is sent, and send back the verdict."""
    write, leave, output = os.write, os._exit, sys.stdout
    order = json.load(sys.stdin.buffer)
    os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
    network = _leave_network()
    _limit_self(order["limits"])
    _block_spawning()
    sys.addaudithook(_audit_hook(os.getcwd()))
    write(verdict_fd, f"ready {network}\n".encode())
    reason = _outcome(order["source"])
    with contextlib.suppress(Exception):
        output.flush()
    write(verdict_fd, f"{order['token']} {reason}\n".encode())
    leave(0)
