"""The HTTP API of AgentState: FastAPI over the verbs of `agentstate`, one file per resource."""
