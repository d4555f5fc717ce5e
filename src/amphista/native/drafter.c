/* Parallel heads drafting for any number of sequences in one call: what they have not read of a sequence is fed to
 * their staged layers, then all heads of all sequences are asked (ALGORITHM of drafter/amphista.py and path.py).
 *
 *     for each staged layer, all rows: x = layer(W_fuse [norm(x) ; norm(embedding[id])]), causal, its own cache;
 *         for the first one the taps follow behind, each with its norm;
 *         of the last one only the last row of each sequence goes on behind keys and values
 *     slots[k] = z + silu(W_k z + b_k), once or several times; z: what the last row is behind the first stage, or all
 *     slots    = layer(slots + positions) for each layer of the encoder: the K slots of a sequence see each other
 *     o_k      = norm(slots[k]);  logits_k = W o_k over the draft vocabulary;  the best of each, with log-probabilities
 *     below    : the best of head k, again, for each of the best tokens of head k - 1 above them: scores moved by
 *                W U (a silu(b)), [a ; b] = G norm(o_k) + g + what is read of the token; W U is made once
 *
 * Logits may be capped, as the target's are. Rows of slots lie head by head, [heads][sequences]. What is found for a
 * sequence is the same, to the bit, whatever others are asked with it, and however its rows were cut into calls:
 * layer.h says why.
 */
#include "layer.h"

enum { ALL_SLOTS, EARLIER_SLOTS, OWN_SLOT }; /* slot_mask */

typedef struct {
    const float *state_norm;
    Product fuse;
} Stage;

/* rank 0: heads know no paths; a multiple of PAD. */
typedef struct {
    const float *norm, *reads;  /* of head states; what is read of each token [draft vocabulary][2 rank] */
    const float *const *scores; /* by how much each token's score moves [draft vocabulary][rank]: of all heads, or of each */
    Product state, output;      /* float32 */
    int32_t rank, unused;
} Path;

typedef struct {
    Stack stages, encoder; /* either may have no layers */
    const Stage *fusing;
    const float *const *tap_norms; /* of the first stage, [num_taps] */
    const float *embedding_norm, *hidden_norm, *slot_positions, *output_norm; /* NULL: none; positions [heads][hidden] */
    const Product *blocks; /* [num_blocks][num_heads], of size hidden x hidden */
    const Product *scores; /* over the draft vocabulary: one for all heads, or one each */
    const int32_t *draft_ids; /* ascending; NULL: all tokens */
    Product embedding;
    Path path;
    int32_t num_heads, num_blocks, split, has_own_scores, slot_mask, num_taps; /* heads up to the split read stage 1 */
    float embedding_scale, logit_cap; /* what logits stay below in size; 0: they are not capped */
} Heads;

typedef struct {
    Batch batch;            /* rows to be fed, chains; a span for each sequence, also where it has none */
    const float *hidden;    /* [num_rows][1 + num_taps][hidden], the target's */
    float *const *features; /* of each sequence [2][hidden, padded]: what heads up to the split read, and the others */
    const float *divisors;  /* of logits [num_spans][depth] */
    const float *pending;   /* what is read of the tokens already chosen [num_spans][2 rank], or NULL */
    int32_t *tokens, *below;           /* [num_spans][depth][ranks], [num_spans][depth - 1][parents][children] */
    float *log_probs, *log_probs_below; /* the same */
    void *workspace;
    int64_t workspace_bytes;
    int32_t depth, ranks, parents, children; /* depth 0: they are only fed */
    float log_coverage;
    int32_t unused;
} Draft;

typedef struct {
    float value;
    int32_t place;
} Rank;

/* One call under way. */
typedef struct {
    const Heads *h;
    const Draft *d;
    Batch batch;
    Work work;
    float *states[2], *slots[2], *beside, *outputs, *logits;
    float *normed, *inner; /* of paths: [heads][sequences], of [hidden] and [2 rank] */
    Rank *ranks;  /* [depth][sequences][ranks] */
    Part *last;   /* the last row of each sequence that is fed */
    float **own_paths;
    int num_fed;
    long most_logits;
} Drafting;

/* -- feeding ------------------------------------------------------------------------------------------------------ */

/* What stands beside a state in the first stage: an embedding and taps. */
static long size_beside(const Heads *h) { return h->embedding.inputs + (long)h->num_taps * h->stages.hidden; }

