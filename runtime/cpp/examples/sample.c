/* Draws one image of a class into a PGM or PPM file: sample BUNDLE LABEL SEED FILE */
#include <stdio.h>
#include <stdlib.h>
#include <tarflow.h>

int main(int argc, char **argv) {
  if (argc != 5) return fprintf(stderr, "usage: %s BUNDLE LABEL SEED FILE\n", argv[0]), TARFLOW_INPUT;
  tarflow_flow *flow;
  tarflow_shape shape = {0};
  shape.size = sizeof shape;
  tarflow_sample_options how = tarflow_sample_defaults();
  how.seed = strtoull(argv[3], NULL, 10);
  int64_t label = strtoll(argv[2], NULL, 10);
  float *image = NULL;
  int status = tarflow_open(argv[1], NULL, &flow);
  if (!status) status = tarflow_get_shape(flow, &shape);
  if (!status) image = malloc((size_t)shape.image_numbers * sizeof *image);
  if (!status) status = tarflow_sample(flow, 1, &label, &how, image);
  if (status) fprintf(stderr, "sample: %s\n", tarflow_error(flow));
  tarflow_close(flow);

  FILE *file = status ? NULL : fopen(argv[4], "wb");
  if (!status && !file) perror(argv[4]), status = TARFLOW_MACHINE;
  int pixels = shape.image_size * shape.image_size, channels = shape.channels == 3 ? 3 : 1;
  if (file) fprintf(file, "P%d %d %d 255\n", channels == 3 ? 6 : 5, shape.image_size, shape.image_size);
  for (int i = 0; file && i < pixels * channels; ++i) { /* planes to pixels; rounded and clipped to 0 ... 255 */
    float value = (image[i % channels * pixels + i / channels] + 1) * 127.5f + 0.5f;
    fputc(value < 0 ? 0 : value > 255 ? 255 : (int)value, file);
  }
  return free(image), file && fclose(file) ? TARFLOW_MACHINE : status;
}
