// input.h: what comes into the program: texts and token ids from flags, files and stdin; and
// whether the files to write can be written, before any work is done. What is wrong is the end.
#ifndef INPUT_H
#define INPUT_H
#include "cli/flags.h"
#include "tokenizer.h"
#include "util.h"

// Texts are UTF-8, whatever command reads them: what is not is refused by name, a mark in front
// (BOM) left out. Only tokenize takes any bytes as they are, with a warning.

Buffer read_all(const Options *o, const char *path);  // the whole text, or stdin for "-"

// The same for texts that are arguments: -p (whose mark read_text leaves out), --system and the
// like, questions.
void check_arguments(Options *o);

// The same for line `number` (from 1) of what is read line by line; returns the bytes of a mark.
size_t check_line(const char *from, long number, const char *line, size_t n);
// All lines of a file, before any work; a pipe's are looked at when they come.
void check_lines(const Options *o, const char *path);

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
// The file at path, which is read, is none that the command writes, or the end.
void not_an_output(const Options *o, const char *path);
void check_output(const Options *o);  // the same for -o, which must be given
#endif
