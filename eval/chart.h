// chart.h: pictures of results, one self-contained file each.
#ifndef CHART_H
#define CHART_H
#include "eval/eval.h"

// SVG: a panel per task and metric, a line per policy, level, fit and page type, the share of pairs
// kept from left to right. Returns 0, or -1 with err.
int chart_curves(const EvalRow *rows, int n, const char *path, char *err);

// Which pairs of a context stay, by layer and head.
typedef struct {
    const char *model, *policy, *level;
    const char *fit;  // "both", "values", or NULL: nothing is fitted
    const Tokenizer *tok;
    const int *ids;       // [n_ctx] of the context, without the prefix
    const int *layer;     // [n_layers] those that evict
    const uint8_t *keep;  // [n_layers][n_kv_heads][n_ctx]
    const float *bias;    // as keep, of the pairs that stay (fit.h); NULL: there are none
    int n_ctx, n_layers, n_kv_heads;
    long n_kept;  // ones in keep
} ChartMap;

// How many pairs each one that stays stands for, its bias to the power of e, on average; 1 without
// biases.
double chart_stands_for(const ChartMap *m);

// HTML: the text, each token the darker the more heads keep it, with a line below it the stronger
// the more pairs it stands for, and a table of the heads to choose from. Returns 0, or -1 with err.
int chart_map(const ChartMap *m, const char *path, char *err);
#endif
