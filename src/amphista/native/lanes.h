/* Vectors of float32: as wide as the processor has them, by compiler extensions that every instruction set shares.
 *
 * One source for AVX-512, AVX2, NEON and plain C. What a sum's order depends on is LANES alone, so it is the same
 * wherever in a product a number stands; it may differ between two builds.
 */
#ifndef AMPHISTA_LANES_H
#define AMPHISTA_LANES_H

#include <stddef.h>
#include <stdint.h>
#include <string.h>
#if defined(__x86_64__)
#include <immintrin.h>
#endif

#if defined(__AVX512F__) && defined(__AVX512BW__)
#define LANES 16
#elif defined(__AVX2__) && defined(__FMA__) && defined(__F16C__)
#define LANES 8
#else
#define LANES 4
#endif
#define INLINE static inline __attribute__((always_inline))
#define PAD 64 /* numbers: rows of our own are padded with zeros to a multiple, so that loops over them have no rest */

typedef float vec __attribute__((vector_size(4 * LANES)));
typedef int32_t ivec __attribute__((vector_size(4 * LANES)));
typedef uint32_t uvec __attribute__((vector_size(4 * LANES)));
typedef float four __attribute__((vector_size(16)));
typedef float any_vec __attribute__((vector_size(4 * LANES), aligned(4), may_alias));
typedef uint32_t any_uvec __attribute__((vector_size(4 * LANES), aligned(2), may_alias));
typedef uint32_t any_word __attribute__((aligned(2), may_alias));
typedef uint16_t any_half __attribute__((may_alias));

INLINE long padded(long count) { return (count + PAD - 1) / PAD * PAD; }
INLINE vec load(const float *from) { return *(const any_vec *)from; }
INLINE void store(float *to, vec value) { *(any_vec *)to = value; }
INLINE void store_some(float *to, vec value, long count) {
    if (count >= LANES) store(to, value);
    else memcpy(to, &value, (size_t)count * sizeof *to);
}
INLINE vec all(float value) { return value - (vec){0}; }
INLINE vec select_vec(ivec mask, vec yes, vec no) { return (vec)(((ivec)yes & mask) | ((ivec)no & ~mask)); }

/* Holds a value in a register: compilers would load it again for each of its uses. */
#if defined(__AVX512F__)
#define HOLD(value) __asm__("" : "+v"(value))
#elif defined(__x86_64__)
#define HOLD(value) __asm__("" : "+x"(value))
#else
#define HOLD(value) (void)0
#endif

/* total + a * b, rounded once, where the total is: where 16 registers hold 12 totals, compilers would move some to memory. */
INLINE vec add_product(vec total, vec a, vec b) {
#if LANES == 8
    __asm__("vfmadd231ps %2, %1, %0" : "+x"(total) : "x"(a), "x"(b));
    return total;
#else
    return total + a * b;
#endif
}

/* Has what lies at a pointer loaded where it is used: compilers would keep it from an earlier use, where no register is free. */
#define SAME_PLACE(pointer) __asm__ volatile("" : "+r"(pointer))

/* Has numbers that go to all lanes loaded: spread from a register they take units that products need. */
#if defined(__AVX512F__)
#define FROM_MEMORY(value) __asm__("" : "+m"(value))
#else
#define FROM_MEMORY(value) (void)0
#endif

/* The first `count` numbers, zeros behind them: nothing beyond is read. */
INLINE vec load_part(const float *from, long count) {
    vec part = {0};
    memcpy(&part, from, (size_t)count * sizeof(float));
    return part;
}

INLINE float from_bf16(uint16_t bits) {
    uint32_t wide = (uint32_t)bits << 16;
    float value;
    memcpy(&value, &wide, sizeof value);
    return value;
}

/* Rounded to the nearest, ties to even; NaN stays NaN. */
INLINE uint16_t to_bf16(float value) {
    uint32_t bits;
    memcpy(&bits, &value, sizeof bits);
    if (value != value) return 0x7fc0;
    return (uint16_t)((bits + 0x7fff + (bits >> 16 & 1)) >> 16);
}

typedef uint16_t half __attribute__((vector_size(2 * LANES)));

/* LANES numbers rounded as to_bf16 does. */
INLINE void store_bf16(uint16_t *to, vec value) {
    const uvec bits = (uvec)value, rounded = (bits + 0x7fff + (bits >> 16 & 1)) >> 16;
    const half found = __builtin_convertvector((uvec)select_vec((ivec)(value == value), (vec)rounded, (vec)((uvec){0} + 0x7fc0u)), half);
    memcpy(to, &found, sizeof found);
}

/* LANES numbers of 16 bits as float32, in their order. */
INLINE vec load_bf16(const uint16_t *from) {
    half bits;
    memcpy(&bits, from, sizeof bits);
    return (vec)(__builtin_convertvector(bits, uvec) << 16);
}

INLINE vec load_bf16_part(const uint16_t *from, long count) {
    uint16_t part[LANES] = {0};
    memcpy(part, from, (size_t)count * sizeof *from);
    return load_bf16(part);
}

/* Pairs of numbers of 16 bits, zeros behind the first `count` numbers: nothing beyond is read. */
INLINE uvec load_pairs(const uint16_t *from, long count) {
    uvec part = {0};
    memcpy(&part, from, (size_t)count * sizeof *from);
    return part;
}

