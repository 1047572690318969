// chart.h: pictures of results, one self-contained file each.
#ifndef CHART_H
#define CHART_H
#include <stdio.h>

#include "eval/eval.h"

// Writes s [n] as text or an attribute's value of XML or HTML, shown as on a terminal (text.h):
// nothing is left that XML forbids.
void chart_text(FILE *f, const char *s, size_t n);

// ---- curves ----

// What is from left to right. Along the depth a panel is of one ratio.
typedef enum { CHART_KEPT, CHART_BYTES, CHART_SPEED, CHART_DEPTH } ChartAxis;

// Writes an element <svg>: a panel per task and metric, a line per policy, level, fit and page type
// of up to 128, in the order in which they come.
void chart_svg(FILE *f, const EvalRow *rows, int n, ChartAxis axis);

// Writes a row's policy, level, page type and fit, as the legend has them.
void chart_method(FILE *f, const EvalRow *row);

// The same as a file, with the share of pairs kept from left to right. Returns 0, or -1 with err.
int chart_curves(const EvalRow *rows, int n, const char *path, char *err);

// ---- survivors ----

// Which pairs of a context stay, by layer and head.
typedef struct {
    const char *model, *policy, *level;
    const char *fit;  // a name of policies/fitting.h, or NULL: nothing is fitted
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
