"""Linear attention on a CPU, beside SGLang's own kernels in Triton's interpreter."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from engine_patch.cpu import convolution, linear

REFERENCE = Path(__file__).with_name("linear_reference.py")
REQUESTS, DRAFTS, SLOTS = 3, 4, 6
HEADS, VALUE_HEADS, KEY, VALUE = 2, 4, 16, 8
CHANNELS, WIDTH = 12, 4
OURS = {
    "gates": linear.gates,
    "attend_next": linear.attend_next,
    "convolve_next": convolution.convolve_next,
    "split": linear.split,
}
Case = tuple[str, dict[str, Any]]


def random(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed + sum(shape)))


def tokens(count: int) -> dict[str, torch.Tensor]:
    """What a layer computes of so many tokens."""
    return {
        "A_log": random(VALUE_HEADS, seed=1),
        "dt_bias": random(VALUE_HEADS, seed=2),
        "a": random(count, VALUE_HEADS, seed=3),
        "b": random(count, VALUE_HEADS, seed=4),
        "q": random(1, count, HEADS, KEY, seed=5),
        "k": random(1, count, HEADS, KEY, seed=6),
        "v": random(1, count, VALUE_HEADS, VALUE, seed=7),
    }


def states() -> dict[str, torch.Tensor]:
    return {
        "initial_state_source": random(SLOTS, VALUE_HEADS, VALUE, KEY),
        "initial_state_indices": torch.tensor([4, 0, 2], dtype=torch.int32),
    }


def convolution_of(*shape: int) -> dict[str, Any]:
    return {
        "x": random(*shape),
        "conv_state": random(SLOTS, CHANNELS, WIDTH - 1),
        "weight": random(CHANNELS, WIDTH),
        "bias": random(CHANNELS),
        "activation": "silu",
        "conv_state_indices": torch.tensor([4, 0, 2], dtype=torch.int32),
    }


def starts(each: int) -> torch.Tensor:
    return torch.arange(0, REQUESTS * each + 1, each, dtype=torch.int32)


def cases() -> list[Case]:
    rows = torch.tensor([1, 0, 2], dtype=torch.int32)
    fixed = {"softplus_beta": 1.0, "softplus_threshold": 20.0, "use_qk_l2norm_in_kernel": True}
    verified = {
        "intermediate_states_buffer": torch.zeros(SLOTS, DRAFTS, VALUE_HEADS, VALUE, KEY),
        "intermediate_state_indices": rows,
        "cache_steps": DRAFTS,
        "disable_state_update": True,
    }
    windows = {
        "intermediate_conv_window": torch.zeros(SLOTS, DRAFTS, CHANNELS, WIDTH - 1),
        "intermediate_state_indices": rows,
    }
    projected = random(REQUESTS, 2 * HEADS * KEY + 2 * VALUE_HEADS * VALUE)
    several = tokens(REQUESTS * DRAFTS)
    return [
        ("gates", {name: several[name] for name in ("A_log", "a", "b", "dt_bias")}),
        ("attend_next", tokens(REQUESTS) | states() | fixed | {"cu_seqlens": starts(1)}),
        ("attend_next", several | states() | fixed | verified | {"cu_seqlens": starts(DRAFTS)}),
        ("convolve_next", convolution_of(REQUESTS, CHANNELS)),
        ("convolve_next", convolution_of(REQUESTS, CHANNELS, DRAFTS) | windows),
        ("split", {"given": (projected, random(REQUESTS, 2 * VALUE_HEADS), HEADS, VALUE_HEADS, KEY, VALUE)}),
    ]


@pytest.fixture(scope="module")
def references(tmp_path_factory: pytest.TempPathFactory) -> list[tuple[Any, dict[str, Any]]]:
    path = tmp_path_factory.mktemp("reference") / "cases"
    torch.save(cases(), path)
    subprocess.run([sys.executable, REFERENCE, path], check=True)
    return torch.load(path)


# What of the state the kernel for a convolution leaves is of no use: the accepted window replaces it.
REPLACED = {4: {"conv_state"}}


@pytest.mark.parametrize("number", range(len(cases())))
def test_a_kernel_does_what_sglangs_does(number: int, references: list[tuple[Any, dict[str, Any]]]) -> None:
    name, arguments = cases()[number]
    found = OURS[name](*arguments.pop("given", ()), **arguments)
    right, changed = references[number]
    torch.testing.assert_close(found, right, atol=2e-5, rtol=2e-5)
    for argument, value in arguments.items():
        if isinstance(value, torch.Tensor) and argument not in REPLACED.get(number, ()):
            torch.testing.assert_close(value, changed[argument], atol=2e-5, rtol=2e-5)


def test_drafts_are_convolved_in_the_layout_that_sglang_has_them_in() -> None:
    """It takes a view of the result as tokens."""
    given = cases()[4][1]
    right = convolution.convolve_next(**given)
    given["x"] = given["x"].transpose(1, 2).contiguous().transpose(1, 2)
    found = convolution.convolve_next(**given)
    assert torch.equal(found, right)
    assert found.transpose(1, 2).view(REQUESTS * DRAFTS, CHANNELS).shape == (REQUESTS * DRAFTS, CHANNELS)


@pytest.mark.parametrize("cut", [1, 5, 11])
def test_a_sequence_may_be_cut_anywhere(cut: int) -> None:
    """Prompts in chunks, a token at a time, or as drafts: the state is the same."""
    of = tokens(12)
    decay, strength = linear.gates(of["A_log"], of["a"], of["b"], of["dt_bias"])
    whole, state = states()["initial_state_source"], states()["initial_state_source"]
    slot = torch.tensor([3])
    ends = torch.tensor([0, 12])
    out, _, _ = linear.attend(of["q"], of["k"], of["v"], decay, strength, whole, slot, ends)
    parts = []
    for part in (slice(0, cut), slice(cut, 12)):
        each = [t[:, part] for t in (of["q"], of["k"], of["v"], decay, strength)]
        parts.append(linear.attend(*each, state, slot, torch.tensor([0, each[0].shape[1]]))[0])
    torch.testing.assert_close(torch.cat(parts, 1), out)
    torch.testing.assert_close(state, whole)
    drafts = torch.zeros(SLOTS, 12, VALUE_HEADS, VALUE, KEY)
    before = states()["initial_state_source"]
    linear.attend(of["q"], of["k"], of["v"], decay, strength, before, slot, ends, drafts=drafts, rows=torch.tensor([2]))
    torch.testing.assert_close(drafts[2, -1], whole[3])
    # The state itself is as it was, and so is that of padding.
    assert torch.equal(before, states()["initial_state_source"])
    padding = torch.tensor([-1])
    assert not linear.attend(of["q"], of["k"], of["v"], decay, strength, before, padding, ends)[0].any()
    assert torch.equal(before, states()["initial_state_source"])


def test_the_states_after_the_last_accepted_drafts_are_kept() -> None:
    layers = 2
    drafts, windows = random(layers, REQUESTS, DRAFTS, 5), random(layers, REQUESTS, DRAFTS, 3)
    caches = SimpleNamespace(
        temporal=torch.zeros(layers, SLOTS, 5),
        conv=[torch.zeros(layers, SLOTS, 3)],
        intermediate_ssm=drafts,
        intermediate_conv_window=[windows],
    )
    linear.keep_accepted(caches, torch.tensor([4, -1, 0]), torch.tensor([1, 2, -1]), None, None)
    for states_of, kept in ((caches.temporal, drafts), (caches.conv[0], windows)):
        assert torch.equal(states_of[:, 4], kept[:, 0, 1])
        assert not states_of[:, [0, 1, 2, 3, 5]].any()


def test_a_gated_norm_and_a_gate_are_what_the_formulas_say() -> None:
    x, gate = random(5, 8), random(5, 8, seed=1)
    norm = SimpleNamespace(weight=random(8), eps=1e-6, activation="silu")
    normed = x / (x.square().mean(-1, keepdim=True) + 1e-6).sqrt() * norm.weight
    torch.testing.assert_close(linear.norm_gated(norm, x, gate), normed * gate * gate.sigmoid())
    norm.activation = "sigmoid"
    torch.testing.assert_close(linear.norm_gated(norm, x, gate), normed * gate.sigmoid())
    hidden, weight, shared, out = random(5, 8, seed=2), random(8, seed=3), random(5, 8, seed=4), random(5, 8, seed=5)
    gated = (hidden @ weight).sigmoid()[:, None] * shared
    before = out.clone()
    linear.gate_experts(hidden, weight, shared, out, do_add=True)
    torch.testing.assert_close(out, before + gated)
    linear.gate_experts(hidden, weight, shared, out, do_add=False)
    torch.testing.assert_close(out, gated)
