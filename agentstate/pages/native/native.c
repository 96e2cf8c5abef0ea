/* The extension `_native`: see __init__.py beside it. */

#define PY_SSIZE_T_CLEAN
#define Py_LIMITED_API 0x030B0000
#define _FILE_OFFSET_BITS 64
#define _GNU_SOURCE
#include <Python.h>

#include <errno.h>
#include <limits.h>
#include <sys/uio.h>

#include "codec.h"
#include "xxh3.h"

/* Raised with every change of what is called from Python: an older build of a checkout is then not used. */
enum { INTERFACE = 4 };

enum { KEY = 32 };

/* Letting go of the interpreter lock costs a hand-over, which beside busy threads takes longer than so few bytes. */
enum { FEW_BYTES = 64 << 10 };

/* ---- arrays that the caller gives ---- */

struct views {
    Py_buffer *all;
    Py_ssize_t count, room;
};

static void release(struct views *views) {
    while (views->count) PyBuffer_Release(&views->all[--views->count]);
    PyMem_Free(views->all);
    views->all = NULL;
}

/* Adds a view of each array of a sequence. Returns how many there are, or -1 and raises. */
static Py_ssize_t add_views(struct views *views, PyObject *arrays, int flags) {
    Py_ssize_t count = PySequence_Size(arrays);
    if (count < 0) return -1;
    if (views->count + count > views->room) {
        Py_ssize_t room = 2 * views->room + count;
        Py_buffer *all = PyMem_Realloc(views->all, (size_t)room * sizeof *all);
        if (all == NULL) return PyErr_NoMemory(), -1;
        views->all = all;
        views->room = room;
    }
    for (Py_ssize_t i = 0; i < count; i++) {
        PyObject *array = PySequence_GetItem(arrays, i);
        if (array == NULL) return -1;
        int failed = PyObject_GetBuffer(array, &views->all[views->count], flags);
        Py_DECREF(array);
        if (failed) return -1;
        views->count++;
    }
    return count;
}

#include "rows.h"

/* ---- what an extent's header says ---- */

typedef struct {
    PyObject ob_base;
    Py_buffer fingerprint, keys, page_sums, block_sums;
    size_t pages, blocks, layers, block_pages, components;
    size_t *component_bytes;
    uint64_t *block_seeds;
} Verifier;

static uint64_t seed_of(const Verifier *self, size_t first, size_t count) {
    struct piece pieces[2] = {{self->fingerprint.buf, KEY}, {(const uint8_t *)self->keys.buf + KEY * first, KEY * count}};
    return xxh3(pieces, 0, KEY + KEY * count, 0);
}

static void verifier_dealloc(PyObject *object) {
    Verifier *self = (Verifier *)object;
    PyTypeObject *type = Py_TYPE(object);
    PyBuffer_Release(&self->fingerprint);
    PyBuffer_Release(&self->keys);
    PyBuffer_Release(&self->page_sums);
    PyBuffer_Release(&self->block_sums);
    PyMem_Free(self->component_bytes);
    PyMem_Free(self->block_seeds);
    freefunc release_object = (freefunc)PyType_GetSlot(type, Py_tp_free);
    release_object(object);
    Py_DECREF(type);
}

/* Whether everything fits together; raises if not. */
static int complete(Verifier *self, PyObject *component_bytes, Py_ssize_t block_pages) {
    Py_ssize_t components = PySequence_Size(component_bytes);
    if (components < 0) return 0;
    self->components = (size_t)components;
    self->component_bytes = PyMem_Calloc(self->components + 1, sizeof *self->component_bytes);
    if (self->component_bytes == NULL) return PyErr_NoMemory(), 0;
    for (Py_ssize_t i = 0; i < components; i++) {
        PyObject *number = PySequence_GetItem(component_bytes, i);
        if (number == NULL) return 0;
        size_t n_bytes = PyLong_AsSize_t(number);
        Py_DECREF(number);
        if (n_bytes == (size_t)-1 && PyErr_Occurred()) return 0;
        if (n_bytes == 0) return PyErr_SetString(PyExc_ValueError, "a component has no bytes"), 0;
        self->component_bytes[i] = n_bytes;
    }
    self->pages = (size_t)self->keys.len / KEY;
    if (self->fingerprint.len != KEY || self->keys.len % KEY || components == 0 || block_pages < 1)
        return PyErr_SetString(PyExc_ValueError, "no fingerprint, keys, components or blocks of an extent"), 0;
    self->block_pages = (size_t)block_pages;
    self->blocks = (self->pages + self->block_pages - 1) / self->block_pages;
    self->layers = self->pages ? (size_t)self->page_sums.len / (8 * self->pages) : 0;
    if ((size_t)self->page_sums.len != 8 * self->layers * self->pages ||
        (size_t)self->block_sums.len != 8 * self->layers * self->blocks)
        return PyErr_SetString(PyExc_ValueError, "the checksums are not those of so many pages"), 0;
    self->block_seeds = PyMem_Calloc(self->blocks + 1, sizeof *self->block_seeds);
    if (self->block_seeds == NULL) return PyErr_NoMemory(), 0;
    for (size_t block = 0, first = 0; block < self->blocks; block++, first += self->block_pages) {
        size_t left = self->pages - first;
        self->block_seeds[block] = seed_of(self, first, left < self->block_pages ? left : self->block_pages);
    }
    return 1;
}

