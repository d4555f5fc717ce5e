/* Skinny products: a few rows times a weight that is read once.
 *
 * y[n][o] = sum_i x[n][i] w[o][i] + bias[o], by tiles of some outputs times some rows whose sums stay in registers.
 * A sum runs over i in one order (lane by lane, lanes folded at the end, the rest last), in every tile shape: a row's
 * result has the same bits whatever rows are beside it.
 *
 * FLOAT32    the weight as it lies, [outputs][inputs]
 * BFLOAT16   as it lies, rows rounded to bfloat16, too, as torch does; sums in float32. By tiles (tiles.h) where the
 *            processor has them, for any number of rows: their sums have an order of their own
 * INT8       blocks of 32 outputs, [outputs / 32][inputs / 4][32][4], zeros at the ends; one scale an output, and rows
 *            rounded to 8 bits with one step a row. Whole numbers: the order does not matter
 * F16, Q4_1  and others of blocks.h: a GGUF file's own blocks, widened tile by tile to exactly the float32 numbers that
 *            they stand for, and summed in FLOAT32's order: the same bits as that weight's
 * FINE, COARSE  and a kind of block: packed.h, where the processor is quick at whole numbers
 */
#ifndef AMPHISTA_PRODUCTS_H
#define AMPHISTA_PRODUCTS_H

#include "packed.h"

enum { TILE = 4, BLOCK = 32, LEVELS = 127, ZERO = 128, WIDE_INPUTS = 1 << 14, AHEAD = 12 << 10, INT8_AHEAD = 8 << 10 };
#if LANES == 16 && defined(__AVX512BF16__)
enum { FLOAT_ROWS = 6, BF16_ROWS = 6, INT8_ROWS = 8, BLOCK_ROWS = 8 };
#elif LANES == 16
enum { FLOAT_ROWS = 6, BF16_ROWS = 4, INT8_ROWS = 8, BLOCK_ROWS = 8 };
#elif LANES == 8
enum { FLOAT_ROWS = 3, BF16_ROWS = 2, INT8_ROWS = 4, BLOCK_ROWS = 1 };
#else
enum { FLOAT_ROWS = 2, BF16_ROWS = 2, INT8_ROWS = 1, BLOCK_ROWS = 1 };
#endif
#ifdef MUTABLE /* tests build it with a fault to switch on, which the laws must see */
int amphista_mutant = 0;
#define MUTANT(number) (amphista_mutant == (number))
#else
#define MUTANT(number) 0
#endif
enum { NO_FAULT, SKIP_ANCESTOR, SEE_SIBLING, LATE_POSITION, DROP_TAIL, DROP_ODD, ROWS_CHANGE_ORDER, WIDE_WINDOW, OTHER_CACHE,
       EARLY_TAP, SEE_PREFIX, FIRST_ROWS_EXPERTS, LATE_THREAD };

typedef struct Product {
    const void *weight;     /* SIDE_BY_SIDE: products whose outputs follow each other, none of BFLOAT16 or INT8 */
    const float *scales;    /* INT8: of each output */
    const int32_t *offsets; /* INT8: -ZERO times the sum of each output's weights; padded to whole blocks */
    const float *bias;      /* or NULL */
    int32_t kind, outputs, inputs, unused;
} Product;

/* Inputs as a kind of weight wants them; `stride` in numbers. */
typedef struct {
    const void *data;
    const float *steps; /* INT8: what 1 stands for in each row */
    long stride;
    int are_pairs; /* BFLOAT16 for tiles: groups of up to 2 * TILE_ROWS rows, [inputs / 2][rows][2] */
    const uint8_t *digits; /* packed weights: of groups of TILE_ROWS rows or fewer */
} Rows;

/* -- float32 ------------------------------------------------------------------------------------------------------ */

INLINE void keep_tile(four found, int valid, float *out) {
    if (valid == TILE) memcpy(out, &found, sizeof found);
    else for (int o = 0; o < valid; o++) out[o] = found[o];
}

/* One row waits for memory alone; more rows leave no room in the first cache for weights of 16 or 32 bits to come. */
INLINE void ask_ahead(const char *place, const int rows) {
    if (rows <= 2) __builtin_prefetch(place, 0, 3);
    else __builtin_prefetch(place, 0, 2);
}

/* Bytes from a tile's first weight to the one asked for: the next tile's, or some tiles on, into the second cache. */
INLINE long bytes_ahead(long bytes, const int rows) { return rows <= 2 ? bytes : (AHEAD + bytes - 1) / bytes * bytes; }

