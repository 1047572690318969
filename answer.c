// answer.c: how text comes out of a model.
//
// Reading and writing are the same thing: ids go in, and after the last known one the logits say
// what may follow. So a reply is a list of ids, prompt and answer one after the other, of which the
// cache holds the first n_fed; a step feeds some of the others, and a reply that has no others left
// takes one more. Rows of several replies share a forward call, which costs hardly more than one
// row alone as long as the weights are what is waited for. A row's numbers do not depend on which
// rows stand beside it (batch invariance), so neither do answers.
#include "answer.h"

#include <stdlib.h>
#include <string.h>

#include "drafts.h"

int answer_open(Answerer *a, RunState *state, KVCache *kv, const Tokenizer *tok, char *err) {
    int vocab = state->model->config.vocab_size;
    *a = (Answerer){.state = state, .kv = kv, .tok = tok};
    a->choices = calloc((size_t)vocab, sizeof *a->choices);
    return a->choices ? 0 : fail(err, "out of memory for %d choices", vocab);
}

void answer_close(Answerer *a) {
    free(a->choices);
    *a = (Answerer){0};
}

// ---- one reply ----

int reply_begin(Reply *r, const char *prefix, char *err) {
    r->stop_id = -1;
    r->stream.started = true;  // a continuation: its leading space belongs to it
    if (buffer_add(&r->text, prefix, strlen(prefix)) != 0) return fail(err, "out of memory");
    r->n_prefix = r->text.n;
    return r->schema ? form_begin(&r->form, r->schema, err) : 0;
}

void reply_free(Reply *r) {
    ids_free(&r->ids);
    form_free(&r->form);
    free(r->text.s);
    *r = (Reply){0};
}

int reply_flush(const Answerer *a, Reply *r, char *err) {
    char bytes[TOK_STREAM_MAX];
    int n = tokenizer_stream(a->tok, &r->stream, -1, bytes);
    return buffer_add(&r->text, bytes, (size_t)n) == 0 ? 0 : fail(err, "out of memory");
}

// Where the first occurrence of stop in the text ends, 0 when there is none. It may begin in bytes
// that were there before the new ones, which start at `from`, but not in the answer prefix.
static size_t end_of_stop(const Reply *r, const char *stop, size_t from) {
    size_t len = strlen(stop);
    size_t at = from >= r->n_prefix + len ? from - (len - 1) : r->n_prefix;
    for (; len > 0 && at + len <= r->text.n; at++)
        if (memcmp(r->text.s + at, stop, len) == 0) return at + len;
    return 0;
}

// Ends the answer right after the first of the stop texts, if one is in it.
static void cut_at_stop(Reply *r, size_t from) {
    size_t end = 0;
    for (const char *const *stop = r->stop; stop && *stop; stop++) {
        size_t found = end_of_stop(r, *stop, from);
        if (found > 0 && (end == 0 || found < end)) end = found;
    }
    if (end == 0) return;
    r->text.n = end;
    r->text.s[end] = '\0';
    r->stream.n_held = 0;
    r->done = true;
}

int reply_take(const Answerer *a, Reply *r, int id, char *err) {
    char bytes[TOK_STREAM_MAX];
    if (r->schema && form_take(&r->form, id, err) != 0) return -1;
    if ((!r->ignore_stop || r->schema) && tokenizer_is_stop(a->tok, id)) {
        r->stop_id = id;
        r->done = true;
        return reply_flush(a, r, err);
    }
    if (ids_push(&r->ids, id) != 0) return fail(err, "out of memory");
    if (!tokenizer_is_special(a->tok, id)) {
        int n = tokenizer_stream(a->tok, &r->stream, id, bytes);
        size_t from = r->text.n;
        if (buffer_add(&r->text, bytes, (size_t)n) != 0) return fail(err, "out of memory");
        cut_at_stop(r, from);
    }
    if (r->schema && form_is_over(&r->form)) r->done = true;
    if (r->ids.n >= r->limit && !r->done) r->done = r->cut = true;
    return r->done ? reply_flush(a, r, err) : 0;
}

// ---- many replies ----

// The rows of one forward call, and whose logits it gives. Behind the row of a reply that writes
// may stand those of its draft.
typedef struct {
    const Answerer *a;
    Row row[MAX_ROWS];
    int n_rows;
    Reply *ready[MAX_ROWS];  // [n_ready] those that lack nothing after it, in its order
    int first[MAX_ROWS];     // [n_ready] their logits, of whom one row after the other
    int n_ready;
    const Reply *of[MAX_ROWS];  // [n_logits] whose a row of logits is
    int at[MAX_ROWS];           // [n_logits] and behind which row it comes
    int best[MAX_ROWS];         // [n_logits] the likeliest token that follows
    int n_logits, most_logits;
} Step;

