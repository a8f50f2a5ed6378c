/* Draws one image of a class into a PGM or PPM file: sample BUNDLE LABEL SEED FILE */
#include <stdio.h>
#include <stdlib.h>
#include <tarflow.h>

static int failed(tarflow_flow *flow, int status) {
  fprintf(stderr, "sample: %s\n", tarflow_error(flow));
  tarflow_close(flow);
  return status;
}

int main(int argc, char **argv) {
  if (argc != 5) return fprintf(stderr, "usage: %s BUNDLE LABEL SEED FILE\n", argv[0]), 2;
  tarflow_flow *flow;
  tarflow_shape shape = {sizeof shape};
  int status = tarflow_open(argv[1], NULL, &flow);
  if (status || (status = tarflow_get_shape(flow, &shape))) return failed(flow, status);
  float *image = malloc((size_t)shape.image_numbers * sizeof *image);
  int64_t label = strtoll(argv[2], NULL, 10);
  tarflow_sample_options how = tarflow_sample_defaults();
  how.seed = strtoull(argv[3], NULL, 10);
  if ((status = tarflow_sample(flow, 1, &label, &how, image))) return free(image), failed(flow, status);

  FILE *file = fopen(argv[4], "wb");
  if (!file) return perror(argv[4]), free(image), tarflow_close(flow), 3;
  int pixels = shape.image_size * shape.image_size, channels = shape.channels == 3 ? 3 : 1;
  fprintf(file, "P%d %d %d 255\n", channels == 3 ? 6 : 5, shape.image_size, shape.image_size);
  for (int i = 0; i < pixels * channels; ++i) { /* planes to pixels; rounded and clipped to 0 ... 255 */
    float value = (image[i % channels * pixels + i / channels] + 1) * 127.5f + 0.5f;
    fputc(value < 0 ? 0 : value > 255 ? 255 : (int)value, file);
  }
  free(image);
  tarflow_close(flow);
  return fclose(file) ? 3 : 0;
}
