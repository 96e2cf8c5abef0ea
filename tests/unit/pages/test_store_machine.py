"""Random histories of the page store. A long run:
``PAGE_STORE_EXAMPLES=3000 pytest tests/unit/pages/test_store_machine.py``."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
from hypothesis import HealthCheck, settings
from hypothesis.stateful import run_state_machine_as_test
from tools import in_memory

from agentstate.pages import PageStore, Quota
from agentstate.pages.testing.machine import GEOMETRY, DamagedStoreMachine, LinkedStoreMachine, PageStoreMachine
from agentstate.pages.testing.pages import MARK
from agentstate.pages.testing.sharing import SharedSpaceMachine

EXAMPLES = int(os.environ.get("PAGE_STORE_EXAMPLES", "40"))


class CodedStoreMachine(PageStoreMachine):
    """Of a few pages an extent is smaller if it is coded, and of many it is not."""

    def open(self, directory: Path, quota: Quota) -> PageStore:
        return PageStore(directory, MARK, GEOMETRY, quota, codec="lossless")


MACHINES = [PageStoreMachine, CodedStoreMachine, LinkedStoreMachine, DamagedStoreMachine, SharedSpaceMachine]


@pytest.mark.timeout(900 + 10 * EXAMPLES)
@pytest.mark.parametrize("machine", MACHINES)
def test_any_history_ends_with_right_pages(
    machine: type[PageStoreMachine] | type[SharedSpaceMachine], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(machine, "parent", in_memory())
    run_state_machine_as_test(
        machine,
        settings=settings(
            max_examples=EXAMPLES,
            stateful_step_count=40,
            deadline=None,
            suppress_health_check=list(HealthCheck),
            # A long run looks for what is new; the others say whether a change broke something.
            derandomize="PAGE_STORE_EXAMPLES" not in os.environ,
        ),
    )
