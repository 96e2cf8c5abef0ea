"""Which layers of which batch have arrived on the device."""

from __future__ import annotations

from concurrent.futures import Future


class Arrivals:
    """Batches of ``layers`` layers, numbered from 0 on. One thread begins and finishes them, another one completes
    their layers, and a forward waits for them.

    A layer that failed does not raise into the forward that waits for it, which must not run into an error on one
    rank alone: `finish` tells afterwards.
    """

    def __init__(self, layers: int):
        self.futures: dict[int, list[Future[None]]] = {}
        self._layers = layers
        self._next = 0
        self._awaited = -1

    def begin(self) -> int:
        """The number of a new batch."""
        number, self._next = self._next, self._next + 1
        self.futures[number] = [Future() for _ in range(self._layers)]
        return number

    def complete(self, batch: int, layer: int) -> None:
        self.futures[batch][layer].set_result(None)

    def fail(self, batch: int, error: BaseException) -> None:
        """No layer of the batch that has not arrived is going to."""
        for layer in self.futures.get(batch, ()):
            if not layer.done():
                layer.set_exception(error)

    def set_consumer(self, batch: int) -> None:
        """The batch that `wait_until` is about from now on; -1 for none."""
        self._awaited = batch

    def wait_until(self, layer: int) -> None:
        """Return once a layer has arrived or failed."""
        if (layers := self.futures.get(self._awaited)) is not None:
            layers[layer].exception()

    def landed(self, batch: int) -> bool:
        """Whether `finish` would not wait."""
        return all(layer.done() for layer in self.futures.get(batch, ()))

    def finish(self, batch: int) -> bool:
        """Wait for the batch and forget it: whether all of its layers arrived. A batch that is not known has."""
        complete = all([layer.exception() is None for layer in self.futures.get(batch, ())])
        self.futures.pop(batch, None)
        return complete

    def reset(self) -> None:
        """Forget everything and number from 0 again."""
        self.futures.clear()
        self._next, self._awaited = 0, -1
