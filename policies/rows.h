// rows.h: attention row by row, for methods that look at what each token pays while it passes.
//
// What the sweep sums over rows (KVScoring) is faster; this is for methods that count, weigh or
// forget rows, and for sequences from which pairs go meanwhile.
#ifndef ROWS_H
#define ROWS_H
#include "policies/context.h"

// One row pays w [n], the mean over the query heads of scored head h, to the n pairs of its list
// that it sees, the last of which is its own. Of one head rows come in order; several heads may
// come at the same time.
typedef void (*TakeRow)(void *arg, int h, int pos, const float *w, int n);

// Forward calls of one sequence, watched.
typedef struct {
    Context *c;
    int seq;
    int from;   // position of the first row that counts
    bool last;  // only the last row of each call counts
    TakeRow take;
    void *arg;
    // out: whoever watches as well; the call at hand; out of memory
    void (*next)(void *arg, int layer, int n);
    void *next_arg;
    int layer, n_rows;
    bool failed;
} Rows;

// From here on r->take is called in every forward call of r->seq, until rows_end. r must stay.
void rows_begin(Rows *r);
void rows_end(Rows *r);  // also where it never began

// Reads c's context, and hands over the rows of its last `rows` tokens; or, with rows 0, those of
// c's question, put behind the context, which leaves no trace. Returns 0, or -1 with err.
int rows_read(Context *c, int rows, TakeRow take, void *arg, char *err);

// The same of other ids put behind the context, which has been read.
int rows_behind(Context *c, const int *ids, int n, TakeRow take, void *arg, char *err);
#endif
