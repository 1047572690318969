// engine.c: one worker that owns the model, and the requests that it works on.
//
// A turn is: take what is new, let go of what nobody waits for, give free slots to parts, compute
// one step, tell the doors. While a document is compressed turns go on between its blocks, with the
// tools of scoring laid aside: that is the only place where a turn lies inside another.
#define _POSIX_C_SOURCE 200809L
#include "serve/engine.h"

#include <math.h>
#include <stdlib.h>
#include <string.h>
#include <time.h>

#include "serve/begin.h"

enum { COMPANY_ROWS = 128 };        // rows of a step at most while anybody writes
static const double HEARTBEAT = 3;  // seconds

// ---- asking ----

int engine_ask(Engine *e, Job *job) {
    job->asked = job->heard = now();
    pthread_mutex_lock(&e->lock);
    bool room = e->n_queued < e->n_queue && !e->stopping;
    if (room) {
        *e->queue_end = job;
        e->queue_end = &job->next;
        e->n_queued++;
        pthread_cond_signal(&e->news);
    }
    pthread_mutex_unlock(&e->lock);
    return room ? 0 : -1;
}

static void not_queued(Engine *e) {
    pthread_mutex_lock(&e->lock);
    e->n_queued--;
    pthread_mutex_unlock(&e->lock);
}

// ---- parts and what they leave behind ----

// What the part's sequence holds stays for requests that begin alike.
static void keep_past(Engine *e, const Part *p, int seq) {
    Ids ids = {0};
    const Reply *r = &p->reply;
    int offset = p->prompt.n - r->n_prompt, n = offset + r->n_fed, failed = 0;
    if (part_scores(p)) n = p->n_scored;
    for (int i = p->n_head_skipped; i < n && !failed; i++)
        failed = ids_push(&ids, i < p->prompt.n ? p->prompt.id[i] : r->ids.id[i - p->prompt.n]);
    if (failed || ids.n == 0 || e->past.most == 0) {
        kvcache_drop(e->kv, seq);
        ids_free(&ids);
    } else {
        past_keep(&e->past, seq, p->base, &ids);
    }
}

// The part leaves its slot.
static void leave(Engine *e, Part *p, bool healthy) {
    for (int i = 0; i < e->n_slots; i++)
        if (e->at_work[i] == p) e->at_work[i] = NULL;
    if (p->begun && !p->ended) {
        if (healthy)
            keep_past(e, p, p->reply.seq);
        else
            kvcache_drop(e->kv, p->reply.seq);
    }
    p->ended = true;
}

static void unlink_waiting(Engine *e, Job *job) {
    for (Job **at = &e->waiting; *at; at = &(*at)->next) {
        if (*at != job) continue;
        *at = job->next;
        job->next = NULL;
        not_queued(e);
        return;
    }
}

// The job is over; it has told its door, or nobody listens.
static void end_job(Engine *e, Job *job, bool healthy) {
    unlink_waiting(e, job);
    for (int i = 0; i < job->n_parts; i++) leave(e, &job->parts[i], healthy);
    outlet_release(job->outlet);
    job_free(job);
}

void engine_fail(Engine *e, Job *job, int status, const char *message, const char *code) {
    if (job->failed) job->failed(job, status, message, status == 404 ? "document" : NULL, code);
    end_job(e, job, false);
}

static bool is_at_work(const Engine *e, const Job *job) {
    for (int i = 0; i < e->n_slots; i++)
        if (e->at_work[i] && e->at_work[i]->job == job) return true;
    return false;
}

// ---- slots ----

static int free_slot(const Engine *e) {
    for (int i = 0; i < e->n_slots; i++)
        if (!e->at_work[i]) return i;
    return -1;
}

// ---- steps ----

// The id's share of what the logits [vocab] say, and the likeliest ids.
static void judge(const Engine *e, const float *logits, int id, int n_tops, TokenScore *s) {
    int vocab = e->model->config.vocab_size, n = 0;
    float best = logits[likeliest(logits, vocab)];
    double sum = 0;
    for (int i = 0; i < vocab; i++) sum += exp((double)logits[i] - best);
    double log_sum = best + log(sum);
    s->id = id, s->logprob = (float)(logits[id] - log_sum);
    for (int i = 0; i < vocab && n_tops > 0; i++) {
        if (n == n_tops && logits[i] <= s->top_logprob[n - 1]) continue;
        int at = n < n_tops ? n++ : n - 1;
        for (; at > 0 && s->top_logprob[at - 1] < logits[i]; at--)
            s->top_logprob[at] = s->top_logprob[at - 1], s->top[at] = s->top[at - 1];
        s->top_logprob[at] = logits[i], s->top[at] = i;
    }
    for (int i = 0; i < n; i++) s->top_logprob[i] = (float)(s->top_logprob[i] - log_sum);
}

