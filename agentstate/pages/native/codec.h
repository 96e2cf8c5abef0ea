/* Coding of floating-point numbers of 16 bits without loss, as docs/extent-format.md specifies it: exponents have codes,
   and everything else stays as it is. */

#ifndef AGENTSTATE_CODEC_H
#define AGENTSTATE_CODEC_H

#include <stddef.h>
#include <stdint.h>
#include <string.h>

#include "xxh3.h" /* AGENTSTATE_SIMD, load64, and that numbers are little-endian */

/* A table has its kind, then the exponents that have a code: byte 1 + c has that of code c. The code behind the last one
   is for all others. */
enum { TABLE = 16 };
enum { KIND_RAW = 0, KIND_BF16 = 1, KIND_FP16 = 2, KINDS };
static const size_t codes_of[KINDS] = {0, 15, 7};

/* A component is coded if that saves one byte in so many. */
enum { LEAST_SAVING = 16 };

/* How many bytes a page of so many numbers has before its escapes. */
static inline size_t fixed_bytes(unsigned kind, size_t numbers) {
    return numbers + (numbers + 1) / 2 + (kind == KIND_FP16 ? (numbers + 3) / 4 : 0);
}

/* ---- encoding ---- */

static inline unsigned load16(const uint8_t *from) {
    uint16_t value;
    memcpy(&value, from, sizeof value);
    return value;
}

/* What follows the sign: the exponent in bfloat16, and in float16 the exponent and three bits more. */
static inline unsigned upper_of(uint64_t number) { return (unsigned)(number >> 7 & 0xff); }

static void count_uppers(const uint8_t *data, size_t numbers, uint64_t counts[256]) {
    /* Neighbours often have the same exponent, and a counter is slow to count twice in a row. */
    uint64_t some[4][256] = {{0}};
    size_t i = 0;
    for (; i + 4 <= numbers; i += 4) {
        uint64_t four = load64(data + 2 * i);
        some[0][upper_of(four)]++;
        some[1][upper_of(four >> 16)]++;
        some[2][upper_of(four >> 32)]++;
        some[3][upper_of(four >> 48)]++;
    }
    for (; i < numbers; i++) some[0][upper_of(load16(data + 2 * i))]++;
    for (size_t e = 0; e < 256; e++) counts[e] = some[0][e] + some[1][e] + some[2][e] + some[3][e];
}

/* Gives the most frequent exponents a code, of equally frequent ones the smaller first. Returns how many numbers have
   one. */
static uint64_t choose_codes(const uint64_t counts[256], unsigned kind, uint8_t table[TABLE]) {
    uint64_t coded = 0;
    uint8_t chosen[256] = {0};
    size_t exponents = kind == KIND_BF16 ? 256 : 32;
    memset(table, 0, TABLE);
    table[0] = (uint8_t)kind;
    for (size_t code = 0; code < codes_of[kind]; code++) {
        size_t best = 256;
        for (size_t e = 0; e < exponents; e++)
            if (!chosen[e] && (best == 256 || counts[e] > counts[best])) best = e;
        chosen[best] = 1;
        table[1 + code] = (uint8_t)best;
        coded += counts[best];
    }
    return coded;
}

/* Chooses how pages take the fewest bytes: of kinds that take as many, the first. */
static void choose_table(const uint8_t *pages, size_t count, size_t page_bytes, uint8_t table[TABLE]) {
    uint64_t counts[KINDS][256] = {{0}};
    size_t numbers = page_bytes / 2, all = count * page_bytes, least = all - all / LEAST_SAVING + 1;
    memset(table, 0, TABLE);
    if (page_bytes % 2 || count == 0) return;
    count_uppers(pages, count * numbers, counts[KIND_BF16]);
    for (size_t e = 0; e < 256; e++) counts[KIND_FP16][e / 8] += counts[KIND_BF16][e];
    for (unsigned kind = KIND_BF16; kind < KINDS; kind++) {
        uint8_t other[TABLE];
        size_t escapes = (size_t)(count * numbers - choose_codes(counts[kind], kind, other));
        size_t n_bytes = count * fixed_bytes(kind, numbers) + escapes;
        if (n_bytes >= least) continue;
        least = n_bytes;
        memcpy(table, other, TABLE);
    }
}

