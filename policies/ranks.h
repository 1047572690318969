// ranks.h: orders of scores, for methods that choose in two stages.
#ifndef RANKS_H
#define RANKS_H
#include <stdbool.h>

// order [n]: places of scores [n], the largest first, of equals the first. false: no memory.
bool ranks_order(int *order, const float *score, int n);

// out [n], which may be `first`: the values of `second` [n], given to other places, so that for any
// k the k largest are the max(1, floor(share k)) best by `first` and, of the others, the best by
// `second`. These sets grow with k, so that one order serves every k. share 0 is `second` itself.
// false: no memory.
bool ranks_two_stages(float *out, const float *first, const float *second, int n, double share);
#endif
