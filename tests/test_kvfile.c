// test_kvfile.c: saved caches: files change no bit, say what they hold, and are refused whole where
// anything is wrong with them.
#include <unistd.h>

#include "kvfile.h"
#include "kvtest.h"

static char file[64];

static void write_file(const char *bytes, long n) {
    FILE *f = fopen(file, "wb");
    fwrite(bytes, 1, (size_t)n, f);
    fclose(f);
}

static char *read_file(const char *path, long *n) {
    FILE *f = fopen(path, "rb");
    fseek(f, 0, SEEK_END);
    *n = ftell(f);
    char *bytes = malloc((size_t)*n);
    rewind(f);
    CHECK(fread(bytes, 1, (size_t)*n, f) == (size_t)*n);
    fclose(f);
    return bytes;
}

// The file holds sequence seq of kv. The map is read-only: appending copies, twice with the same
// result.
static void check_loaded(KVCache *back, KVCache *kv, int seq, const KVInfo *got) {
    int n;
    float *want = snapshot(kv, seq, &n), a[3 * HEADS * D], b[3 * HEADS * D];
    CHECK(got->n_prefix == 10 && got->n_ctx == 200 && got->ratio == 0.5 && got->ids[209] == 627);
    CHECK_STR(got->model, "tiny \"model\"");
    CHECK(back->seqs[0].next_pos == 210 && back->types.k == kv->types.k &&
          back->types.v == kv->types.v && back->type == kv->type);
    CHECK(kvcache_bytes(back, 0) == kvcache_bytes(kv, seq));
    check_same(back, 0, want, n);
    for (int pass = 0; pass < 2; pass++) {
        int mark = kvcache_mark(back, 0, err);
        seed = 5, append_random(back, 0, 3, pass ? b : a);
        CHECK(kvcache_rewind(back, 0, mark, err) == 0);
        kvcache_drop(back, mark);
    }
    CHECK(memcmp(a, b, sizeof a) == 0);
    seed = 5, append_random(kv, seq, 3, b);
    CHECK(memcmp(a, b, sizeof a) == 0);
    check_same(back, 0, want, n);
    free(want);
}

// What info shows of the file: the sums of what the heads hold.
static void check_facts(const KVCache *kv, int seq, const KVInfo *info) {
    TensorFile f;
    CacheFacts c;
    double bytes = 0, kept = 0, pairs = 0;
    CHECK(tensors_open(&f, file, err) == 0 && kvfile_is(&f));
    CHECK(kvfile_facts(&c, &f, err) == 0);
    CHECK_STR(c.info.policy, info->policy);
    CHECK(c.info.n_ids == info->n_ids && c.info.ids[209] == 627 && c.next_pos == 210);
    CHECK(c.n_layers == L && c.n_kv_heads == KV && c.types[PAGE_SETTLED].v == kv->types.v);
    for (int i = 0; i < L * KV; i++) {
        const KVHead *h = kvcache_head(kv, seq, i / KV, i % KV);
        pairs += h->len - h->dropped;
        if (kv->shape.window[i / KV] == 0) kept += h->len - info->n_prefix;
        for (int j = 0; j < h->n_pages && j * PAGE < h->len - h->dropped; j++)
            bytes += (double)kv->store[class_of(kv, h, j)].page_bytes + PAGE * sizeof(int);
    }
    CHECK(c.pairs == pairs && c.kept + c.demoted == kept);
    CHECK(c.n_scored == (kv->shape.window[1] ? 1 : 2) * KV * info->n_ctx);
    CHECK(c.bytes[PAGE_EXACT] + c.bytes[PAGE_SETTLED] + c.bytes[PAGE_DEMOTED] == bytes);
    kvfile_facts_free(&c);
    tensors_close(&f);
}

// A cut file is refused, never half read; nor does a wrong byte crash it, in header or page
// classes.
static void check_damaged(const KVModel *model) {
    KVCache back;
    KVInfo got;
    long size;
    char *bytes = read_file(file, &size);
    for (long cut = 0; cut < size; cut += 1 + size / 50) {
        write_file(bytes, cut);
        CHECK(kvfile_load(&back, file, model, NULL, &got, err) == -1);
    }
    for (long i = 0; i < 700; i++) {
        long at = i < 600 ? 8 + i * 4 : size - 1 - i % 100;
        char was = bytes[at];
        bytes[at] = (char)(was ^ (1 << i % 7));
        write_file(bytes, size);
        bytes[at] = was;
        if (kvfile_load(&back, file, model, NULL, &got, err) == 0) {
            CacheFacts facts;
            CHECK(kvfile_facts(&facts, &back.file, err) == 0);  // which takes what loading takes
            kvfile_facts_free(&facts);
            append_random(&back, 0, 1, NULL);
            kvcache_close(&back);
        }
    }
    free(bytes);
}

