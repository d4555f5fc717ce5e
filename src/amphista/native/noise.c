/* Keyed noise: words of 64 bits by (seed, position, token), made of two streams of numpy's Philox4x64-10 (Salmon et al.,
 * "Parallel random numbers: as easy as 1, 2, 3", 2011), four words for each block of a counter, which is raised before the
 * first. A token's first 16 bits come from the one, its other 48 from the other: 16 tokens a block tell nearly all of what
 * their noise can be, and few need more. */
#include <math.h>
#include <stdint.h>
#include <string.h>
#ifdef _OPENMP
#include <omp.h>
#endif

#include "lanes.h"

#ifdef __SIZEOF_INT128__
__extension__ typedef unsigned __int128 Wide;

static void random_block(uint64_t seed, uint64_t position, uint64_t stream, uint64_t block, uint64_t *words) {
    uint64_t w = block + 1, x = position, y = stream, z = 0, key = seed, other = 0;
    for (int round = 0; round < 10; round++, key += 0x9E3779B97F4A7C15u, other += 0xBB67AE8584CAA73Bu) {
        const Wide a = (Wide)0xD2E7470EE14C6C93u * w, b = (Wide)0xCA5A826395121157u * y;
        w = (uint64_t)(b >> 64) ^ x ^ key, y = (uint64_t)(a >> 64) ^ z ^ other;
        x = (uint64_t)b, z = (uint64_t)a;
    }
    words[0] = w, words[1] = x, words[2] = y, words[3] = z;
}

static uint64_t first_bits(uint64_t seed, uint64_t position, int64_t token) {
    uint64_t words[4];
    random_block(seed, position, 0, (uint64_t)token / 16, words);
    return words[token % 16 / 4] >> 16 * (token % 4) & 0xffff;
}

static uint64_t other_bits(uint64_t seed, uint64_t position, int64_t token) {
    uint64_t words[4];
    random_block(seed, position, 1, (uint64_t)token / 4, words);
    return words[token % 4] >> 16;
}

/* out[count]: of some tokens, each at a position of its own; 1, or 0 where this compiler cannot. */
int amphista_noise_bits(uint64_t seed, int64_t count, const uint64_t *positions, const int64_t *tokens, uint64_t *out) {
    for (int64_t i = 0; i < count; i++)
        out[i] = first_bits(seed, positions[i], tokens[i]) << 48 | other_bits(seed, positions[i], tokens[i]);
    return 1;
}

/* -- the choice ----------------------------------------------------------------------------------------------------- */

enum { GROUP = 64, BROKEN = -1, NOTHING = -2 };
static const double MOST_NOISE = 36.75, SLACK = 1e-3; /* -log(-log(1 - 2^-53)) is below; far above what float32 rounds */

/* A row of scores, and how to choose of it; top_k 0, top_p 1 and min_p 0 are off. */
typedef struct {
    const float *scores;
    uint64_t seed, position;
    double temperature, top_p, min_p;
    int64_t top_k;
} Drawing;

typedef struct {
    float score, weight;
    int32_t token;
} Kept;

typedef struct {
    double value;
    int64_t token;
} Best;

static double noise_of(uint64_t bits) { return -log(-log(((double)(bits >> 12) + 0.5) * 0x1p-52)); }

/* Noise is at most -log(1 - u), and 1 - u above c / 2^16 where the first 16 bits lack c of all ones. */
static double most_noise_of(uint64_t first) {
    const uint32_t lacks = 65535 - (uint32_t)first;
    return lacks ? (__builtin_clz(lacks) - 15) * 0.69314718056 : MOST_NOISE;
}

static void consider(const Drawing *drawing, double top, float score, int64_t token, Best *best) {
    const double below = ((double)score - top) / drawing->temperature;
    const uint64_t first = first_bits(drawing->seed, drawing->position, token);
    if (below + most_noise_of(first) < best->value - SLACK) return;
    const double value = below + noise_of(first << 48 | other_bits(drawing->seed, drawing->position, token));
    if (value > best->value || (value == best->value && token < best->token)) best->value = value, best->token = token;
}

/* The best score, and of each group; NaN where a score is. */
static float peaks(const float *scores, int64_t count, float *of) {
    vec top = all(-INFINITY);
    ivec broken = {0};
    for (int64_t start = 0; start < count; start += GROUP) {
        vec best = all(-INFINITY);
        for (int64_t i = start; i < start + GROUP && i < count; i += LANES) {
            const long left = count - i;
            vec some = left >= LANES ? load(scores + i) : load_part(scores + i, left);
            for (long lane = left; lane < LANES; lane++) some[lane] = -INFINITY;
            broken |= (ivec)(some != some);
            best = larger(some, best);
        }
        of[start / GROUP] = largest(best);
        top = larger(best, top);
    }
    return any_lane(broken) ? NAN : largest(top);
}

