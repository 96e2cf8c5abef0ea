"""Every wait is needed: without it, the tests that are named for it in `waits.NOTICED_BY` fail."""

from __future__ import annotations

import ast
from collections.abc import Iterator

import pytest

from late.mutation import Mutation
from late.waits import NOTICED_BY, ROOT, Wait, all_waits, markdown, parse, waits_in, without

WAITS = all_waits()
DOC = ROOT / "docs" / "testing.md"


@pytest.fixture(scope="module")
def mutation() -> Iterator[Mutation]:
    with Mutation() as mutation:
        yield mutation


SOURCE = """
def found(self, chunk, free_after, event, stream, other):
    self.pages.inbound.after([event])
    closing.callback(self.pages.inbound.finish)
    free_after()
    until = chunk.keep_until
    chunk.keep_until = self.lane.fence()
    torch.cuda.synchronize()
    stream.wait_event(event), stream.wait_stream(other), event.record()
    self.lane.finish(), self.lane.finish()

def passed_over(self, chunk):
    self._writer.after(print)
    self.arrivals.finish(1)
    chunk.keep_until = None
"""


def test_waits_are_found_called_or_passed_on() -> None:
    found = [wait.name.removeprefix("engine_patch/of_this_test.py found: ") for wait, _ in waits_in_source()]
    assert found == [
        "self.pages.inbound.after",
        "self.pages.inbound.finish",
        "free_after",
        "chunk.keep_until",
        "self.lane.fence",
        "torch.cuda.synchronize",
        "stream.wait_event",
        "stream.wait_stream",
        "event.record",
        "self.lane.finish",
        "self.lane.finish (2)",
    ]


def waits_in_source() -> list[tuple[Wait, ast.expr]]:
    return list(waits_in(ast.parse(SOURCE), "engine_patch/of_this_test.py"))


@pytest.mark.parametrize("name", WAITS)
def test_one_wait_is_taken_out_and_no_other(name: str) -> None:
    wait = WAITS[name]
    left = [code(found) for found, _ in waits_in(without(wait), wait.path)]
    assert sorted([*left, code(wait)]) == sorted(code(found) for found, _ in waits_in(parse(wait.path), wait.path))


def code(wait: Wait) -> tuple[str, str]:
    return wait.function, wait.code


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