/* Dots of up to TILE weight rows with `rows` rows (a constant). Weights are asked for ahead, in the order they lie in:
 * that is what memory is fastest at. */
INLINE void float_tile(const float *w, long ldw, int valid, const float *x, long ldx, const int rows, long len,
                       float *out, long ldo) {
    const float *weight[TILE];
    vec total[TILE][FLOAT_ROWS];
    for (int o = 0; o < TILE; o++) {
        weight[o] = w + (o < valid ? o : 0) * ldw;
        for (int r = 0; r < rows; r++) total[o][r] = (vec){0};
    }
    const char *ahead = (const char *)w + bytes_ahead(TILE * ldw * (long)sizeof *w, rows);
    long i = 0;
    for (; i + LANES <= len; i += LANES, ahead += TILE * sizeof(vec)) {
#if LANES == 8 /* of 16 registers 12 hold the totals: rows stay in three, weights take turns in the last */
        vec row[FLOAT_ROWS];
        for (int r = 0; r < rows; r++) {
            row[r] = load(x + r * ldx + i);
            HOLD(row[r]);
        }
        for (int o = 0; o < TILE; o++) {
            vec part = load(weight[o] + i);
            HOLD(part);
            ask_ahead(ahead + o * sizeof(vec), rows);
            for (int r = 0; r < rows; r++) total[o][r] = add_product(total[o][r], part, row[r]);
        }
#else
        vec part[TILE];
        for (int o = 0; o < TILE; o++) {
            part[o] = load(weight[o] + i);
            HOLD(part[o]);
            ask_ahead(ahead + o * sizeof(vec), rows);
        }
        for (int r = 0; r < rows; r++) {
            vec row = load(x + r * ldx + i);
            HOLD(row);
            for (int o = 0; o < TILE; o++) total[o][r] += part[o] * row;
        }
#endif
    }
    if (i < len && !MUTANT(DROP_ODD)) {
        for (int r = 0; r < rows; r++) {
            vec row = load_part(x + r * ldx + i, len - i);
            for (int o = 0; o < TILE; o++) total[o][r] = add_product(total[o][r], load_part(weight[o] + i, len - i), row);
        }
    }
    for (int r = 0; r < rows; r++) {
        four found = sums(total[0][r], total[1][r], total[2][r], total[3][r]);
        if (MUTANT(ROWS_CHANGE_ORDER) && rows > 1)
            for (int o = 0; o < TILE; o++) {
                found[o] = 0;
                for (int lane = 0; lane < LANES; lane++) found[o] += total[o][r][lane];
            }
        keep_tile(found, valid, out + r * ldo);
    }
}

/* The first or second number of each lane, widened. */
INLINE vec one_of_pairs(uvec pairs, const int odd) {
    if (!odd) return (vec)(pairs << 16);
#if LANES == 8 /* no register is free for the mask */
    static const uvec high = {0xffff0000u, 0xffff0000u, 0xffff0000u, 0xffff0000u, 0xffff0000u, 0xffff0000u, 0xffff0000u, 0xffff0000u};
    __asm__("vpand %1, %0, %0" : "+x"(pairs) : "m"(high));
    return (vec)pairs;
#else
    return (vec)(pairs & 0xffff0000u);
#endif
}

/* Adds the products of each lane's two numbers. */
INLINE vec add_pairs(vec total, uvec w, uvec x) {
#if LANES == 16 && defined(__AVX512BF16__)
    return (vec)_mm512_dpbf16_ps((__m512)total, (__m512bh)w, (__m512bh)x);
#else
    total = add_product(total, one_of_pairs(w, 0), one_of_pairs(x, 0));
    return add_product(total, one_of_pairs(w, 1), one_of_pairs(x, 1));
#endif
}

