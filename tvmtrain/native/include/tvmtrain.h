/* tvmtrain: a compiled training step in C.
 *
 * A step is the folder that `tvmtrain compile` writes. Load it, give it batches, and its parameters have moved:
 *
 *     tvmtrain *step = NULL;
 *     double loss;
 *     if (tvmtrain_load("out", 0, &step) != TVMTRAIN_OK) { puts(tvmtrain_last_error()); return 1; }
 *     tvmtrain_step(step, &x, &y, -1, &loss);
 *     tvmtrain_save(step, "now.safetensors");
 *     tvmtrain_free(step);
 *
 * Errors. Every function that can fail returns a status; tvmtrain_last_error() says what, where, what was wanted and what to do.
 * A failed call changes nothing: data that do not fit, or a loss that is NaN or infinite, leave the step as it was.
 *
 * Arrays. Row-major without gaps, in the shape and dtype that the step was compiled for (tvmtrain_input and the like tell them).
 * Images are what the model was traced with, as a rule [N, C, H, W] float32, scaled and normalized by the caller. Nothing is kept
 * after a call: arrays are copied. Pointers need no alignment beyond that of their type.
 *
 * Threads. One step belongs to one thread at a time: threads that share one need a lock. Different steps are independent. Each
 * thread that calls has its own pool of workers, made at its first call, of the size given to tvmtrain_load, on the processors
 * that the process may use when the library is first called (sched_setaffinity, taskset).
 */
#ifndef TVMTRAIN_H_
#define TVMTRAIN_H_

#include <stddef.h>
#include <stdint.h>

