"""What page stores and their read backends can be held to.

`conformance.PageStoreTests` and `backends.ReadBackendTests` are tests for pytest, `machine.PageStoreMachine` is a state
machine for Hypothesis, and `pages` has pages whose contents are known from their names. One of another kind is tested
by deriving from these classes and saying how it is opened. The modules need what they are named after: pytest,
hypothesis.
"""
