"""A LangGraph agent whose state is in AgentState's database and whose context is on disk between its turns.

    python examples/langgraph_agent.py --thread graph "What is a page?"
    python examples/langgraph_agent.py --thread graph "And an extent?"     # any time later, in another process

Two lines make the difference: the graph's checkpointer, and the turn that invokes it.
"""

from __future__ import annotations

import argparse
from pathlib import Path

from langchain_core.messages import AIMessage, HumanMessage, SystemMessage, convert_to_openai_messages
from langgraph.graph import START, MessagesState, StateGraph
from openai import OpenAI

from agentstate import Client
from agentstate.adapters.langgraph import AgentStateSaver
from agentstate.client import Turn

MANUAL = (Path(__file__).resolve().parent.parent / "docs" / "architecture.md").read_text()[:4000]
INSTRUCTIONS = f"You answer questions about this manual in one short sentence.\n\n{MANUAL}"


def answering(turn: Turn) -> StateGraph:
    """A graph of one node, which asks the turn's engine."""
    llm = OpenAI(base_url=turn.base_url, api_key="none", timeout=600)

    def answer(state: MessagesState) -> MessagesState:
        reply = llm.chat.completions.create(
            model=turn.session.model,
            messages=convert_to_openai_messages([SystemMessage(INSTRUCTIONS), *state["messages"]]),
            temperature=0,
            max_tokens=24,
            extra_body=turn.extra_body,
        )
        used = reply.usage
        cached = used.prompt_tokens_details.cached_tokens if used.prompt_tokens_details else 0
        print(f"   of {used.prompt_tokens} tokens {cached} were not computed again")
        return {"messages": [AIMessage(reply.choices[0].message.content)]}

    graph = StateGraph(MessagesState)
    graph.add_node("answer", answer)
    graph.add_edge(START, "answer")
    return graph


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("question", nargs="+")
    parser.add_argument("--thread", required=True, help="the agent's id; created when it does not exist")
    parser.add_argument("--service", default="http://127.0.0.1:8700", help="the AgentState service")
    parser.add_argument("--model", default="smollm2", help="the model's name at the engine")
    options = parser.parse_args()

    config = {"configurable": {"thread_id": options.thread}}
    with Client(options.service) as service, AgentStateSaver.from_url(model=options.model) as saver:
        service.ensure_session(options.thread, options.model)
        with service.turn(options.thread) as turn:
            graph = answering(turn).compile(checkpointer=saver)
            known = graph.get_state(config).values.get("messages", [])
            print(f"resumed with {len(known)} messages; {turn.kv.tokens} tokens are on disk ({turn.kv.state})")
            for question in options.question:
                state = graph.invoke({"messages": [HumanMessage(question)]}, config)
                print(f" > {question}\n < {state['messages'][-1].content.strip()}")
        stored = turn.wait_durable()
        print(f"suspended: {stored.tokens} tokens are {stored.state}")


if __name__ == "__main__":
    main()
