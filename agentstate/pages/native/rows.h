/* Rows of pages, read and verified without their pages: see `read_rows` in __init__.py. */

#ifndef AGENTSTATE_ROWS_H
#define AGENTSTATE_ROWS_H

#include <dlfcn.h>
#include <errno.h>
#include <sys/syscall.h>
#include <sys/types.h>
#include <sys/uio.h>
#include <unistd.h>

#if defined(__linux__) && defined(__has_include)
#if __has_include(<linux/aio_abi.h>)
#define AGENTSTATE_AIO 1
#include <linux/aio_abi.h>
#endif
#endif

#include "xxh3.h"

enum { SECTOR = 4096 };

/* Of a sector or a row. A row is what the worst of its sectors is. */
enum { UNTOUCHED, RIGHT, WRONG, UNREAD };

/* One read, as the caller gives it: `n_bytes` of `fd` from `offset` on, to the sectors of the scratch from `sector` on.
   Reads fill the scratch one after the other, without a gap. */
struct row_read {
    int64_t fd, offset, n_bytes, sector;
};

struct rows_job {
    const struct row_read *reads;
    int64_t *got; /* a read: bytes, or the error's number, negative */
    size_t count;
    uint8_t *scratch, *sectors; /* what became of each sector */
    size_t sector_count;
    const uint64_t *sums, *seeds; /* a sector; NULL if nothing is to be verified */
    size_t components, rows;
    const int64_t *from, *to; /* a component and row: its first byte in the scratch, ascending, and its destination */
    const int64_t *row_bytes; /* a component */
    const Py_buffer *into;    /* a component: of two dimensions */
    uint8_t *outcome, *settled; /* a row: what became of it, and of how many components that is known */
};

/* The first of a component's rows that begins at `at` of the scratch or later. */
static size_t first_row(const struct rows_job *job, size_t component, int64_t at) {
    const int64_t *from = job->from + component * job->rows;
    size_t low = 0, high = job->rows;
    while (low < high) {
        size_t middle = low + (high - low) / 2;
        if (from[middle] < at) low = middle + 1;
        else high = middle;
    }
    return low;
}

/* Verifies what a read has brought, and copies the rows that lie in it. */
static void settle(struct rows_job *job, size_t number) {
    const struct row_read *read = &job->reads[number];
    size_t first = (size_t)read->sector, count = (size_t)read->n_bytes / SECTOR;
    size_t whole = job->got[number] < 0 ? 0 : (size_t)job->got[number] / SECTOR;
    for (size_t i = 0; i < count; i++) {
        size_t sector = first + i;
        struct piece piece = {job->scratch + sector * SECTOR, SECTOR};
        if (i >= whole) job->sectors[sector] = UNREAD;
        else if (job->sums == NULL || xxh3(&piece, 0, SECTOR, job->seeds[sector]) == job->sums[sector])
            job->sectors[sector] = RIGHT;
        else job->sectors[sector] = WRONG;
    }
    int64_t end = (int64_t)(first + count) * SECTOR;
    for (size_t c = 0; c < job->components; c++) {
        const int64_t *from = job->from + c * job->rows, *to = job->to + c * job->rows;
        const Py_buffer *into = &job->into[c];
        for (size_t i = first_row(job, c, (int64_t)first * SECTOR); i < job->rows && from[i] < end; i++) {
            /* A row that no single read brings has not been read. */
            uint8_t worst = from[i] + job->row_bytes[c] <= end ? RIGHT : UNREAD;
            int64_t last = (from[i] + job->row_bytes[c] - 1) / SECTOR;
            for (int64_t sector = from[i] / SECTOR; sector <= last && worst != UNREAD; sector++)
                if (job->sectors[sector] > worst) worst = job->sectors[sector];
            if (worst == RIGHT)
                memcpy((uint8_t *)into->buf + to[i] * into->strides[0], job->scratch + from[i],
                       (size_t)job->row_bytes[c]);
            if (worst > job->outcome[i]) job->outcome[i] = worst;
            job->settled[i]++;
        }
    }
}

