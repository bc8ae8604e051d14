#include "loading.h"

#include <dlfcn.h>
#include <sys/mman.h>
#include <tvm/ffi/device.h>
#include <tvm/ffi/function.h>
#include <unistd.h>

#include <climits>
#include <cstdio>
#include <cstdlib>
#include <sstream>

#include "error.h"

namespace tt {
namespace {

namespace ffi = tvm::ffi;

constexpr std::string_view kMark = "tvmtrain machine code\n";  // tvmtrain/gpu_code.py

int digit(char c) {
  if (c >= 'A' && c <= 'Z') return c - 'A';
  if (c >= 'a' && c <= 'z') return c - 'a' + 26;
  if (c >= '0' && c <= '9') return c - '0' + 52;
  return c == '+' ? 62 : c == '/' ? 63 : -1;
}

std::string decoded(std::string_view text) {
  std::string bytes;
  uint32_t bits = 0;
  int count = 0;
  for (char c : text) {
    const int value = digit(c);
    if (value < 0) continue;  // the padding at the end
    bits = (bits << 6 | static_cast<uint32_t>(value)) & 0xFFFFFF;
    if ((count += 6) >= 8) bytes += static_cast<char>(bits >> (count -= 8) & 0xFF);
  }
  return bytes;
}

// Where TVM would have CUDA source compiled, it gets the machine code that lies there instead.
ffi::Bytes machine_code(const ffi::String& text) {
  const std::string_view all(text.data(), text.size());
  if (all.substr(0, kMark.size()) != kMark) throw device_error("lib.so holds CUDA source, and nothing compiles it here: build it with tvmtrain");
  return ffi::Bytes(decoded(all.substr(kMark.size())));
}

}  // namespace

std::string absolute(const std::string& path) {
  char buffer[PATH_MAX];
  return realpath(path.c_str(), buffer) ? buffer : path;
}

Quiet::Quiet() {
  std::fflush(stderr);
  log_ = memfd_create("log", MFD_CLOEXEC);
  if (log_ < 0) return;
  kept_ = dup(STDERR_FILENO);
  dup2(log_, STDERR_FILENO);
}

Quiet::~Quiet() {
  if (log_ < 0) return;
  if (kept_ >= 0) dup2(kept_, STDERR_FILENO);
  std::string text(static_cast<size_t>(std::max<off_t>(0, lseek(log_, 0, SEEK_END))), '\0');
  const ssize_t got = pread(log_, text.data(), text.size(), 0);
  close(log_);
  if (kept_ >= 0) close(kept_);
  text.resize(static_cast<size_t>(std::max<ssize_t>(0, got)));
  std::istringstream lines(text);
  for (std::string line; std::getline(lines, line);) {
    if (line.find(": Warning: Scope ") == std::string::npos) std::fprintf(stderr, "%s\n", line.c_str());
  }
}

DLDevice load_gpu(const std::string& device) {
  const DLDevice gpu{kDLCUDA, 0};
  ffi::Function::SetGlobal("tvm_callback_cuda_compile", ffi::Function::FromTyped(machine_code), true);
  // It registers what it brings; it stays loaded.
  const bool loaded = dlopen("libtvm_runtime_cuda.so", RTLD_NOW | RTLD_LOCAL) != nullptr;
  const std::string reason = loaded ? "" : std::string(" (") + dlerror() + ")";
  constexpr int kExists = 0;
  if (!loaded || !ffi::Function::GetGlobalRequired("runtime.GetDeviceAttr")(gpu, kExists).cast<int64_t>()) {
    throw device_error("lib.so was compiled for an NVIDIA GPU (device '" + device + "'), and TVM finds none here" + reason +
                       ": it needs the driver (libcuda.so.1), CUDA's runtime (libcudart.so.13) and libtvm_runtime_cuda.so where the "
                       "system's loader looks, by LD_LIBRARY_PATH for example");
  }
  return gpu;
}

}  // namespace tt
