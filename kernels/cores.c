// cores.c: how many processors this process may use, which is how many threads it makes.
//
// A machine's cores are not always ours: taskset, a batch system or a container give a process some
// of them (its affinity), or a share of the time of all (a cgroup's quota). Threads beyond that
// wait for each other while none of them runs: 64 on a share of two are 45 times slower than two.
#ifdef __linux__
#define _GNU_SOURCE  // sched_getaffinity, CPU_COUNT
#include <sched.h>
#endif
#include "kernels/threads.h"

#include <math.h>
#include <stdlib.h>
#include <unistd.h>

#include "cgroup.h"
#include "util.h"

enum { CORES = 256 };

// The processors that the quota of a group's folder is worth, rounded up. Version 2 says "quota
// period" in one file, version 1 in two; without a limit "max 100000", or -1.
static double group_quota(const char *folder, int version) {
    double x[2] = {0, 0};
    int n = version == 2 ? cgroup_numbers(folder, "cpu.max", x, 2)
                         : cgroup_numbers(folder, "cpu.cfs_quota_us", x, 1) +
                               cgroup_numbers(folder, "cpu.cfs_period_us", x + 1, 1);
    return n == 2 && x[0] > 0 && x[1] > 0 ? ceil(x[0] / x[1]) : INFINITY;
}

int cores_quota(const char *groups, const char *root) {
    char err[ERR_LEN];
    size_t n;
    char *text = file_read(groups, &n, err);
    double cores = text ? cgroup_least(text, root, "cpu", group_quota) : INFINITY;
    free(text);
    return cores < CORES ? (int)cores : CORES;
}

static int cores_online(void) {
#ifdef __linux__
    cpu_set_t set;
    if (sched_getaffinity(0, sizeof set, &set) == 0) return CPU_COUNT(&set);
#endif
    return (int)sysconf(_SC_NPROCESSORS_ONLN);
}

int cores_allowed(void) {
    int online = cores_online(), quota = cores_quota("/proc/self/cgroup", "/sys/fs/cgroup");
    int cores = online < quota ? online : quota;
    return cores < 1 ? 1 : cores;
}
