// help.c: what -h prints, the manual page, and what bash, zsh and fish complete.
//
// All of it is the two tables, of commands (run.c) and of flags (flags.c), in another notation. The
// program stands there as it was called, so that an installed one speaks of itself by its name.
#include "cli/help.h"

#include <stdlib.h>
#include <string.h>

#include "cli/output.h"
#include "policies.h"
#include "readers.h"

const Command *find_command(const char *name, size_t n) {
    for (int i = 0; i < n_commands; i++)
        if (strlen(commands[i].name) == n && memcmp(name, commands[i].name, n) == 0)
            return &commands[i];
    return NULL;
}

// ---- notation ----

typedef struct {
    char c;
    const char *is;
} Escape;

// Text with some characters written otherwise; escapes end with a zero.
static void put(const Escape *escapes, const char *s) {
    for (; *s; s++) {
        const Escape *e = escapes;
        while (e->c && e->c != *s) e++;
        out_bytes(e->c ? e->is : s, e->c ? strlen(e->is) : 1);
    }
}

// A text of the tables, where `run COMMAND` becomes the program's own name. To be freed.
static char *named(const char *text) {
    Buffer b = {0};
    for (const char *s = text; *s; s++) {
        bool word = s == text || strchr(" `\n", s[-1]);
        if (word && strncmp(s, "run ", 4) == 0 && find_command(s + 4, strcspn(s + 4, " `\n"))) {
            add_text(&b, program, strlen(program));
            s += 2;
        } else {
            add_text(&b, s, 1);
        }
    }
    return b.s ? b.s : copy_text("", 0);
}

static void put_named(const Escape *escapes, const char *text) {
    char *s = named(text);
    put(escapes, s);
    free(s);
}

static const Escape none[] = {{0, NULL}};

// ---- -h ----

void print_usage(FILE *f) {
    fprintf(f, "usage: %s COMMAND ... [flags]    (%s COMMAND -h explains one)\n\n", program,
            program);
    for (int i = 0; i < n_commands; i++)
        fprintf(f, "  %s %-9s %s\n      %s\n", program, commands[i].name, commands[i].args,
                commands[i].help);
    fprintf(f, "\nand %s help man|bash|zsh|fish (a manual page, completion), %s --version\n",
            program, program);
}

static void help_row(const char *name, const char *help, const Param *params) {
    out("  %-22s  %s: %s\n", "", name, help);
    for (int i = 0; i < MAX_PARAMS && params[i].name; i++)
        out("  %-22s    %s=%g: %s\n", "", params[i].name, params[i].value, params[i].help);
}

static bool names_policy(const Flag *f) { return f->at == offsetof(Options, policy); }
static bool names_level(const Flag *f) { return f->at == offsetof(Options, level); }
static bool names_reader(const Flag *f) { return f->at == offsetof(Options, reader); }

void print_help(const Command *c) {
    out("usage: %s %s %s [flags]\n  %s\n\nflags:\n", program, c->name, c->args, c->help);
    for (int i = 0; i < n_flags; i++) {
        const Flag *f = &flags[i];
        if (!(f->takes & c->bit)) continue;
        char head[32];
        snprintf(head, sizeof head, "%s %s", f->name, f->value ? f->value : "");
        out("  %-22s%s%s", head, f->choices ? f->choices : "", f->choices ? ": " : "");
        put_named(none, f->help);
        out("\n");
        if (names_policy(f))
            for (const Policy *p = policies; p->name; p++) help_row(p->name, p->help, p->params);
        if (names_level(f))
            for (const Level *l = levels; l->name; l++) help_row(l->name, l->help, l->params);
        if (names_reader(f))
            for (const Reader *r = readers; r->name; r++) help_row(r->name, r->help, r->params);
    }
    out("  %-22s%s\n\nexamples:\n", "-h", "this text");
    put_named(none, c->examples);
}

// ---- the manual page ----

// In roff a backslash begins an escape, and a dash that is typed is written \-.
static const Escape roff[] = {{'\\', "\\e"},  {'-', "\\-"},   {'\'', "\\(aq"}, {'`', "\\(ga"},
                              {'^', "\\(ha"}, {'~', "\\(ti"}, {0, NULL}};

static void man_head(const char *macro, const char *name, const char *value) {
    out("%s \"", macro);
    put(roff, name);
    if (value) {
        out(" ");
        put(roff, value);
    }
    out("\"\n");
}

static void man_row(const char *name, const char *help, const Param *params) {
    out(".br\n\\fB");
    put(roff, name);
    out("\\fR: ");
    put_named(roff, help);
    out("\n");
    for (int i = 0; i < MAX_PARAMS && params[i].name; i++) {
        char value[32];
        snprintf(value, sizeof value, "%g", params[i].value);
        out(".br\n\\fB");
        put(roff, params[i].name);
        out("=");
        put(roff, value);
        out("\\fR: ");
        put(roff, params[i].help);
        out("\n");
    }
}

