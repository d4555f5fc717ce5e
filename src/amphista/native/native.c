/* The whole library: one file for the compiler. */
#include "weights.c"
#include "step.c"
#include "drafter.c"
#include "training.c"
#include "noise.c"
