// inspect.c: logits, tokenize and info: what a model computes and what files hold.
#define _XOPEN_SOURCE 700
#include <ctype.h>
#include <limits.h>
#include <math.h>
#include <stddef.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

#include "cli/commands.h"
#include "cli/input.h"
#include "cli/memory.h"
#include "cli/output.h"
#include "cli/session.h"
#include "eval/results.h"
#include "json.h"
#include "kvfile.h"

// ---- logits and tokenize ----

// Declares the file and fills it block by block: memory does not grow with the number of tokens.
static int write_logits(Session *s, TensorWriter *w, const Ids *ids, int seq, char *err) {
    size_t vocab = s->model.config.vocab_size;
    Row rows[MAX_ROWS];
    if (tensors_write_begin(w, s->o->out, err) != 0 ||
        tensors_write_meta(w, "format", "kvzip.c logits 1", err) != 0 ||
        tensors_write_meta(w, "fingerprint", s->model.fingerprint, err) != 0 ||
        tensors_write_declare(w, "logits", T_F32, 2, (size_t[]){ids->n, vocab}, err) != 0 ||
        tensors_write_declare(w, "ids", T_I32, 1, (size_t[]){ids->n}, err) != 0)
        return -1;
    Progress p = progress_begin(s);
    int rc = 0;
    for (int done = 0; done < ids->n && rc == 0; done += s->state.max_logits) {
        int n = ids->n - done < s->state.max_logits ? ids->n - done : s->state.max_logits;
        for (int i = 0; i < n; i++) rows[i] = (Row){seq, ids->id[done + i], true};
        if (forward(&s->state, &s->kv, rows, n, err) != 0) {
            tensors_write_abort(w);
            die_failed(err);
        }
        rc = tensors_write_put(w, s->state.logits, n * vocab * sizeof(float), err);
        if (progress_step(&p, "logits", done + n, ids->n) != 0) rc = fail(err, "interrupted");
    }
    progress_end(&p);
    if (rc != 0 || tensors_write_put(w, ids->id, ids->n * sizeof(int32_t), err) != 0) return -1;
    return tensors_write_commit(w, err);
}

int cmd_logits(const Options *o) {
    enum { BLOCK = 64 };  // rows of logits in memory
    Session s;
    Ids ids = {0};
    TensorWriter w = {0};
    char err[ERR_LEN];
    check_output(o);
    Buffer text = read_text(o, piped_input());
    catch_signals();
    open_session(&s, o, o->cache, BLOCK);
    input_ids(&s, &text, o->cache ? 0 : TOK_BOS, &ids);
    if (ids.n == 0) die("no tokens given");
    show_prompt(&s, "prompt", ids.id, ids.n);
    memory_check(&s, &(MemoryNeed){.tokens = ids.n, .loaded = (double)s.kv.file.map_bytes});
    int seq = o->cache ? 0 : new_sequence(&s);
    warn_length(&s, (long)s.kv.seqs[seq].next_pos + ids.n);
    if (write_logits(&s, &w, &ids, seq, err) != 0) {
        tensors_write_abort(&w);
        die_file(o->out, err);
    }
    free(text.s);
    ids_free(&ids);
    close_session(&s);
    return 0;
}

int cmd_tokenize(const Options *o) {
    char err[ERR_LEN];
    TensorFile file;
    Ids ids = {0};
    if (o->ids && !o->decode) die_usage(o->command, "--ids goes with --decode");
    Buffer text = read_text(o, "-");
    if (tensors_open(&file, o->args[0], err) != 0) die("%s: %s", o->args[0], err);
    Tokenizer *tok =
        tokenizer_open(&file, err);  // all that is needed of a model: its tokenizer alone will do
    if (!tok) die("%s: %s", o->args[0], err);
    if (o->decode) {
        const char *from = o->ids ? o->ids : o->file ? o->file : "the ids";
        parse_ids(&text, from, tokenizer_n_vocab(tok), &ids);
        size_t n;
        char *bytes = tokenizer_decode(tok, ids.id, ids.n, &n);
        if (!bytes) die_memory();
        if (isatty(STDOUT_FILENO))
            out_text(bytes, n);
        else
            out_bytes(bytes, n);
        free(bytes);
    } else {
        encode(tok, text.s, text.n, (o->special ? TOK_SPECIAL : 0) | (o->bos ? TOK_BOS : 0), &ids);
        if (o->json) json_print(stdout, "{'ids': [");
        for (int i = 0; i < ids.n; i++) out("%s%d", i == 0 ? "" : o->json ? ", " : " ", ids.id[i]);
        out_bytes(o->json ? "]}\n" : "\n", o->json ? 3 : 1);
    }
    free(text.s);
    ids_free(&ids);
    tokenizer_close(tok);
    tensors_close(&file);
    return 0;
}

