"""Random histories of a tier against a dictionary: two engines publish, read, list, drop and crash, and somebody else
changes objects."""

from __future__ import annotations

from typing import ClassVar

from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, rule

from agentstate.errors import TierMissing, TierShort
from agentstate.tiers.interface import Range, Tier
from agentstate.tiers.testing.conformance import PATIENCE_S, Place, content, name_of, names, publish, read

CONTENTS = [content(number, 1 + 700 * number) for number in range(6)]
NAMES = [name_of(data) for data in CONTENTS]
_ONE = st.integers(0, len(CONTENTS) - 1)
_SOME = st.lists(st.tuples(st.integers(0, 4000), st.integers(1, 4000)), min_size=1, max_size=5)


class TierMachine(RuleBasedStateMachine):
    """Override `place`, and `crash` if a publication can be ended after any of its steps."""

    steps: ClassVar[int] = 0
    """After how many steps `crash` can end one at most; 0: it cannot."""

    def place(self) -> Place:
        raise NotImplementedError

    def crash(self, name: str, data: bytes, step: int) -> None:
        """Publish, and die before so many steps, leaving everything as it is."""

    def __init__(self) -> None:
        super().__init__()
        self.where = self.place()
        self.tiers: list[Tier] = [self.where.open(), self.where.open()]
        self.there: dict[str, bytes] = {}

    def teardown(self) -> None:
        for tier in self.tiers:
            tier.close()

    @rule(which=st.integers(0, 1), number=_ONE)
    def publish(self, which: int, number: int) -> None:
        # Small enough for all of it to be compared.
        new = self.there.get(NAMES[number]) != CONTENTS[number]
        assert publish(self.tiers[which], CONTENTS[number]) == (NAMES[number], new)
        self.there[NAMES[number]] = CONTENTS[number]

    @rule(which=st.integers(0, 1), number=_ONE, wanted=_SOME)
    def read(self, which: int, number: int, wanted: list[tuple[int, int]]) -> None:
        memory = [bytearray(n_bytes) for _, n_bytes in wanted]
        ranges = [Range(offset, memoryview(into)) for (offset, _), into in zip(wanted, memory, strict=True)]
        error = self.tiers[which].read(NAMES[number], ranges).exception(PATIENCE_S)
        data = self.there.get(NAMES[number])
        if data is None:
            assert type(error) is TierMissing
        elif max(offset + n_bytes for offset, n_bytes in wanted) > len(data):
            assert type(error) is TierShort
        else:
            assert error is None
            assert [bytes(into) for into in memory] == [data[offset : offset + n_bytes] for offset, n_bytes in wanted]

    @rule(which=st.integers(0, 1), number=_ONE)
    def drop(self, which: int, number: int) -> None:
        self.tiers[which].drop(NAMES[number]).result(PATIENCE_S)
        self.there.pop(NAMES[number], None)

    @rule(number=_ONE, n_bytes=st.integers(0, 5000), of=_ONE)
    def tamper(self, number: int, n_bytes: int, of: int) -> None:
        """Truncate an object, or swap it for another one."""
        if NAMES[number] in self.there:
            self.there[NAMES[number]] = CONTENTS[of][:n_bytes]
            self.where.put(NAMES[number], CONTENTS[of][:n_bytes])

    @rule(number=_ONE, step=st.integers(1, 40))
    def die(self, number: int, step: int) -> None:
        if not self.steps:
            return
        self.crash(NAMES[number], CONTENTS[number], 1 + step % self.steps)
        before = self.there.get(NAMES[number])
        try:
            found = read(self.tiers[0], NAMES[number], 0, len(CONTENTS[number]))
        except TierShort:
            assert before is not None and len(before) < len(CONTENTS[number])
            return
        except TierMissing:
            assert before is None
            return
        assert found == CONTENTS[number] or before is not None and found == before[: len(found)]
        if before is None or found != before[: len(found)]:
            self.there[NAMES[number]] = CONTENTS[number]
        elif len(before) > len(found):
            # The same bytes and more, or it has been replaced.
            page = self.tiers[0].list().result(PATIENCE_S)
            sizes = {entry.name: entry.n_bytes for entry in page.entries}
            self.there[NAMES[number]] = before[: sizes[NAMES[number]]]

    @rule(which=st.integers(0, 1))
    def sweep(self, which: int) -> None:
        self.tiers[which].sweep(0).result(PATIENCE_S)

    @rule(which=st.integers(0, 1))
    def open_again(self, which: int) -> None:
        self.tiers[which].close()
        self.tiers[which] = self.where.open()

    @invariant()
    def lists_what_is_there(self) -> None:
        page = self.tiers[0].list().result(PATIENCE_S)
        assert {entry.name: entry.n_bytes for entry in page.entries} == {
            name: len(data) for name, data in self.there.items()
        }
        assert names(self.tiers[1], limit=2) == sorted(self.there)
