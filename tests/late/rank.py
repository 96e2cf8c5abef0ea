"""One rank whose KV is on the late device, and a model's forwards on it."""

from __future__ import annotations

import os
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import torch
from contents import MARK, content, key, read, reader_for, write

from agentstate.pages import LayerwiseReader, PageStore, PosixBackend
from agentstate.pages.backends import Buffer, OpenFile
from engine_patch.arrivals import Arrivals
from engine_patch.restore import Restorer
from engine_patch.transfer import DevicePages
from late.device import LateDevice

LAYERS, PAGE_SIZE, HEADS, SIZE = 3, 4, 2, 10
PAGES = 24

# The bytes of a page: for every layer, its components'.
Page = list[list[bytes]]


class Rank:
    """KV tensors on ``device``, all zero, and a store in ``directory``.

    Pages have the contents of their names (`contents.content`) in a ``version``: what is stored is version 0, what a
    forward computes anew is said to be another one, so that the two can be told apart.
    """

    def __init__(self, device: LateDevice, directory: Path):
        shape = (PAGES * PAGE_SIZE + 3, HEADS, SIZE)
        self.device = device
        self.tensors = [
            tuple(torch.zeros(shape, dtype=torch.float32, device=device.torch_device) for _ in range(2))
            for _ in range(LAYERS)
        ]
        # An engine's tensors are there before anything is copied.
        device.synchronize()
        self.pages = DevicePages(self.tensors, PAGE_SIZE)
        self.store = PageStore(directory, MARK, self.pages.geometry)

    def reader(self, backend: PosixBackend | None = None, *, small: bool = True) -> LayerwiseReader:
        """A reader of two threads. One that is ``small`` has two buffers, each of one extent's pages in one layer."""
        chunk_bytes = 1 if small else 1 << 20
        return LayerwiseReader(
            self.pages.geometry, staging_bytes=2 * chunk_bytes, threads=2, chunk_bytes=chunk_bytes, backend=backend
        )

    def restorer(
        self, backend: PosixBackend | None = None, timeout_s: float | None = None, *, small: bool = True
    ) -> Restorer:
        return Restorer(self.store, self.pages, self.reader(backend, small=small), timeout_s)

    def write(self, *names: object) -> None:
        """Store one extent of the pages ``names``."""
        write(self.store, [key(name) for name in names])

    def extent_of(self, name: object) -> Path:
        with self.store.pin([key(name)]) as pin:
            return pin.segments[0].extent.path

    def all_stored(self, *names: object) -> bool:
        return all(self.store.stored([key(name) for name in names]))

    def expected(self, name: object, version: int = 0) -> Page:
        geometry = self.pages.geometry
        components = range(len(geometry.component_bytes))
        return [[content(geometry, key(name), layer, c, version) for c in components] for layer in range(LAYERS)]

    def stored(self, *names: object) -> list[Page]:
        """What the store holds of ``names``, which it must have."""
        reader = reader_for(self.pages.geometry)
        try:
            found = read(reader, [self.store.pin([key(name) for name in names])])
            return [[found[0, layer, page] for layer in range(LAYERS)] for page in range(len(names))]  # type: ignore[misc]
        finally:
            reader.close()

    def on_device(self, number: int) -> Page:
        """The bytes of a device page once everything that is queued has been done."""
        self.device.synchronize()
        return [[_rows(tensor, number).cpu().numpy().tobytes() for tensor in layer] for layer in self.tensors]

    def close(self) -> None:
        self.store.close()


class Forward:
    """A model that reads and writes KV pages on a stream of its own, as late as the device lets it."""

    def __init__(self, rank: Rank):
        self.rank = rank
        self.module = torch.get_device_module(rank.device.torch_device)
        self.stream = self.module.Stream()
        self._read: list[tuple[int, int, list[torch.Tensor]]] = []
        # What is copied from is kept: its memory is another stream's.
        self._computed: list[object] = []

    def write(self, pages: dict[int, object], version: int = 0) -> torch.Event:
        """Queue what is computed: ``pages`` are names by page number. The event is after it."""
        rows = [
            (
                _rows(tensor, number),
                torch.frombuffer(bytearray(part), dtype=torch.uint8).to(self.rank.device.torch_device),
            )
            for number, name in pages.items()
            for tensors, parts in zip(self.rank.tensors, self.rank.expected(name, version), strict=True)
            for tensor, part in zip(tensors, parts, strict=True)
        ]
        self._computed.append(rows)
        with self.module.stream(self.stream):
            for written, computed in rows:
                written.copy_(computed)
            event: torch.Event = self.module.Event()
            event.record()
        return event

    def read_layer(self, layer: int, numbers: Sequence[int]) -> None:
        """Queue an attention over these pages of a layer."""
        with self.module.stream(self.stream):
            for number in numbers:
                self._read.append((layer, number, [_rows(part, number).clone() for part in self.rank.tensors[layer]]))

    def run(self, arrivals: Arrivals, batch: int, numbers: Sequence[int]) -> None:
        """Read layer after layer of these pages, each once it has arrived."""
        arrivals.set_consumer(batch)
        for layer in range(LAYERS):
            arrivals.wait_until(layer)
            self.read_layer(layer, numbers)

    def run_at_once(self, restorer: Restorer, numbers: Sequence[int]) -> None:
        """Read every layer of the next batch in the moment in which it is said to be there, and no later."""
        complete = restorer.arrivals.complete

        def completed(batch: int, layer: int) -> None:
            self.read_layer(layer, numbers)
            self.stream.synchronize()
            # Last, since whoever waits for the batch looks at what was read.
            complete(batch, layer)

        restorer.arrivals.complete = completed  # type: ignore[method-assign]

    def seen(self, number: int) -> Page:
        """What was read of a page, the last time."""
        with self.module.stream(self.stream):
            layers = {
                layer: [part.cpu().numpy().tobytes() for part in parts] for layer, n, parts in self._read if n == number
            }
        return [layers[layer] for layer in range(LAYERS)]

    def finish(self) -> None:
        self.stream.synchronize()


class HangingDrive(PosixBackend):
    """A drive that reads nothing of the extents ``paths`` until it `answers`. ``hangs`` is set when it is asked to."""

    def __init__(self, *paths: Path):
        self.hangs = threading.Event()
        self._paths = paths
        self._answers = threading.Event()

    def answer(self) -> None:
        self._answers.set()

    def open(self, fd: int, path: Path) -> OpenFile:
        return _HangingFile(self, fd) if path in self._paths else super().open(fd, path)

    def read(self, fd: int, into: Buffer, offset: int) -> int:
        self.hangs.set()
        assert self._answers.wait(60)
        return os.preadv(fd, [into], offset)


class _HangingFile(OpenFile):
    def __init__(self, drive: HangingDrive, fd: int):
        self._drive, self._fd = drive, fd

    def read(self, into: Buffer, offset: int) -> int:
        return self._drive.read(self._fd, into, offset)

    def close(self) -> None:
        pass


@contextmanager
def on_return(target: object, name: str, action: Callable[[], object]) -> Iterator[None]:
    """Within it ``action`` is called when the method ``name`` of ``target`` has returned, in its thread."""
    real: Callable[..., object] = getattr(target, name)

    def then_acts(*args: object, **options: object) -> object:
        result = real(*args, **options)
        action()
        return result

    setattr(target, name, then_acts)
    try:
        yield
    finally:
        delattr(target, name)


def _rows(tensor: torch.Tensor, number: int) -> torch.Tensor:
    return tensor[number * PAGE_SIZE : (number + 1) * PAGE_SIZE].view(torch.uint8).reshape(-1)