// ---- info ----

// One fact about a file: a line of text or a field of a JSON object.
typedef struct {
    const char *key, *text;  // text NULL: a number
    double number;
    bool bytes;
} Fact;

static void print_facts(const Options *o, const Fact *f, int n) {
    char size[32];
    for (int i = 0; i < n; i++) {
        if (o->json)
            json_print(stdout, i ? ", %s: " : "{%s: ", f[i].key);
        else
            out("%-18s ", f[i].key);
        if (o->json && f[i].text)
            json_print(stdout, "%s", f[i].text);
        else if (f[i].text)
            out("%s", f[i].text);
        else if (o->json)
            json_print(stdout, "%g", f[i].number);
        else if (f[i].bytes)
            out("%s", size_text(size, f[i].number));
        else
            out("%.6g", f[i].number);
        if (!o->json) out_bytes("\n", 1);
    }
}

enum { EMBEDDING, ATTENTION, FFN, HEAD, TOKENIZER, OTHER, PARTS };

// Which part of the model a tensor belongs to.
static int part_of(const char *name) {
    if (strncmp(name, "tok_embed", 9) == 0 || strncmp(name, "embed_table", 11) == 0)
        return EMBEDDING;
    if (strncmp(name, "wcls", 4) == 0) return HEAD;
    if (strncmp(name, "tok.", 4) == 0) return TOKENIZER;
    if (strncmp(name, "layers.", 7) != 0) return OTHER;
    name += 7 + strspn(name + 7, "0123456789");
    if (strncmp(name, ".experts", 8) == 0 || strncmp(name, ".shared", 7) == 0 ||
        strncmp(name, ".router", 7) == 0)
        return FFN;
    if (strncmp(name, ".w", 2) != 0) return OTHER;
    return isdigit((unsigned char)name[2]) ? FFN : ATTENTION;
}

// Layers whose window is from lo to hi.
static int count_layers(const Config *c, int lo, int hi) {
    int n = 0;
    for (int l = 0; l < c->n_layers; l++) n += c->window[l] >= lo && c->window[l] <= hi;
    return n;
}

// "q8 x 210, f32 x 1": the types of the matrices.
static void types_text(const Model *m, char *text, size_t room) {
    static const char *const names[W_TYPES] = {"f32", "f16", "bf16", "q8", "q4"};
    int count[W_TYPES] = {0};
    count[m->tok_embed.type]++;
    if (m->embed_table.data) count[m->embed_table.type]++;
    if (m->wcls.data != m->tok_embed.data) count[m->wcls.type]++;
    for (int l = 0; l < m->config.n_layers; l++) {
        const Matrix *all[LAYER_MATRICES];
        int n = layer_matrices(&m->layers[l], all);
        for (int i = 0; i < n; i++) count[all[i]->type]++;
    }
    text[0] = '\0';
    for (int t = 0; t < W_TYPES; t++) {
        size_t n = strlen(text);
        if (count[t]) snprintf(text + n, room - n, "%s%s x %d", n ? ", " : "", names[t], count[t]);
    }
}

// How much slower the slowest angle of a table turns than theta alone has it: 1 without scaling.
static double rope_scaling(const float *inv_freq, int dim, double theta) {
    double most = 1;
    for (int i = 0; i < dim / 2 && inv_freq[i] > 0; i++)
        most = fmax(most, pow(theta, -2.0 * i / dim) / inv_freq[i]);
    return most;
}

