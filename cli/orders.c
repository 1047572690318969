// orders.c: /save, /load, /doc, /undo and /stats of a chat.
//
// A talk is a sequence of the cache and the few ids that it lacks, so that orders exchange
// sequences and compute little. The fact that must stay true: an order that fails leaves the talk
// as it was.
#define _POSIX_C_SOURCE 200809L
#include "cli/orders.h"

#include <stdlib.h>
#include <string.h>

#include "cli/input.h"
#include "cli/memory.h"
#include "cli/output.h"
#include "kvfile.h"
#include "text.h"

static const double DOC_RATIO = 0.3;  // as compress has it

// ---- the talk ----

static void push_all(Ids *to, const int *id, int n) {
    for (int i = 0; i < n; i++)
        if (ids_push(to, id[i]) != 0) die_memory();
}

static void forget_before(Orders *o) {
    if (!o->can_undo) return;
    kvcache_drop(&o->s->kv, o->before.seq);
    talk_free(&o->before);
    o->can_undo = false;
}

void orders_answered(Orders *o, const Reply *r) {
    forget_before(o);
    if (o->s->streams) {
        kvcache_drop(&o->s->kv, o->talk->seq);
    } else {
        o->before = *o->talk;
        o->before.pending = (Ids){0};
        push_all(&o->before.pending, o->talk->pending.id, o->talk->pending.n);
        o->held_before = o->held.n;
        o->can_undo = true;
    }
    int n_read = r->n_fed < r->n_prompt ? r->n_fed : r->n_prompt;
    push_all(&o->held, r->prompt, n_read);
    push_all(&o->held, r->ids.id, r->n_fed - n_read);
    o->questions++;
    o->written += r->ids.n;
}

// The talk goes on from seq, which holds a context of these ids [n].
static void begin_on(Orders *o, int seq, const int *id, int n) {
    forget_before(o);
    kvcache_drop(&o->s->kv, o->talk->seq);
    o->talk->seq = seq, o->talk->n_turns = 0, o->talk->pending.n = 0;
    o->talk->on_context = true;
    o->held.n = 0;
    push_all(&o->held, id, n);
}

// ---- orders: each returns 0, or -1 with err ----

static int order_help(Orders *o, const char *arg, char *err);

// What the cache lacks of the last answer and the beginning of a question are read before, so that
// the next question follows it as it follows a document.
static int order_save(Orders *o, const char *path, char *err) {
    Session *s = o->s;
    KVInfo info = {.fingerprint = s->model.fingerprint, .model = s->model.name, .policy = "chat"};
    Ids ids = {0}, next = {0};
    Reply r = {.seq = kvcache_fork(&s->kv, o->talk->seq, err), .limit = 1};
    int rc = r.seq < 0 ? -1 : talk_ask(o->talk, "a", "", &next, err), n = 0;
    if (rc == 0 && !(n = talk_prefix(o->talk, err))) n = o->talk->pending.n;
    rc = n < 0 ? -1 : rc;
    if (rc == 0 && n > 0) {
        r.prompt = next.id, r.n_prompt = n;
        rc = reply_begin(&r, "", err);
        while (rc == 0 && r.n_fed < n) rc = answer_step(&s->answerer, (Reply *[]){&r}, 1, err) < 0;
    }
    push_all(&ids, o->held.id, o->held.n);
    push_all(&ids, next.id, rc == 0 ? n : 0);
    info.n_ctx = info.n_ids = ids.n, info.ids = ids.id, info.ratio = 1;
    if (rc == 0) rc = newfile_check(path, err);
    if (rc == 0) rc = kvfile_save(&s->kv, r.seq, path, &info, err);
    if (rc == 0) note("[%d tokens saved as %s]\n", ids.n, path);
    if (r.seq >= 0) kvcache_drop(&s->kv, r.seq);
    reply_free(&r);
    ids_free(&ids), ids_free(&next);
    return rc;
}

// Bytes that the talk has, and what /undo may give back.
static double talk_bytes(const Orders *o) {
    const KVCache *kv = &o->s->kv;
    size_t before = o->can_undo ? kvcache_bytes(kv, o->before.seq) : 0;
    return (double)(kvcache_bytes(kv, o->talk->seq) + before);
}

static int order_load(Orders *o, const char *path, char *err) {
    Session *s = o->s;
    KVCache other = {0};
    KVInfo info;
    KVModel model = {model_kv_shape(&s->model), s->model.fingerprint};
    if (kvfile_load(&other, path, &model, s->pool, &info, err) != 0) return -1;
    MemoryNeed need = {.loaded = talk_bytes(o) + 2 * (double)other.file.map_bytes};
    int seq = memory_fits(s, &need, err) != 0 ? -1 : kvcache_take(&s->kv, &other, 0, err);
    if (seq >= 0) {
        begin_on(o, seq, info.ids, info.n_ids);
        note("[%d tokens of %s]\n", info.n_ids, path);
    }
    kvcache_close(&other);
    return seq < 0 ? -1 : 0;
}

// Reads c's context, and evicts what matters least of it.
static int compress(Session *s, Context *c, char *err) {
    bool settling = s->kv.settling;
    size_t n = context_scores(c);
    float *score = allocate(n, sizeof *score);
    uint8_t *keep = allocate(n, 1);
    s->kv.settling = false;
    int rc = context_score(c, c->policy, score, err);
    progress_end(c->progress_arg);
    if (rc == 0 && context_select(c, score, DOC_RATIO, keep, err) < 0) rc = -1;
    if (rc == 0) rc = kvcache_evict(&s->kv, c->seq, c->n_prefix, c->n_ctx, keep, err);
    s->kv.settling = settling;
    if (rc == 0) rc = kvcache_settle(&s->kv, c->seq, err);
    free(score), free(keep);
    return rc;
}

