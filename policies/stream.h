// stream.h: evicting while tokens come, so that a context of any length is read, or a text of any
// length written, in constant memory.
#ifndef STREAM_H
#define STREAM_H
#include "policies/live.h"

// How much of a growing sequence stays: of the tokens after the prefix that it has seen, and that
// are older than the window, `budget` pairs a head on average, or the share `ratio` where budget is
// 0. The context's level says who competes with whom.
typedef struct {
    Live live;
    double ratio;
    long budget;
    int window;   // newest pairs of every head, which stay
    int *room;    // [n_heads] floats in live.score
    int *pairs;   // [n_heads] that stay of those that compete
    int checked;  // position at the last look
    size_t peak;  // bytes of the sequence at most
} Stream;

// From here on c->seq may grow by forward calls, each of them followed by stream_step. c->n_prefix
// first pairs are protected, and those of earlier documents; c->n_ctx is kept up to date; c->policy
// must be one that scores without the whole context. Returns 0, or -1 with err.
int stream_open(Stream *s, Context *c, double ratio, long budget, int window, char *err);
void stream_close(Stream *s);  // safe on a zeroed struct, and twice

// Evicts what is too much, if 64 tokens or more came since the last look: then no head holds more
// than its budget and the window.
int stream_step(Stream *s, char *err);
int stream_after(void *stream, char *err);  // the same, for a context's `after`
// The context is complete: the window competes as well. Returns the pairs after the prefix that are
// left in all heads, or -1 with err.
long stream_finish(Stream *s, char *err);
#endif
