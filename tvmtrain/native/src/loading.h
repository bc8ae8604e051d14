// Loading native code: what TVM logs meanwhile, and its part for NVIDIA GPUs.
#ifndef TVMTRAIN_LOADING_H_
#define TVMTRAIN_LOADING_H_

#include <tvm/ffi/c_api.h>

#include <string>

namespace tt {

// ``path`` from the root: TVM does not find a library by a bare name.
std::string absolute(const std::string& path);

// While it lives, lines "Scope Loaded:", which TVM 0.27 logs for every constant, are dropped; all else reaches stderr at its end.
class Quiet {
 public:
  Quiet();
  Quiet(const Quiet&) = delete;
  Quiet& operator=(const Quiet&) = delete;
  ~Quiet();

 private:
  int kept_ = -1, log_ = -1;
};

// The first NVIDIA GPU. Throws a device error where TVM finds none.
DLDevice load_gpu(const std::string& device);

}  // namespace tt

#endif
