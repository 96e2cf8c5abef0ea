/* Preloaded into an engine, this makes its drive slow: pages are read and written no faster than the bytes a second say
   that are in the file SPEED. With 0 there it does not answer before something else is there. A word after the number
   restricts both to files that have it in their path: what is written is "partial", what is read is "extents". */

#define _GNU_SOURCE
#include <dlfcn.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/types.h>
#include <sys/uio.h>
#include <unistd.h>

static int has(int fd, const char *word) {
    char link[64], path[4096];
    snprintf(link, sizeof link, "/proc/self/fd/%d", fd);
    ssize_t length = readlink(link, path, sizeof path - 1);
    if (length < 0) return 0;
    path[length] = 0;
    return strstr(path, word) != NULL;
}

/* In bytes a second; negative where it is not slow. */
static double speed_of(int fd) {
    double speed = -1;
    char word[256];
    FILE *file = fopen(getenv("SPEED"), "r");
    if (file == NULL) return -1;
    int found = fscanf(file, "%lf %255s", &speed, word);
    fclose(file);
    return found < 1 || (found == 2 && !has(fd, word)) ? -1 : speed;
}

static void answer(int fd) {
    while (speed_of(fd) == 0) usleep(10000);
}

static void take(int fd, ssize_t n_bytes) {
    double speed = speed_of(fd);
    if (speed > 0 && n_bytes > 0) usleep(1e6 * n_bytes / speed);
}

#define SLOW(name, parameters, arguments)                                                 \
    ssize_t name parameters {                                                             \
        answer(fd);                                                                       \
        ssize_t n_bytes = ((__typeof__(&name))dlsym(RTLD_NEXT, #name)) arguments;         \
        take(fd, n_bytes);                                                                \
        return n_bytes;                                                                   \
    }

SLOW(pwrite, (int fd, const void *from, size_t n, off_t at), (fd, from, n, at))
SLOW(pwrite64, (int fd, const void *from, size_t n, off64_t at), (fd, from, n, at))
SLOW(preadv, (int fd, const struct iovec *to, int count, off_t at), (fd, to, count, at))
SLOW(preadv64, (int fd, const struct iovec *to, int count, off64_t at), (fd, to, count, at))
SLOW(preadv2, (int fd, const struct iovec *to, int count, off_t at, int flags), (fd, to, count, at, flags))
SLOW(preadv64v2, (int fd, const struct iovec *to, int count, off64_t at, int flags), (fd, to, count, at, flags))
