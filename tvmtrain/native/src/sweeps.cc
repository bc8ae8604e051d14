#include "sweeps.h"

#include <algorithm>
#include <map>
#include <numeric>
#include <string_view>
#include <vector>

#include "error.h"
#include "files.h"
#include "tensors.h"

namespace tt {
namespace {

using Arrays = std::vector<std::string>;

uint64_t batch_of(const Step& step) { return static_cast<uint64_t>(step.manifest().batch); }

std::vector<uint64_t> rows_from(uint64_t start, uint64_t size) {
  std::vector<uint64_t> rows(size);
  std::iota(rows.begin(), rows.end(), start);
  return rows;
}

// ``values`` as arrays for ``size`` samples; ``shapes`` are theirs and stay.
std::vector<tvmtrain_array> arrays_of(Arrays& values, const std::vector<const TensorSpec*>& specs, const std::vector<Shape>& shapes) {
  std::vector<tvmtrain_array> arrays;
  for (size_t i = 0; i < values.size(); ++i) arrays.push_back({values[i].data(), specs[i]->dtype->code, static_cast<int>(shapes[i].size()), shapes[i].data()});
  return arrays;
}

std::vector<Shape> shapes_of(const Step& step, const std::vector<const TensorSpec*>& specs, uint64_t size) {
  std::vector<Shape> shapes;
  for (const TensorSpec* spec : specs) shapes.push_back(shape_for(*spec, static_cast<int64_t>(size), step.manifest().batch));
  return shapes;
}

// The outputs for ``size`` samples from number ``start`` on, a batch at most: the step fills it up.
Arrays outputs_of(const Step& step, const Dataset& data, uint64_t start, uint64_t size) {
  const auto inputs = step.specs("predict", Role::kInput), outputs = step.specs("predict", Role::kOutput);
  const std::vector<Shape> taken = shapes_of(step, inputs, size), made = shapes_of(step, outputs, size);
  const std::vector<uint64_t> rows = rows_from(start, size);
  Arrays given, results;
  for (size_t i = 0; i < inputs.size(); ++i) given.push_back(data.batch(i, rows.data(), size));
  for (size_t i = 0; i < outputs.size(); ++i) {
    uint64_t bytes = 0;
    byte_count(made[i], *outputs[i]->dtype, &bytes);
    results.emplace_back(bytes, '\0');
  }
  step.predict(arrays_of(given, inputs, taken).data(), arrays_of(results, outputs, made).data());
  return results;
}

Arrays targets_of(const Step& step, const Dataset& data, uint64_t start, uint64_t size) {
  const std::vector<uint64_t> rows = rows_from(start, size);
  const size_t before = step.specs("train_step", Role::kInput).size(), count = step.specs("train_step", Role::kTarget).size();
  Arrays targets;
  for (size_t i = 0; i < count; ++i) targets.push_back(data.batch(before + i, rows.data(), size));
  return targets;
}

// The place among ``specs`` of the first thing with ``role`` that the compiled loss takes.
size_t judged(const Step& step, Role role, const std::vector<const TensorSpec*>& specs) {
  for (const TensorSpec& spec : step.manifest().entry("loss").inputs) {
    if (spec.role != role) continue;
    const auto found = std::find_if(specs.begin(), specs.end(), [&](const TensorSpec* one) { return one->name == spec.name; });
    if (found != specs.end()) return static_cast<size_t>(found - specs.begin());
  }
  throw artifact_error(std::string("the loss of this step takes no ") + role_name(role) + " of it; build the artifact again");
}

Tally built_in(const Step& step, const Arrays& outputs, const Arrays& targets) {
  const auto made = step.specs("predict", Role::kOutput), wanted = step.specs("train_step", Role::kTarget);
  const size_t output = judged(step, Role::kOutput, made), target = judged(step, Role::kTarget, wanted);
  return measure(step.manifest().loss, {*made[output], outputs[output]}, {*wanted[target], targets[target]});
}

void write(const std::string& file, const std::map<std::string, TensorView>& tensors) {
  std::vector<const TensorView*> order;
  const std::string header = tensor_header(tensors, {}, &order);
  std::vector<std::string_view> parts{header};
  for (const TensorView* tensor : order) parts.push_back(tensor->bytes);
  replace_file(file, parts);
}

}  // namespace

bool predict(const Step& step, const Dataset& data, const std::string& file, const Stop& stop) {
  const auto outputs = step.specs("predict", Role::kOutput);
  const uint64_t batch = batch_of(step);
  Arrays all(outputs.size());
  for (const TensorSpec* spec : outputs) {
    if (data.size() > batch && !rows_of(*spec, step.manifest().batch)) throw whole_batch(*spec, step.manifest().batch);
  }
  for (uint64_t start = 0; start < data.size(); start += batch) {
    if (stop()) return false;
    const Arrays some = outputs_of(step, data, start, std::min(batch, data.size() - start));
    for (size_t i = 0; i < some.size(); ++i) all[i] += some[i];
  }
  const std::vector<Shape> shapes = shapes_of(step, outputs, data.size());
  std::map<std::string, TensorView> tensors;
  for (size_t i = 0; i < outputs.size(); ++i) tensors[outputs[i]->name] = {outputs[i]->dtype, shapes[i], all[i]};
  write(file, tensors);
  return true;
}

bool evaluate(const Step& step, const Dataset& data, const Stop& stop, Evaluation* result) {
  const uint64_t batch = batch_of(step);
  const bool custom = step.manifest().loss.name == "custom";
  const uint64_t count = custom ? data.size() - data.size() % batch : data.size();
  if (count == 0) {
    throw input_error(std::to_string(data.size()) + " samples to evaluate, and the loss, one of your own, was compiled for " + std::to_string(batch) + " at a time; give more");
  }
  *result = {{}, count};
  for (uint64_t start = 0; start < count; start += batch) {
    if (stop()) return false;
    const uint64_t size = std::min(batch, count - start);
    const Arrays outputs = outputs_of(step, data, start, size), targets = targets_of(step, data, start, size);
    if (custom) {
      result->tally.add({step.loss(outputs, targets), 1, 0, 0});
    } else {
      result->tally.add(built_in(step, outputs, targets));
    }
  }
  return true;
}

}  // namespace tt