// "6.28 to 5.4e+04 tokens, 30 layers": how far the angles of each table reach, and in how many
// layers; then what scaling did to them.
static void rope_text(const Config *c, double theta, char *text, size_t room) {
    size_t n = 0;
    text[0] = '\0';
    for (int r = -1; r < c->n_ropes && c->rope_size > 0 && n + 1 < room; r++) {
        int layers = 0;
        for (int l = 0; l < c->n_layers; l++) layers += c->rope[l] == r;
        if (layers == 0) continue;
        const char *gap = n ? "; " : "";
        if (r < 0) {
            n += (size_t)snprintf(text + n, room - n, "%snone, %d layers", gap, layers);
            continue;
        }
        const float *inv_freq = c->inv_freq + (size_t)r * (c->rope_size / 2);
        int dim = c->rope_dims ? c->rope_dims[r] : c->rotary_dim, turning = 0;
        while (turning < dim / 2 && inv_freq[turning] > 0) turning++;
        if (turning == 0) continue;
        double scaling = rope_scaling(inv_freq, dim, theta);
        n += (size_t)snprintf(text + n, room - n, "%s%.3g to %.3g tokens, %d layers", gap,
                              2 * M_PI / inv_freq[0], 2 * M_PI / inv_freq[turning - 1], layers);
        if (scaling > 1.001 && n + 1 < room)
            n += (size_t)snprintf(text + n, room - n, ", scaled by up to %.3g", scaling);
        if (c->rope_mscale[r] != 1 && n + 1 < room)
            n += (size_t)snprintf(text + n, room - n, ", times %.4g", (double)c->rope_mscale[r]);
    }
}

// A fact that is a list of tokens: their ids and texts.
static void print_tokens(const Options *o, const char *key, const Tokenizer *tok, const Ids *ids) {
    if (o->json)
        json_print(stdout, ", %s: [", key);
    else
        out("%-18s ", key);
    for (int i = 0; i < ids->n; i++) {
        int n;
        const char *piece = tokenizer_piece(tok, ids->id[i], &n);
        if (o->json)
            json_print(stdout, i ? ", {'id': %d, 'text': %.*s}" : "{'id': %d, 'text': %.*s}",
                       ids->id[i], n, piece);
        else
            out("%s%d %.*s", i ? ", " : "", ids->id[i], n, piece);
    }
    out(o->json ? "]" : ids->n == 0 ? "none\n" : "\n");
}

// What the model's tokenizer puts in front of a text, what begins one, and what ends an answer.
static void info_tokens(const Options *o, const Tokenizer *tok, const char *bos_id) {
    Ids bos = {0}, front = {0}, stop = {0};
    if (bos_id && *bos_id != '-' && ids_push(&bos, atoi(bos_id)) != 0) die_memory();
    encode(tok, "", 0, TOK_BOS, &front);
    for (int id = 0; id < tokenizer_n_vocab(tok); id++)
        if (tokenizer_is_stop(tok, id) && ids_push(&stop, id) != 0) die_memory();
    print_tokens(o, "bos", tok, &bos);
    print_tokens(o, "in_front", tok, &front);
    print_tokens(o, "stop", tok, &stop);
    ids_free(&bos);
    ids_free(&front);
    ids_free(&stop);
}

// The metadata whose keys begin with `start`, as they stand: how text is cut and chats are written.
static void print_meta(const Options *o, const TensorFile *f, const char *start) {
    for (int i = 0; i < f->n_meta; i++) {
        const Meta *m = &f->meta[i];
        if (strncmp(m->key, start, strlen(start)) != 0) continue;
        if (o->json)
            json_print(stdout, ", %s: %s", m->key, m->value);
        else
            out("%-30s %s\n", m->key, m->value);
    }
}

// Where a profile has them from.
static const char *layer_shares(const TensorFile *f) {
    const char *by = tensors_meta(f, PROFILE_LAYER_SHARES);
    if (!tensors_find(f, "profile.share")) return "no profile";
    return by ? by : "KVzip's";
}

