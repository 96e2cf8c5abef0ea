from __future__ import annotations

from contents import keys

from engine_patch.failures import Failures, together


def test_a_request_ends_before_the_first_page_that_failed_it() -> None:
    failures = Failures()
    failures.add({"a": frozenset(keys(3, 5)), "b": frozenset()})
    assert failures.usable("a", keys(1, 2, 3, 4, 5)) == 2
    assert failures.usable("a", keys(4, 5, 6)) == 1
    assert failures.usable("a", keys(6, 7)) == 2
    assert failures.usable("b", keys(1, 2)) == 0
    assert failures.usable("c", keys(1, 2)) == 2


def test_what_waits_no_longer_is_forgotten() -> None:
    failures = Failures()
    failures.tidy(lambda: 1 / 0)  # type: ignore[arg-type, return-value]
    failures.add({"a": frozenset(), "b": frozenset()})
    failures.tidy(lambda: {"a"})
    assert [failures.usable(rid, keys(1)) for rid in ("a", "b")] == [0, 1]
    failures.clear()
    assert failures.usable("a", keys(1)) == 1


def test_what_failed_in_one_pool_for_no_pages_sake_is_restored_from_nothing() -> None:
    x, y = keys("x", "y")
    of_pools = [
        ({"a", "b", "c", "d"}, {"a": frozenset([x]), "b": frozenset([x]), "c": frozenset()}),
        ({"b", "c", "e"}, {"b": frozenset([y]), "c": frozenset([y])}),
        ({"a"}, {"a": frozenset([y])}),
    ]
    nothing = frozenset[bytes]()
    assert together(of_pools) == {
        "a": frozenset([x, y]),
        "b": frozenset([x, y]),
        "c": nothing,
        "d": nothing,
        "e": nothing,
    }
