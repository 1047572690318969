// stream.c: evicting while tokens come.
//
// After a forward call each head has some pairs too many. The method says what every live pair is
// worth by now; pairs that left the window compete, within their head, their layer or all together
// as the context's level has it, for the places that the tokens seen so far give; and what loses
// goes at once. What went cannot come back when the budget grows: that is the price of never
// holding it all.
#include "policies/stream.h"

#include <math.h>
#include <stdlib.h>
#include <string.h>

#include "policies/fitting.h"
#include "util.h"

static KVHead *head_of(const Stream *s, int h) {
    return kvcache_scored_head(s->live.c->kv, s->live.c->seq, h);
}

// Room for the scores of what each head has and of what may come before the next look.
static int make_room(Stream *s, char *err) {
    for (int h = 0; h < s->live.n_heads; h++) {
        int need = head_of(s, h)->len + s->live.c->state->max_rows + PAGE;
        if (need <= s->room[h]) continue;
        float *score = realloc(s->live.score[h], (size_t)need * 2 * sizeof *score);
        if (score) s->live.score[h] = score;
        float *noted = realloc(s->live.noted[h], (size_t)need * 2 * sizeof *noted);
        if (noted) s->live.noted[h] = noted;
        if (!score || !noted) return fail(err, "out of memory for the scores of %d pairs", need);
        s->room[h] = need * 2;
    }
    return 0;
}

int stream_open(Stream *s, Context *c, double ratio, long budget, int window, char *err) {
    int n = context_heads(c);
    *s = (Stream){
        .live = {.c = c, .n_heads = n}, .ratio = ratio, .budget = budget, .window = window};
    if (!policy_is_live(c->policy)) {
        return fail(err,
                    "policy %s looks back at the whole context: it cannot evict before all of "
                    "it is there",
                    c->policy->name);
    }
    s->live.score = calloc((size_t)n + 1, sizeof *s->live.score);
    s->live.noted = calloc((size_t)n + 1, sizeof *s->live.noted);
    s->room = calloc((size_t)n + 1, sizeof *s->room);
    s->pairs = calloc((size_t)n + 1, sizeof *s->pairs);
    s->checked = c->kv->seqs[c->seq].next_pos;
    if (!s->live.score || !s->live.noted || !s->room || !s->pairs) {
        fail(err, "out of memory for evicting from %d heads", n);
    } else if (make_room(s, err) == 0) {
        if (c->fitting) fitting_follow(c->fitting, c);  // before a method that watches as well
        if (live_open(&s->live, err) == 0) return 0;
    }
    stream_close(s);
    return -1;
}

void stream_close(Stream *s) {
    if (s->live.c) live_close(&s->live);
    if (s->live.c && s->live.c->fitting) fitting_rest(s->live.c->fitting);
    for (int h = 0; s->live.score && h < s->live.n_heads; h++) free(s->live.score[h]);
    for (int h = 0; s->live.noted && h < s->live.n_heads; h++) free(s->live.noted[h]);
    free(s->live.score);
    free(s->live.noted);
    free(s->room);
    free(s->pairs);
    *s = (Stream){0};
}

// ---- who stays ----

// How many of the context's pairs in head h compete, from its first on.
static int competing(const Stream *s, int h, int window) {
    return max_int(live_pairs(&s->live, h) - window, 0);
}

// Places: of a head on its own in pairs[h]; of a pool of several in the pairs of its first one,
// where tokens compete as many for each of them.
// Returns how many heads make a pool, or -1.
static int count_places(Stream *s, char *err) {
    Context *c = s->live.c;
    const Level *l = c->level;
    int n_heads = s->live.n_heads, pool = 1;
    double ratio = s->ratio;
    c->n_ctx = c->kv->seqs[c->seq].next_pos - context_pos(c);
    if (s->budget > 0) ratio = c->n_ctx > s->budget ? (double)s->budget / c->n_ctx : 1;
    if (l->pool == LEVEL_PAIR || l->pool == LEVEL_TOKEN) pool = n_heads;
    if (l->pool == LEVEL_LAYER) pool = c->kv->shape.n_kv_heads;
    if (l->pool == LEVEL_HEAD)
        return fail(err, "level %s keeps whole heads: it cannot evict while tokens come", l->name);
    if (l->budget && l->budget(c, ratio, s->pairs, err) != 0) return -1;
    for (int h = 0; h < n_heads && !l->budget; h += pool)
        s->pairs[h] =
            (int)fmin((double)c->n_ctx * (l->pool == LEVEL_TOKEN ? 1 : pool) * ratio, 1 << 30);
    return pool;
}

// One eviction: who competes, and who stays of them.
typedef struct {
    Stream *s;
    int window, pool;   // newest pairs that do not compete; heads of a pool
    FitChoice *choice;  // [heads] pairs that compete, and which of them stay
    uint8_t *keep;      // what choice points to, one head after the other
    float *score;       // [competing pairs of the pool at hand]
} Contest;

