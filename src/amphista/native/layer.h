/* Transformer layers over a flat row of tokens of any number of sequences: what the target's forward (step.c) and the
 * drafters' staged layers (drafter.c) are made of.
 *
 * A *span* is one sequence's part of the row: `count` nodes behind `committed` rows of its own cache. A node's parent is
 * an earlier node of its span, or -1: then it follows the last committed row. So a chain is a prompt's chunk, a single
 * node is plain decoding, and a tree is a tree. A node's position is that of the committed rows, plus its depth.
 *
 *     q, k, v  = W_qkv norm(x) + b             (1) project: all rows
 *     q, k     = rotated(norm of heads(q, k))  (2) place: k, v are written into the cache, behind the committed rows
 *     m        = sum_s softmax_s(q k_s) v_s    (3) attention; s: what the node sees
 *     x       += W_o m                         (4) widen, to the end
 *     a        = silu(W_gate norm(x)) W_up norm(x)    (5)
 *     x       += W_down a                      (6), or what a few of many experts make of it (experts.h)
 *
 * Families differ: any norm may be missing, what is added may be normed and scaled, gelu may stand for silu, a norm of q
 * and k be over all heads, scores may be capped, and layers rotate differently or not at all, which is a rotation by
 * nothing.
 *
 * Norms, and what a product needs of its inputs, every thread works out for itself: that costs less than to meet once
 * more.
 *
 * Lossless: every number is worked out by operations that do not depend on what else is in the forward. Products keep
 * their order for any number of rows (products.h). A node sees, in the order of their positions, the committed rows
 * and then its own ancestors and itself, wherever these lie among the new rows, a window permitting; what it does not
 * see is skipped, not masked. Scores go to a row of their own, the largest is found, then their exponentials are summed
 * lane by lane, then values are added one after the other: what plain decoding does with the same keys in the same
 * order.
 *
 * Probes: rows whose id is -1 - j take the j-th of some inputs in place of an embedding, and see the rows of a prefix
 * behind their own path, in every window. They come last in their span, and no other row sees them.
 *
 * Rotation: the two numbers rotated together lie side by side, in queries, keys and the cache.
 * Caches: float32 or bfloat16 [key heads][capacity][head size] for each layer.
 */
#ifndef AMPHISTA_LAYER_H
#define AMPHISTA_LAYER_H

#include "attention.h"
#include "team.h"

typedef struct {
    Product gate, up, down;
} Mlp;

/* Of which each row takes a few. */
typedef struct {
    Product router;          /* scores [num_experts]; one more output says how much of the shared one a row takes */
    const Mlp *each;         /* [num_experts + has_shared] */
    const float *correction; /* [num_experts] added to scores where the best are chosen, or NULL */
    int32_t num_experts, top_k, by_sigmoid, is_normed, has_shared; /* is_normed: those chosen are divided by their sum */
    float least, more, scale; /* their sum is at least so much, and more by this; what they are multiplied by then */
} Experts;

typedef struct {
    const float *attention_norm, *query_norm, *key_norm, *mlp_norm; /* zeros behind; NULL if none */
    const float *attention_out_norm, *mlp_out_norm;                 /* of what is added to the states; NULL if none */
    Product qkv, output;
    Mlp mlp;
    const Experts *experts; /* NULL: mlp */
    const float *sinks;     /* [heads], a score of nothing beside those of keys (arXiv 2309.17453), or NULL */
    int32_t window, turn; /* 0: none; which of the rotations */
} Layer;

/* Layers of one shape. */
typedef struct {
    const Layer *layers;
    int32_t num_layers, hidden, heads, key_heads, head_size, inner, cache_kind; /* FLOAT32 or BFLOAT16 */
    float eps, scale, residual; /* scale: of queries; residual: of what is added to the states */
    int32_t turns;              /* rotations there are */
    int32_t has_wide_norms;     /* those of queries and keys are over all heads, not over each */
    int32_t has_gelu;           /* in place of silu */
    float score_cap;            /* what scores stay below in size; 0: they are not capped */
    float gate_slope, gate_limit; /* silu's gates are times the first; where there is a limit gates stay below it, and
                                     ups, in size, too, and 1 is added to these */
} Stack;

typedef struct {
    void *const *keys, *const *values; /* of each layer */
    int64_t capacity;
    int32_t first, count, committed, unused;
} Span;

