from __future__ import annotations

import json
from typing import Any

import pytest

from agentstate.api.gateway.harnesses import RESERVED, Identity, identify, sanitize, strip_volatile

UUID = "0f3c9a52-7a8e-4b0e-9d0e-5b1f6f0c2a11"


def who(headers: dict[str, str] | None = None, **body: Any) -> Identity:
    return identify({name.encode(): value.encode() for name, value in (headers or {}).items()}, body)


CLAUDE = {"x-claude-code-session-id": "s1"}
CODEX = {"session-id": "s1", "thread-id": "t1", "x-client-request-id": "t1"}
SUBAGENT = {**CLAUDE, "x-claude-code-agent-id": "a2", "x-claude-code-parent-agent-id": "a1"}


@pytest.mark.parametrize(
    ("headers", "body", "harness", "parent"),
    [
        (CLAUDE, {}, "claude-code:s1", None),
        ({**CLAUDE, "x-claude-code-agent-id": "a1"}, {}, "claude-code:s1:a1", "claude-code:s1"),
        (SUBAGENT, {}, "claude-code:s1:a2", "claude-code:s1:a1"),
        ({}, {"metadata": {"user_id": json.dumps({"device_id": "d", "session_id": "s1"})}}, "claude-code:s1", None),
        ({}, {"metadata": {"user_id": f"user_a1_account__session_{UUID}"}}, f"claude-code:{UUID}", None),
        (CODEX, {"prompt_cache_key": "s1"}, "codex:t1", None),
        ({**CODEX, "x-codex-parent-thread-id": "t0"}, {}, "codex:t1", "codex:t0"),
        (
            {},
            {"client_metadata": {"session_id": "s1", "thread_id": "t1", "x-codex-parent-thread-id": "t0"}},
            "codex:t1",
            "codex:t0",
        ),
        ({"session_id": "t1", "originator": "codex_cli_rs"}, {"prompt_cache_key": "t1"}, "codex:t1", None),
        ({"session_id": "t1", "user-agent": "codex_exec/0.30"}, {}, "codex:t1", None),
        (
            {"x-session-affinity": "o1", "x-session-id": "o1", "x-parent-session-id": "o0"},
            {},
            "opencode:o1",
            "opencode:o0",
        ),
        ({"x-opencode-session": "o1"}, {}, "opencode:o1", None),
        ({"session_id": "p1", "x-client-request-id": "p1", "x-session-affinity": "p1"}, {}, "pi:p1", None),
        ({"session_id": "p1", "x-client-request-id": "p1"}, {"prompt_cache_key": "p1"}, "pi:p1", None),
        ({"x-session-affinity": "p1"}, {}, "pi:p1", None),
        ({"user-agent": "pi (linux)"}, {"prompt_cache_key": "p1"}, "pi:p1", None),
        ({"x-litellm-session-id": "l1", "x-litellm-trace-id": "l2"}, {}, "litellm:l1", None),
        ({"x-litellm-trace-id": "l2"}, {}, "litellm:l2", None),
        ({"x-roo-session-id": "r1"}, {}, "roo:r1", None),
        (
            {"x-dynamo-session-id": "d1", "x-dynamo-parent-session-id": "d0", "x-dynamo-session-final": "true"},
            {},
            "dynamo:d1",
            "dynamo:d0",
        ),
        ({**CLAUDE, "x-dynamo-session-id": "d1"}, {}, "dynamo:d1", None),
        (
            {"x-deepseek-harness-session-id": "h1", "x-deepseek-harness-parent-session-id": "h0"},
            {},
            "deepseek:h1",
            "deepseek:h0",
        ),
        ({}, {"prompt_cache_key": "agents-sdk:session:00ff"}, "agents-sdk:session:00ff", None),
        ({"thread-id": "t1", "x-codex-parent-thread-id": "t1"}, {}, "codex:t1", None),
    ],
)
def test_a_harness_is_known_by_what_it_sends(
    headers: dict[str, str], body: dict[str, Any], harness: str, parent: str | None
) -> None:
    assert who(headers, **body) == Identity(None, harness, parent, "turn")


