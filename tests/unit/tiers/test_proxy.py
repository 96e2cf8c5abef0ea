"""A tier behind a proxy meets the faults that it is told, and the store as it is before and after."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

import places
import pytest

from agentstate.errors import TierShort, TierUnavailable
from agentstate.tiers import Tier
from agentstate.tiers.testing.conformance import content, name_of, names, publish, read
from agentstate.tiers.testing.proxy import Fault, Proxy, proxy
from agentstate.tiers.testing.seaweedfs import Server

DATA = content(1) * 8
NAME = name_of(DATA)
LARGE, SMALL = (1000, 300_000), (1000, 5000)


@pytest.fixture
def before(s3: Server) -> Iterator[Proxy]:
    with proxy(s3.endpoint) as before:
        yield before


@pytest.fixture
def tier(s3: Server, before: Proxy) -> Iterator[Tier]:
    with places.on(replace(s3, endpoint=before.endpoint)).open() as tier:
        assert publish(tier, DATA) == (NAME, True)
        yield tier
        before.set(Fault.NONE)
        assert (read(tier, NAME, *LARGE), names(tier)) == (DATA[1000:301_000], [NAME])


@pytest.mark.parametrize("fault", [Fault.REFUSED, Fault.UNAVAILABLE])
def test_a_store_that_cannot_be_had_is_unavailable(before: Proxy, tier: Tier, fault: Fault) -> None:
    before.set(fault)
    for ask in (lambda: read(tier, NAME, *SMALL), lambda: names(tier), lambda: publish(tier, content(2))):
        with pytest.raises(TierUnavailable):
            ask()


def test_wrong_bytes_are_in_all_that_is_long(before: Proxy, tier: Tier) -> None:
    before.set(Fault.WRONG)
    assert read(tier, NAME, *SMALL) == DATA[1000:6000]
    found = read(tier, NAME, *LARGE)
    differ = [at for at, (one, other) in enumerate(zip(found, DATA[1000:], strict=False)) if one != other]
    assert len(found) == 300_000 and len(differ) == 5
    assert publish(tier, DATA)[1] is False


def test_half_of_an_object_is_too_short(before: Proxy, tier: Tier) -> None:
    before.set(Fault.SHORT)
    half = len(DATA) // 2
    assert read(tier, NAME, half - 5000, 5000) == DATA[half - 5000 : half]
    for start, length in ((half - 10, 20), (half + 10, 20)):
        with pytest.raises(TierShort):
            read(tier, NAME, start, length)