typedef struct {
    const int32_t *ids, *parents; /* of each row; a parent is a row of the same span, or -1 */
    const Span *spans;
    const float *turns; /* [num_turns][rotations][head_size / 2][cosine, sine] */
    int32_t num_rows, num_spans, num_turns, num_threads;
    double *waited; /* seconds for which a thread waited for others, on average, or NULL */
    const float *inputs;                               /* of probes [num_inputs][hidden]; none: NULL */
    void *const *prefix_keys, *const *prefix_values;   /* of each layer [key heads][prefix_rows][head size] */
    int32_t num_inputs, prefix_rows;
} Batch;

enum { ROWS_AT_ONCE = 8, MANY_ROWS = 32, ROWS_A_PIECE = 16 };
enum { BAD_SPAN = 1, BAD_PARENT, BAD_ID, BAD_POSITION, BAD_CAPACITY, BAD_WANTED, BAD_WORKSPACE, BAD_TAP };

/* Rows of one span that read the same keys together: the committed ones, and `shared` rows of the span that lie behind
 * them and are ancestors of all (of a prompt's chunk, all that come before). What they mix goes to rows `to` and behind. */
typedef struct {
    int span, row, count, to, shared;
} Part;

/* All that layers need for a while; `own` things are one a thread. */
typedef struct {
    float *states, *qkv, *queries, *mixed, *inner, *added; /* [rows][...] of all threads */
    float **own_rows, **own_prepared, **own_steps, **own_scores, **own_mix, **own_block;
    int32_t **own_path;
    int32_t *position, *depth, *span_of;
    Part *parts;
    Share *shares; /* [2][threads] */
    int num_parts;
    long most_seen;
    /* Of experts: what the router says of each row [rows][scores], which it takes and how much of each [rows][top_k],
     * inputs of their last products [lines][line], and of each thread the rows of one, and which rows take which. */
    float *scores, *portions, *prepared, *steps, **own_gathered;
    int32_t *taken, **own_groups;
    long most_scores, most_taken, line;
} Work;

INLINE int blocks_of(long outputs) { return (int)((outputs + BLOCK - 1) / BLOCK); }
INLINE long block_size(long outputs, long first) { return outputs - first < BLOCK ? outputs - first : BLOCK; }
INLINE long most_of(long a, long b) { return a > b ? a : b; }

/* -- room and checks ---------------------------------------------------------------------------------------------- */

static long queries_size(const Stack *m) { return padded(m->head_size); }

/* Lays out what so many rows of layers take; widest: of inputs that are no layer's, padded. */
static Work lay_out(const Stack *m, const Batch *f, long rows, long widest, Room *room) {
    const long heads = m->heads, size = m->head_size, attended = padded(heads * size), hidden = padded(m->hidden);
    const long inner = padded(m->inner), queries = ROWS_AT_ONCE * (heads / m->key_heads);
    const int threads = f->num_threads;
    long seen = 0;
    for (int s = 0; s < f->num_spans; s++) seen = most_of(seen, f->spans[s].committed + f->spans[s].count);
    Work w = {.most_seen = padded(seen + f->prefix_rows + PAD)};
    long experts = 0;
    for (int l = 0; l < m->num_layers; l++) {
        const Experts *e = m->layers[l].experts;
        if (!e) continue;
        experts = most_of(experts, e->num_experts);
        w.most_scores = most_of(w.most_scores, padded(e->router.outputs));
        w.most_taken = most_of(w.most_taken, e->top_k + e->has_shared);
        w.line = most_of(w.line, padded(e->each[0].gate.outputs)); /* that of all but the shared one */
        if (e->has_shared) w.line = most_of(w.line, padded(e->each[e->num_experts].gate.outputs));
    }
    const long lines = rows * most_of(w.most_taken, 1);
    widest = most_of(most_of(widest, hidden), most_of(inner, attended));
    w.states = take_room(room, 4 * rows * hidden);
    w.qkv = take_room(room, 4 * rows * (heads + 2 * m->key_heads) * size);
    w.queries = take_room(room, 4 * rows * heads * queries_size(m));
    w.mixed = take_room(room, 4 * rows * attended);
    w.inner = take_room(room, 4 * most_of(rows * inner, lines * w.line));
    w.added = take_room(room, 4 * rows * hidden);
    w.position = take_room(room, 4 * rows);
    w.depth = take_room(room, 4 * rows);
    w.span_of = take_room(room, 4 * rows);
    w.parts = take_room(room, sizeof(Part) * rows);
    w.shares = take_room(room, sizeof(Share) * 2 * threads);
    w.own_rows = own_room(room, threads, 4 * rows * widest);
    w.own_prepared = own_room(room, threads, 4 * rows * widest);
    w.own_steps = own_room(room, threads, 4 * rows);
    w.own_scores = own_room(room, threads, 4 * queries * w.most_seen);
    w.own_mix = own_room(room, threads, 4 * (queries * queries_size(m) + queries_room(queries, queries_size(m))));
    w.own_block = own_room(room, threads, 8 * rows * BLOCK);
    w.own_path = own_room(room, threads, 4 * rows);
    if (!experts) return w;
    w.scores = take_room(room, 4 * rows * w.most_scores);
    w.taken = take_room(room, 4 * lines);
    w.portions = take_room(room, 4 * lines);
    w.prepared = take_room(room, 4 * lines * w.line);
    w.steps = take_room(room, 4 * lines);
    w.own_gathered = own_room(room, threads, 4 * rows * hidden);
    w.own_groups = own_room(room, threads, 4 * (2 * lines + 3 * (experts + 2)));
    return w;
}

