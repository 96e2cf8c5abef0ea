/* Preloaded into an engine, this makes its drive slow: a read of pages takes as long as the bytes a second say that are in
   the file SPEED, at least. */

#define _GNU_SOURCE
#include <dlfcn.h>
#include <stdio.h>
#include <stdlib.h>
#include <sys/types.h>
#include <sys/uio.h>
#include <unistd.h>

static void wait_for(ssize_t n_bytes) {
    double speed;
    FILE *file = fopen(getenv("SPEED"), "r");
    if (file == NULL) return;
    if (fscanf(file, "%lf", &speed) == 1 && n_bytes > 0) usleep(1e6 * n_bytes / speed);
    fclose(file);
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