static void read_now(struct rows_job *job, size_t number) {
    const struct row_read *read = &job->reads[number];
    struct iovec into = {job->scratch + read->sector * SECTOR, (size_t)read->n_bytes};
    ssize_t got;
    do got = preadv((int)read->fd, &into, 1, (off_t)read->offset);
    while (got < 0 && errno == EINTR);
    job->got[number] = got < 0 ? -errno : got;
}

/* ---- many reads at a time ---- */

enum { MOST_DEEP = 256 };

typedef struct {
    PyObject ob_base;
#ifdef AGENTSTATE_AIO
    aio_context_t context;
#endif
    size_t depth;
    int busy; /* by which thread's call it is used */
} Queue;

#ifdef AGENTSTATE_AIO

/* Keeps as many reads under way as the queue is deep, and settles each as it ends. A read that the kernel does not take
   is done at once. */
static void read_by_queue(Queue *queue, struct rows_job *job) {
    struct iocb blocks[MOST_DEEP], *ready[MOST_DEEP];
    struct io_event events[MOST_DEEP];
    size_t free_blocks[MOST_DEEP], free_count = queue->depth, waiting = 0, under_way = 0, next = 0;
    for (size_t i = 0; i < queue->depth; i++) free_blocks[i] = i;
    while (next < job->count || waiting || under_way) {
        for (; free_count && next < job->count; next++) {
            const struct row_read *read = &job->reads[next];
            size_t block = free_blocks[--free_count];
            blocks[block] = (struct iocb){.aio_data = next,
                                          .aio_lio_opcode = IOCB_CMD_PREAD,
                                          .aio_fildes = (uint32_t)read->fd,
                                          .aio_buf = (uint64_t)(uintptr_t)(job->scratch + read->sector * SECTOR),
                                          .aio_nbytes = (uint64_t)read->n_bytes,
                                          .aio_offset = read->offset};
            ready[waiting++] = &blocks[block];
        }
        if (waiting) {
            long taken = syscall(SYS_io_submit, queue->context, (long)waiting, ready);
            if (taken <= 0 && (taken == 0 || errno != EAGAIN || !under_way)) {
                taken = 1;
                size_t number = (size_t)ready[0]->aio_data;
                read_now(job, number);
                settle(job, number);
                free_blocks[free_count++] = (size_t)(ready[0] - blocks);
            } else if (taken > 0) {
                under_way += (size_t)taken;
            } else {
                taken = 0;
            }
            waiting -= (size_t)taken;
            memmove(ready, ready + taken, waiting * sizeof *ready);
        }
        if (!under_way) continue;
        long ended = syscall(SYS_io_getevents, queue->context, 1L, (long)queue->depth, events, NULL);
        /* As long as something is under way, the kernel may write to the scratch. Only a signal can come between. */
        for (long i = 0; i < ended; i++) {
            size_t number = (size_t)events[i].data;
            job->got[number] = events[i].res;
            free_blocks[free_count++] = (size_t)((struct iocb *)(uintptr_t)events[i].obj - blocks);
            under_way--;
            settle(job, number);
        }
    }
}

static PyObject *queue_new(PyTypeObject *type, PyObject *arguments, PyObject *names) {
    Py_ssize_t depth;
    if (names != NULL && PyDict_Size(names)) return PyErr_SetString(PyExc_TypeError, "Queue takes no keywords"), NULL;
    if (!PyArg_ParseTuple(arguments, "n", &depth)) return NULL;
    if (depth < 1 || depth > MOST_DEEP) return PyErr_SetString(PyExc_ValueError, "no such depth"), NULL;
    allocfunc allocate = (allocfunc)PyType_GetSlot(type, Py_tp_alloc);
    Queue *self = (Queue *)allocate(type, 0);
    if (self == NULL) return NULL;
    if (syscall(SYS_io_setup, (unsigned)depth, &self->context) == 0) {
        self->depth = (size_t)depth;
        return (PyObject *)self;
    }
    PyErr_SetFromErrno(PyExc_OSError);
    Py_DECREF((PyObject *)self);
    return NULL;
}

static void queue_end(Queue *self) {
    if (self->depth) syscall(SYS_io_destroy, self->context);
}

#else

