// session.h: everything that is open while a command runs, and how far its work has come.
#ifndef SESSION_H
#define SESSION_H
#include "answer.h"
#include "cli/flags.h"
#include "kvfile.h"
#include "model.h"
#include "policies.h"
#include "policies/fitting.h"
#include "policies/stream.h"
#include "readers.h"
#include "tokenizer.h"

typedef struct {
    const Options *o;
    ThreadPool *pool;
    Model model;
    Tokenizer *tok;
    RunState state;
    KVCache kv;
    KVInfo info;  // of a loaded cache
    bool warned;  // about positions that the model was not trained for
    // answers (open_answers)
    Answerer answerer;
    Sampling sampling;  // of an answer: each question begins with these numbers (ask_random)
    Pieces *pieces;     // with --json-object or --json-schema
    Schema *schema;     // NULL: answers of any form
    long seed;          // --seed, or from the clock
    // how contexts are compressed (chosen_method)
    Profile profile;  // of --profile, or the model's own
    bool has_profile;
    Fitting fitting;  // of --fit
    Ids question;     // of --question, as `run ask` would put it
    Context context;  // what is evicted while tokens come, when `streams`
    Stream stream;
    bool streams;
    int *held;  // [scored heads] pairs of a saved cache behind its prefix, which are not evicted
    Reads reads[BENCH_LIST];  // [n_reads] of --reader; of commands that answer one at most
    int n_reads;
} Session;

// Each of these succeeds or ends the program.

// Model and tokenizer alone.
void open_model(Session *s, const Options *o);
// Model, threads, scratch and a cache: empty, or the saved one at path. max_logits: rows of logits
// of a forward call, at most.
void open_session(Session *s, const Options *o, const char *path, int max_logits);
void close_session(Session *s);

int draft_length(const Options *o);  // --draft, or its default

// For commands that write: answers are sampled at --temp, or at `temp` where that is not given.
void open_answers(Session *s, double temp);

int new_sequence(Session *s);                        // an empty sequence of the cache
KVTypes get_kv(const Options *o, const char *name);  // what --kv calls `name`

// A sentence on stderr, without -q.
void warn(const Session *s, const char *fmt, ...) __attribute__((format(printf, 2, 3)));
void warn_length(Session *s, long positions);  // once, when the model was trained for fewer

// ---- texts ----

// Appends the ids of text, which is what -p, -f or --ids gave. how: TOK_BOS or 0.
void input_ids(const Session *s, const Buffer *text, unsigned how, Ids *ids);
// Appends what stands before a context: the chat's beginning and the task.
void prefix_ids(const Session *s, Ids *ids);
// The turn change between the repeat request and the repeated text.
const char *repeat_postfix(const Session *s);

// With --verbose-prompt the ids [n] on stderr, one a line with what it prints, special tokens
// marked. what: "prompt", "question".
void show_prompt(const Session *s, const char *what, const int *id, int n);

// ---- the method: who scores, and who competes with whom ----

// The row of that name; another name is wrong usage.
const Policy *get_policy(const Options *o, const char *name);
const Level *get_level(const Options *o, const char *name);
void open_profile(Session *s);  // the one that --profile names or the model carries, if any
// What the flags name, or the defaults where they leave it open (policies.h).
const char *chosen_policy(const Session *s);
const char *chosen_level(const Session *s);

// What --reader names, with its parameters, in s->reads; wrong names and numbers are wrong usage.
void choose_readers(Session *s);
// For commands that answer: choose_readers, and the cache is read so.
void open_reader(Session *s);
// How many pages were read, ", quest read 0.12 of the pages"; "" where all are. Returns text.
const char *reading_text(const Session *s, char text[64]);
const char *reader_name(const Reads *reads);  // "none" where all pages are read

// What p will be asked, --question or for some --task, becomes c's question; where p needs one and
// there is none that is wrong usage. c is of this session.
void give_question(Session *s, Context *c, const Policy *p);

// A context that knows how it will be compressed, and nothing else yet.
Context chosen_method(Session *s);
// From here on c->seq, of which the first c->n_prefix pairs stay, is evicted while it grows.
void start_stream(Session *s, Context *c);
// The same for commands that write, where the flags want it: the first n_prefix tokens stay, and
// never fewer than 4.
void stream_sequence(Session *s, int seq, int n_prefix);

// ---- progress ----

typedef struct {
    bool on;           // on a terminal, not with -q
    const char *unit;  // of what is counted; NULL: tokens
    const char *what;  // the work that started at `start`
    double start, last, shown;
} Progress;

// The clock of the first work starts.
Progress progress_begin(const Session *s);
// Called as work goes on, arg a Progress; nonzero asks it to stop. Redraws the bar, ten times a
// second at most and not for what takes no time.
int progress_step(void *arg, const char *what, long done, long total);
void progress_end(const Progress *p);
#endif
