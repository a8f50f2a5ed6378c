// A stand-in for cuBLAS and cublasLt: products are lines of the log, and nothing is multiplied. The two libraries are
// built of this one file; neither has the other's names to give that anything would ask it for.
#include <cstdio>
#include <cstring>

#include "launch.hpp"

namespace {

constexpr int kFloat = 0, kTf32Math = 3, kTf32 = 77;  // CUDA_R_32F, CUBLAS_TF32_TENSOR_OP_MATH, COMPUTE_32F_FAST_TF32

struct Handle {
  void* stream;
  int math;
};

struct Description {  // of a product in cublasLt
  int compute;
};

int launched(const char* call, const Handle* handle) {
  standin_launch(call, handle->stream);
  return 0;
}

// cublas*gemm* on float32: the handle's mode decides whether factors are rounded to TF32.
int product(const char* call, const Handle* handle) {
  char line[200];
  snprintf(line, sizeof line, "product call=%s tf32=%d", call, (handle->math & 15) == kTf32Math);
  return launched(line, handle);
}

struct Sizes {
  int m, n, k, type, compute;
};

int product(const char* call, const Handle* handle, const Sizes& s) {
  const bool rounded = s.type == kFloat && (s.compute == kTf32 || (handle->math & 15) == kTf32Math);
  char line[200];
  snprintf(line, sizeof line, "product call=%s tf32=%d m=%d n=%d k=%d type=%d compute=%d", call, rounded, s.m, s.n, s.k,
           s.type, s.compute);
  return launched(line, handle);
}

}  // namespace

// Calls of which only the handle matters. More arguments than are named here change nothing where callers clean up.
#define LAUNCHED(call) \
  int call(Handle* handle) { return launched("cublas call=" #call, handle); }
#define PRODUCT(call) \
  int call(Handle* handle) { return product(#call, handle); }
#define DONE(call) \
  int call() { return 0; }

extern "C" {

int cublasCreate_v2(Handle** made) { return *made = new Handle(), 0; }
int cublasDestroy_v2(Handle* handle) { return delete handle, 0; }
int cublasSetStream_v2(Handle* handle, void* stream) { return handle->stream = stream, 0; }
int cublasSetMathMode(Handle* handle, int math) { return handle->math = math, 0; }
int cublasGetMathMode(const Handle* handle, int* math) { return *math = handle->math, 0; }
const char* cublasGetStatusName(int) { return "CUBLAS_STATUS"; }
const char* cublasGetStatusString(int) { return "a status of the stand-in for cuBLAS"; }

PRODUCT(cublasSgemm_v2)
PRODUCT(cublasSgemmBatched)
PRODUCT(cublasSgemmStridedBatched)
LAUNCHED(cublasDgemm_v2)
LAUNCHED(cublasDgemmBatched)
LAUNCHED(cublasDgemmStridedBatched)
LAUNCHED(cublasSgeam)
LAUNCHED(cublasDgeam)
LAUNCHED(cublasScopy_v2)
LAUNCHED(cublasSscal_v2)

int cublasGemmEx(Handle* handle, int, int, int m, int n, int k, const void*, const void*, int type, int, const void*,
                 int, int, const void*, void*, int, int, int compute, int) {
  return product("cublasGemmEx", handle, {m, n, k, type, compute});
}
int cublasGemmBatchedEx(Handle* handle, int, int, int m, int n, int k, const void*, const void*, int type, int,
                        const void*, int, int, const void*, void*, int, int, int, int compute, int) {
  return product("cublasGemmBatchedEx", handle, {m, n, k, type, compute});
}
int cublasGemmStridedBatchedEx(Handle* handle, int, int, int m, int n, int k, const void*, const void*, int type, int,
                               long long, const void*, int, int, long long, const void*, void*, int, int, long long,
                               int, int compute, int) {
  return product("cublasGemmStridedBatchedEx", handle, {m, n, k, type, compute});
}

int cublasLtCreate(void** made) { return *made = new char, 0; }
int cublasLtDestroy(void* handle) { return delete static_cast<char*>(handle), 0; }
int cublasLtMatmulDescCreate(Description** made, int compute, int) { return *made = new Description{compute}, 0; }
int cublasLtMatmulDescDestroy(Description* description) { return delete description, 0; }
int cublasLtMatrixLayoutCreate(void** made) { return *made = new char, 0; }
int cublasLtMatrixLayoutDestroy(void* layout) { return delete static_cast<char*>(layout), 0; }
int cublasLtMatmulPreferenceCreate(void** made) { return *made = new char, 0; }
int cublasLtMatmulPreferenceDestroy(void* preference) { return delete static_cast<char*>(preference), 0; }
DONE(cublasLtMatmulDescSetAttribute)
DONE(cublasLtMatrixLayoutSetAttribute)
DONE(cublasLtMatmulPreferenceSetAttribute)
int cublasLtMatmulAlgoGetHeuristic(void*, void*, void*, void*, void*, void*, void*, int, void* results, int* found) {
  memset(results, 0, 96);  // one cublasLtMatmulHeuristicResult_t: usable, and needs no workspace
  return *found = 1, 0;
}
int cublasLtMatmul(void*, const Description* description, const void*, const void*, void*, const void*, void*,
                   const void*, const void*, void*, void*, void*, const void*, void*, unsigned long, void* stream) {
  char line[200];
  snprintf(line, sizeof line, "product call=cublasLtMatmul tf32=%d compute=%d", description->compute == kTf32,
           description->compute);
  standin_launch(line, stream);
  return 0;
}

}  // extern "C"
