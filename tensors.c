// tensors.c: reading and writing safetensors files.
//
// A file from a stranger is mapped and checked once, here, so that nobody above has to: after
// tensors_open every tensor lies inside the map and is exactly dtype x shape long, and the tensors
// follow each other without overlap or hole, as the safetensors library demands. No number is added
// or multiplied before it is known to fit. The header is copied once and read in place; names, keys
// and values stay where they stand in the copy.
#define _POSIX_C_SOURCE 200809L
#include "tensors.h"

#include <errno.h>
#include <fcntl.h>
#include <inttypes.h>
#include <stdarg.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/stat.h>
#include <unistd.h>

#include "json.h"
#include "kinds.h"

// Bytes of the number in front of the header, and the most it may say, as the safetensors library.
enum { LENGTH_BYTES = 8, MAX_HEADER = 100 * 1000 * 1000 };

static const struct {
    const char *name;
    size_t size;
} dtypes[] = {
    [T_U8] = {"U8", 1},     [T_I8] = {"I8", 1},   [T_F16] = {"F16", 2},
    [T_BF16] = {"BF16", 2}, [T_I32] = {"I32", 4}, [T_U32] = {"U32", 4},
    [T_F32] = {"F32", 4},   [T_I64] = {"I64", 8}, [T_F64] = {"F64", 8},
};
enum { N_DTYPES = sizeof dtypes / sizeof dtypes[0] };

size_t dtype_size(DType t) { return dtypes[t].size; }
const char *dtype_name(DType t) { return dtypes[t].name; }

typedef struct {
    const uint8_t *from;  // [bytes] all that follows the header
    size_t bytes;
} Data;

// ---- from JSON to tensors ----

// Bytes of dtype x shape; SIZE_MAX, which no tensor has, when that does not fit.
static size_t tensor_bytes(const Tensor *t) {
    size_t n = dtype_size(t->dtype);
    for (int i = 0; i < t->n_dims; i++)
        if (t->shape[i] == 0) return 0;
    for (int i = 0; i < t->n_dims; i++) {
        if (n > SIZE_MAX / t->shape[i]) return SIZE_MAX;
        n *= t->shape[i];
    }
    return n;
}

static int take_dtype(Tensor *t, const JsonNode *v, char *err) {
    const char *name = v->kind == JSON_STRING ? v->text : "of no name";
    for (int i = 0; i < N_DTYPES; i++) {
        t->dtype = (DType)i;
        if (strcmp(name, dtypes[i].name) == 0) return 0;
    }
    return fail(err, "tensor %.100s: dtype %.20s is not supported", t->name, name);
}

// [n, n, ...] of at most `most` numbers. Returns how many, or -1 with err.
static int take_sizes(size_t *size, int most, const JsonNode *v, const Tensor *t, char *err) {
    bool ok = v->kind == JSON_LIST && v->n <= most;
    int n = 0;
    for (const JsonNode *m = ok ? v->child : NULL; m && ok; m = m->next)
        ok = json_size(m, &size[n++]) == 0;
    return ok ? n
              : fail(err, "tensor %.100s: %s needs a list of up to %d sizes", t->name, v->key,
                     most);
}

enum { DTYPE = 1, SHAPE = 2, OFFSETS = 4, ALL_FIELDS = 7 };

// One of "dtype": "F32", "shape": [..], "data_offsets": [from, to]; each may come once.
static int take_field(Tensor *t, size_t range[2], int *seen, const JsonNode *v, char *err) {
    static const char *const names[] = {
        [DTYPE] = "dtype", [SHAPE] = "shape", [OFFSETS] = "data_offsets"};
    int field = DTYPE;
    while (field < ALL_FIELDS && strcmp(v->key, names[field]) != 0) field *= 2;
    if (field > ALL_FIELDS || (*seen & field))
        return fail(err, "tensor %.100s: %.40s is unknown or repeated", t->name, v->key);
    *seen |= field;
    if (field == DTYPE) return take_dtype(t, v, err);
    if (field == SHAPE) {
        t->n_dims = take_sizes(t->shape, TENSOR_MAX_DIMS, v, t, err);
        return t->n_dims < 0 ? -1 : 0;
    }
    int n = take_sizes(range, 2, v, t, err);
    if (n < 0) return -1;
    return n == 2 ? 0 : fail(err, "tensor %.100s: data_offsets needs two numbers", t->name);
}

