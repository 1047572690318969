// threads.h: a pool of threads, and a loop whose rounds they share.
#ifndef THREADS_H
#define THREADS_H
#include <stdint.h>

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

// Processors that this process may use, 1 to 256: those of its affinity, or what the CPU quota of
// its control group is worth, rounded up, where that is less.
int cores_allowed(void);

// How many threads there are unless more or fewer are asked for: one per core that has such
// processors, within the quota.
int cores_default(void);
// How many cores have the processors i with used[i] [256], by the lists of those that share one, in
// `root` (/sys/devices/system/cpu). A processor that has no list is a core.
int cores_physical(const char *root, const uint8_t *used);

// The quota alone, 256 where there is none: of the groups that the file `groups` names
// (/proc/self/cgroup), under `root` (/sys/fs/cgroup). Versions 1 and 2: cgroups(7).
int cores_quota(const char *groups, const char *root);
#endif
