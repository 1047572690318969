// run.c: the program: the table of commands, and main, which finds the row.
//
// What a command does is a function of cli/ that reads like its own summary; its flags are rows of
// cli/flags.c. Results go to stdout, figures and progress to stderr. Only this file and cli/ print
// or exit: the others return -1 and leave a sentence in err.
#define _XOPEN_SOURCE 700
#include <fcntl.h>
#include <limits.h>
#include <pthread.h>
#include <signal.h>
#include <stdio.h>
#include <string.h>
#include <unistd.h>

#include "cli/commands.h"
#include "cli/flags.h"
#include "cli/help.h"
#include "cli/input.h"
#include "cli/output.h"

// ---- the commands ----

const Command commands[] = {
    {"generate", GENERATE, "MODEL [-p TEXT | -f FILE]", 1, 1, cmd_generate, "continue a text",
     "  run generate smollm2.kvz -p 'Once upon a time' -n 100\n"
     "  echo 'The three primary colours are' | run generate smollm2.kvz --temp 0\n"},
    {"chat", CHAT, "MODEL [-c CACHE]", 1, 1, cmd_chat,
     "talk; about a saved context if one is given (Ctrl-C ends an answer, Ctrl-D the chat)",
     "  run chat smollm2.kvz --system 'You answer in one sentence.'\n"
     "  run chat smollm2.kvz -c town.kvc\n"},
    {"compress", COMPRESS, "MODEL -f FILE -o CACHE", 1, 1, cmd_compress,
     "read a context once, score its pairs by letting the model repeat it, evict, save",
     "  run compress smollm2.kvz -f town.txt -o town.kvc\n"
     "  run compress smollm2.kvz -f town.txt -o town.kvc --ratio 0.2 --score-attn local --json\n"
     "  run compress smollm2.kvz -f town.txt -f river.txt -o both.kvc\n"
     "  run compress smollm2.kvz --append both.kvc -f hill.txt -o both.kvc\n"},
    {"ask", ASK, "MODEL CACHE [QUESTION...] [-f FILE]", 2, INT_MAX, cmd_ask,
     "one answer per question, all from the same cache, which stays as it was",
     "  run ask smollm2.kvz town.kvc 'Who built the bridge?' --answer-prefix 'The bridge was built "
     "by'\n"
     "  run ask smollm2.kvz town.kvc -f questions.txt --stop . --json\n"},
    {"score", SCORE, "MODEL -f FILE -o OUT", 1, 1, cmd_score,
     "how much each pair matters, as safetensors: scores f32 [L][Hkv][n_ctx], ids, layers",
     "  run score smollm2.kvz -f town.txt -o scores.safetensors\n"},
    {"map", MAP, "MODEL -f FILE -o OUT.html", 1, 1, cmd_map,
     "which pairs survive, per layer and head, over the text: a page for the browser",
     "  run map smollm2.kvz -f town.txt -o town.html --ratio 0.2\n"},
    {"logits", LOGITS, "MODEL [-p TEXT | -f FILE] [-c CACHE] -o OUT", 1, 1, cmd_logits,
     "logits f32 [n][vocab] of the given tokens, after a saved context if one is given",
     "  run logits smollm2.kvz -p 'Hello there' -o logits.safetensors --kv f32\n"},
    {"tokenize", TOKENIZE, "MODEL [-p TEXT | -f FILE]", 1, 1, cmd_tokenize,
     "a text's token ids on one line, or with --decode the text of ids",
     "  run tokenize smollm2.kvz -p 'Hello there'\n"
     "  run tokenize smollm2.kvz -f town.txt | run tokenize smollm2.kvz --decode\n"},
    {"bench", BENCH, "MODEL", 1, 1, cmd_bench,
     "prefill, decode, scoring and loading at given depths and ratios",
     "  run bench smollm2.kvz --depth 0,2048,8192 --ratio 1,0.3 --batch 1,8\n"},
    {"eval", EVAL, "MODEL TASKS.jsonl | MODEL --suite NAME | MODEL --ppl FILE | --merge FILE...", 1,
     INT_MAX, cmd_eval,
     "what compressing costs in answers: policies, levels and ratios beside the full cache",
     "  run eval smollm2.kvz facts.jsonl --policy kvzip,snapkv --ratio 1,0.3,0.1 -o facts.results\n"
     "  run eval smollm2.kvz facts.jsonl --shard 2/4 -o facts.2\n"
     "  run eval --merge facts.1 facts.2 facts.3 facts.4 --chart facts.svg\n"
     "  run eval smollm2.kvz --suite paper --length 4000 --policy kvzip,snapkv -o paper.results\n"
     "  run eval smollm2.kvz --ppl wiki.test.raw\n"},
    {"calibrate", CALIBRATE, "MODEL [-f TEXTS] -o PROFILE", 1, 1, cmd_calibrate,
     "once per model: learn what heads keep, so that compressing needs no second pass",
     "  run calibrate smollm2.kvz -o smollm2.kvp\n"
     "  run calibrate smollm2.kvz -o smollm2.kvz --into\n"
     "  run compress smollm2.kvz --profile smollm2.kvp -f town.txt -o town.kvc\n"},
    {"serve", SERVE, "MODEL", 1, 1, cmd_serve,
     "answer over HTTP as OpenAI's interface has it; documents are read once and kept compressed",
     "  run serve smollm2.kvz -c town=town.kvc\n"
     "  run serve smollm2.kvz --docs documents --port 8081 --compress-prompts 512\n"},
    {"info", INFO, "FILE", 1, 1, cmd_info,
     "what a model, a saved cache or any safetensors file holds, and where its bytes go",
     "  run info smollm2.kvz\n  run info town.kvc --json\n"},
};
const int n_commands = sizeof commands / sizeof *commands;

