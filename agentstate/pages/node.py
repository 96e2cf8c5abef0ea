"""The id of a root of pages, which stays with them, whatever the machine is called.

A restarted container has another host name, but the pages on its volume are still those that its manifests list.
Engines on one root share its id; two roots of one machine have two. With data parallelism each DP rank of an engine has
a root of its own in the engine's.
"""

from __future__ import annotations

import fcntl
import logging
import os
import re
import socket
from pathlib import Path

from agentstate import ids
from agentstate.private import make_directory, make_file

logger = logging.getLogger(__name__)

_ID = re.compile(r"[A-Za-z0-9._-]{1,255}")
_DP_RANK = re.compile(r"dp[1-9][0-9]{0,5}")


def node_id(root: Path, wanted: str | None = None) -> str:
    """The id of ``root``. A root without one gets one, ``wanted`` if that is given.

    A root that has stores and no id is of an earlier release, which saved manifests under the host name: that becomes
    its id. If nothing can be written, the id is the host name too, and is not kept.
    """
    file = root / "node"
    try:
        make_directory(root)
        directory = os.open(root, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
        try:
            # Engines that start at once wait for each other, and agree.
            fcntl.flock(directory, fcntl.LOCK_EX)
            if (known := _read(file)) is None:
                known = wanted or (_host() if any(root.glob("*/rank*/extents")) else ids.new(_host()))
                draft = root / "node.draft"
                make_file(draft)
                with draft.open("w") as out:
                    out.write(known + "\n")
                    out.flush()
                    os.fsync(out.fileno())
                draft.rename(file)
                os.fsync(directory)
            return known
        finally:
            os.close(directory)
    except OSError as error:
        logger.warning("page store: %s can keep no id (%s): the host name is used instead", root, error.strerror)
        return wanted or _host()


def of_dp_rank(root: Path, dp_rank: int) -> Path:
    """Where a DP rank of an engine has its pages: a root of its own, with an id of its own. The first one's is the
    engine's ``root`` itself, which an engine without data parallelism has as well."""
    return root / f"dp{dp_rank}" if dp_rank else root


def is_of_dp_rank(root: Path) -> bool:
    """Whether a root is named like that of a DP rank, not the first one's."""
    return _DP_RANK.fullmatch(root.name) is not None


def dp_roots(root: Path) -> dict[int, Path]:
    """The roots of DP ranks that there are in an engine's ``root``, and that itself, by their numbers."""
    found = {int(path.name[2:]): path for path in root.glob("dp*") if is_of_dp_rank(path) and path.is_dir()}
    return {0: root, **dict(sorted(found.items()))}


def known_id(root: Path) -> str | None:
    """The id of ``root`` if it has one. Changes nothing. Raises OSError if it cannot be read."""
    return _read(root / "node")


def kept_id(root: Path) -> str | None:
    """`known_id`, if no other root has it."""
    known = known_id(root)
    return known if known is not None and "_" in known else None


def _read(file: Path) -> str | None:
    try:
        text = file.read_text(errors="replace").strip()
    except FileNotFoundError:
        return None
    return text if _ID.fullmatch(text) else None


def _host() -> str:
    return re.sub(r"[^A-Za-z0-9.-]", "-", socket.gethostname())[:200] or "host"
