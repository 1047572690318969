// ask.c: the questions of one context, put to caches that hold it.
//
// Everything here is one operation. A group of questions is fed to forks of one cache together with
// the answers that the full cache gave, and every token of these is judged where it stands
// (judge.h). An answer is the full cache's own when no token is another one, so decoding is needed
// only from the first disagreement on. What is compared must have been computed alike: the full
// cache's own verdicts come from feeding, not from decoding.
#include "eval/ask.h"

#include <stdlib.h>

static const size_t LOGITS_BYTES = (size_t)256 << 20;  // of the full cache, held at a time
enum { GROUP = 32 };  // questions at work together: each has a fork of the cache

// ---- greedy answers ----

static int begin_reply(const Asking *a, Asked *q, char *err) {
    const Ids *ask = &q->judged.ask;
    reply_free(&q->reply);
    q->reply = (Reply){.prompt = ask->id, .n_prompt = ask->n, .limit = a->limit, .stop = a->stop};
    return reply_begin(&q->reply, "", err);
}

// Goes on with the answers [n] that are not done, each on its own fork of seq, as one batch.
static int finish_replies(Asking *a, KVCache *kv, int seq, Asked *q, int n, char *err) {
    Reply *live[GROUP];
    int n_live = 0, left;
    a->answerer.kv = kv;
    for (Asked *end = q + n; q < end; q++) {
        if (q->reply.done) continue;
        if ((q->reply.seq = kvcache_fork(kv, seq, err)) < 0) return -1;
        live[n_live++] = &q->reply;
    }
    do {
        left = answer_step(&a->answerer, live, n_live, err);
        if (left < 0) return -1;
        if (a->progress && a->progress(a->progress_arg) != 0) return fail(err, "interrupted");
    } while (left > 0);
    for (int i = 0; i < n_live; i++) kvcache_drop(kv, live[i]->seq);
    return 0;
}

// ---- the full cache ----

static int open_asked(const Asking *a, Asked *q, char *err) {
    q->judged.verdict = malloc(((size_t)a->limit + 1) * sizeof *q->judged.verdict);
    if (!q->judged.verdict || a->ids(a->ids_arg, q->q, &q->judged.ask) != 0)
        return fail(err, "out of memory");
    if (q->judged.ask.n == 0)
        return fail(err, "task %s, line %d: an empty question", a->task->task, a->task->line);
    return begin_reply(a, q, err);
}

// The full cache's answer is what is judged from now on.
static int keep_answer(const Asking *a, Asked *q, char *err) {
    Reply *r = &q->reply;
    if (r->stop_id >= 0 && ids_push(&r->ids, r->stop_id) != 0) return fail(err, "out of memory");
    q->judged.full = r->ids;
    r->ids = (Ids){0};
    q->full_text = r->text;
    r->text = (Buffer){0};
    return eval_answer(a->task, q->q, q->full_text.s, &q->full_value, err);
}

int asking_open(Asking *a, char *err) {
    int n = a->task->n_questions;
    a->judge.state = a->state;
    if (answer_open(&a->answerer, a->state, a->full_kv, a->tok, err) != 0) return -1;
    a->asked = calloc((size_t)n, sizeof *a->asked);
    if (!a->asked) return fail(err, "out of memory");
    for (int i = 0; i < n; i++) {
        a->asked[i].q = &a->task->questions[i];
        if (open_asked(a, &a->asked[i], err) != 0) return -1;
    }
    for (int i = 0; i < n; i += GROUP)
        if (finish_replies(a, a->full_kv, a->full_seq, a->asked + i, min_int(n - i, GROUP), err) !=
            0)
            return -1;
    for (int i = 0; i < n; i++)
        if (keep_answer(a, &a->asked[i], err) != 0) return -1;
    return 0;
}

