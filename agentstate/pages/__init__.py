"""The page store: KV pages in extent files on a local disk, one store a rank of an engine.

`PageStore` is the room's whole surface for one rank: which pages are stored (`prefix_length`), writing a run of them
(`draft`, `publish`), finding them again and keeping them where they are (`pin`), and what to do when space runs out
(`Quota`, `need`, `retain`, `release`). `Writer` fills one extent while the one before it is published.
`LayerwiseReader` opens a `Stream` of what is pinned, layer by layer, through a bounded staging memory that a
`ReadBackend` reads into, or straight to a `Destination`; every `Chunk` says which of its pages may be used. `RowReader`
reads single rows of pages, verified, to `RowMemory`, where the store that wrote them was to make that possible. `merge`
makes one extent of many small ones. `StoreView` reads a store that another process writes, and `Replicas` all those
that have the same pages.
"""

from agentstate.pages.backends import KvikioBackend, PosixBackend, ReadBackend, staging_memory
from agentstate.pages.changes import Changes
from agentstate.pages.eviction import ANYONE
from agentstate.pages.extent import ExtentDraft, ExtentHeader, Geometry
from agentstate.pages.fingerprint import configuration, fingerprint, tensor_names, weights_digest
from agentstate.pages.keys import PageKeys
from agentstate.pages.merging import merge
from agentstate.pages.pins import Pin, Segment
from agentstate.pages.reading import (
    AWAITED,
    DEMAND,
    PLANNED,
    READ_THREADS,
    Chunk,
    Destination,
    LayerwiseReader,
    Need,
    Part,
    Stream,
    Urgency,
)
from agentstate.pages.replicas import Replicas, stores_beside
from agentstate.pages.rows import RowMemory, RowReader, RowsRead, RowStream
from agentstate.pages.space import Quota, Space, StoreStats
from agentstate.pages.store import PageStore
from agentstate.pages.view import StoreView
from agentstate.pages.writing import Writer

__all__ = [
    "ANYONE",
    "AWAITED",
    "DEMAND",
    "PLANNED",
    "READ_THREADS",
    "Changes",
    "Chunk",
    "Destination",
    "ExtentDraft",
    "ExtentHeader",
    "Geometry",
    "KvikioBackend",
    "LayerwiseReader",
    "Need",
    "PageKeys",
    "PageStore",
    "Part",
    "Pin",
    "PosixBackend",
    "Quota",
    "ReadBackend",
    "Replicas",
    "RowMemory",
    "RowReader",
    "RowStream",
    "RowsRead",
    "Segment",
    "Space",
    "StoreStats",
    "StoreView",
    "Stream",
    "Urgency",
    "Writer",
    "configuration",
    "fingerprint",
    "merge",
    "staging_memory",
    "stores_beside",
    "tensor_names",
    "weights_digest",
]
