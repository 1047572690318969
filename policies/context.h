// context.h: the nouns of a method. A Policy says how much each pair of a context matters, a Level
// who competes with whom for the places; a Context is everything that either may look at.
#ifndef CONTEXT_H
#define CONTEXT_H
#include "kvcache.h"
#include "model.h"
#include "policies/profile.h"
#include "select.h"
#include "tokenizer.h"

enum { MAX_PARAMS = 6 };  // four of a method at most, and two of one that wraps it

typedef struct Context Context;
typedef struct Fitting Fitting;        // what stays is fitted to queries that passed (fitting.h)
typedef struct Head Head;              // pairs of one kv head (live.h)
typedef struct LiveMethod LiveMethod;  // how a method watches tokens pass (live.h)

// A number that --set changes.
typedef struct {
    const char *name;  // NULL ends the list
    double value;      // when it is not given
    double lo, hi;
    bool real;  // else whole numbers only
    const char *help;
} Param;

// Whether a method looks at the question (Context.question). From ASKS_ALWAYS on it needs one;
// ASKS_TASK: a task's description does as well.
typedef enum { ASKS_NOTHING, ASKS_IF_GIVEN, ASKS_ALWAYS, ASKS_TASK } Asks;

// How much each pair matters: higher = keep, any real number but NaN. A row has one of the three
// functions:
//   .head   for scores that follow from the pages alone: fills one head at a time
//   .live   for scores that need a look at the tokens as they pass
//   .score  for scores that need the whole context: reads it, fills score [scored
//           layers][n_kv_heads][n_ctx], and leaves c->seq holding it. Returns 0, or -1 with err.
// With .head or .live a method serves whole contexts and sequences that are evicted while they
// grow.
typedef struct {
    const char *name;
    void (*head)(const Head *h);
    const LiveMethod *live;
    int (*score)(Context *c, float *score, char *err);
    bool repeats;  // it lets the model say the context again: fitting uses the queries of that
    bool whole;    // with .live: nothing may be evicted before all of the context is there
    Asks asks;
    const char
        *inner;  // it wraps another method's scores (wrapped.c): the row that it usually wraps
    const char *help;
    Param params[MAX_PARAMS];
} Policy;

// Whether p can score before all of a context is there.
static inline bool policy_is_live(const Policy *p) { return (p->head || p->live) && !p->whole; }

// How scores and a ratio become a keep set.
typedef struct {
    const char *name;
    SelectLevel pool;
    // LEVEL_BUDGET: how many pairs each head keeps, budget [scored layers][n_kv_heads]. Returns 0,
    // or -1 with err.
    int (*budget)(const Context *c, double ratio, int *budget, char *err);
    const char *help;
    Param params[MAX_PARAMS];
} Level;

// Everything a method may look at. The sequence is empty when its score function starts, or holds
// earlier documents; the function reads the context itself (context_read), so that it can switch
// scoring on before, during or after.
struct Context {
    RunState *state;
    KVCache *kv;
    const Tokenizer *tok;
    int seq;
    const int *ids;       // [n_prefix + n_ctx]
    int n_prefix, n_ctx;  // the prefix (template, task text) is protected
    // Earlier documents between prefix and context, which the sequence holds with the prefix: how
    // many tokens they had, and pairs of them [scored heads]. NULL: there are none.
    int n_held;
    const int *held;
    int chunk;            // ids per repeat pass
    bool local;           // --score-attn local
    const char *postfix;  // turn change between the repeat request and the repeated text
    // What will be asked, as it is put behind the context, for methods that look at that. No
    // question: 0.
    const int *question;  // [n_question]
    int n_question;
    // who scores, and who competes with whom, with the values of their parameters: context_set
    // fills these four in. Level NULL is level pair.
    const Policy *policy;
    double policy_param[MAX_PARAMS];
    const Level *level;
    double level_param[MAX_PARAMS];
    bool ref_ties;           // select by the authors' threshold rule
    Fitting *fitting;        // catches queries while the context is scored, or NULL
    const Profile *profile;  // of the model, for the methods that need one; NULL: there is none
    // called after each forward call of context_read; nonzero, with err, stops
    int (*after)(void *arg, char *err);
    void *after_arg;
    // called as work goes on; total counts tokens of prefill and scoring. Nonzero stops with an
    // error.
    int (*progress)(void *arg, const char *what, long done, long total);
    void *progress_arg;
    // out: seconds; what is scored while the context is read counts as prefill
    double prefill_s, score_s, fit_s;
};

// Ids per repeat pass where nothing else is said: the authors' number; half of it where the
// repeated text sees its own chunk alone: less time for nearly the same scores.
static inline int default_chunk(bool local) { return local ? 1000 : 2000; }

// ---- reading ----

// Ids to append to a sequence, wanting no logits.
typedef struct {
    int seq;
    const int *ids;  // [n]
    int n;
    // for progress: the word for this work, tokens of it done before, and all of them
    const char *what;
    long done, total;
} Feed;

// Feeds the ids in blocks of the rows that a forward call takes, with c's `after` and `progress`
// behind each. Returns 0, or -1 with err.
int context_feed(Context *c, const Feed *f, char *err);

// Prefill alone: c->seq receives what it does not hold, prefix and context or the context. Returns
// 0, or -1 with err.
int context_read(Context *c, char *err);

// ---- what there is ----

int context_heads(const Context *c);         // scored layers (those without a window) * n_kv_heads
int context_group(const Context *c);         // query heads that share a kv head
size_t context_scores(const Context *c);     // floats in score: context_heads * n_ctx
int context_pos(const Context *c);           // position of its first token
int context_first(const Context *c, int h);  // where its pairs begin in the list of scored head h

// 0, or -1 with err where c has no profile; `what` needs one: "policy kvzap".
int context_need_profile(const Context *c, const char *what, char *err);

// ---- parameters ----

// Where key [n] stands among params [MAX_PARAMS], or -1: it is none of them.
int param_find(const Param *params, const char *key, size_t n);

// The value of the parameter that the row of c's policy has under this name.
double context_param(const Context *c, const char *name);

// The same of c's level.
double context_level_param(const Context *c, const char *name);

// Gives c a policy and a level with their defaults, then what key_values says:
// "window=32,kernel=7", or NULL for no changes. A key that both know is for both. Returns 0, or -1
// with err: no such key, or a value out of its range.
int context_set(Context *c, const Policy *p, const Level *l, const char *key_values, char *err);

// Gives c another policy with its defaults; the level stays.
void context_set_policy(Context *c, const Policy *p);
#endif