// ---- main ----

typedef struct {
    const Command *command;
    Options options;
    int code;  // exit code
} Call;

static void *run_call(void *arg) {
    Call *c = arg;
    c->code = c->command->run(&c->options);
    return NULL;
}

// Runs the command on a thread of its own, so that it has the stack it needs (a tile of attention
// takes 0.7 MB) whatever `ulimit -s` says. Signals go to that thread and interrupt its reads.
static int run_command(Call *c) {
    enum { STACK_BYTES = 8 << 20 };
    pthread_attr_t attr;
    pthread_t thread;
    sigset_t all;
    sigfillset(&all);
    pthread_attr_init(&attr);
    pthread_attr_setstacksize(&attr, STACK_BYTES);
    if (pthread_create(&thread, &attr, run_call, c) != 0) die("no thread can be made");
    pthread_sigmask(SIG_BLOCK, &all, NULL);
    pthread_join(thread, NULL);
    pthread_attr_destroy(&attr);
    return c->code;
}

// Descriptors 0 to 2 that are closed at the start are opened, so that no file of ours becomes
// stdin, stdout or stderr. Each the wrong way round: whoever uses it hears that it is not there.
static void fill_descriptors(void) {
    for (int fd = STDIN_FILENO; fd <= STDERR_FILENO; fd++)
        if (fcntl(fd, F_GETFD) == -1 &&
            open("/dev/null", fd == STDIN_FILENO ? O_WRONLY : O_RDONLY) != fd)
            die("descriptor %d is closed, and /dev/null does not open", fd);
}

int main(int argc, char **argv) {
    name_program(argv[0]);
    fill_descriptors();
    signal(SIGPIPE, SIG_IGN);  // a closed pipe is an error of write(), reported like a full disk
    catch_cut_files();
    signal(SIGXFSZ, SIG_IGN);  // so is a file that may not grow
    if (argc < 2) {
        print_usage(stderr);
        return 2;
    }
    Call c = {.command = find_command(argv[1], strlen(argv[1]))};
    int code = 0;
    if (asks_for_help(argv[1])) {
        print_usage(stdout);
    } else if (strcmp(argv[1], "--version") == 0 || strcmp(argv[1], "version") == 0) {
        out("kvzip.c %s\n", KVZIP_RELEASE);
    } else if (strcmp(argv[1], "help") == 0) {
        print_about(argc - 2, argv + 2);
    } else if (!c.command) {
        die_usage(NULL, "unknown command '%s'", argv[1]);
    } else if (wants_help(c.command, argc - 2, argv + 2)) {
        print_help(c.command);
    } else {
        parse_options(&c.options, c.command, argc - 2, argv + 2);
        c.options.program = argv[0];
        check_arguments(&c.options);
        code = run_command(&c);
    }
    out_flush();
    return code;
}
