// A running training step: tvmtrain/runtime.py in C++, on TVM's runtime.
#ifndef TVMTRAIN_STEP_H_
#define TVMTRAIN_STEP_H_

#include <cstdint>
#include <memory>
#include <string>
#include <vector>

#include "error.h"
#include "manifest.h"
#include "tvmtrain.h"

namespace tt {

// The error about another number of samples than a batch, where ``spec`` is one for all of them.
Error whole_batch(const TensorSpec& spec, int64_t batch);

class Step {
 public:
  // The artifact in ``folder``; threads: 0 for the default. Throws for what is damaged, foreign or incomplete.
  static std::unique_ptr<Step> load(const std::string& folder, int threads);
  virtual ~Step() = default;

  // The loss of one step, as tvmtrain_step. It throws, or the loss is not finite: then nothing has changed.
  virtual double train(const tvmtrain_array* inputs, const tvmtrain_array* targets, double rate) = 0;

  // As the functions of tvmtrain.h.
  virtual void predict(const tvmtrain_array* inputs, const tvmtrain_array* outputs) const = 0;

  // The compiled loss of a whole batch: the bytes of what predict gives and of the targets, each in order. Throws an input error for others.
  virtual double loss(const std::vector<std::string>& outputs, const std::vector<std::string>& targets) const = 0;

  virtual void save(const std::string& file) const = 0;
  virtual void restore(const std::string& file) = 0;
  virtual void read(const std::string& name, const tvmtrain_array& array) const = 0;
  virtual uint64_t steps() const = 0;
  virtual int threads() const = 0;

  // The bytes of output number ``i`` of the last training step, before its update.
  virtual std::string output(size_t i) const = 0;

  virtual const Manifest& manifest() const = 0;

  // The specs of one role of an entry, in order: of its inputs, or for kOutput of its outputs.
  std::vector<const TensorSpec*> specs(const char* entry, Role role) const;
};

}  // namespace tt

#endif
