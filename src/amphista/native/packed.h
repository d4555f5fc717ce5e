/* Blocks of 2 to 8 bits packed for products of whole numbers.
 *
 * A row is cut into stretches of 32 numbers, each a whole number times a step of the stretch's own. FINE: of 16 bits, in
 * two digits. COARSE: of 8 bits, one digit, as in llama.cpp. Digits times a block's numbers are sums of
 * whole numbers, which vectors and matrix units work out alike, whatever the order; scales and minima follow in float32,
 * stretch by stretch. So a row's product has the same bits whatever is beside it. Minima are times the sum of the *rounded*
 * numbers: what rounding takes from both parts of a weight then mostly cancels.
 *
 * Weight: for 16 outputs at a time and each stretch, or each 8 of a kind whose blocks have 256 numbers, the terms and the
 * numbers, so that they take about what they take in the file. Terms: scales, and minima where the kind has some, float16;
 * of 256, first float16 of the block, then for each stretch whole numbers of 8 bits that multiply them, scales of both halves
 * before minima, which are negated; up to the next 64 bytes is padding. Numbers: 8 lines of
 * [16 outputs][4 inputs], cut into planes of bits, first of the low ones and then of what is above them: a byte of a plane
 * holds those of several lines. A plane of 2 bits is [2][16 outputs][4 inputs], line 0 in the lowest bits of the first,
 * line 1 in those of the second, line 2 above line 0.
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
    float step, sum, sums[2]; /* what 1 stands for in a row's stretch; of its rounded numbers, and of either half of them */
} Share32;

INLINE int is_packed(int kind) { return kind >= FINE; }
/* Digits of a row's numbers as a packed weight reads them; 0 of one that is not packed. */
INLINE int digits_read(int kind) { return kind >= COARSE ? 1 : kind >= FINE ? 2 : 0; }

/* Kinds that get a kernel for each number of rows; of others there are fewer, as each is a lot to compile. */
INLINE int is_common(int kind) { return kind == Q4_0 || kind == Q4_1 || kind == Q8_0 || kind == Q4_K; }
INLINE int bits_of(int kind) {
    return kind == Q8_0 ? 8 : kind == Q6_K ? 6 : kind == Q5_0 || kind == Q5_1 || kind == Q5_K ? 5 : kind == Q3_K ? 3 : kind == Q2_K ? 2 : 4;
}
/* Bits of the lowest plane. */
INLINE int low_bits(int kind) { return bits_of(kind) == 8 ? 8 : bits_of(kind) < 4 ? 2 : 4; }
/* Stretches whose terms lie together. */
INLINE int stretches_of(int kind) { return kind >= Q4_K ? 8 : 1; }
/* Bytes of one stretch's own terms; 0 of a kind that is not packed. */
INLINE long terms_bytes(int kind) { return (kind >= Q4_K ? 1 : kind > F16 ? 2 : 0) * ABREAST * scales_of(kind) * (1 + has_minima(kind)); }
/* Bytes of the terms that a block of 256 has as a whole. */
INLINE long block_terms_bytes(int kind) { return kind >= Q4_K ? 2 * ABREAST * (1 + has_minima(kind)) : 0; }
/* Bytes of all terms that lie together, padding included. */
INLINE long head_bytes(int kind) { return kind >= Q4_K ? (block_terms_bytes(kind) + 8 * terms_bytes(kind) + 63) / 64 * 64 : terms_bytes(kind); }
/* Bytes of a stretch's numbers. */
INLINE long number_bytes(int kind) { return bits_of(kind) * STRETCH / 8 * ABREAST; }
/* Bytes of stretches whose terms lie together. */
INLINE long group_bytes(int kind) { return head_bytes(kind) + stretches_of(kind) * number_bytes(kind); }
/* Bytes of so many stretches. */
INLINE long packed_bytes(int kind, long stretches) { return stretches / stretches_of(kind) * group_bytes(kind); }
/* Where the numbers of a stretch lie, and its own terms. */
INLINE long numbers_at(int kind, long s) {
    return s / stretches_of(kind) * group_bytes(kind) + head_bytes(kind) + s % stretches_of(kind) * number_bytes(kind);
}
INLINE long terms_at(int kind, long s) {
    return s / stretches_of(kind) * group_bytes(kind) + block_terms_bytes(kind) + s % stretches_of(kind) * terms_bytes(kind);
}

