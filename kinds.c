// kinds.c: what a file is that was taken for another.
//
// Downloads end as pointers and error pages, weights come in a dozen formats, documents are no
// plain text. Who gives such a file hears what it is and what to do, not that byte 0 is wrong.
#define _POSIX_C_SOURCE 200809L
#include "kinds.h"

#include <stdint.h>
#include <stdio.h>
#include <string.h>
#include <sys/stat.h>
#include <unistd.h>

#include "util.h"

// ---- by first bytes ----

#define CONVERT "convert it with export.py"
#define UNPACK "unpack it first"

static const struct {
    const char *magic;
    size_t n, at;  // bytes of magic, and where in the file they stand
    FileKind kind;
} magics[] = {
#define AT(at, magic) magic, sizeof(magic) - 1, at
    // weights
    {AT(0, "GGUF"), {"a GGUF file", CONVERT, BINARY}},
    {AT(0, "lmgg"), {"a GGML file", "its format is given up: find a GGUF of the model", BINARY}},
    {AT(0, "tjgg"), {"a GGML file", "its format is given up: find a GGUF of the model", BINARY}},
    {AT(0, "fmgg"), {"a GGML file", "its format is given up: find a GGUF of the model", BINARY}},
    {AT(0, "24ka"), {"a checkpoint of llama2.c", CONVERT, BINARY}},
    {AT(0, "\x80\x02"), {"a pickle of PyTorch", "save the model as safetensors", BINARY}},
    {AT(0, "\x80\x03"), {"a pickle of Python", "save the model as safetensors", BINARY}},
    {AT(0, "\x80\x04"), {"a pickle of Python", "save the model as safetensors", BINARY}},
    {AT(0, "\x80\x05"), {"a pickle of Python", "save the model as safetensors", BINARY}},
    {AT(30, "archive/data.pkl"), {"a PyTorch file", "save the model as safetensors", BINARY}},
    {AT(0, "\x89HDF"), {"an HDF5 file", NULL, BINARY}},
    {AT(4, "TFL3"), {"a TensorFlow Lite file", NULL, BINARY}},
    {AT(0, "\x93NUMPY"), {"an array of NumPy", NULL, BINARY}},
    // what a download leaves
    {AT(0, "version https://git-lfs"),
     {"a git-lfs pointer", "git lfs pull brings the file itself", CODED}},
    {AT(0, "version https://hawser"),
     {"a git-lfs pointer", "git lfs pull brings the file itself", CODED}},
    {AT(0, "<!DOCTYPE"), {"a web page", "download the file again", PLAIN}},
    {AT(0, "<!doctype"), {"a web page", "download the file again", PLAIN}},
    {AT(0, "<html"), {"a web page", "download the file again", PLAIN}},
    {AT(0, "<?xml"), {"an XML file", NULL, PLAIN}},
    // archives
    {AT(0, "\x1f\x8b"), {"a gzip file", UNPACK " (gunzip)", BINARY}},
    {AT(0, "BZh"), {"a bzip2 file", UNPACK " (bunzip2)", BINARY}},
    {AT(0,
        "\xfd"
        "7zXZ"),
     {"an xz file", UNPACK " (unxz)", BINARY}},
    {AT(0, "\x28\xb5\x2f\xfd"), {"a zstd file", UNPACK " (unzstd)", BINARY}},
    {AT(0, "7z\xbc\xaf\x27\x1c"), {"a 7-Zip archive", UNPACK, BINARY}},
    {AT(0, "Rar!\x1a\x07"), {"a RAR archive", UNPACK, BINARY}},
    {AT(257, "ustar"), {"a tar archive", UNPACK " (tar xf)", BINARY}},
    // documents
    {AT(30, "[Content_Types].xml"), {"an Office document", "save it as plain text", BINARY}},
    {AT(30, "word/"), {"a Word document", "save it as plain text", BINARY}},
    {AT(30, "mimetype"), {"an OpenDocument or EPUB file", "save it as plain text", BINARY}},
    {AT(0, "PK\3\4"), {"a zip archive", UNPACK " (unzip)", BINARY}},
    {AT(0, "PK\5\6"), {"an empty zip archive", NULL, BINARY}},
    {AT(0, "%PDF-"), {"a PDF file", "make text of it (pdftotext)", CODED}},
    {AT(0, "{\\rtf"), {"an RTF document", "save it as plain text", CODED}},
    {AT(0, "\xd0\xcf\x11\xe0\xa1\xb1\x1a\xe1"),
     {"an old Office document", "save it as plain text", BINARY}},
    // text in another encoding
    {AT(0, "\xff\xfe\0\0"), {"text in UTF-32", "iconv -f utf-32 -t utf-8", BINARY}},
    {AT(0, "\0\0\xfe\xff"), {"text in UTF-32", "iconv -f utf-32 -t utf-8", BINARY}},
    {AT(0, "\xff\xfe"), {"text in UTF-16", "iconv -f utf-16 -t utf-8", BINARY}},
    {AT(0, "\xfe\xff"), {"text in UTF-16", "iconv -f utf-16 -t utf-8", BINARY}},
    // others
    {AT(0,
        "\x7f"
        "ELF"),
     {"a program", NULL, BINARY}},
    {AT(0, "MZ"), {"a program", NULL, BINARY}},
    {AT(0, "\x89PNG\r\n"), {"a picture", NULL, BINARY}},
    {AT(0, "\xff\xd8\xff"), {"a picture", NULL, BINARY}},
    {AT(0, "GIF8"), {"a picture", NULL, BINARY}},
    {AT(0, "SQLite format 3"), {"an SQLite database", NULL, BINARY}},
    {AT(0, "PAR1"), {"a Parquet file", "write its text column out", BINARY}},
    {AT(0, "ARROW1"), {"an Arrow file", "write its text column out", BINARY}},
    // our own
    {AT(0, "{\"settings\":"), {"a file of results", "run eval --merge shows them", PLAIN}},
    {AT(0, "{\"context\":"), {"a file of tasks", "run eval MODEL TASKS asks them", PLAIN}},
#undef AT
};
enum { N_MAGICS = sizeof magics / sizeof *magics };

