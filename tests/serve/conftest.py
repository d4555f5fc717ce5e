from __future__ import annotations

import pytest

from tests.serve.serving import serving, talkative_llm


@pytest.fixture(scope="session")
def served():
    """One server for all that do not need one of their own; two keys are let in."""
    with serving(talkative_llm()) as served:
        yield served
    served.check_idle()
