"""Random histories of the page store. A long run:
``PAGE_STORE_EXAMPLES=3000 pytest tests/unit/pages/test_store_machine.py``."""

from __future__ import annotations

import os

import pytest
from hypothesis import HealthCheck, settings
from hypothesis.stateful import run_state_machine_as_test
from tools import in_memory

from agentstate.pages.testing.machine import DamagedStoreMachine, LinkedStoreMachine, PageStoreMachine
from agentstate.pages.testing.sharing import SharedSpaceMachine

EXAMPLES = int(os.environ.get("PAGE_STORE_EXAMPLES", "40"))


@pytest.mark.timeout(900 + 10 * EXAMPLES)
@pytest.mark.parametrize("machine", [PageStoreMachine, LinkedStoreMachine, DamagedStoreMachine, SharedSpaceMachine])
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