static PyObject *verifier_new(PyTypeObject *type, PyObject *arguments, PyObject *names) {
    allocfunc allocate = (allocfunc)PyType_GetSlot(type, Py_tp_alloc);
    Verifier *self = (Verifier *)allocate(type, 0);
    if (self == NULL) return NULL;
    PyObject *component_bytes;
    Py_ssize_t block_pages;
    if (names != NULL && PyDict_Size(names)) PyErr_SetString(PyExc_TypeError, "Verifier takes no keyword arguments");
    else if (PyArg_ParseTuple(arguments, "y*y*Ony*y*", &self->fingerprint, &self->keys, &component_bytes, &block_pages,
                              &self->page_sums, &self->block_sums) &&
             complete(self, component_bytes, block_pages))
        return (PyObject *)self;
    Py_DECREF((PyObject *)self);
    return NULL;
}

/* ---- verifying ---- */

/* The pieces of one component, and where in them a page begins; it moves forward only. */
struct found {
    struct piece *pieces;
    size_t piece, at, row;
};

/* Pages that were found, from slot `slot` on. */
struct rows {
    const Verifier *of;
    size_t layer, slot, count;
    struct found *components;
    struct piece *pieces;
    size_t n_bytes;
};

static void forget(struct rows *rows) {
    PyMem_Free(rows->components);
    PyMem_Free(rows->pieces);
}

/* Describes `components`, whose arrays are kept by `views`. Raises, and returns 0, if they are no pages. */
static int describe(struct rows *rows, const Verifier *of, struct views *views, Py_ssize_t layer, Py_ssize_t slot,
                    PyObject *components) {
    if (layer < 0 || (of->pages && (size_t)layer >= of->layers) || slot < 0)
        return PyErr_SetString(PyExc_ValueError, "no such layer or slot"), 0;
    Py_ssize_t count = PySequence_Size(components), before = views->count;
    if (count < 0) return 0;
    if ((size_t)count != of->components) return PyErr_SetString(PyExc_ValueError, "not as many components"), 0;
    *rows = (struct rows){.of = of, .layer = (size_t)layer, .slot = (size_t)slot};
    Py_ssize_t *ends = PyMem_Calloc((size_t)count, sizeof *ends);
    rows->components = PyMem_Calloc((size_t)count, sizeof *rows->components);
    if (ends == NULL || rows->components == NULL) return PyMem_Free(ends), PyErr_NoMemory(), 0;
    for (Py_ssize_t c = 0; c < count; c++) {
        PyObject *arrays = PySequence_GetItem(components, c);
        Py_ssize_t added = arrays == NULL ? -1 : add_views(views, arrays, PyBUF_SIMPLE);
        Py_XDECREF(arrays);
        if (added < 0) return PyMem_Free(ends), 0;
        ends[c] = views->count - before;
    }
    rows->pieces = PyMem_Calloc((size_t)(views->count - before) + 1, sizeof *rows->pieces);
    if (rows->pieces == NULL) return PyMem_Free(ends), PyErr_NoMemory(), 0;
    int fit = 1;
    for (Py_ssize_t c = 0, i = 0; c < count; c++) {
        size_t n_bytes = 0;
        rows->components[c].pieces = rows->pieces + i;
        for (; i < ends[c]; i++) {
            const Py_buffer *view = &views->all[before + i];
            rows->pieces[i] = (struct piece){view->buf, (size_t)view->len};
            n_bytes += (size_t)view->len;
        }
        if (c == 0) rows->count = n_bytes / of->component_bytes[0];
        fit &= n_bytes == rows->count * of->component_bytes[c];
        rows->n_bytes += n_bytes;
    }
    PyMem_Free(ends);
    if (!fit) PyErr_SetString(PyExc_ValueError, "the components are not of so many pages");
    return fit;
}

