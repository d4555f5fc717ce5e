/* Random bits as numpy's Philox4x64-10 (Salmon et al., "Parallel random numbers: as easy as 1, 2, 3", 2011) gives them:
 * four words of 64 bits for each block of a counter, which is raised before the first. */
#include <math.h>
#include <stdint.h>
#include <string.h>

#ifdef __SIZEOF_INT128__
__extension__ typedef unsigned __int128 Wide;

static void random_block(uint64_t seed, uint64_t position, uint64_t block, uint64_t *words) {
    uint64_t w = block + 1, x = position, y = 0, z = 0, key = seed, other = 0;
    for (int round = 0; round < 10; round++, key += 0x9E3779B97F4A7C15u, other += 0xBB67AE8584CAA73Bu) {
        const Wide a = (Wide)0xD2E7470EE14C6C93u * w, b = (Wide)0xCA5A826395121157u * y;
        w = (uint64_t)(b >> 64) ^ x ^ key, y = (uint64_t)(a >> 64) ^ z ^ other;
        x = (uint64_t)b, z = (uint64_t)a;
    }
    words[0] = w, words[1] = x, words[2] = y, words[3] = z;
}

/* out[count]: the words of some places, or (NULL) of the first; 1, or 0 where this compiler cannot. */
int amphista_random_bits(uint64_t seed, uint64_t position, const int64_t *places, int64_t count, uint64_t *out) {
    uint64_t words[4];
    for (int64_t i = 0; places && i < count; i++) {
        random_block(seed, position, (uint64_t)places[i] / 4, words);
        out[i] = words[places[i] % 4];
    }
    for (int64_t i = 0; !places && i < count; i += 4) {
        random_block(seed, position, (uint64_t)i / 4, words);
        memcpy(out + i, words, count - i < 4 ? 8 * (size_t)(count - i) : sizeof words);
    }
    return 1;
}

/* Of each of successive positions the word of one place: 1, or 0. */
int amphista_bits_along(uint64_t seed, uint64_t position, const int64_t *places, int64_t count, uint64_t *out) {
    for (int64_t i = 0; i < count; i++) amphista_random_bits(seed, position + (uint64_t)i, places + i, 1, out + i);
    return 1;
}

/* -- whose score and noise together may be the best ----------------------------------------------------------------- */

enum { LEVELS_OF_NOISE = 65, AT_A_TIME = 4096 };

/* What a token's score has to reach, by the zeros before what its 52 bits lack of all ones: n of these bound its noise,
 * -log(-log(u)) <= -log(1 - u), by (n - 11) log 2. `reach`: score and noise of some token, relative to the best score. */
static void least_scores(double reach, double top, double temperature, float *least) {
    for (int n = 0; n < LEVELS_OF_NOISE; n++)
        least[n] = nextafterf((float)(top + temperature * (reach - 1e-6 - (n - 11) * 0.6931471805599453)), -INFINITY);
}

static int zeros_of(uint64_t word) {
    const uint64_t lacks = (UINT64_C(1) << 52) - 1 - (word >> 12);
    return lacks ? __builtin_clzll(lacks) : 64;
}

static double noise_of(uint64_t word) { return -log(-log(((double)(word >> 12) + 0.5) * 0x1p-52)); }

/* Tokens whose score / temperature + noise may be the largest, in no order, with their words; the number of all, of which
 * only `room` are told. scores: float32 and finite or -inf, the best of which is scores[best]. -1: this compiler cannot. */
int64_t amphista_may_win(uint64_t seed, uint64_t position, const float *scores, int64_t count, int64_t best,
                         double temperature, int64_t room, int64_t *tokens, uint64_t *bits, int threads) {
    const double top = scores[best];
    int64_t found = 0;
    uint64_t words[4];
    random_block(seed, position, (uint64_t)best / 4, words);
    const double first = noise_of(words[best % 4]);
    (void)threads;
#pragma omp parallel num_threads(threads)
    {
        float least[LEVELS_OF_NOISE];
        double reach = first;
        least_scores(reach, top, temperature, least);
#pragma omp for schedule(dynamic, 1)
        for (int64_t start = 0; start < count; start += AT_A_TIME)
            for (int64_t i = start; i < start + AT_A_TIME && i < count; i += 4) {
                uint64_t own[4];
                random_block(seed, position, (uint64_t)i / 4, own);
                for (int64_t t = i; t < i + 4 && t < count; t++) {
                    if (!(scores[t] >= least[zeros_of(own[t - i])])) continue;
                    const double value = (scores[t] - top) / temperature + noise_of(own[t - i]);
                    if (value > reach) least_scores(reach = value, top, temperature, least);
                    int64_t at;
#pragma omp atomic capture
                    at = found++;
                    if (at < room) tokens[at] = t, bits[at] = own[t - i];
                }
            }
    }
    return found;
}
#else
int64_t amphista_may_win(uint64_t seed, uint64_t position, const float *scores, int64_t count, int64_t best,
                         double temperature, int64_t room, int64_t *tokens, uint64_t *bits, int threads) {
    (void)seed, (void)position, (void)scores, (void)count, (void)best, (void)temperature, (void)room, (void)tokens, (void)bits;
    return (void)threads, -1;
}

int amphista_random_bits(uint64_t seed, uint64_t position, const int64_t *places, int64_t count, uint64_t *out) {
    (void)seed, (void)position, (void)places, (void)count, (void)out;
    return 0;
}
int amphista_bits_along(uint64_t seed, uint64_t position, const int64_t *places, int64_t count, uint64_t *out) {
    return amphista_random_bits(seed, position, places, count, out);
}
#endif
