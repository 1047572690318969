// tokenizer.c: text to token ids and back.
//
// Encoding walks through a text once and cuts it finer at each step:
//   added tokens ("<|im_end|>", runs of newlines) are found first, the longest from the left;
//   what lies between them is a stretch: brought to NFC, or given a leading space, where the model
//     wants that;
//   a byte-level model cuts a stretch into pieces (pretokenize.c), and each piece is merged into
//     tokens (bpe.c).
//
// A Tokenizer never changes after opening; what a call needs lives in its Encoder.
#include "tokenizer.h"

#include <limits.h>

#include "vocabulary.h"

// ---- lists that grow ----

int ids_push(Ids *ids, int id) {
    if (ids->n == ids->cap) {
        int cap = ids->cap < 64 ? 64 : ids->cap > INT_MAX / 2 ? INT_MAX : 2 * ids->cap;
        int *grown = ids->n < cap ? realloc(ids->id, (size_t)cap * sizeof *grown) : NULL;
        if (grown == NULL) return -1;
        ids->id = grown;
        ids->cap = cap;
    }
    ids->id[ids->n++] = id;
    return 0;
}

void ids_free(Ids *ids) {
    free(ids->id);
    *ids = (Ids){0};
}

// ---- stretches ----

static bool begins_with_space(const uint8_t *p, size_t n) {
    return *p == ' ' || (n >= 3 && memcmp(p, "\xe2\x96\x81", 3) == 0);
}

// Encodes p[n], in which no added token is left. begins: it is the first of the text.
// spaced: a leading space is due, since it comes first or behind an added token.
static int encode_stretch(Encoder *e, const uint8_t *p, size_t n, bool begins, bool spaced) {
    const Tokenizer *t = e->t;
    if (n == 0) return 0;
    e->stretch = e->out->n;
    if (t->nfc) {
        if (nfc_make(t, p, n, &e->nfc) != 0) return -1;
        if (e->nfc.n > 0) p = e->nfc.p, n = e->nfc.n;
    }
    if ((t->space_prefix == 1 && spaced) ||
        (t->space_prefix == 2 && begins && !begins_with_space(p, n))) {
        e->spaced.n = 0;
        if (bytes_add(&e->spaced, " ", 1) != 0 || bytes_add(&e->spaced, p, n) != 0) return -1;
        p = e->spaced.p, n = e->spaced.n;
    }
    e->end = p == e->nfc.p || p == e->spaced.p ? p + n : e->text_end;
    return encode_pieces(e, p, p + n);
}

// ---- added tokens ----

static int by_text(const void *a, const void *b) {
    const Added *x = a, *y = b;
    int shorter = x->bytes < y->bytes ? x->bytes : y->bytes;
    int order = memcmp(x->text, y->text, (size_t)shorter);
    if (order != 0) return order;
    return x->bytes != y->bytes ? x->bytes - y->bytes : x->id - y->id;
}

static int open_added(Tokenizer *t) {
    int n = 0;
    for (int id = 0; id < t->n; id++) n += t->kind[id] == SPECIAL || t->kind[id] == USER_DEFINED;
    t->added = malloc((size_t)(n + 1) * sizeof *t->added);
    if (t->added == NULL) return -1;
    for (int id = 0; id < t->n; id++) {
        int bytes;
        const uint8_t *text = (const uint8_t *)tokenizer_piece(t, id, &bytes);
        if ((t->kind[id] != SPECIAL && t->kind[id] != USER_DEFINED) || bytes == 0) continue;
        t->added[t->n_added++] = (Added){text, bytes, id};
        t->added_kinds[*text] |= (uint8_t)(1 << t->kind[id]);
        t->added_from[*text + 1]++;
    }
    for (int b = 0; b < 256; b++) t->added_from[b + 1] += t->added_from[b];
    qsort(t->added, (size_t)t->n_added, sizeof *t->added, by_text);
    return 0;
}

