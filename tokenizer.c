// tokenizer.c: text to token ids and back.
//
// Encoding walks through a text once and cuts it finer at each step:
//   added tokens ("<|im_end|>", runs of newlines) are found first, the longest from the left;
//   what lies between them is a stretch: brought to NFC, or given a leading space, where the model
//     wants that;
//   a byte-level model cuts a stretch into pieces (words, numbers, white space), with hand-written
//     matchers that do what the published regular expressions do;
//   a long piece falls apart into spans where no token reaches across, whatever stands there;
//   a span is merged by rank, the lowest first, the leftmost among equals.
//
// Merges inside a part of a text do not depend on what lies outside, as long as nothing merges
// across its ends. So a sequence of tokens is the encoding of its text exactly when each two
// neighbours, encoded by themselves, stay these two. That is why a long span may be encoded in
// windows that fit into the cache, glued where the neighbours prove the seam. Time is O(n log n)
// whatever the text.
//
// A Tokenizer never changes after opening; what a call needs lives in its Encoder.
#include "tokenizer.h"

#include <limits.h>
#include <stdlib.h>
#include <string.h>

#include "unicode.h"
#include "util.h"

#define NONE UINT32_MAX     // in place of a rank: these two do not merge
#define DROPPED UINT32_MAX  // in place of an id: the vocabulary has nothing for this byte

enum { NORMAL, SPECIAL, USER_DEFINED, BYTE, UNUSED };  // tok.kind
enum { MAX_STOPS = 64, MAX_PIECE = TOK_STREAM_MAX - 4 };
enum { N_CODE_POINTS = 0x110000, N_CCC = 0x20000, METASPACE = 0x2581 };

typedef struct {
    const uint8_t *text;
    int bytes, id;
} Added;

typedef struct {
    const char *name;  // as tokenizer.split spells it
    const uint8_t *(*next)(const Tokenizer *t, const uint8_t *p, const uint8_t *end);
    bool digits_apart;  // every number character is a piece, before `next` sees the text
} Splitter;

// Both hash tables use open addressing: a key lies in the slot that the upper bits of its hash
// name, or in the next free one.
typedef struct {
    uint32_t tag;  // lower half of the hash
    uint32_t id;   // + 1; 0: free
} Word;

struct Tokenizer {
    int n;                   // ids
    const uint8_t *bytes;    // what the ids print, one after the other
    const int32_t *offsets;  // [n + 1] where each id's bytes begin
    const uint8_t *kind;     // [n]

    bool spm;  // SentencePiece: symbols are characters; otherwise they are bytes
    const Splitter *split;
    int nfc, ignore_merges, add_bos;
    int space_prefix;    // 0 never, 1 before every stretch, 2 before a text without one
    int bos_id, unk_id;  // -1: none
    int stop[MAX_STOPS], n_stops;

    Added *added;  // [n_added] special and user-defined tokens, sorted by text
    int n_added;
    int added_from[257];       // where those of each first byte begin
    uint8_t added_kinds[256];  // 1 << kind of each of them

    int byte_id[256];      // token of one byte, with spm the byte-fallback one; -1: none
    int *char_id;          // [N_CODE_POINTS] token of one character, + 1; only with spm
    uint32_t symbol[256];  // what a character of one byte starts as

    const int32_t (*merge)[3];  // left, right, result; the row number is the rank
    uint32_t *pairs;            // [1 << pair_bits] row of merge, + 1, and above it a tag; 0: free
    uint32_t *maybe;            // [1 << pair_bits] x 4 bits, set for the pairs that merge
    int pair_bits, row_bits;
    int32_t *byte_key;  // [256][256] Short.key, at place 0, of two symbols of one byte
    Word *words;        // [1 << word_bits] normal tokens by their text, only with ignore_merges
    int word_bits;
    bool joins[256][256];  // these bytes are neighbours in some token

    uint8_t *class;           // [N_CODE_POINTS + 1] LETTER .. CARE; the last is an invalid byte's
    uint8_t *ccc;             // [N_CCC] canonical combining class, only with nfc
    uint16_t *decomposition;  // [N_CODE_POINTS] see decomposition_row, only with nfc
    ChatTemplate chat;
};

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

typedef struct {
    uint8_t *p;
    size_t n, cap;
} Bytes;

// Room for `more` bytes behind the n there are.
static int bytes_room(Bytes *b, size_t more) {
    if (b->cap - b->n >= more) return 0;
    size_t cap = b->n + more + b->cap / 2 + 64;
    uint8_t *grown = realloc(b->p, cap);
    if (grown == NULL) return -1;
    b->p = grown;
    b->cap = cap;
    return 0;
}

static int bytes_add(Bytes *b, const void *p, size_t n) {
    if (bytes_room(b, n) != 0) return -1;
    if (n > 0) memcpy(b->p + b->n, p, n);
    b->n += n;
    return 0;
}

// ---- characters ----

enum { LETTER = 1, NUMBER = 2, SPACE = 4, CARE = 8 };  // CARE: NFC must look at it
enum { INVALID = N_CODE_POINTS };                      // stands for a byte of no character

// As utf8_get, but a byte that belongs to no character counts as one, INVALID.
static inline int next_char(const uint8_t *p, const uint8_t *end, uint32_t *c) {
    if (*p < 0x80) return *c = *p, 1;
    int len = utf8_get(p, end, c);
    if (len > 0) return len;
    *c = INVALID;
    return 1;
}

// The character that ends at p, NULL when there is none or only an invalid byte.
static const uint8_t *char_before(const uint8_t *p, const uint8_t *start) {
    uint32_t c;
    for (int len = 1; len <= 4 && p - start >= len; len++)
        if (utf8_get(p - len, p, &c) == len) return p - len;
    return NULL;
}

