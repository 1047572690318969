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

// ---- added tokens ----

static int by_text(const void *a, const void *b) {
    const Added *x = a, *y = b;
    int shorter = x->bytes < y->bytes ? x->bytes : y->bytes;
    int order = memcmp(x->text, y->text, (size_t)shorter);
    if (order != 0) return order;
    return x->bytes != y->bytes ? x->bytes - y->bytes : x->id - y->id;
}

static bool is_added(const Tokenizer *t, int id) {
    return id >= 0 && id < t->n && (t->kind[id] == SPECIAL || t->kind[id] == USER_DEFINED);
}

static bool has_flag(const Tokenizer *t, int id, int flag) {
    return t->flags != NULL && is_added(t, id) && t->flags[id] & flag;
}

// With SentencePiece a U+2581 is a space. Shortens p[n] in place, returns the bytes left.
static size_t plain_spaces(uint8_t *p, size_t n) {
    size_t to = 0;
    for (size_t i = 0; i < n; i++) {
        bool space = n - i >= 3 && memcmp(p + i, "\xe2\x96\x81", 3) == 0;
        p[to++] = space ? ' ' : p[i];
        if (space) i += 2;
    }
    return to;
}

static int set_open(Tokenizer *t, AddedSet *set, bool normalized) {
    int n = 0, bytes;
    for (int id = 0; id < t->n; id++) n += is_added(t, id);
    set->row = malloc((size_t)(n + 1) * sizeof *set->row);
    if (set->row == NULL) return -1;
    for (int id = 0; id < t->n; id++) {
        const uint8_t *text = (const uint8_t *)tokenizer_piece(t, id, &bytes);
        if (!is_added(t, id) || has_flag(t, id, NORMALIZED) != normalized || bytes == 0) continue;
        set->row[set->n++] = (Added){text, bytes, id};
        set->spaces = set->spaces || memchr(text, ' ', (size_t)bytes) != NULL;
        set->kinds[*text] |= (uint8_t)(1 << t->kind[id]);
        set->from[*text + 1]++;
    }
    for (int b = 0; b < 256; b++) set->from[b + 1] += set->from[b];
    qsort(set->row, (size_t)set->n, sizeof *set->row, by_text);
    return 0;
}

static int open_added(Tokenizer *t) {
    return set_open(t, &t->added[0], false) != 0 || set_open(t, &t->added[1], true) != 0 ? -1 : 0;
}

// The first row of row[lo, hi), which agree in their first `depth` bytes, whose next byte is b or
// more.
static int added_lower(const AddedSet *set, int lo, int hi, int depth, int b) {
    while (lo < hi) {
        int mid = lo + (hi - lo) / 2;
        if (set->row[mid].text[depth] < b)
            lo = mid + 1;
        else
            hi = mid;
    }
    return lo;
}

typedef struct {
    const uint8_t *p;
    size_t n;
    bool special;           // special tokens are recognized,
    size_t user, user_end;  // but not in the user's part, or overlapping it
    bool begins;            // nothing came before
    bool spaced;            // the end of an added token, or nothing, came before
} Text;

// The longest added token of the set at text[at], NULL when none that may stand there.
static const Added *added_at(const Tokenizer *t, const AddedSet *set, const Text *text, size_t at) {
    const uint8_t *p = text->p + at, *end = text->p + text->n;
    bool forbidden = !text->special || (at >= text->user && at < text->user_end);
    const uint8_t *special_end = forbidden ? p : at < text->user ? text->p + text->user : end;
    int lo = set->from[*p], hi = set->from[*p + 1];
    const Added *best = NULL;
    for (int depth = 1; lo < hi; depth++) {
        const Added *same = &set->row[lo];
        while (lo < hi && set->row[lo].bytes == depth) lo++;  // the shortest come first
        for (; same < &set->row[lo]; same++)
            if (t->kind[same->id] == USER_DEFINED || p + depth <= special_end) best = same;
        if (p + depth == end) break;
        lo = added_lower(set, lo, hi, depth, p[depth]);
        hi = added_lower(set, lo, hi, depth, p[depth] + 1);
    }
    return best;
}

