/* The forward of the Llama family and its kin for a flat row of tokens of any number of sequences:
 *
 *     x = s embedding[id];  x = layer(x) for each layer (layer.h);  hidden = norm(x)
 *     logits = W_head hidden, of the rows asked for; their largest, too
 *
 * A node's logits are the same bits as plain decoding's, in any tree, batch and type of weights: layer.h says why.
 */
#include "layer.h"

typedef struct {
    Stack stack;
    const float *norm;
    Product embedding, head;
    float embedding_scale, input_scale; /* of embeddings, and of inputs that stand in their place */
} Model;

typedef struct {
    Batch batch;
    const int32_t *wanted; /* rows whose logits are asked for */
    const int32_t *taps;   /* after how many layers states are asked for, too */
    float *hidden;         /* [num_rows][1 + num_taps][hidden] */
    float *logits;         /* [num_wanted][outputs of the head], or NULL where the largest are enough */
    int32_t *choices;      /* [num_wanted] */
    void *workspace;
    int64_t workspace_bytes;
    int32_t num_wanted, num_taps;
} Forward;

typedef struct {
    float value;
    int32_t id;
} Choice;

/* One forward under way. */
typedef struct {
    const Model *m;
    const Forward *f;
    Work work;
    Choice **choices; /* the best that each thread has found, [num_wanted] */
} Step;

/* Whether a number of a block is larger than the best so far, or none. */
INLINE int may_be_larger(const float *block, float best) {
    ivec any = {0};
    for (int o = 0; o < BLOCK; o += LANES) any |= ~(ivec)(load(block + o) <= best);
    return any_lane(any);
}

static void head_stage(const Step *step, const Rows *x, Worker *worker) {
    const Model *m = step->m;
    const Forward *f = step->f;
    Choice *best = step->choices[worker->thread];
    const int n = f->num_wanted;
    const long outputs = m->head.outputs;
    for (int r = 0; r < n; r++) best[r] = (Choice){-INFINITY, INT32_MAX};
    for (int b = take(worker); b >= 0; b = take(worker)) {
        const long first = (long)b * BLOCK, count = block_size(outputs, first);
        float *to = f->logits ? f->logits + first : step->work.own_block[worker->thread];
        const long ldo = f->logits ? outputs : BLOCK;
        multiply(&m->head, x, n, first, count, to, ldo);
        for (int r = 0; r < n; r++) {
            const float *row = to + r * ldo;
            if (count == BLOCK && !may_be_larger(row, best[r].value)) continue;
            for (long o = 0; o < count; o++)
                if (!(row[o] <= best[r].value)) best[r] = (Choice){row[o] == row[o] ? row[o] : INFINITY, (int32_t)(first + o)};
        }
    }
}

/* The lowest id of the largest logit of all threads; -1 where one is infinite or no number, or none is finite. */
static void choose(const Step *step, int team) {
    for (int r = 0; r < step->f->num_wanted; r++) {
        Choice best = step->choices[0][r];
        for (int t = 1; t < team; t++) {
            const Choice other = step->choices[t][r];
            if (other.value > best.value || (other.value == best.value && other.id < best.id)) best = other;
        }
        step->f->choices[r] = best.value < INFINITY && best.id != INT32_MAX ? best.id : -1;
    }
}

/* States of this thread's share of rows after `count` layers, if a tap asks for them. */
static void tap(const Step *step, int count, const Worker *worker) {
    const Forward *f = step->f;
    const long size = step->m->stack.hidden, line = (1 + f->num_taps) * size;
    for (int t = 0; t < f->num_taps; t++)
        for (int r = worker->thread; f->taps[t] == count + MUTANT(EARLY_TAP) && r < f->batch.num_rows; r += worker->team)
            memcpy(f->hidden + r * line + (t + 1) * size, step->work.states + r * padded(size), (size_t)size * 4);
}

