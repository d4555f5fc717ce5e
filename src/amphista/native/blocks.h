/* Blocks of GGUF files, widened to exactly the float32 numbers they stand for: gguf.quants.dequantize's, bit for bit.
 *
 * A row of a weight is a row of blocks of 32 or 256 numbers, of IQ4_NL 64: two of the file's. A number is scale * q + min,
 * in the order of the file: for all of these kinds the product is exact in float32, or nothing is added to it, so that a
 * fused multiply-add rounds as the two operations do. Where nothing is to be added it is -0, which leaves even a zero's sign.
 */
#ifndef AMPHISTA_BLOCKS_H
#define AMPHISTA_BLOCKS_H

#include "lanes.h"

enum { FLOAT32, BFLOAT16, INT8, SIDE_BY_SIDE, F16, Q4_0, Q4_1, Q5_0, Q5_1, Q8_0, IQ4_NL, Q4_K, Q5_K, Q6_K,
       Q2_K, Q3_K, IQ4_XS }; /* of IQ4_NL two of the file's: alone they are as large as those of Q4_0 */
enum { STRETCH = 32, VECTORS = STRETCH / LANES }; /* what is widened at once */

INLINE int is_blocks(int kind) { return kind >= F16; }
INLINE long block_numbers(int kind) { return kind >= Q4_K ? 256 : kind == IQ4_NL ? 64 : 32; }
INLINE long block_bytes(int kind) {
    static const int bytes[] = {[F16] = 64, [Q4_0] = 18, [Q4_1] = 20, [Q5_0] = 22, [Q5_1] = 24, [Q8_0] = 34, [IQ4_NL] = 36,
                                [Q4_K] = 144, [Q5_K] = 176, [Q6_K] = 210, [Q2_K] = 84, [Q3_K] = 110, [IQ4_XS] = 136};
    return bytes[kind];
}

/* How many parts of a stretch have scales of their own, and whether something is added to their numbers. */
INLINE int scales_of(int kind) { return kind == Q6_K || kind == Q2_K || kind == Q3_K ? 2 : 1; }
INLINE int has_minima(int kind) { return kind == Q4_1 || kind == Q5_1 || kind == Q4_K || kind == Q5_K || kind == Q2_K; }

/* What numbers of 4 bits stand for that are spread unevenly. */
INLINE int is_uneven(int kind) { return kind == IQ4_NL || kind == IQ4_XS; }
static const int8_t UNEVEN[16] = {-127, -104, -83, -65, -49, -35, -22, -10, 1, 13, 25, 38, 53, 69, 89, 113};

INLINE float from_half(const uint8_t *from) {
    uint16_t half;
    memcpy(&half, from, sizeof half);
#if defined(__F16C__)
    return _cvtsh_ss(half);
#else
    uint32_t bits = (uint32_t)(half & 0x7fff) << 13;
    const uint32_t sign = (uint32_t)(half & 0x8000) << 16, special = (half & 0x7c00) == 0x7c00 ? 0x7f800000 : 0;
    float value;
    memcpy(&value, &bits, sizeof value);
    value *= 0x1p112f; /* exact, of subnormal numbers too */
    memcpy(&bits, &value, sizeof bits);
    bits = (special ? ((bits & 0x7fffff) | special) : bits) | sign;
    memcpy(&value, &bits, sizeof value);
    return value;
#endif
}

INLINE vec from_halves(const uint8_t *from) {
#if LANES == 16
    return (vec)_mm512_cvtph_ps(_mm256_loadu_si256((const __m256i *)from));
#elif LANES == 8
    return (vec)_mm256_cvtph_ps(_mm_loadu_si128((const __m128i *)from));
#else
    vec all = {0};
    for (int lane = 0; lane < LANES; lane++) all[lane] = from_half(from + 2 * lane);
    return all;
#endif
}

