from __future__ import annotations

import pytest
import torch

from engine_patch.cpu.convolution import convolve, convolve_next

CHANNELS, WIDTH, SLOTS = 6, 4, 5


def inputs(tokens: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(CHANNELS, tokens, generator=torch.Generator().manual_seed(seed))


WEIGHT, BIAS = inputs(WIDTH, 1), inputs(1, 2)[:, 0]


def reference(x: torch.Tensor, activation: str | None) -> torch.Tensor:
    """A whole sequence, as the convolution is written down."""
    padded = torch.cat([torch.zeros(CHANNELS, WIDTH - 1), x], dim=1)
    out = torch.stack([(padded[:, t : t + WIDTH] * WEIGHT).sum(1) + BIAS for t in range(x.shape[1])], dim=1)
    return torch.nn.functional.silu(out) if activation else out


def run(parts: list[torch.Tensor], slots: list[int], states: torch.Tensor, resumes: list[bool], **kw: str) -> list:
    ends = torch.tensor([0, *(part.shape[1] for part in parts)]).cumsum(0)
    out = convolve(
        torch.cat(parts, dim=1),
        WEIGHT,
        BIAS,
        conv_states=states,
        query_start_loc=ends.to(torch.int32),
        cache_indices=torch.tensor(slots),
        has_initial_state=torch.tensor(resumes),
        activation=kw.get("activation"),
        seq_lens_cpu=[part.shape[1] for part in parts],
    )
    return [out[:, a:b] for a, b in zip(ends[:-1], ends[1:], strict=True)]


@pytest.mark.parametrize("activation", [None, "silu"])
@pytest.mark.parametrize("cut", [1, 2, 3, 8, 19])
def test_a_sequence_may_be_cut_anywhere(cut: int, activation: str | None) -> None:
    x, other = inputs(20, 3), inputs(7, 4)
    states = torch.full((SLOTS, CHANNELS, WIDTH - 1), torch.nan)
    kw = {"activation": activation} if activation else {}
    first, beside = run([x[:, :cut], other], [3, 1], states, [False, False], **kw)
    (second,) = run([x[:, cut:]], [3], states, [True], **kw)
    right = reference(x, activation)
    torch.testing.assert_close(torch.cat([first, second], dim=1), right)
    torch.testing.assert_close(beside, reference(other, activation))
    assert torch.equal(states[3], x[:, -3:]) and torch.equal(states[1], other[:, -3:])
    assert states[[0, 2, 4]].isnan().all()


@pytest.mark.parametrize("activation", [None, "silu"])
def test_tokens_one_by_one_are_the_sequence(activation: str | None) -> None:
    sequences = [inputs(9, 5), inputs(9, 6)]
    states = torch.zeros(SLOTS, CHANNELS, WIDTH - 1)
    slots = torch.tensor([4, 0], dtype=torch.int32)
    steps = [
        convolve_next(
            torch.stack([x[:, t] for x in sequences]), states, WEIGHT, BIAS, activation, conv_state_indices=slots
        )
        for t in range(9)
    ]
    for number, x in enumerate(sequences):
        torch.testing.assert_close(torch.stack([step[number] for step in steps], dim=1), reference(x, activation))
        assert torch.equal(states[slots[number]], x[:, -3:])


def test_requests_that_only_pad_a_batch_are_passed_over() -> None:
    states = torch.zeros(SLOTS, CHANNELS, WIDTH - 1)
    _, kept = run([inputs(3), inputs(5, 1)], [-1, 2], states, [False, False])
    torch.testing.assert_close(kept, reference(inputs(5, 1), None))
    assert not states[[0, 1, 3, 4]].any()
