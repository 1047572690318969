// page.h: results as one page for a browser.
#ifndef PAGE_H
#define PAGE_H
#include "eval/results.h"

// rows [n] are those of r. HTML that is XML as well, self-contained and without a script: the mean
// of all tasks against the
// share of pairs kept, bytes in memory and tokens/s, a curve and a table per task, intervals with
// everything; of tasks that say at which depth the answer stands curves by depth. Returns 0, or -1
// with err.
int page_write(const EvalRow *rows, int n, const EvalResults *r, const char *path, char *err);
#endif