static void man_flag(const Flag *f) {
    out(".TP\n\\fB");
    put(roff, f->name);
    out("\\fR");
    if (f->value) {
        out(" \\fI");
        put(roff, f->value);
        out("\\fR");
    }
    out("\n");
    if (f->choices) {
        put(roff, f->choices);
        out(": ");
    }
    put_named(roff, f->help);
    out("\n");
    if (names_policy(f))
        for (const Policy *p = policies; p->name; p++) man_row(p->name, p->help, p->params);
    if (names_level(f))
        for (const Level *l = levels; l->name; l++) man_row(l->name, l->help, l->params);
    if (names_reader(f))
        for (const Reader *r = readers; r->name; r++) man_row(r->name, r->help, r->params);
}

static void man_command(const Command *c) {
    man_head(".SS", c->name, c->args);
    put_named(roff, c->help);
    out("\n");
    for (int i = 0; i < n_flags; i++)
        if (flags[i].takes & c->bit) man_flag(&flags[i]);
    out(".PP\nExamples:\n.PP\n.nf\n");
    put_named(roff, c->examples);
    out(".fi\n");
}

static void print_manual(void) {
    char title[64];
    snprintf(title, sizeof title, "%s", program);
    for (char *s = title; *s; s++)
        if (*s >= 'a' && *s <= 'z') *s = (char)(*s - 'a' + 'A');
    out(".TH ");
    put(roff, title);
    out(" 1 2026-01-01 kvzip.c\n.SH NAME\n");
    put(roff, program);
    out(" \\- run language models whose cache is compressed once\n.SH SYNOPSIS\n.B ");
    put(roff, program);
    out("\n.I COMMAND\n[arguments] [flags]\n.PP\n.B ");
    put(roff, program);
    out("\nhelp [\n.I COMMAND\n| man | bash | zsh | fish ]\n.SH COMMANDS\n");
    for (int i = 0; i < n_commands; i++) man_command(&commands[i]);
    out(".SH ENVIRONMENT\n.TP\n.B TERM\n");
    out("dumb: no line editing, no marks around what is pasted.\n");
    out(".SH EXIT STATUS\n0: done; 1: an input or a file is wrong, which one line on stderr says; "
        "2: wrong usage;\n128 and a signal\\(aqs number: stopped by it.\n");
}

// ---- completion ----

// The words of a flag's value, with a space before each; "" where any text may stand.
static void put_words(const Flag *f) {
    for (const char *s = f->choices; s && *s; s += strspn(s, "|")) {
        out(" %.*s", (int)strcspn(s, "|"), s);
        s += strcspn(s, "|");
    }
    if (names_policy(f))
        for (const Policy *p = policies; p->name; p++) out(" %s", p->name);
    if (names_level(f))
        for (const Level *l = levels; l->name; l++) out(" %s", l->name);
    if (names_reader(f))
        for (const Reader *r = readers; r->name; r++) out(" %s", r->name);
}

static bool has_words(const Flag *f) {
    return f->choices || names_policy(f) || names_level(f) || names_reader(f);
}

// Whether its value names a file or a folder.
static bool takes_path(const Flag *f) {
    static const char *const paths[] = {"FILE", "OUT", "CACHE", "DIR"};
    for (int i = 0; f->value && i < 4; i++)
        if (strcmp(f->value, paths[i]) == 0) return true;
    return false;
}

static void bash_command(const Command *c) {
    out("    %s)\n        flags='-h", c->name);
    for (int i = 0; i < n_flags; i++)
        if (flags[i].takes & c->bit) out(" %s", flags[i].name);
    out("'\n        case $prev in\n");
    for (int i = 0; i < n_flags; i++) {
        const Flag *f = &flags[i];
        if (!(f->takes & c->bit) || !f->value || takes_path(f)) continue;
        out("        %s) ", f->name);
        if (has_words(f)) {
            out("words='");
            put_words(f);
            out("' ");
        }
        out("value=1 ;;\n");
    }
    out("        esac ;;\n");
}

// Where nothing is suggested, bash itself completes names of files: not for values that are none.
static void print_bash(void) {
    out("# bash completion of %s: `source <(%s help bash)`\n", program, program);
    out("_kvzip() {\n"
        "    local cur=${COMP_WORDS[COMP_CWORD]} prev=${COMP_WORDS[COMP_CWORD-1]}\n"
        "    local words= value= flags=\n"
        "    if [ \"$cur\" = = ]; then cur=\n"
        "    elif [ \"$prev\" = = ]; then prev=${COMP_WORDS[COMP_CWORD-2]}; fi\n"
        "    COMPREPLY=()\n"
        "    if [ \"$COMP_CWORD\" -eq 1 ]; then\n"
        "        COMPREPLY=($(compgen -W 'help");
    for (int i = 0; i < n_commands; i++) out(" %s", commands[i].name);
    out("' -- \"$cur\"))\n        return\n    fi\n    case ${COMP_WORDS[1]} in\n"
        "    help) words='man bash zsh fish");
    for (int i = 0; i < n_commands; i++) out(" %s", commands[i].name);
    out("' value=1 ;;\n");
    for (int i = 0; i < n_commands; i++) bash_command(&commands[i]);
    out("    esac\n"
        "    [ -n \"$value\" ] && compopt +o default 2>/dev/null\n"
        "    case $value$cur in -*) words=$flags ;; esac\n"
        "    [ -z \"$words\" ] || COMPREPLY=($(compgen -W \"$words\" -- \"$cur\"))\n"
        "}\ncomplete -o default -F _kvzip %s\n",
        program);
}

