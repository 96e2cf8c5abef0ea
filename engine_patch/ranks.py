"""What the ranks that share out a model's heads agree on. Their trees must change alike, while clocks, messages and
drives differ between them."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch

from engine_patch.sglang_api import get_parallel

_MOST = torch.iinfo(torch.int64).max


class Ranks:
    """For the scheduler's thread. All ranks call a method at the same step, but for the properties. ``least`` makes of
    a tensor the least that any rank has."""

    def __init__(self, least: Callable[[torch.Tensor], None]):
        parallel = get_parallel()
        self._least = least
        self._number = parallel.attn_tp_rank
        self.alone: bool = parallel.attn_tp_size == 1

    @property
    def decides(self) -> bool:
        """Whether this is the first rank, which decides where one has to."""
        return bool(self.alone or self._number == 0)

    def on_all(self, own: Sequence[bool]) -> list[bool]:
        """Which of these is so on every rank."""
        agreed = torch.tensor(own, dtype=torch.int64)
        if not self.alone:
            self._least(agreed)
        return [bool(one) for one in agreed.tolist()]

    def of_first(self, own: Sequence[int], count: int) -> list[int]:
        """What the first rank says, of whose ``own`` numbers there are so many. What others say counts for nothing."""
        if self.alone:
            return list(own)
        agreed = torch.full((count,), _MOST, dtype=torch.int64)
        if self.decides:
            agreed[:] = torch.tensor(own, dtype=torch.int64)
        self._least(agreed)
        numbers: list[int] = agreed.tolist()
        return numbers

    def list_of_first(self, own: Sequence[int]) -> list[int]:
        """The same, where others do not know how many numbers it has."""
        (count,) = self.of_first([len(own)], 1)
        return self.of_first(own, count) if count else []