/* Positions, depths, and parts of rows; 0, or what is wrong with the batch. num_ids: of the vocabulary. */
static int look_through(const Stack *m, const Batch *f, int num_ids, Work *w) {
    int next = 0, parts = 0;
    for (int s = 0; s < f->num_spans; s++) {
        const Span *span = f->spans + s;
        if (span->first != next || span->count < 0 || span->committed < 0) return BAD_SPAN;
        if (span->committed + (int64_t)span->count > span->capacity) return BAD_CAPACITY;
        next += span->count;
        if (next > f->num_rows) return BAD_SPAN;
        int deepest = 0;
        for (int row = span->first; row < next; row++) {
            const int parent = f->parents[row];
            if (parent != -1 && (parent < span->first || parent >= row)) return BAD_PARENT;
            if (f->ids[row] < -f->num_inputs || f->ids[row] >= num_ids) return BAD_ID;
            w->depth[row] = parent < 0 ? 0 : w->depth[parent] + 1;
            w->position[row] = span->committed + w->depth[row];
            w->span_of[row] = s;
            deepest = w->depth[row] > deepest ? w->depth[row] : deepest;
        }
        if (span->count && span->committed + deepest >= f->num_turns) return BAD_POSITION;
        int windowed = 0;
        for (int l = 0; l < m->num_layers; l++)
            windowed |= m->layers[l].window && m->layers[l].window < span->committed + deepest + 1;
        const int at_once = windowed ? 1 : ROWS_AT_ONCE;
        for (int row = span->first; row < next; row += at_once) {
            const int count = next - row < at_once ? next - row : at_once, before = row - span->first;
            int is_chain = 1;
            for (int r = row; r < row + count; r++) is_chain &= w->depth[r] == r - span->first;
            w->parts[parts++] = (Part){s, row, count, row, is_chain ? before : 0};
        }
    }
    w->num_parts = parts;
    return next == f->num_rows ? 0 : BAD_SPAN;
}

/* -- the parts of a layer ----------------------------------------------------------------------------------------- */

INLINE void scale_row(float *row, long len, float scale) {
    for (long i = 0; i < len && scale != 1.0f; i++) row[i] *= scale;
}

/* Root-mean-square norm (arXiv 1910.07467) of one padded row. */
static void norm_row(const float *from, const float *weight, long len, float eps, float *to) {
    vec squares[4] = {{0}}; /* one sum would wait for itself */
    for (long i = 0; i < padded(len); i += 4 * LANES)
        for (int k = 0; k < 4; k++) squares[k] += load(from + i + k * LANES) * load(from + i + k * LANES);
    const vec all_squares = (squares[0] + squares[1]) + (squares[2] + squares[3]);
    const vec factor = all(1.0f / sqrtf(sum(all_squares) / (float)len + eps));
    for (long i = 0; i < padded(len); i += LANES) store(to + i, load(from + i) * factor * load(weight + i));
}

/* Rows are made ready for a product by every thread for itself, which costs less than to meet once more, or, of many,
 * a stretch at a time for all. `pieces`: of the product. */