INLINE void bf16_tile(const uint16_t *w, long ldw, int valid, const uint16_t *x, long ldx, const int rows, long len,
                      float *out, long ldo) {
    const uint16_t *weight[TILE];
    vec total[TILE][BF16_ROWS];
    for (int o = 0; o < TILE; o++) {
        weight[o] = w + (o < valid ? o : 0) * ldw;
        for (int r = 0; r < rows; r++) total[o][r] = (vec){0};
    }
    const char *ahead = (const char *)w + bytes_ahead(TILE * ldw * (long)sizeof *w, rows);
    long i = 0;
    for (; i + 2 * LANES <= len; i += 2 * LANES, ahead += TILE * sizeof(vec)) {
#if LANES == 8 /* as of float32: the first numbers of all pairs, then the second, which is the order of add_pairs, too */
        for (int odd = 0; odd < 2; odd++) {
            vec row[BF16_ROWS];
            for (int r = 0; r < rows; r++) {
                row[r] = one_of_pairs(*(const any_uvec *)(x + r * ldx + i), odd);
                HOLD(row[r]);
            }
            for (int o = 0; o < TILE; o++) {
                vec part = one_of_pairs(*(const any_uvec *)(weight[o] + i), odd);
                HOLD(part);
                if (odd) ask_ahead(ahead + o * sizeof(vec), rows);
                for (int r = 0; r < rows; r++) total[o][r] = add_product(total[o][r], part, row[r]);
            }
        }
#else
        uvec part[TILE];
        for (int o = 0; o < TILE; o++) {
            part[o] = *(const any_uvec *)(weight[o] + i);
            HOLD(part[o]);
            ask_ahead(ahead + o * sizeof(vec), rows);
        }
        for (int r = 0; r < rows; r++) {
            uvec row = *(const any_uvec *)(x + r * ldx + i);
            HOLD(row);
            for (int o = 0; o < TILE; o++) total[o][r] = add_pairs(total[o][r], part[o], row);
        }
#endif
    }
    if (i < len && !MUTANT(DROP_ODD)) {
        for (int r = 0; r < rows; r++) {
            uvec row = load_pairs(x + r * ldx + i, len - i);
            for (int o = 0; o < TILE; o++) total[o][r] = add_pairs(total[o][r], load_pairs(weight[o] + i, len - i), row);
        }
    }
    for (int r = 0; r < rows; r++)
        keep_tile(sums(total[0][r], total[1][r], total[2][r], total[3][r]), valid, out + r * ldo);
}

/* Rows in groups of nearly the same size, which is at least 1. */
INLINE int group_of(int rows, int most) {
    int groups = (rows + most - 1) / most;
    return groups ? (rows + groups - 1) / groups : 1;
}

#define BY_ROWS(tile, number, ...)                                                                                    \
    switch (number) {                                                                                                 \
        case 1: tile(__VA_ARGS__, 1); break;                                                                          \
        case 2: tile(__VA_ARGS__, 2); break;                                                                          \
        case 3: tile(__VA_ARGS__, 3); break;                                                                          \
        case 4: tile(__VA_ARGS__, 4); break;                                                                          \
        case 5: tile(__VA_ARGS__, 5); break;                                                                          \
        default: tile(__VA_ARGS__, 6); break;                                                                         \
    }
#define FLOAT_TILE(w, ldw, valid, x, ldx, len, out, ldo, rows)                                                  \
    float_tile(w, ldw, valid, x, ldx, (rows) < FLOAT_ROWS ? (rows) : FLOAT_ROWS, len, out, ldo)
#define BF16_TILE(w, ldw, valid, x, ldx, len, out, ldo, rows)                                                   \
    bf16_tile(w, ldw, valid, x, ldx, (rows) < BF16_ROWS ? (rows) : BF16_ROWS, len, out, ldo)

/* Dots of `outputs` weight rows with n rows. */
static void float_dots(const float *w, long ldw, long outputs, const float *x, long ldx, int n, long len, float *out,
                       long ldo) {
    const int group = group_of(n, FLOAT_ROWS);
    for (long o = 0; o < outputs; o += TILE) {
        const int valid = outputs - o < TILE ? (int)(outputs - o) : TILE;
        for (int r = 0; r < n; r += group) {
            const int rows = n - r < group ? n - r : group;
            const float *at = x + r * ldx;
            float *to = out + r * ldo + o;
            if (n == 1) float_tile(w + o * ldw, ldw, valid, at, ldx, 1, len, to, ldo);
            else BY_ROWS(FLOAT_TILE, rows, w + o * ldw, ldw, valid, at, ldx, len, to, ldo)
        }
    }
}

