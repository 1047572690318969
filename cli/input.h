// input.h: what comes into the program: texts and token ids from flags, files and stdin; and
// whether the files to write can be written, before any work is done. What is wrong is the end.
#ifndef INPUT_H
#define INPUT_H
#include "cli/flags.h"
#include "tokenizer.h"
#include "util.h"

Buffer read_all(const char *path);  // the whole file, or stdin for "-"

// What -p, -f or --ids gives; without any, the file at fallback (NULL: they are needed). Two of
// them are wrong usage.
Buffer read_text(const Options *o, const char *fallback);

const char *piped_input(void);  // "-" where stdin is no terminal, else NULL

// Appends decimal ids below vocab, white space between them; `from` names their source.
void parse_ids(const Buffer *text, const char *from, int vocab, Ids *ids);

// tokenizer_encode, or the end.
void encode(const Tokenizer *tok, const char *text, size_t n, unsigned how, Ids *ids);

// path and `other`, which the command reads or writes (how), are not the same file, or the end.
void not_the_same(const char *path, const char *other, const char *how);
// The file at path can be written, which is tried, and is none that the command reads.
void check_writable(const Options *o, const char *path);
void check_output(const Options *o);  // the same for -o, which must be given
#endif
