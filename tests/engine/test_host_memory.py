from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

from agentstate.errors import SettingsError
from engine_patch import host_memory
from engine_patch.host_memory import HostMemory, bound, machine_memory

CPU = torch.device("cpu")
PAGE = 4096


@pytest.fixture
def memory(monkeypatch: pytest.MonkeyPatch) -> HostMemory:
    """Ten pages of memory, taken from the machine four at a time."""
    monkeypatch.setattr(host_memory, "_BLOCK_BYTES", 4 * PAGE)
    return HostMemory(10 * PAGE, CPU)


def test_memory_is_taken_when_it_is_needed_and_no_more_than_the_bound(memory: HostMemory) -> None:
    assert (memory.held, memory.used) == (0, 0)
    first = memory.take(PAGE)
    assert first is not None and (memory.held, memory.used) == (4 * PAGE, PAGE)
    pieces = [memory.take(PAGE) for _ in range(9)]
    assert all(pieces) and (memory.held, memory.used) == (10 * PAGE, 10 * PAGE)
    assert memory.take(1) is None
    addresses = {piece.memory.ctypes.data for piece in [first, *pieces] if piece is not None}
    assert len(addresses) == 10 and not any(address % PAGE for address in addresses)


def test_pieces_have_no_byte_in_common(memory: HostMemory) -> None:
    generator = np.random.default_rng(3)
    held: dict[int, tuple[object, int]] = {}
    for number in range(300):
        if held and generator.random() < 0.5:
            piece, value = held.pop(int(generator.choice(list(held))))
            assert (piece.memory == value).all()  # type: ignore[attr-defined]
            memory.give(piece)  # type: ignore[arg-type]
        elif (taken := memory.take(int(generator.integers(1, 3 * PAGE)))) is not None:
            taken.memory[:] = number % 251
            held[number] = taken, number % 251
    for piece, value in held.values():
        assert (piece.memory == value).all()  # type: ignore[attr-defined]
        memory.give(piece)  # type: ignore[arg-type]
    assert memory.used == 0
    assert memory.take(4 * PAGE) is not None, "what was given back is in one piece again"


def test_a_piece_that_is_larger_than_a_block_gets_one_of_its_own(memory: HostMemory) -> None:
    piece = memory.take(6 * PAGE)
    assert piece is not None and len(piece.memory) == 6 * PAGE
    assert memory.take(5 * PAGE) is None
    assert memory.take(4 * PAGE) is not None
    memory.give(piece)
    assert memory.take(6 * PAGE) is not None


def test_when_the_machine_gives_no_more_it_stays_as_it_is(
    memory: HostMemory, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    assert memory.take(PAGE) is not None

    def refuses(n_bytes: int) -> np.ndarray:
        raise MemoryError("of this test")

    monkeypatch.setattr(host_memory, "staging_memory", refuses)
    assert memory.take(4 * PAGE) is None and memory.take(4 * PAGE) is None
    assert memory.n_bytes == memory.held == 4 * PAGE
    assert memory.take(3 * PAGE) is not None
    assert len(caplog.records) == 1


def test_it_is_off_on_a_cpu_unless_it_is_asked_for() -> None:
    assert bound(None, CPU, 1) == 0
    assert bound(0, torch.device("cuda"), 1) == 0
    assert bound(1 << 20, CPU, 1) == 1 << 20
    assert bound(None, torch.device("cuda"), 2, 64 << 30) == 4 << 30


def test_more_than_the_machine_has_is_refused() -> None:
    assert bound(32 << 30, CPU, 2, 64 << 30) == 32 << 30
    with pytest.raises(SettingsError, match="AGENTSTATE_HOST_BYTES=34359738369, for each of 2 rank.s. on this machine"):
        bound((32 << 30) + 1, CPU, 2, 64 << 30)


def test_a_control_group_may_allow_less_than_the_machine_has(tmp_path: Path) -> None:
    meminfo, group, unlimited = tmp_path / "meminfo", tmp_path / "memory.max", tmp_path / "no limit"
    meminfo.write_text("MemTotal:        1000 kB\nMemFree:         10 kB\n")
    unlimited.write_text("max\n")
    assert machine_memory([unlimited, tmp_path / "none"], meminfo) == 1_024_000
    group.write_text("4096\n")
    assert machine_memory([unlimited, group], meminfo) == 4096
