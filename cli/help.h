// help.h: what the program says about itself, all of it from the tables of commands and flags.
#ifndef HELP_H
#define HELP_H
#define KVZIP_RELEASE "0.1"  // also of python/kvzip.py

#include <stdio.h>

#include "cli/flags.h"

extern const Command commands[];  // [n_commands], run.c
extern const int n_commands;

const Command *find_command(const char *name, size_t n);  // the row that name [n] names, or NULL

void print_usage(FILE *f);          // all commands, a line each
void print_help(const Command *c);  // its arguments, its flags, examples; to stdout

// `run help WHAT`, argv [argc] behind help: all commands, one of them, the manual page, or what a
// shell completes; to stdout. Anything else is wrong usage.
void print_about(int argc, char **argv);
#endif