// Whether r takes the largest of all logits.
static bool is_plain(const Reply *r) { return !r->schema && sampling_is_plain(r->sampling); }

// Whether r writes with drafts: not where pairs are evicted after every step, those of a draft
// among them.
static bool drafts(const Answerer *a, const Reply *r, int reading) {
    return r->draft > 0 && !reading && !a->after && is_plain(r);
}

// How many of r's ids the cache does not hold.
static int lacking(const Reply *r) { return r->n_prompt + r->ids.n - r->n_fed; }

// How many of r's next ids go into a step that has room for this many. Alone r is read in blocks of
// max_rows, counted from its start; in company a block may be cut, but never into runs so short
// that attention adds up in another order: what r gives must not depend on its company. With blocks
// of 512 and 600 ids to read, room for 500 gives runs of 500, 12 and 88; room for 505 gives 503,
// for the 9 after it must be a long run.
static int block_rows(const Answerer *a, const Reply *r, int room) {
    int most = min_int(a->state->max_rows, MAX_ROWS);
    int block = min_int(lacking(r), most - r->n_fed % most);
    if (block <= room) return block;
    int part = min_int(room, block - KV_LONG_RUN);
    return part >= KV_LONG_RUN ? part : 0;
}

// Rows for the next n ids of r.
static void feed(Step *s, Reply *r, int n) {
    int end = r->n_fed + n;
    bool last = n == lacking(r);
    for (int i = r->n_fed; i < end; i++) {
        int id = i < r->n_prompt ? r->prompt[i] : r->ids.id[i - r->n_prompt];
        s->row[s->n_rows++] = (Row){r->seq, id, last && i == end - 1};
    }
    if (!last) return;
    s->first[s->n_ready] = s->n_logits;
    s->ready[s->n_ready++] = r;
    s->at[s->n_logits] = s->n_rows - 1;
    s->of[s->n_logits++] = r;
}

// Rows for a draft of what r, whose row is the last one, may write next; `others` replies still
// need logits.
static void feed_draft(Step *s, Reply *r, int others) {
    int guess[DRAFT_MOST], most = min_int(r->draft, DRAFT_MOST);
    if (r->skip > 0) r->skip--, most = 0;
    most = min_int(most, r->limit - r->ids.n - 1);
    most = min_int(most, s->most_logits - s->n_logits - others);
    most = min_int(most, min_int(s->a->state->max_rows, MAX_ROWS) - s->n_rows - others);
    if (most > 0) most = min_int(most, kvcache_slack(s->a->kv, r->seq));
    if (most <= 0) return;
    DraftText t = {{r->source, r->prompt, r->ids.id}, {r->n_source, r->n_prompt, r->ids.n}};
    int n = draft_guess(&t, most, guess);
    for (int i = 0; i < n; i++) {
        s->at[s->n_logits] = s->n_rows;
        s->of[s->n_logits++] = r;
        s->row[s->n_rows++] = (Row){r->seq, guess[i], true};
    }
    r->n_drafted += n;
}

// Chooses rows for the live replies [n]: one for each that writes, then blocks for those that read,
// in their order, while there is room. fed [n]: how many each got.
static int fill_step(Step *s, Reply *const *live, int n, int *fed, char *err) {
    int room = min_int(s->a->state->max_rows, MAX_ROWS);
    for (int reading = 0; reading < 2; reading++) {
        for (int i = 0; i < n; i++) {
            if (lacking(live[i]) == 0) return fail(err, "nothing to answer: the prompt is empty");
            if ((lacking(live[i]) > 1) != reading) continue;
            fed[i] = block_rows(s->a, live[i], room - s->n_rows);
            if (fed[i] == 0) continue;
            feed(s, live[i], fed[i]);
            if (drafts(s->a, live[i], reading)) feed_draft(s, live[i], n - s->n_ready);
        }
    }
    return 0;
}

static void find_best(void *step, int i) {
    Step *s = step;
    int vocab = s->a->state->model->config.vocab_size;
    if (is_plain(s->of[i])) s->best[i] = likeliest(s->a->state->logits + (size_t)i * vocab, vocab);
}

