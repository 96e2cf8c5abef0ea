"""Every wait of the product for a device, found in its source, and the tests that notice when it is gone.

A wait is what makes the host or a stream stay behind other work: an event or a fence that is recorded, a lane that is
finished, a stream that waits, memory that is kept until its copies are over. `NOTICED_BY` names the tests of each;
tests/late/test_waits.py takes them out of the code one at a time.
"""

from __future__ import annotations

import ast
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).parents[2]
_FUNCTIONS = {"free_after", "wait"}
_MEMORY = {"keep_until"}
_METHODS = {"after", "fence", "finish", "record", "synchronize", "wait_event", "wait_stream"}
# Where they are looked for; only one of the two knows of devices.
_SOURCES = {"engine_patch": _METHODS, "agentstate/pages": set[str]()}

# Methods of those names that wait for no device, by what they are called on; a class stands for its `self`.
NOT_OF_A_DEVICE = {
    "_writer": "queues an action",
    "decided": "is asked what was decided",
    "arrivals": "is asked whether all layers of a batch arrived",
    "restorer": "is asked what became of a batch",
    "_pools": "is asked what became of a batch",
    "_linker": "is asked what became of a batch",
    "cache_linker": "is asked what became of a batch",
    "AgentStateLinker": "is asked what became of a batch",
    "super": "is asked what became of a batch",
    "futures": "are of a shared store's answers",
    "page": "is part of a listing",
}

# By the name of the wait (`Wait.name`), the tests below tests/ each of which fails without it, under the policy `late`.
NOTICED_BY = {
    "agentstate/pages/reading.py Stream._read: free_after": (
        "late/test_restore.py::test_staging_is_not_read_into_before_it_is_copied",
    ),
    "agentstate/pages/reading.py Stream.layer: chunk.keep_until": (
        "late/test_restore.py::test_staging_is_not_read_into_before_it_is_copied",
    ),
    "agentstate/pages/reading.py Stream._let_go: reading.result().keep_until": (
        "late/test_staging.py::test_the_memory_of_a_stream_that_is_closed_is_kept_until_its_copies_are_over",
    ),
    "engine_patch/following.py FollowingSpiller._compare: self._pages.outbound.after": (
        "late/test_spill.py::test_a_rank_that_stores_nothing_compares_what_the_forward_wrote",
    ),
    "engine_patch/following.py FollowingSpiller._compare: self._pages.outbound.finish": (
        "late/test_spill.py::test_a_rank_that_stores_nothing_compares_what_the_forward_wrote",
    ),
    "engine_patch/host_reading.py HostStream.layer: chunk.keep_until": (
        "late/test_host_tier.py::test_memory_is_not_another_runs_before_it_is_copied_from",
    ),
    "engine_patch/host_reading.py HostStream._let_go: wait": (
        "late/test_host_tier.py::test_memory_is_not_another_runs_before_it_is_copied_from",
        "late/test_host_tier.py::test_memory_of_a_stream_that_is_discarded_is_kept_until_its_copies_are_over",
    ),
    "engine_patch/host_tier.py HostPool._copy: self.lane.after": (
        "late/test_host_tier.py::test_what_a_forward_still_writes_is_copied",
    ),
    "engine_patch/host_tier.py HostPool._copy: self.lane.finish": (
        "late/test_host_tier.py::test_a_copy_is_whole_before_it_is_summed_up",
    ),
    "engine_patch/restore.py Restorer.finish: batch.lane.finish": (
        "late/test_restore.py::test_nothing_comes_to_the_pages_of_a_batch_that_was_abandoned",
    ),
    "engine_patch/restore.py Restorer._run: batch.lane.finish": (
        "late/test_errors.py::test_what_was_queued_before_an_error_does_not_come_after_what_is_recomputed",
    ),
    "engine_patch/restore.py Restorer._restore: batch.lane.after": (
        "late/test_restore.py::test_what_an_earlier_forward_still_writes_does_not_overwrite_what_is_restored",
    ),
    "engine_patch/restore.py Restorer._restore: batch.lane.finish": (
        "late/test_restore.py::test_a_layer_is_there_when_it_is_said_to_be",
    ),
    "engine_patch/restore.py Restorer._land: batch.lane.fence": (
        "late/test_restore.py::test_staging_is_not_read_into_before_it_is_copied",
    ),
    "engine_patch/spill.py Spiller._store_offer: self._pages.outbound.after": (
        "late/test_spill.py::test_what_a_forward_still_writes_is_stored",
    ),
    "engine_patch/spill.py Spiller._fill: self._pages.outbound.finish": (
        "late/test_spill.py::test_an_offer_of_several_extents_is_stored_as_it_was",
    ),
    "engine_patch/staging.py HostCopies.of: self._own.lane.finish": (
        "late/test_staging.py::test_what_is_verified_is_what_the_device_has",
    ),
    "engine_patch/transfer.py CopyLane.after: event.synchronize": (
        "late/test_staging.py::test_a_lane_of_a_cpu_waits_itself",
    ),
    "engine_patch/transfer.py CopyLane.after: self._stream.wait_event": (
        "gpu/test_cuda_transfer.py::test_a_copy_begins_after_the_events_that_it_was_told_of",
        "late/test_restore.py::test_what_an_earlier_forward_still_writes_does_not_overwrite_what_is_restored",
    ),
    "engine_patch/transfer.py CopyLane.so_far: event.record": (
        "late/test_pools.py::test_what_is_preloaded_is_there_when_it_has_landed",
    ),
    "engine_patch/transfer.py CopyLane.fence: event.record": (
        "gpu/test_cuda_transfer.py::test_a_fence_is_waited_for_by_any_thread",
    ),
    "engine_patch/transfer.py CopyLane.fence.wait: event.synchronize": (
        "gpu/test_cuda_transfer.py::test_a_fence_is_waited_for_by_any_thread",
    ),
    "engine_patch/transfer.py CopyLane.finish: self.fence": (
        "late/test_staging.py::test_what_is_verified_is_what_the_device_has",
    ),
    "engine_patch/transfer.py CopyLane.finish: wait": (
        "late/test_staging.py::test_what_is_verified_is_what_the_device_has",
    ),
    "engine_patch/transfer.py PageNumbers._found: self._lane.after": (
        "late/test_pools.py::test_what_is_preloaded_is_there_when_it_has_landed",
    ),
    "engine_patch/versions.py linker_base.Linker.record_offload_ready: event.record": (
        "late/test_spill.py::test_what_a_forward_still_writes_is_stored_with_the_events_of_an_older_sglang",
    ),
}