/* Writes what stays of a number, and returns its half of a byte. */
static inline unsigned split(unsigned kind, unsigned number, unsigned code, size_t i, uint8_t *rest, uint8_t *twos) {
    if (kind == KIND_BF16) {
        rest[i] = (uint8_t)((number & 0x7f) | (number >> 8 & 0x80));
        return code;
    }
    rest[i] = (uint8_t)number;
    twos[i / 4] |= (uint8_t)((number >> 8 & 3) << i % 4 * 2);
    return code | (number >> 12 & 8);
}

/* Returns how many bytes were written, or 0 if they are more than `most`. Inline, so that each kind has a loop. */
static inline size_t encode_numbers(unsigned kind, const uint8_t code_of[256], const uint8_t *page, size_t numbers,
                                    uint8_t *into, size_t most) {
    if (fixed_bytes(kind, numbers) > most) return 0;
    uint8_t *rest = into, *codes = rest + numbers, *twos = codes + (numbers + 1) / 2;
    uint8_t *escapes = into + fixed_bytes(kind, numbers), *end = into + most;
    const unsigned shift = kind == KIND_BF16 ? 7 : 10, mask = kind == KIND_BF16 ? 0xff : 0x1f;
    const unsigned escape = kind == KIND_BF16 ? 15 : 7;
    memset(twos, 0, (size_t)(escapes - twos));
    for (size_t i = 0; i < numbers; i += 2) {
        unsigned first = load16(page + 2 * i), of_first = first >> shift & mask, code = code_of[of_first];
        unsigned pair = split(kind, first, code, i, rest, twos), escaped = code == escape;
        if (i + 1 < numbers) {
            unsigned second = load16(page + 2 * i + 2), of_second = second >> shift & mask;
            code = code_of[of_second];
            pair |= split(kind, second, code, i + 1, rest, twos) << 4;
            if (escaped | (code == escape)) {
                if (end - escapes < (ptrdiff_t)(escaped + (code == escape))) return 0;
                if (escaped) *escapes++ = (uint8_t)of_first;
                if (code == escape) *escapes++ = (uint8_t)of_second;
            }
        } else if (escaped) {
            if (escapes == end) return 0;
            *escapes++ = (uint8_t)of_first;
        }
        codes[i / 2] = (uint8_t)pair;
    }
    return (size_t)(escapes - into);
}

static size_t encode_page(unsigned kind, const uint8_t code_of[256], const uint8_t *page, size_t numbers, uint8_t *into,
                          size_t most) {
    return kind == KIND_BF16 ? encode_numbers(KIND_BF16, code_of, page, numbers, into, most)
                             : encode_numbers(KIND_FP16, code_of, page, numbers, into, most);
}

/* Codes `count` pages to `into`, which has room for as many bytes, or copies them there if that saves too little.
   Returns 0 if they changed meanwhile. */
static int encode_pages(const uint8_t *pages, size_t count, size_t page_bytes, uint8_t *into, uint8_t *lengths,
                        uint8_t table[TABLE]) {
    choose_table(pages, count, page_bytes, table);
    unsigned kind = table[0];
    size_t all = count * page_bytes;
    uint8_t code_of[256];
    memset(code_of, (int)codes_of[kind], sizeof code_of);
    for (size_t code = 0; code < codes_of[kind]; code++) code_of[table[1 + code]] = (uint8_t)code;
    if (kind == KIND_RAW) memcpy(into, pages, all);
    for (size_t page = 0, at = 0; page < count; page++) {
        size_t length = page_bytes;
        if (kind != KIND_RAW) {
            length = encode_page(kind, code_of, pages + page * page_bytes, page_bytes / 2, into + at, all - at);
            if (length == 0) return 0;
        }
        uint32_t stored = (uint32_t)length;
        memcpy(lengths + 4 * page, &stored, sizeof stored);
        at += length;
    }
    return 1;
}

