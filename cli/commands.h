// commands.h: the functions behind the rows of run.c's table. Each returns the exit code or ends
// the program.
#ifndef COMMANDS_H
#define COMMANDS_H
#include "cli/flags.h"

// talk.c
int cmd_generate(const Options *o);
int cmd_ask(const Options *o);
int cmd_chat(const Options *o);

// context.c
int cmd_compress(const Options *o);
int cmd_score(const Options *o);
int cmd_map(const Options *o);

// inspect.c
int cmd_info(const Options *o);
int cmd_logits(const Options *o);
int cmd_tokenize(const Options *o);

// measure.c
int cmd_bench(const Options *o);
int cmd_eval(const Options *o);
int cmd_calibrate(const Options *o);

// serve.c
int cmd_serve(const Options *o);
#endif
