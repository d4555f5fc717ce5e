/* Layers of which each row takes a few experts of many (arXiv 1701.06538), part of layer.h.
 *
 *     s  = softmax(W_router x), or sigmoid(..)
 *     T  = the top_k experts of the largest s + correction
 *     x += sum over T, by number, of s_t [/ (sum of s over T, at least `least`, + more)] scale W_down,t (silu(W_gate,t x) W_up,t x)
 *
 * and, behind them, of a shared one that every row takes, all of it or as much as a last output of the router says.
 *
 * Rows of one expert are read together: its weights come from memory once for all of them. Lossless as all layers are:
 * what a row takes is told by that row alone, and added in the order of experts' numbers, whoever takes them beside it.
 */
#ifndef AMPHISTA_EXPERTS_H
#define AMPHISTA_EXPERTS_H

/* Which rows take which expert: the g-th of those that any row takes is `which[g]`, its lines are first[g] to
 * first[g + 1] - 1, and line i is that of row row[i], which takes portion[i] of it. The shared one is the last. */
typedef struct {
    int32_t *which, *first, *row;
    float *portion;
    int number;
} Groups;

/* What a row takes, by number, of its scores, which are changed. */
static void choose_experts(const Experts *e, float *scores, int32_t *taken, float *portions) {
    const int count = e->num_experts;
    float most = -INFINITY, total = 0.0f;
    for (int i = 0; i < count; i++) most = scores[i] > most ? scores[i] : most;
    if (e->router.outputs > count) portions[e->top_k] = 1.0f / (1.0f + expf(-scores[count]));
    else portions[e->top_k * e->has_shared] = 1.0f; /* without a shared one it is written anew */
    for (int i = 0; i < count; i++) {
        scores[i] = e->by_sigmoid ? 1.0f / (1.0f + expf(-scores[i])) : expf(scores[i] - most);
        total += scores[i];
    }
    for (int i = 0; i < count && !e->by_sigmoid; i++) scores[i] /= total;
    float of_taken = 0.0f;
    for (int c = 0; c < e->top_k; c++) {
        int best = -1;
        float highest = -INFINITY;
        for (int i = 0, next = 0; i < count; i++) {
            if (next < c && taken[next] == i) { next++; continue; }
            const float score = e->correction ? scores[i] + e->correction[i] : scores[i];
            if (best < 0 || score > highest) best = i, highest = score;
        }
        int at = c;
        for (; at && taken[at - 1] > best; at--) taken[at] = taken[at - 1];
        taken[at] = best;
        of_taken += scores[best];
    }
    const float divisor = e->is_normed ? (of_taken < e->least ? e->least : of_taken) + e->more : 1.0f;
    for (int c = 0; c < e->top_k; c++) portions[c] = scores[taken[c]] / divisor * e->scale;
    if (e->has_shared) taken[e->top_k] = count;
}

/* Rows by expert, in their order; every thread works it out for itself. */
static Groups group_rows(const Experts *e, const Work *w, int n, int thread) {
    const int all = e->num_experts + 1, each = e->top_k + e->has_shared;
    int32_t *next = w->own_groups[thread];
    Groups g = {next + all, next + 2 * all, next + 3 * all + 1, NULL, 0};
    g.portion = (float *)(g.row + (long)n * each);
    memset(next, 0, (size_t)all * sizeof *next);
    for (int i = 0; i < n * each; i++) next[w->taken[i]]++;
    int line = 0;
    for (int i = 0; i < all; i++) {
        if (!next[i]) continue;
        g.which[g.number] = i, g.first[g.number++] = line;
        line += next[i], next[i] = line - next[i];
    }
    g.first[g.number] = line;
    for (int i = 0; i < n * each; i++) {
        const int at = next[w->taken[i]]++;
        g.row[at] = i / each, g.portion[at] = w->portions[i];
    }
    return g;
}

/* Rows of one expert, ready for its first products. rows: of all [n][hidden]. */
static Rows rows_of_expert(const Stack *m, const Work *w, const Groups *g, int at, const Mlp *mlp, const float *rows, int n,
                   int thread) {
    const long hidden = padded(m->hidden);
    const int count = g->first[at + 1] - g->first[at];
    float *gathered = w->own_gathered[thread];
    for (int r = 0; r < count && count < n; r++)
        memcpy(gathered + r * hidden, rows + g->row[g->first[at] + r] * hidden, (size_t)hidden * 4);
    return prepare(reads_rows(mlp), count < n ? gathered : rows, hidden, count, w->own_prepared[thread], w->own_steps[thread]);
}

/* (5) and (6) of n rows. */
static void experts_stage(const Stack *m, const Layer *layer, const Work *w, int n, Worker *worker) {
    const Experts *e = layer->experts;
    const long hidden = padded(m->hidden), inner = w->line, line = w->most_scores;
    const int each = e->top_k + e->has_shared, thread = worker->thread;
    Rows x = ready(m, w, n, w->states, hidden, layer->mlp_norm, &e->router, worker, blocks_of(e->router.outputs));
    const float *rows = w->own_rows[owner_of(n, worker)];
    product_stage(&e->router, &x, n, worker, w->scores, line, NULL, 0.0f);
    meet(worker, n);
    for (int r = take(worker); r >= 0; r = take(worker)) {
        const long read = MUTANT(FIRST_ROWS_EXPERTS) ? 0 : r, at = (long)r * each;
        choose_experts(e, w->scores + read * line, w->taken + at, w->portions + at);
    }
    meet(worker, 0);
    const Groups g = group_rows(e, w, n, thread);
    const int routed = g.number - e->has_shared, blocks = blocks_of(e->each[0].gate.outputs);
    const int shared = e->has_shared ? blocks_of(e->each[e->num_experts].gate.outputs) : 0;
    float *block = w->own_block[thread], *sums = block + (long)n * BLOCK;
    meet(worker, routed * blocks + shared);
    for (int i = take(worker), last = -1; i >= 0; i = take(worker)) {
        const int at = i < routed * blocks ? i / blocks : routed;
        const Mlp *mlp = e->each + g.which[at];
        if (at != last) x = rows_of_expert(m, w, &g, at, mlp, rows, n, thread);
        gated_block(m, mlp, &x, g.first[at + 1] - g.first[at], i - at * blocks, w->inner + g.first[at] * inner, inner, block);
        last = at;
    }
    meet(worker, g.number);
    for (int at = take(worker); at >= 0; at = take(worker)) {
        const int first = g.first[at], count = g.first[at + 1] - first;
        prepare(&e->each[g.which[at]].down, w->inner + first * inner, inner, count, w->prepared + first * inner, w->steps + first);
    }
    meet(worker, blocks_of(m->hidden));
    for (int b = take(worker); b >= 0; b = take(worker)) {
        const long from = (long)b * BLOCK, size = block_size(m->hidden, from);
        memset(sums, 0, 4 * (size_t)n * BLOCK);
        for (int at = 0; at < g.number; at++) {
            const Product *down = &e->each[g.which[at]].down;
            const int first = g.first[at], count = g.first[at + 1] - first;
            x = form_of(down, w->inner + first * inner, inner, w->prepared + first * inner, w->steps + first);
            multiply(down, &x, count, from, size, block, BLOCK);
            for (int r = 0; r < count; r++)
                for (long o = 0; o < size; o++) sums[g.row[first + r] * BLOCK + o] += g.portion[first + r] * block[r * BLOCK + o];
        }
        for (int r = 0; r < n; r++)
            for (long o = 0; o < size; o++) w->states[r * hidden + from + o] += m->residual * sums[r * BLOCK + o];
    }
}

#endif