/* LANES bytes as whole numbers. */
INLINE ivec whole(const uint8_t *from) {
#if LANES == 16
    return (ivec)_mm512_cvtepu8_epi32(_mm_loadu_si128((const __m128i *)from));
#elif LANES == 8
    return (ivec)_mm256_cvtepu8_epi32(_mm_loadl_epi64((const __m128i *)from));
#else
    typedef uint8_t lane_bytes __attribute__((vector_size(LANES)));
    lane_bytes bytes;
    memcpy(&bytes, from, sizeof bytes);
    return __builtin_convertvector(bytes, ivec);
#endif
}

INLINE ivec whole_signed(const uint8_t *from) {
#if LANES == 16
    return (ivec)_mm512_cvtepi8_epi32(_mm_loadu_si128((const __m128i *)from));
#elif LANES == 8
    return (ivec)_mm256_cvtepi8_epi32(_mm_loadl_epi64((const __m128i *)from));
#else
    return (whole(from) << 24) >> 24;
#endif
}

INLINE ivec lane_numbers(void) {
    ivec lanes;
    for (int lane = 0; lane < LANES; lane++) lanes[lane] = lane;
    return lanes;
}

typedef struct {
    float scale, min;
} Terms;

/* Two numbers of 16 bits that follow each other. */
INLINE Terms halves(const uint8_t *from) {
#if defined(__F16C__)
    int32_t both;
    memcpy(&both, from, sizeof both);
    const four found = (four)_mm_cvtph_ps(_mm_cvtsi32_si128(both));
    return (Terms){found[0], found[1]};
#else
    return (Terms){from_half(from), from_half(from + 2)};
#endif
}

INLINE vec scaled(ivec q, const Terms *terms) { return __builtin_convertvector(q, vec) * terms->scale + terms->min; }

/* Numbers of 4 bits, the low half of each byte or, shifted by 4, the high one; `zero` is what stands for 0. */
INLINE vec nibbles(ivec bytes, const int shift, const int zero, const Terms *terms) {
#if LANES == 16 /* looked up among the 16 that there are */
    return (vec)_mm512_permutexvar_ps((__m512i)(bytes >> shift), (__m512)scaled(lane_numbers() - zero, terms));
#else
    return scaled((bytes >> shift & 15) - zero, terms);
#endif
}

/* Scale and minimum of 6 bits each, of one of 8 stretches, in 12 bytes. */
INLINE Terms k_terms(const uint8_t *block, int part) {
    const uint8_t *packed = block + 4;
    int scale = packed[part & 3], min = packed[4 + (part & 3)];
    if (part < 4) scale &= 63, min &= 63;
    else scale = (packed[4 + part] & 15) | (scale >> 2 & 48), min = packed[4 + part] >> 4 | (min >> 2 & 48);
    const Terms both = halves(block);
    return (Terms){both.scale * (float)scale, -(both.min * (float)min)};
}

/* The scale of 6 bits of one of 16 half stretches of Q3_K, in 12 bytes. */
INLINE int third_scale(const uint8_t *packed, int half) {
    return ((packed[half & 7] >> 4 * (half >> 3) & 15) | (packed[8 + (half & 3)] >> 2 * (half >> 2) & 3) << 4) - 32;
}

/* How numbers 32 * part .. 32 * part + 31 of a block are scaled, or either half of them. `kind` is a constant. */
INLINE void terms_of(const int kind, const uint8_t *block, int part, Terms *terms) {
    if (kind == Q4_K || kind == Q5_K) *terms = k_terms(block, part);
    else if (kind == Q4_1 || kind == Q5_1) *terms = halves(block);
    else if (kind == IQ4_XS) {
        const int low = block[4 + part / 2] >> 4 * (part & 1) & 15, high = (block[2] | block[3] << 8) >> 2 * part & 3;
        *terms = (Terms){from_half(block) * (float)((low | high << 4) - 32), -0.0f};
    } else if (scales_of(kind) == 1) *terms = (Terms){halves(block + (kind == IQ4_NL ? 18 * part : 0)).scale, -0.0f};
    for (int half = 2 * part; half < 2 * part + 2; half++, terms++)
        if (kind == Q6_K) *terms = (Terms){from_half(block + 208) * (float)(int8_t)block[192 + half], -0.0f};
        else if (kind == Q3_K) *terms = (Terms){from_half(block + 108) * (float)third_scale(block + 96, half), -0.0f};
        else if (kind == Q2_K) {
            const Terms both = halves(block + 80);
            *terms = (Terms){both.scale * (float)(block[half] & 15), -(both.min * (float)(block[half] >> 4))};
        }
}