static void begin_rows(const Drafting *g, const Worker *worker) {
    const Heads *h = g->h;
    const Stack *m = &h->stages;
    const long size = m->hidden, hidden = padded(size), inputs = h->embedding.inputs;
    float *row = g->work.own_rows[worker->thread];
    clear_rows(m, &g->work, g->batch.num_rows, worker);
    for (int r = worker->thread; r < g->batch.num_rows; r += worker->team) {
        const float *from = g->d->hidden + r * (1 + h->num_taps) * size;
        float *beside = g->beside + r * size_beside(h);
        for (int which = 0; which < 2; which++) memset(g->states[which] + r * hidden, 0, 4 * (size_t)hidden);
        memcpy(g->states[1] + r * hidden, from, 4 * (size_t)size);
        if (!h->embedding_norm) continue;
        memset(row, 0, 4 * (size_t)padded(inputs));
        weight_row(&h->embedding, g->batch.ids[r], row);
        scale_row(row, inputs, h->embedding_scale);
        norm_row(row, h->embedding_norm, inputs, m->eps, row);
        memcpy(beside, row, 4 * (size_t)inputs);
        for (int t = 0; t < h->num_taps; t++) {
            memset(row, 0, 4 * (size_t)hidden);
            memcpy(row, from + (t + 1) * size, 4 * (size_t)size);
            norm_row(row, h->tap_norms[t], size, m->eps, row);
            memcpy(beside + inputs + t * size, row, 4 * (size_t)size);
        }
    }
}

/* [norm(state) ; what is beside it] of all rows, times W_fuse. */
static void fuse_stage(const Drafting *g, const Stage *stage, const float *from, float *to, Worker *worker) {
    const Stack *m = &g->h->stages;
    const Product *fuse = &stage->fuse;
    const int n = g->batch.num_rows, owner = owner_of(n, worker);
    const long size = fuse->inputs - m->hidden, wide = padded(m->hidden + size), hidden = padded(m->hidden);
    float *rows = g->work.own_rows[owner], *prepared = g->work.own_prepared[owner], *steps = g->work.own_steps[owner];
    for (int first = -1, count; (count = take_rows(worker, n, &first));) {
        for (int r = first; r < first + count; r++) {
            float *row = rows + r * wide;
            norm_row(from + r * hidden, stage->state_norm, m->hidden, m->eps, row);
            memcpy(row + m->hidden, g->beside + r * size_beside(g->h), 4 * (size_t)size);
            memset(row + m->hidden + size, 0, 4 * (size_t)(wide - m->hidden - size));
        }
        prepare_some(fuse, rows, wide, n, first, count, prepared, steps);
    }
    meet_behind_rows(worker, n, blocks_of(m->hidden));
    const Rows x = form_of(fuse, rows, wide, prepared, steps);
    product_stage(fuse, &x, n, worker, to, hidden, NULL, 0.0f);
}

/* Keeps what a stage gives of the last rows, `from` [..][hidden], as what heads read. */
static void keep_features(const Drafting *g, int which, const float *from, int is_compact, const Worker *worker) {
    const long hidden = padded(g->h->stages.hidden);
    for (int i = worker->thread; i < g->num_fed; i += worker->team)
        memcpy(g->d->features[g->last[i].span] + which * hidden, from + (is_compact ? i : g->last[i].row) * hidden,
               4 * (size_t)hidden);
}

static void feed(const Drafting *g, Worker *worker) {
    const Stack *m = &g->h->stages;
    const Batch *f = &g->batch;
    const int n = f->num_rows, num_layers = m->num_layers;
    const long hidden = padded(m->hidden);
    Work w = g->work;
    begin_rows(g, worker);
    for (int l = 0; l < num_layers; l++) {
        const float *from = g->states[(l + 1) % 2];
        w.states = g->states[l % 2];
        meet_for_rows(worker, n, blocks_of(m->hidden));
        if (l) keep_features(g, 0, from, 0, worker);
        fuse_stage(g, g->h->fusing + l, from, w.states, worker);
        project(m, m->layers + l, &w, n, worker);
        place_stage(m, m->layers + l, l, f, &w, n, worker);
        const int is_last = l + 1 == num_layers;
        if (is_last) { /* nobody reads the other rows' states any more */
            w.parts = g->last, w.num_parts = g->num_fed;
            for (int i = 0; i < g->num_fed && worker->thread == 0; i++)
                memmove(w.states + i * hidden, w.states + g->last[i].row * hidden, 4 * (size_t)hidden);
        }
        attention_stage(m, m->layers + l, l, f, &w, worker);
        widen(m, m->layers + l, &w, is_last ? g->num_fed : n, worker);
    }
    meet(worker, 0);
    if (num_layers) keep_features(g, 1, w.states, 1, worker);
    else if (!g->h->hidden_norm) keep_features(g, 1, g->states[1], 0, worker);
    else
        for (int i = worker->thread; i < g->num_fed; i += worker->team)
            norm_row(g->states[1] + g->last[i].row * hidden, g->h->hidden_norm, m->hidden, m->eps,
                     g->d->features[g->last[i].span] + hidden);
}

