"""More agents than the device can hold take turns; each is restored from disk for its turn.

    python examples/many_agents.py --agents 12 --rounds 2

Every agent reads its own text. Together their contexts exceed the engine's KV pool, so that by the second round the
early ones were evicted from the device; without AgentState the engine would recompute each.
"""

from __future__ import annotations

import argparse
import time
from pathlib import Path

from openai import OpenAI

from agentstate import Client
from agentstate.client import message

ROOT = Path(__file__).resolve().parent.parent
LIBRARY = "\n".join(path.read_text() for path in sorted((ROOT / "agentstate").rglob("*.py")))


def play(service: Client, session_id: str, model: str, text: str) -> tuple[int, int, float]:
    """One agent's turn. Returns its prompt tokens, how many of them were not computed, and its seconds."""
    service.ensure_session(session_id, model)
    with service.turn(session_id) as turn:
        asked = [message({"role": "user", "content": "What is this about? Answer in five words."})]
        if not turn.entries:
            asked.insert(0, message({"role": "system", "content": text}))
        started = time.perf_counter()
        reply = OpenAI(base_url=turn.base_url, api_key="none", timeout=600).chat.completions.create(
            model=model,
            messages=[entry.payload for entry in turn.entries] + [entry["payload"] for entry in asked],
            temperature=0,
            max_tokens=8,
            extra_body=turn.extra_body,
        )
        seconds = time.perf_counter() - started
        turn.append(*asked, message({"role": "assistant", "content": reply.choices[0].message.content}))
    turn.wait_durable()
    used = reply.usage
    return used.prompt_tokens, used.prompt_tokens_details.cached_tokens if used.prompt_tokens_details else 0, seconds


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--agents", type=int, default=12)
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--chars", type=int, default=3000, help="how much text each agent reads")
    parser.add_argument("--prefix", default="crowd", help="what the agents' ids begin with")
    parser.add_argument("--service", default="http://127.0.0.1:8700", help="the AgentState service")
    parser.add_argument("--model", default="smollm2", help="the model's name at the engine")
    options = parser.parse_args()

    with Client(options.service) as service:
        for turn in range(1, options.rounds + 1):
            total = cached = 0
            seconds = 0.0
            for agent in range(options.agents):
                text = LIBRARY[agent * options.chars : (agent + 1) * options.chars]
                told, kept, took = play(service, f"{options.prefix}-{agent}", options.model, text)
                print(f"   round {turn}, agent {agent}: of {told} tokens {kept} were not computed again, {took:.2f} s")
                total, cached, seconds = total + told, cached + kept, seconds + took
            print(
                f"round {turn}: {options.agents} agents, {total} tokens, {cached} not computed again, {seconds:.1f} s"
            )


if __name__ == "__main__":
    main()
