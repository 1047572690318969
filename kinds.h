// kinds.h: what a file is that was taken for another, told by its first bytes.
#ifndef KINDS_H
#define KINDS_H
#include <stdbool.h>
#include <stddef.h>

enum { KIND_HEAD = 512 };  // bytes of a file's beginning that tell its kind

typedef enum {
    BINARY,  // has bytes that no text has among the first KIND_HEAD
    CODED,   // may look like text, and is never meant as such
    PLAIN    // is text as well
} FileNature;

typedef struct {
    const char *what;  // "a GGUF file"
    const char *todo;  // what makes of it what was wanted; NULL: nothing does
    FileNature nature;
} FileKind;

// The kind of a file that begins with head [n], n KIND_HEAD or all there is; NULL: none that is
// known. Our own and other formats of text are known, plain text is none.
const FileKind *file_kind(const void *head, size_t n);

// "a PDF file, not text: make text of it (pdftotext)". Returns -1.
int kind_fail(char *err, const FileKind *kind, const char *wanted);

// Why path could not be opened, which left `why` in errno (0: it is no regular file): a folder of a
// model, a link to nothing, or what strerror says. Returns -1.
int path_fail(char *err, const char *path, int why);

// What stands in a file of the safetensors format, by its metadata "format" (NULL: none), name a
// tensor of it (NULL: it has none): "a saved cache", "weights that are not converted yet".
const FileKind *tensors_kind(const char *format, const char *name);
#endif
