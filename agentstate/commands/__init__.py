"""Groups of commands that are too large for `agentstate.cli`, a file a group."""
