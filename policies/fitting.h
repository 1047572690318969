// fitting.h: fitting a whole context: the queries it is fitted to are caught as they pass, and
// after the choice of pairs every head is fitted (fit.h).
#ifndef FITTING_H
#define FITTING_H
#include "policies/context.h"

typedef enum { FIT_NONE, FIT_VALUES, FIT_BOTH, FIT_KINDS } FitKind;

// "none", "values" or "both"; -1: none of them.
int fit_kind(const char *name);
const char *fit_kind_name(FitKind kind);

// Positions whose queries are known, evenly spaced. Three times as many bring KL down by a tenth
// and cost three times as much.
enum { FIT_POSITIONS = 170 };

// Queries of the scored layers' heads, in half precision.
struct Fitting {
    FitKind kind;
    const Context *c;
    // What passes at the moment: the row of seq at position from + i is token i of n_tokens, if i
    // is `first` or more.
    int seq, from, first, n_tokens;
    bool repeats;  // they follow the context, and see themselves as well
    int n;         // positions caught
    uint16_t *q;   // [scored layers][n_heads][FIT_POSITIONS][head_dim] after RoPE
    float *own;    // [scored layers][n_heads][FIT_POSITIONS] as FitHead.own, where they repeat
};

// Bytes that catching and fitting take for a context of n tokens of which `kept` pairs a head stay.
size_t fitting_bytes(const KVShape *shape, int n, int kept, int threads);

// Room for the queries of c's model. 0, or -1 with err. f stays where it is until it is closed.
int fitting_open(Fitting *f, FitKind kind, const Context *c, char *err);
void fitting_close(Fitting *f);  // safe on a zeroed struct, and twice

// From here on rows of pass.seq are caught; and no longer.
typedef struct {
    int seq, from, first, n_tokens;
    bool repeats;
} FitPass;
void fitting_watch(Fitting *f, const Context *c, FitPass pass);
void fitting_rest(Fitting *f);
// Of a forward call in which it watches, for RunState.watch: the queries of n rows in a layer.
void fitting_tap(void *f, int layer, int n);

// Gives the pairs of c->seq that keep names (context_select), and those of the prefix, values and
// biases; they are evicted afterwards. 0, or -1 with err.
int fitting_apply(const Fitting *f, const Context *c, const uint8_t *keep, char *err);
#endif