// Room for n more scores of a part; NULL: no memory.
static TokenScore *more_scores(Part *p, int n) {
    if (p->n_scores + n > p->scores_cap) {
        int cap = max_int(p->n_scores + n, p->scores_cap * 2);
        TokenScore *scores = realloc(p->scores, (size_t)cap * sizeof *scores);
        if (!scores) return NULL;
        p->scores = scores, p->scores_cap = cap;
    }
    p->n_scores += n;
    return p->scores + p->n_scores - n;
}

static void drawn(void *arg, const Reply *r, const float *logits, int id) {
    Engine *e = arg;
    for (int i = 0; i < e->n_slots; i++) {
        Part *p = e->at_work[i];
        if (!p || &p->reply != r) continue;
        bool ends = !r->ignore_stop && tokenizer_is_stop(e->tok, id);
        TokenScore *s = p->job->n_tops >= 0 && !ends ? more_scores(p, 1) : NULL;
        if (s) judge(e, logits, id, p->job->n_tops, s);
    }
}

typedef struct {
    const Engine *e;
    const Part *part;
    const float *logits;
    TokenScore *score;
} Judging;

static void judge_one(void *arg, int i) {
    const Judging *j = arg;
    int vocab = j->e->model->config.vocab_size, at = j->part->n_scored + i;
    judge(j->e, j->logits + (size_t)i * vocab, j->part->prompt.id[at + 1], j->part->job->n_tops,
          &j->score[i]);
}

// The next block of a prompt whose ids are judged. 0, or -1 with err.
static int score_step(Engine *e, Part *p, char *err) {
    Row rows[MAX_ROWS];
    int left = p->prompt.n - 1 - p->n_scored, most = min_int(e->state->max_logits, MAX_ROWS);
    int n = min_int(left, most), rest = left - n;
    if (rest > 0 && rest < KV_LONG_RUN && most >= 2 * KV_LONG_RUN) n -= KV_LONG_RUN;  // as one run
    bool wanted = p->job->n_tops >= 0;
    for (int i = 0; i < n; i++)
        rows[i] = (Row){p->reply.seq, p->prompt.id[p->n_scored + i], wanted};
    if (forward(e->state, e->kv, rows, n, err) != 0) return -1;
    TokenScore *s = wanted ? more_scores(p, n) : NULL;
    if (wanted && !s) return fail(err, "out of memory for %d scores", n);
    Judging j = {e, p, e->state->logits, s};
    if (s) parallel_for(e->state->pool, n, judge_one, &j);
    p->n_scored += n;
    return 0;
}

static void fail_all(Engine *e, int status, const char *message) {
    for (int i = 0; i < e->n_slots; i++)
        if (e->at_work[i]) engine_fail(e, e->at_work[i]->job, status, message, NULL);
}

// Where a sequence cannot be cut later, the prompt's end is kept as well, before the answer begins.
static void mark_prompt(Engine *e, Part *p) {
    char err[ERR_LEN];
    if (p->reply.n_fed != p->reply.n_prompt || p->job->echo) return;
    if (!past_is_stiff(e->kv)) return;
    int seq = kvcache_fork(e->kv, p->reply.seq, err);
    if (seq >= 0) keep_past(e, p, seq);
}

static void count(Engine *e, const Part *p) {
    int n = p->n_base + p->prompt.n - p->n_head_skipped;
    e->counts.prompt_tokens += n - p->n_cached;
    e->counts.cached_tokens += p->n_cached;
    e->counts.predicted_tokens += p->reply.ids.n;
}

// What a step has brought, to the doors.
static void tell(Engine *e) {
    for (int i = 0; i < e->n_slots; i++) {
        Part *p = e->at_work[i];
        if (!p || part_scores(p)) continue;
        Job *job = p->job;
        if (p->reply.done) {
            leave(e, p, true);
            count(e, p);
            job->n_ended++;
        }
        if (job->told && (p->ended || !part_reads(p))) job->told(job, p);
        if (job->n_ended == job->n_parts) {
            e->counts.requests++;
            job->done(job);
            end_job(e, job, true);
        }
    }
}

