"""Every wait is needed: without it, the tests that are named for it in `waits.NOTICED_BY` fail."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from late.mutation import Mutation
from late.waits import NOTICED_BY, ROOT, all_waits, markdown

WAITS = all_waits()
DOC = ROOT / "docs" / "testing.md"


@pytest.fixture(scope="module")
def mutation() -> Iterator[Mutation]:
    with Mutation() as mutation:
        yield mutation


def test_every_wait_has_tests_that_notice_it() -> None:
    unnoticed, gone = sorted(WAITS.keys() - NOTICED_BY.keys()), sorted(NOTICED_BY.keys() - WAITS.keys())
    assert not unnoticed, (
        f"new waits: {unnoticed}. Write a test in tests/late that fails without each under the policy late, and name "
        "it in NOTICED_BY of tests/late/waits.py. What waits for no device goes into NOT_OF_A_DEVICE there."
    )
    assert not gone, f"waits that are not in the code any more: {gone}. Take them out of NOTICED_BY, or rename them."


def test_the_list_of_the_waits_is_in_the_docs() -> None:
    assert markdown() in DOC.read_text(), f"{DOC} is to have this list of waits:\n{markdown()}"


def test_with_every_wait_in_place_these_tests_pass(mutation: Mutation) -> None:
    tests = sorted({test for tests in NOTICED_BY.values() for test in tests})
    outcome = mutation.run(None, tests, "--late-policies", "late")
    assert outcome.exit_code == 0, outcome.output


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    if "removed" in metafunc.fixturenames:
        waits = [name for name in NOTICED_BY if name in WAITS]
        tests = [NOTICED_BY[name] for name in waits]
        # One is enough; that each of them fails is looked at where there is time.
        if metafunc.config.getoption("--late-thorough"):
            pairs = [(name, one) for name, some in zip(waits, tests, strict=True) for one in some]
        else:
            pairs = [(name, some[0]) for name, some in zip(waits, tests, strict=True)]
        metafunc.parametrize(
            ("removed", "test"), pairs, ids=[f"{name} {test.partition('::')[2]}" for name, test in pairs]
        )


def test_a_wait_that_is_removed_is_missed(mutation: Mutation, removed: str, test: str) -> None:
    outcome = mutation.run(WAITS[removed], [test], "--late-policies", "late", "-x")
    assert outcome.exit_code == 1, f"{test} does not fail without {removed}:\n{outcome.output}"
