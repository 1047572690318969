// unfinished.h: what a long calibration knows so far, in a file, so that one that was interrupted
// goes on where it was.
#ifndef UNFINISHED_H
#define UNFINISHED_H
#include <stddef.h>

// One of the things to keep.
typedef struct {
    char name[32];
    void *data;  // [bytes]
    size_t bytes;
} Kept;

// Writes kept [n] to path. `work` says whose they are: nothing else may read them. Returns 0, or -1
// with err.
int unfinished_save(const char *path, const char *work, const Kept *kept, int n, char *err);

// How many of kept [n] are in the file, from the first on: they become what stands there, and have
// to be as long. 0: there is no file, or it is of other work. -1 with err: a file of another kind,
// or a damaged one.
int unfinished_load(const char *path, const char *work, const Kept *kept, int n, char *err);
#endif
