// threads.c: a pool of threads that share the rounds of a loop.
//
// A job is a function and a ticket; whoever is free takes the next indices. The caller waits for
// indices that were taken, never for a worker that took none: where other programs have the
// processors, a worker that does not get to run holds nobody up. Workers spin for a moment after a
// job, because the next one usually follows within microseconds, then sleep: an idle program costs
// nothing. The fact that must stay true: which thread runs an index changes no bit of its result,
// for each index writes only what is its own.
#ifdef __linux__  // elsewhere all is declared unless a standard is asked for
#define _POSIX_C_SOURCE 200809L
#endif
#include "kernels/threads.h"

#include <pthread.h>
#include <sched.h>
#include <signal.h>
#include <stdatomic.h>
#include <stdbool.h>
#include <stdint.h>
#include <stdlib.h>

enum {
    SPINS = 20000,
    // Bytes of a worker's stack. The largest frames, of a tile of attention and what it calls, take
    // 0.7 MB; a thread would have 128 KB by default with musl and 512 KB on macOS. Work also runs
    // on the caller's thread, which needs as much: run.c makes one with 8 MB.
    STACK_BYTES = 2 << 20,
};

struct ThreadPool {
    int n_workers;
    pthread_t *workers;
    // Of the current job; written while its ticket is closed.
    void (*fn)(void *ctx, int i);
    void *ctx;
    atomic_int n;
    // The number of the job in the high half, the index to take in the low one. As both change
    // together, nobody takes an index of a job that they did not see.
    atomic_uint_fast64_t ticket;
    atomic_int done;  // indices that have run
    atomic_bool closing;
    atomic_int sleepers;
    pthread_mutex_t mutex;
    pthread_cond_t wake;
};

// A hint to the core that this is a waiting loop.
static inline void relax(int spin) {
#if defined(__x86_64__)
    __builtin_ia32_pause();
#elif defined(__aarch64__)
    __asm__ volatile("yield");
#endif
    if (spin % 1024 == 1023) sched_yield();  // more threads than cores: let the others work
}

static const uint64_t CLOSED = UINT32_MAX;  // in a ticket: no index is left

static inline uint32_t job_of(uint64_t ticket) { return (uint32_t)(ticket >> 32); }
static inline int64_t index_of(uint64_t ticket) { return (int64_t)(ticket & CLOSED); }

// Large shares first, single indices last: little contention at the ticket, long runs of memory,
// and all finish together.
static void take_work(ThreadPool *p) {
    int threads = p->n_workers + 1;
    for (uint64_t ticket = atomic_load(&p->ticket);;) {
        int n = atomic_load_explicit(&p->n, memory_order_relaxed);
        int64_t first = index_of(ticket), left = n - first, share = left / (2 * threads) + 1;
        if (left <= 0) return;
        if (!atomic_compare_exchange_weak(&p->ticket, &ticket, ticket + (uint64_t)share)) continue;
        int i = (int)first, end = (int)(first + share);
        for (; i < end; i++) p->fn(p->ctx, i);
        atomic_fetch_add_explicit(&p->done, (int)share, memory_order_release);
        ticket = atomic_load(&p->ticket);
    }
}

// Returns the number of the next job that is not `seen`.
static uint32_t wait_for_job(ThreadPool *p, uint32_t seen) {
    uint32_t job;
    for (int spin = 0; spin < SPINS; spin++) {
        if ((job = job_of(atomic_load_explicit(&p->ticket, memory_order_acquire))) != seen)
            return job;
        relax(spin);
    }
    pthread_mutex_lock(&p->mutex);
    atomic_fetch_add(&p->sleepers, 1);
    while ((job = job_of(atomic_load(&p->ticket))) == seen) pthread_cond_wait(&p->wake, &p->mutex);
    atomic_fetch_sub(&p->sleepers, 1);
    pthread_mutex_unlock(&p->mutex);
    return job;
}

static void *worker(void *arg) {
    ThreadPool *p = arg;
    for (uint32_t seen = 0;;) {
        seen = wait_for_job(p, seen);
        if (atomic_load(&p->closing)) return NULL;
        take_work(p);
    }
}

// A ticket for the next job; `first` is CLOSED where there is nothing to do but to wake.
static void post_job(ThreadPool *p, uint64_t first) {
    uint64_t job = (uint64_t)(job_of(atomic_load(&p->ticket)) + 1u) << 32;
    atomic_store(&p->ticket, job | first);
    if (atomic_load(&p->sleepers) > 0) {
        pthread_mutex_lock(&p->mutex);
        pthread_cond_broadcast(&p->wake);
        pthread_mutex_unlock(&p->mutex);
    }
}

ThreadPool *pool_open(int n_threads) {
    ThreadPool *p = calloc(1, sizeof *p);
    if (!p) return NULL;
    atomic_store(&p->ticket, CLOSED);
    pthread_mutex_init(&p->mutex, NULL);
    pthread_cond_init(&p->wake, NULL);
    p->workers = calloc((size_t)n_threads, sizeof *p->workers);
    sigset_t all, old;  // signals are for the caller's thread, so that Ctrl-C interrupts its reads
    sigfillset(&all);
    pthread_sigmask(SIG_SETMASK, &all, &old);
    pthread_attr_t attr;
    pthread_attr_init(&attr);
    pthread_attr_setstacksize(&attr, STACK_BYTES);
    for (int i = 1; p->workers && i < n_threads; i++) {
        if (pthread_create(&p->workers[p->n_workers], &attr, worker, p) != 0) break;
        p->n_workers++;
    }
    pthread_attr_destroy(&attr);
    pthread_sigmask(SIG_SETMASK, &old, NULL);
    if (p->n_workers == n_threads - 1) return p;
    pool_close(p);
    return NULL;
}

void pool_close(ThreadPool *p) {
    if (!p) return;
    atomic_store(&p->closing, true);
    post_job(p, CLOSED);
    for (int i = 0; i < p->n_workers; i++) pthread_join(p->workers[i], NULL);
    pthread_cond_destroy(&p->wake);
    pthread_mutex_destroy(&p->mutex);
    free(p->workers);
    free(p);
}

int pool_threads(const ThreadPool *p) { return p ? p->n_workers + 1 : 1; }

void parallel_for(ThreadPool *p, int n, void (*fn)(void *ctx, int i), void *ctx) {
    if (!p || p->n_workers == 0 || n <= 1) {
        for (int i = 0; i < n; i++) fn(ctx, i);
        return;
    }
    p->fn = fn, p->ctx = ctx;
    atomic_store_explicit(&p->n, n, memory_order_relaxed);
    atomic_store_explicit(&p->done, 0, memory_order_relaxed);
    post_job(p, 0);
    take_work(p);
    for (int spin = 0; atomic_load_explicit(&p->done, memory_order_acquire) < n; spin++)
        relax(spin);
    atomic_store(&p->ticket, atomic_load(&p->ticket) | CLOSED);
}