static void bf16_dots(const uint16_t *w, long ldw, long outputs, const uint16_t *x, long ldx, int n, long len, float *out,
                      long ldo) {
    const int group = group_of(n, BF16_ROWS);
    for (long o = 0; o < outputs; o += TILE) {
        const int valid = outputs - o < TILE ? (int)(outputs - o) : TILE;
        for (int r = 0; r < n; r += group) {
            const int rows = n - r < group ? n - r : group;
            BY_ROWS(BF16_TILE, rows, w + o * ldw, ldw, valid, x + r * ldx, ldx, len, out + r * ldo + o, ldo)
        }
    }
}

/* Whether rows of this weight meet it by tiles. */
INLINE int is_tiled(const Product *p) {
    return may_use_tiles && p->kind == BFLOAT16 && p->inputs % 32 == 0 && p->outputs >= BLOCK;
}

/* Outputs of one block by tiles, `count` of them, of n rows. */
static void bf16_tiles(const Product *p, const Rows *rows, int n, long first, long count, float *out, long ldo) {
    const int group = group_of(n, 2 * TILE_ROWS);
    const long from = first + BLOCK <= p->outputs ? first : p->outputs - BLOCK; /* whole blocks: the last overlaps */
    for (int r = 0; r < n; r += group) {
        const int size = n - r < group ? n - r : group;
        float found[BLOCK][2 * TILE_ROWS];
        bf16_tile_dots((const uint16_t *)p->weight + from * p->inputs, (const uint32_t *)rows->data + r * p->inputs / 2, size,
                       p->inputs, found);
        for (long o = 0; o < count; o += LANES) {
            const any_word *line[LANES];
            for (long k = 0; k < LANES; k++) line[k] = (const any_word *)found[o + k < count ? first - from + o + k : 0];
            for (int row = 0; row < size; row += 4) {
                uvec turned[4];
                turn_words(line, row, turned);
                for (int k = 0; k < 4 && row + k < size; k++)
                    store_some(out + (r + row + k) * ldo + o, (vec)turned[k], count - o);
            }
        }
    }
}

/* -- 8 bits ------------------------------------------------------------------------------------------------------- */

INLINE void ask_for_line(const char *line, const int rows) {
    if (rows <= 2) __builtin_prefetch(line + INT8_AHEAD, 0, 3);
    else __builtin_prefetch(line + 3 * INT8_AHEAD, 0, 2);
}

/* Whole-number dots of one block of outputs with `rows` rows (a constant) of unsigned numbers, ZERO taken off. */
INLINE void int8_tile(const int8_t *w, const int32_t *offsets, const uint8_t *x, long ldx, const int rows, long steps,
                      int32_t (*out)[BLOCK]) {
#if LANES == 16 && defined(__AVX512VNNI__)
    __m512i total[INT8_ROWS][2];
    for (int r = 0; r < rows; r++)
        for (int half = 0; half < 2; half++) total[r][half] = _mm512_loadu_si512(offsets + 16 * half);
    for (long s = 0; s < steps; s++) {
        __m512i low = _mm512_loadu_si512(w + 128 * s), high = _mm512_loadu_si512(w + 128 * s + 64);
        for (int line = 0; line < 2; line++) ask_for_line((const char *)w + 128 * s + 64 * line, rows);
        for (int r = 0; r < rows; r++) {
            int32_t numbers;
            memcpy(&numbers, x + r * ldx + 4 * s, sizeof numbers);
            __m512i row = _mm512_set1_epi32(numbers);
            total[r][0] = _mm512_dpbusd_epi32(total[r][0], row, low);
            total[r][1] = _mm512_dpbusd_epi32(total[r][1], row, high);
        }
    }
    for (int r = 0; r < rows; r++)
        for (int half = 0; half < 2; half++) _mm512_storeu_si512(out[r] + 16 * half, total[r][half]);
#elif defined(__AVX2__)
    (void)offsets; /* |x| <= 127 times w with x's sign: pairs of products fit 16 bits, so nothing saturates */
    for (int part = 0; part < 4; part += 2) {
        __m256i total[INT8_ROWS][2];
        for (int r = 0; r < rows; r++) total[r][0] = total[r][1] = _mm256_setzero_si256();
        for (long s = 0; s < steps; s++) {
            __m256i weight[2];
            for (int line = 0; line < 2 && !part; line++) ask_for_line((const char *)w + 128 * s + 64 * line, rows);
            for (int k = 0; k < 2; k++) {
                weight[k] = _mm256_loadu_si256((const __m256i *)(w + 128 * s + 32 * (part + k)));
                HOLD(weight[k]);
            }
            for (int r = 0; r < rows; r++) {
                int32_t numbers;
                memcpy(&numbers, x + r * ldx + 4 * s, sizeof numbers);
                __m256i row = _mm256_xor_si256(_mm256_set1_epi32(numbers), _mm256_set1_epi8((char)ZERO));
                __m256i size = _mm256_abs_epi8(row);
                for (int k = 0; k < 2; k++) {
                    __m256i pairs = _mm256_maddubs_epi16(size, _mm256_sign_epi8(weight[k], row));
                    total[r][k] = _mm256_add_epi32(total[r][k], _mm256_madd_epi16(pairs, _mm256_set1_epi16(1)));
                }
            }
        }
        for (int r = 0; r < rows; r++)
            for (int k = 0; k < 2; k++) _mm256_storeu_si256((__m256i *)(out[r] + 8 * (part + k)), total[r][k]);
    }
#else
    (void)offsets;
    for (int r = 0; r < rows; r++) {
        memset(out[r], 0, sizeof out[r]);
        for (long s = 0; s < steps; s++)
            for (int o = 0; o < BLOCK; o++)
                for (int k = 0; k < 4; k++)
                    out[r][o] += w[128 * s + 4 * o + k] * (x[r * ldx + 4 * s + k] - ZERO);
    }
#endif
}

