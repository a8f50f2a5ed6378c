/* Sample from a TarFlow bundle: C API, no Python, no PyTorch.

       #include <stdio.h>
       #include <stdlib.h>
       #include <tarflow.h>

       int main(void) {
         tarflow_flow *flow;
         tarflow_open_options options = tarflow_open_defaults();
         tarflow_shape shape;
         shape.size = sizeof shape;
         if (tarflow_open("tarflow-bundle", &options, &flow) || tarflow_get_shape(flow, &shape)) {
           fprintf(stderr, "%s\n", tarflow_error(flow));
           tarflow_close(flow);
           return 1;
         }
         float *image = malloc(shape.image_numbers * sizeof *image);
         tarflow_sample_options how = tarflow_sample_defaults();
         how.seed = 7;
         int64_t label = -1;
         int status = tarflow_sample(flow, 1, &label, &how, image);
         if (status) fprintf(stderr, "%s\n", tarflow_error(flow));
         else printf("first pixel: %g\n", image[0]);
         free(image);
         tarflow_close(flow);
         return status;
       }

   Threads: a handle runs one call at a time, from any thread; a second call meanwhile returns TARFLOW_BUSY. Only
   tarflow_cancel may be called at any moment. tarflow_share makes a handle for another thread that shares the weights.
   Callbacks run in the calling thread, and must not call into their handle or one that shares its weights, except
   tarflow_cancel.

   Memory: the caller owns every buffer it passes, and nothing is kept of it after a call. Strings that are returned
   belong to the handle, until its next call. Without a failure of the machine, no call ends the process.

   Arrays are row-major. Images are (n, channels, size, size) in [-1, 1] units, which drawn ones may leave: nothing is
   clipped, and given ones are taken as they are: scale 0 to 255 to that. Labels are (n), one class each, -1 (and no
   other number below 0) for none, the null class; NULL stands for all -1. Latents and noise are (n, tokens, patch_dim). */
#ifndef TARFLOW_H
#define TARFLOW_H

#include <stddef.h>
#include <stdint.h>