// Skips the characters that have one of the bits in `mask`, or, with has false, none of them.
static inline const uint8_t *skip(const Tokenizer *t, const uint8_t *p, const uint8_t *end,
                                  int mask, bool has) {
    uint32_t c;
    for (;;) {
        while (p < end && *p < 0x80 && ((t->class[*p] & mask) != 0) == has) p++;
        if (p == end || *p < 0x80) return p;
        int len = next_char(p, end, &c);
        if (((t->class[c] & mask) != 0) != has) return p;
        p += len;
    }
}

static void set_class(Tokenizer *t, const UnicodeRange *range, size_t n, int bit) {
    for (; n > 0; n--, range++)
        for (uint32_t c = range->first; c <= range->last; c++) t->class[c] |= (uint8_t)bit;
}

#define LENGTH(array) (sizeof(array) / sizeof *(array))

static int open_classes(Tokenizer *t) {
    t->class = calloc(N_CODE_POINTS + 1, 1);
    if (t->class == NULL) return -1;
    set_class(t, unicode_letters, LENGTH(unicode_letters), LETTER);
    set_class(t, unicode_numbers, LENGTH(unicode_numbers), NUMBER);
    set_class(t, unicode_spaces, LENGTH(unicode_spaces), SPACE);
    return 0;
}

// ---- canonical composition (NFC, Unicode Standard Annex 15) ----
//
// A text without a CARE character is in NFC. Around each one a region is worked on: the character
// before it, and all CARE characters in a row. Nothing else can move or compose. Invalid bytes are
// never part of a region.

enum { HANGUL = 0xac00, N_HANGUL = 11172, JAMO_L = 0x1100, JAMO_V = 0x1161, JAMO_T = 0x11a7 };
enum { N_L = 19, N_V = 21, N_T = 28, SORT_BY_HAND = 24 };

typedef struct {
    uint32_t *c;  // [n] code points of a region
    size_t n, cap;
} Region;

static const UnicodePair *decomposition_row(const Tokenizer *t, uint32_t c) {
    size_t row = t->decomposition[c];
    if (row == 0) return NULL;
    row--;
    return row < LENGTH(unicode_composed) ? &unicode_composed[row]
                                          : &unicode_decomposed[row - LENGTH(unicode_composed)];
}

static int open_nfc(Tokenizer *t) {
    t->ccc = calloc(N_CCC, 1);
    t->decomposition = calloc(N_CODE_POINTS, sizeof *t->decomposition);
    if (t->ccc == NULL || t->decomposition == NULL) return -1;
    for (size_t i = 0; i < LENGTH(unicode_ccc); i++)
        for (uint32_t c = unicode_ccc[i].first; c <= unicode_ccc[i].last; c++) {
            t->ccc[c] = unicode_ccc[i].ccc;
            t->class[c] |= CARE;
        }
    uint16_t row = 1;
    for (size_t i = 0; i < LENGTH(unicode_composed); i++) {
        t->decomposition[unicode_composed[i].whole] = row++;
        t->class[unicode_composed[i].second] |= CARE;
    }
    for (size_t i = 0; i < LENGTH(unicode_decomposed); i++) {
        t->decomposition[unicode_decomposed[i].whole] = row++;
        t->class[unicode_decomposed[i].whole] |= CARE;
    }
    for (int i = 0; i < N_V; i++) t->class[JAMO_V + i] |= CARE;
    for (int i = 1; i < N_T; i++) t->class[JAMO_T + i] |= CARE;
    return 0;
}

static inline uint8_t ccc_of(const Tokenizer *t, uint32_t c) { return c < N_CCC ? t->ccc[c] : 0; }

static int region_add(Region *r, uint32_t c) {
    if (r->n == r->cap) {
        size_t cap = 2 * r->cap + 64;
        uint32_t *grown = realloc(r->c, cap * sizeof *grown);
        if (grown == NULL) return -1;
        r->c = grown;
        r->cap = cap;
    }
    r->c[r->n++] = c;
    return 0;
}

// Appends c taken apart as far as it goes: first parts may come apart again, second parts never do.
static int decompose(const Tokenizer *t, Region *r, uint32_t c) {
    if (c - HANGUL < N_HANGUL) {
        uint32_t s = c - HANGUL, tail = s % N_T;
        if (region_add(r, JAMO_L + s / (N_V * N_T)) != 0) return -1;
        if (region_add(r, JAMO_V + s / N_T % N_V) != 0) return -1;
        return tail == 0 ? 0 : region_add(r, JAMO_T + tail);
    }
    uint32_t second[8];
    int depth = 0;
    for (const UnicodePair *row; depth < 8 && (row = decomposition_row(t, c)) != NULL;
         c = row->first)
        if (row->second != 0) second[depth++] = row->second;
    int status = region_add(r, c);
    while (depth > 0 && status == 0) status = region_add(r, second[--depth]);
    return status;
}

// Puts c[n], all of a class above 0, into the order of their classes; equals stay as they are.
static int sort_marks(const Tokenizer *t, uint32_t *c, size_t n) {
    if (n <= SORT_BY_HAND) {
        for (size_t i = 1; i < n; i++) {
            uint32_t x = c[i];
            size_t j = i;
            for (; j > 0 && ccc_of(t, c[j - 1]) > ccc_of(t, x); j--) c[j] = c[j - 1];
            c[j] = x;
        }
        return 0;
    }
    size_t at[257] = {0};
    uint32_t *sorted = malloc(n * sizeof *sorted);
    if (sorted == NULL) return -1;
    for (size_t i = 0; i < n; i++) at[ccc_of(t, c[i]) + 1]++;
    for (int k = 1; k < 257; k++) at[k] += at[k - 1];
    for (size_t i = 0; i < n; i++) sorted[at[ccc_of(t, c[i])]++] = c[i];
    memcpy(c, sorted, n * sizeof *sorted);
    free(sorted);
    return 0;
}

