// test_calls.c: calls in the text of an answer are found as it comes, whatever pieces it comes in.
#include "serve/tools.h"
#include "test.h"
#include "util.h"

static const ToolForm hermes = {.call_marker = "<tool_call>",
                                .call_end = "}\n</tool_call>",
                                .call_name = "name",
                                .call_arguments = "arguments"};
static const ToolForm llama = {
    .call_marker = "", .call_end = "}", .call_name = "name", .call_arguments = "parameters"};
static const char names[] = "now\0weigh\0";
static uint64_t chance = 1;

// What was found in a text that came in pieces of 1 to `most` bytes: texts as they are, a call as
// [name arguments]. Valid until the next call but one.
static const char *found_in(const Callable *c, const char *text, size_t most) {
    static Buffer out[2];
    static int turn;
    Buffer *b = &out[turn = !turn];
    Job job = {0};
    Part p = {.job = &job};
    Found found;
    size_t n = strlen(text);
    b->n = 0;
    buffer_add(b, "", 0);
    for (size_t at = 0; !p.ended;) {
        size_t more = 1 + random_next(&chance) % most;
        if (more > n - at) more = n - at;
        buffer_add(&p.reply.text, text + at, more);
        at += more;
        p.reply.done = p.ended = at == n;
        while (tools_next(c, &p, &found)) {
            if (found.name) {
                buffer_add(b, "[", 1), buffer_add(b, found.name, strlen(found.name));
                buffer_add(b, " ", 1), buffer_add(b, found.arguments, strlen(found.arguments));
                buffer_add(b, "]", 1);
            } else {
                CHECK(found.to > found.from && found.to <= p.reply.text.n);
                buffer_add(b, p.reply.text.s + found.from, found.to - found.from);
            }
            found_free(&found);
        }
    }
    free(p.reply.text.s);
    return b->s;
}

typedef struct {
    const char *text, *found;
} Case;

static void check_cases(const Callable *c, const Case *cases, size_t n) {
    for (size_t i = 0; i < n; i++)
        for (size_t most = 1; most < 200; most = 3 * most + 1)
            CHECK_STR(found_in(c, cases[i].text, most), cases[i].found);
}

#define NOW "<tool_call>\n{\"name\": \"now\", \"arguments\": {}}\n</tool_call>"

static void test_marker(void) {
    static const Case cases[] = {
        {"", ""},
        {"Hello <b> </tool_call>\n", "Hello <b> </tool_call>\n"},
        {"1 <tool", "1 <tool"},
        {"1 <tool_call>", "1 <tool_call>"},
        {"1 <tool_call> it", "1 <tool_call> it"},
        {NOW, "[now {}]"},
        {"I look.\n\n" NOW "\n", "I look.[now {}]"},
        {NOW "\n" NOW, "[now {}][now {}]"},
        {NOW NOW "\n Done.\n", "[now {}][now {}]Done.\n"},
        {"<tool_call>{\"arguments\":{\"a\":\"}\\\"{</"
         "tool_call>\",\"b\":[1,\"]\"]},\"name\":\"weigh\"}</tool_call>",
         "[weigh {\"a\": \"}\\\"{</tool_call>\", \"b\": [1, \"]\"]}]"},
        {"<tool_call>{\"name\": \"now\"}", "[now {}]"},
        {"<tool_call>{\"name\": \"now\"} </tool", "[now {}]</tool"},
        {"a <tool_call>{\"name\": \"other\", \"arguments\": {}}</tool_call>",
         "a <tool_call>{\"name\": \"other\", \"arguments\": {}}</tool_call>"},
        {"<tool_call>{\"name\": \"now\", \"arguments\": []}",
         "<tool_call>{\"name\": \"now\", \"arguments\": []}"},
        {"<tool_call>{\"name\": \"now\", \"argum", "<tool_call>{\"name\": \"now\", \"argum"},
        {"<tool_call>{name: now}" NOW, "<tool_call>{name: now}[now {}]"},
        {"{\"name\": \"now\", \"arguments\": {}}\n", "[now {}]"},
        {" {\"name\": \"now\"}{\"name\": \"now\"}\nDone", "[now {}][now {}]Done"},
        {"So:\n```json\n{\"name\": \"now\", \"arguments\": {}}\n```\n", "So:[now {}]"},
        {"```\n{\"name\": \"now\"}\n{\"name\": \"now\"}\n```", "[now {}][now {}]"},
        {"```json\n{\"name\": \"x\"}\n```", "```json\n{\"name\": \"x\"}\n```"},
        {"```c\nint x = {1};\n```\n", "```c\nint x = {1};\n```\n"},
        {"``", "``"},
        {"```json", "```json"},
        {"{\"a\": 1}\n" NOW, "{\"a\": 1}[now {}]"},
        {"<tool_call>]}" NOW, "<tool_call>]}[now {}]"},
        {"<tool_call>\n{'name': 'now'}\n</tool_call>",
         "<tool_call>\n{'name': 'now'}\n</tool_call>"}};
    Callable c = {.form = &hermes, .most = TOOLS_MOST, .names = names};
    check_cases(&c, cases, sizeof cases / sizeof *cases);
    static const Case one[] = {{"a" NOW "\n" NOW, "a[now {}]"}, {"a", "a"}};
    c.most = 1;
    check_cases(&c, one, sizeof one / sizeof *one);
}

