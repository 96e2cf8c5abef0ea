"""The compliance tests of the Open Responses specification, as they are, against a real engine behind the gateway."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest
from npm import installed
from served import HERE, make_model, serving
from tools import tool

from agentstate.cli.local import LocalStack, Spawn

# Read here: a test sees none of these variables.
CHECKOUT = os.environ.get("AGENTSTATE_OPENRESPONSES", "")

WEBSOCKET = "neither SGLang nor the gateway has responses over a WebSocket"
COMPACTION = "neither SGLang nor the gateway compacts a conversation"
NOT_APPLICABLE = {
    "image-input": "it needs a model that sees: an engine without one refuses images",
    "compact-response": COMPACTION,
    "websocket-compact-new-chain": COMPACTION,
    "websocket-response": WEBSOCKET,
    "websocket-sequential-responses": WEBSOCKET,
    "websocket-continuation": WEBSOCKET,
    "websocket-reconnect-store-false-recovery": WEBSOCKET,
    "websocket-previous-response-not-found": WEBSOCKET,
    "websocket-failed-continuation-evicts-cache": WEBSOCKET,
}

pytestmark = pytest.mark.skipif(
    not CHECKOUT,
    reason="no AGENTSTATE_OPENRESPONSES: clone https://github.com/openresponses/openresponses, and name the directory",
)


@pytest.fixture(scope="module")
def suite(node_cache: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A copy of the suite that has its packages."""
    home = tmp_path_factory.mktemp("openresponses")
    (home / "node_modules").symlink_to(installed(HERE / "openresponses", node_cache))
    for part in ("bin", "src"):
        shutil.copytree(Path(CHECKOUT) / part, home / part)
    return home


@pytest.fixture(scope="module")
def scripted(tmp_path_factory: pytest.TempPathFactory, fork: Spawn) -> Iterator[LocalStack]:
    """A service, and an engine that calls a tool whenever it is offered one."""
    home = tmp_path_factory.mktemp("scripted")
    make_model(HERE / "scripted.py", home / "model")
    with serving(home, home / "model", fork) as stack:
        yield stack


def test_what_applies_of_the_suite_passes(suite: Path, scripted: LocalStack) -> None:
    ran = subprocess.run(
        [
            *(tool("node"), "node_modules/tsx/dist/cli.mjs", "bin/compliance-test.ts", "--json"),
            *("--base-url", f"{scripted.service_url}/v1", "--model", scripted.model, "--api-key", "none"),
        ],
        cwd=suite,
        capture_output=True,
        text=True,
        timeout=600,
        check=False,
    )
    results = json.loads(ran.stdout)["results"]
    failed = {result["id"]: result["errors"] for result in results if result["status"] != "passed"}
    assert {name: errors for name, errors in failed.items() if name not in NOT_APPLICABLE} == {}
    assert failed.keys() == NOT_APPLICABLE.keys()