static void read_by_queue(Queue *queue, struct rows_job *job) {
    (void)queue;
    for (size_t i = 0; i < job->count; i++) {
        read_now(job, i);
        settle(job, i);
    }
}

static PyObject *queue_new(PyTypeObject *type, PyObject *arguments, PyObject *names) {
    (void)type, (void)arguments, (void)names;
    errno = ENOSYS;
    return PyErr_SetFromErrno(PyExc_OSError);
}

static void queue_end(Queue *self) { (void)self; }

#endif

static void queue_dealloc(PyObject *object) {
    PyTypeObject *type = Py_TYPE(object);
    Py_BEGIN_ALLOW_THREADS
    queue_end((Queue *)object);
    Py_END_ALLOW_THREADS
    freefunc release_object = (freefunc)PyType_GetSlot(type, Py_tp_free);
    release_object(object);
    Py_DECREF(type);
}

static PyType_Slot queue_slots[] = {{Py_tp_new, queue_new}, {Py_tp_dealloc, queue_dealloc}, {0}};

static PyType_Spec queue_spec = {
    .name = "agentstate.pages.native._native.Queue",
    .basicsize = sizeof(Queue),
    .flags = Py_TPFLAGS_DEFAULT,
    .slots = queue_slots,
};

/* ---- what is called from Python ---- */

/* Whether everything that the caller gives lies where it may. Raises if not. */
static int within_bounds(const struct rows_job *job) {
    int64_t sector = 0;
    for (size_t i = 0; i < job->count; i++) {
        const struct row_read *read = &job->reads[i];
        if (read->n_bytes < SECTOR || read->n_bytes % SECTOR || read->sector != sector || read->offset < 0 ||
            read->n_bytes / SECTOR > (int64_t)job->sector_count - sector)
            return PyErr_SetString(PyExc_ValueError, "reads do not fill the scratch one after the other"), 0;
        sector += read->n_bytes / SECTOR;
    }
    for (size_t c = 0; c < job->components; c++) {
        const Py_buffer *into = &job->into[c];
        int64_t n_bytes = job->row_bytes[c];
        if (n_bytes < 1 || into->ndim != 2 || into->itemsize != 1 || into->shape[1] != n_bytes ||
            (n_bytes > 1 && into->strides[1] != 1))
            return PyErr_SetString(PyExc_ValueError, "destinations are not rows of so many bytes"), 0;
        for (size_t i = 0; i < job->rows; i++) {
            int64_t from = job->from[c * job->rows + i], to = job->to[c * job->rows + i];
            if (from < 0 || from > sector * SECTOR - n_bytes || to < 0 || to >= into->shape[0] ||
                (i && from <= job->from[c * job->rows + i - 1]))
                return PyErr_SetString(PyExc_ValueError, "rows are not in order, or not where they may be"), 0;
        }
    }
    return 1;
}

static int is_size(const Py_buffer *view, size_t count, size_t each) {
    if ((size_t)view->len == count * each) return 1;
    return PyErr_SetString(PyExc_ValueError, "not as many as there are others"), 0;
}