#if LANES == 8 || (LANES == 16 && defined(__AVX512VNNI__))
enum { CAN_PACK = 1 };
#else
enum { CAN_PACK = 0 };
#endif

/* Whether numbers are multiplied as they are, in 16 bits, with words of the row: of 8 bits, AVX2's sums of two products with a
 * digit would not fit 16 bits. */
INLINE int is_in_words(int kind) { return LANES == 8 && (bits_of(kind) == 8 || is_uneven(kind)); }
/* What is taken off a number as it is multiplied; of uneven kinds, which are looked up, what they are raised by. */
INLINE int zero_of(int kind) {
    return is_in_words(kind) ? 0 : kind == Q8_0 || is_uneven(kind) ? 128 : kind == Q6_K ? 32 : kind == Q5_0 ? 16 : kind == Q4_0 ? 8 : kind == Q3_K ? 4 : 0;
}
INLINE int can_pack(int kind) { return CAN_PACK && terms_bytes(kind); }
INLINE long row_bytes(long inputs, int digits) { return inputs / STRETCH * (digits * STRETCH + (long)sizeof(Share32)); }
/* Where a stretch of `rows` rows has its shares. */
INLINE long shares_at(int digits, int rows) { return (long)rows * digits * STRETCH; }

#if LANES == 8 || (LANES == 16 && defined(__AVX512VNNI__))

/* Where float16 of a block of 256 lie that its terms are multiples of. */
INLINE long block_terms_in_file(int kind) { return kind == Q6_K ? 208 : kind == Q3_K ? 108 : kind == Q2_K ? 80 : 0; }

/* Stretch `s`, a block's `part`, as that of output `o` among 16. `kind` is a constant. */
INLINE void pack_stretch(const int kind, const uint8_t *block, int part, int o, uint8_t *to, long s) {
    const Terms ones[2] = {{1, -0.0f}, {1, -0.0f}};
    const int parts = scales_of(kind), low = low_bits(kind), more = bits_of(kind) - low, line_bytes = 4 * ABREAST;
    uint8_t *terms = to + terms_at(kind, s), *numbers = to + numbers_at(kind, s) + 4 * o;
    const long halves_at = kind == IQ4_NL ? 18 * part : block_terms_in_file(kind);
    for (int k = 0; k <= has_minima(kind); k++) {
        uint8_t *halves = kind >= Q4_K ? to + s / 8 * group_bytes(kind) : terms;
        memcpy(halves + 2 * (k * ABREAST + o), block + halves_at + 2 * k, 2);
    }
    if (kind >= Q4_K) { /* the block's own float16 in place of 1 */
        uint8_t with_ones[256];
        Terms found[2];
        const uint16_t one = 0x3c00;
        memcpy(with_ones, block, (size_t)block_bytes(kind));
        for (int k = 0; k <= has_minima(kind); k++) memcpy(with_ones + halves_at + 2 * k, &one, 2);
        terms_of(kind, with_ones, part, found);
        for (int k = 0; k < parts; k++) {
            terms[k * ABREAST + o] = (uint8_t)(int)found[k].scale;
            if (has_minima(kind)) terms[(parts + k) * ABREAST + o] = (uint8_t)(int)found[k].min;
        }
    }
    vec plain[VECTORS];
    unpack(kind, block, part, ones, plain);
    for (int i = 0; i < STRETCH; i++) {
        const int value = (int)plain[i / LANES][i % LANES], line = i / 4;
        int q = is_uneven(kind) ? 0 : value + zero_of(kind);
        while (is_uneven(kind) && UNEVEN[q] != value) q++;
        numbers[line % low * line_bytes + i % 4] |= (uint8_t)((q & ((1 << low) - 1)) << line / low * low);
        if (more) numbers[(low + line % more) * line_bytes + i % 4] |= (uint8_t)(q >> low << line / more * more);
    }
}

