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

#include <stdio.h>
#include <string.h>
#include <unistd.h>

enum { CORES = 256, LINE = 4096 };

// The first line of a file, without its newline; "" where there is none.
static const char *first_line(char line[LINE], const char *path) {
    FILE *f = fopen(path, "r");
    line[0] = '\0';
    if (!f) return line;
    if (!fgets(line, LINE, f)) line[0] = '\0';
    fclose(f);
    line[strcspn(line, "\n")] = '\0';
    return line;
}

// The folder of a control group, `group` of it; version 2 says "quota period" in one file, version
// 1 in two. Returns the processors that the quota is worth, rounded up, or CORES.
static int group_quota(const char *root, const char *group, int version) {
    char path[2 * LINE], line[LINE];
    long long quota = 0, period = 0;
    const char *file = version == 2 ? "cpu.max" : "cpu.cfs_quota_us";
    if (snprintf(path, sizeof path, "%s%s/%s", root, group, file) >= (int)sizeof path) return CORES;
    int n = sscanf(first_line(line, path), "%lld %lld", &quota, &period);
    if (version == 1) {
        snprintf(path, sizeof path, "%s%s/cpu.cfs_period_us", root, group);
        n += sscanf(first_line(line, path), "%lld", &period);
    }
    if (n != 2 || quota <= 0 || period <= 0) return CORES;  // "max 100000", -1
    long long cores = (quota - 1) / period + 1;
    return cores < CORES ? (int)cores : CORES;
}

// The smallest quota from the group up to the root. A container may see its own group as the root,
// under another name than /proc has for it.
static int quota_above(const char *root, char *group, int version) {
    int least = CORES;
    for (size_t n = strlen(group);; group[n] = '\0') {
        while (n > 0 && group[n - 1] == '/') group[--n] = '\0';
        int cores = group_quota(root, group, version);
        if (cores < least) least = cores;
        if (n == 0) return least;
        while (n > 0 && group[n - 1] != '/') n--;
    }
}

// Whether the list of controllers, between commas, has "cpu".
static int has_cpu(const char *list) {
    for (; *list; list += strcspn(list, ","), list += *list == ',')
        if (strncmp(list, "cpu", 3) == 0 && (list[3] == ',' || list[3] == '\0')) return 1;
    return 0;
}

// cgroups(7): lines "number:controllers:group"; those of version 2 have no controllers.
int cores_quota(const char *groups, const char *root) {
    char line[LINE], sub[LINE];
    int least = CORES;
    FILE *f = fopen(groups, "r");
    while (f && fgets(line, sizeof line, f)) {
        char *list = strchr(line, ':'), *group = list ? strchr(list + 1, ':') : NULL;
        if (!group) continue;
        *group++ = '\0', list++;
        group[strcspn(group, "\n")] = '\0';
        int version = *list ? 1 : 2, fits = snprintf(sub, sizeof sub, "%s/cpu", root) < LINE;
        if (version == 1 && (!fits || !has_cpu(list))) continue;
        int cores = quota_above(version == 1 ? sub : root, group, version);
        if (cores < least) least = cores;
    }
    if (f) fclose(f);
    return least;
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