#define INT8_TILE(w, offsets, x, ldx, steps, out, rows)                                                                \
    int8_tile(w, offsets, x, ldx, (rows) < INT8_ROWS ? (rows) : INT8_ROWS, steps, out)

/* Outputs of one block, `count` of them, of n rows. */
static void int8_dots(const Product *p, const Rows *rows, int n, long first, long count, float *out, long ldo) {
    const long steps = (p->inputs + 3) / 4;
    const int8_t *w = (const int8_t *)p->weight + first * steps * 4;
    const int32_t *offsets = p->offsets + first;
    if (may_use_tiles && n >= LEAST_TILE_ROWS && p->inputs % 64 == 0) {
        const int group = group_of(n, 2 * TILE_ROWS);
        for (int r = 0; r < n; r += group) {
            const int at = r + group < n ? r : n - group; /* always so many: the last may be worked out twice */
            int32_t found[2 * TILE_ROWS][BLOCK];
            int8_tile_dots(w, (const uint8_t *)rows->data + at * rows->stride, rows->stride, group, p->inputs, found[0]);
            for (int k = 0; k < group; k++)
                for (long o = 0; o < count; o++)
                    out[(at + k) * ldo + o] = (float)(found[k][o] + offsets[o]) * p->scales[first + o] * rows->steps[at + k];
        }
        return;
    }
    const int group = group_of(n, INT8_ROWS);
    for (int r = 0; r < n; r += group) {
        const int size = n - r < group ? n - r : group;
        const uint8_t *x = (const uint8_t *)rows->data + r * rows->stride;
        int32_t found[INT8_ROWS][BLOCK];
        if (size == 8) INT8_TILE(w, offsets, x, rows->stride, steps, found, 8);
        else if (size == 7) INT8_TILE(w, offsets, x, rows->stride, steps, found, 7);
        else BY_ROWS(INT8_TILE, size, w, offsets, x, rows->stride, steps, found)
        for (int k = 0; k < size; k++)
            for (long o = 0; o < count; o++)
                out[(r + k) * ldo + o] = (float)found[k][o] * p->scales[first + o] * rows->steps[r + k];
    }
}

/* -- a GGUF file's blocks ------------------------------------------------------------------------------------------ */

/* Asks for as many bytes as a stretch of a tile takes, one tile ahead: few enough for the first cache. */
INLINE void ask_for_blocks(const int kind, const int tile, const uint8_t *place) {
    const long bytes = tile * block_bytes(kind) / (block_numbers(kind) / STRETCH);
    for (long at = 0; at < bytes; at += 64) __builtin_prefetch((const char *)place + at, 0, 3);
}