/* Up to 16 outputs of a weight in blocks; the rest are zeros. `kind` is a constant. */
INLINE void pack_outputs(const int kind, const uint8_t *w, long inputs, int outputs, uint8_t *to) {
    const long parts = block_numbers(kind) / STRETCH, bytes = inputs / block_numbers(kind) * block_bytes(kind);
    memset(to, 0, (size_t)packed_bytes(kind, inputs / STRETCH));
    for (long s = 0; s < inputs / STRETCH; s++)
        for (int o = 0; o < outputs; o++)
            pack_stretch(kind, w + o * bytes + s / parts * block_bytes(kind), (int)(s % parts), o, to, s);
}

#define PACKED_KINDS(call)                                                                                             \
    call(Q4_0); call(Q4_1); call(Q5_0); call(Q5_1); call(Q8_0); call(IQ4_NL); call(Q4_K); call(Q5_K); call(Q6_K);      \
    call(Q2_K); call(Q3_K); call(IQ4_XS)

static void pack_any(int kind, const uint8_t *w, long inputs, int outputs, uint8_t *to) {
#define PACK(kind) case kind: pack_outputs(kind, w, inputs, outputs, to); break
    switch (kind) { PACKED_KINDS(PACK); }
}

/* What both ways to multiply whole numbers need of the processor. */
#if LANES == 16
INLINE vec fused(vec a, vec b, vec c) { return (vec)_mm512_fmadd_ps((__m512)a, (__m512)b, (__m512)c); }
INLINE ivec nearest(vec value) { return (ivec)_mm512_cvtps_epi32((__m512)value); }
INLINE ivec masked_or(ivec q, ivec bits, ivec mask) { /* q | (bits & mask) */
    return (ivec)_mm512_ternarylogic_epi32((__m512i)q, (__m512i)bits, (__m512i)mask, 0xf8);
}
INLINE ivec look_up(const int8_t *sixteen, ivec q) {
    const __m128i raised = _mm_xor_si128(_mm_loadu_si128((const __m128i *)sixteen), _mm_set1_epi8((char)128));
    return (ivec)_mm512_shuffle_epi8(_mm512_broadcast_i32x4(raised), (__m512i)q);
}
INLINE void store_bytes(uint8_t *to, ivec value) { _mm_storeu_si128((__m128i *)to, _mm512_cvtepi32_epi8((__m512i)value)); }
INLINE int whole_sum(ivec value) { return _mm512_reduce_add_epi32((__m512i)value); }
#else
INLINE vec fused(vec a, vec b, vec c) { return (vec)_mm256_fmadd_ps((__m256)a, (__m256)b, (__m256)c); }
INLINE ivec nearest(vec value) { return (ivec)_mm256_cvtps_epi32((__m256)value); }
INLINE ivec masked_or(ivec q, ivec bits, ivec mask) { return q | (bits & mask); }
INLINE ivec look_up(const int8_t *sixteen, ivec q) {
    return (ivec)_mm256_shuffle_epi8(_mm256_broadcastsi128_si256(_mm_loadu_si128((const __m128i *)sixteen)), (__m256i)q);
}
INLINE void store_bytes(uint8_t *to, ivec value) {
    const __m256i lowest = _mm256_setr_epi8(0, 4, 8, 12, -1, -1, -1, -1, -1, -1, -1, -1, -1, -1, -1, -1,
                                            0, 4, 8, 12, -1, -1, -1, -1, -1, -1, -1, -1, -1, -1, -1, -1);
    const __m256i bytes = _mm256_shuffle_epi8((__m256i)value, lowest);
    _mm_storel_epi64((__m128i *)to, _mm_unpacklo_epi32(_mm256_castsi256_si128(bytes), _mm256_extracti128_si256(bytes, 1)));
}
INLINE int whole_sum(ivec value) {
    const __m128i four = _mm_add_epi32(_mm256_castsi256_si128((__m256i)value), _mm256_extracti128_si256((__m256i)value, 1));
    const __m128i two = _mm_hadd_epi32(four, four);
    return _mm_cvtsi128_si32(_mm_hadd_epi32(two, two));
}
#endif

