// engine.h: one worker that owns the model, and the requests that it works on.
//
// A Job is what one request asks: parts, each a prompt and the answer to it, which decode as one
// batch with the parts of all other jobs. Between two steps prompts are read, block by block, so
// that a long one does not hold up the others. What was read stays for a while: a part begins with
// the longest sequence that its ids have in common with an earlier one, and with the document that
// its job names. Nothing here knows of HTTP or JSON; jobs hear of what happens through functions.
#ifndef ENGINE_H
#define ENGINE_H
#include <pthread.h>
#include <signal.h>

#include "answer.h"
#include "policies.h"
#include "policies/fitting.h"
#include "serve/documents.h"
#include "serve/outlet.h"
#include "serve/past.h"

typedef struct Job Job;
typedef struct Engine Engine;

enum { ENGINE_STOPS = 16, ENGINE_PARTS = 256, ENGINE_TOPS = 20 };

// How likely a token was, and which would have been likelier.
typedef struct {
    int id;
    float logprob;
    int top[ENGINE_TOPS];  // [Job.n_tops] ids, the likeliest first
    float top_logprob[ENGINE_TOPS];
} TokenScore;

// A prompt and its answer.
typedef struct {
    Job *job;
    int index;
    Ids prompt;                 // behind the document that the job names
    int n_head, n_head_prefix;  // ids that --compress-prompts may keep compressed, and how many of
                                // them stay; 0: none
    Sampling sampling;
    // the engine's
    bool begun, ended;
    int n_base;          // ids of the document that it stands on
    int n_cached;        // ids that were there already, those of a document among them
    int n_head_skipped;  // ids of the prompt that are the document's
    int n_skipped;       // and those that another sequence had
    unsigned long base;  // Document.serial, 0: none
    Ids source;          // its ids for drafts: it may go before the answer is there
    Reply reply;
    TokenScore *scores;  // [n_scores] of the prompt's ids (Job.echo), then of the answer's
    int n_scores, scores_cap, n_scored;  // n_scored: ids whose logits are wanted, fed so far
    // the door's
    size_t n_told;  // bytes of the text that were sent
    int n_told_scores;
    bool told;         // anything was sent
    int n_calls;       // that were found in the text
    bool behind_call;  // n_told is where one ends
    int close;         // which mark closes it, 0: none that was not seen yet
    double began;
} Part;

struct Job {
    Outlet *outlet;
    Part *parts;  // [n_parts]
    int n_parts;
    int limit;                     // ids of an answer
    char *stop[ENGINE_STOPS + 1];  // malloc'ed; NULL behind the last
    bool ignore_eos;
    Bias *bias;      // malloc'ed, of the parts' sampling; NULL: none
    Schema *schema;  // the answers' form, NULL: any; closed with the job
    int n_tops;      // likelier tokens wanted beside each; -1: no logprobs at all
    bool echo;       // of the prompt's ids as well
    char *document;  // a name, malloc'ed; NULL: none
    // Work of another kind, on the engine's thread: then there are no parts.
    void (*work)(Engine *e, Job *job);
    // The door's; failed, told and ended are called on the engine's thread, failed or ended last.
    void (*told)(Job *job, Part *part);  // a part has new text, or has ended
    void (*waits)(Job *job);             // every few seconds, before there is text
    void (*failed)(Job *job, int status, const char *message, const char *param, const char *code);
    void (*done)(Job *job);   // all parts have ended
    void *door;               // free'd with the job
    void (*close)(Job *job);  // before that: frees what door holds; NULL: nothing
    // the engine's
    int n_begun, n_ended;
    double asked, heard;
    Job *next;
};

typedef struct {
    long prompt_tokens, cached_tokens, predicted_tokens, decodes, requests, documents_read;
    double prompt_s, predicted_s;
    int processing, deferred;
    size_t document_bytes, document_full_bytes;
    int n_documents;
} EngineCounts;

// What parts at work look like (GET /slots).
typedef struct {
    bool busy, reading;
    int n_prompt, n_fed, n_written, limit;
} SlotView;

// The caller's to fill in; what is pointed to stays open. context may be changed by nobody.
struct Engine {
    RunState *state;  // max_logits: at least n_slots
    KVCache *kv;
    const Tokenizer *tok;
    const Model *model;
    Context method;        // how documents are compressed: chosen policy, level, profile
    double ratio;          // where a document says nothing
    FitKind fit;           // the same
    int draft;             // of answers of likeliest tokens (drafts.h)
    int n_slots;           // parts that decode together
    int n_queue;           // jobs that wait, at most
    int most_positions;    // of a sequence
    size_t most_bytes;     // of the cache; 0: no limit
    int compress_prompts;  // ids from which the head of a prompt is kept compressed; 0: never
    Documents docs;
    const Ids *prefix;  // what stands before a document and is never evicted

    // the engine's own
    Answerer answerer;
    pthread_mutex_t lock;
    pthread_cond_t news;
    Job *queue, **queue_end;
    int n_queued;
    bool stopping;
    EngineCounts counts, shown;  // shown: a copy, under the lock
    const volatile sig_atomic_t *stop;
    SlotView slots[64];
    Part **at_work;  // [n_slots] NULL: free
    Past past;
    bool compressing;
    Job *compressing_for;
    Job *waiting;  // jobs with parts that have not begun, in their order
    double told;   // when jobs that wait last heard so
};

// 0, or -1 with err.
int engine_open(Engine *e, char *err);
void engine_close(Engine *e);  // every job that is left has failed

// Works until *stop; called by the thread that owns the model.
void engine_run(Engine *e, const volatile sig_atomic_t *stop);

// Hands a job over. It and its outlet are the engine's from then on. Any thread may. Returns 0, or
// -1: too many wait, and the job is the caller's.
int engine_ask(Engine *e, Job *job);

Job *job_new(Outlet *o, int n_parts);  // NULL: no memory
void job_free(Job *job);               // not its outlet

EngineCounts engine_counts(Engine *e);  // any thread may ask
void engine_slots(Engine *e, SlotView *slots);

// Text of a part that can be shown: what may still become a stop text is held back.
size_t part_visible(const Part *p);
void part_end(Part *p);                               // what it has written is enough
bool part_stopped(const Part *p, const char **stop);  // by which stop text, if by one

// For Job.work: makes a document of ids, of which the first n_prefix stay. The others' parts go on
// meanwhile. 0, or -1 with err.
typedef struct {
    const char *name;
    Ids ids;
    int n_prefix;
    double ratio;
    const Policy *policy;
    const Level *level;
    FitKind fit;
    bool automatic;
    double read_s, score_s, fit_s;  // out
} Compress;
int engine_compress(Engine *e, Job *job, Compress *c, char *err);
#endif