/* ---- decoding ---- */

/* A coded page: its parts, the last of which are exponents that have no code, in the order of their numbers. */
struct coded {
    const uint8_t *table, *rest, *codes, *twos, *escapes, *end;
};

/* The next one of those; zero when there are no more. */
static inline unsigned next_escape(struct coded *page) { return page->escapes < page->end ? *page->escapes++ : 0; }

/* Writes numbers from the first on, as many as it does at once. Returns how many. */
typedef size_t decoding(struct coded *page, uint8_t *into, size_t numbers);

static void decode_from(struct coded *page, uint8_t *into, size_t first, size_t numbers) {
    unsigned kind = page->table[0], escape = (unsigned)codes_of[kind];
    for (size_t i = first; i < numbers; i++) {
        unsigned half = page->codes[i / 2] >> i % 2 * 4 & 0x0f, code = half & escape, rest = page->rest[i];
        unsigned exponent = code == escape ? next_escape(page) : page->table[1 + code];
        unsigned number;
        if (kind == KIND_BF16) number = (rest & 0x80) << 8 | exponent << 7 | (rest & 0x7f);
        else number = (half & 8) << 12 | (exponent & 0x1f) << 10 | (page->twos[i / 4] >> i % 4 * 2 & 3u) << 8 | rest;
        uint16_t stored = (uint16_t)number;
        memcpy(into + 2 * i, &stored, sizeof stored);
    }
}

static size_t decode_none(struct coded *page, uint8_t *into, size_t numbers) {
    (void)page, (void)into, (void)numbers;
    return 0;
}

#if defined(__x86_64__)
/* The codes of 32 numbers, one a byte. */
__attribute__((target("avx2"))) static inline __m256i halves(const uint8_t *codes) {
    const __m128i nibble = _mm_set1_epi8(0x0f);
    __m128i pairs = _mm_loadu_si128((const __m128i *)codes);
    __m128i even = _mm_and_si128(pairs, nibble), odd = _mm_and_si128(_mm_srli_epi16(pairs, 4), nibble);
    return _mm256_set_m128i(_mm_unpackhi_epi8(even, odd), _mm_unpacklo_epi8(even, odd));
}

/* Writes 32 numbers, of their lower and upper bytes, and adds the exponents of those that have no code. */
__attribute__((target("avx2"))) static inline void put(uint8_t *into, __m256i low, __m256i high, __m256i codes,
                                                       __m256i escape, unsigned shift, struct coded *page) {
    __m256i left = _mm256_unpacklo_epi8(low, high), right = _mm256_unpackhi_epi8(low, high);
    _mm256_storeu_si256((__m256i *)into, _mm256_permute2x128_si256(left, right, 0x20));
    _mm256_storeu_si256((__m256i *)(into + 32), _mm256_permute2x128_si256(left, right, 0x31));
    uint32_t escaped = (uint32_t)_mm256_movemask_epi8(_mm256_cmpeq_epi8(codes, escape));
    for (; escaped; escaped &= escaped - 1) {
        uint8_t *number = into + 2 * __builtin_ctz(escaped);
        unsigned bits = next_escape(page) << shift & 0x7fff;
        number[0] |= (uint8_t)bits;
        number[1] |= (uint8_t)(bits >> 8);
    }
}

__attribute__((target("avx2"))) static inline __m256i looked_up(const uint8_t bytes[16], __m256i index) {
    return _mm256_shuffle_epi8(_mm256_broadcastsi128_si256(_mm_loadu_si128((const __m128i *)bytes)), index);
}

