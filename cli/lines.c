// lines.c: questions that come line by line.
//
// Whoever asks through a pipe may wait for an answer before the next question, so lines are taken
// as they come: bytes are read by hand, for stdio would wait until its buffer is full, and poll
// says whether more would have to be waited for. At a terminal a line is edited (edit.c); what is
// pasted is one message, for the terminal marks it ("bracketed paste", xterm's mode 2004).
#define _DEFAULT_SOURCE  // ECHOCTL
#define _DARWIN_C_SOURCE
#include "cli/lines.h"

#include <errno.h>
#include <poll.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <termios.h>
#include <unistd.h>

#include "cli/input.h"
#include "cli/output.h"

static const char PROMPT[] = "> ";

// ---- the terminal ----

static struct termios terminal;  // as it was

static void restore_terminal(void) {
    fputs("\033[?2004l", stderr);
    tcsetattr(STDIN_FILENO, TCSANOW, &terminal);
}

// The marks would be echoed as ^[[200~ while an answer is written; so the terminal shows nothing
// for them.
void lines_begin(Lines *l) {
    if (!l->person || !moves_cursor() || !getenv("TERM")) return;
    if (tcgetattr(STDIN_FILENO, &terminal) != 0 || atexit(restore_terminal) != 0) return;
    struct termios quiet = terminal;
    quiet.c_lflag &= ~(tcflag_t)ECHOCTL;
    tcsetattr(STDIN_FILENO, TCSANOW, &quiet);
    l->editor.fd = l->fd, l->editor.cooked = quiet, l->editor.prompt = PROMPT;
    l->edits = true;
}

// ---- lines ----

// Reads what is there, or waits for it. Returns false when a signal came first.
static bool read_more(Lines *l) {
    char block[1 << 16];
    if (l->from > 0) {
        memmove(l->in.s, l->in.s + l->from, l->in.n - l->from);
        l->in.n -= l->from, l->end -= l->from, l->from = 0;
    }
    ssize_t n = read(l->fd, block, sizeof block);
    if (n > 0) add_text(&l->in, block, (size_t)n);
    if (l->in.n > STREAM_MOST)
        die("%s: line %ld: more than %d MB and no end", l->name, l->number + 1, STREAM_MOST >> 20);
    if (n == 0) l->ended = true;
    if (n >= 0) return true;
    if (errno == EAGAIN) return poll(&(struct pollfd){.fd = l->fd, .events = POLLIN}, 1, -1) >= 0;
    if (errno != EINTR) die("%s: %s", l->name, strerror(errno));
    return !interrupted;
}

static bool more_waits(const Lines *l) {
    return poll(&(struct pollfd){.fd = l->fd, .events = POLLIN}, 1, 0) > 0;
}

// Whether a line, or the rest of all, is in the buffer: up to `end`.
static bool find_line(Lines *l) {
    char *newline = l->in.n > l->end ? memchr(l->in.s + l->end, '\n', l->in.n - l->end) : NULL;
    l->end = newline ? (size_t)(newline - l->in.s) : l->in.n;
    return newline || (l->ended && l->end > l->from);
}

static char *take_line(Lines *l, bool wait, size_t *n) {
    while (!find_line(l))
        if (l->ended || (!wait && !more_waits(l)) || !read_more(l)) return NULL;
    char *line = l->in.s + l->from;
    *n = l->end - l->from;
    l->from = l->end += l->end < l->in.n;
    while (*n > 0 && line[*n - 1] == '\r') (*n)--;
    size_t mark = check_line(l->name, ++l->number, line, *n);
    *n -= mark;
    return line + mark;
}

// What a person types, as one line.
static char *typed_line(Lines *l, size_t *n) {
    if (!edit_line(&l->editor)) return NULL;
    char *line = l->editor.line.s;
    size_t mark = check_line(l->name, ++l->number, line, l->editor.line.n);
    *n = l->editor.line.n - mark;
    return line + mark;
}

char *lines_next(Lines *l, bool wait, size_t *n) {
    for (int tries = 0; tries < 2;) {
        if (l->person && !l->edits) fputs(PROMPT, stderr);
        char *line = l->edits ? typed_line(l, n) : take_line(l, wait, n);
        if (line) return line;
        if (l->person) fputc('\n', stderr);
        if (interrupted != SIGINT || !l->person) return NULL;
        interrupted = 0;
        if (l->edits && l->editor.line.n > 0) continue;  // only the line is taken back
        if (tries++ == 0) fputs("(Ctrl-C again or Ctrl-D ends)\n", stderr);
    }
    return NULL;
}

void lines_free(Lines *l) {
    free(l->in.s);
    edit_free(&l->editor);
    *l = (Lines){0};
}
