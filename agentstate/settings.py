"""The settings of every AgentState process, read from ``AGENTSTATE_*`` environment variables.

There is no global: a process builds ``Settings()`` where it starts and passes it, or the values it needs, down.
"""

from __future__ import annotations

import logging
import re
from functools import cache
from pathlib import Path
from typing import Any, Literal

from pydantic import ByteSize, Field, SecretStr, ValidationError, field_validator
from pydantic_settings import BaseSettings, SettingsConfigDict

from agentstate.errors import SettingsError

logger = logging.getLogger(__name__)

MIB = 1024 * 1024
# The owner of sessions while calls need no key.
DEFAULT_TENANT = "default"
DEFAULT_PORT = 8700
# What Kubernetes sets in every container, as NAME_PORT, for a Service called NAME.
_SERVICE_LINK = re.compile(r"(tcp|udp|sctp)://\S+:\d{1,5}")
# The settings that an engine reads: its places and its limits.
ENGINE_PLACES = (
    "home",
    "database_url",
    "pages_dir",
    "pages_siblings",
    "control_address",
    "engine_base_url",
    "engine_python",
)
ENGINE_LIMITS = (
    "pages_quota",
    "pages_free_fraction",
    "writes_per_day",
    "one_shots",
    "pages_codec",
    "staging_bytes",
    "spill_staging_bytes",
    "host_bytes",
    "spill_queue_bytes",
    "read_backend",
    "native",
    "read_threads",
    "drive_timeout_s",
    "break_even",
    "read_ahead",
    "read_priorities",
    "choice",
    "preload_bytes",
    "queue_aging_s",
    "foresight",
    "prefetch_ttl_s",
    "heartbeat_interval_s",
)