// Without a marker the answer begins with the call.
static void test_no_marker(void) {
    static const Case cases[] = {
        {"{\"name\": \"now\", \"parameters\": {\"a\": 1}}", "[now {\"a\": 1}]"},
        {" \n{\"name\": \"now\", \"parameters\": {}}\n", "[now {}]"},
        {"I: {\"name\": \"now\", \"parameters\": {}}",
         "I: {\"name\": \"now\", \"parameters\": {}}"},
        {"{\"a\": 1} is JSON", "{\"a\": 1} is JSON"},
        {"{", "{"},
        {"\n", "\n"}};
    const Callable c = {.form = &llama, .most = 1, .names = names};
    check_cases(&c, cases, sizeof cases / sizeof *cases);
}

static void test_must(void) {
    static const Case cases[] = {
        {"{\"name\": \"weigh\", \"arguments\":\n {\"a\": 1}}", "[weigh {\"a\": 1}]"},
        {"{\"name\": \"weigh\", \"argum", "{\"name\": \"weigh\", \"argum"},
        {"", ""}};
    const Callable c = {.form = &hermes, .must = true, .most = 1, .names = names};
    check_cases(&c, cases, sizeof cases / sizeof *cases);
}

// What is found does not depend on the pieces; of what is no call nothing but white space is lost.
static void test_random(void) {
    static const char *const pieces[] = {"<tool_call>",
                                         "</tool_call>",
                                         "\n",
                                         " ",
                                         "{",
                                         "}",
                                         "\"name\": ",
                                         "\"now\"",
                                         NOW,
                                         ", ",
                                         "[",
                                         "]",
                                         "\"arguments\": {}",
                                         "<tool",
                                         "```json",
                                         "```",
                                         "\"x\"",
                                         "\\",
                                         "\"",
                                         "w"};
    const Callable both[] = {{.form = &hermes, .most = TOOLS_MOST, .names = names},
                             {.form = &llama, .most = 1, .names = names}};
    for (int i = 0; i < 4000; i++) {
        char text[1600] = "";
        for (uint64_t n = random_next(&chance) % 14; n > 0; n--)
            strcat(text, pieces[random_next(&chance) % (sizeof pieces / sizeof *pieces)]);
        const Callable *c = &both[i % 2];
        const char *whole = found_in(c, text, sizeof text);
        CHECK_STR(found_in(c, text, 1 + (size_t)i % 5), whole);
    }
}

int main(void) {
    test_marker();
    test_no_marker();
    test_must();
    test_random();
    return test_end("test_calls");
}
