// fitting.c: fitting a whole context.
//
// Two moments: while the context is read (or repeated, for KVzip), evenly spaced queries are copied
// as they pass; once it is known which pairs stay, and before the others go, each head is fitted to
// them on its own. Queries of reading are turned to where later questions stand, behind the
// context. Where pairs are evicted while tokens come, the second moment returns again and again.
#include "policies/fitting.h"

#include <limits.h>
#include <math.h>
#include <stdatomic.h>
#include <stdlib.h>
#include <string.h>

#include "fit.h"
#include "merge.h"
#include "util.h"

static const char *const kind_names[FIT_KINDS] = {"none", "values", "both", "merge", "pool"};

// Of the fit (fit.h).
static const double RIDGE = 0.05, FLOOR = 0.05;
enum { STEPS = 20, SPREAD = 64 };  // positions behind the context that queries are turned to

int fit_kind(const char *name) {
    for (int i = 0; i < FIT_KINDS; i++)
        if (strcmp(name, kind_names[i]) == 0) return i;
    return -1;
}

const char *fit_kind_name(FitKind kind) { return kind_names[kind]; }

// How many of n positions heads are fitted to where n_kept of n_pairs stay.
static int positions_of(int n, long n_kept, long n_pairs) {
    return n_kept * FIT_FEW > n_pairs ? (n + 1) / 2 : n;
}

size_t fitting_bytes(const KVShape *shape, int n, int kept, int threads) {
    size_t d = (size_t)shape->head_dim, group = (size_t)(shape->n_heads / shape->n_kv_heads);
    size_t heads = (size_t)kvcache_scored_layers(shape, NULL) * (size_t)shape->n_heads;
    size_t rows = group * (size_t)positions_of(FIT_POSITIONS, kept, n);
    size_t pairs = (size_t)n, stay = (size_t)kept;
    size_t size = rows < stay ? rows : stay;
    size_t head = 3 * pairs * d + 2 * rows * d + 3 * rows * stay + size * (size + 64) +
                  pairs * 64;  // of fit_head
    return heads * FIT_POSITIONS * (d * sizeof(uint16_t) + sizeof(float)) +
           (size_t)threads * head * sizeof(float);
}

int fitting_open(Fitting *f, FitKind kind, const Context *c, char *err) {
    const KVShape *shape = &c->kv->shape;
    size_t heads = (size_t)kvcache_scored_layers(shape, NULL) * shape->n_heads;
    *f = (Fitting){.kind = kind, .c = c};
    if (kind != FIT_NONE && kvcache_readers(shape, NULL) != kvcache_scored_layers(shape, NULL))
        return fail(err, "pairs that several layers read cannot be fitted: leave out --fit");
    f->q = malloc(heads * FIT_POSITIONS * shape->head_dim * sizeof *f->q + 1);
    f->own = malloc(heads * FIT_POSITIONS * sizeof *f->own + 1);
    if (f->q && f->own) return 0;
    fitting_close(f);
    return fail(err, "out of memory for the queries of %zu heads", heads);
}

void fitting_close(Fitting *f) {
    free(f->q);
    free(f->own);
    *f = (Fitting){0};
}

// ---- catching queries ----

void fitting_watch(Fitting *f, const Context *c, FitPass pass) {
    f->c = c, f->seq = pass.seq, f->from = pass.from, f->first = pass.first;
    f->n_tokens = pass.n_tokens, f->repeats = pass.repeats;
    f->n = min_int(pass.n_tokens, FIT_POSITIONS), f->every = 0;
    c->state->watch = fitting_tap, c->state->watch_arg = f;
}

void fitting_rest(Fitting *f) {
    if (f->c) f->c->state->watch = NULL;
}

void fitting_follow(Fitting *f, const Context *c) {
    fitting_watch(f, c, (FitPass){.seq = c->seq, .n_tokens = INT_MAX});
    f->every = 1, f->n = 0;
}

// Every second of the positions caught goes, until token `last` has a place.
static void make_places(Fitting *f, int last) {
    const KVShape *shape = &f->c->kv->shape;
    size_t heads = (size_t)kvcache_scored_layers(shape, NULL) * shape->n_heads;
    size_t d = (size_t)shape->head_dim;
    for (; last / f->every >= FIT_POSITIONS; f->every *= 2) {
        for (size_t h = 0; h < heads; h++) {
            uint16_t *q = f->q + h * FIT_POSITIONS * d;
            for (int i = 1; i < (FIT_POSITIONS + 1) / 2; i++)
                memcpy(q + i * d, q + 2 * i * d, d * sizeof *q);
        }
    }
    f->n = last / f->every + 1;
}

