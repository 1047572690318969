// Answers: a reply gives the same tokens alone, in any company, and read in blocks of any size; it
// ends where its limit, its stop text or a stop token says; and a talk keeps what the cache lacks.
#include "answer.h"

#include "fixture.h"

enum { N = 6, LIMIT = 12 };

typedef struct {
    Fixture *f;
    Answerer a;
    Ids prompt[N];  // of different lengths
} Room;

static bool open_room(Room *room, Fixture *f) {
    *room = (Room){.f = f};
    for (int i = 0; i < N; i++)
        for (int t = 0; t < 2 + 7 * i; t++)
            CHECK(ids_push(&room->prompt[i], (5 + 3 * t * (i + 1)) % f->model.config.vocab_size) ==
                  0);
    return CHECK(answer_open(&room->a, &f->state, &f->kv, f->tok, err) == 0);
}

static void close_room(Room *room) {
    for (int i = 0; i < N; i++) ids_free(&room->prompt[i]);
    answer_close(&room->a);
}

static Reply begin(Room *room, int i, Sampling *how) {
    Reply r = {.seq = kvcache_new(&room->f->kv, err),
               .prompt = room->prompt[i].id,
               .n_prompt = room->prompt[i].n,
               .limit = LIMIT + i,
               .ignore_stop = true,
               .sampling = how};
    CHECK(r.seq >= 0 && reply_begin(&r, "", err) == 0);
    return r;
}

static void finish(Room *room, Reply *const *r, int n) {
    int left;
    while ((left = answer_step(&room->a, r, n, err)) > 0) continue;
    if (!CHECK(left == 0)) printf("%s\n", err);
}

static void end_reply(Room *room, Reply *r) {
    kvcache_drop(&room->f->kv, r->seq);
    reply_free(r);
}

static bool same_answer(const Reply *a, const Reply *b) {
    return a->ids.n == b->ids.n &&
           memcmp(a->ids.id, b->ids.id, (size_t)a->ids.n * sizeof *a->ids.id) == 0 &&
           a->text.n == b->text.n && memcmp(a->text.s, b->text.s, a->text.n) == 0;
}

// One joins at every step and leaves when it is done; max_rows and max_logits make some wait.
static void test_company(Room *room, const Reply *alone, int max_rows, int max_logits) {
    RunState *s = &room->f->state;
    int rows = s->max_rows, logits = s->max_logits, n = 0, left = 1;
    Reply r[N], *all[N];
    s->max_rows = max_rows, s->max_logits = max_logits;
    while (left > 0 || n < N) {
        if (n < N) {
            r[n] = begin(room, n, NULL);
            all[n] = &r[n];
            n++;
        }
        left = answer_step(&room->a, all, n, err);
        if (!CHECK(left >= 0)) break;
    }
    s->max_rows = rows, s->max_logits = logits;
    for (int i = 0; i < N; i++) {
        CHECK(r[i].done && r[i].ids.n == LIMIT + i && same_answer(&r[i], &alone[i]));
        CHECK(r[i].n_fed == r[i].n_prompt + r[i].ids.n - 1);  // the last one is not fed
        end_reply(room, &r[i]);
    }
}

// What is computed for a reply is the same to the bit in company: long prompts, cut where there is
// no room for the next block of all of them. The cache holds what each layer gave to the next.
static void test_bits(Fixture *f, int max_rows) {
    enum { LONG = 600, MANY = 5 };
    static int prompt[MANY][LONG];
    float k[2][MAX_HEAD_DIM], v[2][MAX_HEAD_DIM];
    const KVShape *shape = &f->kv.shape;
    Answerer a;
    Reply r[2][MANY] = {0}, *all[MANY];
    int rows = f->state.max_rows, different = 0;
    f->state.max_rows = max_rows;
    CHECK(answer_open(&a, &f->state, &f->kv, f->tok, err) == 0);
    for (int i = 0; i < MANY; i++) {
        for (int t = 0; t < LONG; t++)
            prompt[i][t] = (7 + 5 * t * (i + 2)) % f->model.config.vocab_size;
        for (int in = 0; in < 2; in++) {
            r[in][i] = (Reply){.seq = kvcache_new(&f->kv, err),
                               .prompt = prompt[i],
                               .n_prompt = LONG - 13 * i,
                               .limit = 6,
                               .ignore_stop = true};
            CHECK(reply_begin(&r[in][i], "", err) == 0);
        }
        all[i] = &r[0][i];
        while (answer_step(&a, all + i, 1, err) > 0) continue;
        all[i] = &r[1][i];
    }
    while (answer_step(&a, all, MANY, err) > 0) continue;
    for (int i = 0; i < MANY; i++) {
        CHECK(r[1][i].done && same_answer(&r[0][i], &r[1][i]));
        for (int h = 0; h < shape->n_layers * shape->n_kv_heads; h++) {
            int l = h / shape->n_kv_heads, g = h % shape->n_kv_heads, d = shape->head_dim;
            for (int t = 0; t < LONG - 13 * i + 5; t++) {
                for (int in = 0; in < 2; in++)
                    kvcache_pair(&f->kv, (KVHeadAt){r[in][i].seq, l, g}, t, k[in], v[in]);
                different += memcmp(k[0], k[1], (size_t)d * sizeof(float)) != 0;
                different += memcmp(v[0], v[1], (size_t)d * sizeof(float)) != 0;
            }
        }
        for (int in = 0; in < 2; in++) kvcache_drop(&f->kv, r[in][i].seq), reply_free(&r[in][i]);
    }
    CHECK(different == 0);
    f->state.max_rows = rows;
    answer_close(&a);
}