// The first row of added[lo, hi), which agree in their first `depth` bytes, whose next byte is b or
// more.
static int added_lower(const Tokenizer *t, int lo, int hi, int depth, int b) {
    while (lo < hi) {
        int mid = lo + (hi - lo) / 2;
        if (t->added[mid].text[depth] < b)
            lo = mid + 1;
        else
            hi = mid;
    }
    return lo;
}

// The longest added token at p, NULL when none. Special ones must end at special_end or before.
static const Added *added_at(const Tokenizer *t, const uint8_t *p, const uint8_t *end,
                             const uint8_t *special_end) {
    int lo = t->added_from[*p], hi = t->added_from[*p + 1];
    const Added *best = NULL;
    for (int depth = 1; lo < hi; depth++) {
        const Added *same = &t->added[lo];
        while (lo < hi && t->added[lo].bytes == depth) lo++;  // the shortest come first
        for (; same < &t->added[lo]; same++)
            if (t->kind[same->id] == USER_DEFINED || p + depth <= special_end) best = same;
        if (p + depth == end) break;
        lo = added_lower(t, lo, hi, depth, p[depth]);
        hi = added_lower(t, lo, hi, depth, p[depth] + 1);
    }
    return best;
}

typedef struct {
    const uint8_t *p;
    size_t n;
    bool special;           // special tokens are recognized,
    size_t user, user_end;  // but not in the user's part, or overlapping it
    bool begins;            // nothing came before
    bool spaced;            // the end of an added token, or nothing, came before
} Text;

static int encode_text(Encoder *e, const Text *text) {
    const uint8_t *p = text->p, *end = p + text->n, *from = p;
    const uint8_t *user = p + text->user, *user_end = p + text->user_end;
    e->text_end = end;
    int kinds = 1 << USER_DEFINED | (text->special ? 1 << SPECIAL : 0);
    bool begins = text->begins, spaced = text->spaced;
    for (;;) {
        while (p < end && !(e->t->added_kinds[*p] & kinds)) p++;
        if (p == end) break;
        bool forbidden = !text->special || (p >= user && p < user_end);
        const uint8_t *special_end = forbidden ? p : p < user ? user : end;
        const Added *a = added_at(e->t, p, end, special_end);
        if (a == NULL) {
            p++;
            continue;
        }
        if (encode_stretch(e, from, (size_t)(p - from), begins, spaced) != 0) return -1;
        if (ids_push(e->out, a->id) != 0) return -1;
        begins = false;
        spaced = true;
        p = from = p + a->bytes;
    }
    return encode_stretch(e, from, (size_t)(end - from), begins, spaced);
}

static int append_text(const Tokenizer *t, const Text *text, Ids *out) {
    if (text->n == 0) return 0;
    Encoder e = {.t = t, .out = out};
    if (text->n >= WORTH_KNOWING) e.known = calloc((size_t)1 << KNOWN_BITS, sizeof *e.known);
    int status = encode_text(&e, text);
    encoder_free(&e);
    return status;
}

int tokenizer_encode(const Tokenizer *t, const char *text, size_t bytes, unsigned flags, Ids *out) {
    if (flags & TOK_BOS && t->add_bos && t->bos_id >= 0 && ids_push(out, t->bos_id) != 0) return -1;
    Text whole = {.p = (const uint8_t *)text, .n = bytes, .special = flags & TOK_SPECIAL};
    whole.user = whole.user_end = bytes;
    whole.begins = whole.spaced = true;
    return append_text(t, &whole, out);
}

// ---- ids to text ----

const char *tokenizer_piece(const Tokenizer *t, int id, int *bytes) {
    *bytes = 0;
    if (id < 0 || id >= t->n) return "";
    *bytes = t->offsets[id + 1] - t->offsets[id];
    return (const char *)t->bytes + t->offsets[id];
}

bool tokenizer_is_special(const Tokenizer *t, int id) {
    return id >= 0 && id < t->n && t->kind[id] == SPECIAL;
}

