/* What queries of one key head see: scores of keys, their exponentials, sums of values so weighted.
 *
 * Keys and values are rows of `size` numbers, float32 or bfloat16; a query is one as prepare() leaves it, `wide` words of
 * 4 bytes. A score has the same bits wherever it is worked out: its vectors are summed in their order, then their lanes by
 * the same tree for each.
 */
#ifndef AMPHISTA_ATTENTION_H
#define AMPHISTA_ATTENTION_H

#include <math.h>

#include "products.h"

enum { WIDENED = 32, MOST_WIDENED = 128 }; /* rows of values at once, and their size */
enum { AHEAD_OF_CACHE = 4096 }; /* bytes: how early rows are asked for */
#if LANES == 16
enum { MIX_VECTORS = 4 };
#else
enum { MIX_VECTORS = 2 };
#endif

/* A cache's rows, and how a query lies. */
typedef struct {
    int kind; /* FLOAT32 or BFLOAT16 */
    long size, wide;
} Cached;

/* Numbers of 4 bytes that n queries take as rows, and LANES keys. */
INLINE long queries_room(long n, long wide) { return (n + LANES) * wide; }

/* Adds the products of each word's number, or two numbers of 16 bits. */
INLINE vec add_words(const int kind, vec total, uvec w, uvec x) {
    return kind == FLOAT32 ? total + (vec)w * (vec)x : add_pairs(total, w, x);
}

/* The sums of LANES vectors' lanes, side by side. */
INLINE vec sums_of(const vec *v) {
#if LANES == 16
    __m512 twos[8], fours[4], eights[2];
    for (int i = 0; i < 8; i++) {
        const __m512 a = (__m512)v[2 * i], b = (__m512)v[2 * i + 1];
        twos[i] = _mm512_add_ps(_mm512_unpacklo_ps(a, b), _mm512_unpackhi_ps(a, b));
    }
    for (int i = 0; i < 4; i++) {
        const __m512d a = (__m512d)twos[2 * i], b = (__m512d)twos[2 * i + 1];
        fours[i] = _mm512_add_ps((__m512)_mm512_unpacklo_pd(a, b), (__m512)_mm512_unpackhi_pd(a, b));
    }
#define HALVES_ADDED(a, b) _mm512_add_ps(_mm512_shuffle_f32x4(a, b, 0x88), _mm512_shuffle_f32x4(a, b, 0xdd))
    for (int i = 0; i < 2; i++) eights[i] = HALVES_ADDED(fours[2 * i], fours[2 * i + 1]);
    return (vec)HALVES_ADDED(eights[0], eights[1]);
#elif LANES == 8
#define ADDED(at) _mm256_hadd_ps((__m256)v[at], (__m256)v[at + 1])
    const __m256 low = _mm256_hadd_ps(ADDED(0), ADDED(2)), high = _mm256_hadd_ps(ADDED(4), ADDED(6)); /* of both halves */
    return (vec)_mm256_add_ps(_mm256_permute2f128_ps(low, high, 0x20), _mm256_permute2f128_ps(low, high, 0x31));
#else
    return sums(v[0], v[1], v[2], v[3]);
#endif
}

/* Scores of one query with `num` keys, one after the other; of others 0. `kind` and `num` are constants, and for heads of
 * many models `size`. */
INLINE void score_keys(const int kind, const int num, const long size, const char *keys, const float *query, float *out) {
    const long each = kind == FLOAT32 ? 4 : 2, step = sizeof(vec), bytes = size * each, whole = bytes / step * step;
    const long rest = size - whole / each;
    vec parts[LANES] = {{0}};
    for (long at = 0; at < whole; at += step) {
        const uvec x = (uvec)load(query + at / 4);
#pragma GCC unroll 16
        for (int k = 0; k < num; k++) parts[k] = add_words(kind, parts[k], *(const any_uvec *)(keys + k * bytes + at), x);
    }
    if (rest) {
        const uvec x = (uvec)load(query + whole / 4);
#pragma GCC unroll 16
        for (int k = 0; k < num; k++) {
            const void *from = keys + k * bytes + whole;
            parts[k] = add_words(kind, parts[k], kind == FLOAT32 ? (uvec)load_part(from, rest) : load_pairs(from, rest), x);
        }
    }
    store(out, sums_of(parts));
}

