// answers.c: the library's questions and conversations: replies on forks, so that what is asked
// leaves no trace where it should leave none.
#include <stdlib.h>
#include <string.h>

#include "lib/handles.h"

// ---- answers ----

// A question at work.
typedef struct {
    Ids ids;
    Sampling sampling;
    Reply reply;
} Question;

// Questions that are answered together.
typedef struct {
    Store *store;
    const kvzip_asking *how;
    Sampling sampling;         // that each question begins with
    Schema *schema;            // of all answers, NULL: any form
    Question q[LOGITS_BLOCK];  // [n]
    int n, first;              // first: the number of q[0] among all that the caller asks
} Batch;

// How tokens are drawn; the biases are to be freed. 0, or -1 with err.
static int open_sampling(Sampling *s, const kvzip_asking *how, int vocab, char *err) {
    Bias *bias = how->n_bias > 0 ? malloc((size_t)how->n_bias * sizeof *bias) : NULL;
    if (how->n_bias > 0 && !bias) return fail(err, "out of memory");
    for (int i = 0; i < how->n_bias; i++) bias[i] = (Bias){how->bias_ids[i], how->bias_values[i]};
    *s = (Sampling){.temp = how->temp,
                    .top_p = how->top_p,
                    .random = (uint64_t)how->seed,
                    .top_k = how->top_k,
                    .min_p = how->min_p,
                    .last_n = how->repeat_last_n == 0 ? 64 : how->repeat_last_n,
                    .repeat_penalty = how->repeat_penalty,
                    .frequency_penalty = how->frequency_penalty,
                    .presence_penalty = how->presence_penalty,
                    .bias = bias,
                    .n_bias = how->n_bias,
                    .temp_last = how->temp_last != 0};
    return sampling_check(s, vocab, err);
}

// The form of answers, *schema NULL where any will do. 0, or -1 with err.
static int open_form(Schema **schema, kvzip_model *m, const kvzip_asking *how, char *err) {
    char why[ERR_LEN];
    const char *text = how->json_schema;
    if (!text && !how->json_object) return 0;
    if (!m->pieces) m->pieces = pieces_open(m->tok, m->model.config.vocab_size, err);
    if (!m->pieces) return -1;
    *schema = schema_open(text, text ? strlen(text) : 0, m->pieces, why);
    return *schema ? 0 : fail(err, "json_schema: %s", why);
}

// Checks what the caller wants and fills in what it leaves open.
static int check_asking(kvzip_asking *how, int limit, char *err) {
    const char *const *stop = how->stop;
    if (!(how->temp >= 0 && how->temp <= 100))
        return fail(err, "temp %g: needs a number from 0 to 100", how->temp);
    if (!(how->top_p >= 0 && how->top_p <= 1))
        return fail(err, "top_p %g: needs a number above 0, at most 1", how->top_p);
    if (how->limit < 0 || how->batch < 0 || how->batch > LOGITS_BLOCK)
        return fail(err, "limit needs a whole number from 0, batch one up to %d", LOGITS_BLOCK);
    if (how->limit == 0) how->limit = limit;
    if (how->batch == 0) how->batch = 8;
    if (how->top_p == 0) how->top_p = 0.95;
    for (; stop && *stop; stop++)
        if (check_string("stop", *stop, err) != 0) return -1;
    if (check_string("json_schema", how->json_schema, err) != 0) return -1;
    return check_string("answer_prefix", how->answer_prefix, err);
}

// Adds a question, on a fork of the talk. 0, or -1 with err.
static int put(Batch *b, const Talk *t, const char *text, Sampling sampling, char *err) {
    const kvzip_asking *how = b->how;
    const char *prefix = how->answer_prefix ? how->answer_prefix : "";
    size_t n = strlen(text);
    Question *q = &b->q[b->n];
    if (check_text("a question", &text, &n, err) != 0) return -1;
    stripped(text, n, &n);
    if (n == 0) return fail(err, "a question: there is nothing in it");
    *q = (Question){.sampling = sampling};
    int seq = kvcache_fork(&b->store->kv, t->seq, err);
    if (seq < 0) return -1;
    b->n++;
    int rc = talk_ask(t, text, prefix, &q->ids, err);
    q->reply = (Reply){.seq = seq,
                       .prompt = q->ids.id,
                       .n_prompt = q->ids.n,
                       .limit = how->limit,
                       .stop = how->stop,
                       .ignore_stop = how->ignore_stop != 0,
                       .sampling = &q->sampling,
                       .schema = b->schema};
    return rc == 0 ? reply_begin(&q->reply, prefix, err) : -1;
}

