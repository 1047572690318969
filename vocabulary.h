// vocabulary.h: what the tokenizer's three files share: the tables of a vocabulary, characters, and
// the state of one encoding. tokenizer.c finds added tokens, pretokenize.c cuts a text into pieces,
// bpe.c merges a piece into tokens.
#ifndef VOCABULARY_H
#define VOCABULARY_H
#include <stdlib.h>
#include <string.h>

#include "tokenizer.h"
#include "util.h"

enum { NORMAL, SPECIAL, USER_DEFINED, BYTE, UNUSED };        // tok.kind
enum { NORMALIZED = 1, STRIPS_LEFT = 2, STRIPS_RIGHT = 4 };  // bits of tok.flags
enum { MAX_STOPS = 64, MAX_PIECE = TOK_STREAM_MAX - 4 };
enum { N_CODE_POINTS = 0x110000, N_CCC = 0x20000, METASPACE = 0x2581 };

#define LENGTH(array) (sizeof(array) / sizeof *(array))

typedef struct {
    const uint8_t *text;
    int bytes, id;
} Added;

// Special and user-defined tokens that are found together.
typedef struct {
    Added *row;  // [n] sorted by text
    int n;
    int from[257];       // where those of each first byte begin
    uint8_t kinds[256];  // 1 << kind of each of them
    bool spaces;         // some hold a space
} AddedSet;

typedef struct {
    const char *name;  // as tokenizer.split spells it
    const uint8_t *(*next)(const Tokenizer *t, const uint8_t *p, const uint8_t *end);
    bool digits_apart;  // every number character is a piece, before `next` sees the text
    bool marks;         // marks count as letters
    bool cases;         // words are cut by the cases of letters
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
    int space_prefix;    // 0 never, 1 every stretch, 2 a text without one, 3 a stretch without one
    int strip;           // what a decoded text loses: 0 nothing, 1 a leading space, 2 all spaces of
                         // its first token
    int fuse_unk;        // several unknown characters in a row are one unknown token
    int bos_id, unk_id;  // -1: none
    int stop[MAX_STOPS], n_stops;

    const uint8_t *flags;  // [n] of added tokens; NULL: none has any
    AddedSet added[2];     // found in the text as it is, and then in the normalized text

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

    uint8_t *class;           // [N_CODE_POINTS + 1] LETTER .. DIGIT; the last is an invalid byte's
    uint8_t *ccc;             // [N_CCC] canonical combining class, only with nfc
    uint16_t *decomposition;  // [N_CODE_POINTS] see decomposition_row, only with nfc
    ChatTemplate chat;
};

// ---- bytes that grow ----

typedef struct {
    uint8_t *p;
    size_t n, cap;
} Bytes;

// Room for `more` bytes behind the n there are.
static inline int bytes_room(Bytes *b, size_t more) {
    if (b->cap - b->n >= more) return 0;
    size_t cap = b->n + more + b->cap / 2 + 64;
    uint8_t *grown = realloc(b->p, cap);
    if (grown == NULL) return -1;
    b->p = grown;
    b->cap = cap;
    return 0;
}

static inline int bytes_add(Bytes *b, const void *p, size_t n) {
    if (bytes_room(b, n) != 0) return -1;
    if (n > 0) memcpy(b->p + b->n, p, n);
    b->n += n;
    return 0;
}

// ---- characters ----

// CARE: NFC must look at it. UPPER and LOWER: where a splitter goes by cases, what may stand in a
// word's first and second part; letters that have no case, and marks, have both.
enum { LETTER = 1, NUMBER = 2, SPACE = 4, CARE = 8, DIGIT = 16, UPPER = 32, LOWER = 64 };
enum { INVALID = N_CODE_POINTS };  // stands for a byte of no character

// As utf8_get, but a byte that belongs to no character counts as one, INVALID.
static inline int next_char(const uint8_t *p, const uint8_t *end, uint32_t *c) {
    if (*p < 0x80) return *c = *p, 1;
    int len = utf8_get(p, end, c);
    if (len > 0) return len;
    *c = INVALID;
    return 1;
}

// The character that ends at p, NULL when there is none or only an invalid byte.
static inline const uint8_t *char_before(const uint8_t *p, const uint8_t *start) {
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

static inline int class_at(const Tokenizer *t, const uint8_t *p, const uint8_t *end, int *len) {
    uint32_t c;
    *len = next_char(p, end, &c);
    return t->class[c];
}

// ---- pretokenize.c ----

// Fills t->class. Returns 0, or -1 when memory is out.
int classes_open(Tokenizer *t);

// Fills t->ccc and t->decomposition, and marks characters with CARE. Returns 0, or -1 when memory
// is out.
int nfc_open(Tokenizer *t);

// Makes out the NFC (Unicode Standard Annex 15) of p[n], or leaves it empty when p[n] is in NFC
// already. Returns 0, or -1 when memory is out.
int nfc_make(const Tokenizer *t, const uint8_t *p, size_t n, Bytes *out);

// The splitter of this name; NULL when there is none.
const Splitter *splitter_find(const char *name);

// ---- bpe.c ----

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

enum { KNOWN_BITS = 12, MAX_KNOWN = 3, WORTH_KNOWING = 4096 };

typedef struct {
    uint64_t key[2];  // a word of up to 15 bytes, and its length
    int n;
    uint32_t id[MAX_KNOWN];
} Known;

typedef struct {
    const Tokenizer *t;
    Ids *out;
    Known *known;                                 // [1 << KNOWN_BITS], NULL for a short text
    const uint8_t *end, *stretch_end, *text_end;  // of readable bytes: of the part, stretch, text
    int piece;                                    // out->n where the current piece began
    Window now, next, seam;
    Bytes nfc, spaced, plain, part;  // the current stretch, rewritten
} Encoder;

// Fills byte_id, char_id, symbol and joins from the vocabulary. Returns 0, or -1 when memory is
// out.
int symbols_open(Tokenizer *t);

// Fills the tables of pairs that merge from tensor tok.merges, after symbols_open. Returns 0, or -1
// with err.
int merges_open(Tokenizer *t, const TensorFile *f, char *err);

// Fills t->words, for ignore_merges. Returns 0, or -1 when memory is out.
int words_open(Tokenizer *t);

// Appends the ids of the text from p to end, normalized and without added tokens, to e->out. Bytes
// up to e->end can be read. Returns 0, or -1 when memory is out.
int encode_pieces(Encoder *e, const uint8_t *p, const uint8_t *end);

// Frees all that e holds; e->out stays.
void encoder_free(Encoder *e);
#endif
