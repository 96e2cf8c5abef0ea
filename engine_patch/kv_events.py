"""SGLang's KV events for what is stored: DISK for a rank's own store, EXTERNAL for the one that engines share.

A router indexes blocks by their hashes, so a stored page is told with the hash, the parent, the tokens and the
namespace that SGLang's own events for the device have: they come from SGLang's recorder. A page's key does not say its
tokens. So a page is told once the tree has offered it, be it new or stored long ago, and as long as it is remembered:
what subscribers have been told is what is remembered here, and nothing else.

All of this runs on the scheduler's thread, a bounded number of pages a step, and looks in memory only.
"""

from __future__ import annotations

from array import array
from collections import OrderedDict, deque
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import islice, pairwise
from typing import Any, Protocol

from agentstate.pages import Changes, PageKeys
from engine_patch.sglang_api import (
    AllBlocksCleared,
    BlockRemoved,
    BlockStored,
    KVCacheEventRecorder,
    RadixKey,
    StorageMedium,
)

_MEDIA = StorageMedium.DISK, StorageMedium.EXTERNAL
_NOWHERE = False, False
# Bound of what is remembered: of pages of 64 tokens, 410,000.
_MOST_BYTES = 256 << 20
_PAGE_BYTES, _TOKEN_BYTES = 400, 4
# How many are looked at in a step: some milliseconds.
_MOST_LOOKS = 1024
_MOST_DIGESTS = 4096


class Storage(Protocol):
    """What is asked of the linker."""

    @property
    def suspended(self) -> bool: ...
    def changes(self) -> Changes: ...
    def places(self, keys: Sequence[bytes]) -> list[tuple[bool, bool]]: ...


@dataclass(slots=True)
class _Page:
    """How a page is told. ``told``: in which of `_MEDIA`. ``offers`` of it are not answered yet. Of ``bigrams``,
    ``tokens`` has the token after the page as well."""

    block: int
    parent: int | None
    tokens: array[int]
    salt: str | None
    lora: str | None
    bigrams: bool = False
    told: tuple[bool, bool] = _NOWHERE
    offers: int = 0


@dataclass(slots=True)
class _Node:
    """A node as SGLang's recorder looks at one."""

    key: RadixKey
    hash_value: list[str]
    parent: _Node | None
    event_hash_value: list[str] | None = None