// Its questions go, and room is there for others.
static void batch_empty(Batch *b) {
    for (Question *q = b->q; q < b->q + b->n; q++) {
        kvcache_drop(&b->store->kv, q->reply.seq);
        ids_free(&q->ids);
        reply_free(&q->reply);
    }
    b->n = 0;
}

static void batch_free(Batch *b) {
    if (!b) return;
    batch_empty(b);
    schema_close(b->schema);
    free((void *)b->sampling.bias);
    free(b);
}

// Passes on what is new of reply number i, without white space at both ends.
static int show(Reply *r, int i, const kvzip_asking *how, char *err) {
    size_t n, from = r->shown;
    const char *text = stripped(r->text.s ? r->text.s : "", r->text.n, &n);
    if (!how->piece || n <= from) return 0;
    r->shown = n;
    return how->piece(how->arg, i, text + from, n - from) ? fail(err, "interrupted") : 0;
}

static int write_answers(Batch *b, char *err) {
    const kvzip_asking *how = b->how;
    Reply *r[LOGITS_BLOCK];
    Answerer *a = &b->store->model->answerer;
    int left, step = 0;
    a->kv = &b->store->kv;
    for (int i = 0; i < b->n; i++) r[i] = &b->q[i].reply;
    do {
        if ((left = answer_step(a, r, b->n, err)) < 0) return -1;
        for (int i = 0; i < b->n; i++)
            if (show(r[i], b->first + i, how, err) != 0) return -1;
        if (how->progress && how->progress(how->arg, "answer", ++step, 0) != 0)
            return fail(err, "interrupted");
    } while (left > 0);
    return 0;
}

static int take_answer(const Reply *r, kvzip_answer *answer, char *err) {
    Buffer text = {0};
    size_t n;
    const char *s = stripped(r->text.s ? r->text.s : "", r->text.n, &n);
    if (buffer_add(&text, s, n) != 0) return fail(err, "out of memory");
    *answer = (kvzip_answer){text.s, n, r->n_prompt, r->ids.n, r->cut, r->read_s, r->write_s};
    return 0;
}

// Room for questions; NULL with err: no memory, or settings that cannot be.
static Batch *batch_new(Store *s, const kvzip_asking *how, char *err) {
    kvzip_model *m = s->model;
    Batch *b = calloc(1, sizeof *b);
    if (!b) return fail(err, "out of memory"), NULL;
    b->store = s, b->how = how;
    if (open_sampling(&b->sampling, how, m->model.config.vocab_size, err) == 0 &&
        open_form(&b->schema, m, how, err) == 0)
        return b;
    batch_free(b);
    return NULL;
}

// Questions [n] that are answered together. Each has random numbers of its own, from the seed and
// its words.
static int ask_together(const kvzip_cache *c, Batch *b, const char *const *question, int n,
                        kvzip_answer *answer, char *err) {
    Talk talk = {
        .tok = c->store->model->tok, .raw = b->how->raw != 0, .on_context = true, .seq = c->seq};
    int rc = 0;
    for (int i = 0; i < n && rc == 0; i++) {
        Sampling own = b->sampling;
        own.random = hash_bytes(own.random ^ HASH_START, question[i], strlen(question[i]));
        rc = put(b, &talk, question[i], own, err);
    }
    if (rc == 0) rc = write_answers(b, err);
    for (int i = 0; i < n && rc == 0; i++) rc = take_answer(&b->q[i].reply, &answer[i], err);
    return rc;
}