/* The checksum of `count` rows from `first` on; ``first` is never less than in a call before. */
static uint64_t sum(struct rows *rows, size_t first, size_t count, uint64_t seed) {
    uint64_t value = seed + rows->layer;
    for (size_t c = 0; c < rows->of->components; c++) {
        struct found *found = &rows->components[c];
        size_t row_bytes = rows->of->component_bytes[c];
        found->at += (first - found->row) * row_bytes;
        found->row = first;
        while (found->at >= found->pieces[found->piece].size) found->at -= found->pieces[found->piece++].size;
        value = xxh3(found->pieces + found->piece, found->at, count * row_bytes, value);
    }
    return value;
}

/* Writes the wrong slots, from the first one on, to `wrong`, which has room for all of them. Returns how many. */
static size_t find_wrong(struct rows *rows, size_t *wrong) {
    const Verifier *of = rows->of;
    const uint8_t *page_sums = (const uint8_t *)of->page_sums.buf + 8 * rows->layer * of->pages;
    const uint8_t *block_sums = (const uint8_t *)of->block_sums.buf + 8 * rows->layer * of->blocks;
    size_t count = 0, at = rows->slot, end = rows->slot + rows->count;
    while (at < end) {
        if (at >= of->pages) {
            wrong[count++] = at++;
            continue;
        }
        size_t block = at / of->block_pages, last = (block + 1) * of->block_pages;
        if (last > of->pages) last = of->pages;
        if (at % of->block_pages == 0 && last <= end &&
            sum(rows, at - rows->slot, last - at, of->block_seeds[block]) == load64(block_sums + 8 * block)) {
            at = last;
            continue;
        }
        /* Part of a block, or one in which not every page is right. */
        size_t stop = last < end ? last : end;
        for (; at < stop; at++)
            if (sum(rows, at - rows->slot, 1, seed_of(of, at, 1)) != load64(page_sums + 8 * at)) wrong[count++] = at;
    }
    return count;
}

/* The wrong slots as a list; NULL if it raises. */
static PyObject *wrong_among(struct rows *rows) {
    size_t *wrong = PyMem_Calloc(rows->count + 1, sizeof *wrong), count;
    if (wrong == NULL) return PyErr_NoMemory();
    if (rows->n_bytes < FEW_BYTES) {
        count = find_wrong(rows, wrong);
    } else {
        Py_BEGIN_ALLOW_THREADS
        count = find_wrong(rows, wrong);
        Py_END_ALLOW_THREADS
    }
    PyObject *list = PyList_New((Py_ssize_t)count);
    for (size_t i = 0; list != NULL && i < count; i++) {
        PyObject *slot = PyLong_FromSize_t(wrong[i]);
        if (slot == NULL) Py_CLEAR(list);
        else PyList_SetItem(list, (Py_ssize_t)i, slot);
    }
    PyMem_Free(wrong);
    return list;
}

static PyObject *verifier_wrong_slots(PyObject *self, PyObject *arguments) {
    Py_ssize_t layer, slot;
    PyObject *components, *wrong = NULL;
    if (!PyArg_ParseTuple(arguments, "nnO", &layer, &slot, &components)) return NULL;
    struct views views = {0};
    struct rows rows = {0};
    if (describe(&rows, (Verifier *)self, &views, layer, slot, components)) wrong = wrong_among(&rows);
    forget(&rows);
    release(&views);
    return wrong;
}

/* ---- checksums of new pages ---- */

/* Writes the checksums of all pages and blocks of a layer. */
static void sum_all(struct rows *rows, struct found *before, uint8_t *page_sums, uint8_t *block_sums) {
    const Verifier *of = rows->of;
    size_t cursors = of->components * sizeof *before;
    for (size_t block = 0, first = 0; block < of->blocks; block++, first += of->block_pages) {
        size_t last = first + of->block_pages < of->pages ? first + of->block_pages : of->pages;
        memcpy(before, rows->components, cursors);
        for (size_t page = first; page < last; page++) {
            uint64_t value = sum(rows, page, 1, seed_of(of, page, 1));
            memcpy(page_sums + 8 * page, &value, sizeof value);
        }
        /* A block is gone through again while the processor still has it. */
        memcpy(rows->components, before, cursors);
        uint64_t value = sum(rows, first, last - first, of->block_seeds[block]);
        memcpy(block_sums + 8 * block, &value, sizeof value);
    }
}

