/* Passes of bfloat16 over many rows, in one way through memory: norms, gated activations, softmax and cross-entropies,
 * with the gradients that training takes.
 *
 * Products are torch's; a row between two of them stays in the first or second cache from its first number to its last.
 */
#include <math.h>

#ifdef _OPENMP
#include <omp.h>
#define OWN_THREAD omp_get_thread_num()
#else
#define OWN_THREAD 0
#endif

#include "lanes.h"

/* One row as float32, less its largest number; room[padded(len)], far below zero behind `len`. */
static float widen_row(const uint16_t *logits, long len, float *room) {
    vec most = all(-INFINITY);
    long i = 0;
    for (; i + LANES <= len; i += LANES) {
        const vec value = load_bf16(logits + i);
        store(room + i, value);
        most = larger(value, most);
    }
    float top = largest(most);
    for (; i < len; i++) {
        room[i] = from_bf16(logits[i]);
        top = room[i] > top ? room[i] : top;
    }
    for (i = 0; i < len; i++) room[i] -= top;
    for (; i < padded(len); i++) room[i] = -1e30f;
    return top;
}

/* softmax of rows of logits [M][N] -> out [M][N]. room: [threads][padded(N)]. */
void amphista_softmax(const uint16_t *logits, int64_t rows, int64_t len, float *out, float *room, int threads) {
    (void)threads;
#pragma omp parallel for num_threads(threads)
    for (int64_t r = 0; r < rows; r++) {
        float *own = room + OWN_THREAD * padded(len), *to = out + r * len;
        widen_row(logits + r * len, len, own);
        vec total = {0};
        for (long i = 0; i < padded(len); i += LANES) {
            const vec value = exponential(load(own + i));
            total += value;
            store(own + i, value);
        }
        const float factor = 1.0f / sum(total);
        for (long i = 0; i < len; i++) to[i] = own[i] * factor;
    }
}

typedef struct {
    const float *probs;    /* [P][N], of the target */
    const int64_t *aims;   /* which of them is each row's [M] */
    const int64_t *labels; /* the text's token of each row, -1 if the vocabulary has none [M] */
    uint16_t *logits;      /* [M][N]; the gradient takes their place */
    float *losses;         /* [M] */
    uint8_t *right;        /* whether the label is the first of the largest logits [M] */
    float *room;           /* [threads][padded(N)] */
    int64_t rows, len;
    float soft, text;
    int32_t threads, wants_gradient;
} CrossEntropies;

static void one_row(const CrossEntropies *c, int64_t r, float *room) {
    const long len = c->len, label = c->labels[r];
    const float *probs = c->probs + c->aims[r] * len;
    uint16_t *logits = c->logits + r * len;
    widen_row(logits, len, room);
    const float of_label = label < 0 ? 0 : room[label];
    long first = 0;
    if (label >= 0 && of_label == 0) while (room[first] != 0) first++;
    c->right[r] = label >= 0 && of_label == 0 && first == label;
    vec aligned = {0}, total = {0};
    for (long i = 0; i < padded(len); i += LANES) {
        const vec given = i + LANES <= len ? load(probs + i) : i < len ? load_part(probs + i, len - i) : (vec){0};
        const vec value = load(room + i), power = exponential(value);
        aligned += given * value;
        total += power;
        store(room + i, power);
    }
    const float of_text = label < 0 ? 0 : c->text, weight = c->soft + of_text, all_of = sum(total);
    c->losses[r] = weight * logf(all_of) - c->soft * sum(aligned) - of_text * of_label;
    if (!c->wants_gradient) return;
    const float factor = weight / all_of;
    if (label >= 0) room[label] -= of_text / factor;
    long i = 0;
    for (; i + LANES <= len; i += LANES) store_bf16(logits + i, load(room + i) * factor - load(probs + i) * c->soft);
    for (; i < len; i++) logits[i] = to_bf16(room[i] * factor - probs[i] * c->soft);
}