#ifdef __cplusplus
extern "C" {
#endif

#if defined(__GNUC__)
#define TVMTRAIN_API __attribute__((visibility("default")))
#else
#define TVMTRAIN_API
#endif

/* A running step. */
typedef struct tvmtrain tvmtrain;

typedef enum tvmtrain_status {
  TVMTRAIN_OK = 0,
  TVMTRAIN_INPUT_ERROR = 1,      /* data, shapes, dtypes, labels or arguments that do not fit the step */
  TVMTRAIN_NONFINITE_LOSS = 2,   /* the loss was NaN or infinite; the state before the step was kept */
  TVMTRAIN_ARTIFACT_ERROR = 3,   /* an artifact that is damaged, incomplete, of another version or for another machine */
  TVMTRAIN_CHECKPOINT_ERROR = 4, /* a checkpoint that is damaged or of another model */
  TVMTRAIN_DEVICE_ERROR = 5,     /* this machine lacks what is needed: memory, a GPU */
  TVMTRAIN_STORAGE_ERROR = 6,    /* a file that cannot be written; what was there before is intact */
  TVMTRAIN_INTERNAL_ERROR = 7    /* anything else */
} tvmtrain_status;

typedef enum tvmtrain_dtype {
  TVMTRAIN_FLOAT32,
  TVMTRAIN_FLOAT64,
  TVMTRAIN_FLOAT16,
  TVMTRAIN_INT64,
  TVMTRAIN_INT32,
  TVMTRAIN_INT16,
  TVMTRAIN_INT8,
  TVMTRAIN_UINT64,
  TVMTRAIN_UINT32,
  TVMTRAIN_UINT16,
  TVMTRAIN_UINT8,
  TVMTRAIN_BOOL
} tvmtrain_dtype;

/* An array of the caller's: row-major, shape[0] .. shape[ndim - 1]. */
typedef struct tvmtrain_array {
  void *data; /* read only where the array is an input */
  tvmtrain_dtype dtype;
  int ndim;
  const int64_t *shape;
} tvmtrain_array;

/* What the step takes or gives; belongs to the step. shape[0] is that of one compiled batch. */
typedef struct tvmtrain_spec {
  const char *name;
  tvmtrain_dtype dtype;
  int ndim;
  const int64_t *shape;
} tvmtrain_spec;

/* Start the artifact in ``folder``. threads: to compute with; 0: TVM_NUM_THREADS, else every physical core the process may use.
 * Everything is checked before native code is loaded: format, size and sha256 of every file, tensors, processor, its features. */
TVMTRAIN_API tvmtrain_status tvmtrain_load(const char *folder, int threads, tvmtrain **step);

/* End ``step``; NULL is fine. */
TVMTRAIN_API void tvmtrain_free(tvmtrain *step);

/* One training step on one batch of exactly the compiled size. inputs and targets: as many arrays as tvmtrain_inputs and
 * tvmtrain_targets say. lr: the learning rate of this step; negative: the optimizer's own. loss (may be NULL): before the update.
 * Floats must be finite, class numbers in range. TVMTRAIN_NONFINITE_LOSS: *loss is that loss and the state is as before. */
TVMTRAIN_API tvmtrain_status tvmtrain_step(tvmtrain *step, const tvmtrain_array *inputs, const tvmtrain_array *targets, double lr,
                                           double *loss);

/* The model's outputs in evaluation mode, for any number N >= 1 of samples: inputs of shape [N, ...], outputs of shape
 * [N * rows, ...] (rows: output rows per sample, as a rule 1), whose ``data`` is written. */
TVMTRAIN_API tvmtrain_status tvmtrain_predict(tvmtrain *step, const tvmtrain_array *inputs, const tvmtrain_array *outputs);

/* All state (parameters, buffers, optimizer, random numbers, steps taken) to one file, or from it: what follows gives the same bits
 * as going on from where it was saved. A kill or a power cut at any moment leaves the old file or the new one. It is a safetensors
 * file, which the Python side reads (TrainStep.restore), as this side reads Python's (TrainStep.save). */
TVMTRAIN_API tvmtrain_status tvmtrain_save(const tvmtrain *step, const char *file);
TVMTRAIN_API tvmtrain_status tvmtrain_restore(tvmtrain *step, const char *file);

/* A copy of one parameter or buffer, by its PyTorch name (tied names too); array: its shape and dtype, whose ``data`` is written. */
TVMTRAIN_API tvmtrain_status tvmtrain_read(const tvmtrain *step, const char *name, const tvmtrain_array *array);

/* What went wrong in the last call of this thread that failed; "" if none did. Valid until the next one that fails. */
TVMTRAIN_API const char *tvmtrain_last_error(void);

/* Training steps taken; saved and restored. */
TVMTRAIN_API int64_t tvmtrain_steps(const tvmtrain *step);
/* Samples of a training batch. */
TVMTRAIN_API int64_t tvmtrain_batch(const tvmtrain *step);
/* The learning rate when a call gives none. */
TVMTRAIN_API double tvmtrain_rate(const tvmtrain *step);
/* Threads that this step computes with. */
TVMTRAIN_API int tvmtrain_threads(const tvmtrain *step);
/* How many inputs and targets a training step takes, and outputs a prediction gives; each by its number from 0. */
TVMTRAIN_API int tvmtrain_inputs(const tvmtrain *step);
TVMTRAIN_API int tvmtrain_targets(const tvmtrain *step);
TVMTRAIN_API int tvmtrain_outputs(const tvmtrain *step);
TVMTRAIN_API tvmtrain_status tvmtrain_input(const tvmtrain *step, int number, tvmtrain_spec *spec);
TVMTRAIN_API tvmtrain_status tvmtrain_target(const tvmtrain *step, int number, tvmtrain_spec *spec);
TVMTRAIN_API tvmtrain_status tvmtrain_output(const tvmtrain *step, int number, tvmtrain_spec *spec);

/* Bytes that training with the artifact in ``folder`` takes with so many threads (0: as tvmtrain_load), and bytes that this machine
 * has for it now (MemAvailable; 0: unknown). No native code is loaded. */
TVMTRAIN_API tvmtrain_status tvmtrain_memory(const char *folder, int threads, int64_t *needed, int64_t *available);

/* The version of this library. */
TVMTRAIN_API const char *tvmtrain_version(void);

#ifdef __cplusplus
}
#endif

#endif