static void test_files(KVTypes types) {
    KVCache kv, back;
    KVShape shape = shape_with(one_window), other = shape;
    other.head_dim = 32;
    CHECK(kvcache_open(&kv, &shape, types, NULL, err) == 0);
    int seq = kvcache_new(&kv, err);
    append_random(&kv, seq, 210, NULL);
    uint8_t keep[L * KV * 200];
    for (int i = 0; i < L * KV * 200; i++) keep[i] = rnd() > 0;
    bool codes = types.v > KV_F32;
    CHECK((codes ? kvcache_demote : kvcache_evict)(&kv, seq, 10, 200, keep, err) == 0);
    CHECK(kvcache_settle(&kv, seq, err) == 0);
    int ids[210];
    for (int i = 0; i < 210; i++) ids[i] = i * 3;
    KVInfo got, info = {.fingerprint = "f1f2",
                        .model = "tiny \"model\"",
                        .policy = "kvzip",
                        .n_prefix = 10,
                        .n_ctx = 200,
                        .ratio = 0.5,
                        .ids = ids,
                        .n_ids = 210};
    CHECK(kvfile_save(&kv, seq, file, &info, err) == 0);
    check_facts(&kv, seq, &info);

    KVModel model = {shape, "f1f2"};
    CHECK(kvfile_load(&back, file, &(KVModel){shape, "0000"}, NULL, &got, err) == -1);
    CHECK(strstr(err, "another model") != NULL);
    CHECK(kvfile_load(&back, file, &(KVModel){other, "f1f2"}, NULL, &got, err) == -1);
    CHECK(kvfile_load(&back, "no_such.kvc", &model, NULL, &got, err) == -1);
    if (CHECK(kvfile_load(&back, file, &model, NULL, &got, err) == 0)) {
        check_loaded(&back, &kv, seq, &got);
        kvcache_close(&back);
    }
    check_damaged(&model);
    remove(file);
    kvcache_close(&kv);
}

// What the file's metadata says.
static void check_format(const char *path, const char *want) {
    TensorFile f;
    CHECK(tensors_open(&f, path, err) == 0);
    CHECK_STR(tensors_meta(&f, "format"), want);
    tensors_close(&f);
}

// What is known of a context of n ids, all pairs of which are there.
static KVInfo whole_info(const KVModel *model, const int *ids, int n) {
    return (KVInfo){.fingerprint = model->fingerprint,
                    .model = "tiny",
                    .policy = "kvzip",
                    .n_ctx = n,
                    .ratio = 1,
                    .ids = ids,
                    .n_ids = n};
}

// A file whose 4-bit keys are not mixed, of the second version, loads as it is and is saved again
// byte for byte. What settles beside its pages is mixed; all of that is saved and loaded, too.
static void test_unmixed(void) {
    KVCache kv, back;
    KVShape shape = shape_with(no_window);
    CHECK(kvcache_open(&kv, &shape, kvcache_both(KV_Q4), NULL, err) == 0);
    int seq = kvcache_new(&kv, err), ids[200] = {0}, n;
    kv.settling = false;
    append_random(&kv, seq, 200, NULL);
    kv.types.k = KV_Q8;  // so that no page becomes PAGE_MIXED or PAGE_FIRST
    CHECK(kvcache_settle(&kv, seq, err) == 0);
    kv.types.k = KV_Q4;
    KVModel model = {shape, "f1f2"};
    KVInfo got, info = whole_info(&model, ids, 200);
    float *want = snapshot(&kv, seq, &n);
    CHECK(kvfile_save(&kv, seq, file, &info, err) == 0);
    check_format(file, "kvzip.c cache 2");
    CHECK(kvfile_load(&back, file, &model, NULL, &got, err) == 0);
    const KVHead *h = kvcache_head(&back, 0, 0, 0);
    CHECK(class_of(&back, h, 0) == PAGE_SETTLED && back.pages[h->page[0]].k.type == KV_Q4);
    check_same(&back, 0, want, n);
    check_attention(&back, 0);
    char again[64];
    long bytes[2];
    test_path(again, "test-again.kvc");
    CHECK(kvfile_save(&back, 0, again, &got, err) == 0);
    char *first = read_file(file, &bytes[0]), *second = read_file(again, &bytes[1]);
    CHECK(bytes[0] == bytes[1] && memcmp(first, second, (size_t)bytes[0]) == 0);
    append_random(&back, 0, 100, NULL), append_random(&back, 0, KV_LONG_RUN, NULL);
    CHECK(class_of(&back, h, 1) == PAGE_SETTLED && class_of(&back, h, 2) == PAGE_MIXED);
    check_attention(&back, 0);
    free(want), want = snapshot(&back, 0, &n);
    CHECK(kvfile_save(&back, 0, again, &got, err) == 0);
    check_format(again, "kvzip.c cache 4");
    kvcache_close(&back);
    CHECK(kvfile_load(&back, again, &model, NULL, &got, err) == 0);
    check_same(&back, 0, want, n);
    remove(file), remove(again);
    free(want), free(first), free(second);
    kvcache_close(&back), kvcache_close(&kv);
}

