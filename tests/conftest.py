"""Shared fixtures; the tiny world itself is in tests/tiny.py."""

from __future__ import annotations

import os
from pathlib import Path

os.environ.setdefault("HF_HUB_OFFLINE", "1")  # a test that reaches for the hub is a mistake

import pytest
import torch

from amphista.native.crew import CREW
from tests.tiny import byte_tokenizer, tiny_model, tiny_target

torch.set_num_threads(1)  # tiny tensors: more threads only wait for each other, two times slower


@pytest.fixture(autouse=True, scope="session")
def _all_threads():
    """In calls of the C step, however busy the machine is: so many are what is tested."""
    with CREW.whole():
        yield


@pytest.fixture(autouse=True)
def _fixed_seed():
    torch.manual_seed(0)


@pytest.fixture(autouse=True, scope="session")
def _costs_of_their_own(tmp_path_factory):
    """What tiny targets cost is kept apart from what real ones do, and measured in no time."""
    folder = tmp_path_factory.mktemp("costs")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(
            "amphista.engine.cost_cache.cache_folder", lambda: Path(os.environ.get("AMPHISTA_CACHE") or folder)
        )
        patch.setattr("amphista.engine.timing.BUDGET_SECONDS", 0.1)
        yield


@pytest.fixture(scope="session")
def target():
    """A tiny Llama on bare token ids, on the fast path; its stock model stays there for oracles."""
    target = tiny_target()
    assert target.speed_up(), target.why_stock
    return target


@pytest.fixture(scope="session")
def text_target():
    """A tiny Llama with a byte tokenizer and a chat template."""
    return tiny_target(with_text=True)


@pytest.fixture(scope="session")
def target_folder(tmp_path_factory):
    """A saved tiny Llama, for everything that loads a target by folder."""
    folder = tmp_path_factory.mktemp("tiny-target")
    tiny_model().save_pretrained(folder)
    byte_tokenizer().save_pretrained(folder)
    return folder