// One forward call for all parts at work. false: there are none.
static bool step(Engine *e) {
    char err[ERR_LEN];
    Reply *r[64];
    Part *scoring = NULL;
    int n = 0, n_writing = 0, rows = e->state->max_rows, status = 0;
    bool reading = false, was[64] = {false};
    for (int i = 0; i < e->n_slots; i++) {
        Part *p = e->at_work[i];
        if (p && part_scores(p)) {
            if (!scoring) scoring = p;
        } else if (p) {
            r[n++] = &p->reply;
            was[i] = part_reads(p);
            reading = reading || was[i];
            n_writing += !was[i];
        }
    }
    if (n == 0 && !scoring) return false;
    double start = now();
    if (scoring) status = score_step(e, scoring, err);
    if (n_writing > 0) e->state->max_rows = min_int(rows, COMPANY_ROWS);
    if (status == 0 && n > 0) status = answer_step(&e->answerer, r, n, err);
    e->state->max_rows = rows;
    double seconds = now() - start;
    *(reading || scoring ? &e->counts.prompt_s : &e->counts.predicted_s) += seconds;
    e->counts.decodes++;
    if (status < 0) {
        fail_all(e, 500, err);
        return true;
    }
    for (int i = 0; i < e->n_slots; i++)
        if (e->at_work[i] && was[i] && !part_reads(e->at_work[i])) mark_prompt(e, e->at_work[i]);
    tell(e);
    return true;
}

// ---- turns ----

static void take_new(Engine *e) {
    Job **end = &e->waiting;
    while (*end) end = &(*end)->next;
    pthread_mutex_lock(&e->lock);
    *end = e->queue;
    e->queue = NULL, e->queue_end = &e->queue;
    pthread_mutex_unlock(&e->lock);
}

// Jobs whose client has left.
static void drop_gone(Engine *e) {
    for (int i = 0; i < e->n_slots; i++)
        if (e->at_work[i] && outlet_gone(e->at_work[i]->job->outlet))
            end_job(e, e->at_work[i]->job, true);
    for (Job *job = e->waiting, *next; job; job = next) {
        next = job->next;
        if (outlet_gone(job->outlet)) end_job(e, job, true);
    }
}

static int compress_head(Engine *e, Job *job, const Part *p, char *err) {
    char name[DOC_NAME + 1];
    documents_hash(p->prompt.id, p->n_head, name);
    Compress c = {.name = name,
                  .ids = {p->prompt.id, p->n_head, 0},
                  .n_prefix = p->n_head_prefix,
                  .ratio = e->ratio,
                  .policy = e->method.policy,
                  .level = e->method.level,
                  .fit = e->fit,
                  .automatic = true};
    return engine_compress(e, job, &c, err);
}

// A job without parts, or one whose prompt is to be compressed first. Not in e->waiting meanwhile.
static void work_aside(Engine *e, Job *job) {
    char err[ERR_LEN];
    unlink_waiting(e, job);
    if (job->work) {
        job->work(e, job);
        end_job(e, job, true);
        return;
    }
    int status = compress_head(e, job, &job->parts[job->n_begun], err);
    if (outlet_gone(job->outlet)) {
        end_job(e, job, true);
    } else if (status != 0) {
        engine_fail(e, job, 500, err, NULL);
    } else {
        job->next = e->waiting;
        e->waiting = job;
        pthread_mutex_lock(&e->lock);
        e->n_queued++;
        pthread_mutex_unlock(&e->lock);
    }
}

// Gives free slots to the parts of a job, in their order.
static Beginning begin_job(Engine *e, Job *job) {
    int slot;
    while (job->n_begun < job->n_parts && (slot = free_slot(e)) >= 0) {
        Beginning b = begin_part(e, &job->parts[job->n_begun], slot);
        if (b != BEGUN) return b;
    }
    return job->n_begun == job->n_parts ? BEGUN : LATER;
}

// Gives free slots to jobs that wait, in their order: none overtakes but where one needs what is
// not there yet: ids that are being read, or a document while another one is made.
static bool begin(Engine *e) {
    bool any = false;
    for (Job *job = e->waiting, *next; job; job = next) {
        next = job->next;
        Beginning b = job->work ? NEEDS_DOCUMENT : begin_job(e, job);
        if (b == AWAITS || (b == NEEDS_DOCUMENT && e->compressing)) continue;
        if (b == NEEDS_DOCUMENT) {
            work_aside(e, job);
            return true;  // the list may be another one now
        }
        if (b == LATER) break;
        if (b == BEGUN) unlink_waiting(e, job);
        any = true;
    }
    return any;
}

