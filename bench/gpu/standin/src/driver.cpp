// A stand-in for the driver's library, as far as programs ask it what there is.
#include <cstring>

#include "launch.hpp"

extern "C" {

int cuInit(unsigned) { return 0; }
int cuDeviceGetCount(int* count) { return *count = standin_devices(), 0; }
int cuDeviceGet(int* device, int number) { return *device = number, 0; }
int cuDeviceGetName(char* name, int size, int device) {
  unsigned char uuid[16];
  standin_describe(device, name, static_cast<size_t>(size), uuid);
  return 0;
}
int cuDeviceGetUuid_v2(unsigned char* uuid, int device) {
  char name[64];
  standin_describe(device, name, sizeof name, uuid);
  return 0;
}

}  // extern "C"