// Whether requests may have tools.
static const char *tools_of(const ChatTemplate *c) {
    return c->tools.present ? "yes" : c->tools.refused[0] ? c->tools.refused : "none";
}

static void info_model(const Options *o) {
    Session s;
    RunState state;
    char err[ERR_LEN], types[128], rope[256];
    size_t part[PARTS] = {0};
    kernels_init(NULL);  // which says how pages are packed
    open_model(&s, o);
    for (int i = 0; i < s.model.file.n_tensors; i++)
        part[part_of(s.model.file.tensors[i].name)] += s.model.file.tensors[i].bytes;
    if (state_open(&state, &s.model, NULL, MAX_ROWS, 1, err) != 0) die("%s", err);
    types_text(&s.model, types, sizeof types);
    const Config *c = &s.model.config;
    const TensorFile *file = &s.model.file;
    const char *theta = tensors_meta(file, "rope_theta");
    rope_text(c, theta ? strtod(theta, NULL) : 0, rope, sizeof rope);
    KVShape k = model_kv_shape(&s.model);
    const Fact facts[] = {
        {"model", s.model.name, 0, false},
        {"fingerprint", s.model.fingerprint, 0, false},
        {"layers", NULL, c->n_layers, false},
        {"sliding_layers", NULL, count_layers(c, 1, MAX_PAIRS), false},
        {"state_layers", NULL, count_layers(c, NO_PAIRS, NO_PAIRS), false},
        {"heads", NULL, c->n_heads, false},
        {"kv_heads", NULL, c->n_kv_heads, false},
        {"head_dim", NULL, c->head_dim, false},
        {"dim", NULL, c->dim, false},
        {"hidden_dim", NULL, c->hidden_dim, false},
        {"experts", NULL, c->n_experts, false},
        {"experts_used", NULL, c->n_used, false},
        {"vocab_size", NULL, c->vocab_size, false},
        {"seq_len", NULL, c->seq_len, false},
        {"rope_theta", theta ? theta : "", 0, false},
        {"rope", rope, 0, false},
        {"matrices", types, 0, false},
        {"embedding", NULL, part[EMBEDDING], true},
        {"attention", NULL, part[ATTENTION], true},
        {"ffn", NULL, part[FFN], true},
        {"head", NULL, part[HEAD], true},
        {"tokenizer", NULL, part[TOKENIZER], true},
        {"other", NULL, part[OTHER], true},
        {"file", NULL, s.model.file.map_bytes, true},
        {"cache_token_f16", NULL, kvcache_token_bytes(&k, kvcache_both(KV_F16)), true},
        {"cache_token_f32", NULL, kvcache_token_bytes(&k, kvcache_both(KV_F32)), true},
        {"cache_token_q8", NULL, kvcache_token_bytes(&k, kvcache_both(KV_Q8)), true},
        {"cache_token_q4", NULL, kvcache_token_bytes(&k, kvcache_both(KV_Q4)), true},
        {"cache_token_read", NULL, kvcache_read_bytes(&k), true},
        {"cache_windows_f16", NULL, kvcache_window_bytes(&k, kvcache_both(KV_F16)), true},
        {"cache_windows_f32", NULL, kvcache_window_bytes(&k, kvcache_both(KV_F32)), true},
        {"cache_states", NULL, kvcache_state_bytes(&k), true},
        {"scratch", NULL, state.bytes, true},
        {"layer_shares", layer_shares(&s.model.file), 0, false},
        {"tools", tools_of(tokenizer_chat(s.tok)), 0, false},
    };
    print_facts(o, facts, sizeof facts / sizeof *facts);
    info_tokens(o, s.tok, tensors_meta(file, "tokenizer.bos_id"));
    print_meta(o, file, "tokenizer.");
    print_meta(o, file, "chat.");
    print_meta(o, file, "kvzip.");
    out(o->json ? "}\n"
                : "memory for n tokens: file (mapped, shared) + n x cache_token + cache_windows "
                  "+ cache_states + scratch;\nreading them takes n x cache_token_read more, except "
                  "into an f32 "
                  "cache\n");
    state_close(&state);
    close_session(&s);
}