/* A row's loss is |r| log sum_v e^z_v - sum_v r_v z_v with r = soft p + text onehot(label); its gradient |r| q - r. */
void amphista_cross_entropies(const CrossEntropies *c) {
#pragma omp parallel for num_threads(c->threads)
    for (int64_t r = 0; r < c->rows; r++) one_row(c, r, c->room + OWN_THREAD * padded(c->len));
}

/* -- root-mean-square norms (arXiv 1910.07467) -------------------------------------------------------------------- */

INLINE vec load_either(const int is_bf16, const void *rows, long at) {
    return is_bf16 ? load_bf16((const uint16_t *)rows + at) : load((const float *)rows + at);
}

INLINE void norm_forward(const int is_bf16, const void *x, const float *weight, int64_t r, long size, float eps,
                         uint16_t *out, float *scales) {
    vec squares = {0};
    for (long i = 0; i < size; i += LANES) {
        const vec value = load_either(is_bf16, x, r * size + i);
        squares += value * value;
    }
    scales[r] = 1.0f / sqrtf(sum(squares) / (float)size + eps);
    for (long i = 0; i < size; i += LANES)
        store_bf16(out + r * size + i, load_either(is_bf16, x, r * size + i) * scales[r] * load(weight + i));
}

/* y = r x w with r = scales[row] = 1 / rms(x): x [M][D] of float32 or bfloat16, y in bfloat16; D of whole vectors. */
void amphista_norm(int is_bf16, const void *x, const float *weight, int64_t rows, int64_t size, float eps, uint16_t *out,
                   float *scales, int threads) {
    (void)threads;
#pragma omp parallel for num_threads(threads)
    for (int64_t r = 0; r < rows; r++)
        if (is_bf16) norm_forward(1, x, weight, r, size, eps, out, scales);
        else norm_forward(0, x, weight, r, size, eps, out, scales);
}

/* silu(gate) up of rows [gate ; up], [M][2 I] -> [M][I], I of whole vectors. */
void amphista_gated(const uint16_t *x, int64_t rows, int64_t size, uint16_t *out, int threads) {
    (void)threads;
#pragma omp parallel for num_threads(threads)
    for (int64_t r = 0; r < rows; r++)
        for (long i = 0; i < size; i += LANES) {
            const vec gate = load_bf16(x + r * 2 * size + i), up = load_bf16(x + (2 * r + 1) * size + i);
            store_bf16(out + r * size + i, gate / (1.0f + exponential(-gate)) * up);
        }
}

INLINE void norm_backward(const int is_bf16, const void *x, const uint16_t *upstream, const float *weight, float scale,
                          int64_t r, long size, void *of_x, float *of_weight) {
    vec total = {0};
    for (long i = 0; i < size; i += LANES) {
        const vec product = load_bf16(upstream + r * size + i) * load_either(is_bf16, x, r * size + i);
        total += product * load(weight + i);
        store(of_weight + i, load(of_weight + i) + product * scale);
    }
    const float factor = sum(total) / (float)size * scale * scale * scale;
    for (long i = 0; i < size; i += LANES) {
        const long at = r * size + i;
        const vec value = load_bf16(upstream + at) * load(weight + i) * scale - load_either(is_bf16, x, at) * factor;
        if (is_bf16) store_bf16((uint16_t *)of_x + at, value);
        else store((float *)of_x + at, value);
    }
}

/* dx = r (g w) - x r^3 mean(g w x), as x is; the sums of g x r over each thread's rows: of_weights [threads][D], zeros. */
void amphista_norm_gradient(int is_bf16, const void *x, const uint16_t *upstream, const float *weight, const float *scales,
                            int64_t rows, int64_t size, void *of_x, float *of_weights, int threads) {
    (void)threads;
#pragma omp parallel for num_threads(threads) schedule(static)
    for (int64_t r = 0; r < rows; r++) {
        float *own = of_weights + OWN_THREAD * size;
        if (is_bf16) norm_backward(1, x, upstream, weight, scales[r], r, size, of_x, own);
        else norm_backward(0, x, upstream, weight, scales[r], r, size, of_x, own);
    }
}