static PyObject *verifier_sum_up(PyObject *object, PyObject *arguments) {
    Verifier *self = (Verifier *)object;
    Py_ssize_t layer;
    PyObject *components, *result = NULL;
    Py_buffer page_sums, block_sums;
    if (!PyArg_ParseTuple(arguments, "nOw*w*", &layer, &components, &page_sums, &block_sums)) return NULL;
    struct views views = {0};
    struct rows rows = {0};
    struct found *before = PyMem_Calloc(self->components, sizeof *before);
    if (before == NULL) {
        PyErr_NoMemory();
    } else if (describe(&rows, self, &views, layer, 0, components)) {
        if (rows.count != self->pages || (size_t)page_sums.len != 8 * self->pages ||
            (size_t)block_sums.len != 8 * self->blocks) {
            PyErr_SetString(PyExc_ValueError, "not all pages, or not room for as many checksums");
        } else {
            Py_BEGIN_ALLOW_THREADS
            sum_all(&rows, before, page_sums.buf, block_sums.buf);
            Py_END_ALLOW_THREADS
            result = Py_NewRef(Py_None);
        }
    }
    PyMem_Free(before);
    forget(&rows);
    release(&views);
    PyBuffer_Release(&page_sums);
    PyBuffer_Release(&block_sums);
    return result;
}

/* ---- reading ---- */

struct range {
    struct iovec *into;
    int arrays;
    off_t offset;
    ssize_t wanted, got;
    PyObject *given; /* the sequence of arrays, borrowed from the caller's ranges */
};

/* Reads range by range up to one that is short or fails. Returns how many were read, the last one with what came of it:
   -1 if it failed, and `errno` says why. */
static Py_ssize_t read_all(int fd, struct range *ranges, Py_ssize_t count) {
    for (Py_ssize_t i = 0; i < count; i++) {
        struct range *range = &ranges[i];
        do range->got = preadv(fd, range->into, range->arrays, range->offset);
        while (range->got < 0 && errno == EINTR);
        if (range->got < range->wanted) return i + 1;
    }
    return count;
}

/* The same by a function of Python's. Returns -1 if it raises. */
static Py_ssize_t call_for_all(PyObject *function, int fd, struct range *ranges, Py_ssize_t count) {
    for (Py_ssize_t i = 0; i < count; i++) {
        struct range *range = &ranges[i];
        PyObject *got = PyObject_CallFunction(function, "iOL", fd, range->given, (long long)range->offset);
        if (got == NULL) return -1;
        range->got = PyLong_AsSsize_t(got);
        Py_DECREF(got);
        if (range->got == -1 && PyErr_Occurred()) return -1;
        if (range->got < range->wanted) return i + 1;
    }
    return count;
}

/* Takes the caller's ranges apart. Raises, and returns 0, if they are none. */
static int plan(PyObject *given, struct range *ranges, Py_ssize_t count, struct views *views, struct iovec **vectors) {
    for (Py_ssize_t i = 0; i < count; i++) {
        PyObject *item = PySequence_GetItem(given, i);
        long long offset;
        Py_ssize_t wanted, arrays = -1;
        if (item != NULL && !PyTuple_Check(item)) PyErr_SetString(PyExc_TypeError, "a range is a tuple");
        else if (item != NULL && PyArg_ParseTuple(item, "OLn", &ranges[i].given, &offset, &wanted))
            arrays = add_views(views, ranges[i].given, PyBUF_WRITABLE);
        Py_XDECREF(item);
        if (arrays < 0) return 0;
        if (arrays > INT_MAX || offset < 0 || wanted < 0) return PyErr_SetString(PyExc_ValueError, "no such range"), 0;
        ranges[i].offset = offset;
        ranges[i].wanted = wanted;
        ranges[i].arrays = (int)arrays;
    }
    *vectors = PyMem_Calloc((size_t)views->count + 1, sizeof **vectors);
    if (*vectors == NULL) return PyErr_NoMemory(), 0;
    struct iovec *next = *vectors;
    for (Py_ssize_t i = 0; i < views->count; i++)
        (*vectors)[i] = (struct iovec){views->all[i].buf, (size_t)views->all[i].len};
    for (Py_ssize_t i = 0; i < count; i++) {
        ranges[i].into = next;
        next += ranges[i].arrays;
    }
    return 1;
}