static void print_heads(const Options *o, const CacheFacts *c) {
    out(o->json ? ", \"kept_pairs\": [" : "kept pairs of the context, per layer and head\n");
    for (int l = 0; l < c->n_layers; l++) {
        out(o->json ? "%s[" : "%s%5d ", o->json && l ? ", " : "", l);
        for (int g = 0; g < c->n_kv_heads; g++)
            out(o->json ? "%s%d" : "%s %6d", o->json && g ? ", " : "",
                c->kept_pairs[l * c->n_kv_heads + g]);
        out(o->json ? "]" : "\n");
    }
    if (o->json) out("]}\n");
}

static void info_cache(const Options *o, const TensorFile *f) {
    CacheFacts c;
    char err[ERR_LEN], settled[KV_NAME];
    if (kvfile_facts(&c, f, err) != 0) die("%s: %s", f->path, err);
    const double *bytes = c.bytes;
    const Fact facts[] = {
        {"cache_of", c.info.model, 0, false},
        {"fingerprint", c.info.fingerprint, 0, false},
        {"policy", c.info.policy, 0, false},
        {"level", c.info.level ? c.info.level : "not known", 0, false},
        {"profile", c.info.profile ? c.info.profile : "none", 0, false},
        {"set", c.info.set ? c.info.set : "none", 0, false},
        {"budget", c.info.budget ? c.info.budget : "none", 0, false},
        {"fit", c.info.fit ? c.info.fit : "none", 0, false},
        {"documents", c.info.documents ? c.info.documents : "one", 0, false},
        {"ratio", NULL, c.info.ratio, false},
        {"kept", NULL, c.n_scored > 0 ? c.kept / c.n_scored : 1, false},
        {"demoted", NULL, c.n_scored > 0 ? c.demoted / c.n_scored : 0, false},
        {"n_prefix", NULL, c.info.n_prefix, false},
        {"n_ctx", NULL, c.info.n_ctx, false},
        {"next_pos", NULL, c.next_pos, false},
        {"type", c.types[PAGE_EXACT].k == KV_F32 ? "F32" : "F16", 0, false},
        {"kv", kvcache_types_name(c.types[PAGE_SETTLED], settled), 0, false},
        {"pairs", NULL, c.pairs, false},
        {"full_pairs", NULL, c.full_pairs, false},
        {"new_bytes", NULL, bytes[PAGE_EXACT], true},
        {"settled_bytes", NULL, bytes[PAGE_SETTLED], true},
        {"demoted_bytes", NULL, bytes[PAGE_DEMOTED], true},
        {"bytes", NULL, bytes[PAGE_EXACT] + bytes[PAGE_SETTLED] + bytes[PAGE_DEMOTED], true},
        {"full_bytes", NULL, c.full_bytes, true},
        {"state_bytes", NULL, c.state_bytes, true},
        {"file", NULL, f->map_bytes, true},
    };
    print_facts(o, facts, sizeof facts / sizeof *facts);
    print_heads(o, &c);
    kvfile_facts_free(&c);
}

static void info_profile(const Options *o, const TensorFile *f) {
    char err[ERR_LEN];
    const Tensor *share = tensors_get(f, err, "profile.share", T_F32, 3, -1, -1, -1);
    const Tensor *probe = share ? tensors_get(f, err, "profile.probe", T_F32, 3, -1, -1, -1) : NULL;
    if (!probe) die("%s: %s", f->path, err);
    const char *model = tensors_meta(f, "model"), *print = tensors_meta(f, "fingerprint");
    const Fact facts[] = {
        {"profile_of", model ? model : "", 0, false},
        {"fingerprint", print ? print : "", 0, false},
        {"ratios", NULL, (double)share->shape[0], false},
        {"layers", NULL, (double)share->shape[1], false},
        {"kv_heads", NULL, (double)share->shape[2], false},
        {"features", NULL, (double)probe->shape[2], false},
        {"layer_shares", layer_shares(f), 0, false},
        {"file", NULL, (double)f->map_bytes, true},
    };
    print_facts(o, facts, sizeof facts / sizeof *facts);
    if (o->json) out("}\n");
}