/* Which of LANES tokens may reach `least`, by their scores and the first 16 bits of their noise, as above: a float's own
 * bits are its logarithm, or a little less. */
static ivec may_reach(vec scores, const uint16_t *bits, vec top, vec inverse, vec least) {
    half some;
    memcpy(&some, bits, sizeof some);
    const vec lacks = __builtin_convertvector((ivec)(65535 - __builtin_convertvector(some, uvec)), vec);
    const vec log2 = __builtin_convertvector((ivec)lacks, vec) * 0x1p-23f - 127.0f;
    const vec most = (scores - top) * inverse + (16.0f - log2) * 0.69314718f;
    return ~(ivec)(most < least);
}

/* Of all tokens. */
static int64_t draw_of_all(const Drawing *drawing, int64_t count, const float *of, float top) {
    const float inverse = (float)(1 / drawing->temperature);
    Best best = {-INFINITY, NOTHING};
    int64_t first = 0;
    while (of[first / GROUP] != top) first += GROUP;
    while (drawing->scores[first] != top) first++;
    consider(drawing, top, top, first, &best);
    for (int64_t start = 0; start < count; start += GROUP) {
        if ((of[start / GROUP] - top) * inverse + MOST_NOISE < best.value - SLACK) continue;
        uint64_t words[GROUP / 4];
        for (int block = 0; block < GROUP / 16; block++)
            random_block(drawing->seed, drawing->position, 0, (uint64_t)(start / 16 + block), words + 4 * block);
        for (int64_t i = start; i < start + GROUP && i < count; i += LANES) {
            const long left = count - i < LANES ? count - i : LANES;
            const vec some = left == LANES ? load(drawing->scores + i) : load_part(drawing->scores + i, left);
            const vec least = all((float)(best.value - SLACK));
            const ivec may = may_reach(some, (const uint16_t *)words + (i - start), all(top), all(inverse), least);
            if (any_lane(may))
                for (long lane = 0; lane < left; lane++)
                    if (may[lane]) consider(drawing, top, some[lane], i + lane, &best);
        }
    }
    return best.token;
}

/* All tokens with scores of at least so much; their number. */
static int64_t gather(const float *scores, int64_t count, const float *of, float least, Kept *kept) {
    int64_t number = 0;
    for (int64_t start = 0; start < count; start += GROUP) {
        if (of[start / GROUP] < least) continue;
        for (int64_t i = start; i < start + GROUP && i < count; i++)
            if (scores[i] >= least) kept[number++] = (Kept){scores[i], 1, (int32_t)i};
    }
    return number;
}

static int is_better(Kept a, Kept b) { return a.score > b.score || (a.score == b.score && a.token < b.token); }

/* The fewest of the best whose weights together reach `wanted` come to the front; their number. Halves are told apart by a
 * pivot, and only the one in which the last of them lies is looked at again. */
static int64_t bring_best(Kept *kept, int64_t count, double wanted) {
    int64_t low = 0, high = count;
    double reached = 0;
    uint32_t random = 1;
    while (low < high && reached < wanted) {
        random = random * 1664525u + 1013904223u;
        const int64_t at = low + (int64_t)((uint64_t)random * (uint64_t)(high - low) >> 32);
        const Kept pivot = kept[at];
        kept[at] = kept[high - 1];
        int64_t middle = low;
        double weight = 0;
        for (int64_t i = low; i < high - 1; i++) {
            const Kept one = kept[i];
            if (!is_better(one, pivot)) continue;
            weight += one.weight, kept[i] = kept[middle], kept[middle++] = one;
        }
        kept[high - 1] = kept[middle], kept[middle] = pivot;
        if (reached + weight >= wanted) high = middle;
        else reached += weight + pivot.weight, low = middle + 1;
    }
    return low;
}

/* The least of the `number` best; -inf where there are not so many. */
static float least_of_best(Kept *kept, int64_t count, int64_t number) {
    if (number > count) return -INFINITY;
    bring_best(kept, count, (double)number);
    float least = INFINITY;
    for (int64_t i = 0; i < number; i++) least = kept[i].score < least ? kept[i].score : least;
    return least;
}

/* e to the power of (score - top) / temperature, of LANES scores. */
INLINE vec weights(vec scores, float top, float inverse) { return exponential((scores - top) * inverse); }

static double weigh(Kept *kept, int64_t count, float top, float inverse) {
    double total = 0;
    for (int64_t i = 0; i < count; i += LANES) {
        vec some = {0};
        for (int lane = 0; lane < LANES && i + lane < count; lane++) some[lane] = kept[i + lane].score;
        some = weights(some, top, inverse);
        for (int lane = 0; lane < LANES && i + lane < count; lane++) total += kept[i + lane].weight = some[lane];
    }
    return total;
}

