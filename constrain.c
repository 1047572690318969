// constrain.c: JSON of a given form, byte by byte: the automaton, and its mask over a vocabulary.
//
// A reading is one way to understand the text so far: what is expected now, and a stack of the
// lists and objects around it. A byte turns each reading into none, one or several; a text is a
// beginning of a valid value as long as one is left. Each can be finished whatever happens to the
// others, so that dropping some of too many (MOST) loses ways to go on but never the way out.
//
// The mask walks through the vocabulary in sorted order and keeps the readings after every byte of
// the last piece: what the next one shares with it is not read again, and all that begins as a
// rejected one did is passed over. Inside of strings nearly all may come; so the pieces that are
// nothing but whole characters of a string stand apart and are judged by their length alone. Masks
// are remembered by their readings.
#include "constrain.h"

#include <stdlib.h>
#include <string.h>

#include "schema.h"

enum { MOST = 256, CACHED = 64, MAX_DIGITS = 18, MAX_EXPONENT = 2, BLANKS = 4 };

// ---- readings ----

// What is expected, and what `at`, `count` and `done` are meanwhile:
typedef enum {
    END,          // nothing: the value is over
    VALUE,        // a value of the node, white space before it
    OBJECT_OPEN,  // after {: a name or }; at: the next property
    OBJECT_NEXT,  // after a comma: a name
    NAME,         // in the name of property `at`; done: bytes of it
    COLON,        // after the name of property `at`
    OBJECT_MORE,  // after a value: a comma or }; at: the next property
    ARRAY_OPEN,   // after [: a value or ]
    ARRAY_MORE,   // after a value: a comma or ]; count: items, as far as that matters
    IN_STRING,    // at: see string_at; count: characters, as far as that matters
    IN_LISTED,    // at to count: members that begin so; done: bytes
    IN_NUMBER     // at: NumberPart; count: digits of it
} Expected;

// What to go on with after a value inside of a list or object.
typedef struct {
    int what, node, at, count;
} Frame;

typedef struct Reading {
    int what;  // Expected
    int node, at, count, done;
    int blank;  // white space just before: 0 none, 1 a space, 2 + n a line break and n blanks
    int depth;
    Frame frame[JSON_DEPTH];  // [depth]
} Reading;

static size_t reading_size(const Reading *t) {
    return offsetof(Reading, frame) + (size_t)t->depth * sizeof *t->frame;
}

// Readings of a text, each once; `at` has room for MOST.
typedef struct {
    const Rules *rules;
    Reading *at;
    int n;
} Readings;

static void add(Readings *out, const Reading *t) {
    size_t size = reading_size(t);
    for (int i = 0; i < out->n; i++)
        if (out->at[i].depth == t->depth && memcmp(&out->at[i], t, size) == 0) return;
    if (out->n < MOST) memcpy(&out->at[out->n++], t, size);
}

// t with something else expected.
static Reading expecting(const Reading *t, int what, int node, int at, int count) {
    Reading next;
    memcpy(&next, t, reading_size(t));
    next.what = what, next.node = node, next.at = at, next.count = count;
    next.done = next.blank = 0;
    return next;
}

static Reading inside(const Reading *t, Frame after, int what, int node) {
    Reading next = expecting(t, what, node, 0, 0);
    next.frame[next.depth++] = after;
    return next;
}

// The value of t is complete.
static void leave(Readings *out, const Reading *t) {
    Reading next = expecting(t, END, 0, 0, 0);
    if (t->depth > 0) {
        const Frame *f = &t->frame[--next.depth];
        next.what = f->what, next.node = f->node, next.at = f->at, next.count = f->count;
    }
    add(out, &next);
}