// The token that row i of logits says; -1 with err.
static int next_token(const Step *s, int i, char *err) {
    const Reply *r = s->of[i];
    int vocab = s->a->state->model->config.vocab_size;
    if (is_plain(r)) return s->best[i];
    Draw d = {.logits = s->a->state->logits + (size_t)i * vocab,
              .n = vocab,
              .past = {r->prompt, r->ids.id},
              .n_past = {r->n_prompt, r->ids.n},
              .scratch = s->a->choices};
    if (r->schema && !(d.allowed = form_allowed(&r->form, err))) return -1;
    return sampling_draw(r->sampling, &d);
}

// Takes the token that row i of logits says, of r. 0, or -1 with err.
static int take_token(const Step *s, Reply *r, int i, char *err) {
    const Answerer *a = s->a;
    int id = next_token(s, i, err);
    const float *logits = a->state->logits + (size_t)i * a->state->model->config.vocab_size;
    if (id < 0) return -1;
    if (a->drawn) a->drawn(a->drawn_arg, r, logits, id);
    return reply_take(a, r, id, err);
}

// Goes on along r's draft of n tokens, whose logits begin with row i, as long as it says what r
// wrote last; the cache forgets the rest of it. 0, or -1 with err.
static int take_draft(Step *s, Reply *r, int i, int n, char *err) {
    KVCache *kv = s->a->kv;
    int taken = 0;
    while (taken < n && !r->done && r->ids.id[r->ids.n - 1] == s->row[s->at[i + taken]].token) {
        r->n_fed++;
        if (take_token(s, r, i + taken++, err) != 0) return -1;
    }
    r->n_accepted += taken;
    r->misses = taken > 0 ? 0 : min_int(r->misses + 1, 5);
    r->skip = taken > 0 ? 0 : (1 << r->misses) - 2;
    if (taken == n) return 0;
    if (kvcache_cut(kv, r->seq, kv->seqs[r->seq].next_pos - (n - taken))) return 0;
    return fail(err, "a draft that the cache cannot forget");
}

// Every reply that lacks nothing takes what its logits say, in their order.
static int take_next(Step *s, char *err) {
    const Answerer *a = s->a;
    parallel_for(a->state->pool, s->n_logits, find_best, s);
    for (int i = 0; i < s->n_ready; i++) {
        Reply *r = s->ready[i];
        int first = s->first[i], end = i + 1 < s->n_ready ? s->first[i + 1] : s->n_logits;
        r->done = r->cut = r->ids.n >= r->limit;  // where no token is wanted at all
        if (r->done) continue;
        if (take_token(s, r, first, err) != 0) return -1;
        if (end > first + 1 && take_draft(s, r, first + 1, end - first - 1, err) != 0) return -1;
    }
    return 0;
}

int answer_step(const Answerer *a, Reply *const *r, int n, char *err) {
    Step s = {.a = a, .most_logits = min_int(a->state->max_logits, MAX_ROWS)};
    Reply *live[MAX_ROWS];
    int fed[MAX_ROWS], n_live = 0, left = 0;
    bool reads[MAX_ROWS];
    int most = min_int(a->state->max_rows, s.most_logits);
    double start = now();
    for (int i = 0; i < n && n_live < most; i++)
        if (!r[i]->done) live[n_live++] = r[i];
    if (n_live == 0) return 0;
    if (fill_step(&s, live, n_live, fed, err) != 0) return -1;
    for (int i = 0; i < n_live; i++) reads[i] = live[i]->n_fed < live[i]->n_prompt;
    if (forward(a->state, a->kv, s.row, s.n_rows, err) != 0) return -1;
    for (int i = 0; i < n_live; i++) live[i]->n_fed += fed[i];
    if (a->after && a->after(a->after_arg, err) != 0) return -1;
    if (take_next(&s, err) != 0) return -1;
    double seconds = now() - start;
    for (int i = 0; i < n_live; i++) *(reads[i] ? &live[i]->read_s : &live[i]->write_s) += seconds;
    for (int i = 0; i < n; i++) left += !r[i]->done;
    return left;
}

// ---- turns ----

static int encode(const Tokenizer *tok, const char *text, unsigned how, Ids *ids) {
    return tokenizer_encode(tok, text, strlen(text), how, ids);
}

// What KVzip's authors put before every context (arXiv 2505.23416, their code).
static const char TASK[] =
    "Given the context, answer to the following question or request without explanation.\n\n";

// The system text, and the beginning of the user's turn that the context stands in: with special
// tokens, to be read together with what follows it.
static int open_turn(const TalkOpening *t, Buffer *text, Ids *ids) {
    const ChatTemplate *chat = tokenizer_chat(t->tok);
    const char *start = t->system ? chat->user_prefix_after_system : chat->kvzip_prefix;
    if (t->system && tokenizer_turn(t->tok, 's', t->system, true, false, ids) != 0) return -1;
    return buffer_add(text, start, strlen(start));
}