// Where the white space before text[at] begins, not before `from`.
static size_t space_before(const Tokenizer *t, const Text *text, size_t from, size_t at) {
    const uint8_t *p = text->p + at, *q;
    int len;
    while ((q = char_before(p, text->p + from)) != NULL && class_at(t, q, p, &len) & SPACE) p = q;
    return (size_t)(p - text->p);
}

static size_t clamp(size_t at, size_t from, size_t to) {
    return at < from ? from : at > to ? to : at;
}

// text[from, to), as a text of its own.
static Text part_of(const Text *text, size_t from, size_t to) {
    Text part = *text;
    part.p += from;
    part.n = to - from;
    part.user = clamp(text->user, from, to) - from;
    part.user_end = clamp(text->user_end, from, to) - from;
    return part;
}

// Calls `stretch` with what lies between the added tokens of a set in text, and puts out their ids
// between. Tokens that strip take the white space beside them; the search goes on right behind the
// token itself, so that white space may be a token all the same, as in tokenizers.
static int find_added(Encoder *e, const Text *text, int which,
                      int (*stretch)(Encoder *e, const Text *text)) {
    const Tokenizer *t = e->t;
    const AddedSet *set = &t->added[which];
    int kinds = 1 << USER_DEFINED | (text->special ? 1 << SPECIAL : 0);
    size_t from = 0, at = 0;
    Text left = *text;
    for (;;) {
        while (at < text->n && !(set->kinds[text->p[at]] & kinds)) at++;
        if (at == text->n) break;
        const Added *a = added_at(t, set, text, at);
        if (a == NULL) {
            at++;
            continue;
        }
        size_t start = at, end = at + (size_t)a->bytes;
        at = end;
        if (has_flag(t, a->id, STRIPS_LEFT))
            start = start > from ? space_before(t, text, from, start) : from;
        if (has_flag(t, a->id, STRIPS_RIGHT))
            end = (size_t)(skip(t, text->p + end, text->p + text->n, SPACE, true) - text->p);
        if (start > from) {
            Text part = part_of(&left, from, start);
            if (stretch(e, &part) != 0) return -1;
        }
        if (start < end && ids_push(e->out, a->id) != 0) return -1;
        left.begins = false;
        left.spaced = true;
        from = end;
    }
    if (from == text->n) return 0;
    left = part_of(&left, from, text->n);
    return stretch(e, &left);
}

// ---- stretches ----

static bool begins_with_space(const Tokenizer *t, const uint8_t *p, size_t n) {
    return *p == ' ' || (t->spm && n >= 3 && memcmp(p, "\xe2\x96\x81", 3) == 0);
}

// Where the user's part of a text lies in its NFC p[n]: all but the bytes that stay when what
// precedes or follows it is normalized alone. So a character that both have made is the user's.
static int find_user(const Tokenizer *t, Text *text, const uint8_t *p, size_t n) {
    Bytes head = {0}, tail = {0};
    const uint8_t *user_end = text->p + text->user_end;
    size_t before = text->user, after = text->n - text->user_end, start = 0, end = 0;
    int status = nfc_make(t, text->p, before, &head);
    if (status == 0) status = nfc_make(t, user_end, after, &tail);
    const uint8_t *a = head.n > 0 ? head.p : text->p, *b = tail.n > 0 ? tail.p : user_end;
    if (head.n > 0) before = head.n;
    if (tail.n > 0) after = tail.n;
    while (start < before && start < n && a[start] == p[start]) start++;
    while (end < after && end < n && b[after - 1 - end] == p[n - 1 - end]) end++;
    text->user = start < n - end ? start : n - end;
    text->user_end = start < n - end ? n - end : start;
    free(head.p);
    free(tail.p);
    return status;
}

// Brings the text to NFC, in e->nfc if that changes it.
static int normalize(Encoder *e, Text *text) {
    const Tokenizer *t = e->t;
    if (nfc_make(t, text->p, text->n, &e->nfc) != 0) return -1;
    if (e->nfc.n == 0) return 0;
    bool user = text->special && text->user < text->user_end && t->added[1].n > 0;
    if (!user)
        text->user = text->user_end = e->nfc.n;
    else if (find_user(t, text, e->nfc.p, e->nfc.n) != 0)
        return -1;
    text->p = e->nfc.p;
    text->n = e->nfc.n;
    return 0;
}

