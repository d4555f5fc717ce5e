/* A small model of odd sizes in memory of exactly its size, and trees of three sequences through all types of weights:
 * run under AddressSanitizer and UndefinedBehaviorSanitizer. Prints "ok" where a forward of one thread and one of three
 * agree to the bit, too. */
#include <stdio.h>
#include <stdlib.h>

#include "step.c"

enum { LAYERS = 2, HIDDEN = 36, INNER = 50, HEADS = 4, KEY_HEADS = 2, SIZE = 10, VOCAB = 77, CAPACITY = 23, ROWS = 9 };
enum { QKV = (HEADS + 2 * KEY_HEADS) * SIZE };

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

static const void *held[4096];
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

static int differs(int kind, int window) {
    Layer layers[LAYERS];
    for (int l = 0; l < LAYERS; l++)
        layers[l] = (Layer){.attention_norm = vector(HIDDEN), .query_norm = l ? vector(SIZE) : NULL,
                            .key_norm = l ? vector(SIZE) : NULL, .mlp_norm = vector(HIDDEN),
                            .qkv = product(kind, QKV, HIDDEN, 10 + l), .output = product(kind, HIDDEN, HEADS * SIZE, 20 + l),
                            .gate = product(kind, INNER, HIDDEN, 30 + l), .up = product(kind, INNER, HIDDEN, 40 + l),
                            .down = product(kind, HIDDEN, INNER, 50 + l), .window = window};
    const int coarse = kind == BFLOAT16;
    Model model = {.layers = layers, .norm = vector(HIDDEN), .embedding = product(coarse ? BFLOAT16 : FLOAT32, VOCAB, HIDDEN, 2),
                   .head = product(kind, VOCAB, HIDDEN, 3), .num_layers = LAYERS, .hidden = HIDDEN, .heads = HEADS,
                   .key_heads = KEY_HEADS, .head_size = SIZE, .inner = INNER, .cache_kind = coarse, .eps = 1e-5f, .scale = 0.3f};
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
        Forward f = {.ids = ids, .parents = parents, .spans = spans, .wanted = wanted, .turns = keep_it(filled(CAPACITY * SIZE, 4, 9)),
                     .hidden = keep_it(malloc(4 * ROWS * HIDDEN)), .logits = keep_it(malloc(4 * 3 * VOCAB)),
                     .choices = keep_it(malloc(4 * 3)), .num_rows = ROWS, .num_spans = 3, .num_wanted = 3, .num_turns = CAPACITY,
                     .num_threads = run ? 3 : 1};
        f.workspace_bytes = amphista_workspace(&model, &f);
        f.workspace = keep_it(aligned_alloc(LINE, (size_t)f.workspace_bytes));
        if (amphista_forward(&model, &f)) return 1;
        logits[run] = f.logits;
    }
    return memcmp(logits[0], logits[1], 4 * 3 * VOCAB) != 0;
}

/* Blocks of a kind in memory of exactly their size: a product by one thread and by three, and the last row. */
static int blocks_differ(int kind) {
    enum { OUTPUTS = 35, INPUTS = 512 };
    const size_t bytes = (size_t)(OUTPUTS * INPUTS / block_numbers(kind) * block_bytes(kind));
    const Product p = {.weight = keep_it(filled(bytes, 1, 7)), .kind = kind, .outputs = OUTPUTS, .inputs = INPUTS};
    const int64_t last = OUTPUTS - 1;
    int wrong = 0;
    for (int n = 1; n < 10; n++) {
        float *rows = keep_it(filled((size_t)n * INPUTS, 4, 8)), *out[2];
        for (int run = 0; run < 2; run++) {
            out[run] = keep_it(malloc(4 * (size_t)n * OUTPUTS));
            amphista_product(&p, rows, n, out[run], run ? 3 : 1);
        }
        wrong += memcmp(out[0], out[1], 4 * (size_t)n * OUTPUTS) != 0;
    }
    amphista_rows(&p, &last, 1, keep_it(malloc(4 * INPUTS)), 1);
    return wrong;
}

int main(void) {
    int wrong = 0;
    for (int kind = F16; kind <= Q6_K; kind++) wrong += blocks_differ(kind);
    for (int kind = FLOAT32; kind <= INT8; kind++) wrong += differs(kind, 0) + differs(kind, 7);
    while (num_held) free((void *)held[--num_held]);
    puts(wrong ? "differs" : "ok");
    return wrong;
}
