/* Matrix units of x86 (AMX): dots of up to 32 rows with 32 outputs at a time, in 8 bits and in bfloat16.
 *
 * A thread that uses the units puts their setting back, as other libraries of the process (oneDNN) use them, too.
 */
#ifndef AMPHISTA_TILES_H
#define AMPHISTA_TILES_H

#include "lanes.h"

enum { TILE_ROWS = 16, LEAST_TILE_ROWS = 9 }; /* of 8 bits: fewer rows are as quick or quicker by vectors */

#if defined(__AMX_INT8__) && defined(__AMX_BF16__) && defined(__AMX_TILE__) && defined(__linux__) && LANES == 16
#define HAVE_TILES
#include <sys/syscall.h>
long syscall(long number, ...); /* unistd.h names it only beyond C11 */

enum { TILE_AHEAD = 16 << 10, ASK_FOR_PERMISSION = 0x1023, TILE_DATA = 18 };

typedef struct {
    uint8_t palette, first_row, reserved[14];
    uint16_t bytes[16];
    uint8_t rows[16];
} TileSetting;

static int may_use_tiles = 0; /* Linux gives their room only to processes that ask; not every sandbox lets them */
static _Thread_local int tile_key = 0; /* what this thread's tiles are set for; 0: nothing of ours */

__attribute__((constructor)) static void ask_for_tiles(void) {
    may_use_tiles = syscall(SYS_arch_prctl, ASK_FOR_PERMISSION, TILE_DATA) == 0;
}

INLINE TileSetting begin_tiles(void) {
    TileSetting before = {0};
    if (may_use_tiles) _tile_storeconfig(&before);
    tile_key = 0;
    return before;
}

INLINE void end_tiles(const TileSetting *before) {
    if (tile_key) _tile_loadconfig(before);
    tile_key = 0;
}

/* Tiles of 16 rows of 64 bytes but for those of a call's rows, or of their sums. `key` names the setting. */
static void set_tiles(int key, const uint8_t *rows, const uint16_t *bytes) {
    if (key == tile_key) return;
    TileSetting setting = {.palette = 1};
    memcpy(setting.rows, rows, 8);
    memcpy(setting.bytes, bytes, 8 * sizeof *bytes);
    _tile_loadconfig(&setting);
    tile_key = key;
}

/* The first half of more than 16 rows, or all of them. */
INLINE int first_of(int rows) { return rows > TILE_ROWS ? (rows + 1) / 2 : rows; }

/* Whole-number dots of up to 32 rows of unsigned bytes with 32 outputs [inputs / 4][32][4]: out[rows][32]. */
static void int8_tile_dots(const int8_t *w, const uint8_t *x, long ldx, int rows, long inputs, int32_t *out) {
    const uint8_t first = (uint8_t)first_of(rows), other = rows > first ? (uint8_t)(rows - first) : 1;
    const uint8_t counts[8] = {first, other, TILE_ROWS, TILE_ROWS, first, first, other, other};
    const uint16_t bytes[8] = {64, 64, 64, 64, 64, 64, 64, 64};
    set_tiles(rows, counts, bytes);
    const uint8_t *others = x + first * ldx;
    _tile_zero(4);
    _tile_zero(5);
    if (rows > first) {
        _tile_zero(6);
        _tile_zero(7);
        for (long i = 0; i < inputs; i += 64, w += 64 * 32) {
            _tile_loadd(0, x + i, ldx);
            _tile_loadd(2, w, 128);
            _tile_loadd(3, w + 64, 128);
            _tile_dpbusd(4, 0, 2);
            _tile_loadd(1, others + i, ldx);
            _tile_dpbusd(5, 0, 3);
            _tile_dpbusd(6, 1, 2);
            _tile_dpbusd(7, 1, 3);
        }
        _tile_stored(6, out + first * 32, 128);
        _tile_stored(7, out + first * 32 + 16, 128);
    } else {
        for (long i = 0; i < inputs; i += 64, w += 64 * 32) {
            for (int line = 0; line < 32; line++) __builtin_prefetch(w + TILE_AHEAD + 64 * line, 0, 2);
            _tile_loadd(0, x + i, ldx);
            _tile_loadd(2, w, 128);
            _tile_loadd(3, w + 64, 128);
            _tile_dpbusd(4, 0, 2);
            _tile_dpbusd(5, 0, 3);
        }
    }
    _tile_stored(4, out, 128);
    _tile_stored(5, out + 16, 128);
}

/* Dots of up to 32 rows of bfloat16 in pairs, [inputs / 2][rows][2], with 32 weight rows [inputs]: out[32][32], outputs
 * first. A sum's order is that of the inputs, whatever other rows there are. */
static void bf16_tile_dots(const uint16_t *w, const uint32_t *x, int rows, long inputs, float (*out)[32]) {
    const int first = first_of(rows), other = rows > first ? rows - first : 1;
    const uint8_t counts[8] = {16, 16, 16, 16, 16, 16, 16, 16};
    const uint16_t bytes[8] = {64, 64, (uint16_t)(4 * first), (uint16_t)(4 * other),
                               (uint16_t)(4 * first), (uint16_t)(4 * first), (uint16_t)(4 * other), (uint16_t)(4 * other)};
    set_tiles(rows + 2 * TILE_ROWS, counts, bytes);
    const uint16_t *lower = w + TILE_ROWS * inputs;
    const char *ahead = (const char *)(w + 2 * TILE_ROWS * inputs);
    _tile_zero(4);
    _tile_zero(5);
    if (rows > first) {
        _tile_zero(6);
        _tile_zero(7);
        for (long i = 0; i < inputs; i += 32) {
            _tile_loadd(0, w + i, 2 * inputs);
            _tile_loadd(2, x + i / 2 * rows, 4 * rows);
            _tile_dpbf16ps(4, 0, 2);
            _tile_loadd(1, lower + i, 2 * inputs);
            _tile_dpbf16ps(5, 1, 2);
            _tile_loadd(3, x + i / 2 * rows + first, 4 * rows);
            _tile_dpbf16ps(6, 0, 3);
            _tile_dpbf16ps(7, 1, 3);
        }
        _tile_stored(6, out[0] + first, 128);
        _tile_stored(7, out[16] + first, 128);
    } else {
        for (long i = 0; i < inputs; i += 32, ahead += 32 * 64) {
            for (int line = 0; line < 32; line++) __builtin_prefetch(ahead + 64 * line, 0, 2);
            _tile_loadd(2, x + i / 2 * rows, 4 * rows);
            _tile_loadd(0, w + i, 2 * inputs);
            _tile_loadd(1, lower + i, 2 * inputs);
            _tile_dpbf16ps(4, 0, 2);
            _tile_dpbf16ps(5, 1, 2);
        }
    }
    _tile_stored(4, out[0], 128);
    _tile_stored(5, out[16], 128);
}
#else
enum { may_use_tiles = 0 };
typedef int TileSetting;
INLINE TileSetting begin_tiles(void) { return 0; }
INLINE void end_tiles(const TileSetting *before) { (void)before; }
INLINE void int8_tile_dots(const int8_t *w, const uint8_t *x, long ldx, int rows, long inputs, int32_t *out) {
    (void)w, (void)x, (void)ldx, (void)rows, (void)inputs, (void)out;
}
INLINE void bf16_tile_dots(const uint16_t *w, const uint32_t *x, int rows, long inputs, float (*out)[32]) {
    (void)w, (void)x, (void)rows, (void)inputs, (void)out;
}
#endif

#endif