// Makes text the n bytes of b.
static void move_text(Text *text, const Bytes *b, size_t user, size_t user_end) {
    text->p = b->p;
    text->n = b->n;
    text->user = user;
    text->user_end = user_end;
}

// Puts a space before the text, into b.
static int put_space(Text *text, Bytes *b) {
    b->n = 0;
    if (bytes_add(b, " ", 1) != 0 || bytes_add(b, text->p, text->n) != 0) return -1;
    move_text(text, b, text->user + (text->user > 0), text->user_end + 1);
    return 0;
}

// Makes each U+2581 a space, in b.
static int put_plain_spaces(Text *text, Bytes *b) {
    size_t ends[] = {text->user, text->user_end, text->n};
    b->n = 0;
    if (bytes_room(b, text->n) != 0) return -1;
    for (size_t i = 0, from = 0; i < 3; from = text->user, i++) {
        if (i == 2) from = text->user_end;
        size_t n = ends[i] - from;
        memcpy(b->p + b->n, text->p + from, n);
        b->n += plain_spaces(b->p + b->n, n);
        ends[i] = b->n;
    }
    move_text(text, b, ends[0], ends[1]);
    return 0;
}

// Encodes a normalized stretch in which no added token is left.
static int encode_part(Encoder *e, const Text *text) {
    const Tokenizer *t = e->t;
    Text part = *text;
    if (((t->space_prefix == 2 && part.begins) || (t->space_prefix == 3 && part.spaced)) &&
        !begins_with_space(t, part.p, part.n) && put_space(&part, &e->part) != 0)
        return -1;
    e->end = part.p == text->p ? e->stretch_end : part.p + part.n;
    return encode_pieces(e, part.p, part.p + part.n);
}

// Normalizes a stretch, then looks for the added tokens that are found there.
static int encode_stretch(Encoder *e, const Text *text) {
    const Tokenizer *t = e->t;
    Text part = *text;
    if (t->nfc && normalize(e, &part) != 0) return -1;
    if (t->space_prefix == 1 && part.spaced && put_space(&part, &e->spaced) != 0) return -1;
    if (t->spm && t->added[1].spaces && put_plain_spaces(&part, &e->plain) != 0) return -1;
    e->stretch_end = part.p == text->p ? e->text_end : part.p + part.n;
    if (t->added[1].n == 0) return encode_part(e, &part);
    return find_added(e, &part, 1, encode_part);
}

