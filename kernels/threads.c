// threads.c: a pool of threads that share the rounds of a loop.
//
// A job is a function and a counter; whoever is free takes the next indices. Workers spin for a
// moment after a job, because the next one usually follows within microseconds, then sleep: an idle
// program costs nothing. The fact that must stay true: which thread runs an index changes no bit of
// its result, for each index writes only what is its own.
#ifdef __linux__  // elsewhere all is declared unless a standard is asked for
#define _POSIX_C_SOURCE 200809L
#endif
#include "kernels/threads.h"

#include <pthread.h>
#include <sched.h>
#include <signal.h>
#include <stdatomic.h>
#include <stdbool.h>
#include <stdlib.h>

enum {
    SPINS = 20000,
    // Bytes of a worker's stack. The largest frames, of a tile of attention and what it calls, take
    // 0.3 MB; a thread would have 128 KB by default with musl and 512 KB on macOS. Work also runs
    // on the caller's thread, which needs as much: run.c makes one with 8 MB.
    STACK_BYTES = 2 << 20,
};

struct ThreadPool {
    int n_workers;
    pthread_t *workers;
    void (*fn)(void *ctx, int i);
    void *ctx;
    int n;
    atomic_int next;  // index to take
    atomic_int busy;  // workers that have not finished the current job
    atomic_uint job;  // counts jobs; a change wakes the workers
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

// Large shares first, single indices last: little contention at the counter, long runs of memory,
// and all finish together.
static void take_work(ThreadPool *p) {
    int n = p->n, threads = p->n_workers + 1;
    for (;;) {
        int left = n - atomic_load_explicit(&p->next, memory_order_relaxed);
        int share = left / (2 * threads) + 1;
        int i = atomic_fetch_add_explicit(&p->next, share, memory_order_relaxed);
        if (i >= n) return;
        for (int end = i + share < n ? i + share : n; i < end; i++) p->fn(p->ctx, i);
    }
}

static void wait_for_job(ThreadPool *p, unsigned seen) {
    for (int spin = 0; spin < SPINS; spin++) {
        if (atomic_load_explicit(&p->job, memory_order_acquire) != seen) return;
        relax(spin);
    }
    pthread_mutex_lock(&p->mutex);
    atomic_fetch_add(&p->sleepers, 1);
    while (atomic_load(&p->job) == seen) pthread_cond_wait(&p->wake, &p->mutex);
    atomic_fetch_sub(&p->sleepers, 1);
    pthread_mutex_unlock(&p->mutex);
}

static void *worker(void *arg) {
    ThreadPool *p = arg;
    for (unsigned seen = 0;; seen++) {
        wait_for_job(p, seen);
        if (atomic_load(&p->closing)) return NULL;
        take_work(p);
        atomic_fetch_sub_explicit(&p->busy, 1, memory_order_release);
    }
}

static void post_job(ThreadPool *p) {
    atomic_fetch_add(&p->job, 1);
    if (atomic_load(&p->sleepers) > 0) {
        pthread_mutex_lock(&p->mutex);
        pthread_cond_broadcast(&p->wake);
        pthread_mutex_unlock(&p->mutex);
    }
}

ThreadPool *pool_open(int n_threads) {
    ThreadPool *p = calloc(1, sizeof *p);
    if (!p) return NULL;
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
    post_job(p);
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
    p->fn = fn, p->ctx = ctx, p->n = n;
    atomic_store_explicit(&p->next, 0, memory_order_relaxed);
    atomic_store_explicit(&p->busy, p->n_workers, memory_order_relaxed);
    post_job(p);
    take_work(p);
    for (int spin = 0; atomic_load_explicit(&p->busy, memory_order_acquire) > 0; spin++)
        relax(spin);
}
