// output.h: what leaves the program: results on stdout, sentences on stderr, the exit code, and how
// Ctrl-C is noticed.
#ifndef OUTPUT_H
#define OUTPUT_H
#include <stdarg.h>
#include <stddef.h>

#include "newfile.h"
#include "util.h"

#define NORETURN __attribute__((noreturn))
#define PRINTF(fmt, args) __attribute__((format(printf, fmt, args)))

// ---- the program's name ----

extern const char *program;           // as it was called, without folders: "run"
void name_program(const char *path);  // argv[0], or NULL

// ---- endings ----

// Whether stderr is a terminal where the cursor can be moved: TERM is not dumb.
bool moves_cursor(void);

// From here on SIGINT, SIGTERM and SIGHUP only set `interrupted` to their number. Work stops at its
// next step, files are as they were, and main exits with 128 + signal.
void catch_signals(void);

// A mapped file that is cut while it is read, or whose disk fails, ends the program with a
// sentence.
void catch_cut_files(void);

// "PROGRAM: <sentence>" on stderr and exit 1.
NORETURN PRINTF(1, 2) void die(const char *fmt, ...);
// The same for wrong usage of a command (NULL: of the program), with a hint, and exit 2.
NORETURN PRINTF(2, 3) void die_usage(const char *command, const char *fmt, ...);
NORETURN void die_memory(void);
NORETURN void die_stdout(void);       // stdout could not be written, for the reason in errno
NORETURN void die_interrupted(void);  // the end of a command that a signal stopped
// The end of a command whose work failed, or that a signal stopped meanwhile; of one whose file at
// path could not be written.
NORETURN void die_failed(const char *err);
NORETURN void die_file(const char *path, const char *err);
int exit_code(void);  // 0, or 128 + the signal

void *allocate(size_t n, size_t size);              // zeroed, or the end
void add_text(Buffer *b, const char *s, size_t n);  // buffer_add, or the end
char *copy_text(const char *s, size_t n);           // malloc'ed, with a NUL, or the end

// ---- stdout ----

// The format is ours; its strings may be others' and are shown in one line (text_print).
PRINTF(1, 2) void out(const char *fmt, ...);  // or the end
void out_text(const char *s, size_t n);       // lines of others, as they are shown; or the end
void out_bytes(const void *p, size_t n);      // what is our own, or meant for a file; or the end
void out_flush(void);                         // or the end

// ---- stderr ----

PRINTF(1, 2) void note(const char *fmt, ...);                 // as out, but never the end
PRINTF(1, 2) void warning(const char *fmt, ...);              // "PROGRAM: warning: <sentence>"
PRINTF(1, 0) void warning_list(const char *fmt, va_list ap);  // the same

// ---- sizes ----

// "1.5 MB"; returns buf.
const char *size_text(char buf[32], double bytes);
#endif
