// input.c: what comes into the program.
#define _POSIX_C_SOURCE 200809L
#include "cli/input.h"

#include <ctype.h>
#include <errno.h>
#include <stdlib.h>
#include <string.h>
#include <sys/stat.h>
#include <unistd.h>

#include "cli/output.h"
#include "text.h"

// ---- texts and ids ----

// What is no text is the end, but for tokenize, whose work is bytes.
static void check_kind(const Options *o, TextKind kind, const char *from, const char *err) {
    if (kind == TEXT_FINE) return;
    if (o->bit != TOKENIZE || o->decode || kind != TEXT_BYTES) die("%s: %s", from, err);
    if (!o->quiet) warning("%s: %s; other commands refuse it", from, err);
}

// Without a mark in front.
static Buffer unmarked(const Options *o, Buffer b, const char *from) {
    size_t mark = text_mark(b.s, b.n);
    if (mark > 0 && o->bit == TOKENIZE && !o->decode) {
        if (!o->quiet) warning("%s: a byte order mark, which other commands leave out", from);
    } else if (mark > 0) {
        memmove(b.s, b.s + mark, (b.n -= mark) + 1);
    }
    return b;
}

Buffer read_all(const Options *o, const char *path) {
    char err[ERR_LEN];
    const char *from = strcmp(path, "-") == 0 ? "stdin" : path;
    Buffer b;
    check_kind(o, text_read(&b, path, err), from, err);
    return unmarked(o, b, from);
}

// Returns the text without a mark.
static const char *check_argument(const Options *o, const char *name, const char *text) {
    char err[ERR_LEN];
    if (!text) return NULL;
    size_t n = strlen(text);
    check_kind(o, text_check(text, n, err), name, err);
    return text + text_mark(text, n);
}

// What --system-file names becomes the system text, as if the shell had put it there.
static void read_system(Options *o) {
    if (!o->system_file) return;
    if (o->system) die_usage(o->command, "only one of --system and --system-file can be given");
    if (strcmp(o->system_file, "-") == 0)
        die_usage(o->command, "--system-file -: stdin has other work; ./- is a file");
    Buffer b = read_all(o, o->system_file);
    while (b.n > 0 && (b.s[b.n - 1] == '\n' || b.s[b.n - 1] == '\r')) b.s[--b.n] = '\0';
    o->system = b.s ? b.s : "";
}

void check_arguments(Options *o) {
    read_system(o);
    check_argument(o, "-p", o->prompt);
    o->system = check_argument(o, "--system", o->system);
    o->task = check_argument(o, "--task", o->task);
    o->question = check_argument(o, "--question", o->question);
    o->answer_prefix = check_argument(o, "--answer-prefix", o->answer_prefix);
    for (int i = 2; o->bit == ASK && i < o->n_args; i++) {
        size_t n;
        o->args[i] = (char *)check_argument(o, "a question", o->args[i]);
        stripped(o->args[i], strlen(o->args[i]), &n);
        if (n == 0) die("number %d of the arguments: no question in it", i - 1);
    }
}

size_t check_line(const char *from, long number, const char *line, size_t n) {
    char err[ERR_LEN];
    size_t mark = number == 1 ? text_mark(line, n) : 0;
    if (text_check(line + mark, n - mark, err) != TEXT_FINE)
        die("%s: line %ld: %s", from, number, err);
    if (memchr(line, '\r', n))
        die("%s: line %ld: a carriage return within it: lines end with a newline", from, number);
    return mark;
}

void check_lines(const Options *o, const char *path) {
    struct stat st;
    if (stat(path, &st) == 0 && !S_ISREG(st.st_mode) && !S_ISDIR(st.st_mode)) return;
    free(read_all(o, path).s);
}

Buffer read_text(const Options *o, const char *fallback) {
    Buffer b = {0};
    if ((o->prompt != NULL) + (o->file != NULL) + (o->ids != NULL) > 1)
        die_usage(o->command, "only one of -p, -f and --ids can be given");
    if (o->prompt && strcmp(o->prompt, "-") != 0) {
        add_text(&b, o->prompt, strlen(o->prompt));
        return unmarked(o, b, "-p");
    }
    const char *path = o->prompt ? o->prompt : o->file ? o->file : o->ids ? o->ids : fallback;
    if (!path) die_usage(o->command, "needs -p TEXT, -f FILE or --ids FILE");
    return read_all(o, path);
}

const char *piped_input(void) { return isatty(STDIN_FILENO) ? NULL : "-"; }

static void push_id(Ids *ids, int id) {
    if (ids_push(ids, id) != 0) die_memory();
}

void parse_ids(const Buffer *text, const char *from, int vocab, Ids *ids) {
    const char *p = text->s, *end = text->s + text->n;
    while (p < end) {
        if (isspace((unsigned char)*p)) {
            p++;
            continue;
        }
        long id = 0;
        const char *start = p;
        while (p < end && isdigit((unsigned char)*p) && id < vocab) id = 10 * id + (*p++ - '0');
        if (id >= vocab || (p < end && !isspace((unsigned char)*p))) {
            while (p < end && !isspace((unsigned char)*p)) p++;
            die("%s: '%.*s' at byte %ld is not a token id from 0 to %d", from,
                (int)(p - start > 40 ? 40 : p - start), start, (long)(start - text->s), vocab - 1);
        }
        push_id(ids, (int)id);
    }
}

void encode(const Tokenizer *tok, const char *text, size_t n, unsigned how, Ids *ids) {
    if (tokenizer_encode(tok, text, n, how, ids) != 0) die_memory();
}

// ---- files to write ----

void not_the_same(const char *path, const char *other, const char *how) {
    if (other && newfile_same(path, other))
        die("%s: is %s by this command: it cannot be written", path, how);
}

void check_writable(const Options *o, const char *path) {
    char err[ERR_LEN];
    const char *const inputs[] = {o->file, o->ids, o->cache, o->profile, o->ppl, o->system_file};
    const char *const outputs[] = {o->out, o->chart, o->page};
    if (strcmp(path, "-") == 0)
        die_usage(o->command, "-: stdout is no file that can be written anew; ./- is one");
    for (int i = o->into; i < o->n_args; i++)  // into itself: the old file stays mapped
        not_the_same(path, o->args[i], "read");
    for (int i = 0; i < 6; i++) not_the_same(path, inputs[i], "read");
    for (int i = 0; o->files[i]; i++) not_the_same(path, o->files[i], "read");
    for (int i = 0; i < 3; i++)
        if (outputs[i] != path) not_the_same(path, outputs[i], "also written");
    if (newfile_check(path, err) != 0) die_file(path, err);
}

void not_an_output(const Options *o, const char *path) {
    const char *const outputs[] = {o->out, o->chart, o->page};
    for (int i = 0; i < 3; i++)
        if (outputs[i]) not_the_same(outputs[i], path, "read");
}

void check_output(const Options *o) {
    if (!o->out) die_usage(o->command, "needs -o OUT");
    check_writable(o, o->out);
}