// Where token i's query goes, or -1: it is not one of those caught.
static int slot_of(const Fitting *f, int i) {
    if (i < f->first || i >= f->n_tokens) return -1;
    if (f->every > 0) return i % f->every == 0 ? i / f->every : -1;
    long before = (long)i * f->n / f->n_tokens, after = (long)(i + 1) * f->n / f->n_tokens;
    return after > before ? (int)before : -1;
}

typedef struct {
    Fitting *f;
    int layer, n;
} Passing;

// Of the row's own pass: log of the sum of exp(scale q . k) over the pairs from `own` on to its
// own, and of the head's sink.
static float own_sum(const Fitting *f, int layer, int h, int pos, const float *q) {
    const KVShape *shape = &f->c->kv->shape;
    int d = shape->head_dim, first = f->c->n_prefix + f->c->n_ctx, last = pos;
    float k[MAX_HEAD_DIM * PAGE], s[PAGE], max = kvshape_sink(shape, layer, h);
    float sum = max > -INFINITY ? 1 : 0;
    KVHeadAt at = {f->seq, layer, h / (shape->n_heads / shape->n_kv_heads)};
    for (int b = first / PAGE; b * PAGE <= last; b++) {
        kvcache_block(f->c->kv, at, b, k, NULL);
        kern.gemm_f32(&(Gemm){.c = s,
                              .ldc = PAGE,
                              .a = q,
                              .lda = (size_t)d,
                              .b = k,
                              .n = 1,
                              .inner = d,
                              .cols = PAGE});
        for (int j = 0; j < PAGE; j++) {
            int t = b * PAGE + j;
            if (t < first || t > last) continue;
            float x = shape->scale * s[j];
            if (shape->softcap > 0) x = shape->softcap * tanhf(x / shape->softcap);
            if (x > max) sum *= expf(max - x), max = x;
            sum += expf(x - max);
        }
    }
    return max + logf(sum);
}

// The rows of query head h.
static void catch_head(void *ctx, int h) {
    const Passing *p = ctx;
    const Fitting *f = p->f;
    const RunState *s = f->c->state;
    const Config *m = &s->model->config;
    int d = m->head_dim;
    size_t at = (size_t)kvcache_scored_index(&f->c->kv->shape, p->layer) * m->n_heads + h;
    float q[MAX_HEAD_DIM];
    for (int i = 0; i < p->n; i++) {
        int token = s->pos[i] - f->from, slot = slot_of(f, token);
        if (slot < 0) continue;
        memcpy(q, s->q + ((size_t)i * m->n_heads + h) * d, (size_t)d * sizeof *q);
        if (f->repeats)
            f->own[at * FIT_POSITIONS + slot] = own_sum(f, p->layer, h, s->pos[i], q);
        else
            model_unrotate(s, p->layer, i, q);
        kern.f32_to_f16(f->q + (at * FIT_POSITIONS + slot) * d, q, (size_t)d);
    }
}

void fitting_tap(void *arg, int layer, int n) {
    Fitting *f = arg;
    const KVShape *shape = &f->c->kv->shape;
    if (shape->window[layer] != 0 || n == 0) return;
    if (f->every > 0 && kvcache_scored_index(shape, layer) == 0)
        make_places(f, f->c->state->pos[n - 1] - f->from);
    parallel_for(f->c->state->pool, f->c->kv->shape.n_heads, catch_head, &(Passing){f, layer, n});
}

// ---- fitting ----

// What a thread fits in, one head after the other.
typedef struct {
    float *k, *v;    // pages of a head, as FitHead
    float *was;      // [pairs] their biases
    float *q, *own;  // its queries
    float *rope;     // [SPREAD][head_dim] of the places that they are turned to
    float *values;   // [pairs][head_dim] of those that stay
    float *bias;     // [pairs]
    int *kept;       // [pairs]
    FitRoom room;
    bool failed;
} Desk;

