// test_drafts.c: drafts change nothing but the number of steps: neither tokens nor what the cache
// holds, to the bit, whether they are right, wrong or a mixture, alone and in company, in caches
// with sliding windows, across pages, and where pages settle.
#include "answer.h"
#include "drafts.h"

#include "fixture.h"

// ---- guesses ----

static int guess(const int *a, int n_a, const int *b, int n_b, const int *c, int n_c, int *out) {
    return draft_guess(&(DraftText){{a, b, c}, {n_a, n_b, n_c}}, 4, out);
}

static void test_guess(void) {
    const int document[] = {1, 2, 3, 4, 5, 6, 2, 3, 9, 8}, prompt[] = {7, 7}, answer[] = {0, 2, 3};
    int out[4];
    CHECK(guess(document, 10, prompt, 2, answer, 3, out) == 4);  // the last place of the two
    CHECK(out[0] == 9 && out[1] == 8 && out[2] == 7 && out[3] == 7);
    const int longer[] = {0, 1, 2, 3};
    CHECK(guess(document, 10, prompt, 2, longer, 4, out) == 4 && out[0] == 4 && out[1] == 5);
    const int round[] = {5, 6, 5, 6};  // up to the end of what there is
    CHECK(guess(NULL, 0, round, 4, NULL, 0, out) == 2 && out[0] == 5 && out[1] == 6);
    const int across[] = {4, 8, 7};  // a place may lie across two texts
    CHECK(guess(document, 10, prompt, 2, across, 3, out) == 4 && out[0] == 7 && out[1] == 4);
    const int once[] = {20, 21};
    CHECK(guess(document, 10, prompt, 2, once, 2, out) == 0);
    CHECK(guess(NULL, 0, NULL, 0, once, 2, out) == 0 && guess(NULL, 0, once, 1, NULL, 0, out) == 0);
}

// ---- answers ----

enum { LONG = 260, PROMPT = 70 };

static Reply begin(Fixture *f, const int *prompt, int draft, const int *source, int n_source) {
    Reply r = {.seq = kvcache_new(&f->kv, err),
               .prompt = prompt,
               .n_prompt = PROMPT,
               .limit = LONG,
               .ignore_stop = true,
               .source = source,
               .n_source = n_source,
               .draft = draft};
    CHECK(r.seq >= 0 && reply_begin(&r, "", err) == 0);
    return r;
}

// Steps until all are done.
static int write_all(Answerer *a, Reply *const *r, int n) {
    int steps = 1, left;
    while ((left = answer_step(a, r, n, err)) > 0) steps++;
    if (!CHECK(left == 0)) printf("%s\n", err);
    return steps;
}

static bool same_pairs(const Fixture *f, const Reply *a, const Reply *b) {
    const KVShape *shape = &f->kv.shape;
    float k[2][MAX_HEAD_DIM], v[2][MAX_HEAD_DIM];
    size_t bytes = (size_t)shape->head_dim * sizeof(float);
    if (f->kv.seqs[a->seq].next_pos != f->kv.seqs[b->seq].next_pos) return false;
    for (int h = 0; h < shape->n_layers * shape->n_kv_heads; h++) {
        KVHeadAt at[2] = {{a->seq, h / shape->n_kv_heads, h % shape->n_kv_heads}};
        at[1] = at[0], at[1].seq = b->seq;
        const KVHead *x = kvcache_head(&f->kv, a->seq, at[0].layer, at[0].g);
        const KVHead *y = kvcache_head(&f->kv, b->seq, at[0].layer, at[0].g);
        if (x->len != y->len || x->dropped != y->dropped) return false;
        for (int t = x->dropped; t < x->len; t++) {
            for (int i = 0; i < 2; i++) kvcache_pair(&f->kv, at[i], t, k[i], v[i]);
            if (memcmp(k[0], k[1], bytes) != 0 || memcmp(v[0], v[1], bytes) != 0) return false;
        }
    }
    return true;
}

static void end_reply(Fixture *f, Reply *r) {
    kvcache_drop(&f->kv, r->seq);
    reply_free(r);
}

