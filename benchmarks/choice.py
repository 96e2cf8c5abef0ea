"""`agentstate bench bytes`: how much of a context is read before the first token, where a model chooses what it attends
to: the geometry of real models, without the models.

A few layers of a context are stored as an engine stores them, in extents as large as its. Then tokens are chosen at
random for each layer, and their rows are read and verified (`RowReader`). Of the other layers, which are alike, and of
the index of all layers, which a choice needs whole, the bytes are computed. The drive's limits, bytes a second and
reads a second, are measured in the same run, on the same files, with as many reads under way.
"""

from __future__ import annotations

import os
import shutil
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from rich.progress import Progress
from rich.table import Column, Table

from agentstate.benchmarks import results
from agentstate.benchmarks.device import drop_from_page_cache, read_limit
from agentstate.benchmarks.terminal import console
from agentstate.errors import SettingsError
from agentstate.pages import Geometry, PageStore, RowMemory, RowReader, fingerprint, staging_memory
from agentstate.pages.extent import SECTOR_BYTES, ExtentLayout
from agentstate.pages.files import open_direct
from agentstate.pages.rows import ARRIVED
from agentstate.pages.sectors import THREADS_DEEP, Lane, Workers
from agentstate.settings import Settings

PAGE_SIZE = 64
MARK = fingerprint(benchmark="bytes")
# How many sectors of 4 KiB a chosen row of 656 bytes took where a trained index was imitated.
CLUSTERED = 0.43
MOST_BYTES = 12 << 30


@dataclass(frozen=True)
class Model:
    """What a model that chooses keeps of a token in each of its layers that choose: rows of so many bytes, a component,
    and ``index_bytes`` of index; one query chooses ``chosen`` tokens, in blocks of so many that follow each other."""

    layers: int
    row_bytes: tuple[int, ...]
    index_bytes: int
    chosen: int = 2048
    block: int = 1

    @property
    def token_bytes(self) -> int:
        return self.layers * (sum(self.row_bytes) + self.index_bytes)


# Bytes a token and layer are as SGLang lays them out. Of the last two, how many layers and tokens a block there are is
# assumed: shares of bytes do not depend on the first.
MODELS = {
    "deepseek-v3.2": Model(61, (656,), 132),
    "glm-5": Model(78, (656,), 132),
    "minimax-m3": Model(60, (1024, 1024), 256, block=128),
    "qwen-qsa": Model(12, (1024, 1024), 64, block=64),
}


