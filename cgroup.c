// cgroup.c: limits of control groups (cgroups(7)).
//
// A line of /proc/self/cgroup is "number:controllers:group". Version 2 has one line, without
// controllers, and all groups under the root; version 1 has a hierarchy for each controller, under
// the root in a folder of its name. A container may see its own group as the root, under another
// name than the line has: so every folder above is asked, whether the lower ones are there or not.
#include "cgroup.h"

#include <math.h>
#include <stdbool.h>
#include <stdio.h>
#include <string.h>

#include "util.h"

enum { PATH = 4096 };

int cgroup_numbers(const char *folder, const char *name, double *x, int n) {
    char path[2 * PATH], line[PATH];
    int found = 0, length = snprintf(path, sizeof path, "%s/%s", folder, name);
    FILE *f = length < (int)sizeof path ? fopen(path, "r") : NULL;
    if (!f) return 0;
    const char *word = fgets(line, sizeof line, f) ? line : "";
    for (size_t size; found < n && (size = strcspn(word, " \n")) > 0; word += size) {
        x[found] = number_read(word, size);
        if (isnan(x[found])) break;
        found++;
        size += word[size] == ' ';
    }
    fclose(f);
    return found;
}

// Whether the list [n] of controllers, between commas, has this one.
static bool has(const char *list, size_t n, const char *controller) {
    size_t size = strlen(controller);
    for (const char *end = list + n, *comma; list < end; list = comma + 1) {
        comma = memchr(list, ',', (size_t)(end - list));
        if (!comma) comma = end;
        if ((size_t)(comma - list) == size && memcmp(list, controller, size) == 0) return true;
    }
    return false;
}

// The least from folder up to its first `root` bytes.
static double least_above(char *folder, size_t root, int version,
                          double (*limit)(const char *folder, int version)) {
    double least = INFINITY;
    for (size_t n = strlen(folder);; folder[n] = '\0') {
        while (n > root && folder[n - 1] == '/') folder[--n] = '\0';
        least = fmin(least, limit(folder, version));
        if (n == root) return least;
        while (n > root && folder[n - 1] != '/') n--;
    }
}

double cgroup_least(const char *groups, const char *root, const char *controller,
                    double (*limit)(const char *folder, int version)) {
    char folder[PATH];
    double least = INFINITY;
    for (const char *line = groups, *end; *line; line = end + (*end == '\n')) {
        end = line + strcspn(line, "\n");
        const char *list = memchr(line, ':', (size_t)(end - line));
        const char *group = list ? memchr(list + 1, ':', (size_t)(end - list - 1)) : NULL;
        if (!group) continue;
        int version = group == list + 1 ? 2 : 1;
        if (version == 1 && !has(list + 1, (size_t)(group - list - 1), controller)) continue;
        int top = version == 1 ? snprintf(folder, PATH, "%s/%s", root, controller)
                               : snprintf(folder, PATH, "%s", root);
        size_t n = (size_t)(end - group - 1);
        if (top < 0 || n >= (size_t)PATH - (size_t)top) continue;
        memcpy(folder + top, group + 1, n);
        folder[(size_t)top + n] = '\0';
        least = fmin(least, least_above(folder, (size_t)top, version, limit));
    }
    return least;
}