static int append_text(const Tokenizer *t, const Text *text, Ids *out) {
    if (text->n == 0) return 0;
    Encoder e = {.t = t, .out = out};
    if (text->n >= WORTH_KNOWING) e.known = calloc((size_t)1 << KNOWN_BITS, sizeof *e.known);
    e.text_end = text->p + text->n;
    int status = find_added(&e, text, 0, encode_stretch);
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
// tokens. first: it is the first of a text.
static size_t print_piece(const Tokenizer *t, int id, bool first, uint8_t *out) {
    int n;
    const char *piece = tokenizer_piece(t, id, &n);
    memcpy(out, piece, (size_t)n);
    size_t bytes = t->spm ? plain_spaces(out, (size_t)n) : (size_t)n, to = 0;
    if (!first || t->strip < 2) return bytes;
    for (size_t i = 0; i < bytes; i++)
        if (out[i] != ' ') out[to++] = out[i];
    return to;
}

char *tokenizer_decode(const Tokenizer *t, const int *ids, int n, size_t *bytes) {
    size_t size = 1, to = 0;
    for (int i = 0, len; i < n; i++, size += (size_t)len) tokenizer_piece(t, ids[i], &len);
    uint8_t *text = malloc(size);
    if (text == NULL) return NULL;
    for (int i = 0; i < n; i++) to += print_piece(t, ids[i], i == 0, text + to);
    if (t->strip == 1 && to > 0 && text[0] == ' ') memmove(text, text + 1, --to);
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
    if (id >= 0) n += (int)print_piece(t, id, !s->started, p + held);
    if (!s->started && n > 0) {
        if (t->strip == 1 && p[0] == ' ') memmove(p, p + 1, (size_t)--n);
        s->started = true;
    }
    if (id >= 0 && t->strip == 2) s->started = true;
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
    Text text = {.p = rendered->p, .n = rendered->n, .special = true, .begins = first};
    text.user = user;
    text.user_end = user_end;
    text.spaced = first || out->n == 0 || is_added(t, last);
    if (text.n > 0 && has_flag(t, last, STRIPS_RIGHT)) {
        size_t from = (size_t)(skip(t, text.p, text.p + text.n, SPACE, true) - text.p);
        text = part_of(&text, from, text.n);
    }
    return append_text(t, &text, out);
}

// Where the first special token in the template's text s [n] ends, 0 where there is none.
static size_t end_of_special(const Tokenizer *t, const char *s, size_t n) {
    Text text = {.p = (const uint8_t *)s, .n = n, .special = true, .user = n, .user_end = n};
    for (size_t at = 0; at < n;) {
        const Added *a = added_at(t, &t->added[0], &text, at);
        if (a == NULL) a = added_at(t, &t->added[1], &text, at);
        at += a == NULL ? 1 : (size_t)a->bytes;
        if (a != NULL && t->kind[a->id] == SPECIAL) return at;
    }
    return 0;
}

// A stretch of parts that have one user's part between them.
typedef struct {
    Bytes b;
    size_t user, user_end;
    bool has_user, first;
} Stretch;

static int end_stretch(const Tokenizer *t, Stretch *s, Ids *out) {
    if (!s->has_user) s->user = s->user_end = s->b.n;
    int status = append_template(t, &s->b, s->user, s->user_end, s->first, out);
    s->b.n = 0;
    s->has_user = s->first = false;
    return status;
}

static int add_part(const Tokenizer *t, Stretch *s, const TextPart *part, Ids *out) {
    const uint8_t *start = (const uint8_t *)part->s, *end = start + part->n;
    if (part->kind == PART_MESSAGE && t->chat.trim) trim(t, &start, &end);
    if (part->kind == PART_SYSTEM && t->chat.trim_system) trim(t, &start, &end);
    if (part->kind == PART_TEMPLATE && s->has_user) {
        size_t n = end_of_special(t, part->s, part->n);
        if (n > 0 && (bytes_add(&s->b, start, n) != 0 || end_stretch(t, s, out) != 0)) return -1;
        start += n;
    }
    if (part->kind != PART_TEMPLATE && !s->has_user) s->user = s->b.n;
    if (bytes_add(&s->b, start, (size_t)(end - start)) != 0) return -1;
    if (part->kind != PART_TEMPLATE) s->user_end = s->b.n, s->has_user = true;
    return 0;
}

int tokenizer_parts(const Tokenizer *t, const TextPart *part, int n, bool first, Ids *out) {
    Stretch s = {.first = first};
    int status = 0;
    for (int i = 0; i < n && status == 0; i++) status = add_part(t, &s, &part[i], out);
    if (status == 0) status = end_stretch(t, &s, out);
    free(s.b.p);
    return status;
}

static TextPart piece(const char *s) { return (TextPart){PART_TEMPLATE, s, strlen(s)}; }

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
    const TextPart part[] = {piece(first ? c->begin : ""),
                             piece(first && role != 's' ? c->default_system : ""),
                             piece(prefix),
                             {role == 's' ? PART_SYSTEM : PART_MESSAGE, text, strlen(text)},
                             piece(suffix)};
    return tokenizer_parts(t, part, sizeof part / sizeof *part, first, out);
}

