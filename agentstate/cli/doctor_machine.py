"""What `agentstate doctor` looks at on this machine: drive, limits, memory, GPU."""

from __future__ import annotations

import ctypes
import errno
import fcntl
import mmap
import os
import resource
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

from agentstate.cli.findings import Finding, Level
from agentstate.cli.output import DENIED
from agentstate.settings import MIB, Settings

_PROBE_BYTES, _BLOCK = 64 * MIB, 4 * MIB
# The launcher starts no engine with less.
_LEAST_FREE_BYTES = 64 * MIB
_SLOW_GB_S = 0.3
_FEW_FILES, _MANY_FILES = 256, 4096
_SMALL_SHM = 1 << 30
_CAP_IPC_LOCK = 14
_IO_URING_SETUP = 425
_FULL = (errno.ENOSPC, errno.EDQUOT)
_ELSEWHERE = "AGENTSTATE_PAGES_DIR=/a/directory/on/another/drive"


def drive(settings: Settings) -> Iterator[Finding]:
    """Whether pages can be written, how fast, and whether there is room. The file that is written has no name, and is
    gone when it is closed."""
    root = settings.pages_path
    there = root.absolute()
    while not there.exists() and there != there.parent:
        there = there.parent
    where = f"{root}" if there == root.absolute() else f"{root}, which is not there yet: {there}"
    nothing = "engines start, and store nothing" if there == root.absolute() else "no engine starts"
    if not there.is_dir():
        what = f"the page directory {root} cannot be made: {there} is no directory"
        yield Finding("drive", Level.FIX, what, consequence=nothing, command=_ELSEWHERE)
        return
    disk = os.statvfs(there)
    free, share = disk.f_bavail * disk.f_frsize, disk.f_bavail / max(1, disk.f_blocks)
    room = f"{_size(free)} of {_size(disk.f_blocks * disk.f_frsize)} are free"
    try:
        # Without a name where the file system can do that (O_TMPFILE).
        with tempfile.TemporaryFile(dir=there, buffering=0) as file:
            yield from _speed(file.fileno(), f"at {where}")
    except OSError as error:
        if error.errno in _FULL:
            what = "the disk is full" if error.errno == errno.ENOSPC else "the user's quota on the disk is used up"
            yield Finding(
                "drive",
                Level.FIX,
                f"{what}: nothing can be written to {there}",
                room,
                "what engines compute is not stored, unless they can evict older pages",
                f"agentstate pages du, then make room; or {_ELSEWHERE}",
            )
        else:
            yield Finding(
                "drive",
                Level.FIX,
                f"the page directory {root} cannot be written: {error.strerror}",
                f"a file in {there} was refused",
                nothing,
                f"chown {os.geteuid()} {there}, mount it for writing, or {_ELSEWHERE}",
                DENIED,
            )
        return
    if share < settings.pages_free_fraction:
        yield Finding(
            "drive",
            Level.FIX,
            f"less of the disk is free than AGENTSTATE_PAGES_FREE_FRACTION ({settings.pages_free_fraction:.0%})",
            f"{room}, {share:.1%}",
            "engines evict pages, down to none, to give the room back",
            f"make room on the disk of {there}, or {_ELSEWHERE}",
        )
    quota = settings.pages_quota
    if quota is not None and quota > disk.f_blocks * disk.f_frsize:
        yield Finding(
            "drive",
            Level.KNOW,
            "AGENTSTATE_PAGES_QUOTA is more than the disk",
            f"{_size(quota)} on a disk of {_size(disk.f_blocks * disk.f_frsize)}",
            "the free fraction of the disk is the limit, not the quota",
            "set a quota in bytes that the disk has",
        )


