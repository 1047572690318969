// newfile.c: how a file is written so that nothing is lost.
#define _POSIX_C_SOURCE 200809L
#define _DARWIN_C_SOURCE  // O_NOFOLLOW
#include "newfile.h"

#include <dirent.h>
#include <errno.h>
#include <fcntl.h>
#include <stdlib.h>
#include <string.h>
#include <sys/stat.h>
#include <unistd.h>

#include "util.h"

volatile sig_atomic_t interrupted;

enum { MAX_LINKS = 40, MAX_NAMES = 100 };  // links followed (as Linux), names tried

// Bytes of path up to and with its last slash.
static size_t directory_length(const char *path) {
    const char *slash = strrchr(path, '/');
    return slash ? (size_t)(slash - path) + 1 : 0;
}

// dir [n_dir], then name; malloc'ed, NULL: no memory.
static char *join(const char *dir, size_t n_dir, const char *name) {
    size_t n = strlen(name);
    char *path = malloc(n_dir + n + 1);
    if (!path) return NULL;
    memcpy(path, dir, n_dir);
    memcpy(path + n_dir, name, n + 1);
    return path;
}

// The directory that path lies in; malloc'ed, NULL: no memory.
static char *directory_of(const char *path) {
    size_t n = directory_length(path);
    return join(path, n, n > 0 ? "" : ".");
}

// ---- the target ----

// What path names once its last part is no link any more, whether it is there or not; malloc'ed.
// NULL with errno.
static char *follow_links(const char *path) {
    char *at = join("", 0, path), name[4096];
    for (int i = 0; at && i < MAX_LINKS; i++) {
        ssize_t n = readlink(at, name, sizeof name - 1);
        if (n < 0) return at;  // no link, or not there
        name[n] = '\0';
        char *next = join(at, name[0] == '/' ? 0 : directory_length(at), name);
        free(at);
        at = next;
    }
    if (at) errno = ELOOP;
    free(at);
    return NULL;
}

static bool is_locked(const char *path) {
    struct flock lock = {.l_type = F_WRLCK, .l_whence = SEEK_SET};
    int fd = open(path, O_RDWR | O_CLOEXEC | O_NONBLOCK);
    if (fd < 0) return false;
    bool held = fcntl(fd, F_GETLK, &lock) == 0 && lock.l_type != F_UNLCK;
    close(fd);
    return held;
}

static bool directory_facts(const char *path, struct stat *st) {
    char *name = directory_of(path);
    bool found = name && stat(name, st) == 0;
    free(name);
    return found;
}

static bool same_node(const struct stat *a, const struct stat *b) {
    return a->st_dev == b->st_dev && a->st_ino == b->st_ino;
}

bool newfile_same(const char *a, const char *b) {
    struct stat x, y;
    bool there = stat(a, &x) == 0;
    if (there != (stat(b, &y) == 0)) return false;
    if (there) return same_node(&x, &y);
    char *p = follow_links(a), *q = follow_links(b);
    bool same = p && q && strcmp(p + directory_length(p), q + directory_length(q)) == 0 &&
                directory_facts(p, &x) && directory_facts(q, &y) && same_node(&x, &y);
    free(p);
    free(q);
    return same;
}

bool file_lock(int fd) {
    struct flock lock = {.l_type = F_WRLCK, .l_whence = SEEK_SET};
    return fcntl(fd, F_SETLK, &lock) == 0 || (errno != EACCES && errno != EAGAIN);
}

// *there: a file to be replaced, with *st its facts.
static int check_target(const char *path, bool *there, struct stat *st, char *err) {
    if (!*path) return fail(err, "cannot be written: it has no name");
    *there = stat(path, st) == 0;
    if (!*there) return 0;  // what else is wrong, making the temporary file finds out
    if (!S_ISREG(st->st_mode)) return fail(err, "cannot be written: not a regular file");
    if (access(path, W_OK) != 0) return fail(err, "cannot be written: %s", strerror(errno));
    if (is_locked(path)) return fail(err, "cannot be written: another process is writing to it");
    return 0;
}

// ---- the temporary file ----

// Whether name is "BASE.PID.N.tmp".
static bool is_temporary(const char *name, const char *base) {
    size_t n = strlen(base), digits;
    if (strncmp(name, base, n) != 0) return false;
    name += n;
    for (int i = 0; i < 2; i++) {
        if (*name++ != '.' || (digits = strspn(name, "0123456789")) == 0) return false;
        name += digits;
    }
    return strcmp(name, ".tmp") == 0;
}

// Removes the file if nobody writes to it: its lock can be had.
static void remove_if_dead(const char *path) {
    struct flock lock = {.l_type = F_WRLCK, .l_whence = SEEK_SET};
    struct stat st;
    int fd = open(path, O_RDWR | O_CLOEXEC | O_NONBLOCK | O_NOFOLLOW);
    if (fd < 0) return;
    if (fstat(fd, &st) == 0 && S_ISREG(st.st_mode) && fcntl(fd, F_SETLK, &lock) == 0) unlink(path);
    close(fd);
}

