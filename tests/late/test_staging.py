"""Staging that is pinned, staging on the device, and when its memory may be used again."""

from __future__ import annotations

import mmap

import numpy as np
import pytest
import torch
from contents import keys

from agentstate.errors import SettingsError
from engine_patch.staging import HostCopies, PinnedMemory
from engine_patch.transfer import CopyLane
from late.device import LateDevice
from late.rank import Forward, Rank


def test_what_is_verified_is_what_the_device_has(device: LateDevice) -> None:
    """KvikIO's way: pages are in device memory, and copied back to be looked at."""
    copies = HostCopies(device.torch_device)
    for seed in range(3):  # into the same memory
        arrays = [torch.full((pages, 32), seed * 10 + pages, dtype=torch.uint8) for pages in (1, 4, 2)]
        # It has been there since a read that has returned.
        staging = [array.to(device.torch_device) for array in arrays]
        assert [copy.tolist() for copy in copies.of(staging)] == [array.tolist() for array in arrays]


def test_a_chunk_in_device_memory_is_put_in_its_slots(device: LateDevice, rank: Rank) -> None:
    sizes = rank.pages.geometry.component_bytes
    arrays = [torch.arange(2 * n, dtype=torch.int64).to(torch.uint8).reshape(2, n) for n in sizes]
    staging = [array.to(device.torch_device) for array in arrays]
    rank.pages.scatter(1, torch.tensor([9, 4]), staging)
    fence = rank.pages.inbound.fence()
    assert fence is not None
    fence()
    # Read into again: what was copied stays.
    for array in staging:
        array.fill_(0)
    for i, number in enumerate((9, 4)):
        assert rank.on_device(number)[1] == [array[i].numpy().tobytes() for array in arrays]


def test_the_memory_of_a_stream_that_is_closed_is_kept_until_its_copies_are_over(rank: Rank) -> None:
    for name in range(4):
        rank.write(name)
    reader = rank.reader()
    pinned = PinnedMemory(reader.staging, rank.pages.device)
    stream = reader.open(rank.store.pin(keys(0)))
    stream.hurry()
    chunk = next(stream.layer(0))
    rank.pages.scatter(0, torch.tensor([5]), chunk.parts[0].arrays)
    chunk.keep_until = rank.pages.inbound.fence()
    stream.close()
    # As many as there are buffers, and one more.
    with reader.open(rank.store.pin(keys(1, 2, 3))) as other:
        for _ in other:
            pass
    assert rank.on_device(5)[0] == rank.expected(0)[0]
    reader.close()
    pinned.close()


def test_a_lane_of_a_cpu_waits_itself(device: LateDevice) -> None:
    seen = torch.zeros(4, dtype=torch.uint8).pin_memory()
    written = torch.full((4,), 7, dtype=torch.uint8, device=device.torch_device)
    seen.copy_(written, non_blocking=True)
    event = torch.cuda.Event()
    event.record()
    lane = CopyLane(torch.device("cpu"))
    lane.after([event])
    assert seen.tolist() == [7] * 4
    assert lane.fence() is None


@pytest.mark.parametrize("kind", ["xpu"])
def test_another_accelerator_copies_by_the_same_code(rank: Rank, forward: Forward, kind: str) -> None:
    """It has streams and events of its own, and no call that registers memory: its copies wait, and are right."""
    other = LateDevice(rank.device.policy, kind)
    with other.installed():
        there = Rank(other, rank.store.directory / "other")
        pages = {9: 0, 4: 1}
        there.write(0, 1)
        restorer = there.restorer()
        before = Forward(there).write(dict.fromkeys(pages, "of another request"))
        restorer.queue("a", keys(*pages.values()), torch.tensor(list(pages)))
        assert restorer.finish(restorer.start([before])).failed == set()
        assert all(there.on_device(number) == there.expected(name) for number, name in pages.items())
        restorer.close()
        there.close()


def test_memory_that_cannot_be_pinned_is_said_to_be_too_much(device: LateDevice) -> None:
    device.fail("pin")
    with pytest.raises(SettingsError, match="4,096 bytes of staging cannot be pinned.*AGENTSTATE_STAGING_BYTES"):
        PinnedMemory(mmap.mmap(-1, 4096), device.torch_device)


def test_memory_is_pinned_until_it_is_closed(device: LateDevice) -> None:
    buffer = mmap.mmap(-1, 4096)
    memory = torch.from_numpy(np.frombuffer(buffer, dtype=np.uint8))
    pinned = PinnedMemory(buffer, device.torch_device)
    assert memory.is_pinned()
    pinned.close()
    assert not memory.is_pinned()
