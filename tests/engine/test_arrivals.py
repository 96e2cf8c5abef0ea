from __future__ import annotations

import re
import threading
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import sglang
from sglang.srt.mem_cache.unified_cache.unified_cache_linker import LayerWiseLoadCounter

from engine_patch.arrivals import Arrivals, LayerGate


def test_batches_are_numbered_and_land_when_every_layer_has() -> None:
    arrivals = Arrivals(2)
    assert (arrivals.begin(), arrivals.begin()) == (0, 1)
    arrivals.complete(1, 0)
    assert not arrivals.landed(1)
    assert (arrivals.layers_landed(1), arrivals.layers_landed(0)) == (1, 0)
    arrivals.complete(1, 1)
    assert arrivals.layers_landed(1) == 2
    assert (arrivals.landed(1), arrivals.landed(0)) == (True, False)
    assert arrivals.finish(1)
    arrivals.complete(0, 0)
    arrivals.complete(0, 1)
    assert arrivals.finish(0)


def test_a_failed_batch_releases_who_waits_and_tells_afterwards() -> None:
    arrivals = Arrivals(3)
    batch = arrivals.begin()
    arrivals.set_consumer(batch)
    arrivals.complete(batch, 0)
    arrivals.fail(batch, OSError("from the test"))
    for layer in range(3):
        arrivals.wait_until(layer)
    assert not arrivals.finish(batch)
    assert arrivals.finish(batch)
    arrivals.fail(batch, OSError("again, when it is over"))


def test_a_forward_waits_for_its_own_batch_only() -> None:
    arrivals = Arrivals(1)
    late, done = arrivals.begin(), arrivals.begin()
    arrivals.complete(done, 0)
    arrivals.set_consumer(done)
    arrivals.wait_until(0)
    arrivals.set_consumer(-1)
    arrivals.wait_until(0)
    arrivals.set_consumer(late)
    passed = threading.Event()
    thread = threading.Thread(target=lambda: (arrivals.wait_until(0), passed.set()))
    thread.start()
    assert not passed.wait(0.05)
    arrivals.complete(late, 0)
    thread.join(60)
    assert passed.is_set()


def test_after_a_reset_nothing_is_known() -> None:
    arrivals = Arrivals(1)
    arrivals.set_consumer(arrivals.begin())
    arrivals.reset()
    arrivals.wait_until(0)
    assert arrivals.begin() == 0


def test_a_batch_that_does_not_arrive_in_time_is_given_up() -> None:
    arrivals = Arrivals(2, timeout_s=0.01)
    batch, other = arrivals.begin(), arrivals.begin()
    arrivals.set_consumer(batch)
    arrivals.complete(batch, 0)
    for layer in range(2):
        arrivals.wait_until(layer)
    assert arrivals.abandoned(batch)
    # It arrives after all, when a forward has run without it.
    assert (arrivals.stuck, arrivals.finish(batch), arrivals.landed(batch)) == (True, False, False)
    arrivals.complete(batch, 1)
    assert arrivals.landed(batch)
    assert not arrivals.stuck
    assert arrivals.kept == 2
    arrivals.tidy()
    assert (arrivals.abandoned(batch), arrivals.kept) == (False, 1)
    for layer in range(2):
        arrivals.complete(other, layer)
    assert arrivals.finish(other)


def test_a_batch_that_was_given_up_is_not_complete_however_late_it_is_finished() -> None:
    arrivals = Arrivals(1)
    batch = arrivals.begin()
    arrivals.abandon(batch)
    arrivals.fail(batch, OSError())
    arrivals.tidy()
    arrivals.begin()
    assert not arrivals.finish(batch)
    arrivals.tidy()
    assert arrivals.kept == 1


def test_what_is_forgotten_cannot_be_given_up() -> None:
    arrivals = Arrivals(1)
    batch = arrivals.begin()
    arrivals.complete(batch, 0)
    assert arrivals.finish(batch)
    arrivals.abandon(batch)
    assert (arrivals.abandoned(batch), arrivals.kept) == (False, 0)


