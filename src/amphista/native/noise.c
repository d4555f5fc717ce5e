/* Random bits as numpy's Philox4x64-10 (Salmon et al., "Parallel random numbers: as easy as 1, 2, 3", 2011) gives them:
 * four words of 64 bits for each block of a counter, which is raised before the first. */
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
#else
int amphista_random_bits(uint64_t seed, uint64_t position, const int64_t *places, int64_t count, uint64_t *out) {
    (void)seed, (void)position, (void)places, (void)count, (void)out;
    return 0;
}
#endif