static void heartbeat(Engine *e) {
    double t = now();
    if (t - e->told < HEARTBEAT) return;
    e->told = t;
    Job *last = NULL;
    for (int i = 0; i < e->n_slots; i++) {
        Job *job = e->at_work[i] ? e->at_work[i]->job : NULL;
        if (job && job != last && job->waits) job->waits(job);
        last = job;
    }
    for (Job *job = e->waiting; job; job = job->next)
        if (job->waits && !is_at_work(e, job)) job->waits(job);
    if (e->compressing_for && e->compressing_for->waits)
        e->compressing_for->waits(e->compressing_for);
}

// What other threads may know.
static void publish(Engine *e) {
    EngineCounts *c = &e->counts;
    c->processing = c->deferred = 0;
    c->document_bytes = c->document_full_bytes = 0;
    c->n_documents = e->docs.n;
    for (int i = 0; i < e->docs.n; i++) {
        c->document_bytes += e->docs.doc[i]->bytes;
        c->document_full_bytes += e->docs.doc[i]->full_bytes;
    }
    for (const Job *job = e->waiting; job; job = job->next) c->deferred++;
    pthread_mutex_lock(&e->lock);
    for (int i = 0; i < e->n_slots; i++) {
        const Part *p = e->at_work[i];
        e->slots[i] = (SlotView){.busy = p != NULL};
        if (!p) continue;
        c->processing++;
        int fed = p->job->echo ? p->n_scored + p->reply.n_fed : p->n_skipped + p->reply.n_fed;
        e->slots[i] = (SlotView){true,           part_scores(p) || part_reads(p),
                                 p->prompt.n,    fed,
                                 p->reply.ids.n, p->reply.limit};
    }
    e->shown = *c;
    pthread_mutex_unlock(&e->lock);
}

static bool turn(Engine *e) {
    take_new(e);
    drop_gone(e);
    bool any = begin(e);
    any = step(e) || any;
    heartbeat(e);
    publish(e);
    return any;
}

// Sleeps until a job comes, or a while.
static void wait_for_news(Engine *e) {
    struct timespec until;
    clock_gettime(CLOCK_REALTIME, &until);
    until.tv_nsec += 100000000;
    if (until.tv_nsec >= 1000000000) until.tv_nsec -= 1000000000, until.tv_sec++;
    pthread_mutex_lock(&e->lock);
    if (!e->queue) pthread_cond_timedwait(&e->news, &e->lock, &until);
    pthread_mutex_unlock(&e->lock);
}

// Before anybody asks, documents are loaded into a quarter of the cache: the first question about
// one after a start does not wait for its pages.
static bool load_ahead(Engine *e) {
    size_t used = cache_bytes(e->kv), most = e->most_bytes / 4;
    return used < most && documents_load_ahead(&e->docs, most - used);
}

void engine_run(Engine *e, const volatile sig_atomic_t *stop) {
    e->stop = stop;
    while (!*stop)
        if (!turn(e) && !load_ahead(e)) wait_for_news(e);
}

// ---- compressing ----

// Between two blocks of a document: a turn for the others. What scoring has set aside for itself
// must not see their rows.
static int others_turn(void *arg, const char *what, long done, long total) {
    Engine *e = arg;
    RunState *s = e->state, before = *s;
    KVScoring *scoring = e->kv->scoring;
    bool settling = e->kv->settling;
    (void)what, (void)done, (void)total;
    s->tap = s->watch = NULL;
    e->kv->scoring = NULL;
    e->kv->settling = true;
    turn(e);
    e->kv->scoring = scoring;
    e->kv->settling = settling;
    s->tap = before.tap, s->watch = before.watch;
    // From here on blocks are short: scoring never sees longer ones.
    for (int i = 0; i < e->n_slots; i++)
        if (e->at_work[i]) s->max_rows = min_int(s->max_rows, COMPANY_ROWS);
    return *e->stop || outlet_gone(e->compressing_for->outlet);
}

// Reads, scores and evicts k's context. 0, or -1 with err.
static int shrink(Engine *e, Context *k, double ratio, char *err) {
    bool scored = ratio < 1 && k->n_ctx > 0 && context_scores(k) > 0;
    float *score = scored ? malloc(context_scores(k) * sizeof *score) : NULL;
    uint8_t *keep = scored ? malloc(context_scores(k)) : NULL;
    int status = scored && (!score || !keep) ? fail(err, "out of memory for scores") : 0;
    e->kv->settling = !scored;  // exact keys are scored
    if (status == 0)
        status = scored ? context_score(k, k->policy, score, err) : context_read(k, err);
    e->kv->settling = true;
    if (status == 0 && scored && context_select(k, score, ratio, keep, err) < 0) status = -1;
    if (status == 0 && scored) status = context_evict(k, keep, false, err);
    if (status == 0) status = kvcache_settle(e->kv, k->seq, err);
    free(score);
    free(keep);
    return status;
}

