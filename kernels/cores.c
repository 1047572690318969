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
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#ifdef __APPLE__
#include <sys/sysctl.h>
#endif
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

// ---- processors and cores ----

// used [CORES] = 1 for the processors of the process's affinity, where the system tells. Returns
// how many there are.
static int processors(uint8_t *used) {
    memset(used, 0, CORES);
#ifdef __linux__
    cpu_set_t set;
    if (sched_getaffinity(0, sizeof set, &set) == 0) {
        for (int i = 0; i < CORES; i++) used[i] = CPU_ISSET(i, &set) != 0;
        return CPU_COUNT(&set);
    }
#endif
    return (int)sysconf(_SC_NPROCESSORS_ONLN);
}

// The processors that share processor i's core, as Linux lists them: "0-1", "3,67". NULL: not said.
static char *siblings(const char *root, int i) {
    char path[4096], err[ERR_LEN];
    size_t n;
    int len = snprintf(path, sizeof path, "%s/cpu%d/topology/thread_siblings_list", root, i);
    return len < (int)sizeof path ? file_read(path, &n, err) : NULL;
}

int cores_physical(const char *root, const uint8_t *used) {
    char *seen[CORES];
    int n = 0, alone = 0;
    for (int i = 0; i < CORES; i++) {
        char *list = used[i] ? siblings(root, i) : NULL;
        int same = 0;
        while (list && same < n && strcmp(seen[same], list) != 0) same++;
        if (list && same == n)
            seen[n++] = list;
        else
            free(list);
        alone += used[i] && !list;
    }
    for (int i = 0; i < n; i++) free(seen[i]);
    return n + alone;
}

static int within_quota(int cores) {
    int quota = cores_quota("/proc/self/cgroup", "/sys/fs/cgroup");
    cores = cores < quota ? cores : quota;
    return cores < 1 ? 1 : cores;
}

int cores_allowed(void) {
    uint8_t used[CORES];
    return within_quota(processors(used));
}

int cores_default(void) {
    uint8_t used[CORES];
    int online = processors(used), cores = cores_physical("/sys/devices/system/cpu", used);
#ifdef __APPLE__
    size_t size = sizeof cores;
    if (sysctlbyname("hw.physicalcpu", &cores, &size, NULL, 0) != 0) cores = 0;
#endif
    return within_quota(cores > 0 ? cores : online);
}