int tokenizer_generation(const Tokenizer *t, Ids *out) {
    const TextPart part = piece(t->chat.generation);
    return tokenizer_parts(t, &part, 1, false, out);
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
    if (tensors_find(f, "tok.flags") != NULL) {
        const Tensor *flags = tensors_get(f, err, "tok.flags", T_U8, 1, t->n);
        if (flags == NULL) return -1;
        t->flags = flags->data;
    }
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

// A number from 0 to hi that is written only where it is not `usual`.
static int optional_int(const TensorFile *f, const char *key, int hi, int usual, int *out,
                        char *err) {
    *out = usual;
    return tensors_meta(f, key) == NULL ? 0 : tensors_meta_int(f, key, 0, hi, out, err);
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
        tensors_meta_int(f, "tokenizer.space_prefix", 0, 3, &t->space_prefix, err) != 0 ||
        tensors_meta_int(f, "tokenizer.unk_id", -1, t->n - 1, &t->unk_id, err) != 0 ||
        optional_int(f, "tokenizer.strip", 2, t->space_prefix > 0, &t->strip, err) != 0 ||
        optional_int(f, "tokenizer.fuse_unk", 1, t->spm, &t->fuse_unk, err) != 0)
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

static void open_tools(ToolForm *c, const TensorFile *f) {
    const char *indent = text_meta(f, "chat.tools_indent");
    c->present = flag_meta(f, "chat.tools");
    c->refused = text_meta(f, "chat.tools_refused");
    c->begin = text_meta(f, "chat.tools_begin");
    c->system_prefix = text_meta(f, "chat.tools_system_prefix");
    c->system_suffix = text_meta(f, "chat.tools_system_suffix");
    c->separator = text_meta(f, "chat.tools_separator");
    c->end = text_meta(f, "chat.tools_end");
    c->indent = indent[0] >= '0' && indent[0] <= '9' ? indent[0] - '0' : 0;
    c->bare = flag_meta(f, "chat.tools_bare");
    c->call_marker = text_meta(f, "chat.call_marker");
    c->call_begin = text_meta(f, "chat.call_begin");
    c->call_middle = text_meta(f, "chat.call_middle");
    c->call_end = text_meta(f, "chat.call_end");
    c->call_separator = text_meta(f, "chat.call_separator");
    c->call_name = text_meta(f, "chat.call_name");
    c->call_arguments = text_meta(f, "chat.call_arguments");
    c->call_text = tensors_meta(f, "chat.call_text");
    c->call_one = flag_meta(f, "chat.call_one");
    c->result_begin = text_meta(f, "chat.result_begin");
    c->result_separator = text_meta(f, "chat.result_separator");
    c->result_end = text_meta(f, "chat.result_end");
    c->result_json = flag_meta(f, "chat.result_json");
}

static void open_chat(ChatTemplate *c, const TensorFile *f) {
    c->present = flag_meta(f, "chat.present");
    c->trim = flag_meta(f, "chat.trim");
    const char *system = tensors_meta(f, "chat.trim_system");
    c->trim_system = system ? strcmp(system, "1") == 0 : c->trim;
    c->begin = text_meta(f, "chat.begin");
    c->default_system = text_meta(f, "chat.default_system");
    c->system_refused = text_meta(f, "chat.system_refused");
    c->system_prefix = text_meta(f, "chat.system_prefix");
    c->system_suffix = text_meta(f, "chat.system_suffix");
    c->user_prefix = text_meta(f, "chat.user_prefix");
    c->user_suffix = text_meta(f, "chat.user_suffix");
    c->user_prefix_after_system = text_meta(f, "chat.user_prefix_after_system");
    c->assistant_prefix = text_meta(f, "chat.assistant_prefix");
    c->assistant_suffix = text_meta(f, "chat.assistant_suffix");
    c->generation = text_meta(f, "chat.generation");
    open_tools(&c->tools, f);
    c->kvzip_prefix = text_meta(f, "kvzip.prefix");
    c->kvzip_postfix = text_meta(f, "kvzip.postfix");
}

static int open_all(Tokenizer *t, const TensorFile *f, char *err) {
    if (open_vocabulary(t, f, err) != 0 || open_meta(t, f, err) != 0) return -1;
    if (classes_open(t) != 0 || symbols_open(t) != 0 || (t->nfc && nfc_open(t) != 0) ||
        open_added(t) != 0)
        return no_memory(err);
    if (merges_open(t, f, err) != 0) return -1;
    if (t->ignore_merges && words_open(t) != 0) return no_memory(err);
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
    free(t->added[0].row);
    free(t->added[1].row);
    free(t->class);
    free(t->ccc);
    free(t->decomposition);
    free(t);
}
