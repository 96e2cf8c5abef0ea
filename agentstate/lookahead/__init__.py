"""How long a session will wait, and what its bytes are worth meanwhile. Pure: no threads, no torch, no SQL, and no
clock of its own. Times are in seconds, sizes in bytes.

- forecast: a distribution of how long a wait lasts, on a fixed logarithmic grid
- durations: forecasts learned from the waits of one tenant
- commands: what a command line is known by
- planner: the index, one ordering for eviction, demotion and prefetch
- policies: the orderings to choose from
"""
