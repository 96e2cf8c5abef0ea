"""Which layers of which batch have arrived on the device, and the gate at which a forward waits for them."""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from concurrent.futures import Future
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import torch

_Route = Sequence[tuple["Arrivals", int]]


class Arrivals:
    """Batches of ``layers`` layers, numbered from 0 on. One thread begins and finishes them, another one completes
    their layers, and a forward waits for them.

    A failed layer does not raise in the forward that waits for it: a forward must not fail on one rank alone. `finish`
    reports it afterwards. A batch is abandoned when a layer takes longer than ``timeout_s`` (None: no limit), or by
    `abandon`; waiters then return at once.
    """

    def __init__(self, layers: int, timeout_s: float | None = None):
        self.futures: dict[int, list[Future[None]]] = {}
        self._layers = layers
        self._timeout_s = timeout_s
        self._abandoned: set[int] = set()
        # The abandoned batches that `finish` has reported.
        self._finished: set[int] = set()
        self._next = 0
        self._awaited = -1

    def begin(self) -> int:
        """Begin a new batch and return its number."""
        number, self._next = self._next, self._next + 1
        self.futures[number] = [Future() for _ in range(self._layers)]
        return number

    def complete(self, batch: int, layer: int) -> None:
        self.futures[batch][layer].set_result(None)

    def fail(self, batch: int, error: BaseException) -> None:
        """Fail every layer of the batch that has not arrived."""
        for layer in self.futures.get(batch, ()):
            if not layer.done():
                layer.set_exception(error)

    def set_consumer(self, batch: int) -> None:
        """Choose the batch that `wait_until` waits for from now on; -1 for none."""
        self._awaited = batch

    def wait_until(self, layer: int) -> None:
        """Return once a layer has arrived or failed, or its batch is abandoned."""
        if (layers := self.futures.get(self._awaited)) is not None:
            self._arrived(self._awaited, layers[layer])

    def _arrived(self, batch: int, layer: Future[None]) -> bool:
        if batch in self._abandoned:
            return False
        try:
            return layer.exception(self._timeout_s) is None
        except TimeoutError:
            self.abandon(batch)
            return False

    def wait(self, batch: int, layer: int) -> bool:
        """Return once a layer of a batch has arrived or failed, or the batch is abandoned: whether it has arrived. An
        unknown batch counts as arrived."""
        layers = self.futures.get(batch)
        return layers is None or self._arrived(batch, layers[layer])

    def awaited(self, batch: int) -> bool:
        """Whether a forward would wait for a layer of the batch that has not arrived."""
        return batch in self.futures and batch not in self._abandoned

    def abandon(self, batch: int) -> None:
        """Let nobody wait for the batch any more; ignore a batch that is forgotten already."""
        if batch in self.futures:
            self._abandoned.add(batch)

    def abandoned(self, batch: int) -> bool:
        """Whether nobody waits for the batch any more."""
        return batch in self._abandoned

    def landed(self, batch: int) -> bool:
        """Whether all layers of a batch have arrived or failed."""
        return all(layer.done() for layer in self.futures.get(batch, ()))

    def layers_landed(self, batch: int) -> int:
        """How many layers of a batch have arrived or failed."""
        return sum(layer.done() for layer in self.futures.get(batch, ()))

    def finish(self, batch: int) -> bool:
        """Wait for the batch, forget it, and return whether all of its layers arrived and nobody abandoned it. An
        unknown batch counts as complete. An abandoned one is forgotten by `tidy`, once it has `landed`."""
        complete = all([self._arrived(batch, layer) for layer in self.futures.get(batch, ())])
        if batch in self._abandoned:
            self._finished.add(batch)
        else:
            self.futures.pop(batch, None)
        return complete

    @property
    def stuck(self) -> bool:
        """Whether a batch that was abandoned has not landed yet."""
        return not all(self.landed(batch) for batch in tuple(self._abandoned))

    def tidy(self) -> None:
        """Forget the batches that have landed since `finish` reported them abandoned."""
        for batch in [batch for batch in self._finished if self.landed(batch)]:
            self._finished.remove(batch)
            self._abandoned.remove(batch)
            self.futures.pop(batch, None)

    @property
    def kept(self) -> int:
        """How many batches are not forgotten."""
        return len(self.futures)

    def reset(self) -> None:
        """Forget everything and number from 0 again."""
        self.futures.clear()
        self._abandoned.clear()
        self._finished.clear()
        self._next, self._awaited = 0, -1


