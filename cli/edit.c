// edit.c: typing a line.
//
// The terminal gives keys as they come only while a line is typed; Ctrl-C stays a signal. Of a long
// line the part around the cursor is seen. However edit_line is left, the terminal is as it was.
#define _DEFAULT_SOURCE  // SIGWINCH, TIOCGWINSZ
#define _DARWIN_C_SOURCE
#include "cli/edit.h"

#include <errno.h>
#include <poll.h>
#include <signal.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/ioctl.h>
#include <sys/select.h>
#include <unistd.h>

#include "cli/output.h"
#include "text.h"

enum { CTRL = 0x1f, ESC = 27, DEL = 127 };

// ---- drawing ----

// The character at i with its marks, or a byte that is none: columns, what it is, where it ends.
static int look(const Editor *e, size_t i, uint32_t *c, size_t *next) {
    const uint8_t *s = (const uint8_t *)e->line.s, *end = s + e->line.n;
    uint32_t mark;
    int n = utf8_get(s + i, end, c);
    if (n <= 0) *c = 0xfffd, n = 1;
    for (*next = i + (size_t)n; s + *next < end; *next += (size_t)n)
        if ((n = utf8_get(s + *next, end, &mark)) <= 0 || text_columns(mark) > 0) break;
    return max_int(text_columns(*c), 1);
}

static size_t next_char(const Editor *e, size_t i) {
    uint32_t c;
    if (i < e->line.n) look(e, i, &c, &i);
    return i;
}

static size_t last_char(const Editor *e, size_t i) {
    size_t from = i > 64 ? i - 64 : 0, to = from;  // far enough for a character and its marks
    while (from > 0 && ((unsigned char)e->line.s[from] & 0xc0) == 0x80) from++;
    for (; from < i; from = next_char(e, from)) to = from;
    return to;
}

// Newlines are seen as an arrow, what steers a terminal as a question mark.
static void draw(const Editor *e) {
    struct winsize size = {0};
    int width = ioctl(e->fd, TIOCGWINSZ, &size) == 0 && size.ws_col > 0 ? size.ws_col : 80;
    int prompt = (int)strlen(e->prompt), room = max_int(width - prompt - 1, 2), before = 0, w;
    uint32_t c;
    size_t from = e->at, next;
    for (size_t i; from > 0; before += w, from = i)
        if (before + (w = look(e, i = last_char(e, from), &c, &next)) > room) break;
    fprintf(stderr, "\r%s", e->prompt);
    for (int used = 0; from < e->line.n; used += w, from = next) {
        if (used + (w = look(e, from, &c, &next)) > room) break;
        if (text_steers(c) || c == 0xfffd)
            fputs(c == '\n' ? "\u21b5" : c == '\t' ? " " : "?", stderr);
        else
            fwrite(e->line.s + from, 1, next - from, stderr);
    }
    fprintf(stderr, "\033[K\r\033[%dC", prompt + before);
}

// ---- changing the line ----

static void insert(Editor *e, const char *s, size_t n) {
    add_text(&e->line, s, n);
    memmove(e->line.s + e->at + n, e->line.s + e->at, e->line.n - e->at - n);
    memcpy(e->line.s + e->at, s, n), e->at += n;
}

// With keep it is there for Ctrl-Y.
static void cut(Editor *e, size_t from, size_t to, bool keep) {
    if (keep && to > from) e->taken.n = 0, add_text(&e->taken, e->line.s + from, to - from);
    memmove(e->line.s + from, e->line.s + to, e->line.n - to + 1);
    e->line.n -= to - from, e->at = from;
}

static size_t word_start(const char *s, size_t i) {
    while (i > 0 && s[i - 1] == ' ') i--;
    while (i > 0 && s[i - 1] != ' ') i--;
    return i;
}

// An older line (-1) or a newer one (1) takes the place of this one, which is kept.
static void recall(Editor *e, int step) {
    int to = e->shown + step;
    if (to < 0 || to > e->n_old) return;
    if (e->shown == e->n_old)
        free(e->old[to - step]), e->old[to - step] = copy_text(e->line.s, e->line.n);
    e->shown = to, e->line.n = e->at = 0;
    insert(e, e->old[to], strlen(e->old[to]));
}

static void remember(Editor *e) {
    free(e->old[e->n_old]), e->old[e->n_old] = NULL;
    if (e->line.n == 0 || (e->n_old > 0 && strcmp(e->old[e->n_old - 1], e->line.s) == 0)) return;
    if (e->n_old == EDIT_HISTORY)
        free(e->old[0]), memmove(e->old, e->old + 1, (size_t)--e->n_old * sizeof *e->old);
    e->old[e->n_old++] = copy_text(e->line.s, e->line.n);
}

// ---- keys ----

