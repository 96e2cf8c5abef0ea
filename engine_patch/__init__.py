"""The SGLang plug-in: spills KV pages to NVMe while the engine works, and restores them layer by layer.

SGLang loads it through the entry points of `pyproject.toml`; `--radix-cache-backend agentstate` turns it on.
"""
