// eval.h: what compressing costs: questions of which every one is asked of the same compressed
// cache, for each policy, level, fit, ratio and page type, beside the full cache. Tasks, results
// and perplexity come with it.
#ifndef EVAL_H
#define EVAL_H
#include "eval/judge.h"
#include "eval/results.h"
#include "eval/tasks.h"
#include "policies.h"
#include "policies/fitting.h"
#include "readers.h"

enum { EVAL_LIST = 16 };

// What becomes of a compressed cache's pairs: pages settle, and evicted pairs may be demoted; and
// how they are read.
typedef struct {
    KVTypes types;
    bool demote;
    Reads reads;
    const char *name;  // in the results: "q8/q4", "f16+q2", "f16+quest"
} EvalKV;

typedef struct {
    RunState *state;    // max_logits: answers that decode together
    Context context;    // tok, chunk, local, postfix; the rest is filled in per context
    const Ids *prefix;  // protected ids before every context
    const Policy *policy[EVAL_LIST];
    const Level *level[EVAL_LIST];
    const char *set;  // "key=value,..": each takes the parameters it knows; or NULL
    double ratio[EVAL_LIST];
    FitKind fit[EVAL_LIST];  // how what stays is fitted
    EvalKV kv[EVAL_LIST];    // the full cache of the first one, all read, is the yardstick
    int n_policies, n_levels, n_ratios, n_fits, n_kvs;
    // Evict while a context is read: policies that score live, no level of whole heads, nothing
    // demoted or fitted.
    bool stream;
    int window;      // with stream: newest pairs of each head, which stay meanwhile
    int max_tokens;  // of an answer, where the task does not say
    // Texts, NULL behind the last: an answer ends after one, where the task does not say.
    const char *const *stop;
    // Policies that look at a question see each one that is asked, in the place of
    // context.question: they score anew for it, and it is put to a cache of its own.
    bool each;
    bool timed;           // measures how fast answers come, in the first contexts of each method
    int shard, n_shards;  // contexts shard, shard + n_shards, .. (from 0)
    uint64_t settings;    // hash of whatever else changes the answers
    // Appends what follows the context: question, turn change, start of the answer. 0, or -1: no
    // memory.
    int (*ask)(void *arg, const EvalQuestion *q, Ids *ids);
    void *ask_arg;
    int (*progress)(void *arg, long done, long total);  // questions times cells; nonzero stops
    void *progress_arg;
    // Called at the end for each of kv, with the share of the pages that its tokens read; or NULL.
    void (*read)(void *arg, const EvalKV *kv, double share);
    void *read_arg;
    // Called for each answer that is marked, not for results that are there already; or NULL.
    void (*show)(void *arg, const EvalCell *c, const EvalQuestion *q, const EvalMark *mark);
    void *show_arg;
} Eval;

// Whether e->set makes sense: every key is one that a policy, a level or a reader of e knows. 0, or
// -1 with err.
int eval_check_set(const Eval *e, char *err);

// Every question of every context, for each policy, level, fit, ratio and page type that r does not
// have yet. A policy scores a context once; its scores serve all the others. With
// stream every cell reads the context for itself, once per group of questions that decode together.
// Pages settle once pairs have been evicted, as in compressing. Answers are greedy and leave no
// trace. Returns 0, or -1 with err.
int eval_run(const Eval *e, const EvalTasks *tasks, EvalResults *r, char *err);
#endif