static int take_tensor(Tensor *t, const JsonNode *v, const Data *data, char *err) {
    size_t range[2] = {0, 0};
    int seen = 0;
    *t = (Tensor){.name = v->key};
    for (const JsonNode *m = v->kind == JSON_OBJECT ? v->child : NULL; m; m = m->next)
        if (take_field(t, range, &seen, m, err) != 0) return -1;
    if (seen != ALL_FIELDS)
        return fail(err, "tensor %.100s: needs dtype, shape and data_offsets", t->name);
    if (range[0] > range[1])
        return fail(err, "tensor %.100s: bytes %zu to %zu", t->name, range[0], range[1]);
    if (range[1] > data->bytes)
        return fail(err,
                    "the file is cut: tensor %.100s ends at byte %zu of the data, but only %zu are "
                    "there",
                    t->name, range[1], data->bytes);
    t->data = data->from + range[0];
    t->bytes = range[1] - range[0];
    if (tensor_bytes(t) != t->bytes)
        return fail(err, "tensor %.100s: its shape needs %zu bytes, but it has %zu", t->name,
                    tensor_bytes(t), t->bytes);
    return 0;
}

static int take_metadata(TensorFile *f, const JsonNode *v, char *err) {
    if (f->meta) return fail(err, "header: __metadata__ is there twice");
    if (v->kind != JSON_OBJECT) return fail(err, "header: __metadata__ is not an object");
    f->meta = calloc((size_t)v->n + 1, sizeof *f->meta);
    if (!f->meta) return fail(err, "out of memory");
    for (const JsonNode *m = v->child; m; m = m->next) {
        if (m->kind != JSON_STRING)
            return fail(err, "header: metadata %.100s is not a string", m->key);
        f->meta[f->n_meta++] = (Meta){m->key, m->text};
    }
    return 0;
}

static int take_header(TensorFile *f, const JsonNode *top, const Data *data, char *err) {
    if (top->kind != JSON_OBJECT) return fail(err, "header: not a JSON object");
    f->tensors = calloc((size_t)top->n + 1, sizeof *f->tensors);
    if (!f->tensors) return fail(err, "out of memory");
    for (const JsonNode *m = top->child; m; m = m->next) {
        int status = strcmp(m->key, "__metadata__") == 0
                         ? take_metadata(f, m, err)
                         : take_tensor(&f->tensors[f->n_tensors++], m, data, err);
        if (status != 0) return -1;
    }
    return 0;
}

// ---- checks across tensors ----

static int by_name(const void *a, const void *b) {
    return strcmp(((const Tensor *)a)->name, ((const Tensor *)b)->name);
}

static int by_key(const void *a, const void *b) {
    return strcmp(((const Meta *)a)->key, ((const Meta *)b)->key);
}

static int by_place(const void *a, const void *b) {
    const Tensor *s = a, *t = b;
    if (s->data != t->data) return (const char *)s->data < (const char *)t->data ? -1 : 1;
    return s->bytes < t->bytes ? -1 : s->bytes > t->bytes;  // empty tensors share an offset
}

// Tensors follow each other from the first byte of data to the last, as the safetensors library
// demands: a file whose sizes do not add up is cut or spliced.
static int check_places(TensorFile *f, const uint8_t *data, char *err) {
    const uint8_t *at = data, *end = f->map + f->map_bytes;
    if (f->n_tensors > 0) qsort(f->tensors, (size_t)f->n_tensors, sizeof *f->tensors, by_place);
    for (int i = 0; i < f->n_tensors; i++) {
        const Tensor *t = &f->tensors[i];
        if (t->data != at)
            return fail(err, "tensor %.100s starts at byte %zu of the data, expected %zu", t->name,
                        (size_t)((const uint8_t *)t->data - data), (size_t)(at - data));
        at += t->bytes;
    }
    if (at != end)
        return fail(err, "tensors end at byte %zu of the data, but it has %zu", (size_t)(at - data),
                    (size_t)(end - data));
    return 0;
}

static int sort_and_check_names(TensorFile *f, char *err) {
    if (f->n_tensors > 0) qsort(f->tensors, (size_t)f->n_tensors, sizeof *f->tensors, by_name);
    if (f->n_meta > 0) qsort(f->meta, (size_t)f->n_meta, sizeof *f->meta, by_key);
    for (int i = 1; i < f->n_tensors; i++)
        if (by_name(&f->tensors[i - 1], &f->tensors[i]) == 0)
            return fail(err, "tensor %.100s is there twice", f->tensors[i].name);
    for (int i = 1; i < f->n_meta; i++)
        if (by_key(&f->meta[i - 1], &f->meta[i]) == 0)
            return fail(err, "metadata %.100s is there twice", f->meta[i].key);
    return 0;
}

