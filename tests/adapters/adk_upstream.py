"""A pytest plugin that holds AgentState's service to ADK's own tests of session services, which stay as they are.

It puts the service where ``test_session_service.py`` of a checkout of ADK has the session service to test, for those of
its tests that are about any service; the others, of one implementation and its insides, are left out.
"""

from __future__ import annotations

import asyncio
import inspect
from collections.abc import Generator, Iterator
from pathlib import Path
from typing import Any

import pytest
from stage import MODEL, serving

from agentstate.adapters.google_adk import AgentStateSessionService
from agentstate.client import AsyncClient
from agentstate.settings import Settings

# Events of the same time are in the order in which they were appended here; there, in that of their random ids.
DIVERGENCES = {"test_get_session_orders_tied_timestamps_by_id"}


class Tested(AgentStateSessionService):
    """Closes its client at the end of a block, as ADK's service on a database does."""

    async def __aenter__(self) -> Tested:
        return self

    async def __aexit__(self, *error: object) -> None:
        await self.close()

    async def close(self) -> None:
        await self._client.close()


class Services:
    """The services of a test, at the base URL of its AgentState."""

    def __init__(self) -> None:
        self.base_url = ""
        self.made: list[Tested] = []

    def new(self, *_: Any, **__: Any) -> Tested:
        self.made.append(Tested(AsyncClient(self.base_url, timeout_s=60), model=MODEL))
        return self.made[-1]


services = Services()


@pytest.fixture(autouse=True)
def running(database_url: str, tmp_path: Path) -> Iterator[None]:
    with serving(Settings(home=tmp_path, database_url=database_url)) as service:
        services.base_url = service.base_url
        yield


@pytest.fixture
def session_service(running: None) -> Tested:
    return services.new()


@pytest.hookimpl(wrapper=True)
def pytest_pycollect_makemodule(module_path: Path) -> Generator[None, pytest.Module, pytest.Module]:
    module = yield
    if module_path.name == "test_session_service.py":  # the others of its folder are not imported
        module.obj.session_service = session_service
        module.obj.get_session_service = services.new
    return module


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    kept = [item for item in items if isinstance(item, pytest.Function) and of_any_service(item)]
    config.hook.pytest_deselected(items=[item for item in items if item not in kept])
    items[:] = kept


def of_any_service(item: pytest.Function) -> bool:
    if item.originalname in DIVERGENCES:
        return False
    given = "callspec" in item.__dict__ and "session_service" in item.callspec.params
    code = getattr(item.obj, "__code__", None)
    makes_one = code is not None and "get_session_service" in code.co_names
    return makes_one or ("session_service" in item.fixturenames and not given)


@pytest.hookimpl(tryfirst=True)
def pytest_pyfunc_call(pyfuncitem: pytest.Function) -> bool | None:
    if not inspect.iscoroutinefunction(pyfuncitem.obj):
        return None
    arguments = {name: pyfuncitem.funcargs[name] for name in inspect.signature(pyfuncitem.obj).parameters}

    async def run() -> None:
        try:
            await pyfuncitem.obj(**arguments)
        finally:
            while services.made:
                await services.made.pop().close()

    asyncio.run(run())
    return True
