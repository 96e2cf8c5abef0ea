/* XXH3 with 64 bits, of bytes that lie in several pieces.

   Written from the specification of the algorithm (doc/xxhash_spec.md in the project xxHash), whose terms are used. */

#ifndef AGENTSTATE_XXH3_H
#define AGENTSTATE_XXH3_H

#include <stddef.h>
#include <stdint.h>
#include <string.h>

#if !defined(__BYTE_ORDER__) || __BYTE_ORDER__ != __ORDER_LITTLE_ENDIAN__ || !defined(__SIZEOF_INT128__)
#error "a 64-bit machine with little-endian numbers is needed"
#endif

/* The widest registers that are used, in bits; tests compile the narrower ways with less. */
#ifndef AGENTSTATE_SIMD
#define AGENTSTATE_SIMD 512
#endif

#if defined(__x86_64__)
#include <immintrin.h>
#endif

/* Bytes that are followed by those of the next piece. */
struct piece {
    const uint8_t *data;
    size_t size;
};

enum { STRIPE = 64, STRIPES_A_BLOCK = 16, SECRET = 192, SHORT = 240 };

#define P32_1 0x9E3779B1u
#define P32_2 0x85EBCA77u
#define P32_3 0xC2B2AE3Du
#define P64_1 0x9E3779B185EBCA87u
#define P64_2 0xC2B2AE3D27D4EB4Fu
#define P64_3 0x165667B19E3779F9u
#define P64_4 0x85EBCA77C2B2AE63u
#define P64_5 0x27D4EB2F165667C5u
#define MX_1 0x165667919E3779F9u
#define MX_2 0x9FB21C651E98DF25u

/* The default secret, as little-endian numbers. */
static const uint64_t default_secret[SECRET / 8] = {
    0xbe4ba423396cfeb8u, 0x1cad21f72c81017cu, 0xdb979083e96dd4deu, 0x1f67b3b7a4a44072u,
    0x78e5c0cc4ee679cbu, 0x2172ffcc7dd05a82u, 0x8e2443f7744608b8u, 0x4c263a81e69035e0u,
    0xcb00c391bb52283cu, 0xa32e531b8b65d088u, 0x4ef90da297486471u, 0xd8acdea946ef1938u,
    0x3f349ce33f76faa8u, 0x1d4f0bc7c7bbdcf9u, 0x3159b4cd4be0518au, 0x647378d9c97e9fc8u,
    0xc3ebd33483acc5eau, 0xeb6313faffa081c5u, 0x49daf0b751dd0d17u, 0x9e68d429265516d3u,
    0xfca1477d58be162bu, 0xce31d07ad1b8f88fu, 0x280416958f3acb45u, 0x7e404bbbcafbd7afu,
};

static inline uint64_t load64(const void *from) {
    uint64_t value;
    memcpy(&value, from, sizeof value);
    return value;
}

static inline uint32_t load32(const void *from) {
    uint32_t value;
    memcpy(&value, from, sizeof value);
    return value;
}

/* A number of the secret, at any byte of it. */
static inline uint64_t secret64(size_t at) { return load64((const uint8_t *)default_secret + at); }

static inline uint64_t rotated(uint64_t value, int bits) { return value << bits | value >> (64 - bits); }

/* The halves of the product of 128 bits. */
static inline uint64_t folded(uint64_t a, uint64_t b) {
    unsigned __int128 product = (unsigned __int128)a * b;
    return (uint64_t)product ^ (uint64_t)(product >> 64);
}

static inline uint64_t avalanche(uint64_t x) {
    x = (x ^ (x >> 37)) * MX_1;
    return x ^ (x >> 32);
}

static inline uint64_t avalanche_xxh64(uint64_t x) {
    x = (x ^ (x >> 33)) * P64_2;
    x = (x ^ (x >> 29)) * P64_3;
    return x ^ (x >> 32);
}

static inline uint64_t mixed(const uint8_t *data, size_t secret_at, uint64_t seed) {
    return folded(load64(data) ^ (secret64(secret_at) + seed), load64(data + 8) ^ (secret64(secret_at + 8) - seed));
}

