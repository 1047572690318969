// cgroup.h: limits of Linux's control groups: what a container, a batch system or a service manager
// gives this process of the machine.
#ifndef CGROUP_H
#define CGROUP_H

// The least of what `limit` reads in the folders of this process's groups that have the controller
// ("cpu", "memory"), and of all groups that they lie in, up to the root. limit gets a folder and
// the version (1 or 2) whose files are in it, and returns INFINITY where they say nothing; so does
// the whole. groups: the lines of /proc/self/cgroup; root: /sys/fs/cgroup.
double cgroup_least(const char *groups, const char *root, const char *controller,
                    double (*limit)(const char *folder, int version));

// The first numbers in folder/name, at most n, go to x [n]. Returns how many there are, up to
// the first word that is none ("max").
int cgroup_numbers(const char *folder, const char *name, double *x, int n);
#endif
