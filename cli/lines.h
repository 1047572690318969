// lines.h: questions that come line by line: from a file, a pipe or a person.
#ifndef LINES_H
#define LINES_H
#include <stdbool.h>

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
    bool pastes;       // the terminal marks what is pasted
    Buffer message;    // of several lines
} Lines;

// From here on a person's terminal marks pasted text, where it can, until the program ends.
void lines_begin(Lines *l);

// The next line without its newline, *n bytes, which stay until the next call; a person's pasted
// lines are one, with newlines between. With wait it waits for one, without it takes only what is
// there already. NULL when there is none, or after a signal. A first Ctrl-C at the prompt is
// forgiven, a second ends all.
char *lines_next(Lines *l, bool wait, size_t *n);

void lines_free(Lines *l);  // not the descriptor; safe on a zeroed struct, and twice
#endif
