"""Requests to a running engine as token ids, timed to the first token: SGLang's `/generate`, streamed."""

from __future__ import annotations

import asyncio
import json
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from types import TracebackType
from typing import Any

import httpx

from agentstate.errors import EngineRefused, EngineUnreachable

_TIMEOUT = httpx.Timeout(10, read=3600)  # a long prompt is silent until it is computed


@dataclass(frozen=True, slots=True)
class Answer:
    """``tokens`` are the output's ids. Of the prompt, ``device_tokens`` were found on the device and
    ``restored_tokens`` came from elsewhere. Times are the client's: to the first token, and to the end; of the former,
    ``before_match_s`` had passed when the scheduler had the request and looked for its prefix. Only an engine with
    ``--enable-metrics`` on the same machine reports that. Drafts were verified in so many ``steps``; None without
    drafts."""

    tokens: tuple[int, ...]
    device_tokens: int
    restored_tokens: int
    ttft_s: float
    total_s: float
    before_match_s: float | None = None
    steps: int | None = None


class Engine:
    """An engine at ``url``. Raises EngineUnreachable and EngineRefused. Use it as an async context."""

    def __init__(self, url: str):
        self._url = url.rstrip("/")
        limits = httpx.Limits(max_connections=None, max_keepalive_connections=None)
        self._client = httpx.AsyncClient(base_url=self._url, timeout=_TIMEOUT, limits=limits)

    async def __aenter__(self) -> Engine:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self._client.aclose()

    async def ask(
        self,
        prompt: Sequence[int],
        output_tokens: int,
        session_id: str | None = None,
        cache_salt: str | None = None,
        times: list[float] | None = None,
        fields: Mapping[str, Any] | None = None,
    ) -> Answer:
        """Exactly ``output_tokens`` greedy tokens after ``prompt``. The time at which each arrived is added to
        ``times``, by the event loop's clock; once for tokens that arrive together. ``fields`` are further ones of
        the request."""
        body: dict[str, Any] = {
            "input_ids": list(prompt),
            "sampling_params": {"max_new_tokens": output_tokens, "temperature": 0, "ignore_eos": True},
            "stream": True,
        }
        if session_id is not None:
            body["session_id"] = session_id
        if cache_salt is not None:
            body["cache_salt"] = cache_salt
        body |= fields or {}
        started_s, sent_at = time.perf_counter(), time.time()
        first_s, last = None, None
        try:
            async with self._client.stream("POST", "/generate", json=body) as response:
                if response.is_error:
                    await response.aread()
                    raise EngineRefused(f"{self._url} answered {response.status_code}: {response.text[:300]}")
                async for line in response.aiter_lines():
                    if line.startswith("data: {"):
                        last = json.loads(line[6:])
                        if times is not None and last.get("output_ids"):
                            times.append(asyncio.get_running_loop().time())
                        if last.get("output_ids") and first_s is None:
                            first_s = time.perf_counter() - started_s
        except httpx.TransportError as error:
            raise EngineUnreachable(f"{self._url} broke off or did not answer: {error!r}") from error
        total_s = time.perf_counter() - started_s
        if last is None or first_s is None:
            raise EngineRefused(f"{self._url} answered without a token: {json.dumps(last)[:300]}")
        if len(last["output_ids"]) != output_tokens:
            raise EngineRefused(
                f"{self._url} ended after {len(last['output_ids'])} of {output_tokens} tokens: "
                f"{json.dumps(last['meta_info'].get('finish_reason'))}; is its context length enough?"
            )
        meta = last["meta_info"]
        details = meta.get("cached_tokens_details") or {}
        restored = details.get("host", 0) + details.get("storage", 0)
        # SGLang matches a request when it begins to wait, and again when its forward begins.
        begun_at, waited_s = meta.get("forward_entry_time"), meta.get("queue_time")
        before_match_s = None if begun_at is None or waited_s is None else begun_at - waited_s - sent_at
        device_tokens = meta["cached_tokens"] - restored
        return Answer(
            tuple(last["output_ids"]),
            device_tokens,
            restored,
            first_s,
            total_s,
            before_match_s,
            meta.get("spec_verify_ct"),
        )

    async def flush(self) -> None:
        """Empty the device's cache; what is stored stays. The engine refuses it while it works."""
        await self._post("/flush_cache")

    async def arguments(self) -> dict[str, Any]:
        """The arguments that the engine runs with."""
        try:
            response = await self._client.get("/get_server_info")
        except httpx.TransportError as error:
            raise EngineUnreachable(f"{self._url} does not answer: {error!r}") from error
        if response.is_error:
            raise EngineRefused(f"{self._url}/get_server_info answered {response.status_code}")
        return dict(response.json())

    async def _post(self, path: str) -> None:
        try:
            response = await self._client.post(path)
        except httpx.TransportError as error:
            raise EngineUnreachable(f"{self._url} does not answer: {error!r}") from error
        if response.is_error:
            raise EngineRefused(f"{self._url}{path} answered {response.status_code}: {response.text[:300]}")