// Classes that are unknown, or that only a full page can have, are refused.
static void test_page_classes(void) {
    char path[64];
    test_path(path, "test-class.kvc");
    KVCache kv, back;
    KVShape shape = shape_with(no_window);
    CHECK(kvcache_open(&kv, &shape, kvcache_both(KV_Q8), NULL, err) == 0);
    int seq = kvcache_new(&kv, err), ids[200] = {0};
    append_random(&kv, seq, 200, NULL);
    CHECK(kvcache_settle(&kv, seq, err) == 0);
    KVModel model = {shape, "f1f2"};
    KVInfo got, info = whole_info(&model, ids, 200);
    CHECK(kvfile_save(&kv, seq, path, &info, err) == 0);
    TensorFile t;
    CHECK(tensors_open(&t, path, err) == 0);
    const Tensor *class = tensors_get(&t, err, "page_class", T_U8, 1, L * KV * 4);
    const uint8_t *c = class->data, want[4] = {PAGE_SETTLED, PAGE_SETTLED, PAGE_EXACT, PAGE_EXACT};
    for (int i = 0; i < L * KV; i++) CHECK(memcmp(c + 4 * i, want, 4) == 0);
    long at = (long)(c - t.map);
    tensors_close(&t);
    const struct {
        int page, class;
        const char *says;
    } wrong[] = {{0, 7, "unknown class 7"}, {0, PAGE_EXACT, "k"}, {0, PAGE_DEMOTED, "k_q"}};
    for (int i = 0; i < 3; i++) {
        CHECK(kvfile_save(&kv, seq, path, &info, err) == 0);
        FILE *f = fopen(path, "r+b");
        fseek(f, at + wrong[i].page, SEEK_SET), fputc(wrong[i].class, f), fclose(f);
        CHECK(kvfile_load(&back, path, &model, NULL, &got, err) == -1);
        CHECK(strstr(err, wrong[i].says) != NULL);
    }
    CHECK(kvfile_save(&kv, seq, path, &info, err) == 0);
    FILE *f = fopen(path, "r+b");  // the right number of settled pages, but not the right ones
    fseek(f, at + 1, SEEK_SET), fputc(PAGE_EXACT, f);
    fseek(f, at + 3, SEEK_SET), fputc(PAGE_SETTLED, f), fclose(f);
    CHECK(kvfile_load(&back, path, &model, NULL, &got, err) == -1);
    CHECK(strstr(err, "not full") != NULL);
    remove(path);
    kvcache_close(&kv);
}

// A cache whose windows are chunks goes on as it would have, across the end of one; chunks go by
// positions, so that a file with fewer pairs than tokens in such a layer is refused.
static void test_chunks(void) {
    KVCache kv, back;
    KVModel model = {shape_with(one_chunk), "f1f2"};
    int ids[130], seq;
    float a[30 * HEADS * D], b[30 * HEADS * D];
    KVInfo got;
    for (int i = 0; i < 130; i++) ids[i] = i;
    KVInfo info = whole_info(&model, ids, 130);
    CHECK(kvcache_open(&kv, &model.shape, kvcache_both(KV_F16), NULL, err) == 0);
    append_random(&kv, seq = kvcache_new(&kv, err), 130, NULL);
    CHECK(kvfile_save(&kv, seq, file, &info, err) == 0);
    if (CHECK(kvfile_load(&back, file, &model, NULL, &got, err) == 0)) {
        seed = 5, append_random(&back, 0, 30, a);
        seed = 5, append_random(&kv, seq, 30, b);
        CHECK(memcmp(a, b, sizeof a) == 0);
        kvcache_close(&back);
    }
    kv.seqs[seq].next_pos++;
    CHECK(kvfile_save(&kv, seq, file, &info, err) == 0);
    CHECK(kvfile_load(&back, file, &model, NULL, &got, err) == -1);
    CHECK(strstr(err, "layer 1: 160 pairs after 161 tokens") != NULL);
    remove(file);
    kvcache_close(&kv);
}

int main(int argc, char **argv) {
    const char *const types[] = {"q8/q4", "f16", "f32", "q8", "q4", "q2", "f16/q8", "q4/f32"};
    kernels_init(argc > 1 ? argv[1] : NULL);
    test_path(file, "test.kvc");
    for (int i = 0; i < (getenv("QUICK") ? 1 : 8); i++) test_files(types_of(types[i]));
    test_unmixed();
    test_page_classes();
    test_chunks();
    return test_end("test_kvfile");
}
