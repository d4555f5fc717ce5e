/* A small model and small heads of odd sizes, and of one whose keys are read by fours, in memory of exactly its size, trees
 * and drafts of three sequences through all types of weights: run under AddressSanitizer and UndefinedBehaviorSanitizer.
 * Prints "ok" where a call of one thread and one of three agree to the bit, too. */
#include <stdio.h>
#include <stdlib.h>

#include "native.c"

enum { LAYERS = 2, HIDDEN = 36, INNER = 50, HEADS = 4, KEY_HEADS = 2, VOCAB = 77, CAPACITY = 23, ROWS = 9 };
static long head_size;
#define SIZE head_size
#define QKV ((HEADS + 2 * KEY_HEADS) * SIZE)

static void *filled(size_t count, size_t size, unsigned seed) {
    uint8_t *place = malloc(count * size);
    for (size_t i = 0; i < count; i++) {
        seed = seed * 1664525u + 1013904223u;
        const float value = (float)(int)(seed >> 16 & 0xff) / 256.0f - 0.5f;
        const uint16_t half = to_bf16(value);
        if (size == 4) memcpy(place + 4 * i, &value, 4);
        else if (size == 2) memcpy(place + 2 * i, &half, 2);
        else place[i] = (uint8_t)(seed >> 24);
    }
    return place;
}

static const void *held[1 << 13];
static int num_held;
static void *keep_it(void *place) { return (void *)(held[num_held++] = place); }

static const float *vector(long len) {
    float *place = keep_it(calloc((size_t)padded(len), 4));
    for (long i = 0; i < len; i++) place[i] = 1.0f + (float)(i % 3) / 8.0f;
    return place;
}

static Product product(int kind, int outputs, int inputs, unsigned seed) {
    Product p = {.kind = kind, .outputs = outputs, .inputs = inputs};
    const long whole = (long)blocks_of(outputs) * BLOCK, deep = (inputs + 3) / 4 * 4;
    if (kind == INT8) {
        p.weight = keep_it(filled((size_t)(whole * deep), 1, seed));
        p.scales = keep_it(filled((size_t)outputs, 4, seed + 1));
        p.offsets = keep_it(filled((size_t)whole, 4, seed + 2));
    } else p.weight = keep_it(filled((size_t)outputs * inputs, kind == FLOAT32 ? 4 : 2, seed));
    p.bias = seed % 2 ? keep_it(filled((size_t)outputs, 4, seed + 3)) : NULL;
    return p;
}

static Mlp mlp(int kind, int inner, unsigned seed) {
    return (Mlp){product(kind, inner, HIDDEN, seed), product(kind, inner, HIDDEN, seed + 10), product(kind, HIDDEN, inner, seed + 20)};
}

/* Five, of which each row takes two, and a smaller one for all. */
static const Experts *experts(int kind) {
    Mlp *each = keep_it(malloc(6 * sizeof(Mlp)));
    for (int i = 0; i < 6; i++) each[i] = mlp(kind, i < 5 ? INNER : 35, 70 + i);
    Experts *e = keep_it(malloc(sizeof(Experts)));
    *e = (Experts){.router = product(kind == BFLOAT16 ? BFLOAT16 : FLOAT32, 6, HIDDEN, 80), .each = each, .correction = vector(5), .num_experts = 5,
                   .top_k = 2, .by_sigmoid = 1, .is_normed = 1, .has_shared = 1, .least = 0.1f, .scale = 1.5f};
    return e;
}

