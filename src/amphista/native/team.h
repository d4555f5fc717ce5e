/* A team of threads that goes through the stages of one call together, and the room it works in.
 *
 * One parallel region a call. In each stage threads take pieces of work (blocks of outputs, rows, heads) from counters,
 * and meet at a barrier behind it, where they spin for a moment, then yield.
 */
#ifndef AMPHISTA_TEAM_H
#define AMPHISTA_TEAM_H

#include <sched.h>
#include <stdatomic.h>
#include <stdint.h>
#ifdef _OPENMP
#include <omp.h>
#endif

#include "tiles.h"

enum { SPINS = 4000, NEIGHBOURS = 3, LINE = 64 };

typedef struct {
    atomic_int arrived, round;
    _Atomic int64_t waited; /* by all, in nanoseconds, where a moment was not enough */
    int team;
} Barrier;

/* The pieces of one stage that one thread begins with: next to be taken, and the first of the next thread's. */
typedef struct {
    atomic_int next;
    int end;
    char apart[LINE - 8];
} Share;

static double seconds(void) {
#ifdef _OPENMP
    return omp_get_wtime();
#else
    return 0;
#endif
}

static void wait_for_all(Barrier *barrier) {
    if (barrier->team == 1) return;
    const int round = atomic_load_explicit(&barrier->round, memory_order_relaxed);
    if (atomic_fetch_add_explicit(&barrier->arrived, 1, memory_order_acq_rel) == barrier->team - 1) {
        atomic_store_explicit(&barrier->arrived, 0, memory_order_relaxed);
        atomic_store_explicit(&barrier->round, round + 1, memory_order_release);
        return;
    }
    double since = 0;
    for (int spins = 0; atomic_load_explicit(&barrier->round, memory_order_acquire) == round; spins++) {
        if (spins == SPINS) since = seconds();
        if (spins >= SPINS) sched_yield();
#if defined(__x86_64__)
        else _mm_pause();
#endif
    }
    if (since > 0)
        atomic_fetch_add_explicit(&barrier->waited, (int64_t)((seconds() - since) * 1e9), memory_order_relaxed);
}

/* One thread's way through the stages. */
typedef struct {
    Share *shares;
    Barrier *barrier;
    int thread, team, stage, hops;
} Worker;

/* Meets all others behind a stage; the next one has so many pieces. Its shares are written before, where nobody takes
 * any more: two sets in turn are enough. */
static void meet(Worker *worker, int pieces) {
    const int thread = worker->thread, team = worker->team;
    Share *own = worker->shares + ++worker->stage % 2 * team + thread;
    own->end = (int)((long)pieces * (thread + 1) / team);
    atomic_store_explicit(&own->next, (int)((long)pieces * thread / team), memory_order_relaxed);
    worker->hops = 0;
    if (MUTANT(LATE_THREAD) && thread)
        for (const double end = seconds() + 2e-3; seconds() < end;) continue;
    wait_for_all(worker->barrier);
}

/* The next piece of work, or -1. Each thread takes those of its own stretch, in their order, as memory likes it; then
 * what its neighbours have not come to. */
INLINE int take(Worker *worker) {
    Share *shares = worker->shares + worker->stage % 2 * worker->team;
    for (; worker->hops <= NEIGHBOURS && worker->hops < worker->team; worker->hops++) {
        Share *share = shares + (worker->thread + worker->hops) % worker->team;
        if (atomic_load_explicit(&share->next, memory_order_relaxed) >= share->end) continue;
        const int piece = atomic_fetch_add_explicit(&share->next, 1, memory_order_relaxed);
        if (piece < share->end) return piece;
    }
    return -1;
}

static void run_with_tiles(void (*run)(const void *call, Worker *worker), const void *call, Worker worker) {
    const TileSetting before = begin_tiles();
    run(call, &worker);
    end_tiles(&before);
}

/* Does a call with so many threads, or as many as there are; how many they were. shares: [2][threads]; waited: seconds
 * for which a thread waited for others, on average, or NULL. */
static int together(int threads, Share *shares, void (*run)(const void *call, Worker *worker), const void *call,
                    double *waited) {
    Barrier barrier = {.team = 1};
#ifdef _OPENMP
#pragma omp parallel num_threads(threads)
    {
#pragma omp single
        barrier.team = omp_get_num_threads();
        run_with_tiles(run, call, (Worker){shares, &barrier, omp_get_thread_num(), barrier.team, 0, 0});
    }
#else
    (void)threads;
    run_with_tiles(run, call, (Worker){shares, &barrier, 0, 1, 0, 0});
#endif
    if (waited) *waited = (double)atomic_load_explicit(&barrier.waited, memory_order_relaxed) * 1e-9 / barrier.team;
    return barrier.team;
}

/* Ends the threads that work with the calling one. */
void amphista_leave_team(void) {
#if defined(_OPENMP) && (__GNUC__ >= 9 || __clang_major__ >= 9)
    omp_pause_resource_all(omp_pause_soft);
#endif
}

/* A workspace that is handed out piece by piece; without a base (NULL) only its size is counted. */
typedef struct {
    char *base;
    size_t used;
} Room;

static void *take_room(Room *room, size_t bytes) {
    void *place = room->base ? room->base + room->used : NULL;
    room->used += (bytes + LINE - 1) / LINE * LINE;
    return place;
}

/* As much for each thread: the addresses. */
static void *own_room(Room *room, int threads, size_t bytes) {
    void **places = take_room(room, sizeof(void *) * (size_t)threads);
    for (int t = 0; t < threads; t++) {
        void *place = take_room(room, bytes);
        if (places) places[t] = place;
    }
    return places;
}

#endif
