/* Blocks of 4 and 8 bits packed for products of whole numbers.
 *
 * A row is cut into stretches of 32 numbers, each a whole number times a step of the stretch's own. FINE: of 16 bits, in
 * two digits to the base 256. COARSE: of 8 bits, one digit, as in llama.cpp. Digits times a block's numbers are sums of
 * whole numbers, which vectors and matrix units work out alike, whatever the order; scales and minima follow in float32,
 * stretch by stretch. So a row's product has the same bits whatever is beside it. Minima are times the sum of the *rounded*
 * numbers: what rounding takes from both parts of a weight then mostly cancels.
 *
 * Weight: for 16 outputs at a time and each stretch their scales, their minima where the kind has some, and the numbers,
 * [4 or 8][16 outputs][4 inputs]; of 4 bits each byte holds inputs 16 apart, the first in its low half.
 * Rows: for up to 16 at a time and each stretch [digits][rows][32], the high digits first, then Shares [rows].
 */
#ifndef AMPHISTA_PACKED_H
#define AMPHISTA_PACKED_H

#include "blocks.h"
#include "tiles.h"

enum { ABREAST = 16, PACKED_ROWS = 8, LEAST_PACKED_TILE_ROWS = 4 };
enum { PACKED_AHEAD = 24, MOST_READY = 128 }; /* stretches: asked for so early; unpacked at most for several groups of rows */
#define LEAST_REACH 0x1p-110f /* of a stretch: so that its step is no subnormal number */
enum { FINE = 32, COARSE = 64 }; /* added to the kind of the blocks */

typedef struct {
    float step, sum; /* what 1 stands for in a row's stretch; of its rounded numbers */
} Share32;

INLINE int is_packed(int kind) { return kind >= FINE; }
/* Digits of a row's numbers as a packed weight reads them; 0 of one that is not packed. */
INLINE int digits_read(int kind) { return kind >= COARSE ? 1 : kind >= FINE ? 2 : 0; }

/* Bytes that a stretch's scales and minima take; 0 of a kind that is not packed. */
INLINE long terms_bytes(int kind) {
    return kind == Q4_0 || kind == Q8_0 ? 2 * ABREAST : kind == Q4_1 ? 4 * ABREAST : kind == Q4_K ? 8 * ABREAST : 0;
}
INLINE long packed_bytes(int kind) { return terms_bytes(kind) + (kind == Q8_0 ? 32 : 16) * ABREAST; }
INLINE long row_bytes(long inputs, int digits) { return inputs / STRETCH * (digits * STRETCH + (long)sizeof(Share32)); }

#if LANES == 16 && defined(__AVX512VNNI__)
enum { CAN_PACK = 1 };

/* Stretch `part` of a block as that of output `o` among 16. */
static void pack_stretch(int kind, const uint8_t *block, int part, int o, uint8_t *to) {
    uint8_t *numbers = to + terms_bytes(kind), q[STRETCH];
    if (kind == Q4_K) {
        const Terms terms = k_terms(block, part);
        memcpy(to + 4 * o, &terms.scale, 4);
        memcpy(to + 4 * (ABREAST + o), &terms.min, 4);
    } else {
        memcpy(to + 2 * o, block, 2);
        if (kind == Q4_1) memcpy(to + 2 * (ABREAST + o), block + 2, 2);
    }
    const uint8_t *from = block + (kind == Q4_K ? 16 + 32 * (part / 2) : kind == Q4_1 ? 4 : 2);
    for (int i = 0; i < STRETCH; i++)
        q[i] = kind == Q8_0 ? from[i] ^ 128 : kind == Q4_K ? from[i] >> 4 * (part & 1) & 15 : from[i & 15] >> (i < 16 ? 0 : 4) & 15;
    for (int i = 0; i < STRETCH; i++) {
        uint8_t *at = numbers + 4 * ABREAST * (i / 4) + 4 * o + i % 4;
        if (kind == Q8_0) *at = q[i];
        else if (i < 16) *at = (uint8_t)(q[i] | q[i + 16] << 4);
    }
}

/* Up to 16 outputs of a weight in blocks; the rest are zeros. */
static void pack_outputs(int kind, const uint8_t *w, long inputs, int outputs, uint8_t *to) {
    const long parts = block_numbers(kind) / STRETCH, bytes = inputs / block_numbers(kind) * block_bytes(kind);
    memset(to, 0, (size_t)(inputs / STRETCH * packed_bytes(kind)));
    for (long s = 0; s < inputs / STRETCH; s++, to += packed_bytes(kind))
        for (int o = 0; o < outputs; o++)
            pack_stretch(kind, w + o * bytes + s / parts * block_bytes(kind), (int)(s % parts), o, to);
}