// The same, and what stays is fitted where c says so.
static int fit_and_shrink(Engine *e, Context *k, Compress *c, char *err) {
    Fitting fitting;
    if (c->ratio >= 1 || k->n_ctx == 0) c->fit = FIT_NONE;
    if (c->fit == FIT_NONE) return shrink(e, k, c->ratio, err);
    if (fitting_open(&fitting, c->fit, k, err) != 0) return -1;
    k->fitting = &fitting;
    int status = shrink(e, k, c->ratio, err);
    e->state->watch = NULL;
    k->fitting = NULL;
    fitting_close(&fitting);
    return status;
}

int engine_compress(Engine *e, Job *job, Compress *c, char *err) {
    Context k = e->method;
    if (k.policy != c->policy || k.level != c->level)
        if (context_set(&k, c->policy, c->level, NULL, err) != 0) return -1;
    if (!make_room(e, c->ids.n + k.chunk))
        return fail(err, "the cache has no room for %d tokens: --mem", c->ids.n);
    k.state = e->state, k.kv = e->kv, k.tok = e->tok;
    k.ids = c->ids.id, k.n_prefix = c->n_prefix, k.n_ctx = c->ids.n - c->n_prefix;
    k.progress = others_turn, k.progress_arg = e;
    k.seq = kvcache_new(e->kv, err);
    if (k.seq < 0) return -1;
    int rows = e->state->max_rows;
    e->compressing = true, e->compressing_for = job;
    int status = fit_and_shrink(e, &k, c, err);
    e->state->max_rows = rows;
    e->compressing = false, e->compressing_for = NULL;
    c->read_s = k.prefill_s, c->score_s = k.score_s, c->fit_s = k.fit_s;
    if (status != 0) {
        kvcache_drop(e->kv, k.seq);
        return -1;
    }
    KVInfo info = {.fingerprint = e->model->fingerprint,
                   .model = e->model->name,
                   .policy = k.policy->name,
                   .level = k.level->name,
                   .fit = c->fit == FIT_NONE ? NULL : fit_kind_name(c->fit),
                   .n_prefix = c->n_prefix,
                   .n_ctx = k.n_ctx,
                   .ratio = c->ratio,
                   .ids = c->ids.id,
                   .n_ids = c->ids.n};
    Document *old = documents_find(&e->docs, c->name);
    if (old) past_forget_base(&e->past, old->serial);
    e->counts.documents_read++;
    return documents_add(&e->docs, c->name, k.seq, &info, c->automatic, err) ? 0 : -1;
}

// ---- opening ----

int engine_open(Engine *e, char *err) {
    pthread_mutex_init(&e->lock, NULL);
    pthread_cond_init(&e->news, NULL);
    e->queue_end = &e->queue;
    e->past = (Past){.kv = e->kv, .most = min_int(2 * e->n_slots + 4, PAST_MOST)};
    e->at_work = calloc((size_t)e->n_slots, sizeof *e->at_work);
    if (!e->at_work) return fail(err, "out of memory for %d slots", e->n_slots);
    if (answer_open(&e->answerer, e->state, e->kv, e->tok, err) != 0) return -1;
    e->answerer.drawn = drawn, e->answerer.drawn_arg = e;
    return 0;
}

void engine_close(Engine *e) {
    pthread_mutex_lock(&e->lock);
    e->stopping = true;
    pthread_mutex_unlock(&e->lock);
    take_new(e);
    fail_all(e, 503, "the server is stopping");
    while (e->waiting) engine_fail(e, e->waiting, 503, "the server is stopping", NULL);
    past_close(&e->past);
    documents_close(&e->docs);
    answer_close(&e->answerer);
    free(e->at_work);
    pthread_cond_destroy(&e->news);
    pthread_mutex_destroy(&e->lock);
}

EngineCounts engine_counts(Engine *e) {
    pthread_mutex_lock(&e->lock);
    EngineCounts c = e->shown;
    pthread_mutex_unlock(&e->lock);
    return c;
}

void engine_slots(Engine *e, SlotView *slots) {
    pthread_mutex_lock(&e->lock);
    memcpy(slots, e->slots, (size_t)e->n_slots * sizeof *slots);
    pthread_mutex_unlock(&e->lock);
}
