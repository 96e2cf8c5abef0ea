"""The linker: SGLang's contract for a radix cache's pages outside of the device, over one rank's stores."""

from __future__ import annotations

import logging
from collections.abc import Callable, Collection, Mapping, Sequence
from typing import Any

import torch

from agentstate.fleet.turns import Turn
from agentstate.pages import DEMAND, Changes, Need, PageKeys
from engine_patch.break_even import Word
from engine_patch.feeds import Source
from engine_patch.rank import Rank
from engine_patch.restore import Finished, Restored
from engine_patch.sessions import Device
from engine_patch.sglang_api import PoolName, PoolTransfer, RadixKey, UnifiedCacheLinker
from engine_patch.stored_pools import keys_of
from engine_patch.turns import RequestSession

logger = logging.getLogger(__name__)

_QUARANTINED = "agentstate: device pages that a drive may still write to are quarantined until it answers"


class AgentStateLinker(UnifiedCacheLinker):
    """``pools`` names the device pools it serves. Look-ups answer from memory; loads and offloads run on threads of
    their own. Constructed by SGLang with keyword arguments of its choosing.
    """

    def __init__(
        self, server_args: Any, params: Any, *, components: Any, extra_config: Any, forward_stream: Any = None
    ):
        self._rank = Rank(server_args, params, components)
        self._pools = self._rank.pools
        self._cached = 0
        self._inserting = ""
        self.word = Word.RESTORE
        self.forward_stream = forward_stream
        self.page_size = self._rank.page_size
        self.drive_timeout_s = self._rank.settings.drive_timeout_s
        self.reads_ahead = self._rank.settings.read_ahead
        self.preload_bytes = int(self._rank.settings.preload_bytes)
        self.preload_stats = self._rank.preload_stats
        self.queue_aging_s = self._rank.settings.queue_aging_s
        self.order_stats = self._rank.order_stats
        self.waits = self._rank.waits
        self.accounts = self._rank.accounts
        self.foresight_stats = self._rank.foresight_stats
        self.decisions = self._rank.decided
        self.served = self._rank.served
        self.received = self._rank.received
        self.foresees = self._rank.settings.foresight
        self.pin_max_s = self._rank.settings.pin_max_s
        self.layer_done_counter = self._pools.gate
        self.pools = self._pools.device_pages
        self.window_pages = self._pools.window_pages
        self.by_choice = self._pools.by_choice
        if PoolName.MAMBA in self.pools:
            # The state has readers of its own, which do not pass through the KV pool.
            params.req_to_token_pool.register_layer_transfer_counter(self.layer_done_counter)

    def attach(
        self,
        device: Device,
        explain: Callable[[str], dict[str, Any]],
        kept: Callable[[], dict[str, int]],
        held: Callable[[], dict[str, int]],
    ) -> None:
        """The radix tree is there: from now on sessions can be moved in it and it can ``explain`` where one is, and
        `stat` shows what it has ``kept`` for requests, and how many bytes of the device are ``held`` by each
        account."""
        self._rank.sessions.device = device
        self._rank.explain_device = explain
        self._rank.kept_by_tree = kept
        self._rank.held_on_device = held

    def retire(self, reason: str) -> None:
        """Restore and spill nothing from now on, and say why."""
        self._rank.retire(reason)

    def suspend(self, reason: str) -> None:
        """Restore and spill nothing while weights are being updated, until `resume` or `retire`."""
        self._rank.suspend(reason)

    def resume(self) -> None:
        """Go on as before."""
        self._rank.resume()

    def reload(self) -> str | None:
        """Switch to the pages of weights that were loaded from files. Returns the reason if that cannot be done."""
        return self._rank.reload()

    def close(self) -> None:
        self._rank.close()

    # What the radix cache asks for, in the order of a request's life.

    def matching(self, cached: int) -> None:
        """The next `lookup` is for a request with so many tokens on the device: its own arguments do not say."""
        self._cached = cached

    def lookup(self, rid: str, transfers: list[PoolTransfer]) -> list[int]:
        """Every restorable prefix length, in pages: none while the drive does not answer, and after a failed restore of
        the request only those before what failed. Sets ``word``, this rank's verdict on whether the longest one is
        worth restoring."""
        self.word = Word.RESTORE
        if not self.restores:
            return []
        full = next(transfer for transfer in transfers if transfer.name == PoolName.KV)
        keys = keys_of(full)
        lengths = self._pools.restorable_for(rid, keys)
        if lengths and self._rank.settings.break_even:
            self.word = self._word(keys[: lengths[-1]])
        elif lengths and not self._pools.here(keys[: lengths[-1]]):
            self.word = Word.SHARED
        return lengths

    def _word(self, keys: PageKeys) -> Word:
        tokens, staged = len(keys) * self.page_size, self._pools.staged_for(keys)
        if (shared_s := self._pools.shared_takes_s(keys)) is not None:
            word = self._rank.break_even.word_of_shared(self._cached, tokens, 0.0 if staged else shared_s)
            if word is Word.COMPUTE:
                self._pools.measure_shared()
            return word
        if staged:
            return Word.STAGED
        return self._rank.break_even.word(self._cached, tokens, self._pools.read_bytes(len(keys)))

    def computes(self, rid: str, pages: int, word: int) -> bool:
        """Whether to compute a request's ``pages`` stored pages because that is faster, decided from what all ranks
        have agreed on (`BreakEven`)."""
        return self._rank.break_even.computes(rid, pages, word)

    def load(self, rid: str, transfers: list[PoolTransfer]) -> bool:
        return self._rank.off is None and self._pools.load(rid, transfers)

    def cancel_queued_load(self, rid: str) -> bool:
        return self._pools.cancel(rid)

    def start_layer_wise_loading(self) -> int:
        return self._pools.start(self._device_events())

    def finish_layer_wise_loading(self, counter_index: int) -> bool:
        found = self.finish(counter_index)
        if found.writing:
            self.quarantine(found)
        return not found.failed

    def finish(self, counter_index: int) -> Finished:
        """Wait like `finish_layer_wise_loading`, but tell which requests failed instead of whether one did, and what
        was restored."""
        found = self._pools.finish(counter_index)
        if (restored := found.restored) is not None:
            for rid, of_request in restored.requests.items():
                logger.info(
                    "agentstate: restored %d tokens for %s, %.1f MB in %.1f ms (%.2f GB/s), source %s",
                    of_request.pages * self.page_size,
                    rid,
                    of_request.n_bytes / 1e6,
                    restored.seconds * 1e3,
                    of_request.n_bytes / 1e9 / restored.seconds,
                    " and ".join(sorted(of_request.sources)),
                )
            if self._rank.metrics is not None:
                self._rank.metrics.restored(restored)
        return found

    def trail(self, counter_index: int) -> bool:
        """Whether a batch's forward, which is over, has read nothing but good pages, and the rest of them follows
        (`StoredPools.trail`). `finish` is still to come."""
        return self._pools.trail(counter_index)

    def trailed(self, counter_index: int) -> bool:
        """Whether `finish` of a batch that trails is due: it would not wait, or something of the batch is bad."""
        return self._pools.failing(counter_index) or self._pools.landed(counter_index)

    def quarantine(self, found: Finished) -> None:
        """Quarantine a batch's device pages until `release_quarantine`: a pending read on some rank may still write to
        them."""
        logger.warning(_QUARANTINED)
        self._pools.quarantine(found.numbers)

    def release_quarantine(self) -> None:
        """End the quarantine of device pages."""
        logger.warning("agentstate: the drive has answered; the quarantine of device pages is over")
        self._pools.release_quarantine()

    def stepped(self, parts: Sequence[tuple[int, int]], seconds: float, restored: Restored | None) -> None:
        """A step of the engine took ``seconds``. ``parts`` tells, for each of its requests, how many tokens it had and
        how many new ones were computed; ``restored`` is what the step restored."""
        if restored is None:
            self._rank.break_even.stepped(parts, seconds)
        elif restored.sources == {Source.COLD}:
            self._rank.break_even.restored(parts, seconds, restored.n_bytes, restored.waited_s)

    def inserting(self, rid: str) -> None:
        """What is offered from now on is of this request: the offers do not say."""
        self._inserting = rid

    def offload(self, transfers: list[PoolTransfer], session_id: str | None = None) -> bool:
        """Queue pages that a request has computed, or used first. They are charged to the account of its turn, if its
        ``session_id`` proves one."""
        if self._rank.off is not None:
            return False
        session = None if session_id is None else RequestSession(session_id)
        turn = None if session is None else self.turn(session)
        owner = "" if turn is None else turn.account
        session_id = None if session is None else str(session)
        return self._pools.offer(transfers, self._device_events, session_id, owner, self._inserting)

    def num_completed_offloads(self) -> int:
        return self._pools.results

    def pop_completed_offload(self) -> bool:
        return self._pools.pop_result()

    @property
    def demotes(self) -> bool:
        """Whether there is a host tier to copy to."""
        return self._rank.off is None and self._pools.host_tier is not None

    def demote(self, transfers: list[PoolTransfer], session_id: str | None = None) -> bool:
        """Copy pages that are about to leave the device to the host tier, if there is one (`StoredPools.demote`)."""
        return self.demotes and self._pools.demote(transfers, self._device_events, session_id)

    def num_demoted(self) -> int:
        """How many demotions are over whose result has not been taken."""
        return self._pools.demoted

    def pop_demoted(self) -> bool:
        """Take the result of the oldest demotion: whether all of its pages are in host memory."""
        return self._pools.pop_demoted()

    def turn(self, session: RequestSession) -> Turn | None:
        """The turn that a request belongs to; None without a valid token."""
        return self._rank.sessions.turn(session)

    def request_finished(self, turn: Turn, key: RadixKey) -> None:
        """A request of a turn has ended with the tokens of ``key`` in the tree."""
        self._rank.sessions.finished(turn, key)

    # Before a request is admitted, and beside those that run.

    def read_ahead(self, rid: str, keys: Sequence[bytes]) -> None:
        """Begin to read what a waiting request is going to load."""
        if self._rank.off is None:
            self._pools.read_ahead(rid, keys)

    def tidy(self, queued: Callable[[], Collection[str]]) -> None:
        """Drop what is kept for requests that are no longer ``queued``."""
        self._pools.tidy(queued)
        self._rank.break_even.tidy(queued)

    @property
    def shares(self) -> bool:
        """Whether there is a store that engines share."""
        return self._pools.share is not None

    @property
    def retired(self) -> bool:
        """Whether stored pages must no longer be used."""
        return self._rank.off is not None

    @property
    def fingerprint(self) -> bytes | None:
        """What this rank's pages are valid for, 32 bytes; None where it stores none."""
        return self._rank.fingerprint

    @property
    def restores(self) -> bool:
        """Whether anything can be restored: neither once it is retired, nor while the drive does not answer."""
        return self._rank.off is None and not self.stuck

    @property
    def stuck(self) -> bool:
        """Whether a drive that did not answer in time still does not: it may still write to device pages."""
        return self._pools.stuck

    @property
    def quarantines_pages(self) -> bool:
        """Whether device pages are in quarantine."""
        return self._pools.quarantines

    def preload(
        self, rid: str, keys: Sequence[bytes], slots: Mapping[PoolName, torch.Tensor], need: Need = DEMAND
    ) -> int:
        """Load pages for no request that runs, into slots that the caller owns, of each pool of the tree. Returns the
        number of a batch, for `landed` and `finish`."""
        return self._pools.preload(rid, keys, slots, self._device_events(), need)

    def can_restore(self, keys: Sequence[bytes]) -> bool:
        """Whether all of ``keys`` can be restored now, after the pages before them."""
        return self._pools.restorable(keys)[-1:] == [len(keys)]

    def hasten(self, batch: int, need: Need) -> None:
        """Let a preload be as urgent as ``need``, if it is less so."""
        self._pools.hasten(batch, need)

    def is_queued(self, batch: int) -> bool:
        """Whether a preload has not begun, because the drive, which answers, is busy with others before it."""
        return not self.stuck and self._pools.is_queued(batch)

    def landed(self, batch: int) -> bool:
        """Whether `finish` would not wait."""
        return self._pools.landed(batch)

    def layers_landed(self, batch: int) -> int:
        """How many layers of a batch have arrived or failed."""
        return self._pools.layers_landed(batch)

    def abandon(self, batch: int) -> None:
        """Let nobody wait for a batch any more: `finish` returns at once, and the batch has failed."""
        self._pools.abandon(batch)

    def quarantine_slots(self, slots: Mapping[PoolName, torch.Tensor]) -> None:
        """Like `quarantine`, for the slots of a preload that some rank may still write to."""
        logger.warning(_QUARANTINED)
        self._pools.quarantine_slots(slots)

    def bring(self, session_id: str) -> Callable[[], dict[str, Any]]:
        """Begin to bring a session to the device: what tells how far that is. From any thread."""
        return self._rank.sessions.prefetch(session_id, "device", None, planned=True)

    def pin(self, session_id: str, for_s: float) -> None:
        """Pin a session to the device for so long. Not for the scheduler's thread: it may ask SQL and the stores."""
        self._rank.pinning.pin(session_id, "device", for_s)

    def n_bytes(self, pages: int) -> int:
        """The bytes that restoring a prefix of so many pages brings to the device, on one rank."""
        return self._pools.n_bytes(pages)

    def stored(self, transfers: Sequence[PoolTransfer]) -> bool:
        """Whether all of these pages are stored."""
        return self._pools.stored(transfers)

    def changes(self) -> Changes:
        """What is told from now on which pages leave this rank's store, and which come to the shared one or leave
        it (`StoredPools.changes`)."""
        return self._pools.changes()

    def places(self, keys: Sequence[bytes]) -> list[tuple[bool, bool]]:
        """Of each of ``keys`` whether it is in this rank's store, and in the shared one: nothing is once pages must no
        longer be used."""
        return [(False, False)] * len(keys) if self.retired else self._pools.places(keys)

    @property
    def suspended(self) -> bool:
        """Whether pages are not used for now, because weights are being updated."""
        return self._rank.suspended

    @property
    def lost(self) -> int:
        """How many pages that were stored have been lost since the start."""
        return self._pools.lost

    def drain(self) -> None:
        """Wait until nothing reads or writes device memory."""
        self._pools.drain()

    def reset(self) -> None:
        """Quiesce for a flush of the device cache. What is stored stays stored."""
        self._pools.reset()
        if self.quarantines_pages:
            self.release_quarantine()

    def _device_events(self) -> Sequence[torch.Event]:
        """Events after which everything launched so far has read and written its device pages. A CPU launches nothing:
        its forwards are over when they return."""
        return self.record_offload_ready() if self._pools.device.type != "cpu" else ()
