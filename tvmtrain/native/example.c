/* Trains the artifact in the folder "out" on one batch, again and again: a model of x [4, 3, 8, 8] with ten classes.
 * cc example.c -Iinclude -Llib -ltvmtrain -o example */
#include <stdio.h>
#include "tvmtrain.h"

int main(void) {
  static float images[4 * 3 * 8 * 8] = {1, 2, 3};
  static int64_t labels[4] = {0, 1, 2, 3}, shape[] = {4, 3, 8, 8}, count[] = {4};
  tvmtrain_array x = {images, TVMTRAIN_FLOAT32, 4, shape}, y = {labels, TVMTRAIN_INT64, 1, count};
  tvmtrain *step;
  double loss = 0;
  if (tvmtrain_load("out", 0, &step) != TVMTRAIN_OK) return fprintf(stderr, "%s\n", tvmtrain_last_error()), 1;
  while (tvmtrain_steps(step) < 20 && tvmtrain_step(step, &x, &y, 0.05, &loss) == TVMTRAIN_OK) printf("loss %f\n", loss);
  if (tvmtrain_save(step, "now.safetensors") != TVMTRAIN_OK) return fprintf(stderr, "%s\n", tvmtrain_last_error()), 1;
  tvmtrain_free(step);
}