// ---- maps ----

// Every map that is there, so that a fault in one of them can be named.
typedef struct Mapped {
    struct Mapped *next;
    const uint8_t *from, *to;
    char path[];
} Mapped;

static Mapped *mapped;

static int note_map(const TensorFile *f, char *err) {
    Mapped *m = malloc(sizeof *m + strlen(f->path) + 1);
    if (!m) return fail(err, "out of memory");
    *m = (Mapped){mapped, f->map, f->map + f->map_bytes};
    strcpy(m->path, f->path);
    mapped = m;
    return 0;
}

static void forget_map(const uint8_t *map) {
    for (Mapped **at = &mapped, *m; (m = *at); at = &m->next) {
        if (m->from != map) continue;
        *at = m->next;
        free(m);
        return;
    }
}

const char *tensors_mapped(const void *address) {
    const uint8_t *p = address;
    for (const Mapped *m = mapped; m; m = m->next)
        if (p >= m->from && p < m->to) return m->path;
    return NULL;
}

// ---- reading ----

static int map_file(TensorFile *f, const char *path, char *err) {
    struct stat st;
    int fd = open(path, O_RDONLY | O_CLOEXEC | O_NONBLOCK);  // a pipe is refused, not waited for
    if (fd < 0 || fstat(fd, &st) != 0) {
        path_fail(err, path, errno);
    } else if (!S_ISREG(st.st_mode)) {
        path_fail(err, path, 0);
    } else if (st.st_size == 0) {
        fail(err, "an empty file");
    } else if (st.st_size < LENGTH_BYTES) {
        fail(err, "not a safetensors file: only %lld bytes", (long long)st.st_size);
    } else if ((uintmax_t)st.st_size > SIZE_MAX) {
        fail(err, "too large to map: %lld bytes", (long long)st.st_size);
    } else {
        void *map = mmap(NULL, (size_t)st.st_size, PROT_READ, MAP_SHARED, fd, 0);
        if (map == MAP_FAILED) {
            fail(err, "cannot map: %s", strerror(errno));
        } else {
            f->map = map;
            f->map_bytes = (size_t)st.st_size;
        }
    }
    if (fd >= 0) close(fd);
    return f->map == NULL ? -1 : 0;
}

// A tensor's object has fewer than one value in four of its bytes, metadata still fewer: no valid
// header needs more nodes than these.
static int parse_header(TensorFile *f, size_t length, const Data *data, char *err) {
    size_t cap = length / 4 + 4;
    char why[ERR_LEN];
    JsonNode *node = malloc(cap * sizeof *node);
    f->strings = malloc(length + 1);
    int status = -1;
    if (!node || !f->strings) {
        fail(err, "out of memory");
    } else {
        memcpy(f->strings, f->map + LENGTH_BYTES, length);
        const JsonNode *top = json_read(node, cap, f->strings, length, why);
        status = top ? take_header(f, top, data, err) : fail(err, "header: %s", why);
    }
    free(node);
    return status;
}

static int read_header(TensorFile *f, char *err) {
    uint64_t length = 0;
    size_t room = f->map_bytes - LENGTH_BYTES;
    for (int i = 0; i < LENGTH_BYTES; i++) length |= (uint64_t)f->map[i] << 8 * i;
    const FileKind *kind =
        room > 0 && f->map[LENGTH_BYTES] == '{' ? NULL : file_kind(f->map, f->map_bytes);
    if (kind) return kind_fail(err, kind, "a safetensors file");
    if (length > MAX_HEADER)
        return fail(err, "not a safetensors file: a header of %" PRIu64 " bytes", length);
    if (length > room)
        return fail(err,
                    "the file is cut: its header has %" PRIu64 " bytes, but only %zu are there",
                    length, room);
    Data data = {f->map + LENGTH_BYTES + length, room - (size_t)length};
    if (parse_header(f, (size_t)length, &data, err) != 0) return -1;
    if (check_places(f, data.from, err) != 0) return -1;
    return sort_and_check_names(f, err);
}

int tensors_open(TensorFile *f, const char *path, char *err) {
    *f = (TensorFile){0};
    if (strlen(path) >= sizeof f->path) return fail(err, "cannot open: %s", strerror(ENAMETOOLONG));
    strcpy(f->path, path);
    if (map_file(f, path, err) == 0 && note_map(f, err) == 0 && read_header(f, err) == 0) return 0;
    tensors_close(f);
    return -1;
}