/* One of `rows` rows, `inputs` numbers, as digits; what is not finite makes all its products NaN. */
static void digits_of(const float *from, long inputs, int digits, int row, int rows, uint8_t *to) {
    const float levels = digits == 1 ? 127 : 127 * 256 + 127;
    for (long i = 0; i < inputs; i += STRETCH, to += rows * row_bytes(STRETCH, digits)) {
        vec part[VECTORS], most = {0}, total = {0};
        for (int v = 0; v < VECTORS; v++) {
            part[v] = load(from + i + v * LANES);
            most = larger(magnitude(part[v]), most);
            total += part[v];
        }
        const float found = largest(most), reach = found > LEAST_REACH ? found : LEAST_REACH, scale = levels / reach;
        const float all = sum(total);
        Share32 share = {.step = reach * (1 / levels)};
        ivec whole[VECTORS];
        for (int v = 0; v < VECTORS; v++) {
            whole[v] = nearest(part[v] * scale);
            uint8_t *at = to + row * STRETCH + v * LANES;
            if (digits == 1) {
                store_bytes(at, whole[v]);
                continue;
            }
            const ivec low = (ivec)(((uvec)whole[v] + 0x8080u) ^ 0x8080u), high = (ivec)((uvec)low >> 8); /* each from -128 to 127 */
            store_bytes(at, high);
            store_bytes(at + rows * STRETCH, low);
        }
#if LANES == 16
        const int first = whole_sum(whole[0]), second = whole_sum(whole[1]);
#else
        const int first = whole_sum(whole[0] + whole[1]), second = whole_sum(whole[2] + whole[3]);
#endif
        if (!(all - all == 0)) share.step = all - all;
        share.sum = share.step * (float)(first + second);
        share.sums[0] = share.step * (float)first, share.sums[1] = share.step * (float)second;
        memcpy(to + shares_at(digits, rows) + row * (long)sizeof share, &share, sizeof share);
    }
}

/* Whether something is added to what a stretch's numbers give. */
INLINE int has_more(int kind) { return has_minima(kind) || !is_in_words(kind); }

/* Scales and minima of LANES outputs of stretch `s`, from `o` on, of each part that has its own. `kind` is a constant. */
INLINE void load_terms(const int kind, const uint8_t *w, long s, const int o, vec *scales, vec *minima) {
    const uint8_t *halves = (kind >= Q4_K ? w + s / 8 * group_bytes(kind) : w + terms_at(kind, s)) + 2 * o;
    const uint8_t *terms = w + terms_at(kind, s) + o;
    const int parts = scales_of(kind);
    for (int k = 0; k < parts; k++) {
        scales[k] = from_halves(halves);
        if (kind >= Q4_K) scales[k] *= __builtin_convertvector(whole_signed(terms + k * ABREAST), vec);
        if (!has_minima(kind)) minima[k] = scales[k] * (float)-zero_of(kind);
        else minima[k] = from_halves(halves + 2 * ABREAST);
        if (kind >= Q4_K && has_minima(kind)) minima[k] *= __builtin_convertvector(whole_signed(terms + (parts + k) * ABREAST), vec);
    }
}

/* Bits of a line's numbers from a plane of `bits`, shifted to `to`; what comes along from beside them is for the caller
 * to mask. */
