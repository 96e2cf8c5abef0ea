from __future__ import annotations

import threading

from engine_patch.arrivals import Arrivals


def test_batches_are_numbered_and_land_when_every_layer_has() -> None:
    arrivals = Arrivals(2)
    assert (arrivals.begin(), arrivals.begin()) == (0, 1)
    arrivals.complete(1, 0)
    assert not arrivals.landed(1)
    arrivals.complete(1, 1)
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
    arrivals.begin()
    assert not arrivals.abandoned(batch)
    for layer in range(2):
        arrivals.complete(other, layer)
    assert arrivals.finish(other)


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