/* Scores of n queries [n][wide] with LANES keys, of which `valid` count; room: for keys that lie apart. */
INLINE void score_block(const Cached *c, const any_word *const *keys, long valid, const float *queries, int n, uint32_t *room,
                        float *out, long ldo) {
    const long bytes = c->size * (c->kind == FLOAT32 ? 4 : 2);
    const char *at = (const char *)keys[0];
    int is_apart = 0;
    for (long k = 1; k < LANES && k < valid; k++) is_apart |= (const char *)keys[k] != at + k * bytes;
    if (is_apart || valid < LANES) {
        for (long k = 0; k < LANES && k < valid; k++) memcpy((char *)room + k * bytes, keys[k], (size_t)bytes);
        at = (const char *)room;
    }
#define SCORE_KEYS(kind, num, size) for (int q = 0; q < n; q++) score_keys(kind, num, size, at, queries + q * c->wide, out + q * ldo)
#define SCORE_NUM(kind, num)                                                                                           \
    if (c->size == 64) SCORE_KEYS(kind, num, 64);                                                                      \
    else if (c->size == 128) SCORE_KEYS(kind, num, 128);                                                               \
    else SCORE_KEYS(kind, num, c->size)
#define SCORE_KIND(kind) if (valid <= 4) { SCORE_NUM(kind, 4); } else { SCORE_NUM(kind, LANES); }
    if (c->kind == FLOAT32) { SCORE_KIND(FLOAT32) }
    else { SCORE_KIND(BFLOAT16) }
}
/* Scores of n queries [n][wide] with `count` keys: cache rows from `first` on or, of these, rows[at]. Whole vectors are
 * stored: there is room behind. room: for LANES keys. */
static void score(const Cached *c, const char *keys, int64_t first, const int32_t *rows, long count, const float *queries,
                  int n, uint32_t *room, float *out, long ldo) {
    const long bytes = c->size * (c->kind == FLOAT32 ? 4 : 2);
    for (long at = 0; at < count; at += LANES) {
        const any_word *key[LANES];
        for (long k = 0; k < LANES; k++) {
            const long place = at + k < count ? at + k : count - 1; /* what lies beyond is worked out in vain */
            key[k] = (const any_word *)(keys + (first + (rows ? rows[place] : place)) * bytes);
        }
        for (long byte = 0; byte < LANES * bytes && !rows; byte += 64)
            __builtin_prefetch((const char *)key[0] + AHEAD_OF_CACHE + byte, 0, 2);
        score_block(c, key, count - at, queries, n, room, out + at, ldo);
    }
}

/* Numbers x [count] become cap * tanh(x / cap). There is room for padding behind them. */
static void cap_row(float *row, long count, float cap) {
    for (long i = 0; i < count; i += LANES) store(row + i, cap - 2 * cap / (exponential(load(row + i) * (2 / cap)) + 1.0f));
}

/* Scores [count] become their exponentials, the largest 1; their sum. There is room for padding behind them. */
static float exponentials(float *scores, long count) {
    vec most = all(-INFINITY), total = {0};
    const long end = (count + LANES - 1) / LANES * LANES;
    for (long i = count; i < end; i++) scores[i] = -INFINITY;
    for (long i = 0; i < end; i += LANES) most = larger(load(scores + i), most);
    const vec top = all(largest(most));
    for (long i = 0; i < end; i += LANES) {
        vec weight = exponential(load(scores + i) - top);
        total += weight;
        store(scores + i, weight);
    }
    return sum(total);
}

