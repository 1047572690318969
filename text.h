// text.h: text that others wrote: how it is shown, whether it is text at all, and what a file is
// that was taken for another.
#ifndef TEXT_H
#define TEXT_H
#include <stdarg.h>
#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>
#include <stdio.h>

#include "util.h"

// ---- showing ----

// Whether a character steers what shows it and is no part of the text: C0 controls (newline and tab
// too), DEL, C1 controls, line and paragraph separators, the embeddings, overrides and isolates
// that reorder a line (CVE-2021-42574), and U+FFFE and U+FFFF, which XML forbids.
bool text_steers(uint32_t c);

// Columns of a terminal that a character takes: 2 for East Asian ones and pictures, 0 for marks on
// others and what joins them, else 1.
int text_columns(uint32_t c);

enum { TEXT_SHOWN = 8 };
// Writes the character at *s, *s < end, as it is shown: itself; one that steers as \x1b (up to
// U+007F) or \u202e, newline, tab and carriage return as \n, \t and \r; what is no UTF-8 as U+FFFD,
// as in JSON. With `lines` newline, tab and the carriage return of \r\n stay what they are. Moves
// *s behind it; returns how many bytes out has, which get no NUL.
int text_show(char out[TEXT_SHOWN], const char **s, const char *end, bool lines);

// A vfprintf whose format is ours and whose strings are not: %s is shown in one line, and a width
// counts characters. Known are %s, %c, %d, %u, %x, %f, %e, %g with flags, width and precision,
// %.*s, and %%; l, ll, z and j before d, u and x. Allocates nothing.
void text_print(FILE *f, const char *fmt, va_list args);

// s [n] as it is shown, lines as they are.
void text_put(FILE *f, const char *s, size_t n);

// ---- reading ----

// Text is UTF-8 without a zero byte. What is not is told apart, because a tokenizer takes any
// bytes.
typedef enum {
    TEXT_FINE,
    TEXT_BYTES,  // bytes that no text has: err says which, where, and what encoding they look like
    TEXT_OTHER,  // another kind of file, such as gzip, PDF or UTF-16: err names it
    TEXT_FAILED  // it could not be read
} TextKind;

// Which of these s [n], all of a text, is; err for what is not fine.
TextKind text_check(const char *s, size_t n, char *err);

// Bytes of the mark that some editors put before UTF-8 (U+FEFF), 0 or 3.
size_t text_mark(const char *s, size_t n);

// The one way in for texts: the whole file, or stdin for "-", into *b; b->s is malloc'ed, with a
// NUL behind it, and NULL for TEXT_FAILED and TEXT_OTHER. Errors as above.
TextKind text_read(Buffer *b, const char *path, char *err);
#endif
