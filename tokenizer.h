// tokenizer.h: text to token ids and back, and the pieces of the model's chat template.
//
// Two kinds of vocabulary, both byte-pair encoding driven by one merge table from the converted
// file: byte-level (GPT-2, SmolLM2, Llama 3, Qwen: the text is first split by a regular expression)
// and SentencePiece (Llama 2, Mistral, Gemma: spaces become U+2581, unknown characters become byte
// tokens).
#ifndef TOKENIZER_H
#define TOKENIZER_H
#include "tensors.h"

// Token ids; {0} is empty.
typedef struct {
    int *id;  // [n]
    int n, cap;
} Ids;

// Appends. Returns 0, or -1 when memory is out, and then ids is as it was.
int ids_push(Ids *ids, int id);

// Frees the list; safe on an empty one, and twice.
void ids_free(Ids *ids);

// How one conversation is written down. Rendered once from the model's own Jinja template by
// export.py; strings may hold special tokens and are tokenized with them, the users' texts never
// are. "" where there is nothing.
typedef struct {
    const char *begin;                          // before everything: "<|begin_of_text|>"
    const char *default_system;                 // rendered system turn when the user gives none
    const char *system_prefix, *system_suffix;  // around the user's own system text
    const char *user_prefix, *user_suffix;
    // In place of user_prefix where the template puts the system text inside the user turn.
    const char *user_prefix_after_system;
    const char *assistant_prefix, *assistant_suffix;  // around a past answer
    // Invites the next answer; holds the empty think block where models have one.
    const char *generation;
    const char *system_refused;  // why the template takes no system text, "" where it does
    bool trim, trim_system;      // the template strips white space around messages, system texts
    bool present;                // false: a base model, all of the above ""
    // All that precedes the task text and the context, and the turn change after a context or a
    // question, as the code of KVzip's authors has them (arXiv 2505.23416).
    const char *kvzip_prefix, *kvzip_postfix;
} ChatTemplate;

// Read-only after opening, so threads may share it.
typedef struct Tokenizer Tokenizer;

// Builds the look-up tables from the tok.* tensors and tokenizer.* metadata of a converted file,
// which must stay open. Checks ids, offsets and merges. Returns NULL with err when the tables do
// not make sense.
Tokenizer *tokenizer_open(const TensorFile *f, char *err);

// Frees it; NULL allowed.
void tokenizer_close(Tokenizer *t);

// Flags of tokenizer_encode: texts of special tokens become these tokens; the tokens that the
// model's own tokenizer puts in front are added.
enum { TOK_SPECIAL = 1, TOK_BOS = 2 };

// Appends the ids of text [bytes] to out. Any bytes are accepted; invalid UTF-8 round-trips through
// byte tokens. Time O(n log n) in the worst case. Returns 0, or -1 when memory is out.
int tokenizer_encode(const Tokenizer *t, const char *text, size_t bytes, unsigned flags, Ids *out);

// The raw bytes that id prints: special tokens print their text. Not NUL-terminated. An id outside
// the vocabulary prints nothing.
const char *tokenizer_piece(const Tokenizer *t, int id, int *bytes);

// Whether id is a control token, which an answer does not show.
bool tokenizer_is_special(const Tokenizer *t, int id);

// Whether id ends an answer.
bool tokenizer_is_stop(const Tokenizer *t, int id);

// Ids are 0 to one less than this.
int tokenizer_n_vocab(const Tokenizer *t);

// The model's chat template; it lives as long as t.
const ChatTemplate *tokenizer_chat(const Tokenizer *t);

// Text of ids [n] as the reference decoder gives it (SentencePiece models drop the leading space of
// a text). The result is malloc'ed, NUL-terminated, its length in *bytes; NULL when memory is out.
char *tokenizer_decode(const Tokenizer *t, const int *ids, int n, size_t *bytes);

// ---- streaming ----

enum { TOK_STREAM_MAX = 1024 };

// What is between one id and the next; {0} at the start of a text.
typedef struct {
    unsigned char held[4];  // [n_held] bytes of a character that is not complete
    int n_held;
    bool started;  // something was printed; a leading space may be dropped before that
} TokStream;

// Feeds one id and gives what can be printed: bytes of an unfinished UTF-8 character are held until
// it is complete, or given as they are when id is -1. out has room for TOK_STREAM_MAX bytes.
// Returns how many there are.
int tokenizer_stream(const Tokenizer *t, TokStream *s, int id, char *out);

// ---- conversations ----

// Appends one turn: template pieces with special tokens, text without. role is 's'ystem, 'u'ser or
// 'a'ssistant; first marks the conversation's first turn (writes begin and, when it is not a system
// turn, the default system turn); after_system marks a user turn that follows a system turn.
// Returns 0, or -1 when memory is out.
int tokenizer_turn(const Tokenizer *t, char role, const char *text, bool first, bool after_system,
                   Ids *out);

// Appends chat->generation. Returns 0, or -1 when memory is out.
int tokenizer_generation(const Tokenizer *t, Ids *out);
#endif
