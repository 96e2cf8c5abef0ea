"""An agent of the OpenAI Agents SDK that is suspended after its answer, and resumes in another process.

    python examples/agents_sdk.py --session sdk "What is a page?"
    python examples/agents_sdk.py --session sdk "And an extent?"     # any time later: its context comes from disk

AgentState adds one thing to the agent: the session in the ``async with``.
"""

from __future__ import annotations

import argparse
import asyncio
from pathlib import Path

from agents import Agent, ModelSettings, Runner

from agentstate import AsyncClient
from agentstate.adapters.openai_agents import AgentStateSession

MANUAL = (Path(__file__).resolve().parent.parent / "docs" / "architecture.md").read_text()[:4000]
INSTRUCTIONS = f"You answer questions about this manual in one short sentence.\n\n{MANUAL}"


async def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("question", nargs="+")
    parser.add_argument("--session", required=True, help="the agent's id; created when it does not exist")
    parser.add_argument("--service", default="http://127.0.0.1:8700", help="the AgentState service")
    parser.add_argument("--model", default="smollm2", help="the model's name at the engine")
    options = parser.parse_args()

    agent = Agent(
        name="librarian",
        instructions=INSTRUCTIONS,
        model_settings=ModelSettings(temperature=0, max_tokens=24),
    )
    async with AsyncClient(options.service) as service:
        async with AgentStateSession(options.session, service, model=options.model) as session:
            kv = session.turn.kv
            print(f"resumed with {len(await session.get_items())} items; {kv.tokens} tokens are on disk ({kv.state})")
            for question in options.question:
                result = await Runner.run(agent, question, session=session, run_config=session.run_config())
                usage = result.raw_responses[-1].usage
                cached = usage.input_tokens_details.cached_tokens
                print(f" > {question}\n < {result.final_output.strip()}")
                print(f"   of {usage.input_tokens} tokens {cached} were not computed again")
        stored = await session.turn.wait_durable()
        print(f"suspended: {stored.tokens} tokens are {stored.state}")


if __name__ == "__main__":
    asyncio.run(main())