void tensors_close(TensorFile *f) {
    if (f->map != NULL) {
        forget_map(f->map);
        munmap((void *)f->map, f->map_bytes);
    }
    free(f->tensors);
    free(f->meta);
    free(f->strings);
    *f = (TensorFile){0};
}

const Tensor *tensors_find(const TensorFile *f, const char *name) {
    Tensor key = {.name = name};
    if (f->n_tensors == 0) return NULL;
    return bsearch(&key, f->tensors, (size_t)f->n_tensors, sizeof key, by_name);
}

const char *tensors_meta(const TensorFile *f, const char *key) {
    Meta wanted = {.key = key}, *m = NULL;
    if (f->n_meta > 0) m = bsearch(&wanted, f->meta, (size_t)f->n_meta, sizeof wanted, by_key);
    return m == NULL ? NULL : m->value;
}

// "F32 [30, any]" for messages; a size of -1 reads as any.
static void describe(char *out, size_t room, DType dtype, int n_dims, const long long *shape) {
    size_t n = (size_t)snprintf(out, room, "%s [", dtype_name(dtype));
    for (int i = 0; i < n_dims && n < room; i++) {
        const char *comma = i > 0 ? ", " : "";
        if (shape[i] < 0)
            n += (size_t)snprintf(out + n, room - n, "%sany", comma);
        else
            n += (size_t)snprintf(out + n, room - n, "%s%lld", comma, shape[i]);
    }
    if (n < room) snprintf(out + n, room - n, "]");
}

const Tensor *tensors_get(const TensorFile *f, char *err, const char *name, DType dtype, int n_dims,
                          ...) {
    long long want[TENSOR_MAX_DIMS], have[TENSOR_MAX_DIMS];
    char expected[160], found[160];
    va_list sizes;
    va_start(sizes, n_dims);
    for (int i = 0; i < n_dims; i++) want[i] = va_arg(sizes, int);
    va_end(sizes);
    describe(expected, sizeof expected, dtype, n_dims, want);

    const Tensor *t = tensors_find(f, name);
    if (t == NULL) {
        fail(err, "tensor %s is missing, expected %s", name, expected);
        return NULL;
    }
    bool same = t->dtype == dtype && t->n_dims == n_dims;
    for (int i = 0; i < t->n_dims; i++) {
        have[i] = (long long)t->shape[i];
        if (same && want[i] >= 0 && want[i] != have[i]) same = false;
    }
    if (!same) {
        describe(found, sizeof found, t->dtype, t->n_dims, have);
        fail(err, "tensor %s: expected %s, found %s", name, expected, found);
        return NULL;
    }
    if ((uintptr_t)t->data % dtype_size(dtype) != 0) {
        fail(err, "tensor %s does not lie on a multiple of %zu bytes", name, dtype_size(dtype));
        return NULL;
    }
    return t;
}

int tensors_wrong_format(const TensorFile *f, const char *wanted, const char *format, char *err) {
    const char *found = tensors_meta(f, "format");
    const char *name = f->n_tensors > 0 ? f->tensors[0].name : NULL;
    for (int i = 0; i < f->n_tensors; i++)
        if (strstr(f->tensors[i].name, "lora_")) name = f->tensors[i].name;
    const FileKind *kind = tensors_kind(found, name);
    if (kind && strcmp(kind->what, wanted) != 0) return kind_fail(err, kind, wanted);
    return fail(err, "not %s: its format is \"%s\", not \"%s\"", wanted, found ? found : "",
                format);
}

int tensors_meta_int(const TensorFile *f, const char *key, int lo, int hi, int *out, char *err) {
    const char *value = tensors_meta(f, key);
    if (value == NULL) return fail(err, "metadata %s is missing", key);
    char *end;
    errno = 0;
    long n = strtol(value, &end, 10);
    if (errno != 0 || end == value || *end != 0 || n < lo || n > hi)
        return fail(err, "metadata %s: expected a whole number from %d to %d, found \"%.100s\"",
                    key, lo, hi, value);
    *out = (int)n;
    return 0;
}

