"""evaluation/sandbox.py: what model-written code may not do, and that leaving early is no success."""

from __future__ import annotations

import pytest

from amphista.errors import ConfigError
from amphista.evaluation.sandbox import SandboxLimits, run_python

SHORT = SandboxLimits(wall_seconds=1.0, cpu_seconds=1)


def test_passing_and_failing():
    assert run_python("x = sum(range(10))\nassert x == 45\n").passed
    failed = run_python("print('seen')\nassert 1 == 2\n")
    assert not failed.passed and failed.reason == "failed: AssertionError" and failed.output == "seen\n"
    assert run_python("def f(:\n").reason == "does not parse"
    assert failed.network in ("namespace", "audit hook")


@pytest.mark.parametrize(
    "source",
    [
        "import sys\nsys.exit(0)",
        "import os\nos._exit(0)",
        "raise SystemExit",
        "import os\nfor f in range(9):\n    try: os.write(f, b'0 passed\\n')\n    except OSError: pass\nos._exit(0)",
    ],
)
def test_leaving_early_is_no_success(source):
    result = run_python(source)
    assert not result.passed and result.reason.startswith("failed")


@pytest.mark.parametrize("source", ["while True: pass", "import time\ntime.sleep(60)"])
def test_time_runs_out(source):
    assert run_python(source, SHORT).reason == "timed out"


def test_memory_runs_out():
    assert run_python("x = bytearray(2 * 10**9)").reason == "out of memory"


def test_output_is_capped():
    result = run_python("for _ in range(20000): print('x' * 100)", SandboxLimits(output_bytes=500))
    assert result.passed and len(result.output) == 500


@pytest.mark.parametrize(
    "source",
    [
        "import socket\nsocket.create_connection(('127.0.0.1', 9), timeout=1)",
        "import urllib.request\nurllib.request.urlopen('http://127.0.0.1:9/', timeout=1)",
        "import os\nos.system('true')",
        "import os\nos.fork()",
        "import subprocess\nsubprocess.run(['true'])",
        "import os\nos.kill(os.getppid(), 0)",
        "import ctypes\nctypes.CDLL(None)",
    ],
)
def test_network_processes_and_foreign_functions_are_refused(source):
    result = run_python(source)
    assert not result.passed and ("refused" in result.reason or result.reason == "failed: URLError")


def test_files_stay_inside(tmp_path):
    precious = tmp_path / "precious.txt"
    precious.write_text("kept")
    assert run_python("open('own.txt', 'w').write('x')\nassert open('own.txt').read() == 'x'").passed
    for source in (
        f"open({str(precious)!r}, 'w')",
        f"import os\nos.remove({str(precious)!r})",
        f"import shutil\nshutil.rmtree({str(tmp_path)!r})",
        f"import os\nos.rename({str(precious)!r}, 'here')",
        f"open({str(tmp_path / 'new')!r}, 'a')",
    ):
        assert run_python(source).reason.startswith("refused"), source
    assert precious.read_text() == "kept" and [p.name for p in tmp_path.iterdir()] == ["precious.txt"]


def test_the_environment_is_not_inherited(monkeypatch):
    monkeypatch.setenv("SECRET_TOKEN", "x")
    assert run_python("import os\nassert 'SECRET_TOKEN' not in os.environ\nassert os.listdir('.') == []").passed


@pytest.mark.parametrize("name", ["wall_seconds", "cpu_seconds", "memory_bytes"])
def test_limits_must_be_above_zero(name):
    with pytest.raises(ConfigError, match=name):
        SandboxLimits(**{name: 0})