INLINE ivec from_plane(const uint8_t *plane, const int bits, const int line, const int to) {
    typedef uint16_t words __attribute__((vector_size(4 * LANES)));
    const int shift = to - line / bits * bits;
    words there;
    memcpy(&there, plane + 64 * (line % bits), sizeof there);
    return (ivec)(shift < 0 ? there >> (-shift & 15) : there << (shift & 15));
}

/* Asks for the stretch that comes PACKED_AHEAD behind `s`. A line begun by one stretch and ended by the next is asked for
 * by both: one that nobody asks for holds up all behind it. */
INLINE void ask_for_stretch(const int kind, const uint8_t *w, long s) {
    const int together = stretches_of(kind);
    const uint8_t *ahead = w + numbers_at(kind, s) + PACKED_AHEAD / together * group_bytes(kind);
    for (long at = together == 1 ? -head_bytes(kind) : 0; at < number_bytes(kind); at += 64) __builtin_prefetch(ahead + at, 0, 2);
    ahead = w + (s + PACKED_AHEAD) / together * group_bytes(kind);
    for (long at = s % together * 64; together > 1 && at < head_bytes(kind); at += 64 * together) __builtin_prefetch(ahead + at, 0, 2);
}

/* The numbers of LANES outputs of stretch `s`, from `o` on, a byte each: [8 lines]. `kind` is a constant. */
INLINE void load_numbers(const int kind, const uint8_t *w, long s, const int o, ivec *q) {
    const int low = low_bits(kind), more = bits_of(kind) - low;
    const uint8_t *numbers = w + numbers_at(kind, s) + 4 * o;
    const ivec lowest = (ivec){0} + ((1 << low) - 1) * 0x01010101, above = (ivec){0} + (((1 << more) - 1) << low) * 0x01010101;
#pragma GCC unroll 8
    for (int line = 0; line < 8; line++) {
        q[line] = from_plane(numbers, low, line, 0);
        if (low < 8) q[line] &= lowest;
        if (is_uneven(kind)) q[line] = look_up(UNEVEN, q[line]);
        if (more) q[line] = masked_or(q[line], from_plane(numbers + 64 * low, more, line, low), above);
    }
}

/* A total with what a stretch adds to it, `parts` of which have scales of their own: the dots of its digits, whatever
 * their number. */
INLINE vec add_stretch(const int kind, vec total, const ivec *whole, const uint8_t *shares, int row, const vec *scales,
                       const vec *minima) {
    const int parts = scales_of(kind);
    Share32 share;
    memcpy(&share, shares + row * (long)sizeof share, sizeof share);
    for (int k = 0; k < parts; k++)
        total = fused(__builtin_convertvector(whole[k], vec), scales[k] * all(share.step), total);
    for (int k = 0; k < parts && has_more(kind); k++)
        total = fused(minima[k], all(parts == 1 ? share.sum : share.sums[k]), total);
    return total;
}

INLINE ivec of_two_digits(ivec high, ivec low) { return (high << 8) + low; }

/* Dots of lines `from` to `end` of LANES outputs with one digit of a row. `kind` is a constant. */
INLINE ivec digit_dots(const int kind, const ivec *q, const int from, const int end, const uint8_t *row) {
    ivec total = {0};
#if LANES == 16
    (void)kind;
#pragma GCC unroll 8
    for (int k = from; k < end; k++) {
        int32_t digits;
        memcpy(&digits, row + 4 * k, sizeof digits);
        total = (ivec)_mm512_dpbusd_epi32((__m512i)total, (__m512i)q[k], _mm512_set1_epi32(digits));
    }
#else
    const int together = bits_of(kind) <= 4 ? 8 : bits_of(kind) == 5 ? 4 : 2; /* lines whose pairs' sums fit 16 bits */
    SAME_PLACE(row);
#pragma GCC unroll 8
    for (int k = from; k < end; k += together) {
        __m256i pairs = _mm256_setzero_si256();
#pragma GCC unroll 8
        for (int line = k; line < k + together; line++) {
            if (line >= end) break;
            int32_t digits;
            memcpy(&digits, row + 4 * line, sizeof digits);
            const __m256i found = _mm256_maddubs_epi16((__m256i)q[line], _mm256_set1_epi32(digits));
            pairs = line == k ? found : _mm256_add_epi16(pairs, found);
            HOLD(pairs); /* in this order: sorted anew, the sums would need more registers than there are */
        }
        total += (ivec)_mm256_madd_epi16(pairs, _mm256_set1_epi16(1));
    }
#endif
    return total;
}

