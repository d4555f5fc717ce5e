/* A weight alone: its rows, and its product, outside a forward. */
#include "products.h"

/* Rows of a weight of FLOAT32, BFLOAT16 or blocks as float32: out[n][inputs]. */
void amphista_rows(const Product *p, const int64_t *rows, int64_t n, float *out, int threads) {
    (void)threads;
#pragma omp parallel for num_threads(threads)
    for (int64_t r = 0; r < n; r++) weight_row(p, rows[r], out + r * p->inputs);
}

/* The product of n rows [n][padded(inputs)], zeros at their ends, and a weight, as in a forward: out[n][outputs].
 * room: [n][padded(inputs) + 1]. */
void amphista_product(const Product *p, const float *rows, int64_t n, float *out, int threads, float *room) {
    const long size = padded(p->inputs);
    const Rows x = prepare(p, rows, size, (int)n, room, room + n * size);
    (void)threads;
#pragma omp parallel num_threads(threads)
    {
        const TileSetting before = begin_tiles();
#pragma omp for schedule(dynamic, 4)
        for (int32_t first = 0; first < p->outputs; first += BLOCK)
            multiply(p, &x, (int)n, first, p->outputs - first < BLOCK ? p->outputs - first : BLOCK, out + first, p->outputs);
        end_tiles(&before);
    }
}

/* Bytes of blocks of a kind as packed.h has them; 0 where that is not quicker, or not for this kind. */
int64_t amphista_packed_size(int kind, int64_t outputs, int64_t inputs) {
    if (is_packed(kind) || !can_pack(kind)) return 0;
    return (outputs + ABREAST - 1) / ABREAST * packed_bytes(kind, inputs / STRETCH);
}

void amphista_pack(const Product *p, uint8_t *to, int threads) {
    const long inputs = p->inputs, bytes = inputs / block_numbers(p->kind) * block_bytes(p->kind);
    (void)threads;
#pragma omp parallel for num_threads(threads)
    for (int32_t o = 0; o < p->outputs; o += ABREAST)
        pack_any(p->kind, (const uint8_t *)p->weight + o * bytes, inputs, p->outputs - o < ABREAST ? p->outputs - o : ABREAST,
                     to + o / ABREAST * packed_bytes(p->kind, inputs / STRETCH));
}
