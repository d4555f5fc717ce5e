/* A team of threads that goes through the stages of one call together, and the room it works in.
 *
 * One parallel region a call. In each stage threads take pieces of work (blocks of outputs, rows, heads) from counters,
 * and meet at a barrier behind it, where they spin for a moment, then yield.
 */
#ifndef AMPHISTA_TEAM_H
#define AMPHISTA_TEAM_H

#include <sched.h>
#include <stdatomic.h>
#ifdef _OPENMP
#include <omp.h>
#endif

#include "tiles.h"

enum { SPINS = 4000, NEIGHBOURS = 3, LINE = 64 };

typedef struct {
    atomic_int arrived, round;
    atomic_long waited; /* by all, in nanoseconds, where a moment was not enough */
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
        if (spins > SPINS) sched_yield();
#if defined(__x86_64__)
        else _mm_pause();
#endif
        if (spins == SPINS) since = seconds();
    }
    if (since > 0) atomic_fetch_add_explicit(&barrier->waited, (long)((seconds() - since) * 1e9), memory_order_relaxed);
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

/* How many threads a call gets. Where another program has one of our cores now and then, all wait for the thread on it at
 * every barrier, and yield their own cores meanwhile: two threads have been seen to take six times as long as one. So a
 * crew that waits for most of its time gets smaller, by as much, and doubles again when enough calls went well; each time
 * that was too early, it stays small for twice as many. */
typedef struct {
    float waiting; /* share of the time, older calls weighing less */
    int most, calls, patience; /* 0: any number; calls since it changed */
} Crew;

enum { LEAST_PATIENCE = 64, MOST_PATIENCE = 4096 };

Crew amphista_crew;
static atomic_flag crew_is_taken = ATOMIC_FLAG_INIT;

/* After a call of `team` threads of those that were asked for, which waited for a share of their time. */
void amphista_note_crew(Crew *crew, int team, int threads, float share) {
    crew->calls++;
    crew->waiting += (share - crew->waiting) / 4;
    if (team > 1 && crew->waiting > 0.5f) {
        const int is_early = crew->calls < LEAST_PATIENCE && crew->patience;
        crew->patience = !is_early ? LEAST_PATIENCE : crew->patience < MOST_PATIENCE ? 2 * crew->patience : MOST_PATIENCE;
        crew->most = (int)((float)team * (1 - crew->waiting));
        if (crew->most < 1) crew->most = 1;
        crew->waiting = 0, crew->calls = 0;
    } else if (crew->most && team < threads && crew->calls >= crew->patience) {
        crew->most = 2 * team;
        crew->waiting = 0.4f, crew->calls = 0; /* one bad call is enough to go back */
    }
}

/* Does a call with so many threads, or as many as there are; how many they were. shares: [2][threads]. */
static int together(int threads, Share *shares, void (*run)(const void *call, Worker *worker), const void *call) {
    Barrier barrier = {.team = 1};
#ifdef _OPENMP
    const int crew = amphista_crew.most && amphista_crew.most < threads ? amphista_crew.most : threads;
    const double start = seconds();
#pragma omp parallel num_threads(crew)
    {
#pragma omp single
        barrier.team = omp_get_num_threads();
        run_with_tiles(run, call, (Worker){shares, &barrier, omp_get_thread_num(), barrier.team, 0, 0});
    }
    if (threads > 1 && !atomic_flag_test_and_set(&crew_is_taken)) {
        const double waited = (double)barrier.waited * 1e-9 / (barrier.team > 1 ? barrier.team - 1 : 1);
        amphista_note_crew(&amphista_crew, barrier.team, threads, (float)(waited / (seconds() - start)));
        atomic_flag_clear(&crew_is_taken);
    }
#else
    (void)threads;
    run_with_tiles(run, call, (Worker){shares, &barrier, 0, 1, 0, 0});
#endif
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
