// threads.h: a pool of threads, and a loop whose rounds they share.
#ifndef THREADS_H
#define THREADS_H

typedef struct ThreadPool ThreadPool;

// n_threads - 1 workers beside the caller, n_threads >= 1. Workers take no signals: one that
// arrives is for the caller's thread and interrupts its reads. NULL when threads cannot be made.
ThreadPool *pool_open(int n_threads);

// Ends the workers and frees the pool; NULL is allowed.
void pool_close(ThreadPool *p);

// Threads that share a loop, the caller among them; 1 for NULL.
int pool_threads(const ThreadPool *p);

// Runs fn(ctx, i) for each i < n and returns when all are done; p may be NULL (a plain loop). The
// caller's thread takes its part of the work. Each i must write only its own results, so the same
// bits come out for any number of threads.
void parallel_for(ThreadPool *p, int n, void (*fn)(void *ctx, int i), void *ctx);

// Cores that the system lets run, 1 to 256.
int cores_online(void);
#endif