static int differs(int kind, int window) {
    Layer layers[LAYERS];
    for (int l = 0; l < LAYERS; l++)
        layers[l] = (Layer){.attention_norm = vector(HIDDEN), .query_norm = l ? vector(SIZE) : NULL,
                            .key_norm = l ? vector(SIZE) : NULL, .mlp_norm = vector(HIDDEN),
                            .qkv = product(kind, QKV, HIDDEN, 10 + l), .output = product(kind, HIDDEN, HEADS * SIZE, 20 + l),
                            .mlp = mlp(kind, INNER, 30 + l), .experts = l ? experts(kind) : NULL,
                            .sinks = l ? vector(HEADS) : NULL, .window = window};
    const int coarse = kind == BFLOAT16;
    Stack stack = {.layers = layers, .num_layers = LAYERS, .hidden = HIDDEN, .heads = HEADS, .key_heads = KEY_HEADS,
                         .head_size = SIZE, .inner = INNER, .cache_kind = coarse, .eps = 1e-5f, .scale = 0.3f, .gate_slope = 1.0f};
    stack.gate_limit = window ? 1.5f : 0.0f;
    Model model = {.stack = stack, .norm = vector(HIDDEN), .embedding = product(coarse ? BFLOAT16 : FLOAT32, VOCAB, HIDDEN, 2),
                   .head = product(kind, VOCAB, HIDDEN, 3)};
    const int counts[] = {6, 1, 2}, committed[] = {17, 0, 20};
    void *rows[3][2][LAYERS];
    Span spans[3];
    for (int s = 0, first = 0; s < 3; first += counts[s++]) {
        for (int which = 0; which < 2; which++)
            for (int l = 0; l < LAYERS; l++)
                rows[s][which][l] = keep_it(filled(KEY_HEADS * CAPACITY * SIZE, coarse ? 2 : 4, 60 + s + l));
        spans[s] = (Span){rows[s][0], rows[s][1], CAPACITY, first, counts[s], committed[s], 0};
    }
    const int32_t ids[ROWS] = {1, 2, 3, 76, 5, 6, 7, 8, 9}, parents[ROWS] = {-1, 0, 0, 1, -1, 3, -1, -1, 7}, wanted[] = {0, 5, 8};
    float *logits[2];
    for (int run = 0; run < 2; run++) {
        Forward f = {.batch = {.ids = ids, .parents = parents, .spans = spans, .turns = keep_it(filled(CAPACITY * SIZE, 4, 9)),
                               .num_rows = ROWS, .num_spans = 3, .num_turns = CAPACITY, .num_threads = run ? 3 : 1},
                     .wanted = wanted, .hidden = keep_it(malloc(4 * ROWS * HIDDEN)), .logits = keep_it(malloc(4 * 3 * VOCAB)),
                     .choices = keep_it(malloc(4 * 3)), .num_wanted = 3};
        f.workspace_bytes = amphista_workspace(&model, &f);
        f.workspace = keep_it(aligned_alloc(LINE, (size_t)f.workspace_bytes));
        if (amphista_forward(&model, &f)) return 1;
        logits[run] = f.logits;
    }
    return memcmp(logits[0], logits[1], 4 * 3 * VOCAB) != 0;
}

/* Blocks of a kind, packed (FINE or COARSE) or not (0), in memory of exactly their size: a product by one thread and by three, and the last row. */
static int blocks_differ(int kind, int packs) {
    enum { OUTPUTS = 35 };
    const int inputs = block_numbers(kind) == 256 ? 512 : 320;
    const size_t bytes = (size_t)(OUTPUTS * inputs / block_numbers(kind) * block_bytes(kind));
    Product p = {.weight = keep_it(filled(bytes, 1, 7)), .kind = kind, .outputs = OUTPUTS, .inputs = inputs};
    const int64_t last = OUTPUTS - 1, size = packs ? amphista_packed_size(kind, OUTPUTS, inputs) : 0;
    if (packs) {
        if (!size) return 0;
        uint8_t *to = keep_it(malloc((size_t)size));
        amphista_pack(&p, to, 3);
        p.weight = to, p.kind = packs + kind;
    }
    int wrong = 0;
    for (int n = 1; n < 20; n++) {
        float *rows = keep_it(filled((size_t)(n * inputs), 4, 8)), *out[2];
        for (int run = 0; run < 2; run++) {
            out[run] = keep_it(malloc(4 * (size_t)n * OUTPUTS));
            amphista_product(&p, rows, n, out[run], run ? 3 : 1, keep_it(malloc(4 * (size_t)(n * (inputs + 1)))));
        }
        wrong += memcmp(out[0], out[1], 4 * (size_t)n * OUTPUTS) != 0;
    }
    if (!packs) amphista_rows(&p, &last, 1, keep_it(malloc(4 * (size_t)inputs)), 1);
    return wrong;
}