// The different names that the cells have at `at`, a member of EvalCell: "kvzip, snapkv".
static void add_names(Buffer *names, const EvalResults *r, size_t at) {
    add_text(names, "", 0);
    for (int i = 0; i < r->n; i++) {
        const char *name = *(const char *const *)((const char *)&r->cell[i] + at);
        int j = 0;
        while (strcmp(name, *(const char *const *)((const char *)&r->cell[j] + at)) != 0) j++;
        if (j < i || name[0] == '\0') continue;
        if (names->n > 0) add_text(names, ", ", 2);
        add_text(names, name, strlen(name));
    }
}

static void info_results(const Options *o) {
    enum { NAMES = 5 };
    static const size_t at[NAMES] = {offsetof(EvalCell, task), offsetof(EvalCell, metric),
                                     offsetof(EvalCell, policy), offsetof(EvalCell, level),
                                     offsetof(EvalCell, kv)};
    EvalResults r = {0};
    Buffer names[NAMES] = {{0}};
    char err[ERR_LEN];
    if (eval_results_read(&r, o->args[0], err) != 0) die("%s: %s", o->args[0], err);
    for (int i = 0; i < NAMES; i++) add_names(&names[i], &r, at[i]);
    const Fact facts[] = {
        {"results_of", r.settings ? r.settings : "", 0, false},
        {"tasks", names[0].s, 0, false},
        {"metrics", names[1].s, 0, false},
        {"policies", names[2].s, 0, false},
        {"levels", names[3].s, 0, false},
        {"kv", names[4].s, 0, false},
        {"cells", NULL, r.n, false},
    };
    print_facts(o, facts, sizeof facts / sizeof *facts);
    if (o->json) out("}\n");
    for (int i = 0; i < NAMES; i++) free(names[i].s);
    eval_results_close(&r);
}

// Whether a file begins as those of results do.
static bool is_results(const char *path) {
    static const char start[] = "{\"settings\":";
    char head[sizeof start] = "";
    FILE *f = fopen(path, "rb");
    if (!f) return false;
    size_t n = fread(head, 1, sizeof start - 1, f);
    fclose(f);
    return n == sizeof start - 1 && strcmp(head, start) == 0;
}

static void info_tensors(const Options *o, const TensorFile *f) {
    char size[32];
    for (int i = 0; i < f->n_meta && !o->json; i++)
        out("%-32s %s\n", f->meta[i].key, f->meta[i].value);
    if (o->json) out("{\"metadata\": {");
    for (int i = 0; i < f->n_meta && o->json; i++)
        json_print(stdout, i ? ", %s: %s" : "%s: %s", f->meta[i].key, f->meta[i].value);
    if (o->json) out("}, \"tensors\": [");
    for (int i = 0; i < f->n_tensors; i++) {
        const Tensor *t = &f->tensors[i];
        if (o->json)
            json_print(stdout,
                       i ? ", {'name': %s, 'dtype': %s, 'shape': ["
                         : "{'name': %s, 'dtype': %s, 'shape': [",
                       t->name, dtype_name(t->dtype));
        else
            out("%-32s %-4s [", t->name, dtype_name(t->dtype));
        for (int d = 0; d < t->n_dims; d++) out("%s%zu", d ? ", " : "", t->shape[d]);
        if (o->json)
            json_print(stdout, "], 'bytes': %zu}", t->bytes);
        else
            out("] %s\n", size_text(size, t->bytes));
    }
    if (o->json) out("]}\n");
}

int cmd_info(const Options *o) {
    TensorFile f;
    char err[ERR_LEN];
    if (tensors_open(&f, o->args[0], err) != 0) {
        if (!is_results(o->args[0])) die("%s: %s", o->args[0], err);
        info_results(o);
        return 0;
    }
    const char *format = tensors_meta(&f, "format");
    if (format && strcmp(format, "kvzip.c model 1") == 0)
        info_model(o);
    else if (kvfile_is(&f))
        info_cache(o, &f);
    else if (format && strcmp(format, "kvzip.c profile 1") == 0)
        info_profile(o, &f);
    else
        info_tensors(o, &f);
    tensors_close(&f);
    return 0;
}