bool tokenizer_is_stop(const Tokenizer *t, int id) {
    for (int i = 0; i < t->n_stops; i++)
        if (t->stop[i] == id) return true;
    return false;
}

int tokenizer_n_vocab(const Tokenizer *t) { return t->n; }
const ChatTemplate *tokenizer_chat(const Tokenizer *t) { return &t->chat; }

// What id adds to a text, into out, which may have its piece's length; returns the bytes written.
// The decoders of SentencePiece models turn every U+2581 into a space, but not one made of byte
// tokens.
static size_t print_piece(const Tokenizer *t, int id, uint8_t *out) {
    int n;
    size_t to = 0;
    const char *piece = tokenizer_piece(t, id, &n);
    for (int i = 0; i < n; i++) {
        bool space = t->spm && n - i >= 3 && memcmp(piece + i, "\xe2\x96\x81", 3) == 0;
        out[to++] = space ? ' ' : (uint8_t)piece[i];
        if (space) i += 2;
    }
    return to;
}

char *tokenizer_decode(const Tokenizer *t, const int *ids, int n, size_t *bytes) {
    size_t size = 1, to = 0;
    for (int i = 0, len; i < n; i++, size += (size_t)len) tokenizer_piece(t, ids[i], &len);
    uint8_t *text = malloc(size);
    if (text == NULL) return NULL;
    for (int i = 0; i < n; i++) to += print_piece(t, ids[i], text + to);
    if (t->space_prefix > 0 && to > 0 && text[0] == ' ') memmove(text, text + 1, --to);
    text[to] = 0;
    *bytes = to;
    return (char *)text;
}

// Bytes at the end of p[n] that may become a character with what follows.
static int unfinished(const uint8_t *p, int n) {
    uint32_t c;
    for (int len = 1; len <= 3 && len <= n; len++)
        if (utf8_get(p + n - len, p + n, &c) < 0) return len;
    return 0;
}

int tokenizer_stream(const Tokenizer *t, TokStream *s, int id, char *out) {
    uint8_t *p = (uint8_t *)out;
    int held = s->n_held, n = held;
    memcpy(p, s->held, (size_t)held);
    if (id >= 0) n += (int)print_piece(t, id, p + held);
    if (!s->started && n > 0) {
        if (t->space_prefix > 0 && p[0] == ' ') memmove(p, p + 1, (size_t)--n);
        s->started = true;
    }
    s->n_held = id < 0 ? 0 : unfinished(p, n);
    n -= s->n_held;
    memcpy(s->held, p + n, (size_t)s->n_held);
    return n;
}

// ---- conversations ----

// Jinja's trim is Python's strip, which also takes the four separators U+001C to U+001F.
static bool trimmed_char(const Tokenizer *t, uint32_t c) {
    return t->class[c] & SPACE || (c >= 0x1c && c <= 0x1f);
}

static void trim(const Tokenizer *t, const uint8_t **start, const uint8_t **end) {
    uint32_t c;
    for (int len; *start < *end; *start += len) {
        len = next_char(*start, *end, &c);
        if (!trimmed_char(t, c)) break;
    }
    for (const uint8_t *p; *end > *start && (p = char_before(*end, *start)) != NULL; *end = p) {
        next_char(p, *end, &c);
        if (!trimmed_char(t, c)) break;
    }
}

static int append_template(const Tokenizer *t, Bytes *rendered, size_t user, size_t user_end,
                           bool first, Ids *out) {
    int last = out->n > 0 ? out->id[out->n - 1] : -1;
    bool after_added =
        last >= 0 && last < t->n && (t->kind[last] == SPECIAL || t->kind[last] == USER_DEFINED);
    Text text = {.p = rendered->p, .n = rendered->n, .special = true, .begins = first};
    text.user = user;
    text.user_end = user_end;
    text.spaced = first || out->n == 0 || after_added;
    return append_text(t, &text, out);
}

static int add_string(Bytes *b, const char *s) { return bytes_add(b, s, strlen(s)); }