/* Dots of `tile` weight rows (TILE or 2, a constant) with `rows` rows, widened on the way; `kind` is a constant. */
INLINE void block_tile(const int kind, const uint8_t *w, long ldw, const int tile, int valid, const float *x, long ldx,
                       const int rows, long len, float *out, long ldo) {
    const int parts = (int)(block_numbers(kind) / STRETCH);
    const uint8_t *ahead = w + tile * ldw;
    vec total[TILE * TILE];
    for (int k = 0; k < tile * rows; k++) total[k] = (vec){0};
    for (long i = 0; i < len; w += block_bytes(kind))
        for (int part = 0; part < parts; part++, i += STRETCH, ahead += tile * block_bytes(kind) / parts) {
            vec numbers[TILE][VECTORS];
            for (int o = 0; o < tile; o++) {
                const uint8_t *block = w + (o < valid ? o : 0) * ldw;
                Terms terms[2];
                terms_of(kind, block, part, terms);
                if (kind == Q4_1 && tile * rows < 16) FROM_MEMORY(*terms);
                unpack(kind, block, part, terms, numbers[o]);
            }
            ask_for_blocks(kind, tile, ahead);
            for (int v = 0; v < VECTORS; v++)
                for (int r = 0; r < rows; r++) {
                    vec row = load(x + r * ldx + i + v * LANES);
                    HOLD(row);
                    for (int o = 0; o < tile; o++) total[r * tile + o] += numbers[o][v] * row;
                }
        }
    for (int k = 0; k < tile * rows; k += 4) {
        const int last = tile * rows - 1;
        const four found = sums(total[k], total[k + 1], total[k + 2 < last ? k + 2 : last], total[last < k + 3 ? last : k + 3]);
        for (int j = 0; j < 4 && k + j <= last; j++)
            if ((k + j) % tile < valid) out[(k + j) / tile * ldo + (k + j) % tile] = found[j];
    }
}

INLINE void unpack_row(const int kind, const uint8_t *from, long len, float *to) {
    for (long i = 0; i < len; from += block_bytes(kind))
        for (int part = 0; part < block_numbers(kind) / STRETCH; part++, i += STRETCH) {
            vec numbers[VECTORS];
            Terms terms[2];
            terms_of(kind, from, part, terms);
            unpack(kind, from, part, terms, numbers);
            for (int v = 0; v < VECTORS; v++) store(to + i + v * LANES, numbers[v]);
        }
}

#define BLOCK_TILE(tile, rows)                                                                                         \
    case rows:                                                                                                         \
        for (long o = 0; o < outputs; o += tile) {                                                                     \
            const int valid = outputs - o < tile ? (int)(outputs - o) : tile;                                          \
            block_tile(kind, w + o * ldw, ldw, tile, valid, at, ldx, rows, len, to + o, ldo);                          \
        }                                                                                                              \
        break

/* Rows read a tile as it is widened, `most` at a time; of kinds that are dear to widen, more share one in memory. */
INLINE void block_dots(const int kind, const uint8_t *w, long outputs, const float *x, long ldx, int n, long len,
                       float *out, long ldo) {
    const long ldw = len / block_numbers(kind) * block_bytes(kind);
    const int is_cheap = kind == Q4_0 || kind == Q4_1 || kind == Q8_0;
    const int most = is_cheap || kind == Q4_K || kind == Q6_K ? BLOCK_ROWS : 1;
    if (n > most && (most == 1 || !is_cheap) && len <= WIDE_INPUTS) {
        for (long o = 0; o < outputs; o += TILE) {
            const int valid = outputs - o < TILE ? (int)(outputs - o) : TILE;
            float wide[TILE * WIDE_INPUTS];
            for (int k = 0; k < valid; k++) unpack_row(kind, w + (o + k) * ldw, len, wide + k * len);
            float_dots(wide, len, valid, x, ldx, n, len, out + o, ldo);
        }
        return;
    }
    const int group = group_of(n, most);
    for (int r = 0; r < n; r += group) {
        const float *at = x + r * ldx;
        float *to = out + r * ldo;
        switch (n - r < group ? n - r : group) {
            BLOCK_TILE(TILE, 1);
#if LANES == 16 /* registers enough */
            BLOCK_TILE(TILE, 2);
            BLOCK_TILE(TILE, 3);
            BLOCK_TILE(TILE, 4);
            BLOCK_TILE(2, 5);
            BLOCK_TILE(2, 6);
            BLOCK_TILE(2, 7);
            BLOCK_TILE(2, 8);
#endif
        }
    }
}

#define OF_KIND(kind, call)                                                                                            \
    case kind: call(kind); break
#define ANY_BLOCKS(call)                                                                                               \
    OF_KIND(F16, call); OF_KIND(Q4_0, call); OF_KIND(Q4_1, call); OF_KIND(Q5_0, call); OF_KIND(Q5_1, call);            \
    OF_KIND(Q8_0, call); OF_KIND(Q4_K, call); OF_KIND(Q5_K, call); OF_KIND(Q6_K, call); OF_KIND(Q2_K, call);           \
    OF_KIND(Q3_K, call); OF_KIND(IQ4_NL, call); OF_KIND(IQ4_XS, call)