static int reorder(const Tokenizer *t, Region *r) {
    for (size_t i = 0, from = 0; i <= r->n; i++)
        if (i == r->n || ccc_of(t, r->c[i]) == 0) {
            if (sort_marks(t, r->c + from, i - from) != 0) return -1;
            from = i + 1;
        }
    return 0;
}

// The character that a and b make together, 0 when none.
static uint32_t composed(uint32_t a, uint32_t b) {
    if (a - JAMO_L < N_L && b - JAMO_V < N_V)
        return HANGUL + ((a - JAMO_L) * N_V + (b - JAMO_V)) * N_T;
    if (a - HANGUL < N_HANGUL && (a - HANGUL) % N_T == 0 && b - JAMO_T - 1 < N_T - 1)
        return a + (b - JAMO_T);
    size_t lo = 0, hi = LENGTH(unicode_composed);
    while (lo < hi) {
        size_t mid = (lo + hi) / 2;
        const UnicodePair *row = &unicode_composed[mid];
        if (row->second < b || (row->second == b && row->first < a))
            lo = mid + 1;
        else
            hi = mid;
    }
    bool found = lo < LENGTH(unicode_composed) && unicode_composed[lo].second == b &&
                 unicode_composed[lo].first == a;
    return found ? unicode_composed[lo].whole : 0;
}

// Composes each starter with the marks behind it that no other mark of their class keeps away.
static void compose(const Tokenizer *t, Region *r) {
    size_t n = 0, starter = SIZE_MAX;
    int last = 0;  // class of the last character kept since the starter
    for (size_t i = 0; i < r->n; i++) {
        uint32_t c = r->c[i], whole = 0;
        int ccc = ccc_of(t, c);
        if (starter != SIZE_MAX && (n - 1 == starter || last < ccc))
            whole = composed(r->c[starter], c);
        if (whole != 0) {
            r->c[starter] = whole;
            continue;
        }
        if (ccc == 0) starter = n;
        last = ccc;
        r->c[n++] = c;
    }
    r->n = n;
}

// Appends the region that begins at p, in NFC, to out; returns its end, NULL when memory is out.
static const uint8_t *nfc_region(const Tokenizer *t, Region *r, const uint8_t *p,
                                 const uint8_t *end, Bytes *out) {
    uint32_t c;
    const uint8_t *start = p;
    r->n = 0;
    for (int len; p < end; p += len) {
        len = next_char(p, end, &c);
        if (c == INVALID || (p > start && !(t->class[c] & CARE))) break;
        if (decompose(t, r, c) != 0) return NULL;
    }
    if (reorder(t, r) != 0) return NULL;
    compose(t, r);
    if (bytes_room(out, 4 * r->n) != 0) return NULL;
    for (size_t i = 0; i < r->n; i++) out->n += (size_t)utf8_put(out->p + out->n, r->c[i]);
    return p;
}

// Makes out the NFC of p[n], or leaves it empty when p[n] is in NFC already.
static int to_nfc(const Tokenizer *t, const uint8_t *p, size_t n, Bytes *out) {
    const uint8_t *end = p + n;
    Region r = {0};
    int status = 0;
    out->n = 0;
    while (status == 0) {
        const uint8_t *care = skip(t, p, end, CARE, false);
        if (care == end) break;
        const uint8_t *start = char_before(care, p);
        if (start == NULL) start = care;
        status = bytes_add(out, p, (size_t)(start - p));
        if (status == 0) p = nfc_region(t, &r, start, end, out);
        if (p == NULL) status = -1;
    }
    if (status == 0 && out->n > 0) status = bytes_add(out, p, (size_t)(end - p));
    free(r.c);
    return status;
}

// ---- pieces ----
//
// A splitter gets a text from p to end and returns where its first piece ends.

static inline int class_at(const Tokenizer *t, const uint8_t *p, const uint8_t *end, int *len) {
    uint32_t c;
    *len = next_char(p, end, &c);
    return t->class[c];
}

// Bytes of 's 't 'm 'd 're 've or 'll at p, 0 when none. With fold also in capitals, and with the
// long s, which is an s to a regular expression that ignores case.
static int contraction(const uint8_t *p, const uint8_t *end, bool fold) {
    if (end - p < 2 || *p != '\'') return 0;
    int a = p[1], b = end - p > 2 ? p[2] : 0;
    if (fold && a == 0xc5 && b == 0xbf) return 3;
    if (fold && a >= 'A' && a <= 'Z') a += 'a' - 'A';
    if (fold && b >= 'A' && b <= 'Z') b += 'a' - 'A';
    if (a == 's' || a == 't' || a == 'm' || a == 'd') return 2;
    return ((a == 'r' || a == 'v') && b == 'e') || (a == 'l' && b == 'l') ? 3 : 0;
}

// The end of a piece that begins with white space which nothing better wanted: with newlines, up to
// the last \r or \n of the run (\s*[\r\n]+); else all of the run but the last character, which goes
// to the word behind it (\s+(?!\S)); a single one stands alone (\s+).
static const uint8_t *space_piece(const Tokenizer *t, const uint8_t *p, const uint8_t *end,
                                  bool newlines) {
    const uint8_t *start = p, *last = p, *after_newline = NULL;
    int len;
    for (; p < end && class_at(t, p, end, &len) & SPACE; p += len) {
        last = p;
        if (*p == '\n' || *p == '\r') after_newline = p + 1;
    }
    if (newlines && after_newline != NULL) return after_newline;
    return p == end || last == start ? p : last;
}

// 's|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+
static const uint8_t *gpt2_piece(const Tokenizer *t, const uint8_t *p, const uint8_t *end) {
    int len = contraction(p, end, false);
    if (len > 0) return p + len;
    const uint8_t *q = *p == ' ' && p + 1 < end ? p + 1 : p;
    int class = class_at(t, q, end, &len);
    if (class & LETTER) return skip(t, q + len, end, LETTER, true);
    if (class & NUMBER) return skip(t, q + len, end, NUMBER, true);
    if (!(class & SPACE)) return skip(t, q + len, end, LETTER | NUMBER | SPACE, false);
    return space_piece(t, p, end, false);
}

