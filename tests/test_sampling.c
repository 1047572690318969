// Samplers: each against its definition, written as plainly as it can be, on random logits; what
// they leave is drawn as often as its share says; settings out of range are refused by name.
#include "sampling.h"

#include "test.h"
#include "util.h"

enum { N = 200, PAST = 40 };

static char err[ERR_LEN];
static uint64_t chance = 1;

static double uniform(void) { return (double)(random_next(&chance) >> 11) * 0x1p-53; }

typedef struct {
    float logits[N];
    int past[PAST];
    uint64_t allowed[(N + 63) / 64];
    Bias bias[5];
    Choice scratch[N];
    Draw draw;
} Case;

// Random logits, some of them equal, tokens that came, and a bit for each that may come.
static void make_case(Case *k) {
    for (int i = 0; i < N; i++) k->logits[i] = (float)((int)(uniform() * 80) - 40) / 8;
    for (int i = 0; i < PAST; i++) k->past[i] = (int)(uniform() * 30);
    for (int i = 0; i < (N + 63) / 64; i++) k->allowed[i] = random_next(&chance);
    for (int i = 0; i < 5; i++) k->bias[i] = (Bias){7 * i, (float)(uniform() * 6 - 3)};
    k->draw = (Draw){.logits = k->logits,
                     .n = N,
                     .past = {k->past, k->past + PAST / 4},
                     .n_past = {PAST / 4, PAST - PAST / 4},
                     .scratch = k->scratch};
}

// ---- the definition: a list of (token, share) that each sampler goes over ----

typedef struct {
    double logit[N], p[N];
    bool in[N];
} Naive;

static int rank_of(const Naive *v, int i) {  // how many come before i
    int n = 0;
    for (int j = 0; j < N; j++)
        n += v->in[j] && (v->logit[j] > v->logit[i] || (v->logit[j] == v->logit[i] && j < i));
    return n;
}

static void share(Naive *v, double temp) {
    double most = -1e9, sum = 0;
    for (int i = 0; i < N; i++)
        if (v->in[i] && v->logit[i] > most) most = v->logit[i];
    for (int i = 0; i < N; i++) sum += v->p[i] = v->in[i] ? exp((v->logit[i] - most) / temp) : 0;
    for (int i = 0; i < N; i++) v->p[i] /= sum;
}

static void naive_logits(Naive *v, const Sampling *s, const Case *k) {
    for (int i = 0; i < N; i++) {
        int count = 0, from = s->last_n < 0 || s->last_n > PAST ? 0 : PAST - s->last_n;
        for (int t = from; t < PAST; t++) count += k->past[t] == i;
        v->logit[i] = k->logits[i];
        v->in[i] = !k->draw.allowed || (k->draw.allowed[i / 64] >> (i % 64) & 1);
        for (int b = 0; b < s->n_bias; b++)
            if (s->bias[b].id == i) v->logit[i] += s->bias[b].value;
        if (count == 0) continue;
        double repeat = s->repeat_penalty != 0 ? s->repeat_penalty : 1;
        v->logit[i] = v->logit[i] > 0 ? v->logit[i] / repeat : v->logit[i] * repeat;
        v->logit[i] -= count * s->frequency_penalty + s->presence_penalty;
        v->logit[i] = (float)v->logit[i];
    }
}

static void naive_cuts(Naive *v, const Sampling *s) {
    Naive old = *v;
    for (int i = 0; i < N && s->top_k > 0; i++) v->in[i] = old.in[i] && rank_of(&old, i) < s->top_k;
    share(v, s->temp_last ? 1 : s->temp);
    old = *v;
    for (int i = 0; i < N && s->top_p < 1; i++) {  // in, while those before have less than top_p
        double ahead = 0;
        for (int j = 0; j < N; j++)
            if (old.in[j] && rank_of(&old, j) < rank_of(&old, i)) ahead += old.p[j];
        v->in[i] = old.in[i] && (ahead == 0 || ahead < s->top_p);
    }
    double most = 0;
    for (int i = 0; i < N; i++) most = v->in[i] && v->p[i] > most ? v->p[i] : most;
    for (int i = 0; i < N; i++) v->in[i] = v->in[i] && v->p[i] >= s->min_p * most;
    share(v, s->temp);
}

// What the definition leaves is what can be drawn, as often as it says.
static void test_definition(const Case *k, Sampling s) {
    enum { DRAWS = 4000 };
    static int drawn[N];
    Naive v;
    memset(drawn, 0, sizeof drawn);
    naive_logits(&v, &s, k);
    naive_cuts(&v, &s);
    for (int i = 0; i < DRAWS; i++) {
        int id = sampling_draw(&s, &k->draw);
        if (!CHECK(id >= 0 && id < N && v.in[id])) return;
        drawn[id]++;
    }
    for (int i = 0; i < N; i++) {  // within five standard deviations
        double mean = v.p[i] * DRAWS;
        CHECK_NEAR(drawn[i], mean, 5 * sqrt(mean + 1) + 1);
    }
    s.temp = 0;
    CHECK(rank_of(&v, sampling_draw(&s, &k->draw)) == 0);
}

