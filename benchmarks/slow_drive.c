/* Preloaded into an engine, this makes its drive as slow as the file SPEED says: all threads of a process together read
   and write so many bytes a second and no more. With 0 there, a call does not return before something else is there,
   and makes a file SPEED.held, so that a test knows of it. A word after the number restricts both to files that have it
   in their path: what is written is "partial", what is read is "extents". */

#define _GNU_SOURCE
#include <dlfcn.h>
#include <fcntl.h>
#include <pthread.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/types.h>
#include <sys/uio.h>
#include <time.h>
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
    char word[4096];
    const char *path = getenv("SPEED");
    FILE *file = path == NULL ? NULL : fopen(path, "r");
    if (file == NULL) return -1;
    int found = fscanf(file, "%lf %4095s", &speed, word);
    fclose(file);
    return found < 1 || (found == 2 && !has(fd, word)) ? -1 : speed;
}

static void answer(int fd) {
    if (speed_of(fd) != 0) return;
    char held[4096];
    snprintf(held, sizeof held, "%s.held", getenv("SPEED"));
    close(open(held, O_CREAT | O_WRONLY, 0666));
    while (speed_of(fd) == 0) usleep(10000);
}

static double now_s(void) {
    struct timespec now;
    clock_gettime(CLOCK_MONOTONIC, &now);
    return now.tv_sec + 1e-9 * now.tv_nsec;
}

static pthread_mutex_t lock = PTHREAD_MUTEX_INITIALIZER;
static double paced, free_at_s; /* the speed, and when the drive has moved all bytes that it was asked for at it */

static void take(int fd, ssize_t n_bytes) {
    double speed = speed_of(fd);
    if (speed <= 0 || n_bytes <= 0) return;
    pthread_mutex_lock(&lock);
    double start_s = now_s();
    if (paced == speed && free_at_s > start_s) start_s = free_at_s;
    paced = speed;
    double end_s = free_at_s = start_s + n_bytes / speed;
    pthread_mutex_unlock(&lock);
    /* Who waits for a slow drive goes on at once when it is made faster. */
    for (double left_s; (left_s = end_s - now_s()) > 0 && speed_of(fd) == speed;)
        usleep(1e6 * (left_s < 0.02 ? left_s : 0.02));
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