/* One of `rows` rows, `inputs` numbers, as digits; what is not finite makes all its products NaN. */
static void digits_of(const float *from, long inputs, int digits, int row, int rows, uint8_t *to) {
    const float levels = digits == 1 ? 0x7f : 0x7f7f;
    for (long i = 0; i < inputs; i += STRETCH, to += rows * row_bytes(STRETCH, digits)) {
        const vec both[2] = {load(from + i), load(from + i + LANES)};
        const float reach = largest(larger(magnitude(both[0]), magnitude(both[1]))), all = sum(both[0] + both[1]);
        const float most = reach > LEAST_REACH ? reach : LEAST_REACH, scale = levels / most;
        Share32 share = {most * (1 / levels), 0};
        __m512i whole[2];
        for (int h = 0; h < 2; h++) {
            whole[h] = _mm512_cvtps_epi32((__m512)(both[h] * scale));
            uint8_t *at = to + row * STRETCH + h * LANES;
            if (digits == 1) {
                _mm_storeu_si128((__m128i *)at, _mm512_cvtepi32_epi8(whole[h]));
                continue;
            }
            const __m512i zeros = _mm512_set1_epi32(0x8080), pair = _mm512_xor_si512(_mm512_add_epi32(whole[h], zeros), zeros);
            _mm_storeu_si128((__m128i *)at, _mm512_cvtepi32_epi8(_mm512_srli_epi32(pair, 8))); /* each from -128 to 127 */
            _mm_storeu_si128((__m128i *)(at + rows * STRETCH), _mm512_cvtepi32_epi8(pair));
        }
        share.sum = share.step * (float)_mm512_reduce_add_epi32(_mm512_add_epi32(whole[0], whole[1]));
        if (!(all - all == 0)) share.step = share.sum = all - all;
        memcpy(to + rows * digits * STRETCH + row * (long)sizeof share, &share, sizeof share);
    }
}

/* Scales and minima of 16 outputs. `kind` is a constant. */
INLINE void load_terms(const int kind, const uint8_t *w, __m512 *scales, __m512 *minima) {
    if (kind == Q4_K) {
        *scales = _mm512_loadu_ps(w), *minima = _mm512_loadu_ps(w + 4 * ABREAST);
        return;
    }
    *scales = _mm512_cvtph_ps(_mm256_loadu_si256((const __m256i *)w));
    if (kind == Q4_1) *minima = _mm512_cvtph_ps(_mm256_loadu_si256((const __m256i *)(w + 2 * ABREAST)));
    else *minima = *scales * (kind == Q4_0 ? -8.0f : -128.0f);
}

/* The numbers of 16 outputs of a stretch, a byte each. `kind` is a constant. */
INLINE void load_numbers(const int kind, const uint8_t *w, __m512i *q) {
    const __m512i low = _mm512_set1_epi8(15);
    /* a line begun by one stretch and ended by the next is asked for by both: one that nobody asks for holds up all behind it */
    for (int line = 0; line < (packed_bytes(kind) + 63) / 64; line++) __builtin_prefetch(w + PACKED_AHEAD * packed_bytes(kind) + 64 * line, 0, 2);
    w += terms_bytes(kind);
    for (int line = 0; line < 8; line++)
        if (kind == Q8_0) q[line] = _mm512_loadu_si512(w + 64 * line);
        else if (line < 4) q[line] = _mm512_and_si512(_mm512_loadu_si512(w + 64 * line), low);
        else q[line] = _mm512_and_si512(_mm512_srli_epi16(_mm512_loadu_si512(w + 64 * (line - 4)), 4), low);
}

/* A total with what a stretch adds to it: the dots of its digits, whatever their number. */
INLINE __m512 add_stretch(__m512 total, __m512i whole, const uint8_t *shares, int row, __m512 scales, __m512 minima) {
    Share32 share;
    memcpy(&share, shares + row * (long)sizeof share, sizeof share);
    total = _mm512_fmadd_ps(_mm512_cvtepi32_ps(whole), _mm512_mul_ps(scales, _mm512_set1_ps(share.step)), total);
    return _mm512_fmadd_ps(minima, _mm512_set1_ps(share.sum), total);
}

INLINE __m512i of_two_digits(__m512i high, __m512i low) { return _mm512_add_epi32(_mm512_slli_epi32(high, 8), low); }

