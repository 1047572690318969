// classes.c: methods that give each head or layer a class, full or few pairs, and thereby budgets.
//
// Pairs that every class keeps, the first and the newest, come first in the order; then those that
// a class keeps; the others are ordered by how little their head or layer can do without them. So a
// ratio keeps as many heads or layers whole as fit, and --threshold gives the authors' own rule.
#include <ctype.h>
#include <math.h>
#include <stdlib.h>
#include <string.h>

#include "policies/methods.h"
#include "policies/ranks.h"
#include "policies/rows.h"
#include "util.h"

// Whether place t of a list of n pairs is among the first `sink` or the last `recent`; and what
// such pairs are worth, the newer the more.
static bool at_the_ends(int t, int n, int sink, int recent) { return t < sink || t >= n - recent; }

static float ends_worth(int t, int n) { return 2.0f + (float)t / (float)n; }

// ---- DuoAttention (arXiv 2410.10819) ----

// Heads that retrieve keep all, others the first and newest pairs. What retrieves is said by the
// largest KVzip score of the head in the profile's texts instead of gates that are trained.
int score_duo(Context *c, float *score, char *err) {
    int sink = (int)context_param(c, "sink"), recent = (int)context_param(c, "recent");
    if (context_need_profile(c, "policy duo", err) != 0 || context_read(c, err) != 0) return -1;
    int before = context_pos(c), n = before + c->n_ctx;
    for (size_t i = 0; i < context_scores(c); i++) {
        int t = before + (int)(i % (size_t)c->n_ctx);
        bool ends = at_the_ends(t, n, sink, recent);
        score[i] = ends ? ends_worth(t, n) : c->profile->head_max[i / (size_t)c->n_ctx];
    }
    return 0;
}

// ---- SimLayerKV (arXiv 2410.13846) ----

// What the last token pays to the ends of each head's list, its own pair left out.
typedef struct {
    int sink, recent;
    double *mass;  // [scored heads]
} Ends;

static void take_ends(void *arg, int h, int pos, const float *w, int n) {
    const Ends *e = arg;
    (void)pos;
    e->mass[h] = 0;
    for (int t = 0; t < n - 1; t++)
        if (at_the_ends(t, n - 1, e->sink, e->recent)) e->mass[h] += w[t];
}

// Layers whose last token looks at the first and newest pairs alone, mean over the heads, are lazy
// and keep no others. Other pairs are worth what their layer pays elsewhere.
int score_simlayerkv(Context *c, float *score, char *err) {
    Ends e = {(int)context_param(c, "sink"), (int)context_param(c, "recent"),
              calloc((size_t)context_heads(c) + 1, sizeof *e.mass)};
    int before = context_pos(c), n = before + c->n_ctx, g = c->kv->shape.n_kv_heads;
    int status = e.mass ? rows_read(c, 1, take_ends, &e, err)
                        : fail(err, "out of memory for %d heads", context_heads(c));
    for (size_t i = 0; status == 0 && i < context_scores(c); i++) {
        int t = before + (int)(i % (size_t)c->n_ctx), h = (int)(i / (size_t)c->n_ctx) / g * g;
        double mass = 0;
        for (int k = 0; k < g; k++) mass += e.mass[h + k] / g;
        score[i] = at_the_ends(t, n, e.sink, e.recent) ? ends_worth(t, n) : (float)(1 - mass);
    }
    free(e.mass);
    return status;
}

// ---- FastGen (arXiv 2310.01801) ----

// Sets of pairs that hold each other.
enum { SPECIAL, PUNCTUATION, FREQUENT, LOCAL, OTHER };

// Whether a token is special, or prints nothing but marks and spaces, or neither.
static int class_of_token(const Tokenizer *tok, int id) {
    int n, marks = 0, spaces = 0;
    if (tokenizer_is_special(tok, id)) return SPECIAL;
    const char *s = tokenizer_piece(tok, id, &n);
    for (int i = 0; i < n; i++) {
        marks += ispunct((unsigned char)s[i]) != 0;
        spaces += isspace((unsigned char)s[i]) != 0;
    }
    return marks > 0 && marks + spaces == n ? PUNCTUATION : OTHER;
}

// Of one head: score [n] in: the weights of its pairs; out: 1 more for those that the smallest set
// keeps which holds the share `mass` of all weights. token [n] as class_of_token; of the other
// pairs the best `frequent` and the last `local` are sets of their own. order [n] is scratch.
static void choose_class(float *score, const int *token, int n, int frequent, int local,
                         double mass, double all, int *order) {
    double lost[OTHER + 1] = {0};  // with the sets up to this one
    int *class = order + n, chosen = SPECIAL, left = frequent;
    for (int t = 0; t < n; t++) class[t] = token[t];
    for (int i = 0; i < n && left > 0; i++) {
        int t = order[i];
        if (class[t] == OTHER) class[t] = FREQUENT, left--;
    }
    for (int t = max_int(n - local, 0); t < n; t++)
        if (class[t] == OTHER) class[t] = LOCAL;
    for (int t = 0; t < n; t++)
        for (int s = SPECIAL; s < class[t]; s++) lost[s] += score[t];
    while (chosen < OTHER && 1 - lost[chosen] / all < mass) chosen++;
    for (int t = 0; t < n; t++) score[t] = (float)(score[t] / all) + (class[t] <= chosen ? 1 : 0);
}

// A head keeps the smallest of these sets that holds the share `mass` of what the last tokens pay:
// special tokens; marks as well; as well the pairs they pay most; as well the newest; all.
int score_fastgen(Context *c, float *score, char *err) {
    int n = c->n_ctx, window = min_int((int)context_param(c, "window"), max_int(n, 1));
    int few = (int)(context_param(c, "frequent") * n), local = (int)(context_param(c, "local") * n);
    if (read_watched(c, window, score, err) != 0) return -1;
    int *token = malloc(((size_t)n + 1) * 3 * sizeof *token);
    bool ok = token != NULL;
    for (int t = 0; ok && t < n; t++) token[t] = class_of_token(c->tok, c->ids[c->n_prefix + t]);
    for (size_t i = 0; ok && i < context_scores(c); i += (size_t)n) {
        ok = ranks_order(token + n, score + i, n);
        if (ok)
            choose_class(score + i, token, n, few, local, context_param(c, "mass"),
                         (double)window * context_group(c), token + n);
    }
    free(token);
    return ok ? 0 : fail(err, "out of memory for the classes of %d tokens", n);
}