/* At most SHORT bytes. */
static uint64_t xxh3_of_few(const uint8_t *data, size_t size, uint64_t seed) {
    if (size == 0) return avalanche_xxh64(seed ^ secret64(56) ^ secret64(64));
    if (size <= 3) {
        uint32_t combined = (uint32_t)data[size - 1] | (uint32_t)size << 8 | (uint32_t)data[0] << 16 |
                            (uint32_t)data[size >> 1] << 24;
        uint32_t keyed = (uint32_t)secret64(0) ^ (uint32_t)(secret64(0) >> 32);
        return avalanche_xxh64(((uint64_t)keyed + seed) ^ combined);
    }
    if (size <= 8) {
        uint64_t modified = seed ^ (uint64_t)__builtin_bswap32((uint32_t)seed) << 32;
        uint64_t combined = (uint64_t)load32(data + size - 4) | (uint64_t)load32(data) << 32;
        uint64_t value = ((secret64(8) ^ secret64(16)) - modified) ^ combined;
        value = (value ^ rotated(value, 49) ^ rotated(value, 24)) * MX_2;
        value = (value ^ ((value >> 35) + size)) * MX_2;
        return value ^ (value >> 28);
    }
    if (size <= 16) {
        uint64_t low = ((secret64(24) ^ secret64(32)) + seed) ^ load64(data);
        uint64_t high = ((secret64(40) ^ secret64(48)) - seed) ^ load64(data + size - 8);
        return avalanche(size + __builtin_bswap64(low) + high + folded(low, high));
    }
    uint64_t sum = size * P64_1;
    if (size <= 128) {
        for (size_t i = 0; i <= (size - 1) / 32; i++) {
            sum += mixed(data + 16 * i, 32 * i, seed);
            sum += mixed(data + size - 16 * i - 16, 32 * i + 16, seed);
        }
        return avalanche(sum);
    }
    for (size_t i = 0; i < 8; i++) sum += mixed(data + 16 * i, 16 * i, seed);
    sum = avalanche(sum);
    for (size_t i = 8; i < size / 16; i++) sum += mixed(data + 16 * i, 16 * (i - 8) + 3, seed);
    return avalanche(sum + mixed(data + size - 16, 119, seed));
}

/* Takes `count` whole stripes into the accumulators; `at` is the number of the first one in its block. */
typedef void consuming(uint64_t sums[8], const uint8_t *data, size_t count, const uint8_t *secret, unsigned at);

static void accumulate(uint64_t sums[8], const uint8_t *stripe, const uint8_t *secret) {
    for (int i = 0; i < 8; i++) {
        uint64_t number = load64(stripe + 8 * i), value = number ^ load64(secret + 8 * i);
        sums[i ^ 1] += number;
        sums[i] += (value & 0xFFFFFFFFu) * (value >> 32);
    }
}

static void consume_anywhere(uint64_t sums[8], const uint8_t *data, size_t count, const uint8_t *secret, unsigned at) {
    for (; count; count--, data += STRIPE) {
        accumulate(sums, data, secret + 8 * at);
        if (++at < STRIPES_A_BLOCK) continue;
        at = 0;
        for (int i = 0; i < 8; i++)
            sums[i] = (sums[i] ^ (sums[i] >> 47) ^ load64(secret + SECRET - STRIPE + 8 * i)) * P32_1;
    }
}

#if defined(__x86_64__)

__attribute__((target("avx2"))) static void consume_avx2(uint64_t sums[8], const uint8_t *data, size_t count,
                                                         const uint8_t *secret, unsigned at) {
    const __m256i prime = _mm256_set1_epi64x(P32_1);
    __m256i acc[2] = {_mm256_loadu_si256((const __m256i *)sums), _mm256_loadu_si256((const __m256i *)(sums + 4))};
    for (; count; count--, data += STRIPE) {
        for (int half = 0; half < 2; half++) {
            __m256i number = _mm256_loadu_si256((const __m256i *)(data + 32 * half));
            __m256i key = _mm256_loadu_si256((const __m256i *)(secret + 8 * at + 32 * half));
            __m256i value = _mm256_xor_si256(number, key);
            __m256i product = _mm256_mul_epu32(value, _mm256_srli_epi64(value, 32));
            acc[half] = _mm256_add_epi64(acc[half], _mm256_add_epi64(product, _mm256_shuffle_epi32(number, 0x4E)));
        }
        if (++at < STRIPES_A_BLOCK) continue;
        at = 0;
        for (int half = 0; half < 2; half++) {
            __m256i key = _mm256_loadu_si256((const __m256i *)(secret + SECRET - STRIPE + 32 * half));
            __m256i value = _mm256_xor_si256(_mm256_xor_si256(acc[half], _mm256_srli_epi64(acc[half], 47)), key);
            __m256i high = _mm256_slli_epi64(_mm256_mul_epu32(_mm256_srli_epi64(value, 32), prime), 32);
            acc[half] = _mm256_add_epi64(_mm256_mul_epu32(value, prime), high);
        }
    }
    _mm256_storeu_si256((__m256i *)sums, acc[0]);
    _mm256_storeu_si256((__m256i *)(sums + 4), acc[1]);
}

