"""Try several continuations of one suspended agent side by side, and keep the best one.

    python examples/fork_explore.py --session explorer

The agent reads a manual once. Each idea is then tried on a fork, which shares what the agent has read, in SQL and on
disk: a fork costs no copy and no prefill. The best answer here is the one with the highest mean log probability.
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from openai import OpenAI

from agentstate import Client
from agentstate.client import Turn, message

MANUAL = (Path(__file__).resolve().parent.parent / "docs" / "architecture.md").read_text()[:4000]
IDEAS = ("What is a page?", "What may be lost, and why is that no loss?", "Who owns a store directory?")


def ask(turn: Turn, messages: list[dict[str, Any]], question: str) -> float:
    """Ask a question in a turn and store the answer. Returns the mean log probability of its tokens."""
    asked = message({"role": "user", "content": question})
    reply = OpenAI(base_url=turn.base_url, api_key="none", timeout=600).chat.completions.create(
        model=turn.session.model,
        messages=[*messages, asked["payload"]],
        temperature=0,
        max_tokens=24,
        logprobs=True,
        extra_body=turn.extra_body,
    )
    text, used = reply.choices[0].message.content, reply.usage
    turn.append(asked, message({"role": "assistant", "content": text}))
    cached = used.prompt_tokens_details.cached_tokens if used.prompt_tokens_details else 0
    print(f" > {question}\n < {text.strip()}")
    print(f"   of {used.prompt_tokens} tokens {cached} were not computed again")
    tokens = reply.choices[0].logprobs.content
    return sum(token.logprob for token in tokens) / len(tokens)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--session", required=True, help="the agent's id; created when it does not exist")
    parser.add_argument("--service", default="http://127.0.0.1:8700", help="the AgentState service")
    parser.add_argument("--model", default="smollm2", help="the model's name at the engine")
    options = parser.parse_args()

    with Client(options.service) as service:
        service.ensure_session(options.session, options.model)
        with service.turn(options.session) as turn:
            if not turn.entries:
                system = message({"role": "system", "content": f"You answer in one short sentence.\n\n{MANUAL}"})
                turn.append(system)
                ask(turn, [system["payload"]], "What is this manual about?")
        stored = turn.wait_durable()
        print(f"suspended: {stored.tokens} tokens are {stored.state}")

        base = service.read(options.session)
        scores: dict[str, float] = {}
        for idea in IDEAS:
            fork = service.fork(base.id, revision=base.revision, metadata={"idea": idea})
            with service.turn(fork.id, reason="done") as turn:
                scores[fork.id] = ask(turn, [entry.payload for entry in turn.entries], idea)
        best = max(scores, key=lambda fork_id: scores[fork_id])
        for fork_id in scores.keys() - {best}:
            service.delete(fork_id, revision="*")
        kept = service.read(best)
        print(f"kept {best}, the surest ({scores[best]:.2f} a token): {kept.metadata['idea']}")


if __name__ == "__main__":
    main()
