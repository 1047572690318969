// test_memory.c: limits of control groups, as the two kinds of them are found.
#define _XOPEN_SOURCE 700
#include <sys/stat.h>
#include <unistd.h>

#include "cli/memory.h"
#include "test.h"

static char root[] = "/tmp/test_memory.XXXXXX";

static void put(const char *name, const char *text) {
    char path[256];
    snprintf(path, sizeof path, "%s/%s", root, name);
    FILE *f = fopen(path, "w");
    if (f) fputs(text, f), fclose(f);
    CHECK(f != NULL);
}

static void folder(const char *name) {
    char path[256];
    snprintf(path, sizeof path, "%s/%s", root, name);
    CHECK(mkdir(path, 0700) == 0);
}

int main(void) {
    CHECK(mkdtemp(root) != NULL);
    CHECK(isinf(memory_group_limit("0::/a/b\n", root)));  // no groups at all
    folder("a"), folder("a/b"), folder("memory"), folder("memory/old");
    put("a/memory.max", "3000\n"), put("a/b/memory.max", "max\n");
    CHECK(memory_group_limit("0::/a/b\n", root) == 3000);  // the parent's
    put("a/b/memory.max", "2000\n");
    CHECK(memory_group_limit("0::/a/b\n", root) == 2000);
    put("memory/old/memory.limit_in_bytes", "1000\n");
    CHECK(memory_group_limit("5:cpu:/x\n4:memory:/old\n0::/a\n", root) == 1000);
    put("memory.max", "500\n");  // of a container that sees itself as the root
    CHECK(memory_group_limit("0::/\n", root) == 500);
    CHECK(isinf(memory_group_limit("", root)) && isinf(memory_group_limit("no group\n1:", root)));
    char command[64];
    snprintf(command, sizeof command, "rm -r %s", root);
    CHECK(system(command) == 0);
    return test_end("memory");
}
