"""Tiers: stores that engines share, and whole extents in them.

`tier` opens one by its URL: a directory that is mounted on every machine (`DirectoryTier`), or a bucket (`ObjectTier`),
both behind a `Guard`, with time-outs, second attempts and a breaker. `Tier` says what all of them promise.
`SharedExtents` names extents, signs them, and checks what it reads of them; `shared_extents` opens it by the settings.
Which extents there are says the catalogue in SQL, `agentstate.fleet.extents`.
"""

from agentstate.tiers.directory import DirectoryTier
from agentstate.tiers.extents import Published, SharedExtents
from agentstate.tiers.guard import Guard, Policy
from agentstate.tiers.interface import Entry, ExtentName, Page, Range, Reading, Tier
from agentstate.tiers.mac import StoreKeys
from agentstate.tiers.measured import Figures
from agentstate.tiers.objects import ObjectTier
from agentstate.tiers.opening import shared_extents, tier

__all__ = [
    "DirectoryTier",
    "Entry",
    "ExtentName",
    "Figures",
    "Guard",
    "ObjectTier",
    "Page",
    "Policy",
    "Published",
    "Range",
    "Reading",
    "SharedExtents",
    "StoreKeys",
    "Tier",
    "shared_extents",
    "tier",
]
