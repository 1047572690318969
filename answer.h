// answer.h: answers of a model, one or many at a time: writing, stopping, and the turns of a chat.
//
// A Reply stands for itself: it has a sequence of the cache, ids that it still has to read, and the
// text it has written. answer_step moves any set of replies on by one forward call, some reading,
// some writing, so that they may come and go between steps. Nothing here prints, waits or knows of
// flags: between two steps the caller looks at the replies' text, at the clock or at signals.
#ifndef ANSWER_H
#define ANSWER_H
#include "constrain.h"
#include "kvcache.h"
#include "model.h"
#include "sampling.h"
#include "tokenizer.h"
#include "util.h"

typedef struct Reply Reply;

// What replies are made with. `after` and `kv` may be changed between steps.
typedef struct {
    RunState *state;
    KVCache *kv;
    const Tokenizer *tok;
    // Called after every forward call, to evict while tokens come (stream_after); or NULL. Nonzero,
    // with err, is an error of the step.
    int (*after)(void *arg, char *err);
    void *after_arg;
    // Called for every token that a step draws, before the reply takes it, with the logits
    // [vocab_size] that it was drawn from; or NULL.
    void (*drawn)(void *arg, const Reply *r, const float *logits, int id);
    void *drawn_arg;
    Choice *choices;  // [vocab_size] scratch of sampling
} Answerer;

// Returns 0, or -1 with err: no memory.
int answer_open(Answerer *a, RunState *state, KVCache *kv, const Tokenizer *tok, char *err);
void answer_close(Answerer *a);  // safe on a zeroed struct, and twice

// ---- replies ----

// The first fields are the caller's to fill in, the others start as zeros.
struct Reply {
    int seq;            // of the cache, no other reply's
    const int *prompt;  // [n_prompt] at least one id to read first; stays the caller's
    int n_prompt;
    int limit;  // ids at most
    const char *const
        *stop;  // texts, NULL behind the last: the answer ends right after the first of
    // them that it has; or NULL
    bool ignore_stop;    // go on after stop tokens, which then are ids like others
    Sampling *sampling;  // NULL: always the likeliest token. Penalties see this prompt and answer

    // Ids that drafts of at most `draft` tokens are looked for in (drafts.h), before those of the
    // prompt and the answer; draft 0: none. They change nothing but the time, and are for answers
    // of likeliest tokens.
    const int *source;  // [n_source]
    int n_source, draft;

    Schema *schema;  // the form of the answer, behind its prefix: it ends where the value is
                     // complete, whatever ignore_stop says; NULL: any

    Ids ids;          // the answer's tokens so far; a stop token is not among them
    int stop_id;      // the stop token that ended it, -1: none did
    int n_fed;        // of the prompt's and then the answer's ids, how many the cache holds
    bool done, cut;   // cut: it is done because it has as many ids as the limit allows
    Buffer text;      // the answer prefix, then what the ids print; control tokens print nothing
    size_t n_prefix;  // bytes of the answer prefix
    size_t shown;     // bytes of the text that the caller has passed on; it alone uses this
    int n_drafted, n_accepted;  // ids of drafts, and those that the model wrote as well
    int misses, skip;           // drafts in a row that were wrong; steps without one that follow
    Form form;                  // how far the answer is in its schema
    TokStream stream;           // holds bytes of an unfinished character
    double read_s, write_s;     // seconds of the steps that read the prompt, and of those after
};

// Starts a reply whose text begins with prefix, the start of the answer that the prompt ends with
// ("" where there is none). Returns 0, or -1 with err: no memory.
int reply_begin(Reply *r, const char *prefix, char *err);

// Appends id to the answer as if it had been sampled; r is done where it says so. Ids taken before
// the first step are read like a prompt. Returns 0, or -1 with err: no memory, or r's schema does
// not let it come.
int reply_take(const Answerer *a, Reply *r, int id, char *err);

// Adds to the text what is held of an unfinished character: for a reply that is given up. One that
// is done holds nothing. Returns 0, or -1 with err: no memory.
int reply_flush(const Answerer *a, Reply *r, char *err);

void reply_free(Reply *r);  // its memory, not its sequence; safe on a zeroed struct, and twice

// One forward call for those of the replies [n] that are not done: each feeds ids that the cache
// lacks, and takes its next token once it lacks none. Those that write get a row each, those that
// read share what is left of the state's max_rows, in their order; whoever finds no room, or is
// beyond max_logits, waits. What a reply computes is the same to the bit alone and among others;
// only draws from a shared Sampling depend on who draws before. Returns how many are not done yet,
// or -1 with err.
int answer_step(const Answerer *a, Reply *const *r, int n, char *err);

// ---- turns ----

// A conversation. On a saved context the first question follows it directly, as KVzip's authors ask
// (arXiv 2505.23416), and so does every question where the model has no chat template; later ones
// are turns of a chat.
typedef struct {
    const Tokenizer *tok;
    const char *system;  // system text of a chat that begins here, or NULL
    bool raw;            // no chat template: questions are taken as they are
    bool on_context;     // the sequence held a context before the first question
    int seq, n_turns;
    Ids pending;  // the end of the last answer, which the cache does not hold yet
} Talk;

// What stands before a context that is asked about later: the chat's beginning with the system
// text, where one is given, and the task.
typedef struct {
    const Tokenizer *tok;
    const char *system, *task;  // NULL: none; the task of KVzip's authors (arXiv 2505.23416)
    bool raw;                   // nothing but the tokens that begin a text
} TalkOpening;

// Appends its ids. Returns 0, or -1 with err: no memory, or a system text that the model's chat
// template does not take.
int talk_opening(const TalkOpening *t, Ids *ids, char *err);

// Appends the ids that put a question: what is pending, the question, the turn change, and prefix,
// the start of the answer ("" where there is none). Returns 0, or -1 with err: no memory.
int talk_ask(const Talk *t, const char *question, const char *prefix, Ids *ids, char *err);

// How many ids the first question begins with, whatever it says: the template's beginning and the
// system text. Returns -1 with err when there is no memory.
int talk_prefix(const Talk *t, char *err);

// The reply's sequence becomes the talk's: its last question and answer count as a turn. Pending is
// what the cache lacks of the answer: tokens not fed, and the template's end of it. Returns 0, or
// -1 with err: no memory.
int talk_answered(Talk *t, const Reply *r, char *err);

void talk_free(Talk *t);  // safe on a zeroed struct, and twice
#endif