// Within '..[..]': both notations' own characters.
static const Escape zsh[] = {{'\'', "'\\''"}, {'[', "\\["}, {']', "\\]"}, {':', "\\:"}, {0, NULL}};

static void zsh_flag(const Flag *f) {
    bool many = f->kind == TEXTS;
    out("            '%s%s%s[", many ? "*" : "", f->name, f->value && f->name[1] == '-' ? "=" : "");
    put_named(zsh, f->help);
    out("]");
    if (f->value) {
        out(":");
        put(zsh, f->value);
        out(":");
        if (has_words(f)) {
            out("(");
            put_words(f);
            out(")");
        } else if (takes_path(f)) {
            out("_files");
        }
    }
    out("' \\\n");
}

static void print_zsh(void) {
    out("#compdef %s\n_kvzip() {\n    local -a commands\n    commands=(\n", program);
    for (int i = 0; i < n_commands; i++) {
        out("        '%s:", commands[i].name);
        put_named(zsh, commands[i].help);
        out("'\n");
    }
    out("        'help:a command, or man, bash, zsh, fish'\n    )\n"
        "    if (( CURRENT == 2 )); then _describe command commands; return; fi\n"
        "    local command=$words[2]\n    shift words\n    (( CURRENT-- ))\n"
        "    case $command in\n"
        "    help) (( CURRENT == 2 )) && compadd man bash zsh fish ${commands%%%%:*} ;;\n");
    for (int i = 0; i < n_commands; i++) {
        out("    %s)\n        _arguments \\\n", commands[i].name);
        for (int j = 0; j < n_flags; j++)
            if (flags[j].takes & commands[i].bit) zsh_flag(&flags[j]);
        out("            '-h[this text]' '*:file:_files' ;;\n");
    }
    out("    esac\n}\n"
        "if [[ $zsh_eval_context[-1] == loadautofunc ]]; then _kvzip \"$@\"\n"
        "else compdef _kvzip %s; fi\n",
        program);
}

static const Escape fish[] = {{'\'', "\\'"}, {'\\', "\\\\"}, {0, NULL}};

static void fish_flag(const Command *c, const Flag *f) {
    bool wide = f->name[1] == '-';
    out("complete -c %s -n '__fish_seen_subcommand_from %s' -%c %s", program, c->name,
        wide ? 'l' : 's', f->name + 1 + wide);
    if (f->value) out(takes_path(f) ? " -r -F" : " -x");
    if (has_words(f)) {
        out(" -a '");
        put_words(f);
        out("'");
    }
    out(" -d '");
    put_named(fish, f->help);
    out("'\n");
}

static void print_fish(void) {
    for (int i = 0; i < n_commands; i++) {
        out("complete -c %s -n __fish_use_subcommand -f -a %s -d '", program, commands[i].name);
        put_named(fish, commands[i].help);
        out("'\n");
    }
    out("complete -c %s -n __fish_use_subcommand -f -a help -d 'a command, or man, bash, zsh, "
        "fish'\n",
        program);
    out("complete -c %s -n '__fish_seen_subcommand_from help' -f -a 'man bash zsh fish'\n",
        program);
    for (int i = 0; i < n_commands; i++)
        for (int j = 0; j < n_flags; j++)
            if (flags[j].takes & commands[i].bit) fish_flag(&commands[i], &flags[j]);
}

// ---- run help ----

static const struct {
    const char *name;
    void (*print)(void);
} texts[] = {{"man", print_manual}, {"bash", print_bash}, {"zsh", print_zsh}, {"fish", print_fish}};

void print_about(int argc, char **argv) {
    const char *what = argc > 0 ? argv[0] : "";
    const Command *c = find_command(what, strlen(what));
    if (argc > 1) die_usage(NULL, "help: unexpected argument '%s'", argv[1]);
    for (size_t i = 0; i < sizeof texts / sizeof *texts; i++)
        if (strcmp(what, texts[i].name) == 0) {
            texts[i].print();
            return;
        }
    if (argc == 0 || asks_for_help(what))
        print_usage(stdout);
    else if (c)
        print_help(c);
    else
        die_usage(NULL, "help %s: needs a command, man, bash, zsh or fish", what);
}
