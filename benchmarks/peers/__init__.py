"""Other ways to have SGLang keep KV, measured beside this one: `agentstate bench ttft --peers`."""