/* Adds `count` rows of values, weighted, to a stretch of n mixes: `vectors` whole ones, or part of one. */
INLINE void mix_stretch(int kind, const char *values, long size, const int vectors, long part, long count,
                        const float *weights, long ldw, const int n, float *mix, long wide) {
    vec total[4][MIX_VECTORS];
    for (int q = 0; q < n; q++)
        for (int v = 0; v < vectors; v++) total[q][v] = load(mix + q * wide + v * LANES);
    for (long s = 0; s < count; s++) {
        vec value[MIX_VECTORS];
        for (int v = 0; v < vectors; v++) {
            __builtin_prefetch(values + (s * size + v * LANES) * (kind == FLOAT32 ? 4 : 2) + AHEAD_OF_CACHE, 0, 2);
            if (kind == FLOAT32) {
                const float *at = (const float *)values + s * size + v * LANES;
                value[v] = part == LANES ? load(at) : load_part(at, part);
            } else {
                const uint16_t *at = (const uint16_t *)values + s * size + v * LANES;
                value[v] = part == LANES ? load_bf16(at) : load_bf16_part(at, part);
            }
            HOLD(value[v]);
        }
        for (int q = 0; q < n; q++) {
            const vec weight = all(weights[q * ldw + s]);
            for (int v = 0; v < vectors; v++) total[q][v] += value[v] * weight;
        }
    }
    for (int q = 0; q < n; q++)
        for (int v = 0; v < vectors; v++) store(mix + q * wide + v * LANES, total[q][v]);
}

#define MIX(kind, vectors, part)                                                                                       \
    switch (n - q) {                                                                                                   \
        case 1: mix_stretch(kind, from, size, vectors, part, count, of, ldw, 1, to, wide); break;                      \
        case 2: mix_stretch(kind, from, size, vectors, part, count, of, ldw, 2, to, wide); break;                      \
        case 3: mix_stretch(kind, from, size, vectors, part, count, of, ldw, 3, to, wide); break;                      \
        default: mix_stretch(kind, from, size, vectors, part, count, of, ldw, 4, to, wide);                            \
    }

/* mix[n][wide] += weights[n][ldw] times `count` cache rows of values from `row` on, one after the other. */
static void add_values(const Cached *c, const char *values, int64_t row, long count, const float *weights, long ldw,
                       int n, float *mix) {
    const long size = c->size, wide = c->wide, bytes = c->kind == FLOAT32 ? 4 : 2;
    if (c->kind != FLOAT32 && n > 4 && size <= MOST_WIDENED) { /* once for all queries */
        const Cached floats = {FLOAT32, size, wide};
        float rows[WIDENED * MOST_WIDENED];
        for (long at = 0; at < count; at += WIDENED) {
            const long some = count - at < WIDENED ? count - at : WIDENED;
            const uint16_t *from = (const uint16_t *)values + (row + at) * size;
            for (long i = 0; i < some * size; i += LANES) {
                __builtin_prefetch((const char *)(from + i) + AHEAD_OF_CACHE, 0, 2);
                store_some(rows + i, some * size - i < LANES ? load_bf16_part(from + i, some * size - i) : load_bf16(from + i),
                           some * size - i);
            }
            add_values(&floats, (const char *)rows, 0, some, weights + at, ldw, n, mix);
        }
        return;
    }
    for (int q = 0; q < n; q += 4)
        for (long i = 0; i < size;) {
            const long part = size - i < LANES ? size - i : LANES, vectors = size - i >= MIX_VECTORS * LANES ? MIX_VECTORS : 1;
            const char *from = values + (row * size + i) * bytes;
            const float *of = weights + q * ldw;
            float *to = mix + q * wide + i;
            if (c->kind == FLOAT32 && vectors == MIX_VECTORS) MIX(FLOAT32, MIX_VECTORS, LANES)
            else if (c->kind == BFLOAT16 && vectors == MIX_VECTORS) MIX(BFLOAT16, MIX_VECTORS, LANES)
            else MIX(c->kind, 1, part)
            i += vectors * LANES;
        }
}

#endif