INLINE int is_shared(int n) { return n >= MANY_ROWS; }
INLINE int owner_of(int n, const Worker *worker) { return is_shared(n) ? 0 : worker->thread; }
INLINE void meet_for_rows(Worker *worker, int n, int pieces) { meet(worker, is_shared(n) ? (n + ROWS_A_PIECE - 1) / ROWS_A_PIECE : pieces); }
INLINE void meet_behind_rows(Worker *worker, int n, int pieces) { if (is_shared(n)) meet(worker, pieces); }

/* The next rows this thread makes ready, from *first on, which is -1 before; 0: no more. */
static int take_rows(Worker *worker, int n, int *first) {
    const int piece = is_shared(n) ? take(worker) : *first < 0 ? 0 : -1;
    if (piece < 0) return 0;
    *first = piece * ROWS_A_PIECE;
    return is_shared(n) && n - *first > ROWS_A_PIECE ? ROWS_A_PIECE : n - *first;
}

/* n rows [n][stride], normed if there is a norm, ready for a product. */
static Rows ready(const Stack *m, const Work *w, int n, const float *from, long stride, const float *norm, const Product *p,
                  Worker *worker, int pieces) {
    const int owner = owner_of(n, worker);
    float *rows = w->own_rows[owner], *prepared = w->own_prepared[owner], *steps = w->own_steps[owner];
    const float *source = norm ? rows : from;
    meet_for_rows(worker, n, pieces);
    for (int first = -1, count; (count = take_rows(worker, n, &first));) {
        for (int r = first; r < first + count && norm; r++)
            norm_row(from + r * stride, norm, m->hidden, m->eps, rows + r * stride);
        prepare_some(p, source, stride, n, first, count, prepared, steps);
    }
    meet_behind_rows(worker, n, pieces);
    return form_of(p, source, stride, prepared, steps);
}

/* A product for all rows, block by block: stored or, where there is a block to work in, added times `scale`. */
static void product_stage(const Product *p, const Rows *x, int n, Worker *worker, float *to, long ldo, float *block,
                          float scale) {
    const int is_added = block != NULL;
    for (int b = take(worker); b >= 0; b = take(worker)) {
        const long first = (long)b * BLOCK, count = block_size(p->outputs, first);
        multiply(p, x, n, first, count, is_added ? block : to + first, is_added ? BLOCK : ldo);
        if (is_added)
            for (int r = 0; r < n; r++)
                for (long o = 0; o < count; o++) to[r * ldo + first + o] += scale * block[r * BLOCK + o];
    }
}

/* gelu in its tanh form (arXiv 1606.08415) is x sigmoid(slope(x)): 2 sqrt(2 / pi) (x + 0.044715 x^3). */
INLINE vec gelu_slope(vec x) { return x * (1.5957691216f + 0.0713548163f * x * x); }

/* One block of what an MLP multiplies its last weight by, of n rows: to [n][stride], zeros behind the last one. */
static void gated_block(const Stack *m, const Mlp *mlp, const Rows *x, int n, int b, float *to, long stride, float *block) {
    float *gates = block, *ups = block + (long)n * BLOCK;
    const long size = mlp->gate.outputs, first = (long)b * BLOCK, count = block_size(size, first);
    const long end = first + count == size ? padded(size) : first + count;
    multiply(&mlp->gate, x, n, first, count, gates, BLOCK);
    multiply(&mlp->up, x, n, first, count, ups, BLOCK);
    for (int r = 0; r < n; r++) {
        float *row = to + r * stride;
        for (long o = 0; o < BLOCK; o += LANES) { /* beyond `count` is padding, or nobody's */
            vec gate = load(gates + r * BLOCK + o), up = load(ups + r * BLOCK + o);
            if (m->gate_limit) {
                gate = -larger(all(-m->gate_limit), -gate); /* what is no number remains so */
                up = larger(all(-m->gate_limit), -larger(all(-m->gate_limit), -up)) + 1.0f;
            }
            vec slope = m->has_gelu ? gelu_slope(gate) : gate * m->gate_slope;
            store(gates + r * BLOCK + o, gate / (1.0f + exponential(-slope)) * up);
        }
        memcpy(row + first, gates + r * BLOCK, 4 * (size_t)count);
        memset(row + first + count, 0, 4 * (size_t)(end - first - count));
    }
}

/* That of gate and up for which rows are made ready. */
INLINE const Product *reads_rows(const Mlp *mlp) { return is_packed(mlp->up.kind) ? &mlp->up : &mlp->gate; }