static void give_keys(const Editor *e) {
    struct termios keys = e->cooked;
    keys.c_lflag &= ~(tcflag_t)(ICANON | ECHO | IEXTEN);
    keys.c_cc[VMIN] = 1, keys.c_cc[VTIME] = 0;
    keys.c_cc[VSUSP] = keys.c_cc[VQUIT] = _POSIX_VDISABLE;  // they would leave it so
    tcsetattr(e->fd, TCSANOW, &keys);
    fputs("\033[?2004h", stderr);  // pasted text is marked
}

// The next byte, or -1. Signals come here and nowhere else: Ctrl-C, a window that changes, a stop.
static int read_byte(Editor *e) {
    unsigned char c;
    for (fd_set in; !interrupted; give_keys(e), draw(e)) {
        FD_ZERO(&in);
        FD_SET(e->fd, &in);
        if (pselect(e->fd + 1, &in, NULL, NULL, NULL, &e->signals) >= 0)
            return read(e->fd, &c, 1) == 1 ? c : -1;
        if (errno != EINTR) return -1;
    }
    return -1;
}

// The rest of ESC [ 3 ~ and the like (xterm's control sequences). Returns false at the end.
static bool escape(Editor *e) {
    int c = read_byte(e), number = 0;
    if (c == '[' || c == 'O')
        while ((c = read_byte(e)) >= '0' && c <= ';')
            number = c >= '0' && c <= '9' && number < 1000 ? 10 * number + c - '0' : 0;
    if (c == '~' && (number == 200 || number == 201)) e->pasting = number == 200;
    if (e->pasting) return true;
    if (c == 'A' || c == 'B') recall(e, c == 'A' ? -1 : 1);
    if (c == 'C') e->at = next_char(e, e->at);
    if (c == 'D') e->at = last_char(e, e->at);
    if (c == 'H' || (c == '~' && (number == 1 || number == 7))) e->at = 0;
    if (c == 'F' || (c == '~' && (number == 4 || number == 8))) e->at = e->line.n;
    if (c == '~' && number == 3) cut(e, e->at, next_char(e, e->at), false);
    return c >= 0;
}

static void key(Editor *e, int c) {
    if (c == ('A' & CTRL)) e->at = 0;
    if (c == ('E' & CTRL)) e->at = e->line.n;
    if (c == ('D' & CTRL)) cut(e, e->at, next_char(e, e->at), false);
    if (c == ('K' & CTRL)) cut(e, e->at, e->line.n, true);
    if (c == ('U' & CTRL)) cut(e, 0, e->at, true);
    if (c == ('W' & CTRL)) cut(e, word_start(e->line.s, e->at), e->at, true);
    if (c == ('Y' & CTRL) && e->taken.n > 0) insert(e, e->taken.s, e->taken.n);
    if (c == ('Z' & CTRL))  // as the terminal does, to all of a pipe
        tcsetattr(e->fd, TCSANOW, &e->cooked), kill(0, SIGTSTP), give_keys(e);
    if (c == DEL || c == '\b') cut(e, last_char(e, e->at), e->at, false);
    if (c >= ' ' && c != DEL) insert(e, &(char){(char)c}, 1);
}

static bool read_keys(Editor *e) {
    for (int c;;) {
        if (poll(&(struct pollfd){.fd = e->fd, .events = POLLIN}, 1, 0) <= 0) draw(e);
        if ((c = read_byte(e)) < 0 || (c == ('D' & CTRL) && e->line.n == 0)) return false;
        bool newline = c == '\n' || c == '\r';
        if (newline && !e->pasting) return true;
        if (c == ESC && !escape(e)) return false;
        if (c != ESC && e->pasting && c != '\0') insert(e, newline ? "\n" : &(char){(char)c}, 1);
        if (c != ESC && !e->pasting) key(e, c);
        if (e->line.n > STREAM_MOST) die("stdin: more than %d MB and no end", STREAM_MOST >> 20);
    }
}

static void wake(int sig) { (void)sig; }

bool edit_line(Editor *e) {
    struct sigaction sa = {.sa_handler = wake}, winch, cont;
    sigset_t all;
    sigfillset(&all), sigdelset(&all, SIGTSTP), pthread_sigmask(SIG_BLOCK, &all, &e->signals);
    sigaction(SIGWINCH, &sa, &winch), sigaction(SIGCONT, &sa, &cont);
    e->line.n = e->at = 0, e->pasting = false, e->shown = e->n_old, add_text(&e->line, "", 0);
    give_keys(e);
    bool whole = read_keys(e);
    e->at = e->line.n;
    if (whole) draw(e), fputc('\n', stderr);
    tcsetattr(e->fd, TCSANOW, &e->cooked);
    sigaction(SIGWINCH, &winch, NULL), sigaction(SIGCONT, &cont, NULL);
    pthread_sigmask(SIG_SETMASK, &e->signals, NULL);
    if (whole) remember(e);
    return whole;
}

void edit_free(Editor *e) {
    for (int i = 0; i <= EDIT_HISTORY; i++) free(e->old[i]);
    free(e->line.s), free(e->taken.s);
    *e = (Editor){0};
}
