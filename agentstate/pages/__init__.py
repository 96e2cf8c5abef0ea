"""The page store: KV pages in extent files on a local disk, one store a rank of an engine.

`PageStore` is the room's whole surface for one rank: which pages are stored (`prefix_length`), writing a run of them
(`draft`, `publish`) and finding them again (`segments`). `LayerwiseReader` streams what was found, layer by layer,
through a bounded staging memory. `Verifier` says which of the bytes that came back may be used.
"""

from agentstate.pages.extent import ExtentDraft, ExtentHeader, Geometry
from agentstate.pages.fingerprint import fingerprint, weights_digest
from agentstate.pages.reading import Chunk, LayerwiseReader, ReadRequest, Verifier
from agentstate.pages.store import PageStore, Segment, StoreStats

__all__ = [
    "Chunk",
    "ExtentDraft",
    "ExtentHeader",
    "Geometry",
    "LayerwiseReader",
    "PageStore",
    "ReadRequest",
    "Segment",
    "StoreStats",
    "Verifier",
    "fingerprint",
    "weights_digest",
]