class LayerGate:
    """Makes a forward wait, before it reads a layer of the model, for that layer's pages in whichever pools it has.

    Has all members of SGLang's `LayerWiseLoadCounter` that SGLang's pools, worker and graph runner call. A layer
    without a pool is never waited for. Waiting for the last of ``num_layers`` waits for all layers of all pools: a
    forward replayed from one graph waits once, for the last.

    Of a pool that is restored by ``choice``, whoever asks for a layer waits for all of it, also where rows of an
    earlier batch are still to come; but within `naming` it does not wait for that pool, if its own batch is read as
    rows are named: such a reader waits for the rows that it reads (`wait_rows`).
    """

    def __init__(self, routes: dict[int, list[tuple[Arrivals, int]]], choice: Any = None):
        self.num_layers = max(routes, default=-1) + 1
        self.consumer_index = -1
        self.waited_s = 0.0
        # By batch that is not over, then by layer.
        self._waits_s: dict[int, dict[int, float]] = {}
        self._routes = routes
        self._all = [place for layer in sorted(routes) for place in routes[layer]]
        self._arrivals = {arrivals for arrivals, _ in self._all}
        # A `ChoiceRestorer`, which leans on this file.
        self._choice = choice
        self._naming = False

    def set_consumer(self, index: int) -> None:
        self.consumer_index = index
        for arrivals in self._arrivals:
            arrivals.set_consumer(index)

    def wait_until(self, threshold: int) -> None:
        route = self._all if threshold == self.num_layers - 1 else self._routes.get(threshold, ())
        if self._choice is not None:
            if self._naming:
                route = self._routes.get(threshold, ())
                if self._choice.chooses(self.consumer_index):
                    route = [place for place in route if place[0] is not self._choice.arrivals]
            elif self._choice.open:
                started = time.perf_counter()
                self._choice.wait_whole(layer for arrivals, layer in route if arrivals is self._choice.arrivals)
                self._waited(threshold, time.perf_counter() - started)
        self._wait(route, threshold)

    def _wait(self, route: _Route, threshold: int) -> None:
        index = self.consumer_index
        if not any(arrivals.awaited(index) for arrivals, _ in route):
            return
        started = time.perf_counter()
        for arrivals, layer in route:
            arrivals.wait_until(layer)
            if arrivals.abandoned(index):
                self.abandon(index)
        self._waited(threshold, time.perf_counter() - started)

    def _waited(self, threshold: int, waited_s: float) -> None:
        self.waited_s += waited_s
        if self.consumer_index >= 0:
            waits_s = self._waits_s.setdefault(self.consumer_index, {})
            waits_s[threshold] = waits_s.get(threshold, 0.0) + waited_s

    @contextmanager
    def naming(self) -> Iterator[None]:
        """Within it, a layer's rows are read that were waited for, or are about to be, by `wait_rows`."""
        before, self._naming = self._naming, True
        try:
            yield
        finally:
            self._naming = before

    def wait_rows(self, layer: int, slots: torch.Tensor) -> None:
        """Return once the rows ``slots`` of a layer, token slots of the device as integers on the host, are there, or
        are known never to come; the request that reads one of these is recomputed."""
        if self._choice is not None and self._choice.open:
            started = time.perf_counter()
            self._choice.require(layer, slots)
            if self._choice.arrivals.abandoned(self.consumer_index):
                self.abandon(self.consumer_index)
            self._waited(layer, time.perf_counter() - started)

    def abandon(self, index: int) -> None:
        """Abandon the batch in every pool: what one has waited for in vain, the others must not wait for."""
        for arrivals in self._arrivals:
            arrivals.abandon(index)

    def waited_for(self, index: int) -> tuple[float, ...]:
        """The seconds that forwards waited for each layer of a batch. Call it once, when the batch is over."""
        return tuple(self._waits_s.pop(index, {}).values())

    @property
    def kept(self) -> int:
        """How many batches' waits are kept for `waited_for`."""
        return len(self._waits_s)

    def reset(self) -> None:
        """Forget the batches that were not over: their numbers are given again."""
        self._waits_s.clear()
