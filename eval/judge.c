// judge.c: rows of logits, judged where they stand.
//
// A sequence is fed a question together with an answer that is known, and every row of logits is
// judged where it lies in the state: which token is the likeliest, how likely the known one is, how
// far the distribution is from another cache's. Nothing is decoded, rows of several sequences share
// a forward call, and only what is compared later is copied. Perplexity is the same thing with the
// second half of a window of text as the answer.
#include "eval/judge.h"

#include <math.h>
#include <stdlib.h>
#include <string.h>

#include "answer.h"
#include "kernels/kernels.h"

// ---- rows ----

// Sum of exp(x - max); where y is given also *diff = sum of exp(x - max) (x - y).
static double exp_sum(const float *x, float max, const float *y, int n, double *diff) {
    double sum = 0;
    float e[64];
    for (int i = 0; i < n; i += 64) {
        int m = n - i < 64 ? n - i : 64;
        memcpy(e, x + i, (size_t)m * sizeof *e);
        for (int j = m; j < 64; j++) e[j] = -INFINITY;
        sum += kern.exp64(e, max);
        if (!y) continue;
        float d = 0;
        for (int j = 0; j < m; j++) d += e[j] * (x[i + j] - y[i + j]);
        *diff += d;
    }
    return sum;
}

// Judges logits i of the rows at hand.
static void judge_row(void *ctx, int i) {
    const Judge *j = ctx;
    Judged *it = j->item[i];
    int vocab = j->state->model->config.vocab_size, at = j->at[i];
    const float *x = j->state->logits + (size_t)i * vocab;
    Verdict *v = &it->verdict[at];
    v->best = likeliest(x, vocab);
    double log_sum = x[v->best] + log(exp_sum(x, x[v->best], NULL, vocab, NULL));
    v->nll = (float)(log_sum - x[it->full.id[at]]);
    v->kl = 0;
    if (!it->logits) return;
    float *full = it->logits + (size_t)at * vocab;
    if (j->keep) {
        v->full = v->best;
        memcpy(full, x, (size_t)vocab * sizeof *x);
    } else {
        float max = full[v->full];
        double diff = 0, sum = exp_sum(full, max, x, vocab, &diff);
        v->kl = (float)fmax(diff / sum + log_sum - max - log(sum), 0);
    }
}

int judge_flush(Judge *j, char *err) {
    if (j->n > 0 && forward(j->state, j->kv, j->row, j->n, err) != 0) return -1;
    parallel_for(j->state->pool, j->n_logits, judge_row, j);
    j->n = j->n_logits = 0;
    return 0;
}

// One more row; `at` is the token of the answer it predicts, -1: none that matters.
static int add_row(Judge *j, Judged *it, int token, int at, char *err) {
    if (j->n == j->state->max_rows || (at >= 0 && j->n_logits == j->state->max_logits))
        if (judge_flush(j, err) != 0) return -1;
    if (at >= 0) j->item[j->n_logits] = it, j->at[j->n_logits++] = at;
    j->row[j->n++] = (Row){it->seq, token, at >= 0};
    return 0;
}

// Where a reader chooses pages for short runs, the answer must come in such, as if it were written,
// and what is asked in one of its own.
static bool ends_run(const Judge *j, int at) {
    return j->kv->reading.reader && at % (KV_LONG_RUN - 1) == 0;
}

int judge_add(Judge *j, Judged *it, char *err) {
    if (ends_run(j, 0) && judge_flush(j, err) != 0) return -1;
    for (int i = 0; i < it->ask.n; i++)
        if (add_row(j, it, it->ask.id[i], i == it->ask.n - 1 ? 0 : -1, err) != 0) return -1;
    for (int i = 1; i < it->full.n; i++) {
        if (ends_run(j, i - 1) && judge_flush(j, err) != 0) return -1;
        if (add_row(j, it, it->full.id[i - 1], i, err) != 0) return -1;
    }
    return 0;
}

// ---- perplexity ----

typedef struct {
    const Perplexity *p;
    KVCache kv;
    Judge judge;
    Judged item;
    double sum, squares;  // of -ln p
} Windows;

// What the tokens so far, out->n, say.
static void sum_up(const Windows *w, PerplexityResult *out) {
    double mean = w->sum / out->n, variance = w->squares / out->n - mean * mean;
    double error = out->n > 1 && variance > 0 ? sqrt(variance / (out->n - 1)) : 0;
    out->value = exp(mean);
    out->error = error * out->value;
    out->low = exp(mean - 1.96 * error);
    out->high = exp(mean + 1.96 * error);
}

// ids [window], the first half of which is read for context alone.
static int score_window(Windows *w, int *ids, PerplexityResult *out, char *err) {
    int half = w->p->window / 2;
    Judged *it = &w->item;
    it->ask = (Ids){ids, half + 1, 0};
    it->full = (Ids){ids + half + 1, w->p->window - half - 1, 0};
    it->seq = kvcache_new(&w->kv, err);
    if (it->seq < 0 || judge_add(&w->judge, it, err) != 0 || judge_flush(&w->judge, err) != 0)
        return -1;
    kvcache_drop(&w->kv, it->seq);
    for (int i = 0; i < it->full.n; i++) {
        w->sum += it->verdict[i].nll;
        w->squares += (double)it->verdict[i].nll * it->verdict[i].nll;
    }
    out->n += it->full.n;
    sum_up(w, out);
    return 0;
}

static int score_windows(Windows *w, const Ids *ids, PerplexityResult *out, char *err) {
    const Perplexity *p = w->p;
    KVShape shape = model_kv_shape(p->state->model);
    Ids bos = {0};
    int n_windows = ids->n / p->window, rc = tokenizer_encode(p->tok, "", 0, TOK_BOS, &bos);
    if (n_windows == 0)
        rc = fail(err, "the text has %d tokens, a window needs %d", ids->n, p->window);
    else if (rc != 0 || !(w->item.verdict = malloc((size_t)p->window * sizeof *w->item.verdict)))
        rc = fail(err, "out of memory");
    else
        rc = kvcache_open(&w->kv, &shape, p->kv, p->state->pool, err);
    for (int i = 0; i < n_windows && rc == 0; i++) {
        int *window = ids->id + (size_t)i * p->window;
        if (bos.n > 0) window[0] = bos.id[0];
        rc = score_window(w, window, out, err);
        if (rc == 0 && p->progress && p->progress(p->arg, i + 1, n_windows, out->value) != 0)
            rc = fail(err, "interrupted");
    }
    ids_free(&bos);
    return rc;
}

int eval_perplexity(const Perplexity *p, const char *text, size_t n, PerplexityResult *out,
                    char *err) {
    Windows w = {.p = p, .judge = {.state = p->state}};
    w.judge.kv = &w.kv;
    Ids ids = {0};
    *out = (PerplexityResult){0};
    if (n > 0 && text[n - 1] == '\n') n--;
    int rc = tokenizer_encode(p->tok, text, n, TOK_BOS, &ids);
    rc = rc != 0 ? fail(err, "out of memory") : score_windows(&w, &ids, out, err);
    kvcache_close(&w.kv);
    free(w.item.verdict);
    ids_free(&ids);
    return rc;
}
