"""The package as a user gets it (`make test-package`): sdist and wheel are built from a clean copy, installed into an
environment that is empty but sees the dependencies already here, and run there; what lacks an extra says which."""

from __future__ import annotations

import os
import subprocess
import sys
import sysconfig
import tarfile
import venv
import zipfile
from pathlib import Path

import pytest

from tests.talkative import talkative_model
from tests.tiny import byte_tokenizer

pytestmark = pytest.mark.package
ROOT = Path(__file__).parents[2]
WITHOUT = "import sys; sys.modules.update(dict.fromkeys({packages!r})); from amphista.cli.app import main; main()"


def run(*words, cwd, python=sys.executable, **changes):
    environment = {key: value for key, value in os.environ.items() if key != "PYTHONPATH"} | changes
    return subprocess.run([python, *map(str, words)], cwd=cwd, env=environment, capture_output=True, text=True)


def built(*words, cwd):
    result = run(*words, cwd=cwd)
    assert result.returncode == 0, result.stderr
    return result


@pytest.fixture(scope="module")
def dist(tmp_path_factory):
    """sdist of the files that git knows, and the wheel made of it."""
    clean, out = tmp_path_factory.mktemp("clean"), tmp_path_factory.mktemp("dist")
    names = subprocess.run(["git", "ls-files", "-z"], cwd=ROOT, capture_output=True, check=True).stdout.decode()
    for name in filter(None, names.split("\0")):
        if (ROOT / name).is_file():
            (clean / name).parent.mkdir(parents=True, exist_ok=True)
            (clean / name).write_bytes((ROOT / name).read_bytes())
    build = f"from setuptools.build_meta import build_sdist; build_sdist({str(out)!r})"
    built("-c", build, cwd=clean)
    (sdist,) = out.glob("*.tar.gz")
    built("-m", "pip", "wheel", "-q", "--no-deps", "--no-build-isolation", "-w", out, sdist, cwd=out)
    (wheel,) = out.glob("*.whl")
    return sdist, wheel


@pytest.fixture(scope="module")
def python(dist, tmp_path_factory):
    """The interpreter of an environment that holds the wheel, and sees the dependencies of this one."""
    place = tmp_path_factory.mktemp("environment")
    venv.create(place, with_pip=False, symlinks=True)
    python = place / "bin" / "python"
    built("-m", "pip", "--python", python, "install", "-q", "--no-deps", dist[1], cwd=place)
    (site,) = place.glob("lib/python*/site-packages")
    (site / "dependencies.pth").write_text(sysconfig.get_path("purelib") + "\n")
    return python


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    made = tmp_path_factory.mktemp("package-target")
    talkative_model(end_bias=-1e4).save_pretrained(made)
    byte_tokenizer().save_pretrained(made)
    return made


def test_the_wheel_holds_what_runs_and_nothing_else(dist):
    sdist, wheel = dist
    names = zipfile.ZipFile(wheel).namelist()
    inside = {str(path.relative_to(ROOT / "src")) for path in (ROOT / "src").rglob("*") if path.is_file()}
    wanted = {name for name in inside if "__pycache__" not in name and ".egg-info" not in name}
    assert {name for name in names if ".dist-info" not in name} == wanted
    assert any(name.endswith("licenses/LICENSE") for name in names) and "amphista/py.typed" in names
    with tarfile.open(sdist) as archive:
        packed = {name.partition("/")[2] for name in archive.getnames()}
    assert {f"src/{name}" for name in wanted} | {"README.md", "LICENSE", "pyproject.toml"} <= packed


def test_it_runs_where_it_is_installed(python, folder, tmp_path):
    told = run("-c", "import amphista; print(amphista.__file__)", cwd=tmp_path, python=python)
    assert Path(told.stdout.strip()).is_relative_to(python.parents[1]), told.stderr
    version = run(python.parent / "amphista", "--version", cwd=tmp_path, python=python)
    assert version.stdout.startswith("amphista 0."), version.stderr
    words = ["generate", "--target", folder, "--drafter", "lookup", "--compare", "--max-new-tokens", 24, "Hello"]
    answer = run("-m", "amphista", *words, cwd=tmp_path, python=python, AMPHISTA_CACHE=str(tmp_path))
    assert answer.returncode == 0 and "the same tokens" in answer.stderr + answer.stdout, answer.stderr


@pytest.mark.parametrize(
    ("packages", "words", "extra"),
    [
        (["accelerate"], ["train", "--data", "answers.jsonl", "--out", "out"], "amphista[train]"),
        (["fastapi"], ["serve"], "amphista[serve]"),
        (["datasets"], ["distill", "--prompts", "owner/name", "--out", "out"], "amphista[data]"),
    ],
)
def test_a_missing_extra_is_a_sentence(python, folder, tmp_path, packages, words, extra):
    code = WITHOUT.format(packages=packages)
    result = run("-c", code, *words, "--target", folder, cwd=tmp_path, python=python)
    assert result.returncode == 2 and extra in result.stderr and "Traceback" not in result.stderr, result.stderr