// Drafts out of the answer itself, every `wrong`-th token of it another one; 0: none.
static void test_source(Fixture *f, Answerer *a, const Reply *plain, int steps, int draft,
                        int wrong) {
    int source[PROMPT + LONG], vocab = f->model.config.vocab_size;
    memcpy(source, plain->prompt, PROMPT * sizeof *source);
    for (int i = 0; i < LONG; i++) {
        bool other = wrong > 0 && i % wrong == wrong - 1;
        source[PROMPT + i] = (plain->ids.id[i] + other) % vocab;
    }
    Reply r = begin(f, plain->prompt, draft, source, PROMPT + LONG);
    int n = write_all(a, (Reply *[]){&r}, 1);
    CHECK(r.ids.n == LONG && memcmp(r.ids.id, plain->ids.id, LONG * sizeof(int)) == 0);
    CHECK(r.n_fed == plain->n_fed && r.text.n == plain->text.n && same_pairs(f, &r, plain));
    CHECK(n == steps - r.n_accepted && r.n_accepted <= r.n_drafted);
    if (wrong == 0 && draft > 2) CHECK(r.n_accepted > LONG / 2);
    end_reply(f, &r);
}

static void test_company(Fixture *f, Answerer *a, const Reply *plain) {
    Reply r[3], *all[3] = {&r[0], &r[1], &r[2]};
    for (int i = 0; i < 3; i++) r[i] = begin(f, plain->prompt, 3 * i, plain->ids.id, LONG);
    r[1].limit = LONG / 2;
    write_all(a, all, 3);
    for (int i = 0; i < 3; i++) {
        CHECK(memcmp(r[i].ids.id, plain->ids.id, (size_t)r[i].ids.n * sizeof(int)) == 0);
        CHECK(r[i].ids.n == r[i].limit && r[i].n_fed == PROMPT + r[i].limit - 1);
        end_reply(f, &r[i]);
    }
}

// The answer ends within a draft.
static void test_stop(Fixture *f, Answerer *a, const Reply *plain) {
    char stop[8] = {0};
    const char *const stops[] = {stop, NULL};
    memcpy(stop, plain->text.s + plain->text.n / 2, 4);
    Reply r[2] = {begin(f, plain->prompt, 0, NULL, 0),
                  begin(f, plain->prompt, 7, plain->ids.id, LONG)};
    for (int i = 0; i < 2; i++) {
        r[i].stop = stops;
        write_all(a, (Reply *[]){&r[i]}, 1);
    }
    CHECK(r[0].ids.n == r[1].ids.n && r[0].text.n == r[1].text.n && r[0].n_fed == r[1].n_fed);
    CHECK(same_pairs(f, &r[0], &r[1]) && r[1].n_accepted > 0);
    end_reply(f, &r[0]), end_reply(f, &r[1]);
}

static void test_model(const char *family, const char *file, KVType type) {
    Fixture f;
    Answerer a;
    int prompt[PROMPT];
    if (!CHECK(fixture_open(&f, family, file, type, 2))) return;
    f.state.max_logits = min_int(f.state.max_logits, 16);
    CHECK(answer_open(&a, &f.state, &f.kv, f.tok, err) == 0);
    for (int t = 0; t < PROMPT; t++) prompt[t] = (11 + 7 * t * t) % f.model.config.vocab_size;
    Reply plain = begin(&f, prompt, 0, NULL, 0);
    int steps = write_all(&a, (Reply *[]){&plain}, 1);
    for (int draft = 1; draft <= DRAFT_MOST; draft += 2)
        for (int wrong = 0; wrong <= 3; wrong++)
            if (wrong != 1) test_source(&f, &a, &plain, steps, draft, wrong);
    test_company(&f, &a, &plain);
    test_stop(&f, &a, &plain);
    end_reply(&f, &plain);
    answer_close(&a);
    fixture_close(&f);
}

int main(int argc, char **argv) {
    if (kernels_init(argc > 1 ? argv[1] : NULL) != 0) return 1;
    test_guess();
    test_model("smol", "smol-q8.kvz", KV_F16);
    test_model("smol", "smol-q8.kvz", KV_Q8);
    if (!getenv("QUICK")) {
        test_model("smol", "smol.kvz", KV_F32);
        test_model("gemma3", "gemma3.kvz", KV_F16);
        test_model("llama", "llama.kvz", KV_F16);
        test_model("mistral", "mistral.kvz", KV_F32);
        test_model("smol", "smol.kvz", KV_Q4);
        test_model("gemma3", "gemma3.kvz", KV_Q2);
    }
    return test_end("test_drafts");
}