// White space: a space, or a line break and up to BLANKS per level. Whether c is that.
static bool blank(Readings *out, const Reading *t, uint8_t c) {
    bool starts = t->blank == 0 && (c == ' ' || c == '\n');
    bool goes_on = t->blank >= 2 && t->blank - 2 < BLANKS * (t->depth + 1);
    if (starts || (goes_on && (c == ' ' || c == '\t'))) {
        Reading next = expecting(t, t->what, t->node, t->at, t->count);
        next.blank = t->blank > 0 ? t->blank + 1 : c == ' ' ? 1 : 2;
        add(out, &next);
    }
    return c == ' ' || c == '\n' || c == '\t' || c == '\r';
}

// ---- strings, numbers, listed values ----

enum { PLAIN, ESCAPE, HEX, LOW_SLASH, LOW_U, LOW_HEX, TAIL };  // where in a string

// Where, how many bytes of it came or are missing, and the number or the byte that it began with.
static int string_at(int where, int n, int value) { return where | n << 4 | value << 8; }

static int hex_digit(uint8_t c) {
    if (c >= '0' && c <= '9') return c - '0';
    return (c | 32) >= 'a' && (c | 32) <= 'f' ? (c | 32) - 'a' + 10 : -1;
}

// After the n-th digit of \u: no half of a pair alone, no zero byte (json.c). -1: not this digit.
static int after_hex(int where, int n, int value) {
    int first = n < 2 ? 0 : value >> 4 * (n - 2);  // two digits of it
    bool low = first >= 0xdc && first <= 0xdf;
    if (where == LOW_HEX && ((n == 1 && value != 0xd) || (n == 2 && !low))) return -1;
    if (where == HEX && ((n == 2 && low) || (n == 4 && value == 0))) return -1;
    if (n < 4) return string_at(where, n, value);
    return where == HEX && value >= 0xd800 && value < 0xdc00 ? LOW_SLASH : PLAIN;
}

// A byte behind the first one of a character: the second is bounded (Unicode 15, table 3-7).
static int after_tail(int n, int lead, uint8_t c) {
    int lo = lead == 0xe0 ? 0xa0 : lead == 0xf0 ? 0x90 : 0x80;
    int hi = lead == 0xed ? 0x9f : lead == 0xf4 ? 0x8f : 0xbf;
    if (c < lo || c > hi) return -1;
    return n > 1 ? string_at(TAIL, n - 1, 0) : PLAIN;
}

// Where a string stands after a character's first byte, -1 when none begins with it.
static int after_first(uint8_t c) {
    if (c == '\\') return ESCAPE;
    if (c < 0x80) return c >= 0x20 && c != '"' ? PLAIN : -1;
    return c < 0xc2 || c > 0xf4 ? -1 : string_at(TAIL, c < 0xe0 ? 1 : c < 0xf0 ? 2 : 3, c);
}

static void step_string(Readings *out, const Reading *t, uint8_t c) {
    const Node *v = &out->rules->node[t->node];
    int where = t->at & 15, n = t->at >> 4 & 15, value = t->at >> 8, next = -1, count = t->count;
    if (where == PLAIN && c == '"') {
        if (count >= v->min) leave(out, t);
        return;
    }
    if (where == PLAIN) {
        if (v->max >= 0 && count >= v->max) return;
        count += v->max >= 0 || count < v->min;
        next = after_first(c);
    } else if (where == TAIL) {
        next = after_tail(n, value, c);
    } else if (where == HEX || where == LOW_HEX) {
        int digit = hex_digit(c);
        next = digit < 0 ? -1 : after_hex(where, n + 1, value << 4 | digit);
    } else if (where == ESCAPE) {
        next = c == 'u' ? HEX : c && strchr("\"\\/bfnrt", c) ? PLAIN : -1;
    } else {
        next = where == LOW_SLASH ? (c == '\\' ? LOW_U : -1) : c == 'u' ? LOW_HEX : -1;
    }
    if (next < 0) return;
    Reading after = expecting(t, IN_STRING, t->node, next, count);
    add(out, &after);
}

typedef enum { START, MINUS, ZERO, WHOLE, POINT, FRACTION, E, E_SIGN, EXPONENT } NumberPart;

