// The part of CUDA's runtime and driver that TVM's CUDA runtime calls, on a processor: device memory is memory, streams are
// empty, and a "module" is a shared library that kernels.h has made of CUDA source.
#include <dlfcn.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

#include <chrono>
#include <map>
#include <string>

#define API extern "C" __attribute__((visibility("default"))) int

namespace {
struct Config {  // CUlaunchConfig
  unsigned grid[3], block[3], shared;
  void* stream;
  void* attributes;
  unsigned count;
};
struct Kernel {
  void* run;
  int synchronizes;
  int (*launch)(void*, void**, int, const unsigned*, const unsigned*);
};

// Behind everything that is allocated lies a border that no kernel may touch.
constexpr size_t BORDER = 256;
constexpr unsigned char MARK = 0xa5;
std::map<unsigned char*, size_t> allocated;

bool intact(unsigned char* place, size_t size) {
  for (size_t i = 0; i < BORDER; i++)
    if (place[size + i] != MARK) return false;
  return true;
}

double* now(void* event) { return static_cast<double*>(event); }
}  // namespace

API cudaGetDeviceCount(int* count) { return *count = 1, 0; }
API cudaGetDevice(int* device) { return *device = 0, 0; }
API cudaSetDevice(int) { return 0; }
API cudaDeviceGetAttribute(int* value, int which, int) {
  switch (which) {
    case 1: case 2: case 3: *value = 1024; break;       // threads of a block, along x, along y
    case 4: *value = 64; break;                         // along z
    case 8: *value = 49152; break;                      // shared memory of a block
    case 10: *value = 32; break;                        // a warp
    case 12: *value = 65536; break;                     // registers of a block
    case 16: *value = 4; break;                         // multiprocessors
    case 75: *value = 7; break;                         // compute capability
    case 76: *value = 5; break;
    default: *value = 1;
  }
  return 0;
}
API cudaGetDeviceProperties(void* properties, int) { return memset(properties, 0, 512), 0; }
API cudaMalloc(void** place, size_t size) {
  auto bytes = static_cast<unsigned char*>(aligned_alloc(256, (size + BORDER + 255) / 256 * 256));
  memset(bytes, 0xff, size);  // NaN: what nobody has written is seen
  memset(bytes + size, MARK, BORDER);
  allocated[bytes] = size;
  return *place = bytes, 0;
}
API cudaMallocHost(void** place, size_t size) { return cudaMalloc(place, size); }
API cudaFree(void* place) {
  allocated.erase(static_cast<unsigned char*>(place));
  return free(place), 0;
}
API cudaFreeHost(void* place) { return cudaFree(place); }
API cudaMemGetInfo(size_t* available, size_t* total) { return *available = *total = size_t(4) << 30, 0; }
API cudaMemcpyAsync(void* to, const void* from, size_t size, int, void*) { return memmove(to, from, size), 0; }
API cudaMemcpyPeerAsync(void* to, int, const void* from, int, size_t size, void*) { return memmove(to, from, size), 0; }
API cudaGetLastError() { return 0; }
API cudaPeekAtLastError() { return 0; }
extern "C" const char* cudaGetErrorName(int) { return "error"; }
extern "C" const char* cudaGetErrorString(int) { return "an error of the emulated GPU"; }
API cudaStreamCreate(void** stream) { return *stream = nullptr, 0; }
API cudaStreamCreateWithFlags(void** stream, unsigned) { return *stream = nullptr, 0; }
API cudaStreamDestroy(void*) { return 0; }
API cudaStreamSynchronize(void*) { return 0; }
API cudaStreamWaitEvent(void*, void*, unsigned) { return 0; }
API cudaStreamBeginCapture(void*, int) { return 801; }  // not supported
API cudaStreamEndCapture(void*, void**) { return 801; }
API cudaGraphInstantiate(void**, void*, unsigned long long) { return 801; }
API cudaGraphLaunch(void*, void*) { return 801; }
API cudaGraphDestroy(void*) { return 0; }
API cudaGraphExecDestroy(void*) { return 0; }
API cudaEventCreate(void** event) { return *event = new double(0), 0; }
API cudaEventDestroy(void* event) { return delete now(event), 0; }
API cudaEventRecord(void* event, void*) {
  *now(event) = std::chrono::duration<double, std::milli>(std::chrono::steady_clock::now().time_since_epoch()).count();
  return 0;
}
API cudaEventSynchronize(void*) { return 0; }
API cudaEventElapsedTime(float* milliseconds, void* start, void* end) {
  return *milliseconds = float(*now(end) - *now(start)), 0;
}

API cuDeviceGetName(char* name, int size, int) { return strncpy(name, "emulated GPU", size), 0; }
API cuFuncSetAttribute(void*, int, int) { return 0; }
API cuGetErrorName(int, const char** text) { return *text = "error", 0; }
API cuGetErrorString(int, const char** text) { return *text = "an error of the emulated GPU", 0; }
API cuTensorMapEncodeTiled(...) { return 801; }
API cuModuleUnload(void*) { return 0; }

// The image is an eight-byte size and a shared library of that size.
API cuModuleLoadData(void** module, const void* image) {
  size_t size;
  memcpy(&size, image, sizeof size);
  char path[] = "/tmp/emulated-kernels-XXXXXX";
  int file = mkstemp(path);
  bool whole = file >= 0 && write(file, static_cast<const char*>(image) + sizeof size, size) == ssize_t(size);
  if (file >= 0) close(file);
  *module = whole ? dlopen(path, RTLD_NOW | RTLD_LOCAL) : nullptr;
  unlink(path);
  return *module ? 0 : 200;  // invalid image
}
API cuModuleGetFunction(void** function, void* module, const char* name) {
  std::string kernel(name);
  void* run = dlsym(module, (kernel + "__run").c_str());
  if (!run) return 500;  // not found
  auto synchronizes = static_cast<int*>(dlsym(module, (kernel + "__synchronizes").c_str()));
  auto launch = reinterpret_cast<decltype(Kernel::launch)>(dlsym(module, "emulated_launch"));
  *function = new Kernel{run, *synchronizes, launch};
  return 0;
}
API cuLaunchKernelEx(const Config* config, void* function, void** arguments, void**) {
  auto kernel = static_cast<Kernel*>(function);
  size_t threads = size_t(config->block[0]) * config->block[1] * config->block[2];
  bool fits = threads >= 1 && threads <= 1024 && config->grid[1] < 65536 && config->grid[2] < 65536;
  if (!fits || config->grid[0] > 0x7fffffffu) return 1;  // invalid value
  int error = kernel->launch(kernel->run, arguments, kernel->synchronizes, config->grid, config->block);
  for (auto& [place, size] : allocated)
    if (!intact(place, size)) error = 700;  // illegal address
  return error;
}