static Layer layer_of(int kind, unsigned seed, int inner) {
    return (Layer){.attention_norm = vector(HIDDEN), .mlp_norm = vector(HIDDEN), .qkv = product(kind, QKV, HIDDEN, seed),
                   .output = product(kind, HIDDEN, HEADS * SIZE, seed + 2), .mlp = mlp(kind, inner, seed + 4)};
}

enum { SLOTS = 3, BLOCKS = 2, DRAFTED = 41, SHORT = 4, RANK = PAD, ASKED = 3 };

/* Three sequences, one of which has nothing to be fed, through staged layers, heads, encoder and paths. */
static int drafts_differ(int kind, int own, int depth) {
    const int coarse = kind == BFLOAT16, counts[] = {4, 0, 1}, committed[] = {17, 9, 0};
    Layer layers[LAYERS], encoder[] = {layer_of(kind, 40, 31)};
    Stage stages[LAYERS];
    Product blocks[BLOCKS * SLOTS], scores[SLOTS];
    const float *moves[SLOTS];
    for (int l = 0; l < LAYERS; l++) {
        layers[l] = layer_of(kind, 20 + l, INNER);
        stages[l] = (Stage){vector(HIDDEN), product(kind, HIDDEN, 2 * HIDDEN, 30)};
    }
    for (int b = 0; b < BLOCKS * SLOTS; b++) blocks[b] = product(kind, HIDDEN, HIDDEN, 51 + 2 * b);
    for (int k = 0; k < SLOTS; k++) {
        scores[k] = product(kind, DRAFTED, HIDDEN, 70 + k);
        moves[k] = keep_it(filled(DRAFTED * RANK, 4, 80 + k));
    }
    int32_t *ids = keep_it(malloc(4 * DRAFTED));
    for (int i = 0; i < DRAFTED; i++) ids[i] = i + 3;
    const Stack stack = {.layers = layers, .num_layers = LAYERS, .hidden = HIDDEN, .heads = HEADS, .key_heads = KEY_HEADS,
                         .head_size = SIZE, .inner = INNER, .cache_kind = coarse, .eps = 1e-5f, .scale = 0.3f, .gate_slope = 1.0f};
    Stack slots = stack;
    slots.layers = encoder, slots.num_layers = 1, slots.inner = 31;
    const Heads heads = {.stages = stack, .encoder = slots, .fusing = stages, .embedding_norm = vector(HIDDEN),
                         .slot_positions = keep_it(filled(SLOTS * HIDDEN, 4, 90)), .output_norm = vector(HIDDEN),
                         .blocks = blocks, .scores = scores, .draft_ids = ids, .embedding = product(coarse, VOCAB, HIDDEN, 2),
                         .path = {.norm = vector(HIDDEN), .reads = keep_it(filled(DRAFTED * 2 * RANK, 4, 91)), .scores = moves,
                                  .state = product(FLOAT32, 2 * RANK, HIDDEN, 93), .output = product(FLOAT32, HIDDEN, RANK, 94),
                                  .rank = RANK},
                         .num_heads = SLOTS, .num_blocks = BLOCKS, .split = 1, .has_own_scores = own, .slot_mask = own};
    void *kept[ASKED][2][LAYERS];
    float *features[ASKED], *log_probs[2];
    Span spans[ASKED];
    for (int s = 0, first = 0; s < ASKED; first += counts[s++]) {
        for (int which = 0; which < 2; which++)
            for (int l = 0; l < LAYERS; l++)
                kept[s][which][l] = keep_it(filled(KEY_HEADS * CAPACITY * SIZE, coarse ? 2 : 4, 60 + s + l));
        features[s] = keep_it(filled((size_t)(2 * padded(HIDDEN)), 4, 5));
        memset(features[s] + HIDDEN, 0, 4 * (size_t)(padded(HIDDEN) - HIDDEN));
        spans[s] = (Span){kept[s][0], kept[s][1], CAPACITY, first, counts[s], committed[s], 0};
    }
    const int32_t fed[] = {1, 76, 3, 4, 5};
    for (int run = 0; run < 2; run++) {
        Draft d = {.batch = {.ids = fed, .spans = spans, .turns = keep_it(filled(CAPACITY * SIZE, 4, 9)), .num_rows = 5,
                             .num_spans = ASKED, .num_turns = CAPACITY, .num_threads = run ? 3 : 1},
                   .hidden = keep_it(filled(5 * HIDDEN, 4, 12)), .features = features, .depth = depth, .ranks = SHORT + 2,
                   .parents = depth > 1 ? SHORT : 0, .children = depth > 1 ? 3 : 0,
                   .pending = own ? keep_it(filled(ASKED * 2 * RANK, 4, 13)) : NULL};
        float *divisors = keep_it(malloc(4 * ASKED * SLOTS));
        for (int i = 0; i < ASKED * SLOTS; i++) divisors[i] = 0.7f;
        d.divisors = divisors;
        d.tokens = keep_it(malloc(4 * ASKED * SLOTS * (SHORT + 2)));
        d.log_probs = log_probs[run] = keep_it(calloc(ASKED * SLOTS * (SHORT + 2), 4));
        d.below = keep_it(malloc(4 * ASKED * (SLOTS - 1) * SHORT * 3));
        d.log_probs_below = keep_it(malloc(4 * ASKED * (SLOTS - 1) * SHORT * 3));
        d.workspace_bytes = amphista_draft_workspace(&heads, &d);
        d.workspace = keep_it(aligned_alloc(LINE, (size_t)d.workspace_bytes));
        if (amphista_draft(&heads, &d)) return 1;
    }
    return memcmp(log_probs[0], log_probs[1], 4 * ASKED * SLOTS * (SHORT + 2)) != 0;
}