// The part that c leads to, -1: none (RFC 8259, section 6). Digits are bounded, so that numbers end
// and are finite.
static int number_part(int part, bool integer, int count, uint8_t c) {
    bool digit = c >= '0' && c <= '9', whole = part == ZERO || part == WHOLE;
    if (part <= MINUS)
        return digit ? (c == '0' ? ZERO : WHOLE) : part == START && c == '-' ? MINUS : -1;
    if (part == WHOLE && digit) return count < MAX_DIGITS ? WHOLE : -1;
    if (whole && c == '.') return integer ? -1 : POINT;
    if (part == POINT || part == FRACTION)
        if (digit) return count < MAX_DIGITS ? FRACTION : -1;
    if (whole || part == FRACTION) return !integer && (c == 'e' || c == 'E') ? E : -1;
    if (part == E && (c == '+' || c == '-')) return E_SIGN;
    return part >= E && digit && count < MAX_EXPONENT ? EXPONENT : -1;
}

static void step_number(Readings *out, const Reading *t, uint8_t c) {
    bool integer = out->rules->node[t->node].kind == INTEGER;
    int part = number_part(t->at, integer, t->count, c);
    if (part < 0) return;
    Reading next = expecting(t, IN_NUMBER, t->node, part, part == t->at ? t->count + 1 : 1);
    if (part == POINT || part == E || part == E_SIGN || part == MINUS) next.count = 0;
    add(out, &next);
    if (part == ZERO || part == WHOLE || part == FRACTION || part == EXPONENT) leave(out, &next);
}

static const char *member_text(const Rules *u, int i) { return u->text.s + u->member[i].at; }

// The listed values that go on with c lie together, since they are sorted.
static void step_listed(Readings *out, const Reading *t, uint8_t c) {
    const Rules *u = out->rules;
    int from = t->at, to = t->count, i = t->done;
    while (from < to && (u->member[from].length <= i || (uint8_t)member_text(u, from)[i] != c))
        from++;
    int end = from;
    while (end < to && u->member[end].length > i && (uint8_t)member_text(u, end)[i] == c) end++;
    if (from == end) return;
    Reading next = expecting(t, IN_LISTED, t->node, from, end);
    next.done = i + 1;
    if (u->member[from].length == i + 1) leave(out, &next);
    if (u->member[end - 1].length > i + 1) add(out, &next);
}

// ---- lists and objects ----

static bool fits(const Readings *out, int depth, int node) {
    return depth + out->rules->node[node].height <= JSON_DEPTH;
}

// A value of the node begins with c.
static void begin(Readings *out, const Reading *t, int node, uint8_t c) {
    const Node *v = &out->rules->node[node];
    if (!fits(out, t->depth, node)) return;
    Reading next = expecting(t, VALUE, node, 0, 0);
    switch (v->kind) {
    case EITHER:
        for (int i = v->first; i < v->first + v->n; i++)
            begin(out, t, out->rules->member[i].node, c);
        return;
    case OBJECT:
    case MAP:
        next.what = OBJECT_OPEN, next.at = v->first;
        if (c == '{') add(out, &next);
        return;
    case ARRAY:
        next.what = ARRAY_OPEN;
        if (c == '[') add(out, &next);
        return;
    case STRING:
        next.what = IN_STRING;
        if (c == '"') add(out, &next);
        return;
    case LISTED:
        next.at = v->first, next.count = v->first + v->n;
        step_listed(out, &next, c);
        return;
    default:
        step_number(out, &next, c);
    }
}