/* What one thread does of a forward. */
static void run_forward(const void *call, Worker *worker) {
    const Step *step = call;
    const Model *m = step->m;
    const Stack *stack = &m->stack;
    const Forward *f = step->f;
    const Batch *batch = &f->batch;
    const Work *w = &step->work;
    const int n = batch->num_rows, thread = worker->thread;
    const long hidden = padded(stack->hidden);
    float *rows = w->own_rows[thread];
    clear_rows(stack, w, n, worker);
    for (int r = thread; r < n; r += worker->team) {
        const long id = batch->ids[r];
        float *row = w->states + r * hidden;
        if (id < 0) memcpy(row, batch->inputs + (-1 - id) * stack->hidden, (size_t)stack->hidden * 4);
        else weight_row(&m->embedding, (int)id, row);
        scale_row(row, stack->hidden, id < 0 ? m->input_scale : m->embedding_scale);
    }
    for (int l = 0; l < stack->num_layers; l++) {
        const Layer *layer = stack->layers + l;
        project(stack, layer, w, n, worker);
        tap(step, l, worker); /* behind a meeting, and before anyone changes the states */
        place_stage(stack, layer, l, batch, w, n, worker);
        attention_stage(stack, layer, l, batch, w, worker);
        widen(stack, layer, w, n, worker);
    }
    meet(worker, blocks_of(m->head.outputs));
    tap(step, stack->num_layers, worker);
    for (int r = thread; r < n; r += worker->team) {
        norm_row(w->states + r * hidden, m->norm, stack->hidden, stack->eps, rows);
        memcpy(f->hidden + (long)r * (1 + f->num_taps) * stack->hidden, rows, (size_t)stack->hidden * 4);
    }
    if (!f->num_wanted) return;
    for (int i = 0; i < f->num_wanted; i++)
        norm_row(w->states + f->wanted[i] * hidden, m->norm, stack->hidden, stack->eps, rows + i * hidden);
    float *prepared = w->own_prepared[thread], *steps = w->own_steps[thread];
    const Rows x = prepare(&m->head, rows, hidden, f->num_wanted, prepared, steps);
    head_stage(step, &x, worker);
}

static Step lay_out_step(const Model *m, const Forward *f, Room *room) {
    Step step = {m, f, lay_out(&m->stack, &f->batch, f->batch.num_rows, 0, room), NULL};
    step.choices = own_room(room, f->batch.num_threads, sizeof(Choice) * f->num_wanted);
    return step;
}

/* Bytes of workspace that a forward takes. */
int64_t amphista_workspace(const Model *m, const Forward *f) {
    Room room = {NULL, 0};
    lay_out_step(m, f, &room);
    return (int64_t)room.used;
}

/* Sizes of the records, so that a caller with another idea of them is refused. */
void amphista_sizes(int64_t *sizes) {
    const int64_t own[] = {sizeof(Product), sizeof(Layer), sizeof(Model), sizeof(Span), sizeof(Forward), LANES};
    memcpy(sizes, own, sizeof own);
}

/* The forward; 0, or what is wrong with it: then nothing was written. */
int amphista_forward(const Model *m, const Forward *f) {
    Room room = {f->workspace, 0};
    if (amphista_workspace(m, f) > f->workspace_bytes) return BAD_WORKSPACE;
    Step step = lay_out_step(m, f, &room);
    const int wrong = look_through(&m->stack, &f->batch, m->embedding.outputs, &step.work);
    if (wrong) return wrong;
    for (int i = 0; i < f->num_wanted; i++)
        if (f->wanted[i] < 0 || f->wanted[i] >= f->batch.num_rows) return BAD_WANTED;
    for (int t = 0; t < f->num_taps; t++)
        if (f->taps[t] < 1 || f->taps[t] > m->stack.num_layers) return BAD_TAP;
    choose(&step, together(f->batch.num_threads, step.work.shares, run_forward, &step, f->batch.waited));
    return 0;
}
