// newfile.h: how a file is written so that nothing is lost: it is old or new, never half there.
//
// What is written goes to a temporary file beside the target, "TARGET.PID.N.tmp", which is synced
// and renamed over the target at the end. The temporary is made anew (O_EXCL: no file or link that
// waits under its name is written through), has the target's mode and owner, and is locked while it
// is written, so that the next writer can tell those of dead processes, which it removes, from
// those of living ones. A link is followed: what it names is replaced, the link stays.
#ifndef NEWFILE_H
#define NEWFILE_H
#include <signal.h>
#include <stdbool.h>
#include <stdio.h>

typedef struct {
    char *path, *tmp;  // the target, links followed, and the file beside it
    FILE *file;        // to write to; NULL when nothing is being written
} NewFile;

// Set by a handler of signals, which knows no better place: a commit then gives up instead of
// renaming, and a file is as it was. After the rename nothing takes it back.
extern volatile sig_atomic_t interrupted;

// All return 0, or -1 with err; one that fails has already aborted, and aborting again does no
// harm.

// Opens the temporary file. Refused: a target that is there and is no regular file, that may not be
// written, or that another process holds a lock on.
int newfile_begin(NewFile *f, const char *path, char *err);

// Syncs, closes and renames; fails as well if any write before it did.
int newfile_commit(NewFile *f, char *err);

// Removes the temporary file. Safe after a commit, and on a zeroed struct.
void newfile_abort(NewFile *f);

// Removes the temporary files in folder whose writers died and whose targets' names end so (not
// ""). newfile_begin does it for its own target.
void newfile_clear(const char *folder, const char *ending);

// Whether newfile_begin would do, tried by doing it; nothing is left.
int newfile_check(const char *path, char *err);

// Whether both name the same file, or would once they are there.
bool newfile_same(const char *a, const char *b);

// Locks an open file for this process, until it closes any descriptor of it (POSIX 2017, fcntl,
// F_SETLK); false: another process holds it. A file system without locks lets everybody in.
bool file_lock(int fd);
#endif