/* -- asking ------------------------------------------------------------------------------------------------------- */

/* One residual block of all heads, from features (NULL) or slots to slots. */
static void block_stage(const Drafting *g, int number, const float *from, float *to, Worker *worker) {
    const Heads *h = g->h;
    const int num = g->batch.num_spans, n = h->num_heads * num, thread = worker->thread;
    const long size = h->stages.hidden, hidden = padded(size);
    const Product *products = h->blocks + (long)number * h->num_heads;
    float *rows = g->work.own_rows[thread], *block = g->work.own_block[thread];
    meet(worker, h->num_heads * blocks_of(size));
    for (int i = 0; i < n; i++) {
        const float *feature = g->d->features[i % num] + (i / num >= h->split) * hidden;
        memcpy(rows + i * hidden, from ? from + i * hidden : feature, 4 * (size_t)hidden);
    }
    const float *positions = number + 1 == h->num_blocks ? h->slot_positions : NULL;
    float *prepared = g->work.own_prepared[thread], *steps = g->work.own_steps[thread];
    for (int k = 0; k < n; k += num) prepare(products, rows + k * hidden, hidden, num, prepared + k * hidden, steps + k);
    for (int piece = take(worker); piece >= 0; piece = take(worker)) {
        const int k = piece / blocks_of(size), row = k * num;
        const long first = (long)(piece % blocks_of(size)) * BLOCK, count = block_size(size, first);
        const Rows own = form_of(products, rows + row * hidden, hidden, prepared + row * hidden, steps + row);
        multiply(products + k, &own, num, first, count, block, BLOCK);
        for (int b = 0; b < num; b++) {
            const long at = (k * num + b) * hidden + first;
            for (long o = 0; o < BLOCK; o += LANES) { /* beyond `count` is padding, or nobody's */
                const vec inner = load(block + b * BLOCK + o);
                store(block + b * BLOCK + o, load(rows + at + o) + inner / (1.0f + exponential(-inner)));
            }
            for (long o = 0; o < count; o++)
                to[at + o] = block[b * BLOCK + o] + (positions ? positions[k * size + first + o] : 0.0f);
        }
    }
}

/* Every slot sees those of its sequence: all, those up to itself, or itself alone. */
static void slot_attention_stage(const Drafting *g, const Work *w, Worker *worker) {
    const Stack *m = &g->h->encoder;
    const int num = g->batch.num_spans;
    const long size = m->head_size, line = (m->heads + 2 * m->key_heads) * size, attended = padded(m->heads * size);
    float *scores = w->own_scores[worker->thread];
    meet(worker, num * m->heads);
    for (int piece = take(worker); piece >= 0; piece = take(worker)) {
        const int b = piece / m->heads, head = piece % m->heads;
        const float *keys = w->qkv + b * line + (m->heads + head / (m->heads / m->key_heads)) * size;
        const float *values = keys + m->key_heads * size;
        for (long k = 0; k < g->h->num_heads; k++) {
            const long row = k * num + b, first = g->h->slot_mask == OWN_SLOT ? k : 0;
            const long seen = (g->h->slot_mask == ALL_SLOTS ? g->h->num_heads : k + 1) - first;
            float *to = w->mixed + row * attended + head * size;
            float_dots(keys + first * num * line, num * line, seen, w->qkv + row * line + head * size, line, 1, size, scores, 1);
            for (long s = 0; s < seen; s++) scores[s] *= m->scale;
            const float share = 1.0f / exponentials(scores, seen);
            memset(to, 0, 4 * (size_t)size);
            for (long s = 0; s < seen; s++)
                for (long i = 0; i < size; i++) to[i] += scores[s] * share * values[(first + s) * num * line + i];
        }
    }
}

/* A whole product of a float32 row by one thread. */
static void product_alone(const Product *p, const float *row, float *to) {
    const Rows x = {row, NULL, p->inputs, 0, NULL};
    for (long first = 0; first < p->outputs; first += BLOCK)
        multiply(p, &x, 1, first, block_size(p->outputs, first), to + first, 0);
}

