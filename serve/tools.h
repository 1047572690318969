// tools.h: functions that a request offers to the model, and what the model makes of them.
//
// How they are written down the model's chat template says (ToolForm): a list of them as JSON
// before the first question, calls in answers, results behind. A call comes back in two ways: it is
// found in an answer that may have one, or, where one must come, the answer is nothing but the JSON
// of a call, in a form that the functions' parameters give.
#ifndef TOOLS_H
#define TOOLS_H
#include "serve/engine.h"
#include "serve/fields.h"

enum { TOOLS_MOST = 128, TOOL_NAME = 128 };  // of a request and of an answer; bytes of a name

typedef struct {
    const char *name;
    const JsonNode *shown;       // {"type": "function", "function": {..}}
    const JsonNode *parameters;  // a JSON Schema; NULL: it takes none
} Tool;

// The tools of a request; {0}: it has none, and its model no form for any.
typedef struct {
    const ToolForm *form;  // of the model; NULL: it has none
    const char *why;       // it has none
    bool anthropic;        // the request speaks Anthropic's language
    Tool *tool;            // [n] those that the model sees
    int n;
    bool must;      // the answer is a call,
    int only;       // of this one; -1: of any
    bool several;   // an answer may have more than one
    JsonNode *own;  // what shown is made of where it is not the request's
} Tools;

// Fields tools, tool_choice, parallel_tool_calls. What is wrong is noted in f.
void tools_read(Tools *t, Fields *f, const Tokenizer *tok, bool anthropic);
void tools_close(Tools *t);  // safe on a zeroed struct, and twice

// The schema of an answer that must be a call, as JSON; malloc'ed. NULL: noted in f, parameters
// that a constrained answer does not support among it.
char *tools_schema(const Tools *t, Fields *f);

// ---- conversations ----

// A call in the history.
typedef struct {
    const char *id, *name;
    char *arguments;  // JSON
} PastCall;
typedef struct {
    PastCall *call;  // [n]
    int n;
} PastCalls;

// The calls of an assistant's message. false: what is wrong is noted in f.
bool tools_past(const Tools *t, Fields *f, const JsonNode *message, int index, PastCalls *calls);
void tools_forget(PastCalls *calls);

// Append ids; 0, or -1: no memory. The beginning of a chat with tools up to its first question
// (system NULL: none), an answer with calls, results in a row, and what a call begins with where
// the answer must be one.
int tools_begin(const Tools *t, const Tokenizer *tok, const char *system, const char *question,
                Ids *ids);
int tools_answer(const Tools *t, const Tokenizer *tok, const char *text, const PastCalls *calls,
                 Ids *ids);
int tools_results(const Tools *t, const Tokenizer *tok, char *const *text, int n, Ids *ids);
int tools_invite(const Tools *t, const Tokenizer *tok, Ids *ids);

// ---- answers ----

// What is to be found in answers.
typedef struct {
    const ToolForm *form;  // NULL: no calls
    bool must;
    int most;           // calls of an answer
    const char *names;  // that they may have, one behind the other, "" behind the last
} Callable;

// Bytes that tools_callable needs at `names` for t.
size_t tools_names_bytes(const Tools *t);
Callable tools_callable(const Tools *t, char *names);

// What comes next in a part's text: bytes [from, to) to be shown, or a call.
typedef struct {
    size_t from, to;
    char *name, *arguments;  // malloc'ed; NULL: it is text
} Found;

// Moves on behind it; false: nothing yet, or nothing more where the part has ended. White space
// beside calls is left out.
bool tools_next(const Callable *c, Part *p, Found *found);
void found_free(Found *found);

// Ends a part whose text has as many calls as it may have; for those whose text is not told as it
// comes.
void tools_enough(const Callable *c, Part *p);
#endif