// Our own task text is part of the template and tokenized with it, as the authors do; a user's text
// never becomes a special token.
int talk_opening(const TalkOpening *t, Ids *ids, char *err) {
    const ChatTemplate *chat = tokenizer_chat(t->tok);
    Buffer text = {0};
    if (!t->raw && t->system && !chat->present) return fail(err, "the model has no chat template");
    if (!t->raw && t->system && chat->system_refused[0])
        return fail(err, "the model's chat template takes no system text: %s",
                    chat->system_refused);
    bool ok = t->raw ? encode(t->tok, "", TOK_BOS, ids) == 0
                     : open_turn(t, &text, ids) == 0 &&
                           (t->task || buffer_add(&text, TASK, strlen(TASK)) == 0) &&
                           encode(t->tok, text.s, TOK_SPECIAL, ids) == 0 &&
                           (!t->task || encode(t->tok, t->task, 0, ids) == 0);
    free(text.s);
    return ok ? 0 : fail(err, "out of memory");
}

// The question right after the context, as KVzip's authors put it.
static int ask_context(const Talk *t, const char *words, size_t n, bool begins, Ids *ids) {
    const ChatTemplate *chat = tokenizer_chat(t->tok);
    Buffer text = {0};
    bool ok = (!begins || encode(t->tok, chat->kvzip_prefix, TOK_SPECIAL, ids) == 0) &&
              buffer_add(&text, "\n\n", 2) == 0 && buffer_add(&text, words, n) == 0 &&
              encode(t->tok, text.s, 0, ids) == 0 &&
              encode(t->tok, chat->kvzip_postfix, TOK_SPECIAL, ids) == 0;
    free(text.s);
    return ok ? 0 : -1;
}

// The question as a turn of a chat.
static int ask_turn(const Talk *t, const char *words, size_t n, bool begins, Ids *ids) {
    const char *system = begins ? t->system : NULL;
    Buffer text = {0};
    bool ok = buffer_add(&text, words, n) == 0 &&
              (!system || tokenizer_turn(t->tok, 's', system, true, false, ids) == 0) &&
              tokenizer_turn(t->tok, 'u', text.s, begins && !system, system != NULL, ids) == 0 &&
              tokenizer_generation(t->tok, ids) == 0;
    free(text.s);
    return ok ? 0 : -1;
}

int talk_ask(const Talk *t, const char *question, const char *prefix, Ids *ids, char *err) {
    bool first = t->n_turns == 0, begins = first && !t->on_context;
    bool follows = !tokenizer_chat(t->tok)->present || (first && t->on_context);
    size_t n;
    const char *words = stripped(question, strlen(question), &n);
    int rc = 0;
    for (int i = 0; i < t->pending.n && rc == 0; i++) rc = ids_push(ids, t->pending.id[i]);
    if (rc == 0 && t->raw)
        rc = encode(t->tok, question, 0, ids);
    else if (rc == 0)
        rc = follows ? ask_context(t, words, n, begins, ids) : ask_turn(t, words, n, begins, ids);
    if (rc == 0) rc = encode(t->tok, prefix, 0, ids);
    return rc == 0 ? 0 : fail(err, "out of memory");
}

int talk_prefix(const Talk *t, char *err) {
    Ids a = {0}, b = {0};
    int n = 0, rc = talk_ask(t, "a", "", &a, err);
    if (rc == 0) rc = talk_ask(t, "1", "", &b, err);
    while (rc == 0 && n < a.n && n < b.n && a.id[n] == b.id[n]) n++;
    ids_free(&a), ids_free(&b);
    return rc == 0 ? n : -1;
}

int talk_answered(Talk *t, const Reply *r, char *err) {
    t->n_turns++;
    t->seq = r->seq;
    t->pending.n = 0;
    int rc = 0;
    for (int i = max_int(r->n_fed - r->n_prompt, 0); i < r->ids.n && rc == 0; i++)
        rc = ids_push(&t->pending, r->ids.id[i]);
    if (rc == 0 && !t->raw)
        rc = encode(t->tok, tokenizer_chat(t->tok)->assistant_suffix, TOK_SPECIAL, &t->pending);
    return rc == 0 ? 0 : fail(err, "out of memory");
}

void talk_free(Talk *t) { ids_free(&t->pending); }
