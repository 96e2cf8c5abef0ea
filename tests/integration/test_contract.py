"""The service answers as its OpenAPI document says, whatever it is sent and in whatever order: no answer that is not
documented, none of another shape, and no 5xx. ``AGENTSTATE_TEST_CONTRACT_S`` bounds the time for each database."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
from engines import scripted
from stage import register, serving

from agentstate.settings import Settings

LIMIT_S = os.environ.get("AGENTSTATE_TEST_CONTRACT_S", "60")
CHECKS = (
    "not_a_server_error",
    "status_code_conformance",
    "content_type_conformance",
    "response_headers_conformance",
    "response_schema_conformance",
    "negative_data_rejection",
    "use_after_free",
    "ensure_resource_availability",
)


@pytest.mark.timeout(float(LIMIT_S) + 900)
def test_the_service_keeps_to_its_document(database_url: str, tmp_path: Path) -> None:
    settings = Settings(home=tmp_path, database_url=database_url, engine_timeout_s=3600)
    # An engine that takes whatever reaches it: the gateway is what is tried.
    with scripted(lambda asked: asked.whole({"object": "any"})) as engine, serving(settings) as service:
        register(service.database, "tcp://127.0.0.1:1", base_url=engine.base_url)
        command = [
            sys.executable,
            *("-m", "schemathesis.cli", "run", f"{service.base_url}/openapi.json"),
            *("--phases", "examples,fuzzing,stateful", "--checks", ",".join(CHECKS)),
            *("--max-examples", "8", "--max-time", LIMIT_S, "--request-timeout", "90", "--no-shrink", "--seed", "7"),
            *("--exclude-path-regex", "/events$"),  # a stream does not end by itself
            *("--generation-database", "none", "--warnings", "off", "--no-color"),
        ]
        run = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True)
        assert run.returncode == 0, run.stdout[-15_000:] + run.stderr[-2000:]
        assert "Stateful" in run.stdout
        # The walks got somewhere: sessions were made and run.
        assert service.http.get("/v1/sessions").json()["data"]