@pytest.mark.parametrize(
    ("headers", "body"),
    [
        ({}, {}),
        ({"session-id": "s1"}, {}),
        ({"x-parent-session-id": "o0"}, {}),
        ({"session_id": "x1"}, {}),
        ({}, {"prompt_cache_key": "all-agents"}),
        ({}, {"prompt_cache_key": "agents-sdk:run:1f"}),
        ({}, {"prompt_cache_key": "agents-sdk:group:1f"}),
        ({}, {"user": "ada", "safety_identifier": "ada", "metadata": {"session": "m1"}}),
        ({}, {"metadata": {"user_id": "ada"}}),
        ({}, {"metadata": {"user_id": "[1]"}}),
        ({}, {"metadata": {"user_id": "ada_session_1"}}),
        ({}, {"metadata": ["user_id"], "client_metadata": "thread_id"}),
    ],
)
def test_what_names_no_conversation_is_no_harness(headers: dict[str, str], body: dict[str, Any]) -> None:
    """A key of prefixes, an end user, or a session that its children share."""
    assert who(headers, **body) == Identity()


def test_subagents_of_a_session_are_told_apart() -> None:
    agents = [CLAUDE, SUBAGENT, {**SUBAGENT, "x-claude-code-agent-id": "a3"}]
    assert len({who(headers).harness for headers in agents}) == 3


@pytest.mark.parametrize("bad", ["x" * 201, "é", "a\x07", "", "  "], ids=["long", "letter", "bell", "none", "blank"])
def test_an_id_that_cannot_be_one_is_ignored(bad: str) -> None:
    assert who({"x-session-id": bad}) == Identity()
    assert who({"thread-id": "t1", "x-codex-parent-thread-id": bad}) == Identity(harness="codex:t1")
    assert who(client_metadata={"thread_id": bad}) == Identity()
    assert who({"x-session-id": "x" * 200}).harness == "opencode:" + "x" * 200


def test_a_subagent_without_a_name_that_can_be_used_is_not_its_session() -> None:
    assert who({**CLAUDE, "x-claude-code-agent-id": "é"}) == Identity()


@pytest.mark.parametrize("kind", ["turn", "prewarm", "compaction", "memory"])
def test_codex_says_what_a_request_is(kind: str) -> None:
    told = json.dumps({"request_kind": kind})
    assert who({**CODEX, "x-codex-turn-metadata": told}).kind == kind
    assert who(CODEX, client_metadata={"x-codex-turn-metadata": told}).kind == kind
    assert who({**CODEX, "x-codex-turn-metadata": told}, client_metadata={"x-codex-turn-metadata": "{"}).kind == kind


@pytest.mark.parametrize("told", ["", "{", "[]", '{"request_kind": 5}', '{"request_kind": "é"}', "NaN"])
def test_codex_metadata_that_says_nothing_leaves_a_turn(told: str) -> None:
    assert who({**CODEX, "x-codex-turn-metadata": told}) == Identity(harness="codex:t1")


def test_a_compaction_of_the_deepseek_harness_is_no_turn() -> None:
    headers = {"x-deepseek-harness-session-id": "h1", "x-deepseek-harness-compact": "1"}
    assert who(headers) == Identity(harness="deepseek:h1", kind="compaction")


def test_the_session_that_is_named_to_us_is_told_beside_the_harness() -> None:
    assert who({**CLAUDE, "x-agentstate-session": " mine "}) == Identity("mine", "claude-code:s1")
    assert who(session_id="mine") == Identity("mine")
    assert who({"x-agentstate-session": "mine"}, session_id="other").session == "mine"
    assert who({"x-agentstate-session": ""}, session_id="").session is None
    assert who({"x-agentstate-session": "Zürich"}).session == "Zürich"
    assert identify({b"x-agentstate-session": "Zürich".encode("latin-1")}, {}).session == "Zürich"


def test_a_session_that_is_no_text_is_refused() -> None:
    with pytest.raises(ValueError, match="session_id must be a text"):
        who(session_id=["a"])


LINE = "x-anthropic-billing-header: cc_version=2.1.36.a1b; cc_entrypoint=cli; cch=0d9f1;"
PROMPT = "You are Claude Code.\nBe brief; mode=fast; x-anthropic-billing-header: cch=1;"


@pytest.mark.parametrize("end", ["\n", "\n\n", "", " "], ids=["line", "paragraph", "nothing", "space"])
@pytest.mark.parametrize("line", [LINE, LINE.removesuffix(";"), LINE.replace("; ", ";")])
def test_the_billing_line_is_taken_out_of_a_prompt(line: str, end: str) -> None:
    if not line.endswith(";") and not end:
        return
    bodies: list[dict[str, Any]] = [
        {"system": line + end + PROMPT, "messages": []},
        {"messages": [{"role": "system", "content": line + end + PROMPT}]},
        {"messages": [{"role": "developer", "content": [{"type": "text", "text": line + end + PROMPT}]}]},
    ]
    for body in bodies:
        assert strip_volatile(body)
        assert line not in json.dumps(body)
        assert not strip_volatile(body)
    assert bodies[0]["system"] == bodies[1]["messages"][0]["content"] == PROMPT
    assert bodies[2]["messages"][0]["content"] == [{"type": "text", "text": PROMPT}]


