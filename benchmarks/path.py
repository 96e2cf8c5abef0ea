"""What Python does for a match, a restore and a spill, without I/O. In the engine's environment:

    python -m agentstate.benchmarks.path [--tokens 131072,409600,1010000] [--page-sizes 1,64]

`agentstate bench path` runs it, and has the table. It prints a JSON object a row.

Everything on the engine's side runs as it does beside SGLang: a rank's pools, page store, index and threads, with the
KV geometry of Qwen2.5-7B. Only the parts that move or look at bytes do nothing: reads of pages return at once,
checksums are zero, copies to and from the KV tensors are left out, and only the header of an extent is written. So
neither the memory nor the disk space of a long context is needed. The KV tensors are address space that is never
touched.

Pages that go through staging are read in pieces of the size that an accelerator gets; pages that go straight to the KV
pool, in those of a CPU. Times are CPU time of all threads of the process together, without reading and writing headers.
"""

from __future__ import annotations

import argparse
import itertools
import json
import mmap
import os
import random
import sys
import tempfile
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from hashlib import sha256
from pathlib import Path
from statistics import median
from types import SimpleNamespace
from typing import Any
from unittest.mock import patch

import lmdb
import numpy as np
import torch

from agentstate.pages import PageStore, extent, files, fingerprint, native
from agentstate.pages.extent import PREFIX
from agentstate.settings import Settings
from engine_patch import stored_pools, transfer
from engine_patch.break_even import BreakEven
from engine_patch.linker import AgentStateLinker
from engine_patch.pools import DevicePool
from engine_patch.radix_cache import _LinkerWrapper
from engine_patch.sglang_api import PagedTokenToKVPoolAllocator, PoolName, PoolTransfer
from engine_patch.stored_pools import StoredPools, chunk_bytes
from engine_patch.transfer import DevicePages

LAYERS, HEADS, SIZE = 28, 4, 128
TOKEN_BYTES = LAYERS * 2 * HEADS * SIZE * 2
LENGTHS = (131_072, 409_600, 1_010_000)
PAGE_SIZES = (1, 64)
# The tokens that a chunked prefill leaves in the tree at a time.
NODE_TOKENS = 8192
# Calls are counted with a context of this length: a profiler sees each of them, and they grow with the bytes.
COUNTED_TOKENS = 16_384
REPEATS, ENOUGH_S = 3, 20
_LOOK_UPS, _LMDB = ("get", "getmulti", "set_key"), (lmdb.Transaction, lmdb.Cursor)


class _NoCopy(np.ndarray):
    """Rows of KV that are neither read nor written, whatever NumPy is told to do with them."""

    def __setitem__(self, index: Any, value: Any) -> None:
        pass

    def __array_function__(self, function: Any, types: Any, args: Any, kwargs: Any) -> Any:
        if function in (np.take, np.copyto):
            return None
        return super().__array_function__(function, types, args, kwargs)


class _NoRows:
    """Stands in for the tensor of a component's rows."""

    def __init__(self, rows: np.ndarray):
        self._rows = rows
        self.shape = rows.shape

    def __len__(self) -> int:
        return len(self._rows)

    def __getitem__(self, index: Any) -> _NoRows:
        return _NoRows(self._rows[index])

    def data_ptr(self) -> int:
        return self._rows.ctypes.data

    def numpy(self) -> np.ndarray:
        return self._rows.view(_NoCopy)


class Counts(Counter[str]):
    """Calls that would have done something, by what."""

    @contextmanager
    def counting(self) -> Iterator[None]:
        """Count those of every thread that begins in it, and of this one."""
        kinds = {
            _checksum.__code__: "checksums",
            _NoCopy.__setitem__.__code__: "copies",
            _NoCopy.__array_function__.__code__: "copies",
            _NoIO.preadv.__code__: "reads",
            _NoVerifier.read.__code__: "reads",
            _NoVerifier.sum_up.__code__: "checksums",
        }

        def event(frame: Any, kind: str, what: Any) -> None:
            if kind == "call":
                if (counted := kinds.get(frame.f_code)) is not None:
                    self[counted] += 1
            elif kind == "c_call" and what.__name__ in _LOOK_UPS and isinstance(what.__self__, _LMDB):
                self["look_ups"] += 1

        threading.setprofile(event)
        sys.setprofile(event)
        try:
            yield
        finally:
            sys.setprofile(None)
            threading.setprofile(None)  # type: ignore[arg-type]


def _checksum(*_: Any, **__: Any) -> int:
    return 0


class _NoVerifier:
    """Takes the native extension's place: reads and verifies nothing."""

    def __init__(self, *_: Any):
        pass

    def read(self, fd: int, fills: Sequence[Any], *_: Any) -> tuple[list[int], list[int]]:
        return [wanted for _, _, wanted in fills], []

    def wrong_slots(self, *_: Any) -> list[int]:
        return []

    def sum_up(self, *_: Any) -> None:
        pass


