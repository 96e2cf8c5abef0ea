from pathlib import Path

import pytest
from contents import MARK

from agentstate.pages import Geometry, PageStore, Quota
from agentstate.pages.space import UNLIMITED
from agentstate.pages.testing.conformance import PageStoreTests

pytestmark = pytest.mark.usefixtures("read_by")


class TestPageStore(PageStoreTests):
    """Ours."""


class TestPageStoreByRows(PageStoreTests):
    """Ours, with extents whose rows can be read alone."""

    def open(self, directory: Path, geometry: Geometry, quota: Quota = UNLIMITED) -> PageStore:
        return PageStore(directory, MARK, geometry, quota, rows=True)
