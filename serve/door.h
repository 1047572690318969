// door.h: what the functions of all routes have in common: the engine behind them, how requests
// become prompts, and how answers are written.
#ifndef DOOR_H
#define DOOR_H
#include <stdio.h>

#include "serve/engine.h"
#include "serve/fields.h"
#include "serve/serve.h"
#include "serve/tools.h"

typedef struct {
    Engine *engine;
    const char *id;               // the model's, as clients see it
    volatile sig_atomic_t ready;  // the engine works
    long started;                 // Unix time
    int limit;                    // ids of a chat's answer where nothing is said
    double temp, top_p;           // where nothing is said
    Server *server;
    // of the network thread
    uint64_t random;  // for ids, and seeds where none is given
    Pieces *pieces;   // for answers of a form, once one was asked for
} Door;

// ---- answers ----

// JSON that is being written: FILE to write to, then what is there.
typedef struct {
    FILE *f;
    char *s;
    size_t n;
} Page;

bool page_open(Page *p);
void page_send(Page *p, Outlet *o, int status);           // as a whole answer; closes p, keeps o
void page_answer(Page *p, Outlet *o);                     // the same, 200, and lets go of o
void page_send_as(Page *p, Outlet *o, const char *type);  // the same, 200, as another type
void page_event(Page *p, Outlet *o);  // as "data: ..", a chunk of a stream; closes p
bool page_whole(Page *p);             // ends writing; whether all of it is there, in s [n]
void page_close(Page *p);

// ", "model": ..." and the like need no more than json_print. A token as text: what is no UTF-8 on
// its own as "bytes:\xe2".
void put_token(FILE *f, const Tokenizer *tok, int id);
void put_bytes(FILE *f, const Tokenizer *tok, int id);  // [226, 130]

// ---- requests ----

// How tokens are drawn, response_format, document, and the stop texts, which the field `stop`
// holds: what all kinds of requests for text have in common (settings.c). Fills job and its parts.
void door_sampling(Door *d, Fields *f, const char *stop, Job *job);
// The form of answers that must be a call.
void door_call_form(Door *d, Fields *f, const Tools *t, Job *job);
// How many answers to each prompt (n).
int door_choices(Door *d, Fields *f);

// A chat's messages, with the request's tools, as ids of the part's prompt. system: text that goes
// first, or NULL. What is wrong is noted in f.
typedef struct {
    const char *system;
    bool on_document;
    const Tools *tools;
} ChatWith;
void door_messages(Door *d, Fields *f, const ChatWith *with, Part *p);
// A message's content, a string or a list of text parts, as one text, malloc'ed; NULL: noted in f.
char *door_content(Fields *f, const JsonNode *message, int index);

// Appends a list of ids, the field `name`. false: what is wrong is noted in f.
bool door_ids(Door *d, Fields *f, const char *name, const JsonNode *list, Ids *ids);

// The others of a prompt get its ids. 0, or -1: no memory.
int door_copy_prompt(Part *to, const Part *from);

// Hands the job over, or answers that too many wait.
void door_ask(Door *d, Job *job);

void door_id(Door *d, char id[48], const char *start);

// Part's tokens of prompt and answer, as usage counts them.
int part_prompt_tokens(const Part *p);

// Job.failed: an error in OpenAI's shape, inside of a stream that has begun.
void door_failed(Job *job, int status, const char *message, const char *param, const char *code);

// While the model is being opened nothing can be asked: answers 503, releases o, and says so.
bool door_loading(Door *d, Outlet *o);

// ---- routes, by file ----

void openai_chat(void *arg, Http *h, Outlet *o);  // openai.c
void openai_completions(void *arg, Http *h, Outlet *o);
void anthropic_messages(void *arg, Http *h, Outlet *o);  // anthropic.c
void anthropic_count(void *arg, Http *h, Outlet *o);
void documents_post(void *arg, Http *h, Outlet *o);  // library.c
void documents_get(void *arg, Http *h, Outlet *o);
void documents_delete(void *arg, Http *h, Outlet *o);
void page_get(void *arg, Http *h, Outlet *o);  // page.c
extern const char *const door_open[];          // routes.c: paths that need no key
extern const Route door_routes[];              // routes.c, with the small ones
#endif