class Settings(BaseSettings):
    """One process's settings. Sizes may be written with a unit in the environment (``512MiB``).

    Raises SettingsError, naming every invalid variable.
    """

    model_config = SettingsConfigDict(
        env_prefix="AGENTSTATE_", env_ignore_empty=True, frozen=True, extra="forbid", hide_input_in_errors=True
    )

    home: Path = Field(
        Path("~/.local/share/agentstate"),
        description="Directory of all AgentState data, unless a more specific setting says otherwise.",
    )
    database_url: str = Field(
        "", description="SQLite or PostgreSQL URL. Empty: the SQLite file agentstate.db in the home directory."
    )
    pages_dir: Path | None = Field(
        None, description="Directory of the KV pages, best on a local NVMe drive. Default: pages in the home directory."
    )
    pages_siblings: str = Field(
        "",
        description="Page directories of other engines on this machine, separated by colons, or patterns such as "
        "/var/pages/*: what engines of the same weights have stored there is restored, and not written again. The own "
        "directory may be among them. Empty: none. The same on all ranks.",
    )
    cache_dir: Path = Field(
        Path("~/.cache/agentstate"), description="Directory of files that can be downloaded or rebuilt."
    )
    host: str = Field("127.0.0.1", description="Address that the HTTP service listens on.")
    port: int = Field(DEFAULT_PORT, ge=0, le=65535, description="Port of the HTTP service; 0 takes a free one.")
    workers: int = Field(
        1, ge=1, le=64, description="Processes of the service that answer requests: about as many as it has cores."
    )
    log_level: str = Field("info", pattern="^(debug|info|warning|error)$", description="debug, info, warning or error.")
    log_format: str = Field("text", pattern="^(text|json)$", description="text, or json: one object per line.")
    otlp_endpoint: str = Field(
        "",
        description="OpenTelemetry collector (OTLP over HTTP) for traces, e.g. http://127.0.0.1:4318. Empty: none.",
    )
    console: bool = Field(True, description="Whether the service has a console, at /: on or off.")
    requests_per_s: float = Field(
        0, ge=0, description="Requests per second of a tenant to one service; twice that in a burst. 0: no limit."
    )
    collect_interval_s: float = Field(
        300, ge=0, description="Seconds between the service's deletions of rows that no session reaches. 0: never."
    )
    expired_retention_s: float = Field(
        24 * 3600, ge=0, description="How long an expired session answers 410 instead of 404."
    )
    lease_ttl_s: float = Field(
        60, gt=0, description="Default lifetime of a lease, if a resume sets none; a lease can be renewed."
    )
    foresight: bool = Field(
        True,
        description="Whether the service learns how long sessions wait and tells engines, and whether an engine makes "
        "use of that: what is worth least leaves the device first, and what is needed soon is brought back. off: the "
        "least recently used leaves first.",
    )
    pin_max_s: float = Field(
        24 * 3600, gt=0, le=10 * 365 * 24 * 3600, description="The longest that a session's KV may be pinned at once."
    )
    engine_api_key: SecretStr = Field(
        SecretStr(""), description="The key that engines want of the gateway: their --api-key. Empty: none."
    )
    gateway_guess: bool = Field(
        True,
        description="Whether the gateway finds the session of a request that names none: by the ids that agents send, "
        "and by its messages: on or off.",
    )
    gateway_expires_s: float = Field(
        7 * 24 * 3600,
        gt=0,
        description="How long a session that no client has named is kept after its last turn.",
    )
    gateway_store: bool = Field(
        False, description="Whether the gateway keeps the transcript of chat completions and messages: on or off."
    )
    gateway_wait_s: float = Field(
        0,
        ge=0,
        description="How long a request waits for a session that it names and that is being run, before it gets 409.",
    )
    gateway_streams: int = Field(
        0, ge=0, description="Turns of a tenant that may run at once through one gateway. 0: no limit."
    )
    gateway_body_bytes: ByteSize = Field(
        ByteSize(64 * MIB), gt=0, description="Limit of the body of a request to the gateway."
    )
    gateway_silence_s: float = Field(
        1800, gt=0, description="How long an engine may send nothing before the gateway gives a request up."
    )
    gateway_fail_open: bool = Field(
        True,
        description="Whether the gateway goes on without sessions while the database does not answer, for the keys "
        "that it knew within the hour: on or off.",
    )
    gateway_strip: bool = Field(
        True,
        description="Whether the gateway takes out of prompts what some agents change with every request, so that no "
        "page would ever match: on or off.",
    )
    heartbeat_interval_s: float = Field(
        2.0, gt=0, description="Seconds between an engine's heartbeats to the database."
    )
    engine_timeout_s: float = Field(
        10.0, gt=0, description="An engine whose last heartbeat is older than this is not live."
    )
    staging_bytes: ByteSize = Field(
        ByteSize(512 * MIB),
        gt=0,
        description="Memory of an engine rank for restoring pages: on the host, or with kvikio on the GPU.",
    )
    host_bytes: ByteSize | None = Field(
        None,
        ge=0,
        description="Host memory of an engine rank for pages that have left the device, pinned on a GPU. 0: none. "
        "Empty: none on a CPU; on a GPU an eighth of the machine's memory, divided among its ranks.",
    )
    pages_quota: ByteSize | None = Field(
        None,
        gt=0,
        description="Limit of the page directory for an engine: its own pages, and those that engines of "
        "other weights or layouts left, which are evicted first. Divided among its ranks. Empty: until "
        "the disk is full.",
    )
    pages_free_fraction: float = Field(
        0.05, ge=0, lt=1, description="Fraction of the pages' disk to keep free by evicting the least recently used."
    )
    pages_codec: Literal["raw", "lossless"] = Field(
        "raw",
        description="How pages are written to the drive. raw: as they are. lossless: KV in bfloat16 takes three "
        "quarters of its bytes, and comes back bit by bit, for a drive that is slow or small. With kvikio always raw.",
    )
    writes_per_day: ByteSize | None = Field(
        None,
        gt=0,
        description="Bytes that an engine may write to the pages' drive in 24 hours. Beyond that only what sessions "
        "compute is stored. Divided among its ranks. Empty: no limit.",
    )
    one_shots: bool = Field(
        True,
        description="Whether what requests without a session compute is stored at once: on; or, with off, only those "
        "pages that a second request has used.",
    )
    spill_queue_bytes: ByteSize = Field(
        ByteSize(1024 * MIB),
        gt=0,
        description="Limit of a rank's pages that wait to be written; also no more than half of each KV pool and a "
        "quarter of the recurrent states. Pages beyond it are not stored for now. The same on all ranks.",
    )
    spill_staging_bytes: ByteSize = Field(
        ByteSize(256 * MIB), gt=0, description="Host memory of an engine rank for spilling pages."
    )
    read_threads: int | None = Field(
        None,
        ge=1,
        description="Threads of an engine rank that read pages. By default 4, or 2 if they read straight into the "
        "KV pool: more would slow the concurrent forward by more than they gain.",
    )
    drive_timeout_s: float = Field(
        30.0,
        gt=0,
        le=86_400,
        description="How long the pages' drive may take for a layer that a forward waits for, or for an extent. After "
        "that, waiting requests are recomputed and waiting pages are not stored.",
    )
    read_backend: Literal["posix", "kvikio"] = Field(
        "posix",
        description="Backend that reads pages: posix into host memory, or kvikio (GPUDirect Storage) into GPU memory.",
    )
    native: bool = Field(
        True,
        description="Whether pages are read and verified by the native extension, where it is built; off: by Python, "
        "which is slower.",
    )
    break_even: bool = Field(
        True,
        description="Whether an engine recomputes short stored prefixes if it has measured that to be faster than "
        "restoring them: on or off.",
    )
    read_ahead: bool = Field(
        True,
        description="Whether to read the pages of a queued request before it is admitted: on or off, the same on all "
        "ranks.",
    )
    read_priorities: bool = Field(
        True,
        description="Whether prefetches and preloads are read in the order in which they are needed: first what a "
        "queued request needs, then what is due, by its time. off: in the order in which they were asked for.",
    )
    choice: bool = Field(
        False,
        description="Whether a forward waits only for those rows of a restored prefix that its attention chooses, of a "
        "model with an index, and the others follow behind the first token: on or off. Where that cannot be exact, "
        "prefixes are restored whole.",
    )
    preload_bytes: ByteSize = Field(
        ByteSize(256 * MIB),
        ge=0,
        description="A request that restores at least this much per rank is deferred while others run, until its pages "
        "are on the device, so that the others do not wait for the drive. 0: never. The same on all ranks.",
    )
    queue_aging_s: float = Field(
        10.0,
        ge=0,
        description="Queued requests are admitted in the order of how much of their KV is not on the device, the least "
        "first; one that has waited this long goes first. 0: in order of arrival. The same on all ranks.",
    )
    prefetch_ttl_s: float = Field(
        60.0,
        gt=0,
        description="How long prefetched pages stay in staging for the next request, where there is no host tier.",
    )
    shared_store: str = Field(
        "",
        description="A store that engines share: file:///DIRECTORY, s3://BUCKET/PREFIX, gs://… or az://…, with "
        "credentials from AWS_*, GOOGLE_* or AZURE_*. Empty: none. The same on all ranks.",
    )
    share: Literal["through", "suspend", "evict"] = Field(
        "suspend",
        description="What is published in the shared store. through: all that an engine stores, as soon as it is "
        "stored. suspend: a session's KV when its turn has ended. evict: what somebody may come back for, when the "
        "drive is about to evict it.",
    )
    promote: Literal["first", "second"] = Field(
        "first",
        description="When the drive stores what a request without a session has restored from the shared store: at its "
        "first use, or at its second by another request. A session's KV it stores at once.",
    )
    shared_reads: int = Field(
        8,
        ge=1,
        le=64,
        description="How many reads of an engine rank the shared store is asked for at once, of each device pool.",
    )
    shared_codec: Literal["raw", "lossless"] = Field(
        "lossless",
        description="How pages are written to the shared store. lossless: KV in bfloat16 takes three quarters of its "
        "bytes, and comes back bit by bit. raw: as it is, which releases before this one can read too.",
    )
    shared_keep_s: float = Field(
        7 * 24 * 3600.0,
        ge=0,
        description="How long the shared store keeps what no session's KV needs and no engine reads.",
    )
    store_key: SecretStr = Field(
        SecretStr(""),
        description="Key of at least 32 characters that extents in the shared store are signed with, or a new and an "
        "old one with a comma between them. Empty: none are signed, and any are read.",
    )
    control_address: str = Field(
        "tcp://127.0.0.1:*", description="ZeroMQ address that an engine rank binds its control endpoint to."
    )
    engine_base_url: str = Field(
        "",
        description="OpenAI base URL that an engine registers for clients. Empty: derived from its host and port.",
    )
    engine_python: Path | None = Field(None, description="Python interpreter of the environment that has SGLang.")

    def __init__(self, **values: Any):
        try:
            super().__init__(**values)
        except ValidationError as error:
            # The message omits the value: it may be a URL with a password.
            wrong = "; ".join(
                f"AGENTSTATE_{'_'.join(str(part) for part in item['loc']).upper()}: {item['msg']}"
                for item in error.errors(include_input=False, include_url=False)
            )
            raise SettingsError(wrong) from None

    @field_validator("port", mode="before")
    @classmethod
    def _ignore_service_link(cls, port: Any) -> Any:
        if isinstance(port, str) and _SERVICE_LINK.fullmatch(port.strip()):
            _say_once(
                f"AGENTSTATE_PORT={port.strip()} is what Kubernetes sets for a Service named agentstate, and no port: "
                f"{DEFAULT_PORT} is taken. Set enableServiceLinks: false, or AGENTSTATE_PORT"
            )
            return DEFAULT_PORT
        return port

    @field_validator("home", "pages_dir", "cache_dir", "engine_python")
    @classmethod
    def _expand_user(cls, path: Path | None) -> Path | None:
        return None if path is None else path.expanduser()

    @property
    def sqlalchemy_url(self) -> str:
        """``database_url`` in SQLAlchemy's form: PostgreSQL uses psycopg, whichever spelling was given."""
        if not self.database_url:
            return f"sqlite:///{self.home.absolute() / 'agentstate.db'}"
        scheme, separator, rest = self.database_url.partition("://")
        if scheme in ("postgres", "postgresql"):
            scheme = "postgresql+psycopg"
        return f"{scheme}{separator}{rest}"

    @property
    def pages_path(self) -> Path:
        """Root directory of the KV pages."""
        return self.pages_dir or self.home / "pages"


@cache
def _say_once(text: str) -> None:
    """A process builds its settings in several places."""
    logger.warning(text)