// Tokens that are there before the first step are read like a prompt.
static void test_forced(Room *room, const Reply *alone) {
    Reply r = begin(room, 3, NULL);
    for (int i = 0; i < 5; i++) CHECK(reply_take(&room->a, &r, alone->ids.id[i], err) == 0);
    finish(room, (Reply *[]){&r}, 1);
    CHECK(same_answer(&r, alone));
    end_reply(room, &r);
}

// The answer ends right after the stop text, which may lie across tokens but not in the prefix.
static void test_stop(Room *room, const Reply *alone) {
    for (size_t at = 0; at + 3 <= alone->text.n; at++) {
        char stop[4] = {0};
        const char *const stops[] = {"", "not in it", stop, NULL};
        memcpy(stop, alone->text.s + at, 3);
        if (strlen(stop) < 3) continue;
        size_t first = 0;
        while (memcmp(alone->text.s + first, stop, 3) != 0) first++;
        Reply r = begin(room, 3, NULL);
        r.stop = stops;
        CHECK(buffer_add(&r.text, stop, 3) == 0);
        r.n_prefix = 3;
        finish(room, (Reply *[]){&r}, 1);
        CHECK(r.done && r.text.n == 3 + first + 3 && r.text.s[r.text.n] == '\0');
        CHECK(memcmp(r.text.s + 3, alone->text.s, first + 3) == 0);
        end_reply(room, &r);
    }
}

static void test_ends(Room *room) {
    Reply none = begin(room, 1, NULL), empty = begin(room, 1, NULL), r = begin(room, 1, NULL);
    none.limit = 0;
    finish(room, (Reply *[]){&none}, 1);
    CHECK(none.done && none.ids.n == 0 && none.n_fed == none.n_prompt);
    empty.n_prompt = 0;
    CHECK(answer_step(&room->a, (Reply *[]){&empty}, 1, err) == -1);
    CHECK(strstr(err, "empty") != NULL);
    int id = 0, vocab = room->f->model.config.vocab_size;
    while (id < vocab && !tokenizer_is_stop(room->f->tok, id)) id++;
    r.ignore_stop = false;
    CHECK(r.stop_id == -1);
    if (id < vocab) {
        CHECK(reply_take(&room->a, &r, id, err) == 0);
        CHECK(r.done && r.ids.n == 0 && r.stop_id == id);
    }
    end_reply(room, &none), end_reply(room, &empty), end_reply(room, &r);
}

// The same seed draws the same tokens; a share of next to nothing is the likeliest token.
static void test_sampling(Room *room, const Reply *alone) {
    Sampling a = {.temp = 1.5, .top_p = 0.95, .random = 7}, b = a, c = {.temp = 1.5, .top_p = 1e-9};
    Reply x = begin(room, 2, &a), y = begin(room, 2, &b), z = begin(room, 2, &c);
    finish(room, (Reply *[]){&x, &y, &z}, 3);
    CHECK(same_answer(&x, &y));
    CHECK(!same_answer(&x, alone) && same_answer(&z, alone));
    end_reply(room, &x), end_reply(room, &y), end_reply(room, &z);
}

