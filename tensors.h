// tensors.h: the safetensors container. Models, caches and scores are all files of this kind.
//
// A file is an 8-byte little-endian header length, a JSON header, and the data. The header gives
// each tensor's dtype, shape and byte range, and strings under "__metadata__". Our own files start
// the data and every tensor on a 64-byte boundary, so that a mapped tensor is used in place.
// Format: https://huggingface.co/docs/safetensors
#ifndef TENSORS_H
#define TENSORS_H
#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

#include "newfile.h"
#include "util.h"

enum { TENSOR_MAX_DIMS = 8, TENSOR_ALIGN = 64 };

typedef enum { T_U8, T_I8, T_F16, T_BF16, T_I32, T_U32, T_F32, T_I64, T_F64 } DType;

typedef struct {
    const char *name;
    DType dtype;
    int n_dims;
    size_t shape[TENSOR_MAX_DIMS];  // [n_dims] slowest first
    const void *data;               // inside the map, 64-byte aligned in our own files
    size_t bytes;                   // of dtype x shape
} Tensor;

typedef struct {
    const char *key, *value;
} Meta;

// A file that is open for reading.
typedef struct {
    char path[1024];
    const uint8_t *map;  // [map_bytes] the whole file, read-only
    size_t map_bytes;
    const uint8_t
        *cold;  // [cold_bytes] part of the map that stays on the disk (weights.h), or NULL
    size_t cold_bytes;
    Tensor *tensors;  // [n_tensors] sorted by name
    int n_tensors;
    Meta *meta;  // [n_meta] sorted by key
    int n_meta;
    char *strings;  // the header; names, keys and values point in here, unescaped
} TensorFile;

// Bytes of one element.
size_t dtype_size(DType t);

// As safetensors spells it: "F16".
const char *dtype_name(DType t);

// ---- reading ----

// Maps the file read-only and checks it: header inside the file, every range inside the data and
// equal to dtype x shape, no overlap, no overflow. Returns 0, or -1 with err. The descriptor is
// closed again.
int tensors_open(TensorFile *f, const char *path, char *err);

// Unmaps it; all pointers into it end here. Safe on a zeroed struct, and twice.
void tensors_close(TensorFile *f);

// The path of the open file whose map holds this address, or NULL: for a handler of the fault that
// reading it is once the file has been cut.
const char *tensors_mapped(const void *address);

// NULL when absent; O(log n).
const Tensor *tensors_find(const TensorFile *f, const char *name);

// As tensors_find, but absence, another dtype or another shape is an error that names all three,
// and so is data that does not lie on a multiple of its element size. n_dims sizes follow, each an
// int; -1 accepts any length in that place.
const Tensor *tensors_get(const TensorFile *f, char *err, const char *name, DType dtype, int n_dims,
                          ...);

// Says in err what the file is instead of `wanted` ("a profile"), whose metadata "format" would be
// `format`. Returns -1.
int tensors_wrong_format(const TensorFile *f, const char *wanted, const char *format, char *err);

// A string of the metadata, NULL when absent; O(log n).
const char *tensors_meta(const TensorFile *f, const char *key);

// Numbers out of the metadata: absent, malformed or out of [lo, hi] is an error. Return 0, or -1
// with err, *out untouched.
int tensors_meta_int(const TensorFile *f, const char *key, int lo, int hi, int *out, char *err);
int tensors_meta_float(const TensorFile *f, const char *key, double lo, double hi, float *out,
                       char *err);

// ---- writing ----
// Tensors are declared first, so that the header comes first; then their data is put in the same
// order, in pieces of any size; then the file takes its place. Fillers ("pad.N") keep every tensor
// on a 64-byte boundary without holes in the file. Calls return 0, or -1 with err; one that fails
// has already aborted.
typedef struct {
    NewFile out;
    Tensor *tensors;  // [n_tensors] declared ones, fillers included; data unused
    int n_tensors, cap;
    Meta *meta;  // [n_meta] copies
    int n_meta, meta_cap;
    int at;           // tensor being written, -1 before the header is
    size_t at_bytes;  // how much of it has been put
} TensorWriter;

// Opens a temporary file beside path (newfile_begin); w starts from nothing.
int tensors_write_begin(TensorWriter *w, const char *path, char *err);

// Adds a string to the metadata; both are copied. An error once data has been put.
int tensors_write_meta(TensorWriter *w, const char *key, const char *value, char *err);

// Announces a tensor of shape [n_dims], whose name is copied. An error once data has been put.
int tensors_write_declare(TensorWriter *w, const char *name, DType dtype, int n_dims,
                          const size_t *shape, char *err);

// Appends data [bytes] to what has been put; more than was declared is an error.
int tensors_write_put(TensorWriter *w, const void *data, size_t bytes, char *err);

// All declared bytes must have been put. Frees w.
int tensors_write_commit(TensorWriter *w, char *err);

// Gives up and frees w. Safe after a commit, and on a zeroed struct.
void tensors_write_abort(TensorWriter *w);
#endif
