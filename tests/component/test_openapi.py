"""Both APIs do what their OpenAPI pages say, with whatever fits the page and whatever doesn't."""

from pathlib import Path
from typing import Any

import schemathesis
from hypothesis import HealthCheck, Phase, given
from hypothesis import settings as hypothesis_settings
from schemathesis.checks import not_a_server_error
from schemathesis.specs.openapi.checks import (
    response_schema_conformance,
    status_code_conformance,
)

from services.core.registry import Registry
from services.core.settings import Settings
from services.ingest.gateway import create_app
from tests import students
from tests.answering import serving

EXAMPLES = 20  # of each operation


def _ask_everything(schema: Any) -> list[str]:
    asked = []
    for operation in (one.ok() for one in schema.get_all_operations()):

        @given(case=operation.as_strategy())
        @hypothesis_settings(
            max_examples=EXAMPLES,
            derandomize=True,
            database=None,
            phases=[Phase.explicit, Phase.generate],
            suppress_health_check=list(HealthCheck),
        )
        def ask(case: schemathesis.Case[Any]) -> None:
            case.call_and_validate(
                checks=[not_a_server_error, status_code_conformance, response_schema_conformance]
            )

        ask()
        asked.append(operation.label)
    return asked


def test_the_gateway_answers_as_its_page_says(settings: Settings) -> None:
    schema = schemathesis.openapi.from_asgi("/openapi.json", create_app(settings))
    assert {"POST /v1/events", "DELETE /v1/users/{user_id}"} <= set(_ask_everything(schema))


def test_the_answers_are_as_their_page_says(settings: Settings, tmp_path: Path) -> None:
    registry = Registry(settings.registry)
    registry.promote("student", students.publish(registry, tmp_path), "it will do")
    with serving(settings) as client:
        schema = schemathesis.openapi.from_url(f"{client.base_url}/openapi.json")
        assert "POST /v1/recommendations" in _ask_everything(schema)
