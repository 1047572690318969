// fitting.h: fitting a whole context: the queries it is fitted to are caught as they pass, and
// after the choice of pairs every head is fitted (fit.h).
#ifndef FITTING_H
#define FITTING_H
#include "policies/context.h"

// Values, or values and biases (fit.h); or what goes is merged into what stays (merge.h).
typedef enum { FIT_NONE, FIT_VALUES, FIT_BOTH, FIT_MERGE, FIT_POOL, FIT_KINDS } FitKind;

// "none", "values", "both", "merge" or "pool"; -1: none of them.
int fit_kind(const char *name);
const char *fit_kind_name(FitKind kind);

// Positions whose queries are caught, evenly spaced. Where one pair in FIT_FEW stays, or less,
// heads are fitted to them all: what stays must carry most, and is quickly fitted. Else they take
// every second.
enum { FIT_POSITIONS = 340, FIT_FEW = 6 };

// Queries of the scored layers' heads, in half precision.
struct Fitting {
    FitKind kind;
    const Context *c;
    // What passes at the moment: the row of seq at position from + i is token i of n_tokens, if i
    // is `first` or more.
    int seq, from, first, n_tokens;
    bool repeats;  // they follow the context, and see themselves as well
    int every;     // while tokens come, nobody knows how many: one token in `every` is caught
    int n;         // positions caught
    // [scored layers][n_heads][FIT_POSITIONS][head_dim]: after RoPE where they repeat, else before
    uint16_t *q;
    float *own;  // [scored layers][n_heads][FIT_POSITIONS] as FitHead.own, where they repeat
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
// The same for c->seq as it grows, from its beginning: positions of all that came so far.
void fitting_follow(Fitting *f, const Context *c);
// Of a forward call in which it watches, for RunState.watch: the queries of n rows in a layer.
void fitting_tap(void *f, int layer, int n);

// Of a head's pairs all stay but those from the prefix on whose keep [n] is 0.
typedef struct {
    int n;
    const uint8_t *keep;
} FitChoice;

// Gives the pairs of c->seq that stay values and biases; the others are evicted afterwards. choice
// [scored heads]. 0, or -1 with err.
int fitting_apply(const Fitting *f, const Context *c, const FitChoice *choice, char *err);
// The same for a whole context and the keep of context_select.
int fitting_apply_whole(const Fitting *f, const Context *c, const uint8_t *keep, char *err);
#endif
