// fuzz_lines.c: questions that come line by line are the lines of the text, however a pipe cuts it;
// lines that are no text are refused; and what a terminal marks as pasted is one message.
//
// The first byte says how many bytes the pipe gives at once, its highest bit that somebody types.
#include "fuzz.h"

#include <signal.h>

#include "cli/lines.h"
#include "text.h"

enum { MOST = 1 << 15 };  // what a pipe takes without a reader

typedef struct {
    const char *text;
    size_t n, piece;  // bytes, and how many of them come at once
    int pipe[2];
    Lines lines;
    const char *left;  // of text: no line taken yet begins here
} Input;

// The next line by definition: without the newline, what was typed before it as \r, and a first
// line's mark. NULL: there is none.
static const char *plain_line(Input *in, size_t *n) {
    const char *line = in->left, *end = in->text + in->n;
    if (line == end) return NULL;
    const char *newline = memchr(line, '\n', (size_t)(end - line));
    in->left = newline ? newline + 1 : end;
    *n = (size_t)((newline ? newline : end) - line);
    while (*n > 0 && line[*n - 1] == '\r') (*n)--;
    size_t mark = line == in->text ? text_mark(line, *n) : 0;
    *n -= mark;
    return line + mark;
}

static bool is_fine(const char *line, size_t n) {
    char err[ERR_LEN];
    return text_check(line, n, err) == TEXT_FINE && !memchr(line, '\r', n);
}

static void take_all(Input *in, bool wait) {
    size_t n, n_want;
    for (char *line; (line = lines_next(&in->lines, wait, &n)) != NULL;) {
        const char *want = plain_line(in, &n_want);
        MUST(want && n == n_want && memcmp(line, want, n) == 0 && is_fine(line, n));
    }
}

static void close_end(Input *in, int end) {
    if (in->pipe[end] >= 0) close(in->pipe[end]);
    in->pipe[end] = -1;
}

static void read_pipe(void *arg) {
    Input *in = arg;
    for (size_t at = 0, n; at < in->n; at += n) {
        n = in->n - at < in->piece ? in->n - at : in->piece;
        MUST(write(in->pipe[1], in->text + at, n) == (ssize_t)n);
        take_all(in, false);
    }
    close_end(in, 1);
    take_all(in, true);
}

// Whatever keys come, a message is text without zero bytes.
static void read_terminal(void *arg) {
    Input *in = arg;
    size_t n;
    MUST(write(in->pipe[1], in->text, in->n) == (ssize_t)in->n);
    close_end(in, 1);
    in->lines.person = in->lines.edits = true;
    in->lines.editor.fd = in->pipe[0], in->lines.editor.prompt = "> ";
    for (char *line; (line = lines_next(&in->lines, true, &n)) != NULL;) MUST(strlen(line) == n);
}

// A typed Ctrl-Z stops the process group: a group of our own, which goes on. (Where a shell with
// job control is above, all that runs in the group would wait for somebody to say fg.)
int LLVMFuzzerInitialize(int *argc, char ***argv);
int LLVMFuzzerInitialize(int *argc, char ***argv) {
    (void)argc, (void)argv;
    signal(SIGTSTP, SIG_IGN);
    MUST(setpgid(0, 0) == 0 || getpgrp() == getpid());
    return 0;
}

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t n) {
    if (n < 1 || n > MOST) return 0;
    bool person = data[0] & 128;
    size_t n_line;
    Input in = {.text = (const char *)data + 1, .n = n - 1, .piece = 1 + (size_t)(data[0] & 127)};
    if (in.piece > 64) in.piece = (in.piece - 64) * 500;
    MUST(pipe(in.pipe) == 0);
    in.lines = (Lines){.fd = in.pipe[0], .name = "stdin"};
    in.left = in.text;
    bool ended = !fuzz_survives(person ? read_terminal : read_pipe, &in);
    const char *line = person ? NULL : plain_line(&in, &n_line);
    MUST(person || ended == (line && !is_fine(line, n_line)));
    lines_free(&in.lines);
    close_end(&in, 0), close_end(&in, 1);
    return 0;
}
