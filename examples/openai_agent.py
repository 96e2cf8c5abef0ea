"""An agent with a tool on the plain `openai` client. It knows nothing of AgentState but its base URL.

    export OPENAI_BASE_URL=http://127.0.0.1:8700/v1 OPENAI_API_KEY=none
    python examples/openai_agent.py agent.json "What is a page?"
    python examples/openai_agent.py agent.json "And an extent?"     # any time later: its context comes from disk

The agent keeps its own messages, in the file that is named first.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

from openai import OpenAI

DOCS = Path(__file__).resolve().parent.parent / "docs"
SYSTEM = (
    "You answer questions about this manual in one short sentence.\n\n" + (DOCS / "architecture.md").read_text()[:4000]
)
PARAMETERS = {"type": "object", "properties": {"name": {"type": "string"}}, "required": ["name"]}
TOOL = {"type": "function", "function": {"name": "read", "description": "Reads a manual", "parameters": PARAMETERS}}


def read(name: str) -> str:
    path = DOCS / Path(name).name
    return path.read_text()[:4000] if path.is_file() else f"There is no {name}."


def main(memory: Path, question: str) -> None:
    client = OpenAI()
    model = client.models.list().data[0].id
    messages = json.loads(memory.read_text()) if memory.exists() else [{"role": "system", "content": SYSTEM}]
    messages.append({"role": "user", "content": question})
    while messages[-1]["role"] != "assistant":
        answer = client.chat.completions.create(
            model=model, messages=messages, tools=[TOOL], temperature=0, max_tokens=24
        )
        said, usage = answer.choices[0].message, answer.usage
        print(f"of {usage.prompt_tokens} tokens {usage.prompt_tokens_details.cached_tokens} were not computed again")
        messages.append(said.model_dump(exclude_none=True))
        for call in said.tool_calls or []:
            result = read(**json.loads(call.function.arguments))
            messages.append({"role": "tool", "tool_call_id": call.id, "content": result})
    print(said.content)
    memory.write_text(json.dumps(messages))


if __name__ == "__main__":
    main(Path(sys.argv[1]), sys.argv[2])
