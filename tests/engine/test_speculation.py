"""The kernels around drafts on a CPU, beside SGLang's own in Triton's interpreter."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from engine_patch.cpu import speculation

REFERENCE = Path(__file__).with_name("speculation_reference.py")
ROWS, WIDTH, MODE = 8, 4, 1
Case = tuple[str, list[Any]]


def table(numbers: torch.Generator) -> torch.Tensor:
    return torch.randint(0, 1000, (ROWS, 64), generator=numbers, dtype=torch.int32)


def spans(numbers: torch.Generator, requests: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Rows of the table, and a part of each."""
    starts = torch.randint(0, 40, (requests,), generator=numbers, dtype=torch.int32)
    lengths = torch.randint(1, 20, (requests,), generator=numbers, dtype=torch.int32)
    return torch.randperm(ROWS, generator=numbers)[:requests], starts, starts + lengths


def links(requests: int, width: int = WIDTH) -> list[torch.Tensor]:
    """Where trees go: positions, numbers, children, siblings."""
    return [torch.empty(requests * width, dtype=torch.long), *torch.full((3, requests, width), -1)]


def drafted(numbers: torch.Generator, requests: int, topk: int, steps: int, width: int) -> list[torch.Tensor]:
    """How SGLang keeps what was drafted: the best candidates of trees with ``topk`` children a node."""
    parents, chosen = [], []
    for _ in range(requests):
        # A node's children are worth less than the node.
        worth = {candidate: float(torch.rand((), generator=numbers)) for candidate in range(topk)}
        rows, best = [-1], sorted(worth, key=lambda candidate: -worth[candidate])
        for step in range(1, steps):
            rows += best[:topk]
            below = {}
            for place, parent in enumerate(best[:topk]):
                for child in range(topk):
                    candidate = topk + (step - 1) * topk**2 + place * topk + child
                    below[candidate] = worth[parent] * float(torch.rand((), generator=numbers))
            best = sorted(below, key=lambda candidate: -below[candidate])
            worth |= below
        chosen.append(sorted(sorted(worth, key=lambda candidate: -worth[candidate])[: width - 1]))
        parents.append(rows)
    return [torch.tensor(parents), torch.tensor(chosen)]


def trees(numbers: torch.Generator, requests: int, width: int) -> torch.Tensor:
    """Masks of trees with a parent a node, and sometimes a node that is in none."""
    masks = torch.zeros(requests, width, width, dtype=torch.bool)
    for mask in masks:
        for node in range(width):
            parent = int(torch.randint(-1, max(node, 1), (), generator=numbers)) if node else -1
            if parent >= 0:
                mask[node] |= mask[parent]
            mask[node, node] = True
    return masks


def cases() -> Iterator[Case]:
    numbers = torch.Generator().manual_seed(7)
    for requests in (1, 2, 4):
        lengths = torch.randint(1, 30, (requests,), generator=numbers)
        rows, starts, ends = spans(numbers, requests)
        new = int((ends - starts).sum())
        out = torch.zeros(requests * WIDTH, dtype=torch.long)
        yield "draft_slots", [rows, table(numbers), lengths, out, 64, 1, WIDTH]
        yield "extend_slots", [rows, table(numbers), starts, ends, torch.zeros(new, dtype=torch.long), 64]
        slots = torch.randint(0, 1000, (new,), generator=numbers)
        yield "assign_slots", [rows, table(numbers), starts, ends, slots, 64]
        accepted = torch.randint(0, 1000, (requests, WIDTH), generator=numbers, dtype=torch.int32)
        counts = torch.randint(1, WIDTH + 1, (requests,), generator=numbers, dtype=torch.int32)
        yield "bonus_tokens", [accepted, counts, torch.zeros(requests, dtype=torch.int32), WIDTH]
        nodes = torch.randint(-1, requests * WIDTH, (requests, WIDTH), generator=numbers, dtype=torch.int32)
        of_nodes = torch.randint(0, 1000, (requests * WIDTH,), generator=numbers)
        yield "accepted_slots", [nodes, of_nodes, torch.zeros(requests * WIDTH, dtype=torch.long)]
        for topk, steps, width in ((1, 3, 4), (1, 1, 2), (2, 3, 6), (4, 3, 8)):
            mask = torch.zeros(requests * width * width, dtype=torch.bool)
            parents, chosen = drafted(numbers, requests, topk, steps, width)
            yield (
                "build_tree",
                [parents, chosen, lengths, mask, *links(requests, width), topk, steps, width, MODE],
            )
        for width in (2, 4, 8):
            mask = trees(numbers, requests, width).flatten()
            tree = [mask, lengths, *links(requests, width), requests, width]
            yield "tree_of_mask", tree
            _, index, child, sibling = links(requests, width)
            speculation.tree_of_mask(mask, lengths, torch.empty_like(index), index, child, sibling, requests, width)
            for _ in range(3):
                # Few tokens, so that some are what was drafted.
                candidates, targets = torch.randint(0, 3, (2, requests, width), generator=numbers)
                accepted = torch.full((requests, width), -1, dtype=torch.int32)
                counts, predicts = (torch.zeros(n, dtype=torch.int32) for n in (requests, requests * width))
                yield "verify_greedily", [predicts, accepted, counts, candidates, index, child, sibling, targets]


@pytest.fixture(scope="module")
def references(tmp_path_factory: pytest.TempPathFactory) -> tuple[list[Case], list[Case]]:
    """The cases, and what SGLang makes of them."""
    path = tmp_path_factory.mktemp("reference") / "cases"
    torch.save(list(cases()), path)
    given = torch.load(path)
    subprocess.run([sys.executable, REFERENCE, path], check=True)
    return given, torch.load(path)


@pytest.mark.parametrize("kernel", sorted({name for name, _ in cases()}))
def test_a_kernel_does_what_sglangs_does(kernel: str, references: tuple[list[Case], list[Case]]) -> None:
    found = 0
    for (name, arguments), (_, right) in zip(*references, strict=True):
        if name == kernel:
            getattr(speculation, kernel)(*arguments)
            for one, other in zip(arguments, right, strict=True):
                assert torch.equal(one, other) if isinstance(one, torch.Tensor) else one == other
            found += 1
    assert found >= 3


def test_some_drafts_are_accepted_and_some_are_not() -> None:
    """Otherwise the cases say little."""
    accepted = [arguments for name, arguments in cases() if name == "verify_greedily"]
    for arguments in accepted:
        speculation.verify_greedily(*arguments)
    counts = torch.cat([arguments[2] for arguments in accepted])
    assert (counts == 0).any() and (counts > 1).any()
