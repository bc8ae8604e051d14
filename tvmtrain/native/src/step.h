// A running training step: tvmtrain/runtime.py in C++, on TVM's runtime.
#ifndef TVMTRAIN_STEP_H_
#define TVMTRAIN_STEP_H_

#include <tvm/ffi/container/tensor.h>
#include <tvm/ffi/device.h>
#include <tvm/ffi/extra/module.h>
#include <tvm/ffi/function.h>
#include <tvm/ffi/optional.h>

#include <map>
#include <string>
#include <utility>
#include <vector>

#include "manifest.h"
#include "selection.h"
#include "tvmtrain.h"

namespace tt {

namespace ffi = tvm::ffi;

class Step {
 public:
  // The artifact in ``folder``; threads: 0 for the default.
  Step(const std::string& folder, int threads);

  // The loss of one step. Throws; then nothing has changed.
  double train(const tvmtrain_array* inputs, const tvmtrain_array* targets, double rate);

  void predict(const tvmtrain_array* inputs, const tvmtrain_array* outputs) const;
  void save(const std::string& file) const;
  void restore(const std::string& file);
  void read(const std::string& name, const tvmtrain_array& array) const;

  const Manifest& manifest() const { return manifest_; }
  uint64_t steps() const { return steps_; }
  int threads() const { return threads_; }

  // The specs of one role on one side of an entry, in order.
  std::vector<const TensorSpec*> specs(const char* entry, Role role) const;

  // Output number ``i`` of the last training step, before its update.
  std::string output(size_t i) const { return bytes_of(outputs_.at(i)); }

 private:
  using Key = std::pair<Role, std::string>;
  using Given = std::map<Key, ffi::Tensor>;
  using Tensors = std::map<std::string, ffi::Tensor>;

  void start(const std::string& library);
  void use_threads() const;
  ffi::Tensor tensor(const Shape& shape, const DType& dtype, std::string_view bytes) const;
  std::string bytes_of(const ffi::Tensor& tensor) const;
  std::vector<ffi::Tensor> run(const Entry& entry, const Given& given, const Tensors& state) const;
  Tensors prepared(Tensors state) const;
  Given batch(const tvmtrain_array* inputs, const tvmtrain_array* targets) const;
  void add_channels(Given& given) const;
  void check_values(const TensorSpec& spec, std::string_view bytes) const;
  SelectionState initial_selection(const TensorFile& parameters) const;

  Manifest manifest_;
  int threads_;
  DLDevice place_{kDLCPU, 0};
  ffi::Optional<ffi::Module> machine_;  // what the functions belong to
  std::map<std::string, ffi::Function> functions_;
  Tensors tensors_;
  SelectionState selection_;
  uint64_t steps_ = 0;
  std::vector<ffi::Tensor> outputs_;
};

}  // namespace tt

#endif