static PyObject *counts_of(const struct range *ranges, Py_ssize_t count) {
    PyObject *list = PyList_New(count);
    for (Py_ssize_t i = 0; list != NULL && i < count; i++) {
        PyObject *got = PyLong_FromSsize_t(ranges[i].got);
        if (got == NULL) Py_CLEAR(list);
        else PyList_SetItem(list, i, got);
    }
    return list;
}

static PyObject *verifier_read(PyObject *self, PyObject *arguments) {
    int fd;
    Py_ssize_t layer, slot, done = -1;
    PyObject *given, *components, *function = Py_None, *result = NULL;
    if (!PyArg_ParseTuple(arguments, "iOnnO|O", &fd, &given, &layer, &slot, &components, &function)) return NULL;
    Py_ssize_t count = PySequence_Size(given);
    if (count < 0) return NULL;
    struct views views = {0};
    struct rows rows = {0};
    struct iovec *vectors = NULL;
    struct range *ranges = PyMem_Calloc((size_t)count + 1, sizeof *ranges);
    if (ranges == NULL) return PyErr_NoMemory();
    if (plan(given, ranges, count, &views, &vectors) &&
        describe(&rows, (Verifier *)self, &views, layer, slot, components)) {
        if (function != Py_None) {
            done = call_for_all(function, fd, ranges, count);
        } else {
            Py_BEGIN_ALLOW_THREADS
            done = read_all(fd, ranges, count);
            Py_END_ALLOW_THREADS
        }
        if (done > 0 && ranges[done - 1].got < 0) {
            PyErr_SetFromErrno(PyExc_OSError);
            done = -1;
        }
    }
    if (done >= 0) {
        int whole = done == count && (count == 0 || ranges[count - 1].got >= ranges[count - 1].wanted);
        PyObject *counts = counts_of(ranges, done), *wrong = whole ? wrong_among(&rows) : Py_NewRef(Py_None);
        if (counts != NULL && wrong != NULL) result = PyTuple_Pack(2, counts, wrong);
        Py_XDECREF(counts);
        Py_XDECREF(wrong);
    }
    forget(&rows);
    PyMem_Free(vectors);
    PyMem_Free(ranges);
    release(&views);
    return result;
}

/* ---- coding ---- */

static PyObject *native_encode(PyObject *module, PyObject *arguments) {
    Py_buffer pages, into, lengths;
    Py_ssize_t page_bytes;
    (void)module;
    if (!PyArg_ParseTuple(arguments, "y*nw*w*", &pages, &page_bytes, &into, &lengths)) return NULL;
    PyObject *result = NULL;
    uint8_t table[TABLE];
    if (page_bytes < 1 || page_bytes > UINT32_MAX || pages.len % page_bytes || into.len < pages.len ||
        lengths.len != 4 * (pages.len / page_bytes)) {
        PyErr_SetString(PyExc_ValueError, "no pages of so many bytes, or not room for them");
    } else {
        int done;
        Py_BEGIN_ALLOW_THREADS
        done = encode_pages(pages.buf, (size_t)(pages.len / page_bytes), (size_t)page_bytes, into.buf, lengths.buf,
                            table);
        Py_END_ALLOW_THREADS
        if (done) result = PyBytes_FromStringAndSize((const char *)table, TABLE);
        else PyErr_SetString(PyExc_ValueError, "the pages changed while they were coded");
    }
    PyBuffer_Release(&pages);
    PyBuffer_Release(&into);
    PyBuffer_Release(&lengths);
    return result;
}

/* Decodes pages to the arrays that `views` keep, one behind the other. Returns 0 if they are not of these lengths. */
static int decode_pages(const uint8_t *table, const uint8_t *coded, size_t left, const uint8_t *lengths, size_t pages,
                        const struct views *views, size_t page_bytes) {
    size_t page = 0;
    for (Py_ssize_t i = 0; i < views->count; i++) {
        uint8_t *into = views->all[i].buf, *end = into + views->all[i].len;
        for (; into < end; into += page_bytes, page++) {
            size_t length = page < pages ? load32(lengths + 4 * page) : left + 1;
            if (length > left || !decode_page(table, coded, length, into, page_bytes)) return 0;
            coded += length;
            left -= length;
        }
    }
    return page == pages && left == 0;
}