// Temporary files of this target whose writers died.
static void remove_dead(const char *path) {
    size_t n_dir = directory_length(path);
    char *name = directory_of(path);
    DIR *dir = name ? opendir(name) : NULL;
    free(name);
    for (struct dirent *e; dir && (e = readdir(dir));) {
        if (!is_temporary(e->d_name, path + n_dir)) continue;
        char *dead = join(path, n_dir, e->d_name);
        if (dead) remove_if_dead(dead);
        free(dead);
    }
    if (dir) closedir(dir);
}

void newfile_clear(const char *folder, const char *ending) {
    DIR *dir = opendir(folder);
    char *path = join(folder, strlen(folder), "/");
    for (struct dirent *e; dir && path && (e = readdir(dir));)
        for (const char *p = strstr(e->d_name, ending); p; p = strstr(p + 1, ending)) {
            char *dead = is_temporary(p, ending) ? join(path, strlen(path), e->d_name) : NULL;
            if (dead) remove_if_dead(dead);
            free(dead);
        }
    if (dir) closedir(dir);
    free(path);
}

// Opens f->tmp, which is new, and locks it. Another writer may take it for dead in between and
// remove it: then it has the next name. Returns the descriptor, or -1 with errno.
static int open_temporary(NewFile *f, mode_t mode) {
    struct stat st;
    size_t room = strlen(f->path) + 48;
    f->tmp = malloc(room);
    for (int i = 0; f->tmp && i < MAX_NAMES; i++) {
        snprintf(f->tmp, room, "%s.%ld.%d.tmp", f->path, (long)getpid(), i);
        int fd = open(f->tmp, O_RDWR | O_CREAT | O_EXCL | O_NOFOLLOW | O_CLOEXEC, mode);
        if (fd < 0 && errno == EEXIST) continue;
        if (fd < 0) break;
        bool ours = file_lock(fd), known = fstat(fd, &st) == 0;
        if (ours && known && st.st_nlink > 0) return fd;
        if (!known) unlink(f->tmp);
        close(fd);
    }
    int why = f->tmp ? errno : ENOMEM;
    free(f->tmp);
    f->tmp = NULL;
    errno = why;
    return -1;
}

// ---- one file ----

static int give_up(NewFile *f, char *err, const char *what) {
    fail(err, "%s: %s", what, strerror(errno));
    newfile_abort(f);
    return -1;
}

int newfile_begin(NewFile *f, const char *path, char *err) {
    struct stat st;
    bool there;
    *f = (NewFile){0};
    if (check_target(path, &there, &st, err) != 0) return -1;
    f->path = follow_links(path);
    if (!f->path) return fail(err, "cannot be written: %s", strerror(errno));
    remove_dead(f->path);
    int fd = open_temporary(f, there ? S_IRUSR | S_IWUSR : 0666);
    if (fd < 0) return give_up(f, err, "cannot be written");
    // The owner's change takes set-id bits away and may be refused; the mode comes after it.
    if (there && (st.st_uid != geteuid() || st.st_gid != getegid()) &&
        fchown(fd, st.st_uid, st.st_gid) != 0)
        st.st_mode &= 0777;
    if (there && fchmod(fd, st.st_mode & 07777) != 0) {
        give_up(f, err, "cannot be written");
        close(fd);
        return -1;
    }
    f->file = fdopen(fd, "w+b");
    if (f->file) return 0;
    give_up(f, err, "cannot be written");
    close(fd);
    return -1;
}

// Makes a rename durable. Some file systems cannot sync a directory; the file is whole either way.
static void sync_directory_of(const char *path) {
    char *name = directory_of(path);
    if (!name) return;
    int fd = open(name, O_RDONLY | O_CLOEXEC);
    free(name);
    if (fd < 0) return;
    fsync(fd);
    close(fd);
}

int newfile_commit(NewFile *f, char *err) {
    if (ferror(f->file) || fflush(f->file) != 0 || fsync(fileno(f->file)) != 0)
        return give_up(f, err, "cannot write");
    if (interrupted) {
        newfile_abort(f);
        return fail(err, "interrupted");
    }
    // Renamed before it is closed, which ends the lock: nobody takes it for dead.
    if (rename(f->tmp, f->path) != 0) return give_up(f, err, "cannot rename");
    free(f->tmp);
    f->tmp = NULL;
    int closed = fclose(f->file);
    f->file = NULL;
    sync_directory_of(f->path);
    if (closed != 0) return give_up(f, err, "cannot write");
    newfile_abort(f);
    return 0;
}

void newfile_abort(NewFile *f) {
    if (f->tmp) unlink(f->tmp);
    if (f->file) fclose(f->file);
    free(f->path);
    free(f->tmp);
    *f = (NewFile){0};
}

// Signals wait: they are not caught yet, and would leave the temporary file.
int newfile_check(const char *path, char *err) {
    NewFile f;
    sigset_t all, before;
    sigfillset(&all);
    pthread_sigmask(SIG_BLOCK, &all, &before);
    int rc = newfile_begin(&f, path, err);
    if (rc == 0) newfile_abort(&f);
    pthread_sigmask(SIG_SETMASK, &before, NULL);
    return rc;
}