/* a silu(b) of one head below one token: to [rank]. */
static void act_on_path(const Path *path, const float *inner, const float *read, float *to) {
    for (long i = 0; i < path->rank; i += LANES) {
        const vec up = load(inner + i) + load(read + i), gate = load(inner + path->rank + i) + load(read + path->rank + i);
        store(to + i, up * gate / (1.0f + exponential(-gate)));
    }
}

/* The state of a head that has not read the token already chosen, corrected by what is read of it. */
static void correct(const Heads *h, const float *read, float *room, float *state) {
    const Path *path = &h->path;
    const long size = h->stages.hidden, hidden = padded(size);
    float *inner = room + hidden, *acts = inner + 2 * path->rank;
    norm_row(state, path->norm, size, h->stages.eps, room);
    product_alone(&path->state, room, inner);
    act_on_path(path, inner, read, acts);
    product_alone(&path->output, acts, room);
    for (long o = 0; o < size; o++) state[o] += room[o];
}

/* Head states as they are scored. */
static void output_stage(const Drafting *g, const float *slots, Worker *worker) {
    const Heads *h = g->h;
    const int num = g->batch.num_spans;
    const long size = h->stages.hidden, hidden = padded(size);
    meet(worker, h->num_heads * num);
    for (int i = take(worker); i >= 0; i = take(worker)) {
        float *to = g->outputs + i * hidden;
        if (h->output_norm) norm_row(slots + i * hidden, h->output_norm, size, h->stages.eps, to);
        else memcpy(to, slots + i * hidden, 4 * (size_t)hidden);
        if (g->d->pending && i < num)
            correct(h, g->d->pending + (long)i * 2 * h->path.rank, g->own_paths[worker->thread], to);
        if (h->path.rank) norm_row(to, h->path.norm, size, h->stages.eps, g->normed + i * hidden);
    }
}

/* What paths read of the states of the second head and those behind it. */
static void inner_stage(const Drafting *g, Worker *worker) {
    const Product *state = &g->h->path.state;
    const int num = g->batch.num_spans, n = (g->d->depth - 1) * num;
    const long hidden = padded(g->h->stages.hidden), wide = state->outputs;
    const Rows x = {g->normed + num * hidden, NULL, hidden, 0, NULL};
    meet(worker, blocks_of(wide));
    for (int piece = take(worker); piece >= 0; piece = take(worker)) {
        const long first = (long)piece * BLOCK;
        multiply(state, &x, n, first, block_size(wide, first), g->inner + num * wide + first, wide);
    }
}

static void score_stage(const Drafting *g, Worker *worker) {
    const Heads *h = g->h;
    const int n = g->d->depth * g->batch.num_spans, num = h->has_own_scores ? g->batch.num_spans : n; /* rows of a product */
    const int blocks = blocks_of(h->scores->outputs);
    const long size = padded(h->stages.hidden);
    float *prepared = g->work.own_prepared[worker->thread], *steps = g->work.own_steps[worker->thread];
    meet(worker, h->has_own_scores ? g->d->depth * blocks : blocks);
    for (int k = 0; k < n; k += num) prepare(h->scores, g->outputs + k * size, size, num, prepared + k * size, steps + k);
    for (int piece = take(worker); piece >= 0; piece = take(worker)) {
        const int k = piece / blocks, row = k * num;
        const long first = (long)(piece % blocks) * BLOCK, count = block_size(h->scores->outputs, first);
        const Rows own = form_of(h->scores, g->outputs + row * size, size, prepared + row * size, steps + row);
        multiply(h->scores + k, &own, num, first, count, g->logits + row * g->most_logits + first, g->most_logits);
    }
}

/* Keeps the best, in order, of equal ones the first. */
INLINE void offer(Rank *best, int count, Rank rank) {
    int at = count - 1;
    for (; at > 0 && rank.value > best[at - 1].value; at--) best[at] = best[at - 1];
    best[at] = rank;
}

/* The best of `len` numbers, which whole vectors can be read of, places counted from 0; distinct whatever they are. */
static void rank_row(const float *row, long len, int ranks, Rank *best) {
    for (int i = 0; i < ranks; i++) offer(best, i + 1, (Rank){row[i] == row[i] ? row[i] : -INFINITY, i});
    for (long i = ranks; i < len;) {
        const long end = i % PAD == 0 && i + PAD <= len ? i + PAD : i + 1;
        vec most = all(row[i]);
        for (long j = i; end - i == PAD && j < end; j += LANES) most = larger(load(row + j), most);
        if (largest(most) > best[ranks - 1].value)
            for (long j = i; j < end; j++)
                if (row[j] > best[ranks - 1].value) offer(best, ranks, (Rank){row[j], (int32_t)j});
        i = end;
    }
}

