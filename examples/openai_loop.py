"""A tool-calling agent on the plain `openai` client whose turns survive its process and its engine.

    python examples/openai_loop.py --session demo --steps survey     # works, then suspends itself
    python examples/openai_loop.py --session demo --steps conclude   # any time later, in another process: resumes

The loop, the tools and the conversation are real. Only the choice of the tool is scripted: the demo's model,
SmolLM2-135M, is too small to choose. With a larger model, start with `--model-chooses`.
"""

from __future__ import annotations

import argparse
import ast
import json
import operator
import re
import time
from pathlib import Path
from typing import Any

from openai import OpenAI

from agentstate.client import Client, message, tool_call, tool_output
from agentstate.errors import SessionNotFound

ROOT = Path(__file__).resolve().parent.parent
SYSTEM = "You are a careful software engineer. You answer in one or two short sentences."

# A turn: the user's question, and the tool that answers it (None: the model answers from its context).
STEPS: dict[str, list[tuple[str, tuple[str, dict[str, Any]] | None]]] = {
    "survey": [
        ("Which files of this project define errors?", ("search", {"pattern": r"class \w+Error\b"})),
        ("How many bytes do 64 pages of 30 layers take, at 49152 bytes?", ("calculate", {"expression": "64*30*49152"})),
        ("Read how sessions work.", ("read_file", {"path": "agentstate/sessions/verbs.py", "chars": 15500})),
    ],
    "conclude": [("What does suspending a session do?", None)],
}


def search(pattern: str, limit: int = 20) -> str:
    """Lines of this project's Python files that match a regular expression."""
    hits = (
        f"{path.relative_to(ROOT)}:{number}: {line.strip()}"
        for path in sorted((ROOT / "agentstate").rglob("*.py"))
        for number, line in enumerate(path.read_text().splitlines(), 1)
        if re.search(pattern, line)
    )
    return "\n".join(hit for hit, _ in zip(hits, range(limit), strict=False))


def read_file(path: str, chars: int = 4000) -> str:
    """The beginning of a file of this project."""
    target = (ROOT / path).resolve()
    if not target.is_relative_to(ROOT):
        return "outside the project"
    return target.read_text()[:chars]


def calculate(expression: str) -> str:
    """The value of an arithmetic expression."""
    signs = {ast.Add: operator.add, ast.Sub: operator.sub, ast.Mult: operator.mul, ast.Div: operator.truediv}

    def value(node: ast.expr) -> float:
        match node:
            case ast.Constant(value=int() | float() as number):
                return number
            case ast.BinOp(left=left, op=sign, right=right) if type(sign) in signs:
                return signs[type(sign)](value(left), value(right))
        raise ValueError(f"not arithmetic: {expression}")

    return str(value(ast.parse(expression, mode="eval").body))


TOOLS = {"search": search, "read_file": read_file, "calculate": calculate}