__attribute__((target("avx2"))) static size_t decode_bf16_avx2(struct coded *page, uint8_t *into, size_t numbers) {
    uint8_t highs[16] = {0}, lows[16] = {0};
    for (size_t code = 0; code < codes_of[KIND_BF16]; code++) {
        highs[code] = page->table[1 + code] >> 1;
        lows[code] = (uint8_t)(page->table[1 + code] << 7);
    }
    const __m256i sign = _mm256_set1_epi8((char)0x80), escape = _mm256_set1_epi8(15);
    size_t i = 0;
    for (; i + 32 <= numbers; i += 32) {
        __m256i codes = halves(page->codes + i / 2), rest = _mm256_loadu_si256((const __m256i *)(page->rest + i));
        __m256i high = _mm256_or_si256(_mm256_and_si256(rest, sign), looked_up(highs, codes));
        __m256i low = _mm256_or_si256(_mm256_andnot_si256(sign, rest), looked_up(lows, codes));
        put(into + 2 * i, low, high, codes, escape, 7, page);
    }
    return i;
}

__attribute__((target("avx2"))) static size_t decode_fp16_avx2(struct coded *page, uint8_t *into, size_t numbers) {
    /* By the code and the sign before it. */
    uint8_t highs[16] = {0};
    for (size_t half = 0; half < 16; half++) {
        unsigned exponent = (half & 7) == 7 ? 0 : page->table[1 + (half & 7)] & 0x1f;
        highs[half] = (uint8_t)((half & 8) << 4 | exponent << 2);
    }
    const __m256i seven = _mm256_set1_epi8(7);
    const __m256i four_times = _mm256_setr_epi8(0, 0, 0, 0, 1, 1, 1, 1, 2, 2, 2, 2, 3, 3, 3, 3, 4, 4, 4, 4, 5, 5, 5, 5,
                                                6, 6, 6, 6, 7, 7, 7, 7);
    const __m256i first = _mm256_set1_epi32(0x00000003), second = _mm256_set1_epi32(0x00000300);
    const __m256i third = _mm256_set1_epi32(0x00030000), fourth = _mm256_set1_epi32(0x03000000);
    size_t i = 0;
    for (; i + 32 <= numbers; i += 32) {
        __m256i half = halves(page->codes + i / 2), low = _mm256_loadu_si256((const __m256i *)(page->rest + i));
        __m256i bytes = _mm256_shuffle_epi8(_mm256_set1_epi64x((long long)load64(page->twos + i / 4)), four_times);
        __m256i twos = _mm256_or_si256(
            _mm256_or_si256(_mm256_and_si256(bytes, first), _mm256_and_si256(_mm256_srli_epi16(bytes, 2), second)),
            _mm256_or_si256(_mm256_and_si256(_mm256_srli_epi16(bytes, 4), third),
                            _mm256_and_si256(_mm256_srli_epi16(bytes, 6), fourth)));
        __m256i high = _mm256_or_si256(looked_up(highs, half), twos);
        put(into + 2 * i, low, high, _mm256_and_si256(half, seven), seven, 10, page);
    }
    return i;
}
#endif

static decoding *decode_many[KINDS] = {decode_none, decode_none, decode_none};

static void choose_decoding(void) {
#if defined(__x86_64__)
    __builtin_cpu_init();
    if (AGENTSTATE_SIMD >= 256 && __builtin_cpu_supports("avx2")) {
        decode_many[KIND_BF16] = decode_bf16_avx2;
        decode_many[KIND_FP16] = decode_fp16_avx2;
    }
#endif
}

/* Decodes a page of `page_bytes` from `length` bytes. Returns 0 if no page has so many. */
static int decode_page(const uint8_t table[TABLE], const uint8_t *coded, size_t length, uint8_t *into,
                       size_t page_bytes) {
    unsigned kind = table[0];
    if (kind == KIND_RAW) {
        if (length != page_bytes) return 0;
        memcpy(into, coded, length);
        return 1;
    }
    size_t numbers = page_bytes / 2;
    if (page_bytes % 2 || length < fixed_bytes(kind, numbers)) return 0;
    const uint8_t *codes = coded + numbers, *twos = codes + (numbers + 1) / 2;
    struct coded page = {table, coded, codes, twos, coded + fixed_bytes(kind, numbers), coded + length};
    decode_from(&page, into, decode_many[kind](&page, into, numbers), numbers);
    return 1;
}

#endif