static void rank_stage(const Drafting *g, Worker *worker) {
    const Draft *d = g->d;
    const int num = g->batch.num_spans;
    const long len = g->h->scores->outputs;
    meet(worker, d->depth * num);
    for (int i = take(worker); i >= 0; i = take(worker)) {
        const int k = i / num, b = i % num;
        float *row = g->logits + i * g->most_logits;
        Rank *best = g->ranks + (long)i * d->ranks;
        if (g->h->logit_cap) cap_row(row, len, g->h->logit_cap);
        for (long o = len; o < g->most_logits; o++) row[o] = -INFINITY;
        rank_row(row, len, d->ranks, best);
        const float inverse = 1.0f / d->divisors[b * d->depth + k], top = best->value;
        vec total = {0};
        for (long o = 0; o < len; o += LANES) total += exponential((load(row + o) - top) * inverse);
        const float shift = d->log_coverage - top * inverse - logf(sum(total));
        const long to = ((long)b * d->depth + k) * d->ranks;
        for (int r = 0; r < d->ranks; r++) {
            const float found = best[r].value * inverse + shift;
            d->tokens[to + r] = g->h->draft_ids ? g->h->draft_ids[best[r].place] : best[r].place;
            d->log_probs[to + r] = found == found ? found : -INFINITY;
        }
    }
}

/* Of head k of sequence b: the best below each of the best of head k - 1 (path.py's `moved` and `conditional`). */
static void rank_below(const Drafting *g, int k, int b, float *room) {
    const Heads *h = g->h;
    const Draft *d = g->d;
    const Path *path = &h->path;
    const int num = g->batch.num_spans, size = d->parents;
    const long rank = path->rank, row_of = (long)k * num + b;
    const Rank *above = g->ranks + (row_of - num) * d->ranks, *below = g->ranks + row_of * d->ranks;
    const float *scores = path->scores[h->has_own_scores ? k : 0];
    const long here = ((long)b * d->depth + k) * d->ranks, to = ((long)b * (d->depth - 1) + k - 1) * size * d->children;
    float *acts = room, *rows = acts + size * rank, *moves = rows + size * rank, outside = 0.0f;
    for (int p = 0; p < size; p++)
        act_on_path(path, g->inner + row_of * 2 * rank, path->reads + above[p].place * 2 * rank, acts + p * rank);
    for (int s = 0; s < size; s++) {
        memcpy(rows + s * rank, scores + below[s].place * rank, 4 * (size_t)rank);
        outside += expf(d->log_probs[here + s] - d->log_coverage);
    }
    outside = 1.0f - (outside < 1.0f - 1e-7f ? outside : 1.0f - 1e-7f);
    float_dots(rows, rank, size, acts, rank, size, rank, moves, size);
    for (int p = 0; p < size; p++) {
        Rank best[size];
        float *row = moves + p * size;
        for (int s = 0; s < size; s++) {
            row[s] = d->log_probs[here + s] - d->log_coverage + row[s] / d->divisors[b * d->depth + k];
            offer(best, s + 1, (Rank){row[s] == row[s] ? row[s] : -INFINITY, s});
        }
        const float top = best[0].value > 0 ? best[0].value : 0; /* a move may be beyond any exponential */
        float total = outside * expf(-top);
        for (int s = 0; s < size; s++) total += expf(row[s] - top);
        for (int r = 0; r < d->children; r++) {
            const float found = best[r].value - top - logf(total) + d->log_coverage;
            d->below[to + p * d->children + r] = best[r].place;
            d->log_probs_below[to + p * d->children + r] = found == found ? found : -INFINITY;
        }
    }
}