#ifdef __cplusplus
extern "C" {
#endif

#if defined(TARFLOW_STATIC)
#define TARFLOW_API
#else
#define TARFLOW_API __attribute__((visibility("default")))
#endif

#define TARFLOW_ABI 1 /* grows when a program must be compiled again; new functions and fields do not need that */

typedef struct tarflow_flow tarflow_flow; /* an open bundle */

/* The same numbers as the exit codes of the command line. */
enum {
  TARFLOW_OK = 0,
  TARFLOW_INPUT = 2,     /* the caller asked for what cannot be done: a label, a shape, a number out of range */
  TARFLOW_MACHINE = 3,   /* the machine lacks something: a library, a provider, memory */
  TARFLOW_BUNDLE = 4,    /* a file that is damaged, foreign, or made for another version */
  TARFLOW_CANCELLED = 5, /* by tarflow_cancel or a callback; output buffers hold no result */
  TARFLOW_BUSY = 6,      /* another thread's call runs on this handle */
  TARFLOW_DEFECT = 7     /* a defect of this library: please report the message */
};

enum { TARFLOW_LOG_INFO = 0, TARFLOW_LOG_WARNING = 1 };

/* Any of them returns 0 to go on, anything else to cancel. */
typedef int (*tarflow_log)(void *user, int level, const char *message);
/* `done` of `total` sequential steps; this one was in `block`, at `step` of tokens - 1. */
typedef int (*tarflow_progress)(void *user, int64_t done, int64_t total, int block, int step);
/* After each block: what `count` samples from index `first` on look like so far, as images. */
typedef int (*tarflow_preview)(void *user, int block, uint64_t first, int64_t count, const float *images);

/* Structs begin with their size as the caller knows it, so that they can grow. One that ends inside a field ends before
   it. */
typedef struct tarflow_open_options {
  size_t size;
  const char *provider;    /* NULL, "" or "auto": the first that works here of "tensorrt", "cuda", "native" (where it is not
                              slower: docs/NATIVE.md) and "cpu" (ONNX Runtime); or one of these; "cuda:1",
                              "tensorrt:GPU-..." name a GPU by number or UUID, as CUDA shows them */
  const char *onnxruntime; /* the library's file; NULL: $TARFLOW_ONNXRUNTIME, else as the loader finds it */
  int32_t threads;         /* inside one operator, up to 65536, of the native engine 64; 0: one a core */
  int32_t spinning;        /* idle threads wait busily; 0 is better where cores are shared */
  int32_t low_memory;      /* the graphs of one block at a time in memory; kept for ABI 1 */
  tarflow_log log;         /* NULL: silence. Also called by handles shared from this one, in their threads */
  void *user;              /* passed to `log` */
  int32_t cuda_graph;      /* on a GPU: record a step once and replay it; 0: launch every kernel of every step */
  const char *precision;   /* native, which it asks for if `provider` does not: "fp32", "int16", "bf16", "int8"; NULL: int8
                              for a bundle of int8, else fp32 */
} tarflow_open_options;

typedef struct tarflow_shape {
  size_t size;
  int32_t channels, image_size, patch_size;
  int32_t tokens, patch_dim;      /* T patches of D numbers */
  int32_t blocks, layers, width, classes; /* classes 0: unconditional */
  int32_t denoises;               /* trained with Gaussian noise, which tarflow_denoise removes */
  int64_t image_numbers;          /* channels * image_size * image_size = tokens * patch_dim */
  const char *name, *precision, *backend, *bundle; /* data set; "fp32"...; engine and device; SHA-256 of the manifest */
} tarflow_shape;

#define TARFLOW_DENOISE_AS_TRAINED (-1.0)

typedef struct tarflow_sample_options {
  size_t size;
  uint64_t seed, first_sample;  /* sample i of a seed is the same on any machine, in any batch */
  double guidance;              /* (1 + s) * conditional - s * unconditional; 0: none */
  const char *guided;           /* "ab", "a" (log_scale) or "b" (shift) */
  int32_t annealed;             /* the scale grows linearly along the sequence */
  int32_t certify;              /* encode every raw sample again: tarflow_certificate, _log_prob */
  double attention_temperature; /* divides the attention logits of the unconditional branch */
  double denoise;               /* factor on sigma^2; 0: none; TARFLOW_DENOISE_AS_TRAINED: 1 if there is noise */
  int64_t batch_size;           /* 0: chosen */
  int32_t reproducible;         /* aligned tiles of 16: bitwise the same whatever n, batch size and threads */
  int32_t redraw_nonfinite;     /* draw samples that overflowed again, up to 8 times */
  tarflow_progress progress;
  tarflow_preview preview;
  void *user;                   /* passed to both */
} tarflow_sample_options;

static inline tarflow_open_options tarflow_open_defaults(void) {
  tarflow_open_options options = {sizeof options, "auto", NULL, 0, 1, 0, NULL, NULL, 1, NULL};
  return options;
}

static inline tarflow_sample_options tarflow_sample_defaults(void) {
  tarflow_sample_options options = {sizeof options, 0, 0, 0.0, "ab", 0, 0, 1.0, TARFLOW_DENOISE_AS_TRAINED,
                                    0, 0, 0, NULL, NULL, NULL};
  return options;
}

TARFLOW_API const char *tarflow_version(void); /* "0.1.0" */
TARFLOW_API int tarflow_abi(void);             /* the TARFLOW_ABI the library was built with */

/* Open a bundle after checking the hashes of its graphs and weights. `*flow` is set even on failure, to something
   that only tarflow_error and tarflow_close take (NULL if there was no memory even for that). */
TARFLOW_API int tarflow_open(const char *bundle, const tarflow_open_options *options, tarflow_flow **flow);

/* Another handle on the same weights and sessions, for another thread; each is closed on its own. */
TARFLOW_API int tarflow_share(tarflow_flow *flow, tarflow_flow **other);

TARFLOW_API int tarflow_get_shape(tarflow_flow *flow, tarflow_shape *shape);

/* What class `label` is called, in UTF-8, as long as a handle on this bundle is open; NULL if the bundle does not say, or
   has no such class. */
TARFLOW_API const char *tarflow_class_name(tarflow_flow *flow, int64_t label);

/* Draw samples first_sample ... first_sample + n - 1 of the seed into `images`. NULL options: the defaults. */
TARFLOW_API int tarflow_sample(tarflow_flow *flow, int64_t n, const int64_t *labels,
                               const tarflow_sample_options *options, float *images);

/* The same from given noise; seed is not used, redraw_nonfinite is refused, first_sample only aligns tiles. */
TARFLOW_API int tarflow_decode(tarflow_flow *flow, int64_t n, const float *noise, const int64_t *labels,
                               const tarflow_sample_options *options, float *images);

/* Of the last tarflow_sample or tarflow_decode, made with `certify`: for each of its n samples the largest difference
   between the noise it came from and the raw sample, before denoising, encoded again. */
TARFLOW_API int tarflow_certificate(tarflow_flow *flow, int64_t n, float *errors);

/* Of the same call: for each of its n samples the log-density in nats, over [-1, 1] pixels, of the raw sample, before
   denoising, under the flow it was drawn from, guidance and a learned prior included. Exact under the bundle's graphs;
   what was decoded in a lower precision follows it as nearly as its certificate says. Not finite where a sample is not. */
TARFLOW_API int tarflow_log_prob(tarflow_flow *flow, int64_t n, double *nats);

/* Of the last call that drew, encoded, denoised, or computed likelihoods or noise: which of its n results hold a number
   that is not finite. Such a call returns TARFLOW_OK, and its buffers hold what was computed. The first `room` rows go into
   `which`, counted from 0 and growing; `count` becomes how many there are. `which` may be NULL if `room` is 0. */
TARFLOW_API int tarflow_nonfinite(tarflow_flow *flow, int64_t *which, int64_t room, int64_t *count);

/* Images -> latents, and the log-determinant (n) in nats per dimension; either output may be NULL. */
TARFLOW_API int tarflow_encode(tarflow_flow *flow, int64_t n, const float *images, const int64_t *labels,
                               float *latents, float *log_det);

/* log p(image | label) (n) in nats, a density over [-1, 1] pixels. */
TARFLOW_API int tarflow_log_likelihood(tarflow_flow *flow, int64_t n, const float *images, const int64_t *labels,
                                       float *nats);

/* One step along the score: x + strength * sigma^2 * grad log p(x | label). `denoised` may be `images`. */
TARFLOW_API int tarflow_denoise(tarflow_flow *flow, int64_t n, const float *images, const int64_t *labels,
                                double strength, float *denoised);

/* The noise that samples first ... first + n - 1 of a seed start from: standard normal, (n, tokens, patch_dim). */
TARFLOW_API int tarflow_noise(tarflow_flow *flow, uint64_t seed, uint64_t first, int64_t n, float *noise);

/* Make the call that runs on `flow` end with TARFLOW_CANCELLED, within a step (TensorRT: four). Without one, nothing
   happens. */
TARFLOW_API void tarflow_cancel(tarflow_flow *flow);

/* What the last call that failed has to say: what was found, what was expected, what would help. Fields of the structs
   above, and parameters, stand in backquotes. "" if none failed. */
TARFLOW_API const char *tarflow_error(tarflow_flow *flow);

/* NULL is allowed. No call may be running on `flow`. */
TARFLOW_API void tarflow_close(tarflow_flow *flow);

#ifdef __cplusplus
}
#endif
#endif