/* What a norm without weights multiplies `size` numbers by. */
static float norm_factor(const float *from, long size, float eps) {
    vec squares = {0};
    long i = 0;
    for (; i + LANES <= size; i += LANES) squares += load(from + i) * load(from + i);
    vec rest = load_part(from + i, size - i);
    return 1.0f / sqrtf(sum(squares + rest * rest) / (float)size + eps);
}

/* The weights of head h's norm, NULL if there is none, and the factor beside them; asked for head after head. */
INLINE const float *head_norm(const Stack *m, const float *norm, const float *heads, long count, long h, float *factor) {
    const long size = m->head_size;
    if (!norm) return NULL;
    if (!m->has_wide_norms) *factor = norm_factor(heads + h * size, size, m->eps);
    else if (h == 0) *factor = norm_factor(heads, count * size, m->eps);
    return m->has_wide_norms ? norm + h * size : norm;
}

/* One head: normed by weight and factor, if it has a norm, rotated to its position, scaled. from, to: [E]. */
static void turn_head(const float *from, const float *weight, float factor, const float *turn, long size, float scale,
                      float *to) {
    for (long i = 0; i < size; i += 2) {
        const float a = weight ? from[i] * factor * weight[i] : from[i];
        const float b = weight ? from[i + 1] * factor * weight[i + 1] : from[i + 1];
        to[i] = (a * turn[i] - b * turn[i + 1]) * scale;
        to[i + 1] = (a * turn[i + 1] + b * turn[i]) * scale;
    }
}

INLINE void keep(int kind, void *rows, long at, const float *from, long size) {
    if (kind == FLOAT32) memcpy((float *)rows + at, from, (size_t)size * sizeof *from);
    else for (long i = 0; i < size; i++) ((uint16_t *)rows)[at + i] = to_bf16(from[i]);
}

/* Queries, keys and values of one row: the first ready for their products, the others in the cache. */
static void place_row(const Stack *m, const Layer *layer, int l, const Batch *f, const Work *w, int row, float *one) {
    const long size = m->head_size, wide = queries_size(m);
    const Span *span = f->spans + w->span_of[row];
    const float *from = w->qkv + (long)row * (m->heads + 2 * m->key_heads) * size;
    const int position = w->position[row] + (MUTANT(LATE_POSITION) && w->depth[row] > 0);
    const float *turn = f->turns + ((long)(position < f->num_turns ? position : 0) * m->turns + layer->turn) * size;
    memset(one, 0, (size_t)wide * sizeof *one);
    float factor = 1.0f;
    for (long h = 0; h < m->heads; h++) {
        float *to = w->queries + (row * m->heads + h) * wide;
        const float *norm = head_norm(m, layer->query_norm, from, m->heads, h, &factor);
        turn_head(from + h * size, norm, factor, turn, size, m->scale, one);
        if (m->cache_kind == BFLOAT16) round_rows(one, wide, 1, size, (uint16_t *)to);
        else memcpy(to, one, (size_t)wide * sizeof *to);
    }
    const int64_t at = span->committed + (row - span->first);
    for (long j = 0; j < m->key_heads; j++) {
        const float *norm = head_norm(m, layer->key_norm, from + m->heads * size, m->key_heads, j, &factor);
        turn_head(from + (m->heads + j) * size, norm, factor, turn, size, 1.0f, one);
        keep(m->cache_kind, span->keys[l], (j * span->capacity + at) * size, one, size);
        keep(m->cache_kind, span->values[l], (j * span->capacity + at) * size,
             from + (m->heads + m->key_heads + j) * size, size);
    }
}

/* (2) of n rows. */
static void place_stage(const Stack *m, const Layer *layer, int l, const Batch *f, const Work *w, int n,
                        Worker *worker) {
    meet(worker, n);
    for (int r = take(worker); r >= 0; r = take(worker)) place_row(m, layer, l, f, w, r, w->own_mix[worker->thread]);
}

/* The node's ancestors and itself as rows behind the committed ones, by depth, those below `first` left out. */
static int path_of(const Batch *f, const Work *w, const Span *span, int row, int first, int32_t *path) {
    int count = w->depth[row] + 1 - first;
    for (int node = row, at = count - 1; at >= 0; node = f->parents[node]) path[at--] = node - span->first;
    if (MUTANT(SKIP_ANCESTOR) && count > 2) memmove(path + 1, path + 2, (size_t)(--count - 1) * sizeof *path);
    if (MUTANT(SEE_SIBLING) && row - 1 > (count > 1 ? path[count - 2] + span->first : row)) path[count++] = row - 1 - span->first;
    return count;
}

