/* What queries of one key head see: scores of keys, their exponentials, sums of values so weighted.
 *
 * Keys and values are rows of `size` numbers, float32 or bfloat16; a query is one as prepare() leaves it, `wide` words of
 * 4 bytes. A score has the same bits wherever it is worked out: lane by lane along the numbers, lanes folded at the end.
 */
#ifndef AMPHISTA_ATTENTION_H
#define AMPHISTA_ATTENTION_H

#include <math.h>

#include "products.h"

enum { QUAD = 4, MANY_QUERIES = 3 }; /* keys whose scores are worked out together, and from how many queries on */
enum { KEYS_AHEAD = 4096 };          /* bytes: keys are worked on for so long that the next would come too late */
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

/* Queries of one key head; `spread` has each of their stretches of 16 bytes four times, `kept` room for sums. */
typedef struct {
    const float *rows; /* [n][wide] */
    float *spread, *kept;
    int n;
} Queries;

/* Numbers of 4 bytes that n queries take as rows, spread and kept. */
INLINE long queries_room(long n, long wide) { return n * (5 * wide + QUAD * LANES); }

#if LANES == 16
/* Adds the products of each word's number, or two numbers of 16 bits. */
INLINE vec add_words(const int kind, vec total, uvec w, uvec x) {
    return kind == FLOAT32 ? total + (vec)w * (vec)x : add_pairs(total, w, x);
}

/* Four rows' stretches of 16 bytes side by side. */
INLINE uvec beside(const uint32_t *from, long words) {
    __m512i found = _mm512_castsi128_si512(_mm_loadu_si128((const __m128i *)from));
    for (int k = 1; k < QUAD; k++)
        found = _mm512_mask_broadcast_i32x4(found, (__mmask16)(0xf << 4 * k), _mm_loadu_si128((const __m128i *)(from + k * words)));
    return (uvec)found;
}

/* Four queries' sums of four keys each, lane l of key k in lane 4 k + l, folded as sums() does; [query][key]. */
INLINE __m512 fold_fours(const float *kept) {
    const __m512 a = _mm512_loadu_ps(kept), b = _mm512_loadu_ps(kept + 16);
    const __m512 c = _mm512_loadu_ps(kept + 32), d = _mm512_loadu_ps(kept + 48);
    const __m512 ab = _mm512_add_ps(_mm512_shuffle_ps(a, b, 0x44), _mm512_shuffle_ps(a, b, 0xee));
    const __m512 cd = _mm512_add_ps(_mm512_shuffle_ps(c, d, 0x44), _mm512_shuffle_ps(c, d, 0xee));
    const __m512 found = _mm512_add_ps(_mm512_shuffle_ps(ab, cd, 0x88), _mm512_shuffle_ps(ab, cd, 0xdd));
    return _mm512_permutexvar_ps(_mm512_setr_epi32(0, 4, 8, 12, 1, 5, 9, 13, 2, 6, 10, 14, 3, 7, 11, 15), found);
}

/* Scores of four keys: the lanes that sums() folds by shuffles lie in vectors of their own, and are added. Keys are
 * read once for all queries. `kind` and `chunk` are constants. */
INLINE void score_quad(const int kind, const int chunk, const uint32_t *keys, long words, const Queries *queries,
                       float *out, long ldo) {
    for (long at = 0; at < words; at += chunk) {
        uvec key[16];
        for (int g = 0; g < chunk / 4; g++) {
            __builtin_prefetch((const char *)(keys + QUAD * at) + KEYS_AHEAD + 64 * g, 0, 2);
            key[g] = beside(keys + at + 4 * g, words);
            HOLD(key[g]);
        }
        for (int q = 0; q < queries->n; q++) {
            const float *query = queries->spread + QUAD * (q * words + at);
            float *kept = queries->kept + (long)q * QUAD * LANES;
            vec part[4];
            for (int g = 0; g < 4; g++) part[g] = at ? load(kept + g * LANES) : (vec){0};
            for (int g = 0; g < chunk / 4; g++)
                part[g % 4] = add_words(kind, part[g % 4], key[g], (uvec)load(query + g * LANES));
            if (at + chunk < words) for (int g = 0; g < 4; g++) store(kept + g * LANES, part[g]);
            else store(queries->kept + q * LANES, (part[0] + part[2]) + (part[1] + part[3]));
        }
    }
    for (int q = 0; q < queries->n; q += 4) {
        const __m512 found = fold_fours(queries->kept + q * LANES);
        float *to = out + q * ldo;
        const int n = queries->n - q;
        _mm_storeu_ps(to, _mm512_castps512_ps128(found));
        if (n > 1) _mm_storeu_ps(to + ldo, _mm512_extractf32x4_ps(found, 1));
        if (n > 2) _mm_storeu_ps(to + 2 * ldo, _mm512_extractf32x4_ps(found, 2));
        if (n > 3) _mm_storeu_ps(to + 3 * ldo, _mm512_extractf32x4_ps(found, 3));
    }
}

INLINE void spread_queries(const Queries *queries, long wide, long words) {
    for (int q = 0; q < queries->n; q++)
        for (long i = 0; i < words; i += 4)
            _mm512_storeu_ps(queries->spread + QUAD * (q * words + i),
                             _mm512_broadcast_f32x4(_mm_loadu_ps(queries->rows + q * wide + i)));
}

#define BY_QUADS(kind, chunk)                                                                                          \
    for (; at + QUAD <= count; at += QUAD)                                                                             \
        score_quad(kind, chunk, (const uint32_t *)keys + (row + at) * words, words, queries, out + at, ldo)
#endif

/* Scores of n queries [n][wide] with the keys of `count` cache rows from `row` on. */
static void score(const Cached *c, const void *keys, int64_t row, long count, const float *queries, int n, float *out,
                  long ldo) {
    const long size = c->size;
    if (c->kind == FLOAT32)
        float_dots((const float *)keys + row * size, size, count, queries, c->wide, n, size, out, ldo);
    else
        bf16_dots((const uint16_t *)keys + row * size, size, count, (const uint16_t *)queries, 2 * c->wide, n, size, out,
                  ldo);
}

/* The same of many keys, four at a time where there are queries enough and their size is a common one. */
static void score_many(const Cached *c, const void *keys, int64_t row, long count, const Queries *queries, float *out,
                       long ldo) {
    long at = 0;
#if LANES == 16
    const long words = c->kind == FLOAT32 ? c->size : c->size % 2 ? 1 : c->size / 2;
    if (queries->n >= MANY_QUERIES && words % 32 == 0) {
        spread_queries(queries, c->wide, words);
        if (c->kind == FLOAT32 && words % 64 == 0) BY_QUADS(FLOAT32, 64);
        else if (c->kind == FLOAT32) BY_QUADS(FLOAT32, 32);
        else if (words % 64 == 0) BY_QUADS(BFLOAT16, 64);
        else BY_QUADS(BFLOAT16, 32);
    }
#endif
    score(c, keys, row + at, count - at, queries->rows, queries->n, out + at, ldo);
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