// (?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,max_digits}
//     | ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+
static inline const uint8_t *gpt4_piece(const Tokenizer *t, const uint8_t *p, const uint8_t *end,
                                        int max_digits) {
    int len = contraction(p, end, true), next_len;
    if (len > 0) return p + len;
    int class = class_at(t, p, end, &len);
    if (class & LETTER) return skip(t, p + len, end, LETTER, true);
    if (class & NUMBER) {
        for (int i = 0; i < max_digits && p < end && class_at(t, p, end, &len) & NUMBER; i++)
            p += len;
        return p;
    }
    const uint8_t *q = p + len;
    int next = q < end ? class_at(t, q, end, &next_len) : SPACE;
    if (next & LETTER && *p != '\r' && *p != '\n') return skip(t, q + next_len, end, LETTER, true);
    if (!(class & SPACE) || (*p == ' ' && !(next & (LETTER | NUMBER | SPACE)))) {
        q = skip(t, q, end, LETTER | NUMBER | SPACE, false);
        while (q < end && (*q == '\r' || *q == '\n')) q++;
        return q;
    }
    return space_piece(t, p, end, true);
}

static const uint8_t *llama3_piece(const Tokenizer *t, const uint8_t *p, const uint8_t *end) {
    return gpt4_piece(t, p, end, 3);
}

static const uint8_t *qwen2_piece(const Tokenizer *t, const uint8_t *p, const uint8_t *end) {
    return gpt4_piece(t, p, end, 1);
}

static const uint8_t *whole_piece(const Tokenizer *t, const uint8_t *p, const uint8_t *end) {
    (void)t, (void)p;
    return end;
}

static const Splitter splitters[] = {
    {"none", whole_piece, false},                                        // SentencePiece
    {"gpt2", gpt2_piece, false},     {"digits+gpt2", gpt2_piece, true},  // SmolLM2
    {"llama3", llama3_piece, false}, {"qwen2", qwen2_piece, false},      // and Qwen3
};

// ---- merging ----
//
// A window is a span, or a part of a long one, that is encoded by itself. Its symbols are
// characters or bytes at first, tokens in the end.

enum { WINDOW = 48, PLACES = 64, MAX_ROUNDS = 64, MAX_WINDOW = 1 << 28 };
enum { NO_KEY = INT32_MAX / PLACES * PLACES };

typedef struct {
    uint32_t id;
    uint32_t rank;  // of the merge with the symbol to the right, or NONE
    uint32_t at;    // byte of the window where it begins
} Symbol;

typedef struct {
    Symbol *s;  // [n]
    int n;
    size_t cap;
} Window;

// Odd, and no simple ratio: 2^64 / golden ratio, and a prime of xxHash.
#define HASH_A 0x9e3779b97f4a7c15u
#define HASH_B 0xc2b2ae3d27d4eb4fu

static inline uint64_t pair_hash(uint32_t left, uint32_t right) {
    return left * HASH_A + right * HASH_B;
}

static inline uint32_t pair_rank(const Tokenizer *t, uint32_t left, uint32_t right) {
    uint64_t hash = pair_hash(left, right);
    uint32_t bit = (uint32_t)(hash >> (62 - t->pair_bits)), tag = (uint32_t)hash >> t->row_bits;
    if (!(t->maybe[bit >> 5] >> (bit & 31) & 1)) return NONE;  // 3 of 4 searches end here
    for (uint32_t i = bit >> 2;; i = (i + 1) & ((1u << t->pair_bits) - 1)) {
        uint32_t slot = t->pairs[i];
        if (slot == 0) return NONE;
        if (slot >> t->row_bits != tag) continue;
        uint32_t row = (slot & ((1u << t->row_bits) - 1)) - 1;
        if ((uint32_t)t->merge[row][0] == left && (uint32_t)t->merge[row][1] == right) return row;
    }
}

// The symbols that one character starts as: its token, else its bytes' tokens, else the unknown
// token. Without all three it is one symbol DROPPED, which never merges and never comes out.
static inline int char_symbols(const Tokenizer *t, const uint8_t *p, int len, uint32_t c,
                               uint32_t *ids) {
    if (c < 0x80) return ids[0] = t->symbol[c], 1;
    int n = 0, id = c == INVALID ? 0 : t->char_id[c == METASPACE ? ' ' : c];
    if (id > 0) return ids[0] = (uint32_t)id - 1, 1;
    for (; n < len && t->byte_id[p[n]] >= 0; n++) ids[n] = (uint32_t)t->byte_id[p[n]];
    return n == len ? n : (ids[0] = (uint32_t)t->unk_id, 1);
}

// -- up to PLACES symbols --

// Rank and place of a pair make one number, rank * PLACES + place, and the least of all is merged
// next. A symbol that went into its left neighbour leaves a hole. Place PLACES is outside.
typedef struct {
    int n;  // places
    uint32_t id[PLACES + 1];
    uint8_t at[PLACES];       // byte where each symbol begins
    int32_t key[PLACES + 1];  // NO_KEY or more: does not merge with its right neighbour
    uint8_t left[PLACES + 1], right[PLACES + 1];
} Short;

static inline void set_key(const Tokenizer *t, Short *s, int left, int right) {
    uint32_t rank = pair_rank(t, s->id[left], s->id[right]);
    s->key[left] = rank == NONE ? NO_KEY : (int32_t)(rank * PLACES) + left;
}

static inline int32_t smaller(int32_t a, int32_t b) { return a < b ? a : b; }