// Whether n tokens fit beside the talk, all of them until they have been scored.
static int doc_fits(const Orders *o, const Context *c, int n, char *err) {
    MemoryNeed need = {.tokens = n,
                       .loaded = talk_bytes(o),
                       .forked = min_int(c->chunk, n),
                       .scores = memory_scores(o->s, c->policy),
                       .whole = true};
    return memory_fits(o->s, &need, err);
}

static int order_doc(Orders *o, const char *path, char *err) {
    Session *s = o->s;
    Buffer text;
    Ids ids = {0};
    char before[32], after[32];
    if (strcmp(path, "-") == 0) return fail(err, "stdin is the talk");
    if (text_read(&text, path, err) != TEXT_FINE) return -1;
    size_t mark = text_mark(text.s, text.n);
    prefix_ids(s, &ids);
    int n_prefix = ids.n, rc = 0;
    if (tokenizer_encode(s->tok, text.s + mark, text.n - mark, 0, &ids) != 0) die_memory();
    free(text.s);
    if (ids.n == n_prefix) rc = fail(err, "nothing to read");
    if (rc == 0) warn_length(s, ids.n);
    if (!s->context.policy) s->context = chosen_method(s);
    Context c = s->context;
    if (rc == 0) rc = doc_fits(o, &c, ids.n, err);
    Progress progress = progress_begin(s);
    c.state = &s->state, c.kv = &s->kv, c.tok = s->tok, c.postfix = repeat_postfix(s);
    c.ids = ids.id, c.n_prefix = n_prefix, c.n_ctx = ids.n - n_prefix;
    c.progress = progress_step, c.progress_arg = &progress;
    c.seq = rc == 0 ? kvcache_new(&s->kv, err) : -1;
    if (c.seq >= 0 && (rc = compress(s, &c, err)) != 0) kvcache_drop(&s->kv, c.seq);
    rc = c.seq < 0 ? -1 : rc;
    if (rc == 0) {
        note("[%d tokens of %s, %s -> %s; the talk begins anew on them]\n", c.n_ctx, path,
             size_text(before, (double)kvcache_full_bytes(&s->kv, c.seq)),
             size_text(after, (double)kvcache_bytes(&s->kv, c.seq)));
        begin_on(o, c.seq, ids.id, ids.n);
    }
    ids_free(&ids);
    return rc;
}

static int order_undo(Orders *o, const char *arg, char *err) {
    (void)arg;
    if (!o->can_undo) return fail(err, "there is no question to take back");
    kvcache_drop(&o->s->kv, o->talk->seq);
    talk_free(o->talk);
    *o->talk = o->before;
    o->held.n = o->held_before;
    o->can_undo = false;
    note("[the last question is taken back]\n");
    return 0;
}

static int order_stats(Orders *o, const char *arg, char *err) {
    (void)arg, (void)err;
    const KVCache *kv = &o->s->kv;
    char now_bytes[32], full[32];
    note("[%ld questions, %ld tokens written; the cache holds %d tokens in %s, whole %s]\n",
         o->questions, o->written, o->held.n,
         size_text(now_bytes, (double)kvcache_bytes(kv, o->talk->seq)),
         size_text(full, (double)kvcache_full_bytes(kv, o->talk->seq)));
    return 0;
}

// ---- the table ----

typedef struct {
    const char *name, *arg;  // arg NULL: it takes none
    bool whole;              // not where pairs are evicted as tokens come
    int (*run)(Orders *o, const char *arg, char *err);
    const char *help;
} Order;

static const Order orders[] = {
    {"/help", NULL, false, order_help, "this text"},
    {"/save", "FILE", false, order_save, "the talk as a saved context, for /load, chat -c and ask"},
    {"/load", "FILE", true, order_load, "the talk goes on from a saved context"},
    {"/doc", "FILE", true, order_doc, "the talk begins anew on a text, compressed to 0.3"},
    {"/stats", NULL, false, order_stats, "questions, tokens, bytes of the cache"},
    {"/undo", NULL, true, order_undo, "takes the last question and its answer back, once"},
};
enum { N_ORDERS = sizeof orders / sizeof *orders };

static int order_help(Orders *o, const char *arg, char *err) {
    (void)o, (void)arg, (void)err;
    for (const Order *r = orders; r < orders + N_ORDERS; r++)
        note("%-6s %-5s %s\n", r->name, r->arg ? r->arg : "", r->help);
    note("a question that begins with a slash has a space before it\n");
    return 0;
}

static int run_order(Orders *o, const char *name, size_t n, const char *arg, char *err) {
    for (const Order *r = orders; r < orders + N_ORDERS; r++) {
        if (strlen(r->name) != n || memcmp(r->name, name, n) != 0) continue;
        if (!r->arg && *arg) return fail(err, "takes nothing behind it");
        if (r->arg && !*arg) return fail(err, "needs a %s", r->arg);
        if (r->whole && wants_stream(o->s->o))
            return fail(err, "not with --ratio or --budget, which evict as tokens come");
        return r->run(o, arg, err);
    }
    return fail(err, "no such order; /help lists them");
}

bool orders_take(Orders *o, const char *line) {
    char err[ERR_LEN];
    size_t n = strcspn(line, " \t"), n_arg;
    if (line[0] != '/') return false;
    const char *rest = stripped(line + n, strlen(line + n), &n_arg);
    char *arg = copy_text(rest, n_arg);
    if (run_order(o, line, n, arg, err) != 0)
        note("%s: %.*s: %s%s%s\n", program, (int)n, line, arg, *arg ? ": " : "", err);
    free(arg);
    return true;
}

void orders_free(Orders *o) {
    forget_before(o);
    ids_free(&o->held);
}
