"""`python -m agentstate.cli` is `agentstate`."""

from agentstate.cli.main import main

main()
