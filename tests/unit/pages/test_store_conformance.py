from agentstate.pages.testing.conformance import PageStoreTests


class TestPageStore(PageStoreTests):
    """Ours."""
