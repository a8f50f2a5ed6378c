#include "gpus.hpp"

#include <dlfcn.h>

#include <algorithm>
#include <cctype>
#include <cstdio>
#include <vector>

#include "error.hpp"

namespace tarflow::internal {
namespace {

struct Gpu {
  std::string name, uuid;  // as nvidia-smi spells it, but for GPU- or MIG- before it
};

template <class Function>
Function find(void* library, const char* name) {
  return reinterpret_cast<Function>(dlsym(library, name));
}

std::string spelled(const unsigned char (&uuid)[16]) {
  std::string text;
  for (int i = 0; i < 16; ++i) {
    char digits[3];
    std::snprintf(digits, sizeof digits, "%02x", uuid[i]);
    text += (i == 4 || i == 6 || i == 8 || i == 10 ? "-" : "") + std::string(digits);
  }
  return text;
}

// None where there is no driver, or nothing that it may show.
std::vector<Gpu> gpus() {
  void* driver = dlopen("libcuda.so.1", RTLD_NOW | RTLD_LOCAL);
  if (driver == nullptr) return {};
  const auto start = find<int (*)(unsigned)>(driver, "cuInit");
  const auto count_of = find<int (*)(int*)>(driver, "cuDeviceGetCount");
  const auto device_of = find<int (*)(int*, int)>(driver, "cuDeviceGet");
  const auto name_of = find<int (*)(char*, int, int)>(driver, "cuDeviceGetName");
  const auto uuid_of = find<int (*)(unsigned char*, int)>(driver, "cuDeviceGetUuid_v2");  // which knows of MIG
  int count = 0;
  if (!start || !count_of || !device_of || !name_of || !uuid_of || start(0) != 0 || count_of(&count) != 0) return {};
  std::vector<Gpu> found;
  for (int number = 0; number < count; ++number) {
    int device = 0;
    char name[256] = "";
    unsigned char uuid[16] = {};
    const bool fine =
        device_of(&device, number) == 0 && name_of(name, sizeof name, device) == 0 && uuid_of(uuid, device) == 0;
    found.push_back(fine ? Gpu{name, spelled(uuid)} : Gpu{});
  }
  return found;
}

bool is_number(const std::string& text) {
  return std::all_of(text.begin(), text.end(), [](unsigned char c) { return std::isdigit(c); });
}

}  // namespace

int numbered_gpu(const std::string& device) {
  if (device.empty()) return 0;
  const std::vector<Gpu> here = gpus();
  std::string asked, known;
  for (const char c : device) asked += static_cast<char>(std::tolower(static_cast<unsigned char>(c)));
  if (asked.rfind("gpu-", 0) == 0 || asked.rfind("mig-", 0) == 0) asked = asked.substr(4);
  std::vector<int> fitting;
  for (std::size_t i = 0; i < here.size(); ++i) {
    known += (i > 0 ? "; " : "") + text_of(i) + ": " + here[i].name + ", " + here[i].uuid;
    const bool fits = is_number(device) ? std::stoul(device) == i : here[i].uuid.rfind(asked, 0) == 0;
    if (fits) fitting.push_back(static_cast<int>(i));
  }
  if (fitting.size() == 1) return fitting[0];
  throw field_error("provider", "device '" + device + "'",
                    "one of those that CUDA has here (" + (known.empty() ? "none" : known) + ")");
}

}  // namespace tarflow::internal