static uint32_t word(const uint8_t *p) {
    return p[0] | (uint32_t)p[1] << 8 | (uint32_t)p[2] << 16 | (uint32_t)p[3] << 24;
}

// An 8-byte length that is no larger than the safetensors library takes, then a JSON object.
static bool is_safetensors(const uint8_t *p, size_t n) {
    return n > 8 && word(p + 4) == 0 && word(p) >= 2 && word(p) <= 100000000 && p[8] == '{';
}

// dim, hidden_dim, n_layers, n_heads, n_kv_heads, vocab_size (negative: with its own classifier),
// seq_len.
static bool is_llama2c(const uint8_t *p, size_t n) {
    static const uint32_t most[7] = {1 << 16, 1 << 18, 1 << 10, 1 << 10, 1 << 10, 1 << 20, 1 << 20};
    for (int i = 0; n > 28 && i < 7; i++) {
        uint32_t v = word(p + 4 * i);
        if (i == 5 && v >> 31) v = -v;
        if (v == 0 || v > most[i]) return false;
    }
    return n > 28 && word(p) % word(p + 12) == 0 && word(p + 12) % word(p + 16) == 0;
}

// Field 1, a small version, then the producer's name or the graph.
static bool is_onnx(const uint8_t *p, size_t n) {
    return n > 4 && p[0] == 8 && p[1] >= 3 && p[1] <= 20 && p[2] == 0x12 && p[3] < 64;
}

static bool is_zeros(const uint8_t *p, size_t n) {
    for (size_t i = 0; i < n; i++)
        if (p[i]) return false;
    return n >= 16;
}

static bool holds(const uint8_t *p, size_t n, const char *word) {
    size_t length = strlen(word);
    for (size_t i = 0; i + length <= n; i++)
        if (memcmp(p + i, word, length) == 0) return true;
    return false;
}

// config.json or model.safetensors.index.json.
static bool is_settings(const uint8_t *p, size_t n) {
    static const char *const words[] = {"\"weight_map\"", "\"total_size\"", "\"architectures\"",
                                        "\"model_type\""};
    for (int i = 0; n > 0 && p[0] == '{' && i < 4; i++)
        if (holds(p, n, words[i])) return true;
    return false;
}