#if LANES == 8
/* Where four numbers of a row's stretch lie among its words. */
INLINE int words_at(const int line) { return line / 2 % 2 * 16 + line / 4 * 8 + line % 2 * 4; }

/* The numbers of a row's stretch in 16 bits, each four of them as 0, 2, 1, 3: so meet them the even bytes of a weight and
 * then the odd ones. */
INLINE void words_of(const int digits, const uint8_t *high, const uint8_t *low, int16_t *to) {
    const __m256i order = _mm256_broadcastsi128_si256(_mm_setr_epi8(0, 2, 1, 3, 4, 6, 5, 7, 8, 10, 9, 11, 12, 14, 13, 15));
    const __m256i lower = _mm256_shuffle_epi8(_mm256_loadu_si256((const __m256i *)(digits == 1 ? high : low)), order);
    __m256i upper = _mm256_cmpgt_epi8(_mm256_setzero_si256(), lower); /* a digit below zero takes 1 from what is above it */
    if (digits == 2) upper = _mm256_add_epi8(upper, _mm256_shuffle_epi8(_mm256_loadu_si256((const __m256i *)high), order));
    _mm256_storeu_si256((__m256i *)to, _mm256_unpacklo_epi8(lower, upper));
    _mm256_storeu_si256((__m256i *)(to + 16), _mm256_unpackhi_epi8(lower, upper));
}

/* Dots of 8 outputs of stretch `s`, from `o` on, with the words of `count` (a constant) rows: whole[row]. */
INLINE void word_dots(const int kind, const uint8_t *w, long s, const int o, const int16_t (*words)[STRETCH], const int count, ivec *whole) {
    const uint8_t *numbers = w + numbers_at(kind, s) + 4 * o;
    for (int r = 0; r < count; r++) whole[r] = (ivec){0};
#pragma GCC unroll 8
    for (int line = 0; line < 8; line++) {
        ivec q = from_plane(numbers, low_bits(kind), line, 0);
        if (is_uneven(kind)) q = look_up(UNEVEN, q & 0x0f0f0f0f);
        const __m256i even = _mm256_srai_epi16(_mm256_slli_epi16((__m256i)q, 8), 8), odd = _mm256_srai_epi16((__m256i)q, 8);
        SAME_PLACE(words);
        for (int r = 0; r < count; r++) {
            int32_t first, second;
            memcpy(&first, words[r] + words_at(line), sizeof first);
            memcpy(&second, words[r] + words_at(line) + 2, sizeof second);
            whole[r] += (ivec)_mm256_madd_epi16(even, _mm256_set1_epi32(first));
            whole[r] += (ivec)_mm256_madd_epi16(odd, _mm256_set1_epi32(second));
            HOLD(whole[r]);
        }
    }
}
#endif

