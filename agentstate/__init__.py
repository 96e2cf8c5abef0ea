"""AgentState keeps what an LLM agent is — its transcript and its KV cache — across turns, restarts and machines.

This package is the core: sessions in SQL, KV pages in extent files, the client and the command line. It runs in two
places that are installed apart, the HTTP service and the SGLang engine, and needs neither of them to be imported.
"""

__version__ = "0.1.0"