static void any_block_dots(const Product *p, const Rows *x, int n, long first, long count, float *out, long ldo) {
    const long inputs = p->inputs, bytes = inputs / block_numbers(p->kind) * block_bytes(p->kind);
    const uint8_t *w = (const uint8_t *)p->weight + first * bytes;
#define DOTS(kind) block_dots(kind, w, count, x->data, x->stride, n, inputs, out, ldo)
    switch (p->kind) { ANY_BLOCKS(DOTS); }
}

static void any_row(const Product *p, long row, float *out) {
    const long inputs = p->inputs, bytes = inputs / block_numbers(p->kind) * block_bytes(p->kind);
    const uint8_t *w = (const uint8_t *)p->weight + row * bytes;
#define ROW(kind) unpack_row(kind, w, inputs, out)
    switch (p->kind) { ANY_BLOCKS(ROW); }
}

/* -- all kinds ---------------------------------------------------------------------------------------------------- */

/* Outputs first .. first + count - 1 of n rows, out[n][ldo]; first is a multiple of BLOCK, count at most BLOCK. */
static void multiply(const Product *p, const Rows *x, int n, long first, long count, float *out, long ldo) {
    if (MUTANT(DROP_TAIL) && count % TILE) count -= count % TILE;
    const long inputs = p->inputs;
    if (p->kind == FLOAT32) {
        float_dots((const float *)p->weight + first * inputs, inputs, count, x->data, x->stride, n, inputs, out, ldo);
    } else if (x->are_pairs) {
        bf16_tiles(p, x, n, first, count, out, ldo);
    } else if (p->kind == BFLOAT16) {
        bf16_dots((const uint16_t *)p->weight + first * inputs, inputs, count, x->data, x->stride, n, inputs, out, ldo);
    } else if (p->kind == INT8) {
        int8_dots(p, x, n, first, count, out, ldo);
    } else if (p->kind == SIDE_BY_SIDE) {
        for (const Product *part = p->weight; count > 0; first -= (part++)->outputs) {
            if (first >= part->outputs) continue;
            const long own = part->outputs - first < count ? part->outputs - first : count;
            multiply(part, x, n, first, own, out, ldo);
            first += own, count -= own, out += own;
        }
        return;
    } else if (is_packed(p->kind)) {
        any_packed_dots(p->kind, p->weight, x->digits, n, group_of(n, TILE_ROWS), inputs, first, count, out, ldo);
    } else {
        any_block_dots(p, x, n, first, count, out, ldo);
    }
    if (p->bias)
        for (int r = 0; r < n; r++)
            for (long o = 0; o < count; o++) out[r * ldo + o] += p->bias[first + o];
}

/* One row of a weight as float32: an embedding. */
static void weight_row(const Product *p, long row, float *out) {
    const long inputs = p->inputs;
    if (p->kind == FLOAT32) memcpy(out, (const float *)p->weight + row * inputs, (size_t)inputs * sizeof *out);
    else if (is_blocks(p->kind)) any_row(p, row, out);
    else for (long i = 0; i < inputs; i++) out[i] = from_bf16(((const uint16_t *)p->weight)[row * inputs + i]);
}

/* n rows [n][stride], zeros behind their `len` numbers, rounded to bfloat16. */
static void round_rows(const float *from, long stride, int n, long len, uint16_t *room) {
    const long size = padded(len);
    for (int r = 0; r < n; r++)
        for (long i = 0; i < size; i += LANES) store_bf16(room + r * size + i, load(from + r * stride + i));
}

/* The same in pairs, as rows `first` and so on of `rows`, side by side in groups. */
static void pair_rows(const float *from, long stride, int n, long len, int first, int rows, uint32_t *room) {
    const int group = group_of(rows, 2 * TILE_ROWS);
    for (int r = first, count; r < first + n; r += count, from += count * stride) {
        const int begin = r / group * group, end = rows < begin + group ? rows : begin + group;
        uint32_t pairs[LANES][PAD / 2];
        const any_word *line[LANES];
        count = r + LANES < end ? LANES : end - r;
        if (first + n - r < count) count = first + n - r;
        for (int k = 0; k < LANES; k++) line[k] = pairs[k < count ? k : 0];
        for (long i = 0; i < len; i += PAD) {
            for (int k = 0; k < count; k++) round_rows(from + k * stride + i, stride, 1, PAD, (uint16_t *)pairs[k]);
            for (long w = 0; w < PAD / 2 && i + 2 * w < len; w += 4) {
                uvec turned[4];
                turn_words(line, w, turned);
                for (int k = 0; k < 4; k++)
                    store_some((float *)room + begin * len / 2 + (i / 2 + w + k) * (end - begin) + r - begin, (vec)turned[k], count);
            }
        }
    }
}

