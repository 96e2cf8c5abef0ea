"""Ways to keep the KV pages of a context on a local disk: this store, the device itself, and what a user might take
instead.

Each takes pages out of a `DeviceMemory` and brings them back into one, so that all end with the same bytes in the same
kind of memory. A write ends when its bytes are durable, even if its author does not ask for that.
"""

from __future__ import annotations

import hashlib
import math
import os
import shutil
import threading
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from agentstate.benchmarks import device
from agentstate.pages import (
    Destination,
    ExtentDraft,
    Geometry,
    LayerwiseReader,
    PageStore,
    Quota,
    Writer,
    fingerprint,
    merge,
    staging_memory,
)
from agentstate.pages.files import open_direct

MARK = fingerprint(benchmark="pages")


class DeviceMemory:
    """Host memory laid out and aligned as a CPU engine's KV tensors: ``bytes`` has shape (layers, components, rows,
    component bytes), a page a row. Page ``p`` of a context lies in row ``p % rows``, so that a context may be longer
    than the memory.

    Raises ValueError for a geometry whose components differ in size.
    """

    def __init__(self, geometry: Geometry, rows: int):
        sizes = set(geometry.component_bytes)
        if len(sizes) != 1:
            raise ValueError(f"components of {sorted(sizes)} bytes do not fit one array")
        self.rows = rows
        shape = geometry.layers, len(geometry.component_bytes), rows, sizes.pop()
        self.bytes = staging_memory(math.prod(shape)).reshape(shape)
        self.clear()

    def clear(self) -> None:
        self.bytes[:] = 0xA5

    def fill(self, seed: int) -> None:
        random = np.random.default_rng(seed)
        for layer in self.bytes:
            layer[:] = np.frombuffer(random.bytes(layer.nbytes), dtype=np.uint8).reshape(layer.shape)

    def same(self, other: DeviceMemory) -> bool:
        return all(np.array_equal(mine, theirs) for mine, theirs in zip(self.bytes, other.bytes, strict=True))

    def gather(self, layer: int, component: int, first: int, out: np.ndarray) -> None:
        """Copy pages, from page ``first`` on, into ``out``, of shape (pages, component bytes)."""
        for rows, part in self._spans(first, len(out)):
            np.copyto(out[part], self.bytes[layer, component, rows])

    def scatter(self, layer: int, component: int, first: int, pages: np.ndarray) -> None:
        """The inverse of `gather`."""
        for rows, part in self._spans(first, len(pages)):
            np.copyto(self.bytes[layer, component, rows], pages[part])

    def memory(self, layer: int, pages: range) -> list[list[np.ndarray]]:
        """Where pages are, of each component."""
        spans = [rows for rows, _ in self._spans(pages.start, len(pages))]
        return [[component[rows] for rows in spans] for component in self.bytes[layer]]

    def _spans(self, first: int, count: int) -> Iterator[tuple[slice, slice]]:
        done = 0
        while done < count:
            row = (first + done) % self.rows
            taken = min(count - done, self.rows - row)
            yield slice(row, row + taken), slice(done, done + taken)
            done += taken


def page_key(number: int, version: int) -> bytes:
    return hashlib.sha256(f"{version}/{number}".encode()).digest()


class Contender(ABC):
    """One way to keep pages, in a directory of its own."""

    name: str

    def __init__(self, directory: Path):
        self.directory = directory

    @abstractmethod
    def write(self, device: DeviceMemory, pages: int, version: int) -> None:
        """Store pages ``[0, pages)``. Another ``version`` means other pages with the same contents."""

    @abstractmethod
    def read(self, device: DeviceMemory) -> None:
        """Bring back what was written last."""

    @abstractmethod
    def delete(self) -> None:
        """Delete everything that was written."""

    def files(self) -> list[Path]:
        """The files that hold pages."""
        return sorted(path for path in self.directory.rglob("*") if path.is_file())

    def forget(self) -> None:
        """Make the next read cold: what was written is durable, so the kernel can drop it from its page cache."""
        for path in self.files():
            fd = os.open(path, os.O_RDONLY)
            try:
                os.posix_fadvise(fd, 0, 0, os.POSIX_FADV_DONTNEED)
            finally:
                os.close(fd)


