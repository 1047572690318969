// edit.h: a line that a person types at a terminal, with arrows, history and what is pasted.
#ifndef EDIT_H
#define EDIT_H
#include <signal.h>
#include <stdbool.h>
#include <termios.h>

#include "util.h"

enum { EDIT_HISTORY = 100 };

// Zeroed but for the first three fields at the start.
typedef struct {
    int fd;                 // the terminal
    struct termios cooked;  // how it is while no line is typed
    const char *prompt;
    Buffer line;                  // UTF-8, with newlines only where they were pasted
    size_t at;                    // byte of the cursor
    Buffer taken;                 // what was cut last, for Ctrl-Y
    sigset_t signals;             // those that are let in while no line is typed
    bool pasting;                 // between the marks of a bracketed paste
    char *old[EDIT_HISTORY + 1];  // lines before, the newest last, then the one being typed
    int n_old, shown;             // shown: which of them is in the line
} Editor;

// Shows the prompt on stderr and reads a line into e->line. Returns false at the end of the input
// or after a signal; the terminal is as it was. Without memory it is the end.
bool edit_line(Editor *e);

void edit_free(Editor *e);  // safe on a zeroed struct, and twice
#endif