/* The same as digits, in groups of up to TILE_ROWS of `rows`. */
static void digit_rows(const float *from, long stride, int n, long len, int digits, int first, int rows, uint8_t *room) {
    const int group = group_of(rows, TILE_ROWS);
    for (int r = first; r < first + n; r++, from += stride) {
        const int begin = r / group * group, size = rows - begin < group ? rows - begin : group;
        digits_of(from, len, digits, r - begin, size, room + begin * row_bytes(len, digits));
    }
}

/* Digits a number of its rows, the same for all parts of weights side by side that read any; 0: none do. */
INLINE int digits_of_rows(const Product *p) {
    if (p->kind != SIDE_BY_SIDE) return digits_read(p->kind);
    int outputs = 0, digits = 0;
    for (const Product *part = p->weight; outputs < p->outputs; outputs += (part++)->outputs) digits |= digits_read(part->kind);
    return digits;
}

/* n rows [n][stride], zeros behind their numbers, rounded to 8 bits; what is not finite makes all products NaN. */
static void level_rows(const float *from, long stride, int n, long size, uint8_t *numbers, float *steps) {
    typedef uint8_t bytes __attribute__((vector_size(LANES)));
    for (int r = 0; r < n; r++) {
        vec most = {0}, zeros = {0};
        for (long i = 0; i < size; i += LANES) {
            const vec part = load(from + r * stride + i);
            most = larger(magnitude(part), most);
            zeros += part * 0.0f; /* NaN of what is not finite, where `most` leaves NaN out */
        }
        const float reach = largest(most), least = 1.17549435e-38f * LEVELS;
        const float step = (reach < least ? least : reach) * (1.0f / LEVELS), inverse = 1.0f / step;
        steps[r] = step + sum(zeros);
        for (long i = 0; i < size; i += LANES) {
            vec scaled = load(from + r * stride + i) * inverse + (ZERO + 0.5f);
            bytes rounded = __builtin_convertvector(__builtin_convertvector(scaled, ivec), bytes);
            memcpy(numbers + r * size + i, &rounded, sizeof rounded);
        }
    }
}

/* How rows [..][stride] lie once they are as the weight wants them; `room` is for a copy. */
INLINE Rows form_of(const Product *p, const float *from, long stride, const float *room, const float *steps) {
    const long size = padded(p->inputs);
    if (is_tiled(p)) return (Rows){room, NULL, 0, 1, NULL};
    if (p->kind == BFLOAT16) return (Rows){room, NULL, size, 0, NULL};
    if (digits_of_rows(p)) return (Rows){from, NULL, stride, 0, (const uint8_t *)room};
    return p->kind == INT8 ? (Rows){room, steps, size, 0, NULL} : (Rows){from, NULL, stride, 0, NULL};
}

/* Rows `first` to first + count - 1 of n [n][stride], zeros behind their numbers, in that form. */
static void prepare_some(const Product *p, const float *from, long stride, int n, int first, int count, float *room,
                         float *steps) {
    const long size = padded(p->inputs);
    const int digits = digits_of_rows(p);
    from += first * stride;
    if (is_tiled(p)) pair_rows(from, stride, count, p->inputs, first, n, (uint32_t *)room);
    else if (p->kind == BFLOAT16) round_rows(from, stride, count, p->inputs, (uint16_t *)room + first * size);
    else if (digits) digit_rows(from, stride, count, p->inputs, digits, first, n, (uint8_t *)room);
    else if (p->kind == INT8) level_rows(from, stride, count, size, (uint8_t *)room + first * size, steps + first);
}

static Rows prepare(const Product *p, const float *from, long stride, int n, float *room, float *steps) {
    prepare_some(p, from, stride, n, 0, n, room, steps);
    return form_of(p, from, stride, room, steps);
}

#endif
