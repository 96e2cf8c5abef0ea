"""The gateway: OpenAI's and Anthropic's APIs, in front of engines. Here is what requests and answers say; no I/O."""