// The names that may come in t, an object: up to the first that must. With c == '"' they begin;
// with another c nothing is added. Whether there are any.
static bool names(Readings *out, const Reading *t, uint8_t c) {
    const Node *v = &out->rules->node[t->node];
    bool any = false;
    if (v->kind == MAP) {
        Reading key = inside(t, (Frame){COLON, t->node, 0, 0}, IN_STRING, ANY_STRING);
        if (!fits(out, t->depth + 1, v->child)) return false;
        if (c == '"') add(out, &key);
        return true;
    }
    for (int i = t->at; i < v->first + v->n; i++) {
        const Member *m = &out->rules->member[i];
        if (!fits(out, t->depth + 1, m->node)) continue;
        Reading name = expecting(t, NAME, t->node, i, 0);
        name.done = 1;
        if (c == '"') add(out, &name);
        any = true;
        if (m->required) break;
    }
    return any;
}

static bool lacks_none(const Readings *out, const Reading *t) {
    const Node *v = &out->rules->node[t->node];
    for (int i = t->at; v->kind == OBJECT && i < v->first + v->n; i++)
        if (out->rules->member[i].required) return false;
    return true;
}

static void step_object(Readings *out, const Reading *t, uint8_t c) {
    if (blank(out, t, c)) return;
    if (c == '}' && t->what != OBJECT_NEXT && lacks_none(out, t)) leave(out, t);
    if (c == '"' && t->what != OBJECT_MORE) names(out, t, c);
    if (c != ',' || t->what != OBJECT_MORE || !names(out, t, c)) return;
    Reading next = expecting(t, OBJECT_NEXT, t->node, t->at, 0);
    add(out, &next);
}

static void step_name(Readings *out, const Reading *t, uint8_t c) {
    const Member *m = &out->rules->member[t->at];
    if ((uint8_t)member_text(out->rules, t->at)[t->done] != c) return;
    bool last = t->done + 1 == m->length;
    Reading next = expecting(t, last ? COLON : NAME, t->node, t->at, 0);
    if (!last) next.done = t->done + 1;
    add(out, &next);
}

static void step_colon(Readings *out, const Reading *t, uint8_t c) {
    const Node *v = &out->rules->node[t->node];
    if (c != ':') return;
    bool map = v->kind == MAP;
    Frame after = {OBJECT_MORE, t->node, map ? 0 : t->at + 1, 0};
    Reading next = inside(t, after, VALUE, map ? v->child : out->rules->member[t->at].node);
    add(out, &next);
}

static void step_array(Readings *out, const Reading *t, uint8_t c) {
    const Node *v = &out->rules->node[t->node];
    bool opens = t->what == ARRAY_OPEN;
    if (blank(out, t, c)) return;
    if (c == ']' && t->count >= v->min) leave(out, t);
    if ((v->max >= 0 && t->count >= v->max) || !fits(out, t->depth + 1, v->child)) return;
    int count = t->count + (v->max >= 0 || t->count < v->min);
    Reading item = inside(t, (Frame){ARRAY_MORE, t->node, 0, count}, VALUE, v->child);
    if (opens) begin(out, &item, v->child, c);
    if (!opens && c == ',') add(out, &item);
}

// Adds to out what becomes of t with byte c.
static void step(Readings *out, const Reading *t, uint8_t c) {
    switch ((Expected)t->what) {
    case END:
        return;
    case VALUE:
        if (t->depth == 0 || !blank(out, t, c)) begin(out, t, t->node, c);
        return;
    case OBJECT_OPEN:
    case OBJECT_NEXT:
    case OBJECT_MORE:
        step_object(out, t, c);
        return;
    case NAME:
        step_name(out, t, c);
        return;
    case COLON:
        step_colon(out, t, c);
        return;
    case ARRAY_OPEN:
    case ARRAY_MORE:
        step_array(out, t, c);
        return;
    case IN_STRING:
        step_string(out, t, c);
        return;
    case IN_LISTED:
        step_listed(out, t, c);
        return;
    case IN_NUMBER:
        step_number(out, t, c);
        return;
    }
}

// ---- the vocabulary ----

typedef struct {
    const uint8_t *s;
    int n, id;
    int shared;  // bytes that the one before begins with as well
    int chars;   // characters, of those that are nothing but whole ones of a string; else -1
} Piece;