// The smallest of the first n keys, rounded up to a multiple of 8. Written so that compilers make
// vectors of it.
static inline int32_t least(const int32_t *key, int n) {
    int32_t low[8];
    memcpy(low, key, sizeof low);
    for (int i = 8; i < n; i += 8)
        for (int j = 0; j < 8; j++) low[j] = smaller(low[j], key[i + j]);
    for (int j = 0; j < 4; j++) low[j] = smaller(low[j], low[j + 4]);
    return smaller(smaller(low[0], low[1]), smaller(low[2], low[3]));
}

static void short_characters(const Tokenizer *t, Short *s, const uint8_t *p, size_t n) {
    uint32_t c;
    for (size_t i = 0, len; i < n; i += len) {
        len = (size_t)next_char(p + i, p + n, &c);
        int k = char_symbols(t, p + i, (int)len, c, s->id + s->n);
        for (int j = 0; j < k; j++) s->at[s->n++] = (uint8_t)(i + (size_t)j);
    }
    for (int i = 0; i + 1 < s->n; i++) {
        uint8_t a = p[s->at[i]], b = p[s->at[i + 1]];
        if ((a | b) < 0x80)
            s->key[i] = t->byte_key[a << 8 | b] + i;
        else
            set_key(t, s, i, i + 1);
    }
}

// Fills s with the symbols of p[n], n from 1 to PLACES.
static inline void short_symbols(const Tokenizer *t, Short *s, const uint8_t *p, size_t n) {
    for (int i = 0; i < PLACES; i++) {
        s->key[i] = NO_KEY;
        s->at[i] = (uint8_t)i;
        s->left[i] = (uint8_t)(i - 1);
        s->right[i] = (uint8_t)(i + 1);
    }
    s->left[0] = PLACES;
    s->n = 0;
    if (t->spm) {
        short_characters(t, s, p, n);
    } else {
        int last = (int)n - 1;
        for (int i = 0; i < last; i++) {
            s->id[i] = t->symbol[p[i]];
            s->key[i] = t->byte_key[p[i] << 8 | p[i + 1]] + i;
        }
        s->id[last] = t->symbol[p[last]];
        s->n = (int)n;
    }
    s->id[s->n] = s->id[PLACES] = DROPPED;  // what lies outside merges with nothing
}

static inline void merge_short(const Tokenizer *t, Short *s) {
    for (int32_t next; (next = least(s->key, s->n)) < NO_KEY;) {
        int i = next % PLACES, j = s->right[i], after = s->right[j];
        s->id[i] = (uint32_t)t->merge[next / PLACES][2];
        s->key[j] = NO_KEY;
        s->right[i] = (uint8_t)after;
        s->left[after] = (uint8_t)i;
        set_key(t, s, i, after);
        set_key(t, s, s->left[i], i);
    }
}

// -- more than that: round after round, each over the whole window --

// Merges all pairs of this rank in s[n], from s[first] on; returns how many symbols are left. Stops
// merging when a new pair has to go before the rest.
static int merge_round(const Tokenizer *t, Symbol *s, int n, int first, uint32_t rank) {
    int to = first;
    bool more = true;
    for (int from = first; from < n; to++) {
        s[to] = s[from++];
        if (s[to].rank != rank || !more) continue;
        s[to].id = (uint32_t)t->merge[rank][2];
        from++;
        s[to].rank = from < n ? pair_rank(t, s[to].id, s[from].id) : NONE;
        if (to > 0) s[to - 1].rank = pair_rank(t, s[to - 1].id, s[to].id);
        more = s[to].rank > rank && (to == 0 || s[to - 1].rank > rank);
    }
    return to;
}

// A run of one letter needs few rounds, however long it is. Returns false when MAX_ROUNDS were not
// enough.
static bool merge_rounds(const Tokenizer *t, Window *w) {
    for (int round = 0; round < MAX_ROUNDS; round++) {
        uint32_t rank = NONE;
        int first = 0;
        for (int i = 0; i + 1 < w->n; i++)
            if (w->s[i].rank < rank) rank = w->s[i].rank, first = i;
        if (rank == NONE) return true;
        w->n = merge_round(t, w->s, w->n, first, rank);
    }
    return false;
}

// -- when rounds don't end: a heap of pairs, which keeps the worst case at O(n log n) --

typedef struct {
    uint64_t *key;  // [n] rank << 32 | place; the least on top
    size_t n;
    uint32_t *left, *right;  // neighbours of each symbol
} Queue;

static void queue_push(Queue *q, uint32_t rank, uint32_t place) {
    if (rank == NONE) return;
    uint64_t key = (uint64_t)rank << 32 | place;
    size_t i = q->n++;
    for (; i > 0 && q->key[(i - 1) / 2] > key; i = (i - 1) / 2) q->key[i] = q->key[(i - 1) / 2];
    q->key[i] = key;
}

static uint64_t queue_pop(Queue *q) {
    uint64_t top = q->key[0], key = q->key[--q->n];
    size_t i = 0;
    for (size_t child; (child = 2 * i + 1) < q->n; i = child) {
        if (child + 1 < q->n && q->key[child + 1] < q->key[child]) child++;
        if (q->key[child] >= key) break;
        q->key[i] = q->key[child];
    }
    q->key[i] = key;
    return top;
}

static void merge_queued(const Tokenizer *t, Window *w, Queue *q) {
    uint32_t n = (uint32_t)w->n;
    Symbol *s = w->s;
    for (uint32_t i = 0; i < n; i++) {
        q->left[i] = i - 1;
        q->right[i] = i + 1;
        queue_push(q, s[i].rank, i);
    }
    while (q->n > 0) {
        uint64_t key = queue_pop(q);
        uint32_t i = (uint32_t)key, rank = (uint32_t)(key >> 32), j = q->right[i];
        if (s[i].rank != rank) continue;  // merged meanwhile, or its neighbour was
        uint32_t before = q->left[i], after = q->right[j];
        s[i].id = (uint32_t)t->merge[rank][2];
        s[j].rank = NONE;
        q->right[i] = after;
        if (after < n) q->left[after] = i;
        s[i].rank = after < n ? pair_rank(t, s[i].id, s[after].id) : NONE;
        queue_push(q, s[i].rank, i);
        if (i == 0) continue;
        s[before].rank = pair_rank(t, s[before].id, s[i].id);
        queue_push(q, s[before].rank, before);
    }
    w->n = 0;
    for (uint32_t i = 0; i < n; i = q->right[i]) s[w->n++] = s[i];
}