def _speed(fd: int, where: str) -> Iterator[Finding]:
    direct = _set_direct(fd)
    block = mmap.mmap(-1, _BLOCK)  # aligned, as direct I/O wants its memory
    block.write(os.urandom(MIB) * (_BLOCK // MIB))
    started = time.perf_counter()
    for offset in range(0, _PROBE_BYTES, _BLOCK):
        if os.pwrite(fd, block, offset) != _BLOCK:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
    os.fdatasync(fd)
    written = time.perf_counter()
    if not direct:
        os.posix_fadvise(fd, 0, 0, os.POSIX_FADV_DONTNEED)
    for offset in range(0, _PROBE_BYTES, _BLOCK):
        os.preadv(fd, [block], offset)
    rates = _PROBE_BYTES / 1e9 / (written - started), _PROBE_BYTES / 1e9 / (time.perf_counter() - written)
    measured = f"{_size(_PROBE_BYTES)} {where}: written with {rates[0]:.2f} GB/s, read with {rates[1]:.2f} GB/s"
    if not direct:
        yield Finding(
            "drive",
            Level.KNOW,
            "the file system refuses direct I/O",
            measured,
            "pages go through the page cache: more CPU time, and memory that other programs lose",
            "put pages on ext4 or XFS on a local NVMe drive: AGENTSTATE_PAGES_DIR",
        )
    if rates[1] < _SLOW_GB_S:
        yield Finding(
            "drive",
            Level.KNOW,
            "the drive reads slowly",
            measured,
            "a restore gains little over recomputing, and short prefixes are recomputed",
            "agentstate pages bench measures it thoroughly; a local NVMe drive reads several GB/s",
        )
    elif direct:
        yield Finding("drive", Level.OK, "pages can be written and read with direct I/O", measured)


def _set_direct(fd: int) -> bool:
    try:
        fcntl.fcntl(fd, fcntl.F_SETFL, fcntl.fcntl(fd, fcntl.F_GETFL) | os.O_DIRECT)
    except OSError as error:
        if error.errno != errno.EINVAL:
            raise
        return False
    return True


def descriptors(settings: Settings) -> Iterator[Finding]:
    """How many files a process may have open."""
    from agentstate.pages.handles import most_open

    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    limits = " and ".join("no limit" if one == resource.RLIM_INFINITY else f"{one:,}" for one in (soft, hard))
    measured = f"soft and hard limit: {limits}"
    if soft != resource.RLIM_INFINITY and soft < _MANY_FILES:
        yield Finding(
            "descriptors",
            Level.FIX if soft < _FEW_FILES else Level.KNOW,
            "a process may have few files open",
            measured,
            f"an engine keeps {most_open():,} extents open, and opens others anew for each restore; each client of the "
            "service takes one as well",
            "ulimit -n 65536; in a unit of systemd LimitNOFILE=65536",
        )
    else:
        yield Finding("descriptors", Level.OK, "enough files may be open", measured)


def memory(settings: Settings) -> Iterator[Finding]:
    """Whether the host memory that an engine's rank asks for is there."""
    wanted = settings.staging_bytes + settings.spill_staging_bytes + (settings.host_bytes or 0)
    free = _available()
    if free is None:
        yield Finding("memory", Level.SKIPPED, "the system does not say how much memory is free")
        return
    measured = f"{_size(wanted)} a rank (staging, spilling, host tier); {_size(free)} are available"
    if wanted > free:
        yield Finding(
            "memory",
            Level.FIX,
            "an engine asks for more host memory than there is",
            measured,
            "it is ended by the system, or the machine swaps",
            "lower AGENTSTATE_HOST_BYTES or AGENTSTATE_STAGING_BYTES, or raise the container's memory limit",
        )
    else:
        yield Finding("memory", Level.OK, "an engine's host memory is there", measured)


def _available() -> int | None:
    try:
        lines = dict(line.split(":", 1) for line in Path("/proc/meminfo").read_text().splitlines())
        free = int(lines["MemAvailable"].split()[0]) * 1024
    except (OSError, KeyError, ValueError):
        return None
    try:
        limit, used = (Path("/sys/fs/cgroup", name).read_text() for name in ("memory.max", "memory.current"))
        return free if limit.strip() == "max" else min(free, int(limit) - int(used))
    except (OSError, ValueError):
        return free


def memory_lock(settings: Settings) -> Iterator[Finding]:
    """Whether memory may be pinned: by a capability that is in effect, or by the limit."""
    from agentstate.cli.launcher import has_cuda

    soft, _ = resource.getrlimit(resource.RLIMIT_MEMLOCK)
    able = bool(_capabilities() >> _CAP_IPC_LOCK & 1)
    limit = "none" if soft == resource.RLIM_INFINITY else _size(soft)
    measured = f"CAP_IPC_LOCK is {'' if able else 'not '}in effect; RLIMIT_MEMLOCK: {limit}"
    wanted = settings.staging_bytes + settings.spill_staging_bytes + (settings.host_bytes or 0)
    if not has_cuda():
        yield Finding("memory-lock", Level.SKIPPED, "without a GPU no memory is pinned", measured)
    elif able or soft == resource.RLIM_INFINITY or soft >= wanted:
        yield Finding("memory-lock", Level.OK, "memory may be pinned", measured)
    else:
        yield Finding(
            "memory-lock",
            Level.KNOW,
            "little memory may be locked",
            measured,
            "drivers that account for pinned memory, those of RDMA for instance, refuse an engine's staging",
            "ulimit -l unlimited; LimitMEMLOCK=infinity in a unit of systemd, or in that of the container runtime "
            "(IPC_LOCK that is added to a container has no effect for users other than root)",
        )


def _capabilities() -> int:
    try:
        status = Path("/proc/self/status").read_text()
        return int(next(line.split()[1] for line in status.splitlines() if line.startswith("CapEff:")), 16)
    except (OSError, StopIteration, ValueError):
        return 0


def numa(settings: Settings) -> Iterator[Finding]:
    """Whether the drive is at one of several nodes of memory."""
    nodes = sorted(Path("/sys/devices/system/node").glob("node[0-9]*"))
    if len(nodes) < 2:
        yield Finding("numa", Level.OK, "all memory is as near", f"{len(nodes) or 1} node")
        return
    there = settings.pages_path.absolute()
    while not there.exists():
        there = there.parent
    device = there.stat().st_dev
    at = None
    for above in Path(f"/sys/dev/block/{os.major(device)}:{os.minor(device)}").resolve().parents:
        if (file := above / "device" / "numa_node").exists() or (file := above / "numa_node").exists():
            at = int(file.read_text())
            break
    if at is None or at < 0:
        yield Finding("numa", Level.OK, "the drive is at no node of its own", f"{len(nodes)} nodes")
        return
    yield Finding(
        "numa",
        Level.KNOW,
        f"the drive of the page directory is at node {at} of {len(nodes)}",
        f"{there}",
        "reads into another node's memory cross the link between them",
        f"numactl --cpunodebind={at} --preferred={at} agentstate engine …, if the GPU is at that node too",
    )


def gpu(settings: Settings) -> Iterator[Finding]:
    """Whether there is a GPU, and GPUDirect Storage where it is asked for."""
    from agentstate.cli.launcher import has_cuda

    there, wanted = has_cuda(), settings.read_backend == "kvikio"
    if not there and wanted:
        yield Finding(
            "gpu",
            Level.FIX,
            "AGENTSTATE_READ_BACKEND=kvikio needs a GPU, and none is found here",
            "libcuda.so.1 does not load, or finds no device",
            "no engine starts",
            "AGENTSTATE_READ_BACKEND=posix; in a container: --gpus all",
        )
    elif not there:
        yield Finding("gpu", Level.SKIPPED, "no CUDA driver finds a device here")
    elif wanted and not _has_gds():
        yield Finding(
            "gpu",
            Level.KNOW,
            "GPUDirect Storage is not set up",
            "/proc/modules does not list nvidia_fs",
            "KvikIO reads in its compatibility mode: through host memory",
            "install nvidia-fs, or AGENTSTATE_READ_BACKEND=posix",
        )
    else:
        yield Finding("gpu", Level.OK, "a CUDA driver finds a device", f"pages are read by {settings.read_backend}")


def _has_gds() -> bool:
    try:
        return "nvidia_fs" in Path("/proc/modules").read_text()
    except OSError:
        return False


def shared_memory(settings: Settings) -> Iterator[Finding]:
    """Whether processes can share memory: SGLang's ranks do."""
    try:
        disk = os.statvfs("/dev/shm")
    except OSError as error:
        yield Finding("shm", Level.KNOW, f"/dev/shm cannot be used: {error.strerror}", command="mount a tmpfs there")
        return
    n_bytes = disk.f_blocks * disk.f_frsize
    measured = f"/dev/shm has {_size(n_bytes)}, {_size(disk.f_bavail * disk.f_frsize)} of them free"
    if n_bytes < _SMALL_SHM:
        yield Finding(
            "shm",
            Level.KNOW,
            "processes can share little memory",
            measured,
            "with tensor parallelism SGLang's ranks end with a bus error, or do not start",
            "docker run --shm-size 8g; shm_size in Compose; a Memory emptyDir at /dev/shm on Kubernetes",
        )
    else:
        yield Finding("shm", Level.OK, "processes can share memory", measured)


def io_uring(settings: Settings) -> Iterator[Finding]:
    """Whether the kernel lets io_uring be used. AgentState does not; storage libraries beside it may."""
    libc = ctypes.CDLL(None, use_errno=True)
    # A ring without entries is refused as such where rings may be made.
    libc.syscall(_IO_URING_SETUP, 0, 0)
    state = {errno.EPERM: "blocked, by seccomp or a sysctl", errno.ENOSYS: "not in this kernel, or blocked"}
    measured = f"io_uring is {state.get(ctypes.get_errno(), 'allowed')}"
    yield Finding("io-uring", Level.OK, "reads and writes of pages do not need io_uring", measured)


def _size(n_bytes: int) -> str:
    size, unit = float(n_bytes), "B"
    for larger in ("KiB", "MiB", "GiB", "TiB"):
        if size < 1024:
            break
        size, unit = size / 1024, larger
    return f"{size:.0f} {unit}" if unit in ("B", "KiB") else f"{size:.1f} {unit}"
