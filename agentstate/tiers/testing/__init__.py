"""What tiers can be held to.

`conformance.TierTests` are tests for pytest, `machine.TierMachine` is a state machine for Hypothesis, `seaweedfs`
starts a real S3 server, `proxy` spoils what passes between it and its clients, and `clock.ManualClock` lets time pass.
A tier of another kind is tested by deriving from the first two and saying where it lies: `conformance.Place`. The first
two need pytest, the second hypothesis as well.
"""