// Every symbol enters with its pair, and every merge makes at most two pairs: 3n keys suffice.
static int merge_window(const Tokenizer *t, Window *w) {
    if (merge_rounds(t, w)) return 0;
    size_t n = (size_t)w->n;
    Queue q = {malloc(3 * n * sizeof *q.key), 0, malloc(n * sizeof *q.left),
               malloc(n * sizeof *q.right)};
    bool ok = q.key != NULL && q.left != NULL && q.right != NULL;
    if (ok) merge_queued(t, w, &q);
    free(q.key);
    free(q.left);
    free(q.right);
    return ok ? 0 : -1;
}

// ---- spans ----

enum { KNOWN_BITS = 12, MAX_KNOWN = 3, WORTH_KNOWING = 4096 };

typedef struct {
    uint64_t key[2];  // a word of up to 15 bytes, and its length
    int n;
    uint32_t id[MAX_KNOWN];
} Known;

typedef struct {
    const Tokenizer *t;
    Ids *out;
    Known *known;                   // [1 << KNOWN_BITS], NULL for a short text
    const uint8_t *end, *text_end;  // of the readable bytes: of this stretch's buffer, of the text
    int stretch;                    // out->n where the current stretch began
    Window now, next, seam;
    Bytes nfc, spaced;  // the current stretch, rewritten
} Encoder;

static int window_room(Window *w, size_t n) {
    if (n <= w->cap) return 0;
    size_t cap = n < PLACES ? PLACES : n;
    Symbol *grown = n > MAX_WINDOW ? NULL : realloc(w->s, cap * sizeof *grown);
    if (grown == NULL) return -1;
    w->s = grown;
    w->cap = cap;
    return 0;
}

static void window_symbols(const Tokenizer *t, Window *w, const uint8_t *p, size_t n) {
    uint32_t c, ids[4];
    w->n = 0;
    for (size_t i = 0, len = 1; i < n; i += len) {
        int k = 1;
        ids[0] = t->symbol[p[i]];
        if (t->spm) {
            len = (size_t)next_char(p + i, p + n, &c);
            k = char_symbols(t, p + i, (int)len, c, ids);
        }
        for (int j = 0; j < k; j++)
            w->s[w->n++] = (Symbol){ids[j], NONE, (uint32_t)i + (uint32_t)j};
    }
    for (int i = 0; i + 1 < w->n; i++) w->s[i].rank = pair_rank(t, w->s[i].id, w->s[i + 1].id);
}

// Encodes p[n] by itself into w.
static int encode_window(const Tokenizer *t, Window *w, const uint8_t *p, size_t n) {
    Short s;
    if (window_room(w, n) != 0) return -1;
    if (n > PLACES) {
        window_symbols(t, w, p, n);
        return merge_window(t, w);
    }
    short_symbols(t, &s, p, n);
    merge_short(t, &s);
    w->n = 0;
    for (int i = 0; i < s.n; i = s.right[i]) w->s[w->n++] = (Symbol){s.id[i], NONE, s.at[i]};
    return 0;
}

// Several unknown characters in a row are one unknown token.
static inline int push_symbol(Encoder *e, uint32_t symbol) {
    int id = (int)symbol, last = e->out->n - 1;
    if (symbol == DROPPED) return 0;
    if (id == e->t->unk_id && e->t->spm && last >= e->stretch && e->out->id[last] == id) return 0;
    return ids_push(e->out, id);
}

static int push_symbols(Encoder *e, const Symbol *s, int n) {
    for (int i = 0; i < n; i++)
        if (push_symbol(e, s[i].id) != 0) return -1;
    return 0;
}

// The first `size` bytes of p[n], some more when a character would be cut.
static size_t window_bytes(const uint8_t *p, size_t n, size_t size) {
    if (size >= n) return n;
    for (int i = 0; i < 3 && size < n && (p[size] & 0xc0) == 0x80; i++) size++;
    return size;
}

// Do the tokens a and b, which are neighbours and all of p[n], stay as they are without the rest?
static int stay_apart(Encoder *e, const uint8_t *p, size_t n, uint32_t a, uint32_t b) {
    if (encode_window(e->t, &e->seam, p, n) != 0) return -1;
    return e->seam.n == 2 && e->seam.s[0].id == a && e->seam.s[1].id == b;
}

// Looks near the end of e->now for the last token to keep of it: what begins behind that one is
// encoded as the next window, and has to begin with a token that stays apart from it.
// Returns the tokens to keep, 0 when the window is too short, -1 when memory is out.
static int glue(Encoder *e, const uint8_t *p, size_t n, size_t size, size_t *next_size) {
    const Symbol *s = e->now.s;
    for (int keep = e->now.n - 1; keep > 0 && keep > e->now.n - 4; keep--) {
        size_t from = s[keep - 1].at, at = s[keep].at;
        if (at < size - size / 4) return 0;
        *next_size = window_bytes(p + at, n - at, size);
        if (encode_window(e->t, &e->next, p + at, *next_size) != 0) return -1;
        size_t to = at + (e->next.n > 1 ? e->next.s[1].at : *next_size);
        int apart = stay_apart(e, p + from, to - from, s[keep - 1].id, e->next.s[0].id);
        if (apart != 0) return apart < 0 ? -1 : keep;
    }
    return 0;
}

