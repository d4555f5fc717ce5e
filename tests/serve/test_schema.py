"""The app against its own schema, by schemathesis: whatever is asked, what comes is documented, and never a failure."""

from __future__ import annotations

import pytest
import schemathesis
from hypothesis import HealthCheck, Phase, given, settings
from schemathesis import GenerationMode
from schemathesis.specs.openapi.checks import positive_data_acceptance

from tests.serve.serving import KEYS

NUM_EXAMPLES = 12  # of each operation and mode; 500 of each were run when this was written
OPERATIONS = [
    "GET /health", "GET /ready", "GET /version", "GET /metrics", "GET /v1/models", "GET /v1/models/{model_id}",
    "POST /v1/chat/completions", "POST /v1/completions", "POST /v1/responses",
    "POST /tokenize", "POST /detokenize", "POST /apply-template",
]  # fmt: skip


@pytest.fixture(scope="module")
def operations(served):
    headers = {"Authorization": f"Bearer {KEYS[0]}"}
    described = schemathesis.openapi.from_url(f"{served.url}/openapi.json", headers=headers)
    found = [result.ok() for result in described.get_all_operations()]
    return {f"{operation.method.upper()} {operation.path}": operation for operation in found}


def test_all_operations_are_asked(operations):
    assert sorted(operations) == sorted(OPERATIONS)


@pytest.mark.parametrize(
    ("name", "mode"),
    [(name, GenerationMode.POSITIVE) for name in OPERATIONS]
    + [(name, GenerationMode.NEGATIVE) for name in OPERATIONS[5:]],  # nothing can be asked wrongly of the first five
)
def test_what_is_asked_is_answered_as_documented(operations, name, mode):
    excluded = [positive_data_acceptance] if name.startswith("POST") else []  # fields that do not go together, contexts

    @given(case=operations[name].as_strategy(generation_mode=mode))
    @settings(
        max_examples=NUM_EXAMPLES,
        deadline=None,
        database=None,
        derandomize=True,
        suppress_health_check=list(HealthCheck),
        phases=[Phase.explicit, Phase.generate],
    )
    def ask(case):
        for field in ("max_tokens", "max_completion_tokens", "max_output_tokens"):
            if isinstance(case.body, dict) and type(case.body.get(field)) is int:
                case.body[field] = min(case.body[field], 30)  # else most of the time goes into decoding
        case.call_and_validate(headers={"Authorization": f"Bearer {KEYS[0]}"}, excluded_checks=excluded)

    ask()
