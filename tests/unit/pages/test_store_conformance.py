import pytest

from agentstate.pages.testing.conformance import PageStoreTests

pytestmark = pytest.mark.usefixtures("read_by")


class TestPageStore(PageStoreTests):
    """Ours."""