static int encode_long(Encoder *e, const uint8_t *p, size_t n) {
    size_t size = window_bytes(p, n, WINDOW), next_size = 0;
    if (encode_window(e->t, &e->now, p, size) != 0) return -1;
    while (size < n) {
        int keep = glue(e, p, n, size, &next_size);
        if (keep < 0) return -1;
        if (keep == 0) {
            size = window_bytes(p, n, 2 * size);
            if (encode_window(e->t, &e->now, p, size) != 0) return -1;
            continue;
        }
        if (push_symbols(e, e->now.s, keep) != 0) return -1;
        p += e->now.s[keep].at;
        n -= e->now.s[keep].at;
        size = next_size;
        Window swap = e->now;
        e->now = e->next;
        e->next = swap;
    }
    return push_symbols(e, e->now.s, e->now.n);
}

static int encode_short(Encoder *e, const uint8_t *p, size_t n) {
    Short s;
    short_symbols(e->t, &s, p, n);
    merge_short(e->t, &s);
    for (int i = 0; i < s.n; i = s.right[i])
        if (push_symbol(e, s.id[i]) != 0) return -1;
    return 0;
}

// ---- pieces to ids ----

static uint64_t text_hash(const uint8_t *p, size_t n) {
    uint64_t h = n, x;
    for (; n >= 8; p += 8, n -= 8) {
        memcpy(&x, p, 8);
        h = (h ^ x) * HASH_A;
        h ^= h >> 32;
    }
    for (x = 0; n > 0; n--) x = x << 8 | p[n - 1];
    h = (h ^ x) * HASH_A;
    return (h ^ h >> 29) * HASH_B;
}

// The id that prints p[n], -1 when none does.
static int word_id(const Tokenizer *t, const uint8_t *p, size_t n) {
    uint64_t hash = text_hash(p, n);
    uint32_t last = (1u << t->word_bits) - 1;
    for (uint32_t i = (uint32_t)(hash >> (64 - t->word_bits));; i = (i + 1) & last) {
        int id = (int)t->words[i].id - 1;
        if (id < 0) return -1;
        if (t->words[i].tag != (uint32_t)hash) continue;
        size_t bytes = (size_t)(t->offsets[id + 1] - t->offsets[id]);
        if (bytes == n && memcmp(t->bytes + t->offsets[id], p, n) == 0) return id;
    }
}

// p[n] with its length, as two numbers; p has 16 readable bytes, n is below 16.
static inline void word_key(uint64_t *key, const uint8_t *p, size_t n) {
    memcpy(key, p, 16);
    if (n < 8)
        key[0] &= ((uint64_t)1 << 8 * n) - 1, key[1] = 0;
    else
        key[1] &= ((uint64_t)1 << 8 * (n - 8)) - 1;
    key[1] |= (uint64_t)n << 56;
}

// A piece or span of at most PLACES bytes. Words come again: the last ones seen are remembered.
static int encode_word(Encoder *e, const uint8_t *p, size_t n) {
    uint64_t key[2];
    Known *known = NULL;
    int from = e->out->n, id = -1;
    if (e->known != NULL && n < 16 && e->end - p >= 16) {
        word_key(key, p, n);
        known = &e->known[(key[0] * HASH_A + key[1] * HASH_B) >> (64 - KNOWN_BITS)];
        if (known->key[0] == key[0] && known->key[1] == key[1]) {
            for (int i = 0; i < known->n; i++)
                if (push_symbol(e, known->id[i]) != 0) return -1;
            return 0;
        }
    }
    if (e->t->ignore_merges) id = word_id(e->t, p, n);
    if ((id >= 0 ? ids_push(e->out, id) : encode_short(e, p, n)) != 0) return -1;
    int ids = e->out->n - from;
    if (known == NULL || ids > MAX_KNOWN) return 0;
    *known = (Known){{key[0], key[1]}, ids, {0}};
    memcpy(known->id, e->out->id + from, (size_t)ids * sizeof *known->id);
    return 0;
}

static int encode_span(Encoder *e, const uint8_t *p, size_t n) {
    if (n > PLACES) return encode_long(e, p, n);
    return e->t->spm ? encode_word(e, p, n) : encode_short(e, p, n);
}

static int encode_piece(Encoder *e, const uint8_t *p, size_t n) {
    const Tokenizer *t = e->t;
    if (n == 1) return push_symbol(e, t->symbol[*p]);
    if (n <= PLACES && !t->spm) return encode_word(e, p, n);
    if (t->ignore_merges) {
        int id = word_id(t, p, n);
        if (id >= 0) return ids_push(e->out, id);
    }
    size_t from = 0;
    for (size_t i = 1; i < n; i++)
        if (!t->joins[p[i - 1]][p[i]]) {
            if (encode_span(e, p + from, i - from) != 0) return -1;
            from = i;
        }
    return encode_span(e, p + from, n - from);
}

static int encode_pieces(Encoder *e, const uint8_t *p, const uint8_t *end) {
    const Splitter *split = e->t->split;
    while (p < end) {
        const uint8_t *part = end, *next;  // what the splitter sees at once
        if (split->digits_apart) {
            int len;
            bool digit = class_at(e->t, p, end, &len) & NUMBER;
            part = digit ? p + len : skip(e->t, p, end, NUMBER, false);
        }
        for (; p < part; p = next) {
            next = split->next(e->t, p, part);
            if (encode_piece(e, p, (size_t)(next - p)) != 0) return -1;
        }
    }
    return 0;
}

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
        if (to_nfc(t, p, n, &e->nfc) != 0) return -1;
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
    free(e.known);
    free(e.now.s);
    free(e.next.s);
    free(e.seam.s);
    free(e.nfc.p);
    free(e.spaced.p);
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

