// input.c: what comes into the program.
#define _POSIX_C_SOURCE 200809L
#include "cli/input.h"

#include <ctype.h>
#include <errno.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

#include "cli/output.h"

// ---- texts and ids ----

Buffer read_all(const char *path) {
    char err[ERR_LEN];
    Buffer b = {0};
    b.s = file_read(path, &b.n, err);
    if (!b.s) die("%s: %s", strcmp(path, "-") == 0 ? "stdin" : path, err);
    b.cap = b.n + 1;
    return b;
}

Buffer read_text(const Options *o, const char *fallback) {
    Buffer b = {0};
    if ((o->prompt != NULL) + (o->file != NULL) + (o->ids != NULL) > 1)
        die_usage(o->command, "only one of -p, -f and --ids can be given");
    if (o->prompt && strcmp(o->prompt, "-") != 0) {
        add_text(&b, o->prompt, strlen(o->prompt));
        return b;
    }
    const char *path = o->prompt ? o->prompt : o->file ? o->file : o->ids ? o->ids : fallback;
    if (!path) die_usage(o->command, "needs -p TEXT, -f FILE or --ids FILE");
    return read_all(path);
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
    const char *const inputs[] = {o->file, o->ids, o->cache, o->profile, o->ppl},
                      *other = path == o->out ? o->chart : o->out;
    for (int i = o->into; i < o->n_args; i++)  // into itself: the old file stays mapped
        not_the_same(path, o->args[i], "read");
    for (int i = 0; i < 5; i++) not_the_same(path, inputs[i], "read");
    not_the_same(path, other, "also written");
    if (newfile_check(path, err) != 0) die_file(path, err);
}

void check_output(const Options *o) {
    if (!o->out) die_usage(o->command, "needs -o OUT");
    check_writable(o, o->out);
}
