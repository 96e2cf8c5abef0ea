"""What is simulated, and what a simulation finds."""

from __future__ import annotations

import enum
from dataclasses import dataclass, field

from agentstate.benchmarks.traces import Gap
from agentstate.lookahead.policies import Policy as Ordering


class Prefetch(enum.Enum):
    """Where pages are brought before a tool is expected to end."""

    NOT = "not"
    HOST = "host"
    DEVICE = "device"


class Foresight(enum.Enum):
    """Where forecasts of waits come from."""

    NOT = "not"
    LEARNED = "learned"
    ANNOUNCED = "announced"  # learned, with what the agents announce
    TOOLS = "tools"  # learned, but exact where a tool is waited for
    EXACT = "exact"


@dataclass(frozen=True)
class Policy:
    """The features that are on. Without ``store`` nothing is written and the others mean nothing.

    - ``overlap``: layer *n* runs while *n + 1 …* are read.
    - ``read_at_arrival``: reading begins when a request arrives, not when it is admitted.
    - ``hold``: a request is deferred until so much has been read for it that its forward will not wait; others go first
      until then. Without it, everything that the engine runs waits with the request.
    - ``demote``: pages of a session that is expected to stay away are the first to leave the device.
    - ``break_even``: pages that are sooner computed than read are computed.
    - ``order``: of queued requests, and of their reads, those come first that miss the fewest pages; those that have
      waited for `AGING_S` come before all others.
    - ``exclusive``: what the device drops goes to host memory, and what comes to the device leaves that.
    - ``ordering``: what waiting sessions are worth, on the device and in host memory; the least recently used leaves
      first without it.
    - ``foresight``: where that gets its forecasts.
    - ``typing_s``: so long before a person's request comes, it is known that it will.
    - ``plan``: what is worth `MARGIN` times what it displaces is fetched.
    """

    name: str
    store: bool = False
    overlap: bool = False
    read_at_arrival: bool = False
    hold: bool = False
    prefetch: Prefetch = Prefetch.NOT
    demote: bool = False
    break_even: bool = False
    order: bool = False
    exclusive: bool = False
    ordering: Ordering | None = None
    foresight: Foresight = Foresight.NOT
    typing_s: float = 0.0
    plan: bool = False
    margin: float = 1.0


AGING_S = 10.0


@dataclass(frozen=True)
class Fleet:
    """What each of ``engines`` has. ``device_tokens`` is its KV pool; ``staging_bytes`` bounds what is read before
    admission; ``host_bytes`` what is prefetched or demoted to host memory; ``quota_bytes`` what is kept on its drive.

    Guesses of a tool's duration are wrong by a log-normal factor of ``guess_sigma``. A session is expected to stay
    away when a person is asked, or when the guess is ``demote_gap_s`` or more. A prefetch begins so early that it
    would be done ``prefetch_slack`` times the time it takes before the guessed end."""

    engines: int
    device_tokens: int
    staging_bytes: float
    host_bytes: float
    quota_bytes: float
    guess_sigma: float = 0.5
    demote_gap_s: float = 30.0
    prefetch_slack: float = 1.0


@dataclass(frozen=True, slots=True)
class Served:
    """One request as it was served, in an engine's words (`agentstate.fleet.control.TIERS`). Of its ``input_tokens``,
    ``device_tokens`` were on the device when it was admitted, and so were ``fetched_tokens``, which had been brought
    there before it came. ``host_tokens`` were in host memory and ``nvme_tokens`` on the drive; the others were
    computed. ``prefill_s`` is what they took the engine, ``saved_s`` how much more the whole prompt would have taken.
    For ``read_wait_s`` it waited for reads, its own or those of its forward, and for ``memory_wait_s`` for device
    memory."""

    session: int
    turn: int
    gap: Gap
    arrived_s: float
    ttft_s: float
    input_tokens: int
    output_tokens: int
    device_tokens: int
    host_tokens: int
    nvme_tokens: int
    prefill_s: float
    saved_s: float
    read_wait_s: float = 0.0
    memory_wait_s: float = 0.0
    fetched_tokens: int = 0

    @property
    def cached_tokens(self) -> int:
        """What was not computed."""
        return self.device_tokens + self.fetched_tokens + self.host_tokens + self.nvme_tokens


@dataclass
class Outcome:
    """What a simulation found. The window is the time in which sessions still started, or the one that was asked for;
    of what counted, so many requests were ``unserved`` at the end. The window's ``busy_s`` and ``written_bytes`` are
    sums over all engines. Of the sessions that were ``alive`` at a sample, taken evenly over the window, ``on_device``
    had their whole context on the device, and ``restorable`` there or on the drive; ``context_tokens`` is all that
    these contexts hold.

    Of ``forecasts`` waits that were forecast and have ended, ``within`` ended between the 10 % and the 90 % quantile.
    ``planned_bytes`` of ``bytes_read`` were read ahead of any request."""

    served: list[Served] = field(default_factory=list)
    duration_s: float = 0.0
    bytes_read: int = 0
    bytes_written: int = 0
    planned_bytes: int = 0
    window_s: float = 0.0
    window_busy_s: float = 0.0
    window_bytes_written: int = 0
    alive: list[int] = field(default_factory=list)
    on_device: list[int] = field(default_factory=list)
    restorable: list[int] = field(default_factory=list)
    context_tokens: list[int] = field(default_factory=list)
    forecasts: int = 0
    within: int = 0
    unserved: int = 0