// With every setting at work a reply is the same alone, again, and in company; several answers of
// one prompt begin with the one that it has alone. Penalties see the prompt.
static void test_settings(Room *room) {
    Bias bias[] = {{9, 2}, {11, -3}};
    Sampling base = {.temp = 1.2,
                     .top_p = 0.9,
                     .random = 3,
                     .top_k = 60,
                     .min_p = 0.01,
                     .last_n = 20,
                     .repeat_penalty = 1.2,
                     .frequency_penalty = 0.3,
                     .presence_penalty = 0.2,
                     .bias = bias,
                     .n_bias = 2};
    Reply alone[N], r[N], *all[N];
    Sampling own[N];
    for (int i = 0; i < N; i++) {
        own[i] = sampling_nth(&base, i);
        alone[i] = begin(room, 2, &own[i]);
        finish(room, (Reply *[]){&alone[i]}, 1);
    }
    for (int i = 0; i < N; i++) {
        own[i] = sampling_nth(&base, i);
        r[i] = begin(room, 2, &own[i]);
        all[i] = &r[i];
    }
    finish(room, all, N);
    for (int i = 0; i < N; i++) CHECK(same_answer(&alone[i], &r[i]));
    CHECK(!same_answer(&r[0], &r[1]) && !same_answer(&r[1], &r[2]));
    for (int i = 0; i < N; i++) end_reply(room, &alone[i]), end_reply(room, &r[i]);
    Sampling once = {.last_n = -1, .presence_penalty = 2e9};
    Reply new = begin(room, 5, &once);
    finish(room, (Reply *[]){&new}, 1);
    for (int i = 0; i < new.ids.n; i++) {
        for (int j = 0; j < new.n_prompt; j++) CHECK(new.ids.id[i] != new.prompt[j]);
        for (int j = 0; j < i; j++) CHECK(new.ids.id[i] != new.ids.id[j]);
    }
    end_reply(room, &new);
}

// After a turn the pending ids are those the cache lacks, and the next question begins with them.
static void test_talk(Room *room) {
    Talk t = {.tok = room->f->tok, .raw = true, .on_context = true};
    Ids ids = {0};
    CHECK(talk_ask(&t, "Who?", "It was", &ids, err) == 0 && ids.n > 0);
    Reply r = begin(room, 0, NULL);
    finish(room, (Reply *[]){&r}, 1);
    CHECK(talk_answered(&t, &r, err) == 0);
    CHECK(t.seq == r.seq && t.n_turns == 1);
    CHECK(t.pending.n == 1 && t.pending.id[0] == r.ids.id[r.ids.n - 1]);
    int n = ids.n;
    ids.n = 0;
    CHECK(talk_ask(&t, "Who?", "It was", &ids, err) == 0);
    CHECK(ids.n == n + 1 && ids.id[0] == t.pending.id[0]);
    ids_free(&ids);
    talk_free(&t);
    end_reply(room, &r);
}

// The first question begins with the template's head and the system text, whatever it asks.
static void test_prefix(Room *room) {
    static const char system[] = "Your name is Zorblax. You are a robot.";
    Talk t = {.tok = room->f->tok, .system = system};
    Ids head = {0}, ids = {0};
    CHECK(tokenizer_turn(t.tok, 's', system, true, false, &head) == 0);
    CHECK(talk_ask(&t, "Who are you?", "", &ids, err) == 0);
    int n = talk_prefix(&t, err);
    CHECK(head.n > 10 && n >= head.n && n < ids.n);
    CHECK(memcmp(head.id, ids.id, (size_t)head.n * sizeof *head.id) == 0);
    t.system = NULL;
    CHECK(talk_prefix(&t, err) > 0 && talk_prefix(&t, err) != n);  // a system text of its own
    t.raw = true;
    CHECK(talk_prefix(&t, err) == 0);
    ids_free(&head), ids_free(&ids);
}

int main(int argc, char **argv) {
    Fixture f;
    Room room;
    if (kernels_init(argc > 1 ? argv[1] : NULL) != 0) return 1;
    if (!fixture_open(&f, "smol", "smol.kvz", KV_F32, 2) || !open_room(&room, &f))
        return test_end("test_answer");
    Reply alone[N];
    for (int i = 0; i < N; i++) {
        alone[i] = begin(&room, i, NULL);
        finish(&room, (Reply *[]){&alone[i]}, 1);
        CHECK(alone[i].ids.n == LIMIT + i);
    }
    test_company(&room, alone, MAX_ROWS, 16);
    test_company(&room, alone, 7, 16);
    test_company(&room, alone, 16, 2);
    test_forced(&room, &alone[3]);
    test_stop(&room, &alone[3]);
    test_ends(&room);
    test_sampling(&room, &alone[2]);
    test_settings(&room);
    test_talk(&room);
    test_prefix(&room);
    for (int i = 0; i < N; i++) end_reply(&room, &alone[i]);
    close_room(&room);
    fixture_close(&f);
    for (KVType type = KV_F16; type <= KV_F32; type++) {
        if (!CHECK(fixture_open(&f, "smol", "smol-q8.kvz", type, 2))) break;
        for (int max_rows = 90; max_rows <= 110; max_rows += 4) test_bits(&f, max_rows);
        fixture_close(&f);
    }
    return test_end("test_answer");
}