/* Draws of 1 to 200 tokens by every filter, in memory of exactly its size: by one thread and by three. */
static int draws_differ(void) {
    enum { FILTERS = 7, THREADS = 3 };
    const double top_p[FILTERS] = {1, 1, 0.9, 1, 0.5, 1e-9, 0.99}, min_p[FILTERS] = {0, 0, 0, 0.1, 0, 1, 0.01};
    int wrong = 0;
    for (int count = 1; count < 200; count += 1 + count / 8) {
        const size_t room = (size_t)count * sizeof(Kept) + (size_t)(count + GROUP - 1) / GROUP * sizeof(float);
        Drawing drawings[FILTERS];
        int64_t tokens[2][FILTERS];
        for (int i = 0; i < FILTERS; i++)
            drawings[i] = (Drawing){filled((size_t)count, 4, (unsigned)(i + count)), 7, 9, 0.01 * (1 + i % 3), top_p[i], min_p[i], i % 2 * (1 + i)};
        for (int several = 0; several < 2; several++) {
            const int threads = several ? THREADS : 1;
            char *own = malloc(room * (size_t)threads);
            amphista_draw(drawings, FILTERS, count, own, tokens[several], threads);
            free(own);
        }
        for (int i = 0; i < FILTERS; i++) {
            wrong += tokens[0][i] != tokens[1][i] || tokens[0][i] < 0 || tokens[0][i] >= count;
            free((void *)drawings[i].scores);
        }
    }
    return wrong;
}

int main(void) {
    int wrong = draws_differ();
    for (int kind = F16; kind <= IQ4_XS; kind++) wrong += blocks_differ(kind, 0) + blocks_differ(kind, FINE) + blocks_differ(kind, COARSE);
    for (head_size = 64; head_size >= 10; head_size -= 54)
        for (int kind = FLOAT32; kind <= INT8; kind++) wrong += differs(kind, 0) + differs(kind, 7);
    head_size = 10;
    for (int kind = FLOAT32; kind <= INT8; kind++)
        for (int depth = 0; depth <= SLOTS; depth++) wrong += drafts_differ(kind, depth % 2, depth);
    while (num_held) free((void *)held[--num_held]);
    puts(wrong ? "differs" : "ok");
    return wrong;
}