static PyObject *native_read_rows(PyObject *module, PyObject *arguments) {
    (void)module;
    PyObject *queue, *into, *result = NULL;
    Py_buffer reads, got, scratch, sums, seeds, from, to, row_bytes, outcome;
    if (!PyArg_ParseTuple(arguments, "Oy*w*w*y*y*y*y*y*Ow*", &queue, &reads, &got, &scratch, &sums, &seeds, &from, &to,
                          &row_bytes, &into, &outcome))
        return NULL;
    struct views views = {0};
    struct rows_job job = {.reads = reads.buf,
                           .got = got.buf,
                           .count = (size_t)reads.len / sizeof(struct row_read),
                           .scratch = scratch.buf,
                           .sector_count = (size_t)scratch.len / SECTOR,
                           .sums = sums.len ? sums.buf : NULL,
                           .seeds = seeds.buf,
                           .components = (size_t)row_bytes.len / sizeof(int64_t),
                           .rows = (size_t)outcome.len,
                           .from = from.buf,
                           .to = to.buf,
                           .row_bytes = row_bytes.buf,
                           .outcome = outcome.buf};
    Queue *deep = queue == Py_None ? NULL : (Queue *)queue;
    int none = deep != NULL && PyType_GetSlot(Py_TYPE(queue), Py_tp_new) != (void *)queue_new;
    Py_ssize_t arrays = add_views(&views, into, PyBUF_STRIDES | PyBUF_WRITABLE);
    job.into = views.all;
    job.sectors = PyMem_Calloc(job.sector_count + 1, 1);
    job.settled = PyMem_Calloc(job.rows + 1, 1);
    size_t each = job.components * sizeof(int64_t);
    if (arrays >= 0 && (job.sectors == NULL || job.settled == NULL)) {
        PyErr_NoMemory();
    } else if (arrays >= 0 && ((size_t)arrays != job.components || job.components > UINT8_MAX)) {
        PyErr_SetString(PyExc_ValueError, "not as many components");
    } else if (none) {
        PyErr_SetString(PyExc_TypeError, "no queue");
    } else if (deep != NULL && deep->busy) {
        PyErr_SetString(PyExc_ValueError, "the queue is used by another call");
    } else if (arrays >= 0 && is_size(&reads, job.count, sizeof *job.reads) && is_size(&got, job.count, 8) &&
               is_size(&from, job.rows, each) && is_size(&to, job.rows, each) &&
               (job.sums == NULL || (is_size(&sums, job.sector_count, 8) && is_size(&seeds, job.sector_count, 8))) &&
               within_bounds(&job)) {
        memset(job.outcome, UNTOUCHED, job.rows);
        if (deep != NULL) deep->busy = 1;
        Py_BEGIN_ALLOW_THREADS
        if (deep != NULL) {
            read_by_queue(deep, &job);
        } else {
            for (size_t i = 0; i < job.count; i++) settle(&job, i);
        }
        for (size_t i = 0; i < job.rows; i++)
            if (job.settled[i] != job.components) job.outcome[i] = UNREAD;
        Py_END_ALLOW_THREADS
        if (deep != NULL) deep->busy = 0;
        result = Py_NewRef(Py_None);
    }
    PyMem_Free(job.sectors);
    PyMem_Free(job.settled);
    release(&views);
    Py_buffer *given[] = {&reads, &got, &scratch, &sums, &seeds, &from, &to, &row_bytes, &outcome};
    for (size_t i = 0; i < sizeof given / sizeof *given; i++) PyBuffer_Release(given[i]);
    return result;
}

static PyObject *native_sector_sums(PyObject *module, PyObject *arguments) {
    (void)module;
    Py_buffer data, sums;
    unsigned long long seed;
    if (!PyArg_ParseTuple(arguments, "y*Kw*", &data, &seed, &sums)) return NULL;
    size_t count = (size_t)data.len / SECTOR;
    PyObject *result = NULL;
    if (is_size(&data, count, SECTOR) && is_size(&sums, count, 8)) {
        Py_BEGIN_ALLOW_THREADS
        for (size_t i = 0; i < count; i++) {
            struct piece piece = {(const uint8_t *)data.buf + i * SECTOR, SECTOR};
            uint64_t value = xxh3(&piece, 0, SECTOR, seed + i);
            memcpy((uint8_t *)sums.buf + 8 * i, &value, sizeof value);
        }
        Py_END_ALLOW_THREADS
        result = Py_NewRef(Py_None);
    }
    PyBuffer_Release(&data);
    PyBuffer_Release(&sums);
    return result;
}

/* Whether something else than the C library has taken the place of its `preadv`. */
static PyObject *native_replaced_preadv(PyObject *module, PyObject *arguments) {
    (void)module, (void)arguments;
    Dl_info info;
    ssize_t (*function)(int, const struct iovec *, int, off_t) = preadv;
    void *address;
    memcpy(&address, &function, sizeof address);
    if (!dladdr(address, &info) || info.dli_fname == NULL) Py_RETURN_FALSE;
    const char *name = strrchr(info.dli_fname, '/');
    name = name == NULL ? info.dli_fname : name + 1;
    return PyBool_FromLong(strncmp(name, "libc.", 5) && strncmp(name, "libc-", 5) && strncmp(name, "ld-musl", 7));
}

#endif