struct Pieces {
    const Tokenizer *tok;
    int vocab, n, n_plain;
    Piece *piece;  // [n] sorted by text, the plain ones first
    int *of;       // [vocab] the piece of each id, -1: none
    Buffer bytes;
    bool alone[256];  // whether a token prints just this byte
};

static int by_bytes(const void *a, const void *b) {
    const Piece *x = a, *y = b;
    if ((x->chars < 0) != (y->chars < 0)) return x->chars < 0 ? 1 : -1;
    int order = memcmp(x->s, y->s, (size_t)min_int(x->n, y->n));
    return order != 0 ? order : x->n != y->n ? x->n - y->n : x->id - y->id;
}

static int plain_chars(const uint8_t *s, int n) {
    int chars = 0, at = PLAIN;
    for (int i = 0; i < n && at >= 0 && at != ESCAPE; i++) {
        chars += at == PLAIN;
        at = at == PLAIN ? after_first(s[i]) : after_tail(at >> 4 & 15, at >> 8, s[i]);
    }
    return at == PLAIN ? chars : -1;
}

// What each id prints goes to p->bytes and p->piece, as tokenizer_stream gives it inside a text.
static int print_pieces(Pieces *p) {
    char text[TOK_STREAM_MAX + 4];
    for (int id = 0; id < p->vocab; id++) {
        TokStream stream = {.started = true};
        p->of[id] = -1;
        if (tokenizer_is_special(p->tok, id) || tokenizer_is_stop(p->tok, id)) continue;
        int n = tokenizer_stream(p->tok, &stream, id, text);
        memcpy(text + n, stream.held, (size_t)stream.n_held);
        n += stream.n_held;
        if (n == 0) continue;
        if (buffer_add(&p->bytes, text, (size_t)n) != 0) return -1;
        p->piece[p->n++] = (Piece){.n = n, .id = id};
    }
    const uint8_t *s = (const uint8_t *)p->bytes.s;
    for (int i = 0; i < p->n; s += p->piece[i++].n) {
        p->piece[i].s = s;
        p->piece[i].chars = plain_chars(s, p->piece[i].n);
        p->n_plain += p->piece[i].chars >= 0;
    }
    return 0;
}

// Every text can be gone on with if each byte that may have to come is a token: ASCII, whatever
// ends a character, and (check_texts) names and listed values.
static int check_bytes(Pieces *p, char *err) {
    for (int i = 0; i < p->n; i++)
        if (p->piece[i].n == 1) p->alone[p->piece[i].s[0]] = true;
    for (int c = 0x20; c < 0xc0; c++)
        if (!p->alone[c] && c != 0x7f)
            return fail(err, "the vocabulary has no token for byte 0x%02x alone: JSON needs it", c);
    return 0;
}

Pieces *pieces_open(const Tokenizer *tok, int vocab, char *err) {
    Pieces *p = calloc(1, sizeof *p);
    if (!p) return fail(err, "out of memory"), NULL;
    p->tok = tok, p->vocab = vocab;
    p->piece = calloc((size_t)vocab, sizeof *p->piece);
    p->of = calloc((size_t)vocab, sizeof *p->of);
    if (!p->piece || !p->of || print_pieces(p) != 0) {
        fail(err, "out of memory for %d pieces", vocab);
        return pieces_close(p), NULL;
    }
    if (check_bytes(p, err) != 0) return pieces_close(p), NULL;
    qsort(p->piece, (size_t)p->n, sizeof *p->piece, by_bytes);
    for (int i = 0; i < p->n; i++) {
        Piece *now = &p->piece[i], *last = now - 1;
        p->of[now->id] = i;
        while (i > 0 && i != p->n_plain && now->shared < min_int(now->n, last->n) &&
               now->s[now->shared] == last->s[now->shared])
            now->shared++;
    }
    return p;
}

void pieces_close(Pieces *p) {
    if (!p) return;
    free(p->piece), free(p->of), free(p->bytes.s);
    free(p);
}