static void test_each(Case *k) {
    Sampling plain = {.temp = 1.3, .top_p = 1, .random = 5}, s;
    test_definition(k, plain);
    s = plain, s.temp = 0.4;
    test_definition(k, s);
    s = plain, s.top_k = 1 + (int)(uniform() * 20);
    test_definition(k, s);
    s = plain, s.top_p = 0.1 + 0.8 * uniform();
    test_definition(k, s);
    s.temp_last = true;
    test_definition(k, s);
    s = plain, s.min_p = 0.02 + 0.4 * uniform();
    test_definition(k, s);
    s.temp_last = true;
    test_definition(k, s);
    s = plain, s.bias = k->bias, s.n_bias = 5;
    test_definition(k, s);
    s = plain, s.last_n = -1, s.repeat_penalty = 1.5;
    test_definition(k, s);
    s = plain, s.last_n = 17, s.frequency_penalty = 0.7;
    test_definition(k, s);
    s = plain, s.last_n = 35, s.presence_penalty = -1.2;
    test_definition(k, s);
    s.bias = k->bias, s.n_bias = 5, s.frequency_penalty = 0.3, s.repeat_penalty = 0.8;
    s.top_k = 30, s.top_p = 0.8, s.min_p = 0.1, s.temp_last = true;
    test_definition(k, s);
    s.temp_last = false;
    test_definition(k, s);
}

// Zeros, and ranges that cut nothing, change no draw.
static void test_neutral(const Case *k) {
    Sampling plain = {.temp = 0.9, .top_p = 0.95, .random = 11}, s = plain;
    s.top_k = N, s.min_p = 0, s.last_n = -1, s.repeat_penalty = 1;
    for (int i = 0; i < 500; i++)
        CHECK(sampling_draw(&plain, &k->draw) == sampling_draw(&s, &k->draw));
    CHECK(plain.random == s.random);
    Sampling first = sampling_nth(&plain, 0), second = sampling_nth(&plain, 1);
    CHECK(first.random == plain.random && second.random != plain.random);
    CHECK(sampling_nth(&plain, 2).random != second.random);
    CHECK(sampling_is_plain(NULL) && sampling_is_plain(&(Sampling){.top_k = 3}));
    CHECK(sampling_is_plain(&(Sampling){.repeat_penalty = 1, .last_n = 64}));
    CHECK(!sampling_is_plain(&(Sampling){.presence_penalty = 1, .last_n = 64}));
    CHECK(sampling_draw(NULL, &k->draw) == likeliest(k->logits, N));
}

static void test_none(Case *k) {
    Sampling s = {.temp = 1, .top_p = 1};
    for (int i = 0; i < (N + 63) / 64; i++) k->allowed[i] = 0;
    CHECK(sampling_draw(&s, &k->draw) == -1);
    k->allowed[1] = 8;
    CHECK(sampling_draw(&s, &k->draw) == 67);
    for (int i = 0; i < N; i++) k->logits[i] = -INFINITY;
    CHECK(sampling_draw(&s, &k->draw) == 67 && sampling_draw(NULL, &k->draw) == 67);
}

static void test_ranges(void) {
    Bias far = {N, 1}, large = {3, 101};
    const struct {
        const char *name;
        Sampling s;
    } wrong[] = {{"temperature", {.temp = -1}},
                 {"temperature", {.temp = NAN}},
                 {"top_p", {.top_p = 1.1}},
                 {"top_k", {.top_k = -1}},
                 {"min_p", {.min_p = 2}},
                 {"repeat_last_n", {.last_n = -2}},
                 {"repeat_penalty", {.repeat_penalty = -1}},
                 {"frequency_penalty", {.frequency_penalty = 2.5}},
                 {"presence_penalty", {.presence_penalty = -3}},
                 {"logit_bias", {.bias = &far, .n_bias = 1}},
                 {"logit_bias", {.bias = &large, .n_bias = 1}},
                 {"logit_bias", {.bias = &far, .n_bias = MAX_BIASES + 1}}};
    for (size_t i = 0; i < sizeof wrong / sizeof *wrong; i++) {
        CHECK(sampling_check(&wrong[i].s, N, err) == -1);
        CHECK(strncmp(err, wrong[i].name, strlen(wrong[i].name)) == 0);
    }
    CHECK(sampling_check(&(Sampling){.temp = 0.7, .top_p = 0.95}, N, err) == 0);
}

int main(void) {
    static Case k;
    for (int i = 0; i < 4; i++) {
        make_case(&k);
        test_each(&k);
        k.draw.allowed = k.allowed;
        test_each(&k);
    }
    make_case(&k);
    test_neutral(&k);
    k.draw.allowed = k.allowed;
    test_none(&k);
    test_ranges();
    return test_end("test_sampling");
}