/* Rows of the prefix that a row sees. */
INLINE long prefix_of(const Batch *f, int row) { return f->ids[row] < 0 || MUTANT(SEE_PREFIX) ? f->prefix_rows : 0; }

/* Consecutive rows from path[at] on. */
INLINE long run_of(const int32_t *path, int count, int at) {
    long run = 1;
    while (at + run < count && path[at + run] == path[at] + run) run++;
    return run;
}

/* Attention of `num_heads` query heads from `head` on, all of one key head, of one part's rows. */
static void attend(const Stack *m, const Layer *layer, int l, const Batch *f, const Work *w, const Part *part,
                   int head, int num_heads, int thread) {
    const int s = MUTANT(OTHER_CACHE) && f->num_spans > 1 ? (part->span + 1) % f->num_spans : part->span;
    const Span *span = f->spans + part->span, *cache = f->spans + s;
    const long size = m->head_size, wide = queries_size(m), ldw = w->most_seen, n = (long)part->count * num_heads;
    const int64_t base = (int64_t)(head / (m->heads / m->key_heads)) * cache->capacity * size;
    const int64_t offset = m->cache_kind == FLOAT32 ? base * 4 : base * 2;
    const char *keys = (const char *)cache->keys[l] + offset, *values = (const char *)cache->values[l] + offset;
    const int64_t at_prefix = (int64_t)(head / (m->heads / m->key_heads)) * f->prefix_rows;
    const Cached c = {m->cache_kind, size, wide};
    float *scores = w->own_scores[thread], *mix = w->own_mix[thread], *queries = mix + n * wide;
    uint32_t *room = (uint32_t *)(queries + n * wide);
    int32_t *path = w->own_path[thread];
    const int position = w->position[part->row], reach = layer->window + MUTANT(WIDE_WINDOW);
    const int first = layer->window && position >= reach ? position - reach + 1 : 0; /* parts of windows are one row */
    const int shared = span->committed + part->shared; /* rows of the cache */
    const long committed = first < shared ? shared - first : 0;
    const int skipped = part->shared + (first > shared ? first - shared : 0);
    memset(mix, 0, (size_t)(n * wide) * sizeof *mix);
    for (int r = 0; r < part->count; r++)
        memcpy(queries + r * num_heads * wide, w->queries + ((long)(part->row + r) * m->heads + head) * wide,
               (size_t)(num_heads * wide) * sizeof *queries);
    score(&c, keys, first, NULL, committed, queries, (int)n, room, scores, ldw);
    for (int r = 0; r < part->count; r++) {
        const int count = path_of(f, w, span, part->row + r, skipped, path);
        const long prefix = prefix_of(f, part->row + r);
        float *own = scores + r * num_heads * ldw;
        const float *query = queries + r * num_heads * wide;
        score(&c, keys, span->committed, path, count, query, num_heads, room, own + committed, ldw);
        if (prefix)
            score(&c, f->prefix_keys[l], at_prefix, NULL, prefix, query, num_heads, room, own + committed + count, ldw);
        for (int h = 0; h < num_heads && m->score_cap; h++) cap_row(own + h * ldw, committed + count + prefix, m->score_cap);
        for (int h = 0; h < num_heads; h++) { /* the sum lies at the end of the line, behind the padding */
            const long seen = committed + count + prefix;
            if (layer->sinks) own[h * ldw + seen] = layer->sinks[head + h];
            own[h * ldw + ldw - 1] = exponentials(own + h * ldw, seen + (layer->sinks != NULL));
        }
    }
    if (committed) add_values(&c, values, first, committed, scores, ldw, (int)n, mix);
    for (int r = 0; r < part->count; r++) {
        const int count = path_of(f, w, span, part->row + r, skipped, path);
        const long prefix = prefix_of(f, part->row + r);
        float *own = scores + r * num_heads * ldw, *to = mix + r * num_heads * wide;
        for (int at = 0; at < count; at += (int)run_of(path, count, at))
            add_values(&c, values, span->committed + path[at], run_of(path, count, at), own + committed + at, ldw,
                       num_heads, to);
        if (prefix) add_values(&c, f->prefix_values[l], at_prefix, prefix, own + committed + count, ldw, num_heads, to);
        for (int h = 0; h < num_heads; h++) {
            const float share = 1.0f / own[h * ldw + ldw - 1];
            float *out = w->mixed + (part->to + r) * padded((long)m->heads * size) + (head + h) * size;
            for (long i = 0; i < size; i++) out[i] = to[h * wide + i] * share;
        }
    }
}