class Agent:
    """One session's turns. The agent appends everything it says and does to the session before it continues."""

    def __init__(self, service: Client, session_id: str, max_tokens: int):
        self.service, self.session_id, self.max_tokens = service, session_id, max_tokens
        self.turn = service.resume(session_id, tail=1000, lease_ttl_s=600)
        if self.turn.engine is None:
            raise SystemExit("no engine serves this session: start one with `agentstate engine`")
        self.llm = OpenAI(base_url=self.turn.engine.base_url, api_key="none", timeout=600)
        self.messages = [_as_message(entry) for entry in self.turn.entries.data]
        self.reports: list[dict[str, Any]] = []

    def remember(self, *entries: dict[str, Any]) -> None:
        self.service.append(self.session_id, self.turn.lease, list(entries))
        self.messages += [_as_message(entry) for entry in entries]

    def ask_model(self, **options: Any) -> Any:
        """One streamed model call over the whole conversation. Returns the reply's text and its tool calls."""
        started, first, text, usage, calls = time.perf_counter(), None, "", None, {}
        stream = self.llm.chat.completions.create(
            model=self.turn.session.model,
            messages=self.messages,
            temperature=0,
            max_tokens=self.max_tokens,
            stream=True,
            stream_options={"include_usage": True},
            extra_body=self.turn.engine.extra_body,
            **options,
        )
        for chunk in stream:
            usage = chunk.usage or usage
            for choice in chunk.choices:
                if choice.delta.content or choice.delta.tool_calls:
                    first = first or time.perf_counter() - started
                text += choice.delta.content or ""
                for call in choice.delta.tool_calls or []:
                    known = calls.setdefault(call.index, {"name": "", "arguments": ""})
                    known["name"] += call.function.name or ""
                    known["arguments"] += call.function.arguments or ""
        cached = usage.prompt_tokens_details.cached_tokens if usage.prompt_tokens_details else 0
        self.reports.append(
            {"ttft_s": first, "prompt_tokens": usage.prompt_tokens, "cached_tokens": cached, "text": text}
        )
        print(f"   {usage.prompt_tokens:5d} tokens, {cached:5d} cached, first token after {first:.2f} s", flush=True)
        return text, [(call["name"], json.loads(call["arguments"])) for call in calls.values()]

    def step(self, question: str, scripted: tuple[str, dict[str, Any]] | None, model_chooses: bool) -> None:
        print(f" > {question}", flush=True)
        self.remember(message({"role": "user", "content": question}))
        text, calls = self.ask_model(**({"tools": _schemas()} if model_chooses else {}))
        self.remember(message({"role": "assistant", "content": text}))
        if not model_chooses:
            calls = [scripted] if scripted else []
        for name, arguments in calls:
            call_id = f"call_{len(self.messages)}"
            # Claim first: after a crash the call is known to have perhaps run, and never runs twice.
            self.remember(tool_call(call_id, name, arguments))
            self.remember(tool_output(call_id, TOOLS[name](**arguments)))
            print(f"   {name}({', '.join(map(repr, arguments.values()))})", flush=True)
        if calls:
            text, _ = self.ask_model()
            self.remember(message({"role": "assistant", "content": text}))
        print(f" < {text.strip()[:160]}", flush=True)

    def suspend(self) -> dict[str, Any]:
        """End the turn and wait until the context can be restored from disk."""
        started = time.perf_counter()
        answer = self.service.suspend(self.session_id, self.turn.lease, reason="user_wait")
        kv = answer.kv.model_dump(mode="json")
        if answer.operation is not None:
            kv = self.service.wait_operation(answer.operation, timeout_s=60).result or kv
        print(f"   suspended: {kv['state']}, {kv['tokens']} tokens, {time.perf_counter() - started:.2f} s", flush=True)
        return kv


def _as_message(entry: Any) -> dict[str, Any]:
    """A session's entry as a chat message. Tool traffic becomes text: not every chat template supports tools."""
    kind, payload = (entry["kind"], entry["payload"]) if isinstance(entry, dict) else (entry.kind, entry.payload)
    match kind:
        case "tool_call":
            return {"role": "assistant", "content": f"{payload['name']}({json.dumps(payload['arguments'])})"}
        case "tool_result":
            return {"role": "user", "content": f"Result:\n{payload['output']}"}
    return payload


def _schemas() -> list[dict[str, Any]]:
    arguments = {"search": "pattern", "read_file": "path", "calculate": "expression"}
    return [
        {
            "type": "function",
            "function": {
                "name": name,
                "description": tool.__doc__,
                "parameters": {
                    "type": "object",
                    "properties": {arguments[name]: {"type": "string"}},
                    "required": [arguments[name]],
                },
            },
        }
        for name, tool in TOOLS.items()
    ]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--session", required=True, help="the agent's id; created when it does not exist")
    parser.add_argument("--steps", default="survey", help=f"what to do, of {', '.join(STEPS)}; several with commas")
    parser.add_argument("--service", default="http://127.0.0.1:8700", help="the AgentState service")
    parser.add_argument("--model", default="smollm2", help="the model's name at the engine")
    parser.add_argument("--cache-salt", help="namespace of the agent's KV, set when it is created")
    parser.add_argument("--max-tokens", type=int, default=12, help="longest reply")
    parser.add_argument("--model-chooses", action="store_true", help="let the model choose the tools")
    parser.add_argument("--report", type=Path, help="write what every model call cost, as JSON")
    options = parser.parse_args()
    with Client(options.service) as service:
        try:
            service.read(options.session)
        except SessionNotFound:
            service.create_session(options.model, id=options.session, cache_salt=options.cache_salt)
        agent = Agent(service, options.session, options.max_tokens)
        if not agent.messages:
            agent.remember(message({"role": "system", "content": SYSTEM}))
        for name in options.steps.split(","):
            for question, scripted in STEPS[name]:
                agent.step(question, scripted, options.model_chooses)
        kv = agent.suspend()
    if options.report:
        options.report.write_text(json.dumps({"turns": agent.reports, "kv": kv, "messages": agent.messages}))


if __name__ == "__main__":
    main()
