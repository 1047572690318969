// output.c: what leaves the program.
//
// Results go to stdout, figures and warnings to stderr. Only run.c and this folder print or exit:
// all other code returns -1 and leaves a sentence in err, which ends up in die(). What others wrote
// is shown, never sent to the terminal (text.c).
#define _XOPEN_SOURCE 700
#include "cli/output.h"

#include <errno.h>
#include <poll.h>
#include <pthread.h>
#include <signal.h>
#include <stdarg.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

#include "tensors.h"
#include "text.h"

// ---- the program's name ----

const char *program = "run";

void name_program(const char *path) {
    const char *slash = path ? strrchr(path, '/') : NULL;
    if (path && path[0]) program = slash ? slash + 1 : path;
}

bool moves_cursor(void) {
    const char *term = getenv("TERM");
    return isatty(STDERR_FILENO) && !(term && strcmp(term, "dumb") == 0);
}

// ---- endings ----

static void on_signal(int sig) { interrupted = sig; }

// Without SA_RESTART, so that a read at the chat's prompt returns.
void catch_signals(void) {
    struct sigaction sa = {.sa_handler = on_signal};
    sigemptyset(&sa.sa_mask);
    sigaction(SIGINT, &sa, NULL);
    sigaction(SIGTERM, &sa, NULL);
    sigaction(SIGHUP, &sa, NULL);
}

// What is safe in a handler: no stdio, no exit.
static void say(const char *s) {
    char shown[TEXT_SHOWN];
    for (const char *end = s + strlen(s); s < end;) {
        size_t n = (size_t)text_show(shown, &s, end, true);
        if (write(STDERR_FILENO, shown, n) < 0) _exit(1);
    }
}

static void on_cut_file(int sig, siginfo_t *info, void *context) {
    (void)context;
    const char *path = tensors_mapped(info->si_addr);
    if (!path) {  // not ours: faults again, and then it ends us
        signal(sig, SIG_DFL);
        return;
    }
    say(program);
    say(": ");
    say(path);
    say(": was cut while it was being read, or its disk failed\n");
    _exit(1);
}

void catch_cut_files(void) {
    struct sigaction sa = {.sa_sigaction = on_cut_file, .sa_flags = SA_SIGINFO};
    sigemptyset(&sa.sa_mask);
    sigaction(SIGBUS, &sa, NULL);
}

void die(const char *fmt, ...) {
    va_list ap;
    va_start(ap, fmt);
    note("%s: ", program);
    text_print(stderr, fmt, ap);
    fputc('\n', stderr);
    va_end(ap);
    exit(1);
}

void die_usage(const char *command, const char *fmt, ...) {
    va_list ap;
    va_start(ap, fmt);
    note("%s: %s%s", program, command ? command : "", command ? ": " : "");
    text_print(stderr, fmt, ap);
    note(" (%s %s%s-h shows the usage)\n", program, command ? command : "", command ? " " : "");
    va_end(ap);
    exit(2);
}

void die_memory(void) { die("out of memory"); }

int exit_code(void) { return interrupted ? 128 + interrupted : 0; }

void die_interrupted(void) {
    note("%s: interrupted\n", program);
    exit(exit_code());
}

void die_failed(const char *err) {
    if (interrupted) die_interrupted();
    die("%s", err);
}

void die_file(const char *path, const char *err) {
    if (interrupted) die_interrupted();
    die("%s: %s", path, err);
}

void die_stdout(void) { die("stdout: %s", errno == EBADF ? "it is closed" : strerror(errno)); }

void *allocate(size_t n, size_t size) {
    void *p = calloc(n ? n : 1, size);
    if (!p) die_memory();
    return p;
}

void add_text(Buffer *b, const char *s, size_t n) {
    if (buffer_add(b, s, n) != 0) die_memory();
}

char *copy_text(const char *s, size_t n) {
    Buffer b = {0};
    add_text(&b, s, n);
    return b.s;
}

// ---- stdout ----

// A signal that comes while stdout takes bytes waits until it has them: of a write that is
// interrupted C libraries forget what was to be written.
static void hold_signals(sigset_t *old) {
    sigset_t held;
    sigemptyset(&held);
    sigaddset(&held, SIGINT), sigaddset(&held, SIGTERM), sigaddset(&held, SIGHUP);
    pthread_sigmask(SIG_BLOCK, &held, old);
}

static void let_signals(const sigset_t *old) { pthread_sigmask(SIG_SETMASK, old, NULL); }

// Before that: where nobody reads what is written, a signal still ends the program.
static void wait_for_reader(void) {
    struct pollfd to = {.fd = STDOUT_FILENO, .events = POLLOUT};
    for (;;) {
        int ready = poll(&to, 1, 200);
        if (ready > 0 || (ready < 0 && errno != EINTR)) return;
        if (!interrupted) continue;
        note("%s: interrupted\n", program);
        _exit(exit_code());  // exit would wait for the reader, too
    }
}

void out_bytes(const void *p, size_t n) {
    sigset_t old;
    hold_signals(&old);
    bool whole = n == 0 || fwrite(p, 1, n, stdout) == n;
    let_signals(&old);
    if (!whole) die_stdout();
}

void out_flush(void) {
    sigset_t old;
    wait_for_reader();
    hold_signals(&old);
    if (ferror(stdout) || fflush(stdout) != 0) die_stdout();
    let_signals(&old);
}

void out(const char *fmt, ...) {
    sigset_t old;
    va_list ap;
    va_start(ap, fmt);
    hold_signals(&old);
    text_print(stdout, fmt, ap);
    let_signals(&old);
    va_end(ap);
    if (ferror(stdout)) die_stdout();
}

void out_text(const char *s, size_t n) {
    sigset_t old;
    hold_signals(&old);
    text_put(stdout, s, n);
    let_signals(&old);
    if (ferror(stdout)) die_stdout();
}

// ---- stderr ----

void note(const char *fmt, ...) {
    va_list ap;
    va_start(ap, fmt);
    text_print(stderr, fmt, ap);
    va_end(ap);
}

void warning_list(const char *fmt, va_list ap) {
    note("%s: warning: ", program);
    text_print(stderr, fmt, ap);
    fputc('\n', stderr);
}

void warning(const char *fmt, ...) {
    va_list ap;
    va_start(ap, fmt);
    warning_list(fmt, ap);
    va_end(ap);
}

// ---- sizes ----

const char *size_text(char buf[32], double bytes) {
    static const char *const unit[] = {"B", "KB", "MB", "GB", "TB"};
    int u = 0;
    for (; bytes >= 1000 && u < 4; u++) bytes /= 1000;
    snprintf(buf, 32, u == 0 ? "%.0f %s" : "%.1f %s", bytes, unit[u]);
    return buf;
}
