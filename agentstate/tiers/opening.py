"""Which tier a URL or the settings mean."""

from __future__ import annotations

from pathlib import Path
from urllib.parse import unquote, urlsplit

from agentstate.errors import SettingsError
from agentstate.settings import Settings
from agentstate.tiers.clock import Clock
from agentstate.tiers.directory import DirectoryTier
from agentstate.tiers.extents import SharedExtents
from agentstate.tiers.guard import Guard, Policy
from agentstate.tiers.mac import StoreKeys
from agentstate.tiers.objects import ObjectTier, open_store

OBJECT_STORES = ("s3", "gs", "az", "memory")


def tier(url: str, *, policy: Policy | None = None, clock: Clock | None = None) -> Guard:
    """The tier at ``file:///DIRECTORY``, ``s3://BUCKET/PREFIX``, ``gs://BUCKET/PREFIX`` or
    ``az://ACCOUNT/CONTAINER/PREFIX``, behind a guard; ``memory://`` is a new one that ends with the process.

    Nothing is asked for yet. Raises SettingsError for a URL of another kind, or with credentials in it: they come from
    the environment, as the store's own tools take them.
    """
    parts = urlsplit(url)
    if "@" in parts.netloc or parts.query or parts.fragment:
        raise SettingsError(
            "AGENTSTATE_SHARED_STORE: no credentials and no options in the URL; set them as AWS_*, GOOGLE_* or AZURE_*"
        )
    if parts.scheme == "file":
        if parts.netloc not in ("", "localhost") or not parts.path.startswith("/"):
            raise SettingsError(f"AGENTSTATE_SHARED_STORE={url}: write file:///DIRECTORY, with three slashes")
        return Guard(DirectoryTier(Path(unquote(parts.path))), url, policy, clock)
    if parts.scheme in OBJECT_STORES:
        return Guard(ObjectTier(open_store(url), url), url, policy, clock)
    raise SettingsError(f"AGENTSTATE_SHARED_STORE={url}: write file:///…, s3://…, gs://… or az://…")


def shared_extents(settings: Settings) -> SharedExtents | None:
    """The shared store that the settings name, or None. Raises SettingsError."""
    if not settings.shared_store:
        return None
    key = settings.store_key.get_secret_value()
    keys = StoreKeys(key) if key else None
    return SharedExtents(tier(settings.shared_store), keys, settings.shared_codec)