void asking_close(Asking *a) {
    for (int i = 0; a->asked && i < a->task->n_questions; i++) {
        Judged *j = &a->asked[i].judged;
        ids_free(&j->ask);
        ids_free(&j->full);
        free(j->logits);
        free(j->verdict);
        free(a->asked[i].full_text.s);
        reply_free(&a->asked[i].reply);
    }
    free(a->asked);
    answer_close(&a->answerer);
    a->asked = NULL;
    a->begin = a->end = 0;
}

// ---- the cache at hand ----

// Feeds forks of seq the group's questions and the full cache's answers, and judges these.
static int judge_group(Asking *a, KVCache *kv, int seq, char *err) {
    a->judge.kv = kv;
    for (int i = a->begin; i < a->end; i++) {
        Judged *j = &a->asked[i].judged;
        if ((j->seq = kvcache_fork(kv, seq, err)) < 0) return -1;
        if (judge_add(&a->judge, j, err) != 0) return -1;
    }
    if (judge_flush(&a->judge, err) != 0) return -1;
    for (int i = a->begin; i < a->end; i++) kvcache_drop(kv, a->asked[i].judged.seq);
    return 0;
}

int asking_group(Asking *a, int begin, char *err) {
    size_t row = (size_t)a->state->model->config.vocab_size * sizeof(float), bytes = 0;
    int most = a->single ? 1 : GROUP;
    if (a->begin == begin && a->end > begin && a->end - begin <= most) return 0;
    for (int i = a->begin; i < a->end; i++) {
        free(a->asked[i].judged.logits);
        a->asked[i].judged.logits = NULL;
    }
    a->begin = a->end = begin;
    while (a->end < a->task->n_questions && a->end - begin < most) {
        Judged *j = &a->asked[a->end].judged;
        bytes += j->full.n * row;
        if (a->end > begin && bytes > LOGITS_BYTES) break;
        j->logits = malloc(j->full.n * row);
        if (!j->logits)
            return fail(err, "out of memory for the logits of an answer of %d tokens", j->full.n);
        a->end++;
    }
    a->judge.keep = true;
    int rc = judge_group(a, a->full_kv, a->full_seq, err);
    a->judge.keep = false;
    return rc;
}

// Whether the answer is the full cache's; where it is not, begins it up to the first other token.
static int compare(const Asking *a, Asked *q, bool *same, char *err) {
    const Judged *j = &q->judged;
    int n = 0;
    while (n < j->full.n && j->verdict[n].best == j->verdict[n].full) n++;
    *same = n == j->full.n;
    if (begin_reply(a, q, err) != 0) return -1;
    for (int i = 0; i < n && !*same; i++)
        if (reply_take(&a->answerer, &q->reply, j->full.id[i], err) != 0) return -1;
    if (*same) q->reply.done = true;
    return *same ? 0 : reply_take(&a->answerer, &q->reply, j->verdict[n].best, err);
}

int asking_put(Asking *a, KVCache *kv, int seq, EvalCell *c, char *err) {
    if (judge_group(a, kv, seq, err) != 0) return -1;
    for (int i = a->begin; i < a->end; i++) {
        Asked *q = &a->asked[i];
        const Verdict *v = q->judged.verdict;
        int n = q->judged.full.n;
        bool same;
        double kl = 0, nll = 0;
        for (int t = 0; t < n; t++) kl += v[t].kl, nll += v[t].nll;
        if (compare(a, q, &same, err) != 0) return -1;
        c->same[i] = same;
        c->kl[i] = (float)(kl / n);
        c->nll[i] = (float)(nll / n);
    }
    if (finish_replies(a, kv, seq, a->asked + a->begin, a->end - a->begin, err) != 0) return -1;
    for (int i = a->begin; i < a->end; i++) {
        Asked *q = &a->asked[i];
        EvalMark mark = {q->full_text.s, q->full_value};
        if (c->same[i] == 0) {
            mark.answer = q->reply.text.s;
            if (eval_answer(a->task, q->q, mark.answer, &mark.value, err) != 0) return -1;
        }
        c->value[i] = (float)mark.value;
        if (a->show) a->show(a->show_arg, c, q->q, &mark);
    }
    return 0;
}
