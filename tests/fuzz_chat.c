// fuzz_chat.c: pieces of a chat template, whatever they hold, around texts of others: no question
// becomes a special token, or hides one of the template's.
//
// The first byte picks a vocabulary, the second how the pieces are used; then come the pieces, the
// system text, the question and the start of the answer, a zero byte behind each.
#include "fuzz.h"

#include "answer.h"
#include "vocabulary.h"

enum { FAMILIES = 3, PIECES = 13 };
static const char *const families[FAMILIES] = {"smol", "qwen3", "mistral"};
static char err[ERR_LEN];
static TensorFile files[FAMILIES];
static Tokenizer *tok[FAMILIES];

static void begin(void) {
    for (int i = 0; i < FAMILIES; i++) tok[i] = fuzz_tokenizer(families[i], &files[i]);
}

// The next text of data [n], which has a zero byte behind it; "" where there is none.
static const char *next_text(const char **data, size_t *n) {
    const char *s = *data;
    if (*n == 0) return "";
    size_t used = strlen(s) + 1;
    *data += used, *n -= used;
    return s;
}

static void take_pieces(ChatTemplate *c, const char **data, size_t *n, int how) {
    const char **const pieces[PIECES] = {&c->begin,
                                         &c->default_system,
                                         &c->system_prefix,
                                         &c->system_suffix,
                                         &c->user_prefix,
                                         &c->user_suffix,
                                         &c->user_prefix_after_system,
                                         &c->assistant_prefix,
                                         &c->assistant_suffix,
                                         &c->generation,
                                         &c->system_refused,
                                         &c->kvzip_prefix,
                                         &c->kvzip_postfix};
    for (int i = 0; i < PIECES; i++) *pieces[i] = next_text(data, n);
    c->present = !(how & 1), c->trim = how & 2, c->trim_system = how & 4;
}

static int n_special(const Tokenizer *t, const Ids *ids) {
    int n = 0;
    for (int i = 0; i < ids->n; i++) {
        MUST(ids->id[i] >= 0 && ids->id[i] < tokenizer_n_vocab(t));
        n += tokenizer_is_special(t, ids->id[i]);
    }
    return n;
}

static Ids ask(const Talk *t, const char *question, const char *prefix) {
    Ids ids = {0};
    MUST(talk_ask(t, question, prefix, &ids, err) == 0);
    return ids;
}

// One question asked beside another one, which is a letter.
static void check_talk(const Talk *talk, const char *question, const char *prefix) {
    Ids plain = ask(talk, "a", ""), ids = ask(talk, question, prefix);
    MUST(n_special(talk->tok, &ids) == n_special(talk->tok, &plain));
    ids_free(&plain);
    ids_free(&ids);
}

static void converse(const Tokenizer *t, const char *system, const char *question,
                     const char *prefix, int how) {
    int words[3] = {5, 6, 7};
    Talk talk = {.tok = t, .raw = how & 8, .on_context = how & 16};
    if (how & 32) talk.system = system;
    Ids first = ask(&talk, question, prefix);
    int n_prefix = talk_prefix(&talk, err);
    MUST(n_prefix >= 0);
    check_talk(&talk, question, prefix);
    Reply r = {.prompt = first.id, .n_prompt = first.n, .n_fed = first.n + 1, .ids = {words, 3, 3}};
    MUST(talk_answered(&talk, &r, err) == 0 && talk.n_turns == 1 && talk.pending.n >= 2);
    check_talk(&talk, question, prefix);
    ids_free(&first);
    talk_free(&talk);
}

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t n) {
    if (!tok[0]) begin();
    if (n < 2) return 0;
    Tokenizer *t = tok[data[0] % FAMILIES];
    ChatTemplate own = t->chat;
    char *text = malloc(n - 1);
    memcpy(text, data + 2, n - 2);
    text[n - 2] = '\0';
    const char *rest = text;
    size_t left = n - 1;
    take_pieces(&t->chat, &rest, &left, data[1]);
    const char *system = next_text(&rest, &left), *question = next_text(&rest, &left);
    converse(t, system, question, next_text(&rest, &left), data[1]);
    t->chat = own;
    free(text);
    return 0;
}