__attribute__((target("avx512f"))) static void consume_avx512(uint64_t sums[8], const uint8_t *data, size_t count,
                                                              const uint8_t *secret, unsigned at) {
    const __m512i prime = _mm512_set1_epi64(P32_1);
    __m512i acc = _mm512_loadu_si512(sums);
    for (; count; count--, data += STRIPE) {
        __m512i number = _mm512_loadu_si512(data);
        __m512i value = _mm512_xor_si512(number, _mm512_loadu_si512(secret + 8 * at));
        __m512i product = _mm512_mul_epu32(value, _mm512_srli_epi64(value, 32));
        acc = _mm512_add_epi64(acc, _mm512_add_epi64(product, _mm512_shuffle_epi32(number, _MM_PERM_BADC)));
        if (++at < STRIPES_A_BLOCK) continue;
        at = 0;
        value = _mm512_xor_si512(acc, _mm512_srli_epi64(acc, 47));
        value = _mm512_xor_si512(value, _mm512_loadu_si512(secret + SECRET - STRIPE));
        __m512i high = _mm512_slli_epi64(_mm512_mul_epu32(_mm512_srli_epi64(value, 32), prime), 32);
        acc = _mm512_add_epi64(_mm512_mul_epu32(value, prime), high);
    }
    _mm512_storeu_si512(sums, acc);
}

static consuming *best_here(void) {
    __builtin_cpu_init();
    if (AGENTSTATE_SIMD >= 512 && __builtin_cpu_supports("avx512f")) return consume_avx512;
    if (AGENTSTATE_SIMD >= 256 && __builtin_cpu_supports("avx2")) return consume_avx2;
    return consume_anywhere;
}

#else

static consuming *best_here(void) { return consume_anywhere; }

#endif

/* The way that this processor is fastest with; set once, when the module is loaded. */
static consuming *consume = consume_anywhere;

/* Copies `size` bytes, from byte `at` of the first piece on. */
static void collect(uint8_t *to, const struct piece *from, size_t at, size_t size) {
    while (size) {
        size_t some = from->size - at < size ? from->size - at : size;
        if (some) memcpy(to, from->data + at, some);
        to += some;
        size -= some;
        from++;
        at = 0;
    }
}

/* The checksum of `size` bytes, from byte `at` of the first piece on. */
static uint64_t xxh3(const struct piece *from, size_t at, size_t size, uint64_t seed) {
    if (size <= SHORT) {
        uint8_t few[SHORT];
        if (size && from->size - at >= size) return xxh3_of_few(from->data + at, size, seed);
        collect(few, from, at, size);
        return xxh3_of_few(few, size, seed);
    }
    uint64_t secret_numbers[SECRET / 8], sums[8] = {P32_3, P64_1, P64_2, P64_3, P64_4, P32_2, P64_5, P32_1};
    for (int i = 0; i < SECRET / 8; i++) secret_numbers[i] = default_secret[i] + (i % 2 ? 0 - seed : seed);
    const uint8_t *secret = (const uint8_t *)secret_numbers;

    /* The last 64 bytes, which may begin before the last whole stripe ends. */
    uint8_t last[STRIPE], stripe[STRIPE];
    const struct piece *of_last = from;
    size_t skipped = at + size - STRIPE;
    while (skipped >= of_last->size) skipped -= (of_last++)->size;
    collect(last, of_last, skipped, STRIPE);

    size_t stripes = (size - 1) / STRIPE;
    unsigned in_block = 0;
    while (stripes) {
        size_t there = (from->size - at) / STRIPE, some = there < stripes ? there : stripes;
        if (some) {
            consume(sums, from->data + at, some, secret, in_block);
            at += some * STRIPE;
        } else {
            some = 1;
            collect(stripe, from, at, STRIPE);
            consume(sums, stripe, 1, secret, in_block);
            for (at += STRIPE; at >= from->size && stripes > 1; from++) at -= from->size;
        }
        in_block = (unsigned)((in_block + some) % STRIPES_A_BLOCK);
        stripes -= some;
    }
    accumulate(sums, last, secret + SECRET - STRIPE - 7);

    uint64_t merged = size * P64_1;
    for (int i = 0; i < 4; i++)
        merged += folded(sums[2 * i] ^ load64(secret + 11 + 16 * i), sums[2 * i + 1] ^ load64(secret + 19 + 16 * i));
    return avalanche(merged);
}

#endif