class AgentStateStore(Contender):
    """This store, used as an engine uses it. One thread gathers pages and another publishes them. They are read layer
    by layer and verified: ``straight`` to where they belong, as on a CPU, or through staging, from which one thread
    copies them, as on a GPU."""

    name = "agentstate"

    def __init__(
        self,
        directory: Path,
        geometry: Geometry,
        reader: LayerwiseReader,
        *,
        spill_staging_bytes: int,
        pages_an_extent: int | None = None,
        merged: bool = False,
        straight: bool = True,
    ):
        super().__init__(directory)
        self.quota = Quota()
        self._geometry = geometry
        self._reader = reader
        self._merged = merged
        self._straight = straight
        self._keys: list[bytes] = []
        self._spill_staging_bytes = spill_staging_bytes
        self._open()
        self.pages_an_extent = pages_an_extent or self._writer.pages_an_extent

    def _open(self) -> None:
        self._store = PageStore(self.directory, MARK, self._geometry, self.quota)
        self._writer = Writer(self._store, self._spill_staging_bytes)

    def sizes(self, pages: int) -> list[int]:
        """The bytes of the extents that ``pages`` pages are written as."""
        firsts = range(0, pages, self.pages_an_extent)
        return [self._store.draft_bytes(min(self.pages_an_extent, pages - first)) for first in firsts]

    def limit(self, quota: Quota) -> None:
        """From now on keep to ``quota``."""
        self.quota = self._store.quota = quota

    def write(self, device: DeviceMemory, pages: int, version: int) -> None:
        self._keys = [page_key(number, version) for number in range(pages)]
        published = [
            self._writer.write(self._keys[first : first + self.pages_an_extent], partial(self._gather, device, first))
            for first in range(0, pages, self.pages_an_extent)
        ]
        for extent in published:
            extent.result()
        if self._merged:
            with self._writer.memory() as memory:
                merge(self._store, self._reader, self._keys, memory)

    def _gather(self, device: DeviceMemory, first: int, draft: ExtentDraft) -> None:
        for layer in range(self._geometry.layers):
            for component in range(len(self._geometry.component_bytes)):
                device.gather(layer, component, first, draft.component(layer, component))
            draft.sum_up(layer)

    def read(self, device: DeviceMemory) -> None:
        with self._reader.open(self._store.pin(self._keys)) as stream:
            if self._straight:
                stream.hurry([Destination(range(len(self._keys)), device.memory)])
            for chunk in stream:
                if chunk.wrong:
                    raise RuntimeError(f"pages {chunk.wrong} of {self.directory} are not what was written")
                for segment, arrays in chunk.parts:
                    for component, array in enumerate(arrays):
                        device.scatter(chunk.layer, component, segment.first, array)

    def files(self) -> list[Path]:
        return sorted((self.directory / "extents").glob("*.ext"))

    def delete(self) -> None:
        self.close()
        self._open()

    def close(self) -> None:
        self._writer.close()
        self._store.close()
        shutil.rmtree(self.directory)


class Device:
    """The device's limit: bare direct reads and writes, by as many threads as the store has, out of and into memory
    like the store's."""

    def __init__(self, directory: Path, *, readers: int, largest_bytes: int):
        self.directory = directory
        self._blocks = [staging_memory(device.BLOCK_BYTES) for _ in range(readers)]
        self._draft = staging_memory(largest_bytes)
        random = np.random.default_rng(0)
        for buffer in (*self._blocks, self._draft):
            buffer[:] = np.frombuffer(random.bytes(len(buffer)), dtype=np.uint8)

    def read(self, paths: Sequence[Path]) -> None:
        """Read files from end to end, in blocks of 2 MiB."""
        device.read_files(paths, self._blocks)

    def write(self, sizes: Sequence[int]) -> None:
        """Write files of ``sizes`` bytes, preallocated, each made durable by one `fdatasync`, over existing
        files."""
        self.directory.mkdir(parents=True, exist_ok=True)
        for number, size in enumerate(sizes):
            self._write(number, size)

    def _write(self, number: int, size: int) -> None:
        fd = open_direct(self.directory / str(number), os.O_WRONLY | os.O_CREAT)
        try:
            os.posix_fallocate(fd, 0, size)
            written = 0
            while written < size:
                written += os.pwrite(fd, self._draft[written:size], written)
            os.fdatasync(fd)
        finally:
            os.close(fd)

    def copy_cached(self, paths: Sequence[Path]) -> None:
        """Read files that are in the page cache, buffered: the cost of a memory copy."""
        for path in paths:
            with path.open("rb", buffering=0) as file:
                while file.readinto(self._blocks[0]):
                    pass

    def delete(self) -> None:
        shutil.rmtree(self.directory, ignore_errors=True)