static PyObject *native_decode(PyObject *module, PyObject *arguments) {
    Py_buffer table, coded, lengths;
    Py_ssize_t page_bytes;
    PyObject *arrays, *result = NULL;
    (void)module;
    if (!PyArg_ParseTuple(arguments, "y*ny*y*O", &table, &page_bytes, &coded, &lengths, &arrays)) return NULL;
    struct views views = {0};
    if (add_views(&views, arrays, PyBUF_WRITABLE) >= 0) {
        int fit = table.len == TABLE && *(const uint8_t *)table.buf < KINDS && page_bytes > 0 && lengths.len % 4 == 0;
        for (Py_ssize_t i = 0; fit && i < views.count; i++) fit = views.all[i].len % page_bytes == 0;
        if (fit) {
            Py_BEGIN_ALLOW_THREADS
            fit = decode_pages(table.buf, coded.buf, (size_t)coded.len, lengths.buf, (size_t)lengths.len / 4, &views,
                               (size_t)page_bytes);
            Py_END_ALLOW_THREADS
        }
        if (fit) result = Py_NewRef(Py_None);
        else PyErr_SetString(PyExc_ValueError, "no coded pages of these lengths");
    }
    release(&views);
    PyBuffer_Release(&table);
    PyBuffer_Release(&coded);
    PyBuffer_Release(&lengths);
    return result;
}

/* ---- the module ---- */

static PyMethodDef verifier_methods[] = {
    {"wrong_slots", verifier_wrong_slots, METH_VARARGS, NULL},
    {"read", verifier_read, METH_VARARGS, NULL},
    {"sum_up", verifier_sum_up, METH_VARARGS, NULL},
    {0},
};

static PyType_Slot verifier_slots[] = {
    {Py_tp_new, verifier_new},
    {Py_tp_dealloc, verifier_dealloc},
    {Py_tp_methods, verifier_methods},
    {0},
};

static PyType_Spec verifier_spec = {
    .name = "agentstate.pages.native._native.Verifier",
    .basicsize = sizeof(Verifier),
    .flags = Py_TPFLAGS_DEFAULT,
    .slots = verifier_slots,
};

static PyObject *native_xxh3_64(PyObject *module, PyObject *arguments) {
    Py_buffer data;
    unsigned long long seed = 0;
    (void)module;
    if (!PyArg_ParseTuple(arguments, "y*|K", &data, &seed)) return NULL;
    struct piece piece = {data.buf, (size_t)data.len};
    uint64_t value;
    Py_BEGIN_ALLOW_THREADS
    value = xxh3(&piece, 0, piece.size, seed);
    Py_END_ALLOW_THREADS
    PyBuffer_Release(&data);
    return PyLong_FromUnsignedLongLong(value);
}

static PyMethodDef native_functions[] = {
    {"xxh3_64", native_xxh3_64, METH_VARARGS, NULL},
    {"encode", native_encode, METH_VARARGS, NULL},
    {"decode", native_decode, METH_VARARGS, NULL},
    {"read_rows", native_read_rows, METH_VARARGS, NULL},
    {"sector_sums", native_sector_sums, METH_VARARGS, NULL},
    {"replaced_preadv", native_replaced_preadv, METH_NOARGS, NULL},
    {0},
};

static int native_exec(PyObject *module) {
    consume = best_here();
    choose_decoding();
    PyType_Spec *specs[] = {&verifier_spec, &queue_spec};
    const char *names[] = {"Verifier", "Queue"};
    for (int i = 0; i < 2; i++) {
        PyObject *type = PyType_FromSpec(specs[i]);
        if (type == NULL) return -1;
        int failed = PyModule_AddObjectRef(module, names[i], type);
        Py_DECREF(type);
        if (failed) return failed;
    }
    return PyModule_AddIntConstant(module, "INTERFACE", INTERFACE);
}

static PyModuleDef_Slot native_slots[] = {{Py_mod_exec, native_exec}, {0}};

static struct PyModuleDef native_module = {
    PyModuleDef_HEAD_INIT,
    .m_name = "_native",
    .m_methods = native_functions,
    .m_slots = native_slots,
};

PyMODINIT_FUNC PyInit__native(void) { return PyModuleDef_Init(&native_module); }