// A token whose text is one byte or one character is what such a symbol starts as; the first of
// several, and a normal one before an added one.
static void open_symbol(Tokenizer *t, int id, const uint8_t *p, int n) {
    uint32_t c;
    if (n == 1 && t->kind[id] == (t->spm ? BYTE : NORMAL) && t->byte_id[*p] < 0)
        t->byte_id[*p] = id;
    if (!t->spm || t->kind[id] == BYTE || utf8_get(p, p + n, &c) != n) return;
    int *known = &t->char_id[c == METASPACE ? ' ' : c];
    if (*known == 0 || (t->kind[id] == NORMAL && t->kind[*known - 1] != NORMAL)) *known = id + 1;
}

// With characters for symbols, bytes of one character hold together, and a space is as good as
// U+2581.
static void open_spm_joins(Tokenizer *t) {
    for (int a = 0x80; a < 256; a++) memset(&t->joins[a][0x80], true, 0x40);
    for (int a = 0; a < 256; a++) t->joins[a][' '] = t->joins[a][0xe2] |= t->joins[a][' '];
    for (int b = 0; b < 256; b++) t->joins[' '][b] = t->joins[0x81][b] |= t->joins[' '][b];
}

static int open_symbols(Tokenizer *t) {
    if (t->spm && (t->char_id = calloc(N_CODE_POINTS, sizeof *t->char_id)) == NULL) return -1;
    for (int b = 0; b < 256; b++) t->byte_id[b] = -1;
    for (int id = 0; id < t->n; id++) {
        int n;
        const uint8_t *p = (const uint8_t *)tokenizer_piece(t, id, &n);
        if (n == 0 || t->kind[id] == SPECIAL || t->kind[id] == UNUSED) continue;
        if (n <= 4) open_symbol(t, id, p, n);
        for (int i = 1; i < n; i++) t->joins[p[i - 1]][p[i]] = true;
    }
    if (t->spm) open_spm_joins(t);
    for (int b = 0; b < 256; b++) {
        int id = t->spm && b < 0x80 && t->char_id[b] > 0 ? t->char_id[b] - 1 : t->byte_id[b];
        t->symbol[b] = (uint32_t)(id >= 0 ? id : t->unk_id);
    }
    return 0;
}

// Tables of 2^bits slots are at most three quarters full.
static int table_bits(int n) {
    int bits = 4;
    while ((int64_t)3 << bits < 4 * (int64_t)n) bits++;
    return bits;
}

static void add_pair(Tokenizer *t, uint32_t left, uint32_t right, int row) {
    uint64_t hash = pair_hash(left, right);
    uint32_t bit = (uint32_t)(hash >> (62 - t->pair_bits)), i = bit >> 2;
    while (t->pairs[i] != 0) i = (i + 1) & ((1u << t->pair_bits) - 1);
    t->pairs[i] = (uint32_t)hash >> t->row_bits << t->row_bits | (uint32_t)(row + 1);
    t->maybe[bit >> 5] |= 1u << (bit & 31);
}

// A merge that would make a special token is left out: no text becomes one.
static int open_merges(Tokenizer *t, const TensorFile *f, char *err) {
    const Tensor *merges = tensors_get(f, err, "tok.merges", T_I32, 2, -1, 3);
    if (merges == NULL) return -1;
    if (merges->shape[0] >= NO_KEY / PLACES)
        return fail(err, "tensor tok.merges: %zu rows are too many", merges->shape[0]);
    int rows = (int)merges->shape[0];
    uint32_t n = (uint32_t)t->n;
    t->merge = merges->data;
    t->pair_bits = table_bits(rows);
    while (rows >> t->row_bits != 0) t->row_bits++;
    t->pairs = calloc((size_t)1 << t->pair_bits, sizeof *t->pairs);
    t->maybe = calloc((size_t)1 << (t->pair_bits - 3), sizeof *t->maybe);
    t->byte_key = malloc(65536 * sizeof *t->byte_key);
    if (t->pairs == NULL || t->maybe == NULL || t->byte_key == NULL) return no_memory(err);
    for (int i = 0; i < rows; i++) {
        const int32_t *row = t->merge[i];
        if ((uint32_t)row[0] >= n || (uint32_t)row[1] >= n || (uint32_t)row[2] >= n)
            return fail(err, "tok.merges: row %d holds an id that is not below %d", i, t->n);
        if (t->kind[row[2]] != SPECIAL) add_pair(t, (uint32_t)row[0], (uint32_t)row[1], i);
    }
    for (int ab = 0; ab < 65536; ab++) {
        uint32_t rank = NONE;
        if (t->joins[ab >> 8][ab & 255])
            rank = pair_rank(t, t->symbol[ab >> 8], t->symbol[ab & 255]);
        t->byte_key[ab] = rank == NONE ? NO_KEY : (int32_t)(rank * PLACES);
    }
    return 0;
}

static int open_words(Tokenizer *t) {
    t->word_bits = table_bits(t->n);
    t->words = calloc((size_t)1 << t->word_bits, sizeof *t->words);
    if (t->words == NULL) return -1;
    for (int id = 0; id < t->n; id++) {
        int n;
        const uint8_t *p = (const uint8_t *)tokenizer_piece(t, id, &n);
        if (t->kind[id] != NORMAL || n == 0) continue;
        uint64_t hash = text_hash(p, (size_t)n);
        uint32_t i = (uint32_t)(hash >> (64 - t->word_bits)), last = (1u << t->word_bits) - 1;
        while (t->words[i].id != 0) i = (i + 1) & last;
        t->words[i] = (Word){(uint32_t)hash, (uint32_t)id + 1};
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
    for (size_t i = 0; split != NULL && i < LENGTH(splitters); i++)
        if (strcmp(split, splitters[i].name) == 0) t->split = &splitters[i];
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
    if (open_classes(t) != 0 || open_symbols(t) != 0 || open_added(t) != 0) return no_memory(err);
    if (open_merges(t, f, err) != 0) return -1;
    if ((t->nfc && open_nfc(t) != 0) || (t->ignore_merges && open_words(t) != 0))
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
