"""Where a database is: its URL as users write it, how the driver is told, and which parts of it may be shown.

PostgreSQL's own spelling of several hosts is understood (``postgresql://a:5432,b:5432/agents``), and so is
``pgbouncer=true`` for a PgBouncer in transaction mode.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any
from urllib.parse import parse_qsl, quote, quote_plus, unquote, urlencode

import sqlalchemy as sa
from sqlalchemy.engine import make_url
from sqlalchemy.exc import ArgumentError, NoSuchModuleError

from agentstate.errors import SettingsError

DRIVERS = ("sqlite", "sqlite+pysqlite", "postgresql+psycopg")
HIDDEN = "***"
POOLER = "pgbouncer"
ATTRS = "target_session_attrs"
WRITABLE = ("read-write", "primary")
# The parts of a connection string that nobody else may see.
_SECRET = ("password", "sslpassword", "oauth_client_secret", "scram_client_key", "scram_server_key")
# A password may have any character but "@", as SQLAlchemy takes it.
_POSTGRESQL = re.compile(
    r"(?s)(?P<scheme>postgresql\+?\w*)://(?:(?P<userinfo>[^:/@]*(?::[^@]*)?)@)?(?P<hosts>[^/?]*)(?P<path>/[^?]*)?"
    r"(?:\?(?P<query>.*))?"
)
_IN_QUERY = re.compile(rf"(?i)\b({'|'.join(_SECRET)})=[^\s&;'\"]+")
_IN_USERINFO = re.compile(r"(?i)(\b[a-z][a-z0-9+.-]*://[^\s:/@?#]*:)[^\s/?#]+(?=@)")


@dataclass(frozen=True)
class Address:
    """``url`` is as SQLAlchemy takes it, and has the password; ``shown`` is safe to log.

    ``connect_args`` is what the driver is told besides the URL. ``pooled`` says that a PgBouncer in transaction mode is
    in between, ``writable`` that connections go only to servers that can be written to.
    """

    url: sa.URL
    shown: str
    secrets: frozenset[str]
    connect_args: dict[str, Any]
    pooled: bool = False
    writable: bool = False

    @property
    def is_sqlite(self) -> bool:
        return self.url.get_backend_name() == "sqlite"

    def masked(self, text: str) -> str:
        """``text`` without the secrets of this address."""
        return mask(text, self.secrets)


def parse(text: str) -> Address:
    """The address that a URL of SQLAlchemy's names. Raises SettingsError if it is none, or of another database."""
    parts = _POSTGRESQL.fullmatch(text)
    if parts is None:
        url = _url(text)
        if url.get_backend_name() != "sqlite":
            raise _unusable()
        return Address(url, url.render_as_string(hide_password=True), frozenset(), {})
    userinfo, hosts, path = (parts[name] or "" for name in ("userinfo", "hosts", "path"))
    connect_args: dict[str, Any] = {}
    shown_hosts = hosts
    if "," in hosts:
        found = [_host_and_port(one) for one in hosts.split(",")]
        connect_args = {"host": ",".join(host for host, _ in found), "port": ",".join(port for _, port in found)}
        hosts = ""
    query = parse_qsl(parts["query"] or "", keep_blank_values=True)
    of_query = dict(query)
    if "," in of_query.get("host", ""):
        connect_args = {name: of_query[name] for name in ("host", "port") if name in of_query}
        query = [(name, value) for name, value in query if name not in connect_args]
    pooled = any(name == POOLER and value.lower() in ("true", "1", "on", "yes") for name, value in query)
    query = [(name, value) for name, value in query if name != POOLER]
    url = _url(f"{parts['scheme']}://{f'{userinfo}@' if userinfo else ''}{hosts}{path}?{urlencode(query)}")
    given = [value for name, value in query if name.lower() in _SECRET] + ([url.password] if url.password else [])
    shown_query = [(name, HIDDEN if name.lower() in _SECRET else value) for name, value in of_query.items()]
    user = f"{quote(url.username, safe='')}{f':{HIDDEN}' if url.password else ''}@" if url.username else ""
    shown = f"{url.drivername}://{user}{shown_hosts}{path}"
    if shown_query:
        shown += "?" + urlencode(shown_query, safe="/:,*")
    attrs = of_query.get(ATTRS)
    if attrs is None:
        attrs = connect_args[ATTRS] = "read-write"
    return Address(url, shown, frozenset(given), connect_args, pooled, attrs in WRITABLE)


def mask(text: str, secrets: Iterable[str] = ()) -> str:
    """``text`` without these secrets, and without what looks like the password of a URL or connection string."""
    for secret in secrets:
        for spelling in {secret, quote(secret, safe=""), quote_plus(secret)}:
            # As a word of its own: a password such as "a" must not be cut out of every word.
            text = re.sub(rf"(?<!\w){re.escape(spelling)}(?!\w)", HIDDEN, text)
    # Most texts have neither, and to see that takes less than the expressions.
    if "://" in text:
        text = _IN_USERINFO.sub(rf"\g<1>{HIDDEN}", text)
    return _IN_QUERY.sub(rf"\g<1>={HIDDEN}", text) if "=" in text else text


def _url(text: str) -> sa.URL:
    try:
        url = make_url(text)
        url.get_backend_name()
    except (ArgumentError, NoSuchModuleError, ValueError):
        raise _unusable() from None
    if url.drivername not in DRIVERS:
        raise SettingsError(f"AGENTSTATE_DATABASE_URL names {url.drivername}: use sqlite:///FILE or postgresql://…")
    return url


def _unusable() -> SettingsError:
    return SettingsError("AGENTSTATE_DATABASE_URL is not a database URL")


def _host_and_port(one: str) -> tuple[str, str]:
    host, separator, port = one.rpartition(":")
    if not separator or "]" in port:
        host, port = one, ""
    return unquote(host.strip("[]")), port