INLINE vec uneven(ivec nibbles, const Terms *terms) {
    ivec all = {0};
#if LANES == 16
    const __m128i values = _mm_loadu_si128((const __m128i *)UNEVEN);
    all = (ivec)_mm512_permutexvar_epi32((__m512i)nibbles, _mm512_cvtepi8_epi32(values));
#else
    for (int lane = 0; lane < LANES; lane++) all[lane] = UNEVEN[nibbles[lane]];
#endif
    return scaled(all, terms);
}

/* Numbers 32 * part .. 32 * part + 31 of a block, by its terms; `kind` is a constant. */
INLINE void unpack(const int kind, const uint8_t *block, int part, const Terms *terms, vec *out) {
    const uint8_t *at = block + (kind == Q4_1 || kind == Q5_1 ? 4 : 2);
    uint32_t fifth = 0;
    if (kind == Q5_0 || kind == Q5_1) memcpy(&fifth, at, 4), at += 4;
    for (int v = 0; v < VECTORS; v++) {
        const int from = v * LANES, half = from & 15, shift = from < 16 ? 0 : 4;
        if (kind == F16) {
            out[v] = from_halves(block + 2 * from);
        } else if (kind == Q4_0 || kind == Q4_1) {
            out[v] = nibbles(whole(at + half), shift, kind == Q4_0 ? 8 : 0, terms);
        } else if (kind == Q5_0 || kind == Q5_1) {
            const ivec high = (((int32_t)fifth >> (lane_numbers() + from)) & 1) << 4;
            out[v] = scaled(((whole(at + half) >> shift & 15) | high) - (kind == Q5_0 ? 16 : 0), terms);
        } else if (kind == Q8_0) {
            out[v] = scaled(whole_signed(at + from), terms);
        } else if (kind == Q4_K) {
            const ivec bytes = whole(block + 16 + 32 * (part / 2) + from);
            out[v] = nibbles(part & 1 ? bytes >> 4 : bytes, 0, 0, terms);
        } else if (kind == Q5_K) {
            const ivec low = whole(block + 48 + 32 * (part / 2) + from) >> 4 * (part & 1) & 15;
            out[v] = scaled(low | (whole(block + 16 + from) >> part & 1) << 4, terms);
        } else if (kind == Q6_K) {
            const ivec low = whole(block + 64 * (part / 4) + 32 * (part & 1) + from) >> 4 * (part >> 1 & 1) & 15;
            const ivec high = whole(block + 128 + 32 * (part / 4) + from) >> 2 * (part & 3) & 3;
            out[v] = scaled((low | high << 4) - 32, terms + from / 16);
        } else if (kind == Q2_K) {
            out[v] = scaled(whole(block + 16 + 32 * (part / 4) + from) >> 2 * (part & 3) & 3, terms + from / 16);
        } else if (kind == Q3_K) {
            const ivec low = whole(block + 32 + 32 * (part / 4) + from) >> 2 * (part & 3) & 3;
            out[v] = scaled((low | (whole(block + from) >> part & 1) << 2) - 4, terms + from / 16);
        } else if (is_uneven(kind)) {
            out[v] = uneven(whole(block + (kind == IQ4_XS ? 8 + 16 * part : 2 + 18 * part) + half) >> shift & 15, terms);
        }
    }
}

#endif
