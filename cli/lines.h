// lines.h: questions that come line by line: from a file, a pipe or a person.
#ifndef LINES_H
#define LINES_H
#include <stdbool.h>

#include "cli/edit.h"
#include "util.h"

// Zeroed but for the first fields at the start.
typedef struct {
    int fd;            // what is read
    const char *name;  // of it, for messages
    bool person;       // somebody types: there is a prompt, and what is pasted is one message
    Buffer in;         // bytes that were read
    size_t from, end;  // those that are no line yet begin at from; none before end ends a line
    long number;       // of the last line taken, from 1
    bool ended;        // there is no more to read
    bool edits;        // the terminal can move the cursor, and marks what is pasted
    Editor editor;
} Lines;

// From here on a person's lines are edited, and pasted text is marked, where the terminal can do
// it (TERM is not dumb), until the program ends.
void lines_begin(Lines *l);

// The next line without its newline, *n bytes, which stay until the next call; a person's pasted
// lines are one, with newlines between. With wait it waits for one, without it takes only what is
// there already. NULL when there is none, or after a signal. Ctrl-C takes back what is typed so
// far; where nothing is, the first is forgiven and a second ends all.
char *lines_next(Lines *l, bool wait, size_t *n);

void lines_free(Lines *l);  // not the descriptor; safe on a zeroed struct, and twice
#endif
