"""What proves to an engine which turn of which session a request belongs to."""

from __future__ import annotations

from dataclasses import replace

import pytest

from agentstate.fleet import turns
from agentstate.fleet.turns import Turn

KEY = turns.signing_key(b"k" * 32)
TURN = Turn("ses_01k8z3w0a7s5d3f1g9h7j5k3m1", 12, "tenant acme")


@pytest.mark.parametrize(
    "session_id", [TURN.session_id, "an.agent", "é\u4e16 界", "a" * 1024, "."], ids=lambda one: ascii(one)[:40]
)
@pytest.mark.parametrize("account", ["tenant acme", "group équipe/1", ""])
@pytest.mark.parametrize("dp_rank", [None, 0, 300])
def test_a_token_proves_its_turn(session_id: str, account: str, dp_rank: int | None) -> None:
    turn = Turn(session_id, 2**40, account, dp_rank)
    found, token = turns.split(turns.sign(KEY, turn))
    assert found == session_id
    assert token is not None
    assert turns.verify(KEY, found, token) == turn
    assert turns.named_dp_rank(token) == dp_rank


def test_a_token_without_a_dp_rank_is_one_of_earlier_releases() -> None:
    sent = "ses_1.AQAAAAAAAAAMZ3rhld24joAzkw39yNflx3RlbmFudCBhY21l"
    assert turns.sign(KEY, Turn("ses_1", 12, "tenant acme")) == sent


def test_a_token_says_nothing_of_another_turn() -> None:
    _, token = turns.split(turns.sign(KEY, TURN))
    assert token is not None
    assert turns.verify(KEY, TURN.session_id, token) == TURN
    assert turns.verify(KEY, TURN.session_id + "x", token) is None
    assert turns.verify(turns.signing_key(b"o" * 32), TURN.session_id, token) is None


@pytest.mark.parametrize("dp_rank", [None, 1])
def test_no_part_of_a_token_can_be_changed(dp_rank: int | None) -> None:
    _, token = turns.split(turns.sign(KEY, replace(TURN, dp_rank=dp_rank)))
    assert token is not None
    alphabet = "ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789-_"
    for at, digit in enumerate(token):
        for other in alphabet:
            changed = token[:at] + other + token[at + 1 :]
            # The last digit has bits that mean nothing.
            if other != digit and at < len(token) - 1:
                assert turns.verify(KEY, TURN.session_id, changed) is None
    assert turns.verify(KEY, TURN.session_id, token[:-4]) is None
    assert turns.verify(KEY, TURN.session_id, token + "AAAA") is None


@pytest.mark.parametrize(
    "sent",
    [
        "ses_1",
        "an.agent",
        "a.",
        ".AQ",
        "",
        "ses_1.not a token",
        "ses_1.AQAAAAAAAAAB",
        "é.ü",
        "a." + "!" * 60,
        "\ud800.x",
    ],
    ids=ascii,
)
def test_what_has_no_token_is_an_id(sent: str) -> None:
    assert turns.split(sent) == (sent, None)


@pytest.mark.parametrize("token", ["", "x", "AQAAAAAAAAAB", "A" * 80, "é" * 40, "\ud800"], ids=ascii)
def test_what_is_not_a_token_proves_nothing(token: str) -> None:
    assert turns.verify(KEY, TURN.session_id, token) is None
