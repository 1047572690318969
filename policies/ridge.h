// ridge.h: linear probes of many kv heads by ridge regression, out of sums alone.
#ifndef RIDGE_H
#define RIDGE_H
#include "policies/profile.h"

// The sums of some layers, and room for the rows of a forward call. n_features is row_features of
// profile.h.
typedef struct {
    const Config *config;
    ThreadPool *pool;
    double lambda;  // as a share of each feature's own square
    int layers;     // whose sums there is room for
    int n_features;
    int y_cols;       // n_kv_heads rounded up to 16
    float *products;  // [layers][n_features][n_features] X^T X in blocks of 64, lower ones
    float *targets;   // [layers][n_features][y_cols] X^T y
    float *x;         // [max_rows][n_features] in: the features of a call's rows
    float *y;         // [max_rows][y_cols] in: their targets, zeros after the heads'
    float *xt;        // [n_features][rows] x transposed
    float *xb;        // [n_features / 64][rows][64] x in blocks of 64 features
} Ridge;

// What the regression of n_layers layers gives, and what it has to know beside the sums.
typedef struct {
    int n_layers;
    double count;           // rows that were summed
    const double *squares;  // [n_layers][n_kv_heads] sum of y^2
    const double *sums;     // [n_layers][n_kv_heads] sum of y
    float *probe;           // [n_layers][n_kv_heads][probe_features] out
    double *explained;      // [n_layers][n_kv_heads] out: share of the variance of y
} RidgeFit;

// Room for as many of n_layers layers as fit into the memory meant for sums, at least one, and for
// the rows that s computes at once. Returns 0, or -1: no memory.
int ridge_open(Ridge *r, const RunState *s, int n_layers, double lambda, char *err);
size_t ridge_bytes(const RunState *s, int n_layers);  // what ridge_open takes
void ridge_close(Ridge *r);                           // safe on a zeroed struct, and twice

void ridge_clear(Ridge *r);  // starts all sums anew

// Adds rows [first, first + n) of x, with targets [0, n) of y, to the sums of a layer, counted from
// 0 within the group.
void ridge_add(Ridge *r, int layer, int first, int n);

// Solves (G + lambda diag G) w = X^T y for each head of the layers, G the products of its own
// features. Returns 0, or -1: no memory.
int ridge_solve(const Ridge *r, const RidgeFit *fit, char *err);
#endif