class Wait(NamedTuple):
    """``number`` tells apart what reads alike in one function."""

    path: str
    function: str
    code: str
    number: int

    @property
    def name(self) -> str:
        return f"{self.path} {self.function}: {self.code}" + (f" ({self.number})" if self.number > 1 else "")

    @property
    def module(self) -> str:
        return self.path.removesuffix(".py").replace("/", ".")


def all_waits() -> dict[str, Wait]:
    """Every wait in the product, by name."""
    paths = sorted(path for source in _SOURCES for path in (ROOT / source).glob("*.py"))
    names = [path.relative_to(ROOT).as_posix() for path in paths]
    return {wait.name: wait for name in names for wait, _ in waits_in(parse(name), name)}


def markdown() -> str:
    """The list of the waits, as docs/testing.md has it."""
    rows = ["| without the wait | this fails |", "|---|---|"]
    for name, tests in NOTICED_BY.items():
        place, _, code = name.partition(": ")
        path, function = place.split(" ")
        names = ", ".join(f"`{test}`" for test in tests)
        rows.append(f"| `{code}` in `{function}`, {path} | {names} |")
    return "\n".join(rows)


def without(wait: Wait) -> ast.Module:
    """The module of a wait, and instead of it what does nothing, and gives None."""
    tree = parse(wait.path)
    (place,) = [node for found, node in waits_in(tree, wait.path) if found == wait]
    position = ast.dump(place, include_attributes=True)

    class Remove(ast.NodeTransformer):
        def visit(self, node: ast.AST) -> ast.AST:
            if ast.dump(node, include_attributes=True) == position:
                nothing = (
                    "None" if isinstance(node, ast.Attribute) and node.attr in _MEMORY else "lambda *_, **__: None"
                )
                return ast.copy_location(ast.parse(nothing, mode="eval").body, node)
            return self.generic_visit(node)

    return ast.fix_missing_locations(Remove().visit(tree))


def parse(path: str) -> ast.Module:
    return ast.parse((ROOT / path).read_text(), filename=str(ROOT / path))


def waits_in(tree: ast.Module, path: str) -> Iterator[tuple[Wait, ast.expr]]:
    """The waits in the module ``tree``, which has that path, and where each is."""
    seen: Counter[tuple[str, str]] = Counter()
    methods = _SOURCES[path.rpartition("/")[0]]
    for function, node in _expressions(tree, ""):
        if _is_wait(node, function, methods):
            code = ast.unparse(node)
            seen[function, code] += 1
            yield Wait(path, function, code, seen[function, code]), node


def _expressions(node: ast.AST, function: str) -> Iterator[tuple[str, ast.expr]]:
    """Every expression below ``node``, in the order of the source, with the function that it is in; of a function that
    is called by its name, its name."""
    for child in ast.iter_child_nodes(node):
        inside = function
        if isinstance(child, (ast.FunctionDef, ast.ClassDef)):
            inside = f"{function}.{child.name}" if function else child.name
        if isinstance(child, ast.Call) and isinstance(child.func, ast.Name):
            yield function, child.func
        if isinstance(child, ast.Attribute) and isinstance(child.ctx, ast.Load):
            yield function, child
        yield from _expressions(child, inside)


def _is_wait(node: ast.expr, function: str, methods: set[str]) -> bool:
    if isinstance(node, ast.Name):
        return node.id in _FUNCTIONS
    if not isinstance(node, ast.Attribute):
        return False
    on = node.value
    if isinstance(on, ast.Call):
        on = on.func
    receiver = on.attr if isinstance(on, ast.Attribute) else on.id if isinstance(on, ast.Name) else ""
    receiver = function.partition(".")[0] if receiver == "self" else receiver
    return node.attr in _MEMORY or (node.attr in methods and receiver not in NOT_OF_A_DEVICE)
