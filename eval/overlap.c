// overlap.c: how much two texts have in common in the same order.
//
// A text is a list of parts, words or characters, and parts are numbered so that equal ones have
// one number: all that follows compares numbers. Lists are as long as answers, so that the plain
// algorithms are fast enough.
#include "eval/overlap.h"

#include <math.h>
#include <stdbool.h>
#include <stdint.h>
#include <stdlib.h>
#include <string.h>

#include "util.h"

typedef struct {
    const char *s;
    size_t n;
} Part;

// Both texts; want's numbers come after text's, in one block.
typedef struct {
    int *text, *want;  // [n_text], [n_want]
    int n_text, n_want;
} Pair;

// ---- parts ----

static bool is_space(char c) { return c == ' ' || (c >= '\t' && c <= '\r'); }

// The next part of *s, which moves behind it; an empty one at the end.
static Part next_part(const char **s, bool words) {
    Part p = {*s, 0};
    if (words) {
        while (is_space(*p.s)) p.s++;
        while (p.s[p.n] && !is_space(p.s[p.n])) p.n++;
    } else if (*p.s) {
        p.n = 1;
        while (((uint8_t)p.s[p.n] & 0xc0) == 0x80) p.n++;
    }
    *s = p.s + p.n;
    return p;
}

static int by_text(const void *a, const void *b) {
    const Part *x = *(const Part *const *)a, *y = *(const Part *const *)b;
    int order = memcmp(x->s, y->s, x->n < y->n ? x->n : y->n);
    return order ? order : (x->n > y->n) - (x->n < y->n);
}

// Numbers the parts [n], equal ones alike. 0, or -1: no memory.
static int number_parts(const Part *part, int n, int *number) {
    const Part **order = malloc(((size_t)n + 1) * sizeof *order);
    if (!order) return -1;
    for (int i = 0; i < n; i++) order[i] = &part[i];
    qsort(order, (size_t)n, sizeof *order, by_text);
    for (int i = 0, next = 0; i < n; i++) {
        if (i > 0 && by_text(&order[i - 1], &order[i]) != 0) next++;
        number[order[i] - part] = next;
    }
    free(order);
    return 0;
}

// free(p->text) frees it. 0, or -1: no memory.
static int open_pair(Pair *p, const char *text, const char *want, bool words) {
    const char *const texts[] = {text, want};
    size_t room = strlen(text) + strlen(want) + 1;
    Part *part = malloc(room * sizeof *part);
    int n = 0, ends[2], rc = -1;
    p->text = malloc(room * sizeof *p->text);
    for (int i = 0; part && i < 2; i++) {
        const char *s = texts[i];
        for (Part next; (next = next_part(&s, words)).n > 0;) part[n++] = next;
        ends[i] = n;
    }
    if (part && p->text) rc = number_parts(part, n, p->text);
    free(part);
    if (rc != 0) return free(p->text), -1;
    p->n_text = ends[0], p->n_want = n - ends[0], p->want = p->text + ends[0];
    return 0;
}

// ---- the longest list in common ----

// Its length, with row [n_want + 1] for one line of the table of all beginnings.
static int longest_common(const Pair *p, int *row) {
    memset(row, 0, ((size_t)p->n_want + 1) * sizeof *row);
    for (int i = 0; i < p->n_text; i++) {
        int before = 0;  // of the beginnings that are one shorter each
        for (int j = 0; j < p->n_want; j++) {
            int above = row[j + 1];
            row[j + 1] = p->text[i] == p->want[j] ? before + 1 : max_int(above, row[j]);
            before = above;
        }
    }
    return row[p->n_want];
}

static double common_share(const char *text, const char *want, bool words) {
    Pair p;
    if (open_pair(&p, text, want, words) != 0) return -1;
    int *row = malloc(((size_t)p.n_want + 1) * sizeof *row), all = p.n_text + p.n_want;
    double share = !row ? -1 : all == 0 ? 1 : 2.0 * longest_common(&p, row) / all;
    free(row);
    free(p.text);
    return share;
}

double overlap_rouge(const char *text, const char *want) { return common_share(text, want, true); }

double overlap_characters(const char *text, const char *want) {
    return common_share(text, want, false);
}

// ---- BLEU ----

static int count_run(const int *list, int n_list, const int *run, int n) {
    int count = 0;
    for (int i = 0; i + n <= n_list; i++)
        count += memcmp(list + i, run, (size_t)n * sizeof *run) == 0;
    return count;
}

// How many runs of n words of the text are in what is wanted, each at most as often as there.
static int common_runs(const Pair *p, int n) {
    int common = 0;
    for (int i = 0; i + n <= p->n_text; i++) {
        const int *run = p->text + i;
        int seen = count_run(p->text, i + n - 1, run, n);
        common += seen < count_run(p->want, p->n_want, run, n);
    }
    return common;
}

double overlap_bleu(const char *text, const char *want) {
    enum { LONGEST = 4, SMOOTH = 5 };
    Pair p;
    if (open_pair(&p, text, want, true) != 0) return -1;
    double sum = 0, missing = 1;
    bool any = false;
    for (int n = 1; n <= LONGEST; n++) {
        double common = common_runs(&p, n), all = max_int(1, p.n_text - n + 1);
        if (n == 1) any = common > 0;
        if (common == 0 && p.n_text > 1) {
            missing *= 2;
            common = log(p.n_text) / (missing * SMOOTH);
        }
        if (common > 0) sum += log(common / all) / LONGEST;
    }
    double brief = any && p.n_text < p.n_want ? 1 - (double)p.n_want / p.n_text : 0;
    free(p.text);
    return any ? exp(brief + sum) : 0;
}