def test_a_batch_can_be_given_up_before_its_time() -> None:
    arrivals = Arrivals(1)
    batch = arrivals.begin()
    arrivals.set_consumer(batch)
    arrivals.abandon(batch)
    arrivals.wait_until(0)
    assert arrivals.stuck
    assert not arrivals.finish(batch)
    arrivals.complete(batch, 0)
    assert not arrivals.stuck


def test_one_that_arrives_between_its_forward_and_its_end_has_not_arrived_in_time() -> None:
    arrivals = Arrivals(1, timeout_s=0.01)
    batch = arrivals.begin()
    arrivals.set_consumer(batch)
    arrivals.wait_until(0)
    arrivals.complete(batch, 0)
    assert not arrivals.finish(batch)
    assert not arrivals.stuck


class Recorded(Arrivals):
    def __init__(self, layers: int):
        super().__init__(layers)
        self.waits: list[int] = []

    def wait_until(self, layer: int) -> None:
        self.waits.append(layer)
        super().wait_until(layer)


@pytest.fixture
def hybrid() -> tuple[LayerGate, Recorded, Recorded]:
    """A model of five layers: 0, 2 and 4 are one pool's, 1 and 4 another's, 3 is nobody's; all have arrived."""
    one, other = Recorded(3), Recorded(2)
    gate = LayerGate({0: [(one, 0)], 1: [(other, 0)], 2: [(one, 1)], 4: [(one, 2), (other, 1)]})
    for arrivals in (one, other):
        batch = arrivals.begin()
        for layer in range(3 if arrivals is one else 2):
            arrivals.complete(batch, layer)
    gate.set_consumer(0)
    return gate, one, other


def test_a_forward_waits_for_each_layer_where_it_lies(hybrid: tuple[LayerGate, Recorded, Recorded]) -> None:
    gate, one, other = hybrid
    assert gate.num_layers == 5
    for layer in range(4):
        gate.wait_until(layer)
    assert (one.waits, other.waits) == ([0, 1], [0])


def test_a_forward_of_one_graph_waits_once_for_all_layers_of_all_pools(
    hybrid: tuple[LayerGate, Recorded, Recorded],
) -> None:
    from sglang.srt.model_executor.runner.prefill_cuda_graph_runner import PrefillCudaGraphRunner

    gate, one, other = hybrid
    pool = SimpleNamespace(layer_transfer_counter=gate)
    runner: Any = SimpleNamespace(_is_full_backend=True, model_runner=SimpleNamespace(token_to_kv_pool=pool))
    PrefillCudaGraphRunner._wait_for_layer_loads(runner)
    assert (sorted(one.waits), sorted(other.waits)) == ([0, 1, 2], [0, 1])
    gate.set_consumer(-1)
    PrefillCudaGraphRunner._wait_for_layer_loads(runner)
    assert len(one.waits) == 3


def public(thing: Any) -> set[str]:
    return {name for name in dir(thing) if not name.startswith("_")}


def test_the_gate_has_all_of_the_stock_counter_that_is_not_the_loader_s() -> None:
    loaders = {"producer_index", "on_layer_ready", "futures", "update_producer", "complete", "fail", "finish"}
    assert public(LayerWiseLoadCounter(1)) - loaders <= public(LayerGate({}))


def test_the_gate_has_what_sglang_reads_of_a_counter() -> None:
    read: set[str] = set()
    for path in (Path(sglang.__file__).parent / "srt").rglob("*.py"):
        text = path.read_text()
        # The storage backends have counters of their own.
        if "layer_transfer_counter" in text and "storage" not in path.parts:
            read |= set(re.findall(r"(?:layer_transfer_counter|\bcounter)\.([a-z]\w*)", text))
    # HiCache's counter, with speculation or PD disaggregation, both of which are refused.
    assert {"consumer_index", "num_layers", "set_consumer", "wait_until"} <= read
    assert read - {"events", "producer_index"} <= public(LayerGate({}))
