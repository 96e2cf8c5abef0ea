"""Whose the pages are that requests of a real engine leave on the drive, and which of them are stored."""

from __future__ import annotations

from contextlib import closing
from pathlib import Path

from prompts import PAGE, TINY, Generator, prompt
from stacks import MakeStack, stat_at_rest

from agentstate.pages import inventory

PAGES = 9
TEXT = PAGES * PAGE + 9


def test_pages_are_charged_to_the_account_of_a_turn_and_one_shots_wait_for_a_second_request(
    tmp_path: Path, make_stack: MakeStack, checkpoints: Path
) -> None:
    with closing(make_stack(tmp_path / "stack", checkpoints / "llama")) as stack:
        stack.environment = {**stack.environment, "AGENTSTATE_ONE_SHOTS": "off"}
        stack.start_service()
        stack.start_engine(*TINY, "--page-size", str(PAGE))
        generate, turn = Generator(stack.engine_url), stack.begin_turn()
        before = stat_at_rest(stack)
        generate(prompt(1, TEXT), session_id=turn.engine_session)
        of_session = stat_at_rest(stack)
        assert list(of_session["owners"]) == ["tenant default"]
        assert of_session["store"]["pages"] == PAGES
        generate(prompt(2, TEXT))
        of_nobody = stat_at_rest(stack)
        assert of_nobody["store"]["pages"] == PAGES
        assert of_nobody["spill"]["pages_one_shot"] - before["spill"]["pages_one_shot"] == PAGES
        generate(prompt(2, TEXT))
        again = stat_at_rest(stack)
        assert again["store"]["pages"] == 2 * PAGES
        assert again["spill"]["pages_one_shot"] == of_nobody["spill"]["pages_one_shot"]
        assert set(again["owners"]) == {"tenant default", "none"}
        assert sum(again["owners"].values()) == again["store"]["bytes"]
        assert again["wear"]["bytes_day"] >= again["store"]["bytes"]
        # On the drive they are apart.
        (store,) = inventory.store_directories(stack.home / "pages")
        headers = [report.header for report in inventory.extents(store)]
        assert {header.owner for header in headers if header is not None} == {"tenant default", ""}
