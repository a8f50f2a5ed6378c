/* The header is C, and its structs have the layout that programs of ABI 1 were compiled with. */
#include <tarflow.h>

#define CHECK(what) _Static_assert(what, #what)
CHECK(TARFLOW_ABI == 1);
CHECK(sizeof(void *) != 8 || sizeof(tarflow_open_options) == 72);
CHECK(sizeof(void *) != 8 || sizeof(tarflow_shape) == 88);
CHECK(sizeof(void *) != 8 || sizeof(tarflow_sample_options) == 104);
CHECK(sizeof(void *) != 8 || offsetof(tarflow_open_options, low_memory) == 32);
CHECK(sizeof(void *) != 8 || offsetof(tarflow_open_options, cuda_graph) == 56);
CHECK(sizeof(void *) != 8 || offsetof(tarflow_open_options, precision) == 64);
CHECK(sizeof(void *) != 8 || offsetof(tarflow_sample_options, guidance) == 24);
int tarflow_header_is_c(void);
int tarflow_header_is_c(void) { return (int)tarflow_sample_defaults().size; }
