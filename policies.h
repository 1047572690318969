// policies.h: how a context is compressed. One table of methods; a new idea is one function and one
// row.
#ifndef POLICIES_H
#define POLICIES_H
#include "kvcache.h"
#include "model.h"
#include "policies/profile.h"
#include "tokenizer.h"

enum { MAX_PARAMS = 4 };

// Ids per repeat pass where nothing else is said: the authors' number; half of it where the
// repeated text sees its own chunk alone: less time for nearly the same scores.
static inline int default_chunk(bool local) { return local ? 1000 : 2000; }

typedef struct Policy Policy;
typedef struct Level Level;

// Everything a method may look at. The sequence is empty when its score function starts; the
// function reads the context itself (context_read), so that it can switch scoring on before, during
// or after.
typedef struct Context {
    RunState *state;
    KVCache *kv;
    const Tokenizer *tok;
    int seq;
    const int *ids;       // [n_prefix + n_ctx]
    int n_prefix, n_ctx;  // the prefix (template, task text) is protected
    int chunk;            // ids per repeat pass
    bool local;           // --score-attn local
    const char *postfix;  // turn change between the repeat request and the repeated text
    const Policy
        *policy;  // who scores, with the values of its parameters; context_set fills these four in
    double policy_param[MAX_PARAMS];
    const Level *level;  // who competes with whom; NULL is the first of the table
    double level_param[MAX_PARAMS];
    bool ref_ties;           // select by the authors' threshold rule
    const Profile *profile;  // of the model, for the methods that need one; NULL: there is none
    // called after each forward call of context_read; nonzero, with err, stops
    int (*after)(void *arg, char *err);
    void *after_arg;
    // called as work goes on; total counts tokens of prefill and scoring. Nonzero stops with an
    // error.
    int (*progress)(void *arg, const char *what, long done, long total);
    void *progress_arg;
    double prefill_s,
        score_s;  // out: seconds; what is scored while the context is read counts as prefill
} Context;

// A number that --set changes.
typedef struct {
    const char *name;  // NULL ends the list
    double value;      // when it is not given
    double lo, hi;
    bool real;  // else whole numbers only
    const char *help;
} Param;

// Some pairs of one kv head of one scored layer: [first, first + n) of its list.
typedef struct Head {
    const Context *c;
    int layer, g, first, n;
    float *score;  // [n]
    void *arg;
} Head;

typedef void HeadScore(const Head *h);

// The scores of a sequence that is evicted while it grows: for each head, in the order of its list,
// from its first pair on.
typedef struct {
    Context *c;
    int n_heads;    // scored layers * n_kv_heads
    float **score;  // [n_heads][at least the pairs it has, and the rows of a forward call more]
    float **noted;  // of the same size: what a tap says of a pair as it passes, which stays with it
    void *own;      // of the method
} Live;

// How a method scores before all of a context is there.
typedef struct {
    int (*open)(Live *v, char *err);  // NULL: nothing to do
    int (*score)(Live *v, char *err);
    void (*close)(Live *v);
    HeadScore *fn;  // of methods whose scores follow from the pages alone, one head at a time
} LiveMethod;

struct Policy {
    const char *name;
    // Fills score [scored layers][n_kv_heads][n_ctx], higher = keep, any real number, and leaves
    // seq holding the context.
    int (*score)(Context *c, float *score, char *err);
    const LiveMethod *live;  // NULL: it needs the whole context
    const char *help;
    Param params[MAX_PARAMS];
};

// How scores and a ratio become a keep set.
struct Level {
    const char *name;
    SelectLevel pool;
    // BUDGET: how many pairs each head keeps, budget [scored layers][n_kv_heads].
    int (*budget)(const Context *c, double ratio, int *budget, char *err);
    const char *help;
    Param params[MAX_PARAMS];
};

extern const Policy policies[];  // both end with a NULL name
extern const Level levels[];
const Policy *policy_find(const char *name);
const Level *level_find(const char *name);

// Gives c a policy and a level with their defaults, then what key_values says:
// "window=32,kernel=7", or NULL for no changes. A key that both know is for both.
int context_set(Context *c, const Policy *p, const Level *l, const char *key_values, char *err);

// Prefill alone: seq receives the prefix and the context.
int context_read(Context *c, char *err);
// Reads and scores; score as above. When p is not the policy of context_set, with its defaults.
int context_score(Context *c, const Policy *p, float *score, char *err);
size_t context_scores(const Context *c);  // number of floats in score
// keep [as score] = 1 for the pairs that stay: the share `ratio` by c's level. Returns how many, or
// -1 with err.
long context_select(const Context *c, const float *score, double ratio, uint8_t *keep, char *err);
#endif
