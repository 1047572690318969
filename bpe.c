// bpe.c: byte-pair encoding. A piece is merged by rank, the lowest first, the leftmost among
// equals.
//
// A long piece falls apart into spans where no token reaches across, whatever stands there. Merges
// inside a part of a text do not depend on what lies outside, as long as nothing merges across its
// ends. So a sequence of tokens is the encoding of its text exactly when each two neighbours,
// encoded by themselves, stay these two. That is why a long span may be encoded in windows that fit
// into the cache, glued where the neighbours prove the seam. Time is O(n log n) whatever the text.
#include "vocabulary.h"

#define NONE UINT32_MAX     // in place of a rank: these two do not merge
#define DROPPED UINT32_MAX  // in place of an id: the vocabulary has nothing for this byte

// ---- merging ----
//
// A window is a span, or a part of a long one, that is encoded by itself. Its symbols are
// characters or bytes at first, tokens in the end.

enum { WINDOW = 48, PLACES = 64, MAX_ROUNDS = 64, MAX_WINDOW = 1 << 28 };
enum { NO_KEY = INT32_MAX / PLACES * PLACES };

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

// Would another unknown token go into the one before it?
static inline bool fuses(const Encoder *e) {
    int last = e->out->n - 1;
    return e->t->fuse_unk && last >= e->piece && e->out->id[last] == e->t->unk_id;
}

static inline int push_symbol(Encoder *e, uint32_t symbol) {
    int id = (int)symbol;
    if (symbol == DROPPED || (id == e->t->unk_id && fuses(e))) return 0;
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
    bool after_unknown = fuses(e);  // then some of the ids may not be seen
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
    if (known == NULL || ids > MAX_KNOWN || after_unknown) return 0;
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
    e->piece = e->out->n;
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

int encode_pieces(Encoder *e, const uint8_t *p, const uint8_t *end) {
    const Splitter *split = e->t->split;
    while (p < end) {
        const uint8_t *part = end, *next;  // what the splitter sees at once
        if (split->digits_apart) {
            int len;
            bool digit = class_at(e->t, p, end, &len) & DIGIT;
            part = digit ? p + len : skip(e->t, p, end, DIGIT, false);
        }
        for (; p < part; p = next) {
            next = split->next(e->t, p, part);
            if (encode_piece(e, p, (size_t)(next - p)) != 0) return -1;
        }
    }
    return 0;
}

// ---- opening ----

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

int symbols_open(Tokenizer *t) {
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
int merges_open(Tokenizer *t, const TensorFile *f, char *err) {
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
    if (t->pairs == NULL || t->maybe == NULL || t->byte_key == NULL)
        return fail(err, "tokenizer: out of memory");
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

int words_open(Tokenizer *t) {
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

void encoder_free(Encoder *e) {
    free(e->known);
    free(e->now.s);
    free(e->next.s);
    free(e->seam.s);
    free(e->nfc.p);
    free(e->spaced.p);
    free(e->plain.p);
    free(e->part.p);
}
