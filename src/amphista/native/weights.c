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