/* Four words of each of LANES rows, from `at` on, turned: each word's of all rows side by side. */
INLINE void turn_words(const any_word *const *rows, long at, uvec *to) {
#if LANES == 16
#define WORDS(row) _mm_loadu_si128((const __m128i *)(rows[row] + at))
    __m512i v[4], t[4];
    for (int a = 0; a < 4; a++) {
        v[a] = _mm512_castsi128_si512(WORDS(a));
        for (int k = 1; k < 4; k++) v[a] = _mm512_mask_broadcast_i32x4(v[a], (__mmask16)(0xf << 4 * k), WORDS(4 * k + a));
    }
    for (int k = 0; k < 2; k++) {
        t[k] = _mm512_unpacklo_epi32(v[2 * k], v[2 * k + 1]);
        t[2 + k] = _mm512_unpackhi_epi32(v[2 * k], v[2 * k + 1]);
    }
    for (int k = 0; k < 2; k++) {
        to[2 * k] = (uvec)_mm512_unpacklo_epi64(t[2 * k], t[2 * k + 1]);
        to[2 * k + 1] = (uvec)_mm512_unpackhi_epi64(t[2 * k], t[2 * k + 1]);
    }
#undef WORDS
#else
    for (int i = 0; i < 4; i++)
        for (int lane = 0; lane < LANES; lane++) to[i][lane] = rows[lane][at + i];
#endif
}

/* Four vectors' sums at once. Each is summed in the same order, whatever stands beside it. */
INLINE four sums(vec a, vec b, vec c, vec d) {
#if LANES == 16
    const __m512 p = (__m512)a, q = (__m512)b, r = (__m512)c, s = (__m512)d;
    const __m512 pq = _mm512_add_ps(_mm512_shuffle_f32x4(p, q, 0x44), _mm512_shuffle_f32x4(p, q, 0xee));
    const __m512 rs = _mm512_add_ps(_mm512_shuffle_f32x4(r, s, 0x44), _mm512_shuffle_f32x4(r, s, 0xee));
    __m512 all = _mm512_add_ps(_mm512_shuffle_f32x4(pq, rs, 0x88), _mm512_shuffle_f32x4(pq, rs, 0xdd));
    all = _mm512_add_ps(all, _mm512_shuffle_ps(all, all, 0x4e));
    all = _mm512_add_ps(all, _mm512_shuffle_ps(all, all, 0xb1));
    return (four)_mm512_castps512_ps128(_mm512_maskz_compress_ps(0x1111, all));
#else
#if LANES == 8
    const __m256 ab = _mm256_hadd_ps((__m256)a, (__m256)b), cd = _mm256_hadd_ps((__m256)c, (__m256)d);
    const __m256 all = _mm256_hadd_ps(ab, cd); /* of both halves */
    return (four)_mm_add_ps(_mm256_castps256_ps128(all), _mm256_extractf128_ps(all, 1));
#else
    const four r0 = {a[0], b[0], c[0], d[0]}, r1 = {a[1], b[1], c[1], d[1]};
    const four r2 = {a[2], b[2], c[2], d[2]}, r3 = {a[3], b[3], c[3], d[3]};
    return (r0 + r1) + (r2 + r3);
#endif
#endif
}

INLINE float sum(vec value) { return sums(value, (vec){0}, (vec){0}, (vec){0})[0]; }

/* a where it is larger, else b: also where either is NaN. */
INLINE vec larger(vec a, vec b) {
#if LANES == 16
    return (vec)_mm512_max_ps((__m512)a, (__m512)b);
#elif LANES == 8
    return (vec)_mm256_max_ps((__m256)a, (__m256)b);
#else
    return select_vec((ivec)(a > b), a, b);
#endif
}

INLINE vec magnitude(vec value) { return (vec)((ivec)value & 0x7fffffff); }

/* Whether any lane of a comparison is true. */
INLINE int any_lane(ivec mask) {
#if LANES == 16
    return _mm512_test_epi32_mask((__m512i)mask, (__m512i)mask) != 0;
#elif LANES == 8
    return !_mm256_testz_si256((__m256i)mask, (__m256i)mask);
#else
    int found = 0;
    for (int lane = 0; lane < LANES; lane++) found |= mask[lane];
    return found;
#endif
}

/* Of numbers none of which is NaN. */
INLINE float largest(vec value) {
#if LANES == 16
    return _mm512_reduce_max_ps((__m512)value);
#else
    float found = value[0];
    for (int lane = 1; lane < LANES; lane++) found = value[lane] > found ? value[lane] : found;
    return found;
#endif
}

/* e to the power of x to about 1e-7 of it: 2^n e^r with |r| <= ln 2 / 2 (Cephes' polynomial); 0 below -87. */
INLINE vec exponential(vec x) {
    const vec magic = all(12582912.0f);
    vec bounded = select_vec((ivec)(x > 88.0f), all(88.0f), x);
    bounded = select_vec((ivec)(bounded < -87.0f), all(-87.0f), bounded);
    vec n = (bounded * 1.44269504f + magic) - magic;
    vec r = bounded - n * 0.693359375f;
    r = r - n * -2.12194440e-4f;
    vec p = all(1.9875691500e-4f);
    p = p * r + 1.3981999507e-3f;
    p = p * r + 8.3334519073e-3f;
    p = p * r + 4.1665795894e-2f;
    p = p * r + 1.6666665459e-1f;
    p = p * r + 5.0000001201e-1f;
    p = p * (r * r) + r + 1.0f;
    ivec power = (__builtin_convertvector(n, ivec) + 127) << 23;
    vec result = p * (vec)power;
    return (vec)((ivec)result & ~(ivec)(x < -87.0f));
}

#endif
