// pretokenize.c: a stretch of text in NFC, and the pieces (words, numbers, white space) that it is
// cut into before merging, with hand-written matchers that do what the published regular
// expressions do.
#include "unicode.h"
#include "vocabulary.h"

// ---- character classes ----

static void set_class(Tokenizer *t, const UnicodeRange *range, size_t n, int bit) {
    for (; n > 0; n--, range++)
        for (uint32_t c = range->first; c <= range->last; c++) t->class[c] |= (uint8_t)bit;
}

static void set_cases(Tokenizer *t) {
    set_class(t, unicode_letters, LENGTH(unicode_letters), UPPER | LOWER);
    set_class(t, unicode_marks, LENGTH(unicode_marks), UPPER | LOWER);
    for (size_t i = 0; i < LENGTH(unicode_upper); i++)
        for (uint32_t c = unicode_upper[i].first; c <= unicode_upper[i].last; c++)
            t->class[c] &= (uint8_t)~LOWER;
    for (size_t i = 0; i < LENGTH(unicode_lower); i++)
        for (uint32_t c = unicode_lower[i].first; c <= unicode_lower[i].last; c++)
            t->class[c] &= (uint8_t)~UPPER;
}

int classes_open(Tokenizer *t) {
    t->class = calloc(N_CODE_POINTS + 1, 1);
    if (t->class == NULL) return -1;
    set_class(t, unicode_letters, LENGTH(unicode_letters), LETTER);
    set_class(t, unicode_numbers, LENGTH(unicode_numbers), NUMBER | DIGIT);
    set_class(t, unicode_later_numbers, LENGTH(unicode_later_numbers), DIGIT);
    set_class(t, unicode_spaces, LENGTH(unicode_spaces), SPACE);
    if (t->split && t->split->marks) set_class(t, unicode_marks, LENGTH(unicode_marks), LETTER);
    if (t->split && t->split->cases) set_cases(t);
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

int nfc_open(Tokenizer *t) {
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

int nfc_make(const Tokenizer *t, const uint8_t *p, size_t n, Bytes *out) {
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

// The end of U*L+ at p, U and L being characters that are UPPER and LOWER; NULL where there is
// none. A run of U that no L follows ends behind its last character that is both.
static const uint8_t *lower_word(const Tokenizer *t, const uint8_t *p, const uint8_t *end) {
    const uint8_t *both = NULL;
    int len = 0, class = 0;
    while (p < end && (class = class_at(t, p, end, &len)) & UPPER) {
        p += len;
        if (class & LOWER) both = p;
    }
    return p < end && class & LOWER ? skip(t, p, end, LOWER, true) : both;
}

// With U = [\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}] and L = [\p{Ll}\p{Lm}\p{Lo}\p{M}]
// [^\r\n\p{L}\p{N}]?U*L+(?i:'s|'t|'re|'ve|'m|'ll|'d)?|[^\r\n\p{L}\p{N}]?U+L*(?i:'s|..|'d)?
//     |\p{N}{1,max_digits}| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+
// contracts: with the contractions.
static inline const uint8_t *case_piece(const Tokenizer *t, const uint8_t *p, const uint8_t *end,
                                        int max_digits, bool contracts) {
    int len, next_len, class = class_at(t, p, end, &len);
    const uint8_t *q = p + len, *word = NULL, *first = class & LETTER ? p : q;
    bool may_precede = !(class & (LETTER | NUMBER)) && *p != '\r' && *p != '\n';
    if (may_precede) word = lower_word(t, q, end);
    if (!word) word = lower_word(t, p, end);
    if (!word && (may_precede || class & LETTER)) {
        word = skip(t, first, end, UPPER, true);
        if (word == first) word = NULL;
    }
    if (word) return contracts ? word + contraction(word, end, true) : word;
    if (class & NUMBER) {
        for (int i = 0; i < max_digits && p < end && class_at(t, p, end, &len) & NUMBER; i++)
            p += len;
        return p;
    }
    int next = q < end ? class_at(t, q, end, &next_len) : SPACE;
    if (!(class & SPACE) || (*p == ' ' && !(next & (LETTER | NUMBER | SPACE)))) {
        q = skip(t, q, end, LETTER | NUMBER | SPACE, false);
        while (q < end && (*q == '\r' || *q == '\n' || *q == '/')) q++;
        return q;
    }
    return space_piece(t, p, end, true);
}

static const uint8_t *o200k_piece(const Tokenizer *t, const uint8_t *p, const uint8_t *end) {
    return case_piece(t, p, end, 3, true);
}

static const uint8_t *tekken_piece(const Tokenizer *t, const uint8_t *p, const uint8_t *end) {
    return case_piece(t, p, end, 1, false);
}

static bool space_at(const uint8_t *p, const uint8_t *end) {
    return *p == ' ' || (end - p >= 3 && memcmp(p, "\xe2\x96\x81", 3) == 0);
}

// Each space, U+2581 included, begins a piece.
static const uint8_t *word_piece(const Tokenizer *t, const uint8_t *p, const uint8_t *end) {
    (void)t;
    do p++;
    while (p < end && !space_at(p, end));
    return p;
}

static const uint8_t *whole_piece(const Tokenizer *t, const uint8_t *p, const uint8_t *end) {
    (void)t, (void)p;
    return end;
}

static const Splitter splitters[] = {
    {.name = "words", .next = word_piece},  // SentencePiece
    {.name = "none", .next = whole_piece},
    {.name = "gpt2", .next = gpt2_piece},
    {.name = "digits+gpt2", .next = gpt2_piece, .digits_apart = true},  // SmolLM2
    {.name = "llama3", .next = llama3_piece},
    {.name = "qwen2", .next = qwen2_piece},  // and Qwen3
    // [\p{L}\p{M}] for \p{L}, but in what may precede one
    {.name = "qwen35", .next = qwen2_piece, .marks = true},
    {.name = "o200k", .next = o200k_piece, .cases = true},    // gpt-oss, Llama 4
    {.name = "tekken", .next = tekken_piece, .cases = true},  // Mistral
};

const Splitter *splitter_find(const char *name) {
    for (size_t i = 0; i < LENGTH(splitters); i++)
        if (strcmp(name, splitters[i].name) == 0) return &splitters[i];
    return NULL;
}