class KvEvents:
    """The tree's own events pass through `take`, which adds those of what is stored. ``tree`` is SGLang's tree core."""

    def __init__(self, tree: Any, storage: Storage, params: Any):
        self._tree = tree
        self._storage = storage
        self._changes = storage.changes()
        self._page_size: int = params.page_size
        self._most_pages = max(1, _MOST_BYTES // (_PAGE_BYTES + _TOKEN_BYTES * self._page_size))
        self._recorder, self._namer = (
            KVCacheEventRecorder(
                enabled=True,
                page_size=params.page_size,
                dynamo_format=params.dynamo_kv_event_format,
                lora_names=params.kv_event_lora_names,
            )
            for _ in range(2)
        )
        # Oldest first.
        self._pages: OrderedDict[bytes, _Page] = OrderedDict()
        self._offers: deque[PageKeys] = deque()
        # The keys of pages that are to be looked at, in order.
        self._looks: OrderedDict[bytes, None] = OrderedDict()
        # The digests behind block hashes, where those are not the keys': of nodes' last pages, by their keys.
        self._digests: dict[bytes, str] = {}

    def offered(self, node_id: int) -> None:
        """The tree has offered a node's pages to be stored, and waits for the answer."""
        keys = self._remember(node_id)
        for key in keys:
            self._pages[key].offers += 1
        self._offers.append(keys)
        while len(self._pages) > self._most_pages:
            _, page = self._pages.popitem(last=False)
            self._forget(page)

    def answered(self, offers: int) -> None:
        """The tree has the answers for so many offers, the oldest ones: what is stored of them is told."""
        for _ in range(offers):
            keys = self._offers.popleft()
            for key in keys:
                if (page := self._pages.get(key)) is not None:
                    page.offers = max(0, page.offers - 1)
            self._note(keys)

    def reset(self) -> None:
        """The tree expects no answers any more."""
        self.answered(len(self._offers))

    def look_again(self) -> None:
        """Anything may have changed."""
        self._changes.note_any()

    def take(self, events: list[Any]) -> list[Any]:
        """``events`` of the tree, with those for what is stored."""
        for event in events:
            if isinstance(event, BlockStored) and event.session_id is not None:
                # No string of a kind of its own can be encoded.
                event.session_id = str(event.session_id)
            elif isinstance(event, AllBlocksCleared):
                # Whoever hears it forgets what is stored as well.
                self._tell_all_anew()
        if self._storage.suspended:
            return events
        changed = self._changes.take()
        if changed is None:
            self._looks = OrderedDict.fromkeys(self._pages)
        else:
            self._note(changed)
        if self._looks:
            self._look()
        told = self._recorder.take()
        return [*events, *told] if told else events

    def _note(self, keys: Iterable[bytes]) -> None:
        self._looks.update((key, None) for key in keys if key in self._pages)

    def _tell_all_anew(self) -> None:
        self._recorder.take()
        for page in self._pages.values():
            page.told = _NOWHERE
        self.look_again()

    def _look(self) -> None:
        """Tell what has changed of the next pages that are to be looked at."""
        some = [self._looks.popitem(last=False)[0] for _ in range(min(_MOST_LOOKS, len(self._looks)))]
        keys = [key for key in some if key in self._pages]
        pages = [self._pages[key] for key in keys]
        places = self._storage.places(keys)
        for at, medium in enumerate(_MEDIA):
            for page, place in zip(pages, places, strict=True):
                if place[at] and not page.told[at]:
                    self._recorder.enqueue(self._stored(page, medium))
            for page, place in zip(pages, places, strict=True):
                if page.told[at] and not place[at]:
                    self._recorder.enqueue(BlockRemoved(block_hashes=[page.block], medium=medium))
        for key, page, place in zip(keys, pages, places, strict=True):
            page.told = place
            if place == _NOWHERE and not page.offers:
                del self._pages[key]

    def _stored(self, page: _Page, medium: StorageMedium) -> BlockStored:
        tokens = list(pairwise(page.tokens)) if page.bigrams else page.tokens.tolist()
        return BlockStored(
            block_hashes=[page.block],
            parent_block_hash=page.parent,
            token_ids=tokens,
            block_size=len(tokens),
            lora_id=None,
            medium=medium,
            cache_salt=page.salt,
            lora_name=page.lora,
        )

    def _forget(self, page: _Page) -> None:
        for told, medium in zip(page.told, _MEDIA, strict=True):
            if told:
                self._recorder.enqueue(BlockRemoved(block_hashes=[page.block], medium=medium))

    # Which pages a node has, and how they are told

    def _remember(self, node_id: int) -> PageKeys:
        """The keys of a node's pages, which are remembered now; none where they could not be told."""
        snapshot = self._tree.snapshot_buffer_backup(node_id, False)
        if snapshot is None:
            return PageKeys()
        keys = PageKeys.from_hex(snapshot.hash_values)
        if not all(key in self._pages for key in keys):
            if (node := self._node(snapshot)) is None:
                return PageKeys()
            for key, page in zip(keys, self._paged(node, keys), strict=True):
                self._pages.setdefault(key, page)
        return keys

    def _paged(self, node: _Node, keys: PageKeys) -> Iterator[_Page]:
        self._namer.record_store(node)
        if node.event_hash_value:
            self._digests[keys[-1]] = node.event_hash_value[-1]
            if len(self._digests) > _MOST_DIGESTS:
                del self._digests[next(iter(self._digests))]
        bigrams = node.key.is_bigram
        for event in self._namer.take():
            parent, tokens = event.parent_block_hash, iter(event.token_ids)
            for block in event.block_hashes:
                own = list(islice(tokens, self._page_size))
                if bigrams:
                    own = [*(first for first, _ in own), own[-1][1]]
                yield _Page(block, parent, array("i", own), event.cache_salt, event.lora_name, bigrams)
                parent = block

    def _node(self, snapshot: Any) -> _Node | None:
        """A node, with as much before it as its hashes depend on; None where that is not on the device."""
        below = []
        key = snapshot.key
        namespaced = key.extra_key is not None or key.cache_salt is not None
        parent = _Node(RadixKey(array("q")), [], None)
        while not snapshot.parent_is_root:
            digest = self._digests.get(bytes.fromhex(snapshot.parent_last_hash))
            if digest is not None or not namespaced:
                parent = _Node(key, [snapshot.parent_last_hash], parent, None if digest is None else [digest])
                break
            below.append(snapshot)
            snapshot = self._tree.snapshot_buffer_backup(snapshot.parent_node_id, False)
            if snapshot is None:
                return None
        for one in (snapshot, *reversed(below)):
            parent = _Node(one.key, one.hash_values, parent)
        return parent
