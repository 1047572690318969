// unfinished.c: a file of bytes by name (unfinished.h).
#include "policies/unfinished.h"

#include <string.h>
#include <unistd.h>

#include "tensors.h"

static const char FORMAT[] = "kvzip.c unfinished 1";

static int write_all(TensorWriter *w, const char *work, const Kept *kept, int n, char *err) {
    if (tensors_write_meta(w, "format", FORMAT, err) != 0 ||
        tensors_write_meta(w, "work", work, err) != 0)
        return -1;
    for (int i = 0; i < n; i++)
        if (tensors_write_declare(w, kept[i].name, T_U8, 1, &kept[i].bytes, err) != 0) return -1;
    for (int i = 0; i < n; i++)
        if (tensors_write_put(w, kept[i].data, kept[i].bytes, err) != 0) return -1;
    return tensors_write_commit(w, err);
}

int unfinished_save(const char *path, const char *work, const Kept *kept, int n, char *err) {
    TensorWriter w = {0};
    char why[ERR_LEN];
    int status = tensors_write_begin(&w, path, why);
    if (status == 0) status = write_all(&w, work, kept, n, why);
    tensors_write_abort(&w);
    return status == 0 ? 0 : fail(err, "%s: %s", path, why);
}

static int read_all(const TensorFile *f, const char *work, const Kept *kept, int n, char *err) {
    const char *format = tensors_meta(f, "format"), *whose = tensors_meta(f, "work");
    int i = 0;
    if (!format || strcmp(format, FORMAT) != 0)
        return fail(err, "there is a file of another kind, which is not replaced");
    if (!whose || strcmp(whose, work) != 0) return 0;
    for (; i < n && tensors_find(f, kept[i].name); i++) {
        const Tensor *t = tensors_get(f, err, kept[i].name, T_U8, 1, (int)kept[i].bytes);
        if (!t) return -1;
        memcpy(kept[i].data, t->data, t->bytes);
    }
    return i;
}

int unfinished_load(const char *path, const char *work, const Kept *kept, int n, char *err) {
    TensorFile f;
    char why[ERR_LEN];
    if (access(path, F_OK) != 0) return 0;
    int status = tensors_open(&f, path, why);
    if (status != 0) return fail(err, "%s: %s", path, why);
    status = read_all(&f, work, kept, n, why);
    tensors_close(&f);
    return status >= 0 ? status : fail(err, "%s: %s", path, why);
}
