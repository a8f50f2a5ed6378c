/* Decoding of TarFlow blocks on CPUs, for Python and for libtarflow, which are built of the same sources.
 *
 * A sample's bits depend on its noise, its label and its guidance alone: not on the batch, its place there, the window, the
 * number of threads or the instruction set. With bf16 they do so too.
 *
 * Functions return 0, or one of the codes below, and then tarflow_native_message() says what was found. All are safe to
 * call from several threads, but for two calls for one decoding. */
#ifndef TARFLOW_NATIVE_H
#define TARFLOW_NATIVE_H

#include <stddef.h>
#include <stdint.h>

#if defined(TARFLOW_NATIVE_WITHIN) /* a library that is about something else */
#define TARFLOW_NATIVE_API
#elif defined(__GNUC__)
#define TARFLOW_NATIVE_API __attribute__((visibility("default")))
#else
#define TARFLOW_NATIVE_API
#endif

#ifdef __cplusplus
extern "C" {
#endif

/* WRONG: of the weights or what was asked. MEMORY: the machine has no more of it, or no more threads. */
enum { TARFLOW_NATIVE_OK = 0, TARFLOW_NATIVE_WRONG = 1, TARFLOW_NATIVE_MEMORY = 2, TARFLOW_NATIVE_FAULT = 3 };
enum { TARFLOW_NATIVE_FP32 = 0, TARFLOW_NATIVE_INT16 = 1, TARFLOW_NATIVE_BF16 = 2, TARFLOW_NATIVE_INT8 = 3 };

typedef struct tarflow_native_model tarflow_native_model;
typedef struct tarflow_native_decoding tarflow_native_decoding;

/* T patches of D numbers, width C in heads of d, `classes` 0 for none; without `nvp` there are shifts alone. */
typedef struct {
  int64_t tokens, patch_dim, width, head_dim, layers, blocks, classes;
  int32_t nvp;
} tarflow_native_shape;

/* B images, G branches: z (B, T, D) in block order, labels (G, B), below 0 for the null class, mix (2, G, T), inverse
 * temperatures (G). */
typedef struct {
  int64_t images, branches;
  const float *z;
  const int64_t *labels;
  const float *mix;
  const float *inverse_temperature;
} tarflow_native_batch;

TARFLOW_NATIVE_API const char *tarflow_native_message(void); /* of this thread's last failure */

/* The instruction set that is used, or NULL if TARFLOW_ISA names one that is not there. */
TARFLOW_NATIVE_API const char *tarflow_native_isa(void);

/* Why a caller who leaves the engine open had better have ONNX Runtime decode here, in a sentence's middle: it was measured to
 * be faster with this instruction set, or nobody has measured. NULL: it is not. docs/NATIVE.md has the numbers. */
TARFLOW_NATIVE_API const char *tarflow_native_slower(void);

/* `file` is weights.safetensors in memory, and stays there until the model is closed. `precisions` has one for each block.
 * With `one_block`, the weights of one block are packed at a time, and no memory is kept. Threads: 1 to 64. */
TARFLOW_NATIVE_API int tarflow_native_open(const void *file, uint64_t size, const tarflow_native_shape *shape,
                                           const int32_t *precisions, int32_t threads, int32_t one_block,
                                           tarflow_native_model **model);
/* Ends its threads. Its decodings were ended before. */
TARFLOW_NATIVE_API void tarflow_native_close(tarflow_native_model *model);

TARFLOW_NATIVE_API int tarflow_native_begin(tarflow_native_model *model, int64_t block, const tarflow_native_batch *batch,
                                            tarflow_native_decoding **decoding);
TARFLOW_NATIVE_API void tarflow_native_end(tarflow_native_decoding *decoding);

/* The patches found so far, (B, T, D) in block order, at first z; what is written to it is read. */
TARFLOW_NATIVE_API float *tarflow_native_x(tarflow_native_decoding *decoding);

/* The next patches from those at start, ..., stop - 1, one after the other. */
TARFLOW_NATIVE_API int tarflow_native_run(tarflow_native_decoding *decoding, int64_t start, int64_t stop);

/* The next patches from those at position ... position + window - 1, written to x not at all but to found (B, W, D); those
 * of images whose byte in rows (B) is 0 are left alone. rows may be NULL. */
TARFLOW_NATIVE_API int tarflow_native_evaluate(tarflow_native_decoding *decoding, int64_t position, int64_t window,
                                               const uint8_t *rows, float *found);

#ifdef __cplusplus
}
#endif
#endif