typedef struct {
    const Fitting *f;
    const Context *c;
    const FitChoice *choice;
    int positions;    // of f that are used
    atomic_int next;  // head that nobody has begun
    int end;          // the last one of this round, and one
    Desk *desk;       // [threads]
} Apply;

static int pairs_of(const Context *c, int h) {
    const KVHead *head = kvcache_scored_head(c->kv, c->seq, h);
    return head->len - head->dropped;
}

// The queries of kv head h, of all heads of its group, at n positions, as f32 times the scale: q
// [group * n][d]; own [group * n] of what they see beside the pairs.
static void gather_queries(const Apply *a, Desk *desk, int h, int n) {
    const Fitting *f = a->f;
    const Context *c = a->c;
    const Model *m = c->state->model;
    const KVShape *shape = &c->kv->shape;
    int group = shape->n_heads / shape->n_kv_heads, d = shape->head_dim;
    int scored = h / shape->n_kv_heads, layer = kvcache_scored_layer(shape, scored);
    int head = h % shape->n_kv_heads * group;  // the first query head
    size_t first = (size_t)scored * shape->n_heads + head;
    for (int i = 0; i < SPREAD && !f->repeats; i++)
        model_rope(m, layer, c->n_prefix + c->n_ctx + i, desk->rope + (size_t)i * d);
    for (int i = 0; i < group; i++) {
        for (int j = 0; j < n; j++) {
            float *to = desk->q + ((size_t)i * n + j) * d;
            int slot = (int)((long)j * f->n / n);
            size_t from = (first + i) * FIT_POSITIONS + slot;
            kern.f16_to_f32(to, f->q + from * d, (size_t)d);
            if (!f->repeats) model_rotate(m, to, desk->rope + (size_t)(37 * slot % SPREAD) * d);
            kern.scale(to, shape->scale, d);
            desk->own[(size_t)i * n + j] =
                f->repeats ? f->own[from] : kvshape_sink(shape, layer, head + i);
        }
    }
}

// The pairs of head h that stay, of n_pairs; kept NULL: only counted. Returns how many.
static int list_kept(const Apply *a, int h, int n_pairs, int *kept) {
    const FitChoice *choice = &a->choice[h];
    int n = 0;
    for (int t = 0; t < n_pairs; t++) {
        int i = t - a->c->n_prefix;
        if (i >= 0 && i < choice->n && !choice->keep[i]) continue;
        if (kept) kept[n] = t;
        n++;
    }
    return n;
}

static void fit_one(const Apply *a, Desk *desk, int h) {
    const Context *c = a->c;
    const Fitting *f = a->f;
    KVCache *kv = c->kv;
    const KVShape *shape = &kv->shape;
    KVHeadAt at = {c->seq, kvcache_scored_layer(shape, h / shape->n_kv_heads),
                   h % shape->n_kv_heads};
    int n_pairs = pairs_of(c, h), n = list_kept(a, h, n_pairs, desk->kept);
    if (n == n_pairs) return;
    size_t block = (size_t)shape->head_dim * PAGE;
    for (int b = 0; b * PAGE < n_pairs; b++)
        kvcache_block(kv, at, b, desk->k + b * block, desk->v + b * block);
    for (int t = 0; t < n_pairs; t++) desk->was[t] = kvcache_bias(kv, at, t);
    bool merges = f->kind == FIT_MERGE || f->kind == FIT_POOL;
    if (!merges) gather_queries(a, desk, h, a->positions);
    FitHead fit = {.head_dim = shape->head_dim,
                   .n_pairs = n_pairs,
                   .k = desk->k,
                   .v = desk->v,
                   .was = desk->was,
                   .n_kept = n,
                   .kept = desk->kept,
                   .n_rows = a->positions * (shape->n_heads / shape->n_kv_heads),
                   .q = desk->q,
                   .softcap = shape->softcap,
                   .own = f->repeats || shape->sinks ? desk->own : NULL,
                   .biases = f->kind == FIT_BOTH,
                   .ridge = RIDGE,
                   .floor = FLOOR,
                   .steps = STEPS};
    if (merges)
        desk->failed =
            merge_head(&fit, f->kind == FIT_POOL ? MERGE_NEAR : MERGE_SIMILAR, desk->values) != 0;
    else
        desk->failed = fit_head(&fit, &desk->room, desk->values, desk->bias) != 0;
    if (!desk->failed)
        kvcache_refit(kv, at,
                      &(KVFitted){desk->kept, n, desk->values, fit.biases ? desk->bias : NULL});
}

