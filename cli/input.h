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

// The directory of path takes files, and path is none of the files that the command reads.
void check_writable(const Options *o, const char *path);
void check_output(const Options *o);  // the same for -o, which must be given
#endif