static const struct {
    bool (*is)(const uint8_t *p, size_t n);
    FileKind kind;
} shapes[] = {
    {is_safetensors, {"a safetensors file", "run info says what it holds", BINARY}},
    {is_llama2c, {"a checkpoint of llama2.c", CONVERT, BINARY}},
    {is_onnx, {"an ONNX model", "convert the model it was made from", BINARY}},
    {is_settings, {"JSON of a model's folder", "convert the folder with export.py", PLAIN}},
    {is_zeros, {"zeros, as a download leaves that did not end", "download it again", BINARY}},
};

// Whether p [n] may begin a text, as "24karat gold" does and a checkpoint of llama2.c does not.
static bool may_be_text(const uint8_t *p, size_t n) {
    const uint8_t *end = p + utf8_whole((const char *)p, n);
    uint32_t c;
    for (int len; p < end; p += len) {
        len = utf8_get(p, end, &c);
        if (len <= 0 || (c < 0x20 && !strchr("\t\n\f\r\x1b", (int)c)) || c == 0) return false;
    }
    return true;
}

const FileKind *file_kind(const void *head, size_t n) {
    const uint8_t *p = head;
    if (n > KIND_HEAD) n = KIND_HEAD;
    bool text = may_be_text(p, n);
    for (int i = 0; i < N_MAGICS; i++)
        if (magics[i].at <= n && n - magics[i].at >= magics[i].n &&
            (magics[i].at != 30 || memcmp(p, "PK\3\4", 4) == 0) &&  // names in zip archives
            !(text && magics[i].kind.nature == BINARY) &&
            memcmp(p + magics[i].at, magics[i].magic, magics[i].n) == 0)
            return &magics[i].kind;
    for (size_t i = 0; i < sizeof shapes / sizeof *shapes; i++)
        if (shapes[i].is(p, n)) return &shapes[i].kind;
    return NULL;
}

int kind_fail(char *err, const FileKind *kind, const char *wanted) {
    return fail(err, "%s, not %s%s%s", kind->what, wanted, kind->todo ? ": " : "",
                kind->todo ? kind->todo : "");
}

// ---- by the name ----

static bool has_file(const char *folder, const char *name) {
    char path[4096];
    struct stat st;
    int n = snprintf(path, sizeof path, "%s/%s", folder, name);
    return n > 0 && (size_t)n < sizeof path && stat(path, &st) == 0;
}

int path_fail(char *err, const char *path, int why) {
    char target[1024];
    struct stat st;
    ssize_t n = readlink(path, target, sizeof target);
    if (n > 0 && stat(path, &st) != 0)
        return fail(err, "cannot open: a link to %.*s: %s", (int)n, target, strerror(why));
    if (has_file(path, "adapter_config.json"))
        return fail(err, "a folder of a LoRA adapter: merge it into its model, then convert that");
    if (has_file(path, "config.json"))
        return fail(err, "a folder of a model: convert it with export.py");
    return why ? fail(err, "cannot open: %s", strerror(why)) : fail(err, "not a regular file");
}

// ---- by what a safetensors file holds ----

static const struct {
    const char *format;  // how metadata "format" begins
    FileKind kind;
} formats[] = {
    {"kvzip.c model ", {"a converted model", NULL, BINARY}},
    {"kvzip.c cache ", {"a saved cache", NULL, BINARY}},
    {"kvzip.c profile ", {"a profile", NULL, BINARY}},
    {"kvzip.c scores ", {"scores of a context", NULL, BINARY}},
    {"kvzip.c logits ", {"logits", NULL, BINARY}},
};

const FileKind *tensors_kind(const char *format, const char *name) {
    static const FileKind adapter = {"a LoRA adapter", "merge it into its model, then convert that",
                                     BINARY};
    static const FileKind weights = {"weights that are not converted yet",
                                     "convert their folder with export.py", BINARY};
    for (size_t i = 0; format && i < sizeof formats / sizeof *formats; i++)
        if (strncmp(format, formats[i].format, strlen(formats[i].format)) == 0)
            return &formats[i].kind;
    if (name && strstr(name, "lora_")) return &adapter;
    if (format && (strcmp(format, "pt") == 0 || strcmp(format, "mlx") == 0)) return &weights;
    if (name && (strncmp(name, "model.", 6) == 0 || strncmp(name, "lm_head", 7) == 0))
        return &weights;
    return NULL;
}