/* Dots of 16 outputs with `count` (a constant) of `rows` rows. `kind` and `digits` are constants. */
INLINE void packed_vectors(const int kind, const int digits, const uint8_t *w, const uint8_t *x, int first, const int count, int rows,
                           long stretches, float (*out)[ABREAST]) {
    __m512 total[PACKED_ROWS], scales, minima;
    for (int r = 0; r < count; r++) total[r] = _mm512_setzero_ps();
    for (long s = 0; s < stretches; s++, w += packed_bytes(kind), x += rows * row_bytes(STRETCH, digits)) {
        __m512i q[8];
        load_terms(kind, w, &scales, &minima);
        load_numbers(kind, w, q);
        const uint8_t *high = x + first * STRETCH, *low = high + rows * STRETCH;
        const uint8_t *shares = x + rows * digits * STRETCH + first * (long)sizeof(Share32);
        for (int r = 0; r < count; r++) {
            __m512i sums[2];
            for (int d = 0; d < digits; d++) {
                sums[d] = _mm512_setzero_si512();
                for (int k = 0; k < 8; k++) {
                    int32_t four_digits;
                    memcpy(&four_digits, (d ? low : high) + r * STRETCH + 4 * k, sizeof four_digits);
                    sums[d] = _mm512_dpbusd_epi32(sums[d], q[k], _mm512_set1_epi32(four_digits));
                }
            }
            const __m512i whole = digits == 1 ? sums[0] : of_two_digits(sums[0], sums[1]);
            total[r] = add_stretch(total[r], whole, shares, r, scales, minima);
        }
    }
    for (int r = 0; r < count; r++) _mm512_storeu_ps(out[r], total[r]);
}

#ifdef HAVE_TILES
/* The products of stretch `t` in tiles `found` and, of more rows than one holds, `others`. */
#define MULTIPLY_TILES(numbers, found, others)                                                                         \
    do {                                                                                                               \
        _tile_loadd(numbers, ready ? ready + 8 * t : wide[t % (2 * UNDER_WAY)], 64);                                   \
        _tile_loadd(0, at, STRETCH);                                                                                   \
        _tile_zero(found);                                                                                             \
        _tile_dpbsud(found, 0, numbers);                                                                               \
        if (others_rows) {                                                                                             \
            _tile_loadd(1, at + TILE_ROWS * STRETCH, STRETCH);                                                         \
            _tile_zero(others);                                                                                        \
            _tile_dpbsud(others, 1, numbers);                                                                          \
        }                                                                                                              \
    } while (0)
#define STORE_TILES(found, others, to)                                                                                 \
    do {                                                                                                               \
        _tile_stored(found, to, 64);                                                                                   \
        if (others_rows) _tile_stored(others, to + TILE_ROWS, 64);                                                     \
    } while (0)

/* The same of all rows by matrix units, their digits below each other. Tiles wait long for what was just written, and so
 * does who reads what they just found: a stretch is unpacked UNDER_WAY stretches before it is multiplied, its sums are
 * stored behind the next product and added to the totals behind one more. ready: all its stretches unpacked, or NULL. */
INLINE void packed_tiles(const int kind, const int digits, const uint8_t *w, const __m512i *ready, const uint8_t *x, int rows,
                         long stretches, float (*out)[ABREAST]) {
    const int others_rows = digits * rows > TILE_ROWS ? digits * rows - TILE_ROWS : 0;
    const uint8_t first = (uint8_t)(digits * rows - others_rows), other = (uint8_t)(others_rows ? others_rows : 1);
    const uint8_t counts[8] = {first, other, 8, 8, first, other, first, other};
    const uint16_t bytes[8] = {STRETCH, STRETCH, 64, 64, 64, 64, 64, 64};
    set_tiles(digits * rows + 4 * TILE_ROWS, counts, bytes);
    enum { UNDER_WAY = 2 };
    __m512i wide[2 * UNDER_WAY][8], sums[2][2 * TILE_ROWS];
    __m512 scales, minima, total[TILE_ROWS];
    for (int r = 0; r < TILE_ROWS; r++) total[r] = _mm512_setzero_ps();
    const long ldx = rows * row_bytes(STRETCH, digits);
    for (long s = 0; s < stretches + UNDER_WAY + 2; s++) {
        const long t = s - UNDER_WAY, u = t - 2;
        if (s < stretches && !ready) load_numbers(kind, w + s * packed_bytes(kind), wide[s % (2 * UNDER_WAY)]);
        if (t >= 0 && t < stretches) {
            const uint8_t *at = x + t * ldx;
            if (t & 1) MULTIPLY_TILES(3, 6, 7);
            else MULTIPLY_TILES(2, 4, 5);
        }
        if (t > 0 && t <= stretches) {
            if (t & 1) STORE_TILES(4, 5, sums[0]);
            else STORE_TILES(6, 7, sums[1]);
        }
        if (u < 0) continue;
        const __m512i *found = sums[u & 1];
        load_terms(kind, w + u * packed_bytes(kind), &scales, &minima);
#pragma GCC unroll 16
        for (int r = 0; r < rows; r++) {
            const __m512i whole = digits == 1 ? found[r] : of_two_digits(found[r], found[rows + r]);
            total[r] = add_stretch(total[r], whole, x + u * ldx + rows * digits * STRETCH, r, scales, minima);
        }
    }
#pragma GCC unroll 16
    for (int r = 0; r < rows; r++) _mm512_storeu_ps(out[r], total[r]);
}
#else
INLINE void packed_tiles(const int kind, const int digits, const uint8_t *w, const __m512i *ready, const uint8_t *x, int rows,
                         long stretches, float (*out)[ABREAST]) {
    (void)kind, (void)digits, (void)w, (void)ready, (void)x, (void)rows, (void)stretches, (void)out;
}
#endif