// ---- masks ----

struct Schema {
    const Pieces *pieces;
    Rules rules;
    int words;       // of a mask
    uint64_t *mask;  // [CACHED][words]
    uint64_t key[CACHED];
    bool known[CACHED];
    Reading *pool;  // [cap] readings after each byte of a piece, one stretch after the other
    int cap;
    struct {
        int from, n;
    } level[TOK_STREAM_MAX + 5];
};

static int check_texts(const Schema *s, char *err) {
    for (size_t i = 0; i < s->rules.text.n; i++) {
        uint8_t c = (uint8_t)s->rules.text.s[i];
        if (!s->pieces->alone[c])
            return fail(err,
                        "the vocabulary has no token for byte 0x%02x alone: a text of the "
                        "schema needs it",
                        c);
    }
    return 0;
}

Schema *schema_open(const char *text, size_t n, const Pieces *p, char *err) {
    Schema *s = calloc(1, sizeof *s);
    if (!s) return fail(err, "out of memory"), NULL;
    s->pieces = p, s->words = (p->vocab + 63) / 64;
    if (rules_read(&s->rules, text, n, err) != 0 || check_texts(s, err) != 0)
        return schema_close(s), NULL;
    s->mask = calloc((size_t)CACHED * (size_t)s->words, sizeof *s->mask);
    if (s->mask) return s;
    fail(err, "out of memory for masks of %d tokens", p->vocab);
    return schema_close(s), NULL;
}

size_t constrain_bytes(int vocab) {
    enum { TEXT = 8 };  // bytes of a token
    size_t n = (size_t)vocab;
    return n * (sizeof(Piece) + sizeof(int) + TEXT) + CACHED * ((n + 63) / 64) * sizeof(uint64_t);
}

void schema_close(Schema *s) {
    if (!s) return;
    rules_free(&s->rules);
    free(s->mask), free(s->pool);
    free(s);
}

// The readings of level i + 1 become those of level i with c; returns how many, or -1: no memory.
static int step_level(Schema *s, int i, uint8_t c) {
    int from = s->level[i].from, n = s->level[i].n, to = from + n;
    if (to + MOST > s->cap) {
        Reading *grown = realloc(s->pool, (size_t)(to + 2 * MOST) * sizeof *grown);
        if (!grown) return -1;
        s->pool = grown, s->cap = to + 2 * MOST;
    }
    Readings out = {.rules = &s->rules, .at = s->pool + to};
    for (int t = from; t < to; t++) step(&out, &s->pool[t], c);
    s->level[i + 1].from = to, s->level[i + 1].n = out.n;
    return out.n;
}

// Sets the bits of those of pieces [from, to) that some reading of level 0 takes to their end.
// Returns 0, or -1: no memory.
static int walk(Schema *s, int from, int to, uint64_t *mask) {
    int rejected = TOK_STREAM_MAX + 5;  // this many bytes of the piece before are too many
    for (int i = from; i < to && s->level[0].n > 0; i++) {
        const Piece *p = &s->pieces->piece[i];
        if (p->shared >= rejected) continue;
        rejected = TOK_STREAM_MAX + 5;
        for (int b = p->shared; b < p->n; b++) {
            int n = step_level(s, b, p->s[b]);
            if (n < 0) return -1;
            if (n > 0) continue;
            rejected = b + 1;
            break;
        }
        if (rejected > p->n) mask[p->id / 64] |= 1ull << (p->id % 64);
    }
    return 0;
}

