/* Preloaded into an engine, this makes its drive slow: a read of pages takes as long as BYTES_A_SECOND say, at least. */

#define _GNU_SOURCE
#include <dlfcn.h>
#include <stdlib.h>
#include <sys/types.h>
#include <sys/uio.h>
#include <unistd.h>

static void wait_for(ssize_t n_bytes) {
    const char *speed = getenv("BYTES_A_SECOND");
    if (n_bytes > 0 && speed != NULL) usleep(1e6 * n_bytes / atof(speed));
}

#define SLOW(name, parameters, arguments)                                                 \
    ssize_t name parameters {                                                             \
        ssize_t n_bytes = ((__typeof__(&name))dlsym(RTLD_NEXT, #name)) arguments;         \
        wait_for(n_bytes);                                                                \
        return n_bytes;                                                                   \
    }

SLOW(preadv, (int fd, const struct iovec *to, int count, off_t at), (fd, to, count, at))
SLOW(preadv64, (int fd, const struct iovec *to, int count, off64_t at), (fd, to, count, at))
SLOW(preadv2, (int fd, const struct iovec *to, int count, off_t at, int flags), (fd, to, count, at, flags))
SLOW(preadv64v2, (int fd, const struct iovec *to, int count, off64_t at, int flags), (fd, to, count, at, flags))