class FileAPage(Contender):
    """One file a page, written and read by ``threads`` threads. A page is gathered from all layers of the device
    before it is saved, and spread over them after it is loaded."""

    def __init__(self, directory: Path, geometry: Geometry, threads: int):
        super().__init__(directory)
        shape = (geometry.layers, len(geometry.component_bytes), geometry.component_bytes[0])
        self._staged = [np.zeros(shape, dtype=np.uint8) for _ in range(threads)]
        self._keys: list[str] = []

    @abstractmethod
    def save(self, key: str, page: Any) -> None:
        """Store a torch tensor, uint8, of one page."""

    @abstractmethod
    def load(self, key: str, page: Any) -> Any:
        """The tensor of a page: a new one, or ``page``, filled."""

    def write(self, device: DeviceMemory, pages: int, version: int) -> None:
        import torch

        self.directory.mkdir(parents=True, exist_ok=True)
        self._keys = [page_key(number, version).hex() for number in range(pages)]

        def save(number: int, page: np.ndarray) -> None:
            np.copyto(page, device.bytes[:, :, number % device.rows])
            self.save(self._keys[number], torch.from_numpy(page))

        _each(range(pages), self._staged, save)
        for path in self.files():
            fd = os.open(path, os.O_RDONLY)
            os.fdatasync(fd)
            os.close(fd)

    def read(self, device: DeviceMemory) -> None:
        import torch

        def load(number: int, page: np.ndarray) -> None:
            loaded = self.load(self._keys[number], torch.from_numpy(page))
            np.copyto(device.bytes[:, :, number % device.rows], loaded.numpy())

        _each(range(len(self._keys)), self._staged, load)

    def delete(self) -> None:
        shutil.rmtree(self.directory, ignore_errors=True)


class TorchFiles(FileAPage):
    name = "torch.save"

    def save(self, key: str, page: Any) -> None:
        import torch

        torch.save(page, self.directory / key)

    def load(self, key: str, page: Any) -> Any:
        import torch

        return torch.load(self.directory / key)


class SafetensorsFiles(FileAPage):
    name = "safetensors"

    def save(self, key: str, page: Any) -> None:
        from safetensors.torch import save_file

        save_file({"kv": page}, self.directory / key)

    def load(self, key: str, page: Any) -> Any:
        from safetensors.torch import load_file

        return load_file(self.directory / key)["kv"]


class HiCacheFiles(FileAPage):
    """SGLang's storage backend for local files, called as its cache controller calls it: a page is read into existing
    memory."""

    name = "HiCacheFile"

    def __init__(self, directory: Path, geometry: Geometry, threads: int):
        super().__init__(directory, geometry, threads)
        from sglang.srt.mem_cache.hicache_storage import HiCacheFile, HiCacheStorageConfig

        os.environ.pop("SGLANG_HICACHE_FILE_BACKEND_STORAGE_DIR", None)
        config = HiCacheStorageConfig(
            tp_rank=0,
            tp_size=1,
            pp_rank=0,
            pp_size=1,
            attn_cp_rank=0,
            attn_cp_size=1,
            is_mla_model=False,
            enable_storage_metrics=False,
            is_page_first_layout=False,
            model_name="benchmark",
        )
        self._files = HiCacheFile(config, str(directory))

    def save(self, key: str, page: Any) -> None:
        if not self._files.set(key, page):
            raise RuntimeError(f"HiCacheFile did not store page {key}")

    def load(self, key: str, page: Any) -> Any:
        if self._files.get(key, page.flatten()) is None:
            raise RuntimeError(f"HiCacheFile did not find page {key}")
        return page


def alternatives(directory: Path, geometry: Geometry, threads: int) -> tuple[list[FileAPage], list[str]]:
    """Those that can be imported here, and the names of the others."""
    found: list[FileAPage] = []
    missing = []
    for kind in (TorchFiles, SafetensorsFiles, HiCacheFiles):
        try:
            __import__({"torch.save": "torch", "HiCacheFile": "sglang"}.get(kind.name, kind.name))
            found.append(kind(directory / kind.name, geometry, threads))
        except ImportError:
            missing.append(kind.name)
    return found, missing


def _each(items: Sequence[Any], resources: Sequence[Any], action: Callable[[Any, Any], Any]) -> None:
    """``action(item, resource)`` for every item, in order, by one thread a resource. Raises what an action raises."""
    waiting = iter(items)
    taking = threading.Lock()

    def work(resource: Any) -> None:
        while True:
            with taking:
                try:
                    item = next(waiting)
                except StopIteration:
                    return
            action(item, resource)

    if len(resources) == 1:
        work(resources[0])
        return
    with ThreadPoolExecutor(len(resources)) as pool:
        list(pool.map(work, resources))