class _NoIO:
    """Replaces what reads, checksums, writes and copies bytes; ``excluded_s`` is the time it took for headers."""

    def __init__(self) -> None:
        self.excluded_s = 0.0
        self._preadv = os.preadv

    def preadv(self, fd: int, buffers: Sequence[Any], offset: int) -> int:
        if offset == 0:
            started_s = time.thread_time()
            n_bytes = self._preadv(fd, buffers, offset)
            self.excluded_s += time.thread_time() - started_s
            return n_bytes
        return int(buffers[0].nbytes) if len(buffers) == 1 else 1 << 62

    def publish(self, partial: Path, final: Path, data: memoryview, spare: Path | None) -> int:
        """Write the header alone."""
        started_s = time.thread_time()
        length = PREFIX.size + PREFIX.unpack(data[: PREFIX.size])[2]
        with final.open("wb") as file:
            file.write(data[:length])
            file.truncate(len(data))
        self.excluded_s += time.thread_time() - started_s
        return final.stat().st_mtime_ns

    @contextmanager
    def installed(self) -> Iterator[None]:
        def no_rows(tensor: torch.Tensor, page_size: int) -> _NoRows:
            return _NoRows(tensor.view(torch.uint8).reshape(len(tensor) // page_size, -1).numpy())

        hasher = SimpleNamespace(update=lambda _: None, intdigest=_checksum)
        sums = SimpleNamespace(xxh3_64_intdigest=_checksum, xxh3_64=lambda seed=0: hasher)
        with (
            patch.object(os, "preadv", self.preadv),
            patch.object(extent, "xxhash", sums),
            patch.object(native, "library", native.library and SimpleNamespace(Verifier=_NoVerifier)),
            patch.object(files, "publish", self.publish),
            patch.object(transfer, "_page_rows", no_rows),
        ):
            yield

    @contextmanager
    def timed(self) -> Iterator[Callable[[], float]]:
        """A function that returns the CPU seconds spent within the context, once that is over."""
        before_s, excluded_s = time.process_time(), self.excluded_s
        seconds = [0.0]
        yield lambda: seconds[0]
        seconds[0] = time.process_time() - before_s - (self.excluded_s - excluded_s)


class Rank:
    """One rank with a context of ``tokens`` tokens, whose pages lie one after the other on the device, or scattered
    over it."""

    def __init__(self, directory: Path, tokens: int, page_size: int, *, straight: bool, scattered: bool):
        self.pages = tokens // page_size
        self.n_bytes = self.pages * page_size * TOKEN_BYTES
        self._page_size = page_size
        # Page 0 is SGLang's own.
        n_bytes = (self.pages + 1) * page_size * HEADS * SIZE * 2
        space = mmap.mmap(-1, n_bytes, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
        tensor = torch.frombuffer(space, dtype=torch.bfloat16).view(-1, HEADS, SIZE)
        allocator = object.__new__(PagedTokenToKVPoolAllocator) if straight else None
        pool = DevicePool(
            PoolName.KV, [(tensor, tensor)] * LAYERS, page_size, tuple(range(LAYERS)), ("bf16",), None, allocator
        )
        sizes = torch.device("cpu" if straight else "cuda")
        with patch.object(stored_pools, "chunk_bytes", lambda _: chunk_bytes(sizes)):
            self.pools = StoredPools([pool], lambda pool: self._store(directory, pool.device_pages), Settings())
        if pool.device_pages.addressable is not straight:
            raise RuntimeError("the KV tensors are not aligned as they should be")
        self._hashes = [sha256(number.to_bytes(8, "big")).hexdigest() for number in range(self.pages)]
        numbers = list(range(1, self.pages + 1))
        if scattered:
            random.Random(0).shuffle(numbers)
        self._slots = (torch.tensor(numbers)[:, None] * page_size + torch.arange(page_size)).flatten()

    def _store(self, directory: Path, pages: DevicePages) -> PageStore:
        return PageStore(directory, fingerprint(benchmark="path"), pages.geometry)

    def transfer(self, first: int = 0, last: int | None = None) -> PoolTransfer:
        """Some of its pages, as SGLang names them."""
        slots = self._slots[first * self._page_size : None if last is None else last * self._page_size]
        return PoolTransfer(name=PoolName.KV, keys=self._hashes[first:last], device_indices=slots)

    def spill(self) -> None:
        """One node of the tree after the other, as fast as they are taken."""
        step, answers = NODE_TOKENS // self._page_size, 0
        for first in range(0, self.pages, step):
            node = self.transfer(first, min(self.pages, first + step))
            while not self.pools.offer([node], tuple):
                answers += self._answers()
        while answers < -(-self.pages // step):
            answers += self._answers()

    def _answers(self) -> int:
        time.sleep(0.01)
        answers = self.pools.results
        for _ in range(answers):
            if not self.pools.pop_result():
                raise RuntimeError("an offer was not stored: see the log")
        return answers

    def restore(self) -> None:
        self.pools.load("r", [self.transfer()])
        finished = self.pools.finish(self.pools.start(()))
        if finished.failed or finished.restored is None:
            raise RuntimeError("the restore failed: see the log")

    def match(self) -> None:
        """From the hashes to the length that all ranks agree on."""
        linker = AgentStateLinker.__new__(AgentStateLinker)
        linker.page_size, linker._pools, linker._cached = self._page_size, self.pools, 0
        linker._rank = SimpleNamespace(off=None, break_even=BreakEven(), settings=Settings())
        alone = SimpleNamespace(_all_reduce_attn_groups=lambda *_: None)
        ranks = SimpleNamespace(cache=alone, cache_linker=linker, _rid="r")
        lengths = linker.lookup("r", [PoolTransfer(name=PoolName.KV, keys=self._hashes)])
        agreed = _LinkerWrapper._sync_restorable_prefix(ranks, lengths, num_pages=self.pages, device_hit_pages=0)
        if agreed != self.pages:
            raise RuntimeError(f"{agreed} of {self.pages} pages were found")

    def close(self) -> None:
        self.pools.finish_spilling(60)
        self.pools.close()


def parts(directory: Path, tokens: int, page_size: int) -> Iterator[tuple[str, int, Callable[[], None]]]:
    """What is measured, in this order: its name, its bytes, and what does it."""
    # Pages are read straight to the KV pool only if a component of a page is a whole number of memory pages.
    straight = [False, True] if page_size * HEADS * SIZE * 2 % mmap.PAGESIZE == 0 else [False]
    for to_pool, scattered in itertools.product(straight, (False, True)):
        rank = Rank(directory, tokens, page_size, straight=to_pool, scattered=scattered)
        where = f"{', straight' if to_pool else ''}{', scattered' if scattered else ''}"
        try:
            if not to_pool and not scattered:
                yield "spill", rank.n_bytes, rank.spill
                yield "match", rank.n_bytes, rank.match
            yield f"restore{where}", rank.n_bytes, rank.restore
        finally:
            rank.close()


def measure(tokens: int, page_size: int) -> Iterator[dict[str, Any]]:
    """A row a part."""
    calls = counted(page_size)
    with ExitStack() as within:
        no_io = _NoIO()
        within.enter_context(no_io.installed())
        directory = Path(within.enter_context(tempfile.TemporaryDirectory(prefix="path-")))
        for part, n_bytes, work in parts(directory, tokens, page_size):
            seconds: list[float] = []
            # What is stored is not stored again.
            while len(seconds) < (1 if part == "spill" else REPEATS) and sum(seconds) < ENOUGH_S:
                with no_io.timed() as took:
                    work()
                seconds.append(took())
            yield {
                "part": part,
                "tokens": tokens,
                "page_size": page_size,
                "bytes": n_bytes,
                "interpreter_s": round(median(seconds), 4),
                "seconds": seconds,
                **calls[part],
            }


def counted(page_size: int) -> dict[str, dict[str, Any]]:
    """How many calls each part makes for a GB (10⁹ bytes), by what they do."""
    found = {}
    with ExitStack() as within:
        within.enter_context(_NoIO().installed())
        directory = Path(within.enter_context(tempfile.TemporaryDirectory(prefix="path-")))
        counts = Counts()
        within.enter_context(counts.counting())
        for part, n_bytes, work in parts(directory, COUNTED_TOKENS, page_size):
            counts.clear()
            work()
            by_kind = {f"{kind}_per_gb": round(number / n_bytes * 1e9, 1) for kind, number in sorted(counts.items())}
            found[part] = {"calls_per_gb": round(counts.total() / n_bytes * 1e9, 1), **by_kind}
    return found


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        prog="python -m agentstate.benchmarks.path", description=(__doc__ or "").split("\n")[0]
    )
    parser.add_argument("--tokens", default=",".join(map(str, LENGTHS)), help="lengths of the context")
    parser.add_argument("--page-sizes", default=",".join(map(str, PAGE_SIZES)), help="tokens a page")
    given = parser.parse_args(arguments)
    torch.set_num_threads(1)
    for page_size in map(int, given.page_sizes.split(",")):
        for tokens in map(int, given.tokens.split(",")):
            for row in measure(tokens, page_size):
                print(json.dumps(row), flush=True)


if __name__ == "__main__":
    main()
