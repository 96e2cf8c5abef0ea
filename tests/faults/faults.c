/* Preloaded into a process, this makes the system calls of one operation fail, or end the process, one after the other.

   It stands before the C library's functions, so it sees Python's calls and LMDB's alike. While nothing is armed it
   only passes on, but for syncing: no test here cuts the power, and what is not synced costs no time.

   changes: what may alter a directory or a file.   reads: what brings bytes back.

   The C library has two names for most of these; a program calls one of them. */

#define _GNU_SOURCE
#include <dlfcn.h>
#include <errno.h>
#include <fcntl.h>
#include <signal.h>
#include <stdarg.h>
#include <stdatomic.h>
#include <stdio.h>
#include <string.h>
#include <sys/stat.h>
#include <sys/types.h>
#include <sys/uio.h>
#include <unistd.h>

enum { OFF, COUNT, KILL, KILL_HALF_WAY, FAIL_ONCE, FAIL_FROM_THEN_ON };
enum { CHANGES = 1, READS = 2 };

static atomic_int mode, kinds, error_number;
static atomic_long calls, target;
static char last[64];

void faults_arm(int new_mode, int new_kinds, long at, int number) {
    calls = 0;
    target = at;
    kinds = new_kinds;
    error_number = number;
    mode = new_mode;
}

long faults_disarm(void) {
    mode = OFF;
    return calls;
}

const char *faults_last(void) { return last; }

/* What to do at this call: 0 go on, 1 fail, 2 half of it and then die. */
static int reached(int kind, const char *name, int can_be_halved) {
    if (mode == OFF || !(kinds & kind)) return 0;
    long call = atomic_fetch_add(&calls, 1) + 1;
    if (mode == COUNT || call < target || (call > target && mode != FAIL_FROM_THEN_ON)) return 0;
    snprintf(last, sizeof last, "%s", name);
    if (mode == KILL_HALF_WAY && can_be_halved) return 2;
    if (mode == KILL || mode == KILL_HALF_WAY) kill(getpid(), SIGKILL), pause();
    errno = error_number;
    return 1;
}

#define REAL(name) ((__typeof__(&name))dlsym(RTLD_NEXT, #name))

#define WRAP(kind, result, name, parameters, arguments)                \
    result name parameters {                                           \
        if (reached(kind, #name, 0)) return -1;                        \
        return REAL(name) arguments;                                   \
    }

#define WRITE(name, parameters, arguments, half)                       \
    ssize_t name parameters {                                          \
        switch (reached(CHANGES, #name, 1)) {                          \
        case 1: return -1;                                             \
        case 2: half; kill(getpid(), SIGKILL), pause();                \
        }                                                              \
        return REAL(name) arguments;                                   \
    }

#define SYNC(name)                                                     \
    int name(int fd) {                                                 \
        (void)fd;                                                      \
        return reached(CHANGES, #name, 0) ? -1 : 0;                    \
    }

#define OPEN(name)                                                     \
    int name(const char *path, int flags, ...) {                       \
        va_list rest;                                                  \
        va_start(rest, flags);                                         \
        mode_t permissions = flags & O_CREAT ? va_arg(rest, mode_t) : 0; \
        va_end(rest);                                                  \
        int writes = (flags & O_ACCMODE) != O_RDONLY;                  \
        if (reached(writes ? CHANGES : READS, #name, 0)) return -1;    \
        return REAL(name)(path, flags, permissions);                   \
    }

/* Direct I/O wants whole blocks, so half of a write is half of its blocks. */
#define HALF(n) ((n) / 2 / 4096 * 4096)

OPEN(open)
OPEN(open64)
WRITE(write, (int fd, const void *data, size_t n), (fd, data, n), REAL(write)(fd, data, n / 2))
WRITE(pwrite, (int fd, const void *data, size_t n, off_t at), (fd, data, n, at), REAL(pwrite)(fd, data, HALF(n), at))
WRITE(pwrite64, (int fd, const void *data, size_t n, off64_t at), (fd, data, n, at),
      REAL(pwrite64)(fd, data, HALF(n), at))
WRITE(writev, (int fd, const struct iovec *parts, int n), (fd, parts, n), REAL(writev)(fd, parts, n / 2))
WRITE(pwritev, (int fd, const struct iovec *parts, int n, off_t at), (fd, parts, n, at),
      REAL(pwritev)(fd, parts, n / 2, at))
WRITE(pwritev64, (int fd, const struct iovec *parts, int n, off64_t at), (fd, parts, n, at),
      REAL(pwritev64)(fd, parts, n / 2, at))
SYNC(fsync)
SYNC(fdatasync)
WRAP(CHANGES, int, ftruncate, (int fd, off_t length), (fd, length))
WRAP(CHANGES, int, ftruncate64, (int fd, off64_t length), (fd, length))
WRAP(CHANGES, int, truncate, (const char *path, off_t length), (path, length))
WRAP(CHANGES, int, truncate64, (const char *path, off64_t length), (path, length))
WRAP(CHANGES, int, rename, (const char *from, const char *to), (from, to))
WRAP(CHANGES, int, renameat, (int from_fd, const char *from, int to_fd, const char *to), (from_fd, from, to_fd, to))
WRAP(CHANGES, int, link, (const char *source, const char *target), (source, target))
WRAP(CHANGES, int, unlink, (const char *path), (path))
WRAP(CHANGES, int, unlinkat, (int fd, const char *path, int flags), (fd, path, flags))
WRAP(CHANGES, int, mkdir, (const char *path, mode_t permissions), (path, permissions))
WRAP(CHANGES, int, mkdirat, (int fd, const char *path, mode_t permissions), (fd, path, permissions))
WRAP(CHANGES, int, rmdir, (const char *path), (path))
WRAP(READS, ssize_t, read, (int fd, void *data, size_t n), (fd, data, n))
WRAP(READS, ssize_t, pread, (int fd, void *data, size_t n, off_t at), (fd, data, n, at))
WRAP(READS, ssize_t, pread64, (int fd, void *data, size_t n, off64_t at), (fd, data, n, at))
WRAP(READS, ssize_t, preadv, (int fd, const struct iovec *parts, int n, off_t at), (fd, parts, n, at))
WRAP(READS, ssize_t, preadv64, (int fd, const struct iovec *parts, int n, off64_t at), (fd, parts, n, at))
WRAP(READS, ssize_t, preadv2, (int fd, const struct iovec *parts, int n, off_t at, int flags),
     (fd, parts, n, at, flags))
WRAP(READS, ssize_t, preadv64v2, (int fd, const struct iovec *parts, int n, off64_t at, int flags),
     (fd, parts, n, at, flags))

/* What it could report was reported by the synchronisation before it: it fails nowhere, but a process may end there. */
int close(int fd) {
    if (mode == COUNT || mode == KILL || mode == KILL_HALF_WAY) reached(CHANGES, "close", 0);
    return REAL(close)(fd);
}

/* They return the error instead of setting it. */
int posix_fallocate(int fd, off_t at, off_t n) {
    return reached(CHANGES, "posix_fallocate", 0) ? error_number : REAL(posix_fallocate)(fd, at, n);
}

int posix_fallocate64(int fd, off64_t at, off64_t n) {
    return reached(CHANGES, "posix_fallocate64", 0) ? error_number : REAL(posix_fallocate64)(fd, at, n);
}