def test_the_billing_line_in_a_block_of_its_own_goes_with_its_block() -> None:
    cached = {"type": "text", "text": PROMPT, "cache_control": {"type": "ephemeral"}}
    blocks = [{"type": "text", "text": LINE}, {"type": "text", "text": LINE + "\n"}, cached]
    body: dict[str, Any] = {"system": blocks, "messages": [{"role": "system", "content": list(blocks)}]}
    assert strip_volatile(body)
    assert body == {"system": [cached], "messages": [{"role": "system", "content": [cached]}]}


def test_any_number_of_billing_lines_is_taken_out() -> None:
    """In one pass: who sends a million must not hold up everybody else."""
    many = 200_000
    block = {"type": "text", "text": LINE}
    rest = {"type": "text", "text": PROMPT}
    body = {
        "system": [*[block] * many, {"type": "text", "text": f"{LINE}\n" * many + PROMPT}],
        "messages": [*[{"role": "system", "content": LINE}] * many, {"role": "user", "content": "hello"}],
    }
    assert strip_volatile(body)
    assert body == {"system": [rest], "messages": [{"role": "user", "content": "hello"}]}


def test_a_prompt_that_is_a_billing_line_alone_goes_whole() -> None:
    hello = {"role": "user", "content": "Hello"}
    for content in (LINE, [{"type": "text", "text": LINE}]):
        body = {"system": content, "messages": [{"role": "system", "content": content}, hello]}
        assert strip_volatile(body)
        assert body == {"messages": [hello]}


@pytest.mark.parametrize(
    "body",
    [
        {},
        {"system": PROMPT, "messages": [{"role": "user", "content": LINE}]},
        {"system": [{"type": "text", "text": PROMPT}, {"type": "text", "text": LINE}]},
        {"system": "x-anthropic-billing-header: is a header"},
        {"system": "x-anthropic-billing-header:" + "a" * 5000},
        {"system": None, "messages": None},
        {"system": 5, "messages": [5]},
        {"system": [], "messages": [{"role": "system", "content": None}]},
        {"system": [LINE], "messages": [{"role": "system", "content": [{"type": "text", "text": 5}]}]},
    ],
)
def test_what_is_no_billing_line_at_the_head_of_a_prompt_stays(body: dict[str, Any]) -> None:
    before = json.dumps(body)
    assert not strip_volatile(body)
    assert json.dumps(body) == before


@pytest.mark.parametrize(
    "name",
    [
        "session_id",
        "session_params",
        "cache_salt",
        "extra_key",
        "rid",
        "request_id",
        "routed_dp_rank",
        "data_parallel_rank",
        "disagg_prefill_dp_rank",
        "bootstrap_host",
        "bootstrap_pair_key",
        "kv_hints",
    ],
)
def test_what_would_reach_into_an_engine_is_taken_out_of_a_body(name: str) -> None:
    body = {"model": "m", name: None, "chat_template_kwargs": {name: 1}}
    assert sanitize(body)
    assert body == {"model": "m", "chat_template_kwargs": {name: 1}}


def test_a_reserved_field_is_found_however_it_is_written() -> None:
    body = json.loads('{"ses\\u0073ion_id": "a", "rid": "a", "rid": "b"}')
    assert sanitize(body) and body == {}


def test_fields_that_are_not_known_stay() -> None:
    body = {"model": "m", "context_management": {}, "chat_template_kwargs": {}, "top_logprobs": 0, "priority": 1}
    before = dict(body)
    assert not sanitize(body)
    assert body == before


@pytest.mark.parametrize(
    ("header", "reserved"),
    [
        (b"x-override-rid", True),
        (b"x-override-anything", True),
        (b"x-smg-routing-key", True),
        (b"x-data-parallel-rank", True),
        (b"x-body-compressed", True),
        (b"x-request-id", False),
        (b"traceparent", False),
        (b"x-session-id", False),
    ],
)
def test_headers_that_would_reach_into_an_engine_are_known(header: bytes, reserved: bool) -> None:
    assert RESERVED.header(header) is reserved