def drawn(
    tokens: int, count: int, model: Model, sectors_a_row: float | None, random: np.random.Generator
) -> np.ndarray:
    """So many tokens of a context: in runs as long as make a row take ``sectors_a_row`` sectors on average, or each by
    itself (None). Where a model chooses blocks, they are whole blocks."""
    if model.block > 1:
        blocks = tokens // model.block
        starts = random.permutation(blocks)[: max(1, min(blocks, count // model.block))]
        if sectors_a_row is not None:
            # Blocks in runs of four on average.
            starts = _runs(blocks, len(starts), 4.0, random)
        return (np.sort(starts)[:, None] * model.block + np.arange(model.block)).ravel()
    if sectors_a_row is None:
        return np.sort(random.permutation(tokens)[:count])
    # Of a run of rows, each adds its part of a sector, and the run one more.
    mean = 1 / max(0.05, sectors_a_row - model.row_bytes[0] / SECTOR_BYTES)
    return _runs(tokens, count, max(1.0, mean), random)


def _runs(of: int, count: int, mean: float, random: np.random.Generator) -> np.ndarray:
    chosen = np.zeros(of, dtype=bool)
    while (missing := count - int(np.count_nonzero(chosen))) > 0:
        runs = max(1, int(missing / mean))
        starts = random.integers(0, of, runs)
        lengths = random.geometric(1 / mean, runs)
        for offset in range(int(lengths.max())):
            places = starts[lengths > offset] + offset
            chosen[places[places < of]] = True
    # The last runs may have been one too many.
    found = np.flatnonzero(chosen)
    return found[:count] if len(found) > count else found


class Context:
    """``layers`` layers of a context, stored in a directory."""

    def __init__(self, root: Path, model: Model, tokens: int, layers: int, tick: Any):
        self.tokens = tokens // PAGE_SIZE * PAGE_SIZE
        self.pages = self.tokens // PAGE_SIZE
        sizes = tuple(PAGE_SIZE * size for size in model.row_bytes)
        self.geometry = Geometry(layers, PAGE_SIZE, sizes)
        self.store = PageStore(root, MARK, self.geometry, rows=True)
        whole = replace(model, index_bytes=0)
        # Of the whole model's layers, as many pages make an extent as an engine's spilling memory has room for.
        an_extent = max(1, int(Settings().spill_staging_bytes) // 2 // (PAGE_SIZE * whole.token_bytes))
        self.keys = [number.to_bytes(32, "big") for number in range(self.pages)]
        memory = staging_memory(self.store.draft_bytes(an_extent))
        content = np.random.default_rng(0).integers(0, 256, (8 << 20) + max(sizes) * an_extent, dtype=np.uint8)
        for first in range(0, self.pages, an_extent):
            some = self.keys[first : first + an_extent]
            draft = self.store.draft(some, memory)
            for layer in range(layers):
                for component, size in enumerate(sizes):
                    # Another part of the content for each, by a number that has no factor in common with its length.
                    at = (first * 7919 + layer * 104729 + component * 1299709) % (8 << 20)
                    part = content[at : at + size * len(some)]
                    draft.component(layer, component)[:] = part.reshape(len(some), size)
            self.store.publish(draft)
            tick(len(some) / self.pages)
        self.paths = sorted((root / "extents").iterdir())
        drop_from_page_cache(self.paths)

    def header_bytes(self, layers: int) -> int:
        """What is read of extents of so many layers beside slabs and sums."""
        whole = replace(self.geometry, layers=layers)
        return sum(ExtentLayout(whole, extent.layout.pages, rows=True).data_offset for extent in self.store.extents())


class RawReads:
    """The drive by itself: the sectors of chosen rows, read the same way, with as many reads under way, and nothing
    done with them."""

    def __init__(self, context: Context):
        self._fds = [open_direct(path, os.O_RDONLY) for path in context.paths]
        self._extents = context.store.extents()
        self._first = np.cumsum([0, *(extent.layout.pages for extent in self._extents[:-1])]) * PAGE_SIZE
        self._lane, self._workers = Lane(64 << 20), Workers(THREADS_DEEP, "raw")
        self._row_bytes = [size // PAGE_SIZE for size in context.geometry.component_bytes]

    def seconds(self, rows: Sequence[np.ndarray]) -> tuple[float, int]:
        """How long the rows of each layer take, and how many reads these are."""
        plans = [plan for layer, chosen in enumerate(rows) for plan in self._plans(layer, chosen)]
        began = time.perf_counter()
        for plan in plans:
            if np.any(self._lane.read(plan, self._workers) < plan[:, 2]):
                raise RuntimeError("a read failed")
        return time.perf_counter() - began, sum(map(len, plans))

    def _plans(self, layer: int, rows: np.ndarray) -> Iterator[np.ndarray]:
        """Reads that fill the memory, one after the other: descriptor, offset, bytes, sector of the memory."""
        reads = []
        of = np.searchsorted(self._first, rows, side="right") - 1
        for number in np.unique(of).tolist():
            layout = self._extents[number].layout
            for component, size in enumerate(self._row_bytes):
                at = (
                    layout.component_range(layer, component, 0, 1)[0]
                    + (rows[of == number] - self._first[number]) * size
                )
                touched = np.union1d(at // SECTOR_BYTES, (at + size - 1) // SECTOR_BYTES)
                starts = np.flatnonzero(np.diff(touched, prepend=-2) > 1)
                counts = np.diff(starts, append=len(touched))
                reads += [
                    (self._fds[number], SECTOR_BYTES * start, count)
                    for start, count in zip(touched[starts].tolist(), counts.tolist(), strict=True)
                ]
        some: list[tuple[int, int, int, int]] = []
        used = 0
        for fd, offset, count in reads:
            if used + count > self._lane.sectors:
                yield np.array(some, dtype=np.int64)
                some, used = [], 0
            some.append((fd, offset, SECTOR_BYTES * count, used))
            used += count
        yield np.array(some, dtype=np.int64)

    def close(self) -> None:
        self._workers.close()
        for fd in self._fds:
            os.close(fd)


def choices(context: Context, model: Model, union: int, clustered: bool, seed: int) -> list[np.ndarray]:
    """What is chosen in each of the layers that are stored."""
    random = np.random.default_rng(seed)
    count = min(context.tokens, union * model.chosen)
    lie = CLUSTERED if clustered else None
    return [drawn(context.tokens, count, model, lie, random) for _ in range(context.geometry.layers)]


def choose(context: Context, model: Model, reader: RowReader, rows: Sequence[np.ndarray]) -> dict[str, Any]:
    """Read a choice of every stored layer, layer by layer, as a forward does. The sums of sectors are read before,
    beside the index, and count among the bytes but not in the time. Bytes before the first token are the whole model's;
    what was read is of the layers that are stored."""
    layers = context.geometry.layers
    room = min(context.tokens, 8 * max(map(len, rows)))
    to = RowMemory([np.ones((room, size), dtype=np.uint8) for size in reader.row_bytes])
    named = read = reads = 0
    with reader.open(context.store.pin(context.keys)) as stream:
        for layer in range(layers):
            stream.prepare(layer).result()
        began = time.perf_counter()
        for layer in range(layers):
            found = stream.read(layer, rows[layer], to).result()
            if not np.all(found.states == ARRIVED):
                raise RuntimeError("a row was not what was written")
            named, read, reads = named + found.named_bytes, read + found.read_bytes, reads + found.reads
        seconds = time.perf_counter() - began
    sums = sum(extent.layout.sector_sums(0, layers)[1] for extent in context.store.extents())
    latent = (read + sums) * model.layers / layers
    before = context.tokens * model.layers * model.index_bytes + latent + context.header_bytes(model.layers)
    return {
        "sectors_a_row": named / SECTOR_BYTES / sum(map(len, rows)),
        "named_bytes": named,
        "read_bytes": read,
        "reads": reads,
        "seconds": seconds,
        "before_first_token_bytes": int(before),
    }


@contextmanager
def stored(root: Path | None, model: Model, tokens: int, layers: int, tick: Any) -> Iterator[Context]:
    with tempfile.TemporaryDirectory(dir=root) as place:
        n_bytes = tokens * layers * sum(model.row_bytes)
        if n_bytes > min(MOST_BYTES, shutil.disk_usage(place).free * 9 // 10):
            raise SettingsError(f"no room for {n_bytes / 1e9:.1f} GB: take fewer layers or a shorter context")
        context = Context(Path(place), model, tokens, layers, tick)
        try:
            yield context
        finally:
            context.store.close()


def run(
    directory: Path | None,
    models: Sequence[str],
    lengths: Sequence[int],
    unions: Sequence[int],
    *,
    layers: int,
    rounds: int,
    report: Path | None,
) -> list[dict[str, Any]]:
    """Measure every model with every length. Prints a table."""
    if unknown := [name for name in models if name not in MODELS]:
        raise SettingsError(f"there is no geometry {unknown[0]}: choose from {', '.join(MODELS)}")
    rows: list[dict[str, Any]] = []
    with Progress(console=console, transient=True) as progress:
        for name in models:
            model = MODELS[name]
            for tokens in lengths:
                bar = progress.add_task(f"{name}, {tokens:,} tokens", total=1.0)
                with stored(directory, model, tokens, layers, lambda part, bar=bar: progress.advance(bar, part)) as of:
                    rows += measure(of, name, model, unions, rounds)
                progress.remove_task(bar)
    console.print(table(rows))
    if report is not None:
        settings = {"layers": layers, "rounds": rounds, "page_size": PAGE_SIZE, "clustered_sectors_a_row": CLUSTERED}
        results.write(report, results.record("bytes", settings, rows))
    return rows


def measure(context: Context, name: str, model: Model, unions: Sequence[int], rounds: int) -> Iterator[dict[str, Any]]:
    """Rows of one context: a whole restore, which is computed, and every kind of choice: without reading gaps, and as
    the measured cost of reads says. Before each, as much is read of the drive by itself: figures are of the round whose
    ratio to that is the median."""
    total = context.tokens * model.token_bytes
    common = {"model": name, "tokens": context.tokens, "total_bytes": total, "limit_bytes_s": read_limit(context.paths)}
    whole = {"mode": "whole", "union": None, "clustered": None, "before_first_token_bytes": total, "measured": False}
    yield {**common, **whole}
    raw = RawReads(context)
    readers = {gap: RowReader(context.geometry, gap_bytes=gap) for gap in (0, None)}
    for clustered in (True, False):
        for union in unions:
            for gap, reader in readers.items():
                found = []
                for number in range(rounds):
                    # As many as are chosen, and others.
                    raw_s, reads = raw.seconds(choices(context, model, union, clustered, 2 * number))
                    row = choose(context, model, reader, choices(context, model, union, clustered, 2 * number + 1))
                    reads_s = reads / raw_s
                    limit_s = max(row["read_bytes"] / common["limit_bytes_s"], row["reads"] / reads_s)
                    found.append({**row, "limit_reads_s": reads_s, "limit_seconds": limit_s})
                found.sort(key=lambda row: row["seconds"] / row["limit_seconds"])
                lie = {"mode": "choice", "union": union, "clustered": clustered, "measured": True}
                yield {
                    **common,
                    **lie,
                    "gap_measured": gap is None,
                    "gap_bytes": reader.gap_bytes,
                    **found[rounds // 2],
                }
    for reader in readers.values():
        reader.close()
    raw.close()


def table(rows: Sequence[dict[str, Any]]) -> Table:
    right = (
        "tokens",
        "union",
        "sectors a row",
        "gap KiB",
        "GB before",
        "÷ whole",
        "read ÷ named",
        "reads",
        "s",
        "s ÷ limit",
    )
    found = Table("model", "lie", *(Column(name, justify="right") for name in right))
    for row in rows:
        if row["mode"] == "whole":
            whole = f"{row['total_bytes'] / 1e9:.2f}"
            found.add_row(row["model"], "whole", f"{row['tokens']:,}", "", "", "", whole, "1", *[""] * 4)
            continue
        found.add_row(
            row["model"],
            "clustered" if row["clustered"] else "scattered",
            f"{row['tokens']:,}",
            str(row["union"]),
            f"{row['sectors_a_row']:.2f}",
            f"{row['gap_bytes'] / 1024:.0f}",
            f"{row['before_first_token_bytes'] / 1e9:.2f}",
            f"{row['before_first_token_bytes'] / row['total_bytes']:.2f}",
            f"{row['read_bytes'] / row['named_bytes']:.2f}",
            f"{row['reads']:,}",
            f"{row['seconds']:.3f}",
            f"{row['seconds'] / row['limit_seconds']:.2f}",
        )
    return found
