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

// How a chat template shows tools, taken apart by export.py as the rest of it. Pieces are "" where
// there is nothing.
typedef struct {
    bool present;
    const char *refused;  // why the template's tools are left out; "" where the file says nothing
    const char *begin;    // all that stands before the tools where there is no system text
    const char *system_prefix, *system_suffix;  // around a system text, the tools behind it
    const char *separator, *end;  // between two tools; from the last one to the first question
    int indent;                   // of a tool's JSON, blanks a level; 0: all in one line
    bool bare;                    // the function alone, not {"type": "function", "function": ..}
    const char *call_marker;      // what stands before a call's JSON in an answer, stripped
    const char *call_begin, *call_middle, *call_end;  // around a call's name and arguments
    const char *call_separator;                       // between two calls of an answer
    const char *call_name, *call_arguments;           // the keys of a call's JSON
    const char *call_text;  // between an answer's text and its calls; NULL: such a text is left out
    bool call_one;          // an answer has one call at most
    const char *result_begin, *result_separator, *result_end;  // around results in a row
    bool result_json;                                          // they are JSON strings
} ToolForm;

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
    ToolForm tools;
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

// A part of what is rendered: of the template, with special tokens; or a text, which never becomes
// one, as it is, or without the white space around it where the template strips that from messages
// or system texts.
typedef enum { PART_TEMPLATE, PART_TEXT, PART_MESSAGE, PART_SYSTEM } PartKind;
typedef struct {
    PartKind kind;
    const char *s;
    size_t n;
} TextPart;

// Appends parts [n] one behind the other; first: nothing stands before them. Texts with nothing but
// ordinary text of the template between them are read as one. Returns 0, or -1 when memory is out.
int tokenizer_parts(const Tokenizer *t, const TextPart *part, int n, bool first, Ids *out);

// Appends one turn: template pieces with special tokens, text without. role is 's'ystem, 'u'ser or
// 'a'ssistant; first marks the conversation's first turn (writes begin and, when it is not a system
// turn, the default system turn); after_system marks a user turn that follows a system turn.
// Returns 0, or -1 when memory is out.
int tokenizer_turn(const Tokenizer *t, char role, const char *text, bool first, bool after_system,
                   Ids *out);

// Appends chat->generation. Returns 0, or -1 when memory is out.
int tokenizer_generation(const Tokenizer *t, Ids *out);
#endif