// Puts the readings that are not within a string at level 0 (`all`: those as well); room: how many
// characters a string may still take where it stands between two, -1 where none does.
static int set_level(Schema *s, const Form *f, bool all, int *room) {
    if (s->cap < MOST) {
        free(s->pool);
        s->pool = malloc(2 * MOST * sizeof *s->pool);
        s->cap = s->pool ? 2 * MOST : 0;
        if (!s->pool) return -1;
    }
    *room = -1;
    s->level[0].from = s->level[0].n = 0;
    for (int i = 0; i < f->n; i++) {
        const Reading *t = &f->reading[i];
        bool plain = t->what == IN_STRING && t->at == PLAIN;
        int most = s->rules.node[t->node].max;
        if (plain) *room = max_int(*room, most < 0 ? TOK_STREAM_MAX : most - t->count);
        if (all || !plain) memcpy(&s->pool[s->level[0].n++], t, reading_size(t));
    }
    return 0;
}

static int make_mask(Schema *s, const Form *f, uint64_t *mask) {
    const Pieces *p = s->pieces;
    int room;
    memset(mask, 0, (size_t)s->words * sizeof *mask);
    if (set_level(s, f, false, &room) != 0 || walk(s, 0, p->n_plain, mask) != 0) return -1;
    for (int i = 0; i < p->n_plain; i++)
        if (p->piece[i].chars <= room) mask[p->piece[i].id / 64] |= 1ull << (p->piece[i].id % 64);
    if (set_level(s, f, true, &room) != 0 || walk(s, p->n_plain, p->n, mask) != 0) return -1;
    for (int id = 0; form_may_end(f) && id < p->vocab; id++)
        if (tokenizer_is_stop(p->tok, id)) mask[id / 64] |= 1ull << (id % 64);
    return 0;
}

const uint64_t *form_allowed(const Form *f, char *err) {
    Schema *s = f->schema;
    uint64_t key = HASH_START;
    for (int i = 0; i < f->n; i++)
        key = hash_bytes(key, &f->reading[i], reading_size(&f->reading[i]));
    int slot = (int)((key ^ key >> 32) % CACHED);
    uint64_t *mask = s->mask + (size_t)slot * (size_t)s->words;
    if (s->known[slot] && s->key[slot] == key) return mask;
    s->known[slot] = false;
    if (make_mask(s, f, mask) != 0)
        return fail(err, "out of memory for the tokens of a form"), NULL;
    s->known[slot] = true, s->key[slot] = key;
    return mask;
}

// ---- texts ----

int form_begin(Form *f, Schema *s, char *err) {
    Reading *t = calloc(1, sizeof *t);
    if (!t) return fail(err, "out of memory");
    *t = (Reading){.what = VALUE, .node = s->rules.root};
    *f = (Form){.schema = s, .reading = t, .n = 1};
    return 0;
}

void form_free(Form *f) {
    free(f->reading);
    *f = (Form){0};
}

bool form_may_end(const Form *f) {
    for (int i = 0; i < f->n; i++)
        if (f->reading[i].what == END) return true;
    return false;
}

bool form_is_over(const Form *f) { return f->n == 1 && f->reading[0].what == END; }

int form_take(Form *f, int id, char *err) {
    Schema *s = f->schema;
    const Pieces *p = s->pieces;
    int room, i = 0, piece = id >= 0 && id < p->vocab ? p->of[id] : -1;
    if (tokenizer_is_stop(p->tok, id) && form_may_end(f)) return 0;
    if (piece < 0) return fail(err, "token %d is no part of a JSON text", id);
    if (set_level(s, f, true, &room) != 0) return fail(err, "out of memory");
    for (; i < p->piece[piece].n; i++) {
        int n = step_level(s, i, p->piece[piece].s[i]);
        if (n <= 0)
            return fail(err, n < 0 ? "out of memory" : "token %d does not fit the form", id);
    }
    Reading *kept = malloc((size_t)s->level[i].n * sizeof *kept);
    if (!kept) return fail(err, "out of memory");
    for (int t = 0; t < s->level[i].n; t++)
        memcpy(&kept[t], &s->pool[s->level[i].from + t],
               reading_size(&s->pool[s->level[i].from + t]));
    free(f->reading);
    f->reading = kept, f->n = s->level[i].n;
    return 0;
}
