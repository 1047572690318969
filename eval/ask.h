// ask.h: the questions of one context, put to caches that hold it. The full cache answers first: by
// its answers all others are judged. Knows nothing of policies.
#ifndef ASK_H
#define ASK_H
#include "answer.h"
#include "eval/judge.h"
#include "eval/results.h"
#include "eval/tasks.h"

// A question at work.
typedef struct {
    const EvalQuestion *q;
    Judged judged;      // its ids, and the full cache's answer
    Reply reply;        // of the cache at hand
    Buffer full_text;   // the full cache's answer
    double full_value;  // in the task's metric
} Asked;

// The first fields are the caller's to fill in, the others start as zeros.
typedef struct {
    const EvalTask *task;
    RunState *state;  // max_logits: answers that decode together
    const Tokenizer *tok;
    KVCache *full_kv;         // the full cache, where its sequence
    int full_seq;             // ends with the context
    int limit;                // tokens of an answer
    const char *const *stop;  // texts, NULL behind the last: an answer ends after one; or NULL
    // Appends what follows the context: question, turn change, start of the answer. 0, or -1: no
    // memory.
    int (*ids)(void *arg, const EvalQuestion *q, Ids *ids);
    void *ids_arg;
    int (*progress)(void *arg);  // after each forward call; nonzero stops
    void *progress_arg;
    // Called for each answer that is marked; or NULL.
    void (*show)(void *arg, const EvalCell *c, const EvalQuestion *q, const EvalMark *mark);
    void *show_arg;

    bool single;     // a group is one question
    Asked *asked;    // [task->n_questions]
    int begin, end;  // the group: questions whose full logits are in memory
    Answerer answerer;
    Judge judge;
} Asking;

// Asks the full cache everything. Returns 0, or -1 with err; to be closed either way.
int asking_open(Asking *a, char *err);
void asking_close(Asking *a);  // safe on a zeroed struct, and twice

// The group of questions that begins with `begin`, as many as there is memory for: computes the
// full cache's logits. Returns 0, or -1 with err.
int asking_group(Asking *a, int begin, char *err);

// Puts the group's questions to forks of seq, which leaves no trace, and writes their numbers into
// c. Returns 0, or -1 with err.
int asking_put(Asking *a, KVCache *kv, int seq, EvalCell *c, char *err);
#endif