static double weight_of_all(const float *scores, int64_t count, float top, float inverse) {
    double total = 0;
    int64_t start = 0;
    for (; start + GROUP <= count; start += GROUP) {
        vec some = {0};
        for (int64_t i = start; i < start + GROUP; i += LANES) some += weights(load(scores + i), top, inverse);
        total += sum(some);
    }
    for (; start < count; start++) total += weights(all(scores[start]), top, inverse)[0];
    return total;
}

/* A little below top + temperature log(weight): tokens below weigh less than that. */
static float far_below(const Drawing *drawing, double top, double weight) {
    const double bound = top + drawing->temperature * (log(weight) - SLACK);
    return nextafterf((float)bound, -INFINITY);
}

/* Of the tokens that top-k, top-p and min-p leave. */
static int64_t draw_of_some(const Drawing *drawing, int64_t count, const float *of, float top, Kept *kept) {
    const float inverse = (float)(1 / drawing->temperature);
    const int has_top_k = drawing->top_k > 0 && drawing->top_k < count;
    float least = -INFINITY;
    double total = 0;
    int64_t number;
    if (has_top_k) { /* as many groups have a token of this much, at least */
        const int64_t groups = (count + GROUP - 1) / GROUP;
        for (int64_t i = 0; i < groups; i++) kept[i] = (Kept){of[i], 1, (int32_t)i};
        number = gather(drawing->scores, count, of, least_of_best(kept, groups, drawing->top_k), kept);
        least = least_of_best(kept, number, drawing->top_k);
        number = gather(drawing->scores, count, of, least, kept); /* with all that equal the last */
    } else {
        if (drawing->top_p < 1) { /* all below together are less than what may be left out */
            total = weight_of_all(drawing->scores, count, top, inverse);
            least = far_below(drawing, top, (1 - drawing->top_p) * total / (double)count);
        }
        if (drawing->min_p > 0) least = fmaxf(least, far_below(drawing, top, drawing->min_p));
        number = gather(drawing->scores, count, of, least, kept);
    }
    if (drawing->top_p < 1) {
        const double some = weigh(kept, number, top, inverse);
        number = bring_best(kept, number, drawing->top_p * (has_top_k ? some : total));
    }
    const double enough = drawing->min_p > 0 ? top / drawing->temperature + log(drawing->min_p) : -INFINITY;
    Best best = {-INFINITY, NOTHING};
    for (int64_t i = 0; i < number; i++)
        if (kept[i].score / drawing->temperature >= enough) consider(drawing, top, kept[i].score, kept[i].token, &best);
    return best.token;
}

/* tokens[rows]: the choice of each row of `count` scores, that with the largest score / temperature + noise of those that
 * filters leave, the first of equals; BROKEN where scores are no numbers, NOTHING where all are -inf. room: of each thread,
 * for `count` Kept and a float for each group. Returns 1, or 0 where this compiler cannot. */
int amphista_draw(const Drawing *drawings, int64_t rows, int64_t count, char *room, int64_t *tokens, int threads) {
    const int64_t groups = (count + GROUP - 1) / GROUP;
    const size_t size = (size_t)count * sizeof(Kept) + (size_t)groups * sizeof(float);
    (void)threads;
#pragma omp parallel for schedule(dynamic, 1) num_threads(threads) if (rows > 1)
    for (int64_t row = 0; row < rows; row++) {
#ifdef _OPENMP
        char *own = room + (size_t)omp_get_thread_num() * size;
#else
        char *own = room;
#endif
        const Drawing *drawing = drawings + row;
        Kept *kept = (Kept *)own;
        float *of = (float *)(kept + count);
        const float top = peaks(drawing->scores, count, of);
        const int is_filtered = drawing->top_k || drawing->top_p < 1 || drawing->min_p > 0;
        if (top != top || top == INFINITY) tokens[row] = BROKEN;
        else if (top == -INFINITY) tokens[row] = NOTHING;
        else tokens[row] = is_filtered ? draw_of_some(drawing, count, of, top, kept) : draw_of_all(drawing, count, of, top);
    }
    return 1;
}
#else
int amphista_noise_bits(uint64_t seed, int64_t count, const uint64_t *positions, const int64_t *tokens, uint64_t *out) {
    (void)seed, (void)count, (void)positions, (void)tokens, (void)out;
    return 0;
}
int amphista_draw(const void *drawings, int64_t rows, int64_t count, char *room, int64_t *tokens, int threads) {
    (void)drawings, (void)rows, (void)count, (void)room, (void)tokens;
    return threads & 0;
}
#endif