// Fills keep and the choices of the pool whose first head is h. Returns how many competed, or -1.
static int choose(const Contest *t, int h, uint8_t *keep, char *err) {
    const Stream *s = t->s;
    int n = 0;
    for (int i = h; i < h + t->pool; i++) {
        t->choice[i] = (FitChoice){competing(s, i, t->window), keep + n};
        memcpy(t->score + n, s->live.score[i], (size_t)t->choice[i].n * sizeof *t->score);
        n += t->choice[i].n;
    }
    int places = min_int(s->pairs[h], n);
    Selection select = {
        .n_layers = 1, .n_kv_heads = 1, .n_ctx = n, .level = LEVEL_BUDGET, .budget = &places};
    if (s->live.c->level->pool == LEVEL_TOKEN && n > 0) {
        int tokens = t->choice[h].n;  // half a token more, so that rounding drops none
        select = (Selection){.n_layers = 1,
                             .n_kv_heads = t->pool,
                             .n_ctx = tokens,
                             .ratio = (places + 0.5) / tokens,
                             .level = LEVEL_TOKEN};
        for (int i = h; i < h + t->pool; i++)
            if (t->choice[i].n != tokens)
                return fail(err, "level token: heads hold different tokens of the context");
    }
    if (s->live.c->level->pool == LEVEL_THRESHOLD) {
        int newest = (int)context_level_param(s->live.c, "newest") - t->window;
        select.level = LEVEL_THRESHOLD, select.newest = max_int(newest, 0);
        select.least = context_level_param(s->live.c, "least");
    }
    return select_pairs(keep, t->score, &select, err) < 0 ? -1 : n;
}

// Takes out what is not chosen, of head h and of what was noted of its pairs.
static int evict_head(Stream *s, int h, FitChoice chosen, char *err) {
    const Context *c = s->live.c;
    float *noted = s->live.noted[h];
    int pairs = live_pairs(&s->live, h), to = 0, n_kv_heads = c->kv->shape.n_kv_heads;
    int layer = kvcache_scored_layer(&c->kv->shape, h / n_kv_heads);
    if (kvcache_evict_head(c->kv, (KVHeadAt){c->seq, layer, h % n_kv_heads},
                           (KVSpan){context_first(c, h), chosen.n}, chosen.keep, err) != 0)
        return -1;
    for (int t = 0; t < pairs; t++)
        if (t >= chosen.n || chosen.keep[t]) noted[to++] = noted[t];
    return 0;
}

// Chooses in each pool, fits all heads to what stays, then evicts.
static int decide(const Contest *t, char *err) {
    const Context *c = t->s->live.c;
    int n = t->s->live.n_heads, competed;
    uint8_t *keep = t->keep;
    for (int h = 0; h < n; h += t->pool, keep += competed)
        if ((competed = choose(t, h, keep, err)) < 0) return -1;
    if (c->fitting && fitting_apply(c->fitting, c, t->choice, err) != 0) return -1;
    for (int h = 0; h < n; h++)
        if (evict_head(t->s, h, t->choice[h], err) != 0) return -1;
    return 0;
}

static int evict(Stream *s, int window, char *err) {
    Contest t = {.s = s, .window = window, .pool = count_places(s, err)};
    size_t n = (size_t)s->live.n_heads, all = 0;
    if (t.pool < 0) return -1;
    for (int h = 0; h < s->live.n_heads; h++) all += (size_t)competing(s, h, window);
    t.choice = malloc((n + 1) * sizeof *t.choice);
    t.keep = malloc(all + 1);
    t.score = malloc((all + 1) * sizeof *t.score);
    int status = 0;
    if (!t.choice || !t.keep || !t.score)
        status = fail(err, "out of memory for choosing among %zu pairs", all);
    if (status == 0) status = decide(&t, err);
    free(t.choice);
    free(t.keep);
    free(t.score);
    return status;
}

// ---- as tokens come ----

static int step(Stream *s, int window, char *err) {
    Context *c = s->live.c;
    size_t bytes = kvcache_bytes(c->kv, c->seq);
    s->peak = bytes > s->peak ? bytes : s->peak;
    s->checked = c->kv->seqs[c->seq].next_pos;
    if (s->live.n_heads == 0) return 0;
    if (live_score(&s->live, err) != 0) return -1;
    return evict(s, window, err);
}

int stream_step(Stream *s, char *err) {
    const Context *c = s->live.c;
    int next_pos = c->kv->seqs[c->seq].next_pos;
    if (next_pos - s->checked < PAGE || next_pos <= context_pos(c))
        return 0;  // nothing competes yet
    return step(s, s->window, err) == 0 ? make_room(s, err) : -1;
}

int stream_after(void *stream, char *err) { return stream_step(stream, err); }

long stream_finish(Stream *s, char *err) {
    long left = 0;
    if (step(s, 0, err) != 0) return -1;
    for (int h = 0; h < s->live.n_heads; h++) left += competing(s, h, 0);
    kvcache_trim(s->live.c->kv);
    return left;
}