/* (3) of all parts, head by head: what parts of one sequence read is read again while it is near. The heads of a group
 * read their keys together, but for groups that do not go evenly into the threads: these are dealt out by single heads,
 * behind the same number of whole ones for each thread (`meet` cuts the pieces so). */
static void attention_stage(const Stack *m, const Layer *layer, int l, const Batch *f, const Work *w,
                            Worker *worker) {
    const int team = worker->team, size = m->heads / m->key_heads, groups = w->num_parts * m->key_heads;
    const int even = groups / team, singles = groups % team * size;
    meet(worker, even * team + singles);
    for (int i = take(worker); i >= 0; i = take(worker)) {
        int thread = team - 1;
        while (even * thread + (long)singles * thread / team > i) thread--;
        const int before = (int)((long)singles * thread / team), own = i - even * thread - before;
        const int single = before + own - even, group = own < even ? thread * even + own : team * even + single / size;
        const int head = group / w->num_parts * size + (own < even ? 0 : single % size);
        attend(m, layer, l, f, w, w->parts + group % w->num_parts, head, own < even ? size : 1, worker->thread);
    }
}
/* (1) of n rows. */
static void project(const Stack *m, const Layer *layer, const Work *w, int n, Worker *worker) {
    const Product *qkv = &layer->qkv;
    const Rows x = ready(m, w, n, w->states, padded(m->hidden), layer->attention_norm, qkv, worker, blocks_of(qkv->outputs));
    product_stage(qkv, &x, n, worker, w->qkv, qkv->outputs, NULL, 0.0f);
}

/* Adds a product of n rows, normed if there is a norm, to the states. */
static void join_stage(const Stack *m, const Work *w, const Product *p, const Rows *x, const float *norm, int n,
                       Worker *worker) {
    const long hidden = padded(m->hidden);
    float *normed = w->own_rows[worker->thread];
    if (!norm) {
        product_stage(p, x, n, worker, w->states, hidden, w->own_block[worker->thread], m->residual);
        return;
    }
    product_stage(p, x, n, worker, w->added, hidden, NULL, 0.0f);
    meet(worker, 0);
    for (int r = worker->thread; r < n; r += worker->team) {
        norm_row(w->added + r * hidden, norm, m->hidden, m->eps, normed);
        for (long i = 0; i < m->hidden; i++) w->states[r * hidden + i] += m->residual * normed[i];
    }
}

#include "experts.h"

/* (4) to (6) of n rows. */
static void widen(const Stack *m, const Layer *layer, const Work *w, int n, Worker *worker) {
    const long hidden = padded(m->hidden), inner = padded(m->inner), attended = padded((long)m->heads * m->head_size);
    const Product *output = &layer->output, *down = &layer->mlp.down;
    const int blocks = blocks_of(layer->mlp.gate.outputs);
    Rows x = ready(m, w, n, w->mixed, attended, NULL, output, worker, blocks_of(output->outputs));
    join_stage(m, w, output, &x, layer->attention_out_norm, n, worker);
    if (layer->experts) {
        experts_stage(m, layer, w, n, worker);
        return;
    }
    x = ready(m, w, n, w->states, hidden, layer->mlp_norm, reads_rows(&layer->mlp), worker, blocks);
    for (int b = take(worker); b >= 0; b = take(worker))
        gated_block(m, &layer->mlp, &x, n, b, w->inner, inner, w->own_block[worker->thread]);
    x = ready(m, w, n, w->inner, inner, NULL, down, worker, blocks_of(down->outputs));
    join_stage(m, w, down, &x, layer->mlp_out_norm, n, worker);
}

/* Zeros wherever rows are padded, of this thread's share of n rows. */
static void clear_rows(const Stack *m, const Work *w, int n, const Worker *worker) {
    const long hidden = padded(m->hidden), attended = padded((long)m->heads * m->head_size);
    for (int r = worker->thread; r < n; r += worker->team) {
        memset(w->states + r * hidden, 0, (size_t)hidden * 4);
        memset(w->added + r * hidden, 0, (size_t)hidden * 4);
        memset(w->mixed + r * attended, 0, (size_t)attended * 4);
    }
}

#endif