static void ask(const Drafting *g, Worker *worker) {
    const Heads *h = g->h;
    const int num = g->batch.num_spans, n = h->num_heads * num;
    const long hidden = padded(h->stages.hidden);
    Work w = g->work;
    meet(worker, 0); /* what was fed is read */
    clear_rows(&h->encoder, &w, n, worker);
    for (int i = worker->thread; i < n; i += worker->team)
        for (int which = 0; which < 2; which++) memset(g->slots[which] + i * hidden, 0, 4 * (size_t)hidden);
    for (int j = 0; j < h->num_blocks; j++) {
        w.states = g->slots[j % 2];
        block_stage(g, j, j ? g->slots[(j + 1) % 2] : NULL, w.states, worker);
    }
    for (int l = 0; l < h->encoder.num_layers; l++) {
        project(&h->encoder, h->encoder.layers + l, &w, n, worker);
        slot_attention_stage(g, &w, worker);
        widen(&h->encoder, h->encoder.layers + l, &w, n, worker);
    }
    output_stage(g, w.states, worker);
    score_stage(g, worker);
    rank_stage(g, worker);
    if (!h->path.rank || g->d->depth < 2) return;
    inner_stage(g, worker);
    meet(worker, (g->d->depth - 1) * num);
    for (int i = take(worker); i >= 0; i = take(worker))
        rank_below(g, 1 + i / num, i % num, g->own_paths[worker->thread]);
}

static void run_draft(const void *call, Worker *worker) {
    const Drafting *g = call;
    if (g->num_fed) feed(g, worker);
    if (g->d->depth) ask(g, worker);
}

static Drafting lay_out_draft(const Heads *h, const Draft *d, Room *room) {
    const int num = d->batch.num_spans, threads = d->batch.num_threads;
    const long rows = d->batch.num_rows, slots = d->depth ? (long)h->num_heads * num : 0, most = most_of(rows, slots);
    const long hidden = padded(h->stages.hidden), size = d->parents;
    Stack larger_of = h->stages;
    larger_of.inner = (int32_t)most_of(h->stages.inner, h->encoder.inner);
    Drafting g = {.h = h, .d = d, .batch = d->batch, .most_logits = (long)blocks_of(h->scores->outputs) * BLOCK};
    g.work = lay_out(&larger_of, &d->batch, most, padded(h->stages.hidden + size_beside(h)), room);
    int32_t *parents = take_room(room, 4 * rows);
    g.batch.parents = parents;
    g.states[0] = g.work.states;
    g.states[1] = take_room(room, 4 * rows * hidden);
    for (int which = 0; which < 2; which++) g.slots[which] = take_room(room, 4 * slots * hidden);
    g.beside = take_room(room, 4 * rows * size_beside(h));
    g.outputs = take_room(room, 4 * slots * hidden);
    g.logits = take_room(room, 4 * num * d->depth * g.most_logits);
    g.ranks = take_room(room, sizeof(Rank) * num * d->depth * d->ranks);
    g.last = take_room(room, sizeof(Part) * num);
    const long rank = h->path.rank, alone = hidden + 3 * rank, floats = most_of(alone, size * (2 * rank + size));
    g.normed = take_room(room, rank ? 4 * slots * hidden : 0);
    g.inner = take_room(room, 4 * slots * 2 * rank);
    g.own_paths = own_room(room, threads, rank ? 4 * floats : 0);
    for (int s = 0; s < num && room->base; s++) {
        const Span *span = d->batch.spans + s;
        if (span->first < 0 || span->count < 1 || span->first + (int64_t)span->count > rows) continue;
        const int row = span->first + span->count - 1;
        for (int r = span->first; r <= row; r++) parents[r] = r == span->first ? -1 : r - 1;
        g.last[g.num_fed] = (Part){s, row, 1, g.num_fed, 0};
        g.num_fed++;
    }
    return g;
}

/* Bytes of workspace that a call takes. */
int64_t amphista_draft_workspace(const Heads *h, const Draft *d) {
    Room room = {NULL, 0};
    lay_out_draft(h, d, &room);
    return (int64_t)room.used;
}

/* Sizes of the records, as amphista_sizes. */
void amphista_draft_sizes(int64_t *sizes) {
    const int64_t own[] = {sizeof(Stage), sizeof(Path), sizeof(Heads), sizeof(Draft)};
    memcpy(sizes, own, sizeof own);
}

/* Feeds and asks; 0, or what is wrong with it: then nothing was written. */
int amphista_draft(const Heads *h, const Draft *d) {
    Room room = {d->workspace, 0};
    if (amphista_draft_workspace(h, d) > d->workspace_bytes) return BAD_WORKSPACE;
    Drafting g = lay_out_draft(h, d, &room);
    const int wrong = look_through(&h->stages, &g.batch, h->embedding.outputs, &g.work);
    if (wrong) return wrong;
    if (d->depth > h->num_heads || (d->depth && (d->ranks > h->scores->outputs || d->ranks < d->parents))) return BAD_WANTED;
    together(d->batch.num_threads, g.work.shares, run_draft, &g, d->batch.waited);
    return 0;
}