int kvzip_ask(const kvzip_cache *c, const char *const *question, int n, const kvzip_asking *how,
              kvzip_answer *answer, char *err) {
    kvzip_asking full = *how;
    int rc = check_asking(&full, 96, err);
    for (int i = 0; i < n; i++) answer[i] = (kvzip_answer){0};
    Batch *b = rc == 0 ? batch_new(c->store, &full, err) : NULL;
    if (!b) return -1;
    for (int i = 0; i < n && rc == 0; i += full.batch) {
        b->first = i;
        rc = ask_together(c, b, question + i, min_int(full.batch, n - i), answer + i, err);
        batch_empty(b);
    }
    batch_free(b);
    if (rc != 0) kvzip_answers_free(answer, n);
    return rc;
}

void kvzip_answers_free(kvzip_answer *answer, int n) {
    for (int i = 0; i < n; i++) {
        free(answer[i].text);
        answer[i] = (kvzip_answer){0};
    }
}

// ---- conversations ----

struct kvzip_chat {
    Store *store;
    Talk talk;
    char *system;
    Sampling sampling;
};

// The system text of a chat, and the sequence that it goes on from. 0, or -1 with err.
static int begin_chat(kvzip_chat *chat, const kvzip_cache *c, const char *system, char *err) {
    Store *s = chat->store;
    Talk *t = &chat->talk;
    if (system) {
        Ids opening = {0};
        int rc = talk_opening(&(TalkOpening){.tok = t->tok, .system = system}, &opening, err);
        ids_free(&opening);
        if (rc != 0) return -1;
        if (!(chat->system = malloc(strlen(system) + 1))) return fail(err, "out of memory");
        t->system = strcpy(chat->system, system);
    }
    if (!c && store_open(s, NULL, err) != 0) return -1;
    t->seq = c ? kvcache_fork(&s->kv, c->seq, err) : kvcache_new(&s->kv, err);
    return t->seq < 0 ? -1 : 0;
}

kvzip_chat *kvzip_chat_open(kvzip_model *m, const kvzip_cache *c, const char *system, int raw,
                            char *err) {
    if (c && system) return fail(err, "system: the cache has its own"), NULL;
    if (check_string("system", system, err) != 0) return NULL;
    kvzip_chat *chat = calloc(1, sizeof *chat);
    if (!chat) return fail(err, "out of memory"), NULL;
    chat->talk = (Talk){.tok = m->tok, .raw = raw != 0, .on_context = c != NULL, .seq = -1};
    if (c) c->store->refs++;
    chat->store = c ? c->store : store_new(m, err);
    if (!chat->store) return free(chat), NULL;
    if (begin_chat(chat, c, system, err) == 0) return chat;
    kvzip_chat_close(chat);
    return NULL;
}

// The reply's sequence becomes the talk's, whose last one goes with the batch.
static int take_turn(kvzip_chat *chat, Question *q, char *err) {
    int old = chat->talk.seq, rc = talk_answered(&chat->talk, &q->reply, err);
    q->reply.seq = old;
    chat->sampling = q->sampling;
    return rc;
}

int kvzip_chat_say(kvzip_chat *chat, const char *message, const kvzip_asking *how,
                   kvzip_answer *answer, char *err) {
    kvzip_asking full = *how;
    *answer = (kvzip_answer){0};
    if (check_asking(&full, 512, err) != 0) return -1;
    Batch *b = batch_new(chat->store, &full, err);
    if (!b) return -1;
    Sampling sampling = b->sampling;
    if (chat->talk.n_turns > 0) sampling.random = chat->sampling.random;
    int rc = put(b, &chat->talk, message, sampling, err);
    if (rc == 0) rc = write_answers(b, err);
    if (rc == 0) rc = take_answer(&b->q[0].reply, answer, err);
    if (rc == 0) rc = take_turn(chat, &b->q[0], err);
    if (rc != 0) kvzip_answers_free(answer, 1);
    batch_free(b);
    return rc;
}

void kvzip_chat_close(kvzip_chat *chat) {
    if (!chat) return;
    if (chat->talk.seq >= 0) kvcache_drop(&chat->store->kv, chat->talk.seq);
    kvcache_trim(&chat->store->kv);
    talk_free(&chat->talk);
    store_drop(chat->store);
    free(chat->system);
    free(chat);
}
