"""The TypeScript client: its own tests, run by node against a real service, and what it is generated from."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from engines import completion
from gateways import Gateway
from npm import installed
from stage import Peer, Service, register, stored
from tools import tool

import agentstate
from agentstate.settings import Settings
from agentstate.sql.models import EntryKind

ROOT = Path(__file__).parents[2]
SOURCE = ROOT / "clients" / "typescript"
EXAMPLE = ROOT / "examples" / "typescript"
SAFE = 2**53
"""JavaScript's numbers are exact below it."""


@pytest.fixture
def backend() -> str:
    """The client is the same whatever database the service has."""
    return "sqlite"


@pytest.fixture(scope="session")
def node_cache() -> Path:
    """Of the session: a test sees no settings from outside."""
    return Settings().cache_dir / "environments"


@pytest.fixture(scope="module")
def package(node_cache: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A copy of the client, compiled."""
    packages = installed(SOURCE, node_cache)
    copy = tmp_path_factory.mktemp("typescript") / "client"
    shutil.copytree(SOURCE, copy, ignore=shutil.ignore_patterns("node_modules", "dist", "build"))
    (copy / "node_modules").symlink_to(packages)
    run(copy, "node_modules/.bin/tsc")
    return copy


def run(directory: Path, *command: str | Path, **environment: str) -> str:
    """What a program prints, which has to succeed."""
    ran = subprocess.run(
        command, cwd=directory, env={**os.environ, **environment}, capture_output=True, text=True, check=False
    )
    assert ran.returncode == 0, ran.stdout + ran.stderr
    return ran.stdout


def test_the_client_passes_its_tests(service: Service, start_peer: Callable[..., Peer], package: Path) -> None:
    peer = start_peer(lambda request: stored("durable"))
    register(service.database, peer.address)
    run(package, "node_modules/.bin/tsc", "--project", "test")
    told = run(package, tool("node"), "--test", "build", AGENTSTATE_URL=service.base_url)
    assert "# fail 0" in told
    assert "# pass 0" not in told
    # It has a method for every route of sessions, and each has been called.
    called = set(re.findall(r'_count\{method="(\w+)",route="(.*?)"', service.http.get("/metrics").text))
    document = service.http.get("/openapi.json").json()
    routes = {
        (method.upper(), path)
        for path, operations in document["paths"].items()
        for method, operation in operations.items()
        if path.startswith("/v1/") and not {"gateway", "health"} & set(operation.get("tags", ()))
    }
    assert routes - called == set()


def test_what_is_published_can_be_imported_with_its_types(package: Path) -> None:
    run(package, "node_modules/.bin/publint", "--strict")
    run(package, "node_modules/.bin/attw", "--pack", ".", "--profile", "esm-only")
    about = json.loads((package / "package.json").read_text())
    assert "dependencies" not in about
    assert about["version"] == agentstate.__version__


@pytest.fixture
def generate(monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    monkeypatch.syspath_prepend(str(SOURCE))
    import generate

    yield generate
    del sys.modules["generate"]


def test_types_and_errors_are_those_of_the_running_service(service: Service, generate: Any) -> None:
    how = "python clients/typescript/generate.py"
    document = service.http.get("/openapi.json").json()
    assert (SOURCE / "src" / "schema.ts").read_text() == generate.schema(document), how
    assert (SOURCE / "src" / "problems.ts").read_text() == generate.problems(), how


def test_a_schema_that_has_no_type_is_refused(generate: Any) -> None:
    for schema in ({"allOf": []}, {"type": "string", "contentEncoding": "base64"}, {"oneOf": [{"type": "null"}]}):
        with pytest.raises(ValueError, match="no type here"):
            generate.schema(
                {
                    "paths": {"/v1/x": {"get": {"tags": ["x"], "responses": {"$ref": "#/components/schemas/X"}}}},
                    "components": {"schemas": {"X": schema}},
                }
            )


def test_no_number_of_the_api_is_beyond_what_javascript_counts(service: Service) -> None:
    document = service.http.get("/openapi.json").json()
    limits: list[int] = []

    def look(schema: Any) -> None:
        if isinstance(schema, dict):
            assert schema.get("format") != "int64"
            limits.extend(schema[key] for key in ("maximum", "exclusiveMaximum") if key in schema)
            for inner in schema.values():
                look(inner)
        elif isinstance(schema, list):
            for inner in schema:
                look(inner)

    look(document)
    assert SAFE in limits
    assert max(limits) == SAFE


SNIPPETS = """
import { createOpenAICompatible } from "@ai-sdk/openai-compatible";
import { generateText } from "ai";
import OpenAI from "openai";
import { Client, message } from "@agentstate/client";
"""


def test_the_snippets_of_the_documents_have_the_right_types(package: Path, node_cache: Path) -> None:
    with_sdks = installed(ROOT / "tests" / "clients" / "node", node_cache)
    here = package.parent / "snippets"
    here.mkdir()
    own = {"@agentstate/client": package, "@types/node": package / "node_modules" / "@types" / "node"}
    for name in (*own, "@ai-sdk/openai-compatible", "ai", "openai"):
        link = here / "node_modules" / name
        link.parent.mkdir(parents=True, exist_ok=True)
        link.symlink_to(own.get(name, with_sdks / name))
    settings = json.loads((EXAMPLE / "tsconfig.json").read_text())
    (here / "tsconfig.json").write_text(json.dumps({**settings, "include": ["*.ts"]}))
    whole = "\n".join(snippets(SOURCE / "README.md"))
    (here / "whole.ts").write_text(whole)
    # One after the other: the second one goes on with what the first has.
    (here / "parts.ts").write_text(SNIPPETS + "\n".join(snippets(ROOT / "docs" / "adapters.md")))
    (here / "package.json").write_text('{"type": "module"}')
    run(here, package / "node_modules/.bin/tsc", "--noEmit")


def snippets(document: Path) -> list[str]:
    found = re.findall(r"^```ts\n(.*?)^```", document.read_text(), re.DOTALL | re.MULTILINE)
    assert found
    return found


def test_the_example_of_an_agent_on_the_ai_sdk(
    make_gateway: Callable[..., Gateway], package: Path, node_cache: Path
) -> None:
    call = {"id": "call_1", "type": "function", "function": {"name": "read", "arguments": '{"name": "pages.md"}'}}
    answers = [completion(None, tool_calls=[call]), completion("in files"), completion("a run of pages")]
    for answer in answers:
        answer["usage"]["prompt_tokens_details"] = {"cached_tokens": 4}
    gateway = make_gateway(lambda asked: asked.whole(answers[len(gateway.engine.asked) - 1]))
    with_sdk = installed(ROOT / "tests" / "clients" / "node", node_cache)
    example = package.parent / "example"
    shutil.copytree(EXAMPLE, example, ignore=shutil.ignore_patterns("node_modules", "build"))
    found = json.loads((example / "package.json").read_text())
    places = {
        "@agentstate/client": package,
        **{name: package / "node_modules" / name for name in found["devDependencies"]},
    }
    for name, wanted in (found["dependencies"] | found["devDependencies"]).items():
        place = places.get(name, with_sdk / name)
        if not wanted.startswith("file:"):
            assert json.loads((place / "package.json").read_text())["version"] == wanted
        link = example / "node_modules" / name
        link.parent.mkdir(parents=True, exist_ok=True)
        link.symlink_to(place)
    run(example, package / "node_modules/.bin/tsc")

    def ask(question: str) -> list[str]:
        around = {"AGENTSTATE_URL": gateway.service.base_url, "DOCS": str(ROOT / "docs")}
        return run(example, tool("node"), "build/agent.js", "agent/17", question, **around).splitlines()

    told = "of 9 tokens 4 were not computed again"
    assert ask("Where are pages?") == [told, told, "in files"]
    read = (ROOT / "docs" / "pages.md").read_text()[:4000]
    assert gateway.engine.asked[1].document["messages"][-1]["content"] == read
    assert ask("And an extent?") == [told, "a run of pages"]
    roles = [each["role"] for each in gateway.engine.asked[2].document["messages"]]
    assert roles == ["system", "user", "assistant", "tool", "assistant", "user"]
    gateway.ended()
    (session,) = gateway.sessions()
    assert session.id == "agent/17"
    assert all(gateway.turn(asked) is not None for asked in gateway.engine.asked)
    kinds = [entry.kind for entry in gateway.service.client.entries(session.id).data]
    assert kinds.count(EntryKind.MESSAGE) == 6
    assert (kinds.count(EntryKind.TOOL_CALL), kinds.count(EntryKind.TOOL_RESULT)) == (1, 1)