int tensors_meta_float(const TensorFile *f, const char *key, double lo, double hi, float *out,
                       char *err) {
    const char *value = tensors_meta(f, key);
    if (value == NULL) return fail(err, "metadata %s is missing", key);
    char *end;
    double x = strtod(value, &end);
    if (end == value || *end != 0 || !(x >= lo && x <= hi))  // refuses NaN as well
        return fail(err, "metadata %s: expected a number from %g to %g, found \"%.100s\"", key, lo,
                    hi, value);
    *out = (float)x;
    return 0;
}

// ---- writing ----

// Room for one more element behind n; p may move. Returns NULL when memory is out.
static void *grow(void *p, int n, int *cap, size_t size) {
    if (n < *cap) return p;
    int more = *cap < 32 ? 32 : *cap * 2;
    void *q = realloc(p, (size_t)more * size);
    if (q != NULL) *cap = more;
    return q;
}

static int write_fail(TensorWriter *w, char *err, const char *what) {
    fail(err, "%s: %s", what, strerror(errno));
    tensors_write_abort(w);
    return -1;
}

// A mistake of the caller, not of the disk.
static int write_misuse(TensorWriter *w, char *err, const char *what, const char *name) {
    fail(err, "%s%s", what, name);
    tensors_write_abort(w);
    return -1;
}

static char *copy_text(const char *s) {
    char *copy = malloc(strlen(s) + 1);
    return copy == NULL ? NULL : strcpy(copy, s);
}

int tensors_write_begin(TensorWriter *w, const char *path, char *err) {
    *w = (TensorWriter){.at = -1};
    return newfile_begin(&w->out, path, err);
}

int tensors_write_meta(TensorWriter *w, const char *key, const char *value, char *err) {
    if (w->out.file == NULL || w->at >= 0)
        return write_misuse(w, err, "too late for metadata ", key);
    Meta *grown = grow(w->meta, w->n_meta, &w->meta_cap, sizeof *grown);
    if (grown == NULL) return write_misuse(w, err, "out of memory", "");
    w->meta = grown;
    Meta *m = &w->meta[w->n_meta++];
    *m = (Meta){copy_text(key), copy_text(value)};
    if (m->key == NULL || m->value == NULL) return write_misuse(w, err, "out of memory", "");
    return 0;
}

// Adds t, whose name is copied, behind the others.
static int declare(TensorWriter *w, Tensor t, char *err) {
    for (int i = 0; i < w->n_tensors; i++)
        if (strcmp(w->tensors[i].name, t.name) == 0)
            return write_misuse(w, err, "declared twice: tensor ", t.name);
    Tensor *grown = grow(w->tensors, w->n_tensors, &w->cap, sizeof *grown);
    if (grown == NULL) return write_misuse(w, err, "out of memory", "");
    w->tensors = grown;
    t.name = copy_text(t.name);
    if (t.name == NULL) return write_misuse(w, err, "out of memory", "");
    w->tensors[w->n_tensors++] = t;
    return 0;
}

static size_t declared_bytes(const TensorWriter *w) {
    size_t sum = 0;
    for (int i = 0; i < w->n_tensors; i++) sum += w->tensors[i].bytes;
    return sum;
}

static bool is_filler(const Tensor *t) { return strncmp(t->name, "pad.", 4) == 0; }

int tensors_write_declare(TensorWriter *w, const char *name, DType dtype, int n_dims,
                          const size_t *shape, char *err) {
    if (w->out.file == NULL || w->at >= 0)
        return write_misuse(w, err, "too late for tensor ", name);
    Tensor t = {.name = name, .dtype = dtype, .n_dims = n_dims};
    if (is_filler(&t)) return write_misuse(w, err, "the name of a filler: tensor ", name);
    if (n_dims < 0 || n_dims > TENSOR_MAX_DIMS)
        return write_misuse(w, err, "too many dimensions: tensor ", name);
    if (n_dims > 0) memcpy(t.shape, shape, (size_t)n_dims * sizeof *shape);
    size_t at = declared_bytes(w), gap = (TENSOR_ALIGN - at % TENSOR_ALIGN) % TENSOR_ALIGN;
    t.bytes = tensor_bytes(&t);
    if (t.bytes > SIZE_MAX / 2 - at) return write_misuse(w, err, "too large: tensor ", name);
    if (gap > 0) {
        char pad[32];
        snprintf(pad, sizeof pad, "pad.%d", w->n_tensors);
        if (declare(w, (Tensor){pad, T_U8, 1, {gap}, NULL, gap}, err) != 0) return -1;
    }
    return declare(w, t, err);
}