/* Outputs first .. first + count - 1 of rows whose digits lie in groups of `group`. `kind` and `digits` are constants. */
INLINE void packed_dots(const int kind, const int digits, const uint8_t *weight, const uint8_t *x, int n, int group, long inputs,
                        long first, long count, float *out, long ldo) {
    const long stretches = inputs / STRETCH;
    __m512i unpacked[MOST_READY][8];
    const int is_ready = may_use_tiles && n > group && stretches <= MOST_READY;
    for (long o = first / ABREAST * ABREAST; o < first + count; o += ABREAST) {
        const uint8_t *w = weight + o / ABREAST * stretches * packed_bytes(kind);
        const long before = o < first ? first - o : 0, end = first + count - o < ABREAST ? first + count - o : ABREAST;
        for (long s = 0; s < stretches && is_ready; s++) load_numbers(kind, w + s * packed_bytes(kind), unpacked[s]);
        for (int r = 0; r < n; r += group) {
            const int rows = n - r < group ? n - r : group;
            const uint8_t *at = x + r * row_bytes(inputs, digits);
            float found[TILE_ROWS][ABREAST];
            if (may_use_tiles && rows >= LEAST_PACKED_TILE_ROWS) {
                const __m512i *ready = is_ready ? unpacked[0] : NULL;
                switch (rows) { /* where their number is a constant, totals stay in registers */
#define ALL_ROWS(count) case count: packed_tiles(kind, digits, w, ready, at, count, stretches, found); break
                    ALL_ROWS(4); ALL_ROWS(5); ALL_ROWS(6); ALL_ROWS(7); ALL_ROWS(8); ALL_ROWS(16);
                    default: packed_tiles(kind, digits, w, ready, at, rows, stretches, found);
                }
            } else {
                for (int k = 0; k < rows; k += PACKED_ROWS)
                    switch (rows - k < PACKED_ROWS ? rows - k : PACKED_ROWS) {
#define SOME_ROWS(count) case count: packed_vectors(kind, digits, w, at, k, count, rows, stretches, found + k); break
                        SOME_ROWS(1); SOME_ROWS(2); SOME_ROWS(3); SOME_ROWS(4); SOME_ROWS(5); SOME_ROWS(6); SOME_ROWS(7); SOME_ROWS(8);
                    }
            }
            float *to = out + r * ldo + o + before - first;
            for (int k = 0; k < rows; k++, to += ldo)
                if (end - before == ABREAST) memcpy(to, found[k], sizeof *found); /* a single store */
                else memcpy(to, found[k] + before, sizeof **found * (size_t)(end - before));
        }
    }
}

static void any_packed_dots(int kind, const uint8_t *w, const uint8_t *x, int n, int group, long inputs, long first, long count,
                            float *out, long ldo) {
#define PACKED_DOTS(kind)                                                                                              \
    case FINE + kind: packed_dots(kind, 2, w, x, n, group, inputs, first, count, out, ldo); break;                     \
    case COARSE + kind: packed_dots(kind, 1, w, x, n, group, inputs, first, count, out, ldo); break
    switch (kind) { PACKED_DOTS(Q4_0); PACKED_DOTS(Q4_1); PACKED_DOTS(Q8_0); PACKED_DOTS(Q4_K); }
}
#else
enum { CAN_PACK = 0 };
INLINE void pack_outputs(int kind, const uint8_t *w, long inputs, int outputs, uint8_t *to) {
    (void)kind, (void)w, (void)inputs, (void)outputs, (void)to;
}
INLINE void digits_of(const float *from, long inputs, int digits, int row, int rows, uint8_t *to) {
    (void)from, (void)inputs, (void)digits, (void)row, (void)rows, (void)to;
}
INLINE void any_packed_dots(int kind, const uint8_t *w, const uint8_t *x, int n, int group, long inputs, long first, long count,
                            float *out, long ldo) {
    (void)first, (void)kind, (void)w, (void)x, (void)n, (void)group, (void)inputs, (void)count, (void)out, (void)ldo;
}
#endif

#endif
