/* Kinds of weights. */
#ifndef AMPHISTA_BLOCKS_H
#define AMPHISTA_BLOCKS_H
enum { FLOAT32 = 0, BFLOAT16 = 1, INT8 = 2 };
enum { WIDEN_MOST = 1 };
static inline long block_numbers(int kind) { return kind ? 32 : 1; }
static inline long block_bytes(int kind) { return kind ? 34 : 4; }
#endif
