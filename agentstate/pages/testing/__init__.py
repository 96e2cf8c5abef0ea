"""What any page store can be held to.

`conformance.PageStoreTests` are tests for pytest, `machine.PageStoreMachine` is a state machine for Hypothesis, and
`pages` has pages whose contents are known from their names. A store of another kind is tested by deriving from the
first two and saying how it is opened. The modules need what they are named after: pytest, hypothesis.
"""