int tokenizer_turn(const Tokenizer *t, char role, const char *text, bool first, bool after_system,
                   Ids *out) {
    const ChatTemplate *c = &t->chat;
    const char *prefix = role == 's'    ? c->system_prefix
                         : role == 'a'  ? c->assistant_prefix
                         : after_system ? c->user_prefix_after_system
                                        : c->user_prefix;
    const char *suffix = role == 's'   ? c->system_suffix
                         : role == 'a' ? c->assistant_suffix
                                       : c->user_suffix;
    const uint8_t *start = (const uint8_t *)text, *end = start + strlen(text);
    if (c->trim) trim(t, &start, &end);
    Bytes b = {0};
    int status = first ? add_string(&b, c->begin) : 0;
    if (status == 0 && first && role != 's') status = add_string(&b, c->default_system);
    if (status == 0) status = add_string(&b, prefix);
    size_t user = b.n, user_end = user + (size_t)(end - start);
    if (status == 0) status = bytes_add(&b, start, (size_t)(end - start));
    if (status == 0) status = add_string(&b, suffix);
    if (status == 0) status = append_template(t, &b, user, user_end, first, out);
    free(b.p);
    return status;
}

int tokenizer_generation(const Tokenizer *t, Ids *out) {
    Bytes b = {0};
    int status = add_string(&b, t->chat.generation);
    if (status == 0) status = append_template(t, &b, b.n, b.n, false, out);
    free(b.p);
    return status;
}

// ---- opening ----

static int no_memory(char *err) { return fail(err, "tokenizer: out of memory"); }

static int open_vocabulary(Tokenizer *t, const TensorFile *f, char *err) {
    const Tensor *kind = tensors_get(f, err, "tok.kind", T_U8, 1, -1);
    if (kind == NULL) return -1;
    if (kind->shape[0] == 0 || kind->shape[0] > 1 << 30)
        return fail(err, "tensor tok.kind: %zu ids are no vocabulary", kind->shape[0]);
    t->n = (int)kind->shape[0];
    const Tensor *offsets = tensors_get(f, err, "tok.offsets", T_I32, 1, t->n + 1);
    const Tensor *bytes = offsets ? tensors_get(f, err, "tok.bytes", T_U8, 1, -1) : NULL;
    if (bytes == NULL) return -1;
    t->kind = kind->data;
    t->offsets = offsets->data;
    t->bytes = bytes->data;
    if (t->offsets[0] < 0 || (size_t)t->offsets[t->n] > bytes->shape[0])
        return fail(err, "tok.offsets run from %d to %d, tok.bytes holds %zu bytes", t->offsets[0],
                    t->offsets[t->n], bytes->shape[0]);
    for (int id = 0; id < t->n; id++) {
        if (t->offsets[id + 1] < t->offsets[id] || t->offsets[id + 1] - t->offsets[id] > MAX_PIECE)
            return fail(err, "tok.offsets: id %d goes from byte %d to %d, a piece has at most %d",
                        id, t->offsets[id], t->offsets[id + 1], MAX_PIECE);
        if (t->kind[id] > UNUSED)
            return fail(err, "tok.kind: id %d is of kind %d", id, t->kind[id]);
    }
    return 0;
}

// "1,2": ids that end an answer.
static int open_stops(Tokenizer *t, const char *list, char *err) {
    for (const char *p = list; *p != 0;) {
        char *end;
        long id = strtol(p, &end, 10);
        bool last = *end == 0;
        if (end == p || (!last && *end != ',') || id < 0 || id >= t->n || t->n_stops == MAX_STOPS)
            return fail(
                err,
                "metadata tokenizer.stop_ids: expected at most %d ids below %d, found \"%.100s\"",
                MAX_STOPS, t->n, list);
        t->stop[t->n_stops++] = (int)id;
        p = last ? end : end + 1;
    }
    return 0;
}

