// wrapped.c: methods that take another method's scores: "chunkkv:kvzip" wraps kvzip.
#include <math.h>
#include <stdlib.h>

#include "kernels/matmul.h"
#include "policies/methods.h"
#include "policies/ranks.h"
#include "util.h"

// ChunkKV (arXiv 2502.00299): a pair is worth the mean of its chunk, and all heads of the layer
// together: neighbours stay or go as one.
int score_chunkkv(Context *c, float *score, char *err) {
    int chunk = (int)context_param(c, "tokens"), g = c->kv->shape.n_kv_heads, n = c->n_ctx;
    if (score_inner(c, score, err) != 0) return -1;
    for (size_t at = 0; at < context_scores(c); at += (size_t)n * g) {
        for (int from = 0; from < n; from += chunk) {
            int m = min_int(chunk, n - from);
            double sum = 0;
            for (int i = 0; i < m * g; i++) sum += score[at + (size_t)(i / m) * n + from + i % m];
            for (int i = 0; i < m * g; i++)
                score[at + (size_t)(i / m) * n + from + i % m] = (float)(sum / m);
        }
    }
    return 0;
}

// ---- CriticalKV (arXiv 2502.03805) ----

// One layer: what values of its pairs add to the output.
typedef struct {
    const Context *c;
    int layer, scored;
    double share;
    float *score;  // [n_kv_heads][n_ctx] in: the inner method's; out: the order of both stages
    bool failed;
} Critical;

// out [64] += |Wo_h v|_1 / group of the values v [64][head_dim]; wo [head_dim][dim], y [64][dim].
static void add_norms(float *out, const float *v, const float *wo, float *y, const Config *m) {
    kern.gemm_f32(&(Gemm){.c = y,
                          .ldc = (size_t)m->dim,
                          .a = v,
                          .lda = (size_t)m->head_dim,
                          .b = wo,
                          .n = PAGE,
                          .inner = m->head_dim,
                          .cols = m->dim});
    for (int j = 0; j < PAGE; j++) {
        float sum = 0;
        for (int i = 0; i < m->dim; i++) sum += fabsf(y[(size_t)j * m->dim + i]);
        out[j] += sum / (float)(m->n_heads / m->n_kv_heads);
    }
}

// norm [n_ctx]: what the values of kv head g add, mean over its query heads; wo and y as add_norms.
static void value_norms(const Critical *w, int g, float *norm, float *wo, float *y) {
    const Context *c = w->c;
    const Config *m = &c->state->model->config;
    const Matrix *all = &c->state->model->layers[w->layer].wo;
    int group = m->n_heads / m->n_kv_heads, d = m->head_dim;
    int first = context_first(c, w->scored * m->n_kv_heads + g), end = first + c->n_ctx;
    float v[PAGE * MAX_HEAD_DIM], sum[PAGE];
    for (int t = 0; t < c->n_ctx; t++) norm[t] = 0;
    for (int h = g * group; h < (g + 1) * group; h++) {
        for (int i = 0; i < d * m->dim; i++) wo[i] = matrix_at(all, i % m->dim, h * d + i / m->dim);
        for (int b = first / PAGE; b * PAGE < end; b++) {
            kvcache_block(c->kv, (KVHeadAt){c->seq, w->layer, g}, b, NULL, v);
            for (int j = 0; j < PAGE; j++) sum[j] = 0;
            add_norms(sum, v, wo, y, m);
            for (int t = max_int(b * PAGE, first); t < min_int(b * PAGE + PAGE, end); t++)
                norm[t - first] += sum[t % PAGE];
        }
    }
}

static void critical_head(void *ctx, int g) {
    Critical *w = ctx;
    const Config *m = &w->c->state->model->config;
    int n = w->c->n_ctx;
    size_t square = (size_t)m->head_dim * m->dim, page = (size_t)PAGE * m->dim;
    float *room = malloc((square + page + 2 * (size_t)n) * sizeof *room);
    float *score = w->score + (size_t)g * n;
    if (!room) {
        w->failed = true;
        return;
    }
    float *norm = room + square + page, *second = norm + n;
    value_norms(w, g, norm, room, room + square);
    for (int t = 0; t < n; t++) second[t] = (score[t] + 1e-4f) * norm[t];
    if (!ranks_two_stages(score, score, second, n, w->share)) w->failed = true;
    free(room);
}

// Of those that stay in a head a first part by the inner method's scores, the rest by what these
// scores times |Wo v|_1 leave: exactly so for any number that stays.
int score_criticalkv(Context *c, float *score, char *err) {
    const KVShape *shape = &c->kv->shape;
    if (score_inner(c, score, err) != 0) return -1;
    for (int s = 0; s < kvcache_scored_layers(shape, NULL); s++) {
        Critical w = {.c = c,
                      .layer = kvcache_scored_layer(shape, s),
                      .scored = s,
                      .share = context_param(c, "first"),
                      .score = score + (size_t)s * shape->n_kv_heads * c->n_ctx};
        parallel_for(c->state->pool, shape->n_kv_heads, critical_head, &w);
        if (w.failed) return fail(err, "out of memory for the norms of %d values", c->n_ctx);
    }
    return 0;
}
