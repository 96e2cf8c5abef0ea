"""Which tests of engines run one after the other, and in which order, when several processes share them out.

A module is run by one process, so that its engines are started once. So are the modules of a group.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

if TYPE_CHECKING:
    from xdist.scheduler import LoadScopeScheduling

GROUPS = {
    # Engines at the same time: memory is enough for one such module, beside another one.
    "several engines": (
        "test_disaggregation.py",
        "test_demo.py",
        "test_shared_store.py",
        "test_lost_link.py",
        "test_replicas.py",
        "test_bad_input.py",
    ),
    # The engine of the fixture `stack`, which is started once for all of them, and ended for the rest of the last one.
    "shared stack": ("test_end_to_end.py", "test_tiers.py", "test_benchmarks.py", "test_soak.py"),
}
"""Modules that are run one after the other."""

FIRST = (
    *GROUPS,
    "test_quick_start.py",
    "test_models.py",
    "test_clients.py",
    "test_speculation.py",
    "test_host_tier.py",
)
"""What takes longest is begun first."""

TIMEOUT_S = 1800
"""Who waits for an engine is stopped when it hangs, not when the machine is slow."""

_GROUP_OF = {module: group for group, modules in GROUPS.items() for module in modules}
_PLACES = {module: place for modules in GROUPS.values() for place, module in enumerate(modules)}


def order(items: list[pytest.Item], directory: Path) -> None:
    """Order ``items`` by their groups, and limit the time of those in ``directory``."""
    for item in items:
        if directory in item.path.parents:
            item.add_marker(pytest.mark.timeout(TIMEOUT_S))

    def place(item: pytest.Item) -> tuple[int, int]:
        group = _GROUP_OF.get(item.path.name, item.path.name)
        return FIRST.index(group) if group in FIRST else len(FIRST), _PLACES.get(item.path.name, 0)

    items.sort(key=place)


def scheduler(config: pytest.Config, log: Any) -> LoadScopeScheduling | None:
    """What shares them out for ``--dist loadfile``, in the order in which they are. Not `xdist_group`: its names are
    lost in pytest 9."""
    if config.getoption("dist") != "loadfile":
        return None
    from xdist.scheduler import LoadFileScheduling

    class InGroups(LoadFileScheduling):
        def _split_scope(self, nodeid: str) -> str:
            module = super()._split_scope(nodeid)
            return _GROUP_OF.get(module.rpartition("/")[2], module)

    config.option.loadscopereorder = False
    return InGroups(config, log)