static void fit_heads(void *ctx, int i) {
    Apply *a = ctx;
    Desk *desk = &a->desk[i];
    for (int h; !desk->failed && (h = atomic_fetch_add(&a->next, 1)) < a->end;) fit_one(a, desk, h);
}

static int desk_open(Desk *desk, const Fitting *f, const Context *c, int most) {
    const KVShape *shape = &c->kv->shape;
    size_t pairs = ((size_t)most + PAGE) / PAGE * PAGE, d = (size_t)shape->head_dim;
    size_t rows = (size_t)f->n * (shape->n_heads / shape->n_kv_heads) + 1;
    desk->k = malloc(pairs * d * sizeof(float)), desk->v = malloc(pairs * d * sizeof(float));
    desk->was = malloc(pairs * sizeof(float));
    desk->q = malloc(rows * d * sizeof(float)), desk->own = malloc(rows * sizeof(float));
    desk->rope = malloc(SPREAD * d * sizeof(float));
    desk->values = malloc(pairs * d * sizeof(float));
    desk->bias = malloc(pairs * sizeof(float)), desk->kept = malloc(pairs * sizeof(int));
    return desk->k && desk->v && desk->was && desk->q && desk->own && desk->rope && desk->values &&
                   desk->bias && desk->kept
               ? 0
               : -1;
}

static void desk_close(Desk *desk) {
    free(desk->k), free(desk->v), free(desk->was), free(desk->q), free(desk->own);
    free(desk->rope), free(desk->values), free(desk->bias), free(desk->kept);
    fit_room_free(&desk->room);
}

// All heads, a few for each thread between two looks at progress. 0, or -1 with err.
static int fit_rounds(Apply *a, int threads, int most, char *err) {
    const Context *c = a->c;
    int n = context_heads(c), round = 4 * threads;
    for (int h = 0; h < n; h += round) {
        a->end = min_int(h + round, n);
        atomic_store(&a->next, h);
        parallel_for(c->state->pool, threads, fit_heads, a);
        for (int i = 0; i < threads; i++)
            if (a->desk[i].failed) return fail(err, "out of memory for fitting %d pairs", most);
        long done = (long)c->n_ctx * a->end / n;
        if (c->progress && c->progress(c->progress_arg, "fit", done, c->n_ctx) != 0)
            return fail(err, "interrupted");
    }
    return 0;
}

int fitting_apply(const Fitting *f, const Context *c, const FitChoice *choice, char *err) {
    int threads = pool_threads(c->state->pool), status = 0, most = 0;
    if (f->kind == FIT_NONE) return 0;
    if (kvcache_own(c->kv, c->seq, err) != 0) return -1;
    Apply a = {.f = f, .c = c, .choice = choice, .desk = calloc((size_t)threads, sizeof(Desk))};
    long n_kept = 0, n_pairs = 0;
    for (int h = 0; h < context_heads(c); h++) {
        int n = pairs_of(c, h);
        most = max_int(most, n);
        n_kept += list_kept(&a, h, n, NULL), n_pairs += n;
    }
    a.positions = positions_of(f->n, n_kept, n_pairs);
    for (int i = 0; i < threads && status == 0; i++)
        status = a.desk ? desk_open(&a.desk[i], f, c, most) : -1;
    if (status != 0)
        fail(err, "out of memory for fitting %d pairs", most);
    else
        status = fit_rounds(&a, threads, most, err);
    for (int i = 0; i < threads && a.desk; i++) desk_close(&a.desk[i]);
    free(a.desk);
    return status;
}

int fitting_apply_whole(const Fitting *f, const Context *c, const uint8_t *keep, char *err) {
    int n = context_heads(c);
    FitChoice *choice = malloc(((size_t)n + 1) * sizeof *choice);
    if (!choice) return fail(err, "out of memory for fitting %d heads", n);
    for (int h = 0; h < n; h++) choice[h] = (FitChoice){c->n_ctx, keep + (size_t)h * c->n_ctx};
    int status = fitting_apply(f, c, choice, err);
    free(choice);
    return status;
}
