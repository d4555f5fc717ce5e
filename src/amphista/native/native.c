/* The whole library: one file for the compiler. */
#include "step.c"
#include "drafter.c"
