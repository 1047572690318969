// merge.h: the pairs that go are merged into pairs that stay, without a look at any query: the
// plain ends of eviction, beside a fit (fit.h).
#ifndef MERGE_H
#define MERGE_H
#include "fit.h"

// Who takes the value of a pair that goes, and by which weight w:
//
//   MERGE_SIMILAR  the pair whose key points most alike, w = max(cos, 0) |v| / (|v| + |its value|):
//                  kvpress' MergingPress, after ToMe (arXiv 2210.09461) and D2O (arXiv 2406.13035)
//   MERGE_NEAR     the nearest pair of the list, of two the earlier one, w = 1: the mean pooling of
//                  the Compressive Transformer (arXiv 1911.05507)
typedef enum { MERGE_SIMILAR, MERGE_NEAR } MergeWay;

// values [n_kept][head_dim] of the pairs that stay: (v + sum of w v_i) / (1 + sum of w) over the
// pairs i that each of them takes. Keys stay: those of two positions have no mean that is a key. Of
// h the pairs count, no queries. Returns 0, or -1: no memory.
int merge_head(const FitHead *h, MergeWay way, float *values);
#endif
