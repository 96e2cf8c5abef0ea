from __future__ import annotations

from collections.abc import Iterator

import pytest
from tools import missing

from agentstate.pages import native


@pytest.fixture(scope="module", params=["native", "python"])
def read_by(request: pytest.FixtureRequest) -> Iterator[str]:
    """What reads and verifies: the extension, and Python without it."""
    with pytest.MonkeyPatch.context() as patch:
        if request.param == "python":
            patch.setattr(native, "library", None)
        elif native.library is None:
            missing("the native extension is not built, or off")
        yield request.param
