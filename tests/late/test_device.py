"""The late device itself: what it promises to the tests that rely on it."""

from __future__ import annotations

import gc

import pytest
import torch

from late.device import LateDevice, illegal_access
from late.memory import POISON, DeviceTensor
from late.streams import Policy

SEEDS = range(20)


def pinned(*values: int) -> torch.Tensor:
    return torch.tensor(values, dtype=torch.uint8).pin_memory()


def race(policy: str, *, ordered: bool) -> int:
    """One stream writes 7 to memory that is 0, another one copies it out: what is seen."""
    with LateDevice(Policy.parse(policy)).installed() as device:
        memory = torch.zeros(1, dtype=torch.uint8, device="cuda")
        device.synchronize()
        writing, reading = torch.cuda.Stream(), torch.cuda.Stream()
        seen = pinned(1)
        with torch.cuda.stream(writing):
            memory.fill_(7)
        if ordered:
            reading.wait_stream(writing)
        with torch.cuda.stream(reading):
            seen.copy_(memory, non_blocking=True)
        reading.synchronize()
        return int(seen)


def test_what_is_not_waited_for_is_seen_too_early() -> None:
    assert race("late", ordered=False) == 0
    assert race("eager", ordered=False) == 7
    assert {race(f"random:{seed}", ordered=False) for seed in SEEDS} == {0, 7}


@pytest.mark.parametrize("policy", ["late", "eager", *(f"random:{seed}" for seed in SEEDS)])
def test_what_is_waited_for_is_seen(policy: str) -> None:
    assert race(policy, ordered=True) == 7


def test_an_unknown_policy_is_refused() -> None:
    with pytest.raises(ValueError, match="'later'"):
        Policy.parse("later")
    assert [str(Policy.parse(text)) for text in ("late", "random:3", "random")] == ["late", "random:3", "random:0"]


def test_work_is_done_in_its_streams_order_and_no_further_than_needed() -> None:
    with LateDevice(Policy("late")).installed():
        first, second = torch.cuda.Event(), torch.cuda.Event()
        memory, seen = torch.zeros(1, dtype=torch.uint8, device="cuda"), [pinned(0), pinned(0)]
        for value, event in ((1, first), (2, second)):
            memory.fill_(value)
            seen[value - 1].copy_(memory, non_blocking=True)
            event.record()
        first.synchronize()
        assert (first.query(), second.query(), [int(one) for one in seen]) == (True, False, [1, 0])
        second.synchronize()
        assert [int(one) for one in seen] == [1, 2]


def test_a_stream_waits_for_what_an_event_was_recorded_after_and_not_for_what_comes_later() -> None:
    with LateDevice(Policy("late")).installed():
        a, b = torch.cuda.Stream(), torch.cuda.Stream()
        memory, seen = torch.zeros(2, dtype=torch.uint8, device="cuda"), pinned(9, 9)
        torch.cuda.synchronize()
        with torch.cuda.stream(a):
            memory[:1].fill_(1)
            event = torch.cuda.Event()
            event.record()
            memory[1:].fill_(1)
        b.wait_event(event)
        with torch.cuda.stream(b):
            seen.copy_(memory, non_blocking=True)
        b.synchronize()
        assert seen.tolist() == [1, 0]


def test_freed_memory_is_overwritten_by_its_stream() -> None:
    with LateDevice(Policy("late")).installed():
        kept, freed = (torch.full((4,), 5, dtype=torch.uint8, device="cuda") for _ in range(2))
        there = freed.host
        view = freed[1:]
        del freed
        gc.collect()
        torch.cuda.synchronize()
        # A view keeps it.
        assert there.tolist() == [5] * 4
        other = torch.cuda.Stream()
        seen = pinned(0, 0, 0)
        with torch.cuda.stream(other):
            seen.copy_(view, non_blocking=True)
        del view
        gc.collect()
        torch.cuda.synchronize()
        # The other stream was not told of, so that its copy came after.
        assert (there.tolist(), seen.tolist()) == ([POISON] * 4, [POISON] * 3)
        assert kept.tolist() == [5] * 4


def test_memory_that_is_not_pinned_is_copied_before_the_call_returns() -> None:
    with LateDevice(Policy("late")).installed() as device:
        memory = torch.zeros(2, dtype=torch.uint8, device="cuda")
        pageable, page_locked = torch.tensor([1], dtype=torch.uint8), pinned(1)
        memory[:1].copy_(pageable, non_blocking=True)
        memory[1:].copy_(page_locked, non_blocking=True)
        pageable.fill_(2)
        page_locked.fill_(2)
        assert memory.tolist() == [1, 2]
        assert device.pageable_copies == 2


@pytest.mark.parametrize("sticky", [False, True])
def test_an_error_is_raised_once_or_for_ever(sticky: bool) -> None:
    with LateDevice(Policy("late")).installed() as device:
        memory = torch.zeros(2, dtype=torch.uint8, device="cuda")
        device.fail("fill_", after=1, error=illegal_access, sticky=sticky)
        memory.fill_(1)
        with pytest.raises(torch.AcceleratorError, match="illegal memory access"):
            memory.fill_(2)
        if sticky:
            for ask in (torch.cuda.Stream, torch.cuda.synchronize, torch.cuda.Event().record, memory.cpu, memory.clone):
                with pytest.raises(torch.AcceleratorError):
                    ask()
        else:
            assert memory.tolist() == [1, 1]
        assert device.faults == 1


def test_what_cannot_be_done_to_device_tensors_is_refused() -> None:
    with LateDevice(Policy("late")).installed():
        memory = torch.zeros(4, dtype=torch.uint8, device="cuda")
        assert isinstance(memory, DeviceTensor) and memory.is_cuda and memory.device == torch.device("cuda", 0)
        with pytest.raises(TypeError, match="cuda:0 device type tensor to numpy"):
            memory.numpy()
        with pytest.raises(RuntimeError, match="same device"):
            memory.index_copy_(0, torch.tensor([1]), torch.zeros(1, dtype=torch.uint8))
        with pytest.raises(NotImplementedError, match="no aten.sort"):
            memory.sort()


@pytest.mark.parametrize("kind", ["cuda", "xpu"])
def test_nothing_of_it_is_left_in_torch(kind: str) -> None:
    def of_torch() -> dict[str, object]:
        places = {"torch": torch, "Tensor": torch.Tensor, kind: getattr(torch, kind)}
        return {f"{place}.{name}": value for place, owner in places.items() for name, value in vars(owner).items()}

    before = of_torch()
    with pytest.raises(RuntimeError, match="of this test"), LateDevice(Policy("late"), kind).installed():
        assert of_torch() != before
        left = torch.zeros(2, dtype=torch.uint8, device=kind)
        raise RuntimeError("of this test")
    after = of_torch()
    assert after.keys() == before.keys()
    assert [name for name, value in after.items() if value is not before[name]] == []
    # A thread of the product may still have one.
    assert left.clone().tolist() == [0, 0]