static int open_meta(Tokenizer *t, const TensorFile *f, char *err) {
    const char *model = tensors_meta(f, "tokenizer.model"),
               *split = tensors_meta(f, "tokenizer.split");
    const char *stops = tensors_meta(f, "tokenizer.stop_ids");
    if (model == NULL || (strcmp(model, "bpe") != 0 && strcmp(model, "spm") != 0))
        return fail(err, "metadata tokenizer.model: expected \"bpe\" or \"spm\", found \"%.100s\"",
                    model ? model : "(nothing)");
    t->spm = strcmp(model, "spm") == 0;
    if (split != NULL) t->split = splitter_find(split);
    if (t->split == NULL)
        return fail(err, "metadata tokenizer.split: \"%.100s\" is not known",
                    split ? split : "(nothing)");
    if (tensors_meta_int(f, "tokenizer.nfc", 0, 1, &t->nfc, err) != 0 ||
        tensors_meta_int(f, "tokenizer.ignore_merges", 0, 1, &t->ignore_merges, err) != 0 ||
        tensors_meta_int(f, "tokenizer.add_bos", 0, 1, &t->add_bos, err) != 0 ||
        tensors_meta_int(f, "tokenizer.bos_id", -1, t->n - 1, &t->bos_id, err) != 0 ||
        tensors_meta_int(f, "tokenizer.space_prefix", 0, 2, &t->space_prefix, err) != 0 ||
        tensors_meta_int(f, "tokenizer.unk_id", -1, t->n - 1, &t->unk_id, err) != 0)
        return -1;
    return open_stops(t, stops ? stops : "", err);
}

static const char *text_meta(const TensorFile *f, const char *key) {
    const char *value = tensors_meta(f, key);
    return value == NULL ? "" : value;
}

static bool flag_meta(const TensorFile *f, const char *key) {
    return strcmp(text_meta(f, key), "1") == 0;
}

static void open_chat(ChatTemplate *c, const TensorFile *f) {
    c->present = flag_meta(f, "chat.present");
    c->trim = flag_meta(f, "chat.trim");
    c->begin = text_meta(f, "chat.begin");
    c->default_system = text_meta(f, "chat.default_system");
    c->system_prefix = text_meta(f, "chat.system_prefix");
    c->system_suffix = text_meta(f, "chat.system_suffix");
    c->user_prefix = text_meta(f, "chat.user_prefix");
    c->user_suffix = text_meta(f, "chat.user_suffix");
    c->user_prefix_after_system = text_meta(f, "chat.user_prefix_after_system");
    c->assistant_prefix = text_meta(f, "chat.assistant_prefix");
    c->assistant_suffix = text_meta(f, "chat.assistant_suffix");
    c->generation = text_meta(f, "chat.generation");
    c->kvzip_prefix = text_meta(f, "kvzip.prefix");
    c->kvzip_postfix = text_meta(f, "kvzip.postfix");
}

static int open_all(Tokenizer *t, const TensorFile *f, char *err) {
    if (open_vocabulary(t, f, err) != 0 || open_meta(t, f, err) != 0) return -1;
    if (classes_open(t) != 0 || symbols_open(t) != 0 || open_added(t) != 0) return no_memory(err);
    if (merges_open(t, f, err) != 0) return -1;
    if ((t->nfc && nfc_open(t) != 0) || (t->ignore_merges && words_open(t) != 0))
        return no_memory(err);
    open_chat(&t->chat, f);
    return 0;
}

Tokenizer *tokenizer_open(const TensorFile *f, char *err) {
    Tokenizer *t = calloc(1, sizeof *t);
    if (t == NULL) {
        no_memory(err);
        return NULL;
    }
    if (open_all(t, f, err) == 0) return t;
    tokenizer_close(t);
    return NULL;
}

void tokenizer_close(Tokenizer *t) {
    if (t == NULL) return;
    free(t->pairs);
    free(t->maybe);
    free(t->byte_key);
    free(t->words);
    free(t->char_id);
    free(t->added);
    free(t->class);
    free(t->ccc);
    free(t->decomposition);
    free(t);
}
