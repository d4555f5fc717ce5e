/* Blocks of GGUF files, widened to exactly the float32 numbers they stand for: gguf.quants.dequantize's, bit for bit.
 *
 * A row of a weight is a row of blocks of 32 or 256 numbers. A number is scale * q + min, in the order of the file: for
 * all of these kinds the product is exact in float32, or nothing is added to it, so that a fused multiply-add rounds as
 * the two operations do. Where nothing is to be added it is -0, which leaves even a zero's sign.
 */
#ifndef AMPHISTA_BLOCKS_H
#define AMPHISTA_BLOCKS_H

#include "lanes.h"

enum { FLOAT32, BFLOAT16, INT8, SIDE_BY_SIDE, F16, Q4_0, Q4_1, Q5_0, Q5_1, Q8_0, Q4_K, Q5_K, Q6_K };
enum { STRETCH = 32, VECTORS = STRETCH / LANES }; /* what is widened at once */

INLINE int is_blocks(int kind) { return kind >= F16; }
INLINE long block_numbers(int kind) { return kind >= Q4_K ? 256 : 32; }
INLINE long block_bytes(int kind) {
    static const int bytes[] = {[F16] = 64, [Q4_0] = 18, [Q4_1] = 20, [Q5_0] = 22, [Q5_1] = 24, [Q8_0] = 34,
                                [Q4_K] = 144, [Q5_K] = 176, [Q6_K] = 210};
    return bytes[kind];
}

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
#else
    vec all = {0};
    for (int lane = 0; lane < LANES; lane++) all[lane] = from_half(from + 2 * lane);
    return all;
#endif
}

typedef uint8_t lane_bytes __attribute__((vector_size(LANES)));

/* LANES bytes as whole numbers. */
INLINE ivec whole(const uint8_t *from) {
    lane_bytes bytes;
    memcpy(&bytes, from, sizeof bytes);
#if LANES == 16
    return (ivec)_mm512_cvtepu8_epi32((__m128i)bytes);
#else
    return __builtin_convertvector(bytes, ivec);
#endif
}

INLINE ivec whole_signed(const uint8_t *from) { return (whole(from) << 24) >> 24; }

INLINE ivec lane_numbers(void) {
    ivec lanes;
    for (int lane = 0; lane < LANES; lane++) lanes[lane] = lane;
    return lanes;
}

INLINE vec scaled(ivec q, float scale, float min) { return __builtin_convertvector(q, vec) * scale + min; }

/* Numbers of 4 bits, the low half of each byte or, shifted by 4, the high one; `zero` is what stands for 0. */
INLINE vec nibbles(ivec bytes, const int shift, const int zero, float scale, float min) {
#if LANES == 16 /* looked up among the 16 that there are */
    const __m512 table = (__m512)scaled(lane_numbers() - zero, scale, min);
    return (vec)_mm512_permutexvar_ps((__m512i)(bytes >> shift), table);
#else
    return scaled((bytes >> shift & 15) - zero, scale, min);
#endif
}

/* Scales of 6 bits, of 8 stretches and their minima, in 12 bytes. */
INLINE void k_terms(const uint8_t *block, int part, float *scale, float *min) {
    const uint8_t *packed = block + 4;
    int of_scale = packed[part & 3], of_min = packed[4 + (part & 3)];
    if (part < 4) of_scale &= 63, of_min &= 63;
    else {
        const int both = packed[4 + part];
        of_scale = (both & 15) | (of_scale >> 2 & 48), of_min = (both >> 4) | (of_min >> 2 & 48);
    }
    *scale = from_half(block) * (float)of_scale;
    *min = -(from_half(block + 2) * (float)of_min);
}

/* Numbers 32 * part .. 32 * part + 31 of a block; `kind` is a constant. */
INLINE void widen(const int kind, const uint8_t *block, int part, vec *out) {
    const float first = from_half(block), second = kind == Q4_1 || kind == Q5_1 ? from_half(block + 2) : -0.0f;
    const int zero = kind == Q4_0 ? 8 : kind == Q5_0 ? 16 : 0;
    const uint8_t *at = block + (kind == Q4_1 || kind == Q5_1 ? 4 : 2);
    float scale = 0, min = 0;
    uint32_t fifth = 0;
    if (kind == Q5_0 || kind == Q5_1) memcpy(&fifth, at, 4), at += 4;
    if (kind == Q4_K || kind == Q5_K) k_terms(block, part, &scale, &min);
    for (int v = 0; v < VECTORS; v++) {
        const int from = v * LANES, half = from & 15, shift = from < 16 ? 0 : 4;
        if (kind == F16) {
            out[v] = from_halves(block + 2 * from);
        } else if (kind == Q4_0 || kind == Q4_1) {
            out[v] = nibbles(whole(at + half), shift, zero, first, second);
        } else if (kind == Q5_0 || kind == Q5_1) {
            const ivec high = (((int32_t)fifth >> (lane_numbers() + from)) & 1) << 4;
            out[v] = scaled(((whole(at + half) >> shift & 15) | high) - zero, first, second);
        } else if (kind == Q8_0) {
            out[v] = scaled(whole_signed(at + from), first, second);
        } else if (kind == Q4_K) {
            const ivec bytes = whole(block + 16 + 32 * (part / 2) + from);
            out[v] = nibbles(part & 1 ? bytes >> 4 : bytes, 0, 0, scale, min);
        } else if (kind == Q5_K) {
            const ivec low = whole(block + 48 + 32 * (part / 2) + from) >> 4 * (part & 1) & 15;
            out[v] = scaled(low | (whole(block + 16 + from) >> part & 1) << 4, scale, min);
        } else if (kind == Q6_K) {
            const ivec low = whole(block + 64 * (part / 4) + 32 * (part & 1) + from) >> 4 * (part >> 1 & 1) & 15;
            const ivec high = whole(block + 128 + 32 * (part / 4) + from) >> 2 * (part & 3) & 3;
            const float step = from_half(block + 208) * (float)(int8_t)block[192 + 2 * part + from / 16];
            out[v] = scaled((low | high << 4) - 32, step, -0.0f);
        }
    }
}

#endif