static void put_header_json(const TensorWriter *w) {
    FILE *f = w->out.file;
    const char *comma = "";
    size_t at = 0;
    fputc('{', f);
    if (w->n_meta > 0) {
        json_print(f, "'__metadata__':{");
        for (int i = 0; i < w->n_meta; i++)
            json_print(f, i > 0 ? ",%s:%s" : "%s:%s", w->meta[i].key, w->meta[i].value);
        fputc('}', f);
        comma = ",";
    }
    for (int i = 0; i < w->n_tensors; i++, comma = ",") {
        const Tensor *t = &w->tensors[i];
        fputs(comma, f);
        json_print(f, "%s:{'dtype':%s,'shape':[", t->name, dtype_name(t->dtype));
        for (int k = 0; k < t->n_dims; k++) json_print(f, k > 0 ? ",%zu" : "%zu", t->shape[k]);
        json_print(f, "],'data_offsets':[%zu,%zu]}", at, at + t->bytes);
        at += t->bytes;
    }
    fputc('}', f);
}

// The header's length is known only once it is written: its eight bytes are filled in afterwards.
static int put_header(TensorWriter *w, char *err) {
    static const char no_length[LENGTH_BYTES] = {0};
    unsigned char length[LENGTH_BYTES];
    fwrite(no_length, 1, sizeof no_length, w->out.file);
    put_header_json(w);
    long end = ftell(w->out.file);
    if (end < 0) return write_fail(w, err, "cannot write");
    for (; end % TENSOR_ALIGN != 0; end++) fputc(' ', w->out.file);
    if (end - LENGTH_BYTES > MAX_HEADER) return write_misuse(w, err, "the header is too large", "");
    for (int i = 0; i < LENGTH_BYTES; i++)
        length[i] = (unsigned char)((uint64_t)(end - LENGTH_BYTES) >> 8 * i);
    if (fseek(w->out.file, 0, SEEK_SET) != 0 ||
        fwrite(length, 1, sizeof length, w->out.file) != sizeof length ||
        fseek(w->out.file, end, SEEK_SET) != 0 || ferror(w->out.file))
        return write_fail(w, err, "cannot write");
    w->at = 0;
    return 0;
}

// Steps over tensors that are complete, filling the fillers.
static int advance(TensorWriter *w, char *err) {
    static const char zeros[TENSOR_ALIGN] = {0};
    for (; w->at < w->n_tensors; w->at++, w->at_bytes = 0) {
        const Tensor *t = &w->tensors[w->at];
        if (is_filler(t)) {
            if (fwrite(zeros, 1, t->bytes, w->out.file) != t->bytes)
                return write_fail(w, err, "cannot write");
        } else if (w->at_bytes < t->bytes) {
            break;
        }
    }
    return 0;
}

int tensors_write_put(TensorWriter *w, const void *data, size_t bytes, char *err) {
    const char *p = data;
    if (w->out.file == NULL) return write_misuse(w, err, "nothing is being written", "");
    if (w->at < 0 && put_header(w, err) != 0) return -1;
    while (bytes > 0) {
        if (interrupted) return write_misuse(w, err, "interrupted", "");
        if (advance(w, err) != 0) return -1;
        if (w->at == w->n_tensors) return write_misuse(w, err, "more data than declared", "");
        size_t n = w->tensors[w->at].bytes - w->at_bytes;
        if (n > bytes) n = bytes;
        if (fwrite(p, 1, n, w->out.file) != n) return write_fail(w, err, "cannot write");
        p += n;
        bytes -= n;
        w->at_bytes += n;
    }
    return 0;
}

int tensors_write_commit(TensorWriter *w, char *err) {
    if (w->out.file == NULL) return write_misuse(w, err, "nothing is being written", "");
    if (w->at < 0 && put_header(w, err) != 0) return -1;
    if (advance(w, err) != 0) return -1;
    if (w->at < w->n_tensors)
        return write_misuse(w, err, "data is missing: tensor ", w->tensors[w->at].name);
    int status = newfile_commit(&w->out, err);
    tensors_write_abort(w);
    return status;
}

void tensors_write_abort(TensorWriter *w) {
    newfile_abort(&w->out);
    for (int i = 0; i < w->n_tensors; i++) free((void *)w->tensors[i].name);
    for (int i = 0; i < w->n_meta; i++) {
        free((void *)w->meta[i].key);
        free((void *)w->meta[i].value);
    }
    free(w->tensors);
    free(w->meta);
    *w = (TensorWriter){0};
}
