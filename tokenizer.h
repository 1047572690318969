// tokenizer.h: text to token ids and back, and the pieces of the model's chat template.
//
// Two kinds of vocabulary, both byte-pair encoding driven by one merge table from the converted
// file: byte-level (GPT-2, SmolLM2, Llama 3, Qwen: the text is first split by a regular expression)
// and SentencePiece (Llama 2, Mistral, Gemma: spaces become U+2581, unknown characters become byte
// tokens).
#ifndef TOKENIZER_H
#define TOKENIZER_H
#include "tensors.h"

typedef struct {
    int *id;
    int n, cap;
} Ids;

// Appends; ends the program's hope politely: returns 0, or -1 when memory is out.
int ids_push(Ids *ids, int id);
void ids_free(Ids *ids);

// How one conversation is written down. Rendered once from the model's own Jinja template by
// export.py; strings may hold special tokens and are tokenized with them, the users' texts never
// are.
typedef struct {
    const char *begin;           // before everything ("<|begin_of_text|>"), "" when nothing
    const char *default_system;  // rendered system turn when the user gives none, "" when none
    const char *system_prefix, *system_suffix;  // around the user's own system text
    const char *user_prefix, *user_suffix;
    const char
        *user_prefix_after_system;  // templates that put the system text inside the user turn
    const char *assistant_prefix, *assistant_suffix;  // a past answer
    const char
        *generation;  // invites the next answer; holds the empty think block where models have one
    bool trim;        // the template strips white space around messages
    bool present;     // false: a base model, all of the above ""
    const char
        *kvzip_prefix;  // all that precedes the task text and the context (arXiv 2505.23416, code)
    const char *kvzip_postfix;  // turn change after a context or a question
} ChatTemplate;

typedef struct Tokenizer
    Tokenizer;  // defined in tokenizer.c; read-only after opening, so threads may share it

enum {
    TOK_SPECIAL = 1,
    TOK_BOS = 2
};  // recognize special-token strings; add what the model's tokenizer adds

// Builds the look-up tables from the tok.* tensors and tokenizer.* metadata of a converted file,
// which must stay open. Checks ids, offsets and merges. Returns NULL with err when the tables do
// not make sense.
Tokenizer *tokenizer_open(const TensorFile *f, char *err);
void tokenizer_close(Tokenizer *t);  // NULL allowed

// Appends the ids of text [bytes] to out. Any bytes are accepted; invalid UTF-8 round-trips through
// byte tokens. Time O(n log n) in the worst case. Returns 0, or -1 when memory is out.
int tokenizer_encode(const Tokenizer *t, const char *text, size_t bytes, unsigned flags, Ids *out);

// The raw bytes that id prints: special tokens print their text. Not NUL-terminated. An id outside
// the vocabulary prints nothing.
const char *tokenizer_piece(const Tokenizer *t, int id, int *bytes);
bool tokenizer_is_special(const Tokenizer *t,
                          int id);  // control tokens, which an answer does not show
bool tokenizer_is_stop(const Tokenizer *t, int id);  // ends an answer
int tokenizer_n_vocab(const Tokenizer *t);
const ChatTemplate *tokenizer_chat(const Tokenizer *t);

// Text of ids[n] as the reference decoder gives it (SentencePiece models drop the leading space of
// a text). The result is malloc'ed, NUL-terminated, its length in *bytes; NULL when memory is out.
char *tokenizer_decode(const Tokenizer *t, const int *ids, int n, size_t *bytes);

// Streaming: feed one id at a time and print what comes back; bytes of an unfinished UTF-8
// character are held until it is complete, or flushed as they are when id is -1. out has room for
// at least TOK_STREAM_MAX bytes. Returns the number of bytes.
enum { TOK_STREAM_MAX = 1024 };
typedef struct {
    unsigned char held[4];
    int n_held;
    bool started;  // something was printed; a leading space may be dropped before that
} TokStream;
int tokenizer_stream(const Tokenizer *t, TokStream *s, int id, char *out);

// Appends one turn of a conversation: template pieces with special tokens, text without. role is
// 's'ystem, 'u'ser or 'a'ssistant; first marks the conversation's first turn (writes begin and,
// when it is not a system turn, the default system turn); after_system marks a user turn that
// follows a system turn.
int tokenizer_turn(const Tokenizer *t, char role, const char *text, bool first, bool after_system,
                   Ids *out);
int tokenizer_generation(const Tokenizer *t, Ids *out);  // appends chat->generation
#endif
