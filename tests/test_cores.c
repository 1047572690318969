// How many processors a process may use: quotas of control groups, and processors that share a
// core, as Linux writes them, in folders of our own.
#define _XOPEN_SOURCE 700
#include <stdlib.h>
#include <sys/stat.h>
#include <unistd.h>

#include "kernels/threads.h"
#include "test.h"

static char dir[64] = "/tmp/cores.XXXXXX", path[256], groups[256];

static void put(const char *name, const char *text) {
    snprintf(path, sizeof path, "%s/%s", dir, name);
    for (char *p = path + strlen(dir) + 1; (p = strchr(p, '/')) != NULL; p++) {
        *p = '\0';
        mkdir(path, 0700);
        *p = '/';
    }
    FILE *f = fopen(path, "w");
    if (!CHECK(f != NULL)) return;
    fputs(text, f);
    fclose(f);
}

// The quota of a process in this group.
static int quota(const char *group) {
    put("groups", group);
    return cores_quota(groups, dir);
}

// Eight processors of which 0 and 4, 1 and 5, 2 and 6 share a core, and nothing is known of 7.
static void test_physical(void) {
    const char *const lists[] = {"0,4", "1,5", "2,6", "3", "0,4", "1,5", "2,6"};
    uint8_t used[256] = {0};
    CHECK(cores_physical(dir, used) == 0);
    for (int i = 0; i < 7; i++) {
        char name[64];
        snprintf(name, sizeof name, "cpu%d/topology/thread_siblings_list", i);
        put(name, lists[i]);
    }
    memset(used, 1, 4);
    CHECK(cores_physical(dir, used) == 4);
    memset(used, 1, 7);
    CHECK(cores_physical(dir, used) == 4);
    used[7] = 1;
    CHECK(cores_physical(dir, used) == 5);
    memset(used, 0, 4);  // one processor of each core
    CHECK(cores_physical(dir, used) == 4);
    CHECK(cores_physical("/nowhere", used) == 4);
}

int main(void) {
    CHECK(mkdtemp(dir) != NULL);
    snprintf(groups, sizeof groups, "%s/groups", dir);
    CHECK(cores_default() >= 1 && cores_allowed() >= cores_default());
    test_physical();
    CHECK(cores_quota(groups, dir) == 256);  // no such file
    put("a/cpu.max", "150000 100000\n");
    put("a/b/cpu.max", "max 100000\n");
    put("a/c/cpu.max", "50000 100000\n");
    put("d/cpu.max", "junk\n");
    CHECK(quota("0::/a\n") == 2);    // one and a half, rounded up
    CHECK(quota("0::/a/b\n") == 2);  // the group above counts, too
    CHECK(quota("0::/a/c\n") == 1);
    CHECK(quota("0::/d\n") == 256);
    CHECK(quota("0::/\n") == 256);
    CHECK(quota("") == 256 && quota("junk") == 256);
    put("cpu.max", "300000 100000\n");  // a container sees its own group as the root
    CHECK(quota("0::/docker/0123456789abcdef\n") == 3);
    put("cpu.max", "99900000 100000\n");
    put("cpu/e/cpu.cfs_quota_us", "400000\n");
    put("cpu/e/cpu.cfs_period_us", "100000\n");
    put("cpu/f/cpu.cfs_quota_us", "-1\n");
    put("cpu/f/cpu.cfs_period_us", "100000\n");
    CHECK(quota("3:cpuset:/f\n4:cpu,cpuacct:/e\n0::/\n") == 4);
    CHECK(quota("4:cpuacct,cpu:/f\n") == 256);
    CHECK(quota("4:cpuset:/e\n") == 256);
    snprintf(path, sizeof path, "rm -r %s", dir);
    CHECK(system(path) == 0);
    return test_end("test_cores");
}
