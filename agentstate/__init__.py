"""AgentState keeps what an LLM agent is — its transcript and its KV cache — across turns, restarts and machines.

This package is the core: sessions in SQL, KV pages in extent files, the client and the command line. It runs in two
places that are installed apart, the HTTP service and the SGLang engine, and needs neither of them to be imported.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from agentstate.client import AsyncClient, Client

__version__ = "0.1.0"
__all__ = ["AsyncClient", "Client", "__version__"]


def __getattr__(name: str) -> Any:
    # The engine imports this package in every one of its processes, and has no use for an HTTP client there.
    if name in ("AsyncClient", "Client"):
        from agentstate import client

        return getattr(client, name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
