"""Who looks at the console while its service is measured: a browser, or a client that asks for what its tabs would.

Both follow one stream, and fetch every page that they look at whenever it says that there is something new.
"""

from __future__ import annotations

import asyncio
import importlib.util
import shutil
from abc import ABC, abstractmethod
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from typing import Any
from urllib.parse import urljoin

import httpx

from agentstate.errors import SettingsError

KINDS = ("chromium", "client")
_PROGRAMS = ("chromium", "chromium-browser", "google-chrome")
_PATIENCE_S = 120.0
_PAINTED = """() => new Promise((done) => new PerformanceObserver((seen) => {
  for (const one of seen.getEntriesByName("first-contentful-paint")) done(one.startTime);
}).observe({ type: "paint", buffered: true }))"""


class Viewer(ABC):
    """``fetched`` counts the pages that it was answered."""

    kind: str

    def __init__(self) -> None:
        self.fetched = 0

    @abstractmethod
    async def open(self, urls: Sequence[str]) -> None:
        """Look at these pages of one service from now on: when it returns, each has been shown."""

    @abstractmethod
    async def close(self) -> None:
        """Look at them no more. Raises what has ended the looking before."""

    @abstractmethod
    async def first_paint_ms(self, url: str) -> float | None:
        """How long a browser that has nothing of the console takes until it paints; None if this is no browser."""


def require(kind: str) -> str | None:
    """The browser of a viewer of one of `KINDS`, None for one that needs none; of an empty kind, a browser if there is
    one. Raises SettingsError for another kind, and for a browser that is not there."""
    if kind not in ("", *KINDS):
        raise SettingsError(f"there is no viewer {kind}: choose of {', '.join(KINDS)}")
    program = next(filter(None, map(shutil.which, _PROGRAMS)), None)
    if importlib.util.find_spec("playwright") is None:
        program = None
    if kind == "chromium" and program is None:
        raise SettingsError("there is no Chromium with Playwright: pip install playwright, and install Chromium")
    return None if kind == "client" else program


@asynccontextmanager
async def viewer(kind: str = "") -> AsyncIterator[Viewer]:
    """A viewer of a kind, by default a browser if there is one. Raises like `require`."""
    program = require(kind)
    if program is None:
        yield _Client()
        return
    from playwright.async_api import async_playwright

    async with async_playwright() as playwright:
        arguments = ["--no-sandbox", "--disable-dev-shm-usage", "--disable-gpu"]
        browser = await playwright.chromium.launch(executable_path=program, args=arguments, timeout=_PATIENCE_S * 1000)
        try:
            yield _Chromium(browser)
        finally:
            await browser.close()


class _Chromium(Viewer):
    kind = "chromium"

    def __init__(self, browser: Any):
        super().__init__()
        self._browser = browser
        self._context: Any = None

    async def open(self, urls: Sequence[str]) -> None:
        self._context = await self._new()
        self._context.on("response", self._count)
        for url in urls:
            await (await self._context.new_page()).goto(url)

    async def close(self) -> None:
        if self._context is not None:
            await self._context.close()
            self._context = None

    async def first_paint_ms(self, url: str) -> float | None:
        context = await self._new()
        try:
            page = await context.new_page()
            await page.goto(url)
            painted: float = await page.evaluate(_PAINTED)
            return painted
        finally:
            await context.close()

    async def _new(self) -> Any:
        context = await self._browser.new_context(viewport={"width": 1280, "height": 900})
        context.set_default_timeout(_PATIENCE_S * 1000)
        return context

    def _count(self, response: Any) -> None:
        is_page = response.headers.get("content-type", "").startswith("text/html")
        self.fetched += is_page and response.ok


class _Client(Viewer):
    kind = "client"

    def __init__(self) -> None:
        super().__init__()
        self._following: asyncio.Task[None] | None = None

    async def open(self, urls: Sequence[str]) -> None:
        shown = asyncio.Event()
        self._following = asyncio.create_task(self._follow(urls, shown))
        waiting = asyncio.create_task(shown.wait())
        await asyncio.wait((self._following, waiting), return_when=asyncio.FIRST_COMPLETED)
        waiting.cancel()
        if self._following.done():
            await self.close()

    async def close(self) -> None:
        following, self._following = self._following, None
        if following is None:
            return
        if not following.done():
            following.cancel()
        await asyncio.gather(following, return_exceptions=True)
        if not following.cancelled():
            following.result()

    async def first_paint_ms(self, url: str) -> float | None:
        return None

    async def _follow(self, urls: Sequence[str], shown: asyncio.Event) -> None:
        async with httpx.AsyncClient(timeout=_PATIENCE_S, trust_env=False) as http:
            while True:
                async with http.stream("GET", urljoin(urls[0], "/console/stream")) as stream:
                    stream.raise_for_status()
                    async for line in stream.aiter_lines():
                        if line.startswith("data:"):
                            for url in urls:
                                (await http.get(url)).raise_for_status()
                                self.fetched += 1
                            shown.set()