/* Dots of 16 outputs with `count` (a constant) of `rows` rows. `kind` and `digits` are constants. */
INLINE void packed_vectors(const int kind, const int digits, const uint8_t *w, const uint8_t *x, int first, const int count, int rows,
                           long stretches, float (*out)[ABREAST]) {
    const int parts = scales_of(kind);
    vec total[PACKED_ROWS][ABREAST / LANES];
    for (int r = 0; r < count; r++)
        for (int h = 0; h < ABREAST / LANES; h++) total[r][h] = (vec){0};
    for (long s = 0; s < stretches; s++, x += rows * row_bytes(STRETCH, digits)) {
        const uint8_t *high = x + first * STRETCH, *low = high + rows * STRETCH;
        const uint8_t *shares = x + shares_at(digits, rows) + first * (long)sizeof(Share32);
        ask_for_stretch(kind, w, s);
#if LANES == 8
        int16_t words[PACKED_ROWS][STRETCH];
        for (int r = 0; r < count && is_in_words(kind); r++) words_of(digits, high + r * STRETCH, low + r * STRETCH, words[r]);
#endif
#pragma GCC unroll 2
        for (int h = 0; h < ABREAST / LANES; h++) {
            vec scales[2], minima[2];
            ivec q[8];
            load_terms(kind, w, s, h * LANES, scales, minima);
#if LANES == 8
            if (is_in_words(kind)) {
                ivec whole[PACKED_ROWS];
                word_dots(kind, w, s, h * LANES, words, count, whole);
                for (int r = 0; r < count; r++)
                    total[r][h] = add_stretch(kind, total[r][h], whole + r, shares, r, scales, minima);
                continue;
            }
#endif
            load_numbers(kind, w, s, h * LANES, q);
            for (int r = 0; r < count; r++) {
                ivec whole[2], sums[2];
#pragma GCC unroll 2
                for (int part = 0; part < parts; part++) {
#pragma GCC unroll 2
                    for (int d = 0; d < digits; d++)
                        sums[d] = digit_dots(kind, q, part * 8 / parts, (part + 1) * 8 / parts, (d ? low : high) + r * STRETCH);
                    whole[part] = digits == 1 ? sums[0] : of_two_digits(sums[0], sums[1]);
                }
                total[r][h] = add_stretch(kind, total[r][h], whole, shares, r, scales, minima);
            }
        }
    }
    for (int r = 0; r < count; r++)
        for (int h = 0; h < ABREAST / LANES; h++) store(out[r] + h * LANES, total[r][h]);
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

/* The same of all rows by matrix units, their digits below each other, of kinds with one scale a stretch. Tiles wait
 * long for what was just written, and so does who reads what they just found: a stretch is unpacked UNDER_WAY
 * stretches before it is multiplied, its sums are stored behind the next product and added to the totals behind one
 * more. ready: all its stretches unpacked, or NULL. */
INLINE void packed_tiles(const int kind, const int digits, const uint8_t *w, const ivec *ready, const uint8_t *x, int rows,
                         long stretches, float (*out)[ABREAST]) {
    const int others_rows = digits * rows > TILE_ROWS ? digits * rows - TILE_ROWS : 0;
    const uint8_t first = (uint8_t)(digits * rows - others_rows), other = (uint8_t)(others_rows ? others_rows : 1);
    const uint8_t counts[8] = {first, other, 8, 8, first, other, first, other};
    const uint16_t bytes[8] = {STRETCH, STRETCH, 64, 64, 64, 64, 64, 64};
    set_tiles(digits * rows + 4 * TILE_ROWS, counts, bytes);
    enum { UNDER_WAY = 2 };
    ivec wide[2 * UNDER_WAY][8], sums[2][2 * TILE_ROWS];
    vec scales[2], minima[2], total[TILE_ROWS];
    for (int r = 0; r < TILE_ROWS; r++) total[r] = (vec){0};
    const long ldx = rows * row_bytes(STRETCH, digits);
    for (long s = 0; s < stretches + UNDER_WAY + 2; s++) {
        const long t = s - UNDER_WAY, u = t - 2;
        if (s < stretches && !ready) {
            ask_for_stretch(kind, w, s);
            load_numbers(kind, w, s, 0, wide[s % (2 * UNDER_WAY)]);
        }
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
        const ivec *found = sums[u & 1];
        load_terms(kind, w, u, 0, scales, minima);
#pragma GCC unroll 16
        for (int r = 0; r < rows; r++) {
            const ivec whole = digits == 1 ? found[r] : of_two_digits(found[r], found[rows + r]);
            total[r] = add_stretch(kind, total[r], &whole, x + u * ldx + shares_at(digits, rows), r, scales, minima);
        }
    }
#pragma GCC unroll 16
    for (int r = 0; r < rows; r++) store(out[r], total[r]);
}
#else
INLINE void packed_tiles(const int kind, const int digits, const uint8_t *w, const ivec *ready, const uint8_t *x, int rows,
                         long stretches, float (*out)[ABREAST]) {
    (void)kind, (void)digits, (void)w, (void)ready, (void)x, (void)rows, (void)stretches, (void)out;
}
#endif

/* Outputs first .. first + count - 1 of rows whose digits lie in groups of `group`. `kind` and `digits` are constants. */
INLINE void packed_dots(const int kind, const int digits, const uint8_t *weight, const uint8_t *x, int n, int group, long inputs,
                        long first, long count, float *out, long ldo) {
    const long stretches = inputs / STRETCH;
    ivec unpacked[MOST_READY][8];
    const int has_tiles = may_use_tiles && scales_of(kind) == 1, is_ready = has_tiles && n > group && stretches <= MOST_READY;
    for (long o = first / ABREAST * ABREAST; o < first + count; o += ABREAST) {
        const uint8_t *w = weight + o / ABREAST * packed_bytes(kind, stretches);
        const long before = o < first ? first - o : 0, end = first + count - o < ABREAST ? first + count - o : ABREAST;
        for (long s = 0; s < stretches && is_ready; s++) {
            ask_for_stretch(kind, w, s);
            load_numbers(kind, w, s, 0, unpacked[s]);
        }
        for (int r = 0; r < n; r += group) {
            const int rows = n - r < group ? n - r : group;
            const uint8_t *at = x + r * row_bytes(inputs, digits);
            float found[TILE_ROWS][ABREAST];
            if (has_tiles && rows >= LEAST_PACKED_TILE_ROWS) {
                const ivec *ready = is_ready ? unpacked[0] : NULL;
                switch (is_common(kind) ? rows : 0) { /* where their number is a constant, totals stay in registers */
#define ALL_ROWS(count) case count: packed_tiles(kind, digits, w, ready, at, count, stretches, found); break
                    ALL_ROWS(4); ALL_ROWS(5); ALL_ROWS(6); ALL_ROWS(7); ALL_ROWS(8); ALL_ROWS(16);
                    default: packed_tiles(kind, digits, w, ready, at, rows, stretches, found);
                }
            } else {
                for (int k = 0, some; k < rows; k += some) {
                    some = rows - k < PACKED_ROWS ? rows - k : PACKED_ROWS;
                    if (!is_common(kind) && some < PACKED_ROWS && some > 4) some = 4;
                    switch (some) {
#define SOME_ROWS(count) case count: packed_vectors(kind, digits, w, at, k, count, rows, stretches, found + k); break
#define MORE_ROWS(count) case count: if (is_common(kind)) packed_vectors(kind, digits, w, at, k, count, rows, stretches, found + k); break
                        SOME_ROWS(1); SOME_ROWS(2); SOME_ROWS(3); SOME_ROWS(4); MORE_ROWS(5); MORE_ROWS(6); MORE_ROWS(7); SOME_ROWS(8);
                    }
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
    case FINE + kind: packed_dots(kind, 2, w, x, n, group, inputs, first, count, out, ldo); break; \
    case COARSE + kind: packed_dots(kind, 1, w, x, n, group, inputs, first, count, out, ldo); break
    switch (kind) { PACKED_KINDS(PACKED_DOTS); }
}
#else
INLINE void pack_any(int kind, const uint8_t *w, long inputs, int outputs, uint8_t *to) {
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
