#include "step.h"

#include <malloc.h>
#include <tvm/ffi/container/array.h>
#include <tvm/ffi/container/shape.h>
#include <tvm/ffi/container/tensor.h>
#include <tvm/ffi/device.h>
#include <tvm/ffi/extra/module.h>
#include <tvm/ffi/function.h>
#include <tvm/ffi/optional.h>

#include <algorithm>
#include <cmath>
#include <cstdio>
#include <cstring>
#include <map>
#include <system_error>
#include <utility>

#include "error.h"
#include "files.h"
#include "loading.h"
#include "machine.h"
#include "selection.h"
#include "stored.h"
#include "values.h"

namespace tt {
namespace {

namespace ffi = tvm::ffi;

DLDataType data_type(const DType& dtype) {
  const DLDataTypeCode code = dtype.kind == 'f' ? kDLFloat : dtype.kind == 'i' ? kDLInt : dtype.kind == 'u' ? kDLUInt : kDLBool;
  return {static_cast<uint8_t>(code), static_cast<uint8_t>(8 * dtype.bytes), 1};
}

Shape shape_of(const tvmtrain_array& array) {
  if (array.ndim < 0 || (array.ndim > 0 && !array.shape)) throw input_error("an array has " + std::to_string(array.ndim) + " dimensions and no shape");
  return Shape(array.shape, array.shape + array.ndim);
}

// The bytes of an array that has the dtype of ``spec``.
std::string_view checked_bytes(const TensorSpec& spec, const tvmtrain_array& array) {
  const DType* dtype = dtype_of(array.dtype);
  if (dtype != spec.dtype) throw input_error(spec.shown() + " has dtype " + (dtype ? dtype->name : "unknown") + "; want " + spec.dtype->name);
  uint64_t bytes;
  if (!byte_count(shape_of(array), *dtype, &bytes)) throw input_error(spec.shown() + " has shape " + shown(shape_of(array)) + ", which no array has");
  if (bytes && !array.data) throw input_error(spec.shown() + ": its data are NULL");
  return {static_cast<const char*>(array.data), static_cast<size_t>(bytes)};
}

void check_all(const TensorSpec& spec, std::string_view bytes, const Loss& loss) {
  check_values(spec, bytes, loss, [&](size_t flat) { return place_in(spec.shape, flat); });
}

void check_shape(const TensorSpec& spec, const Shape& got, int64_t batch) {
  if (got == spec.shape) return;
  std::string message = spec.shown() + " has shape " + shown(got) + "; want " + shown(spec.shape);
  if (rows_of(spec, batch) && got.size() == spec.shape.size() && std::equal(got.begin() + 1, got.end(), spec.shape.begin() + 1)) {
    message += ": training needs batches of exactly " + std::to_string(batch) + " samples, the compiled size; predict takes any number";
  }
  throw input_error(message);
}

// How many samples an array holds, whose axis 0 is free; 0 for one that all samples share.
int64_t samples_of(const TensorSpec& spec, const Shape& got, int64_t batch) {
  const int64_t rows = rows_of(spec, batch);
  if (!rows) {
    if (got != spec.shape) throw input_error(spec.shown() + " has shape " + shown(got) + "; want " + shown(spec.shape));
    return 0;
  }
  const bool fits = got.size() == spec.shape.size() && std::equal(got.begin() + 1, got.end(), spec.shape.begin() + 1);
  if (!fits || got[0] < 1 || got[0] % rows) {
    Shape rest(spec.shape.begin() + 1, spec.shape.end());
    throw input_error(spec.shown() + " has shape " + shown(got) + "; want N times " + std::to_string(rows) + " rows of " + shown(rest));
  }
  return got[0] / rows;
}

void agree(const TensorSpec& spec, int64_t got, int64_t* count) {
  if (got == 0) return;
  if (*count == 0) *count = got;
  if (got != *count) throw input_error("numbers of samples are " + std::to_string(*count) + " and, of " + spec.shown() + ", " + std::to_string(got) + "; want one number for all");
}

// Samples ``start`` .. ``start + size`` of an array, filled up to a batch with the last of them.
std::string piece_of(std::string_view bytes, size_t sample, int64_t start, int64_t size, int64_t batch) {
  std::string piece(bytes.substr(static_cast<size_t>(start) * sample, static_cast<size_t>(size) * sample));
  const std::string last = piece.substr(piece.size() - sample);
  for (int64_t i = size; i < batch; ++i) piece += last;
  return piece;
}

Wanted checkpoint_specs(const Manifest& manifest) {
  Wanted wanted = manifest.state;
  for (const Selection& chosen : manifest.selections) {
    const std::string key = selection_key(chosen);
    if (chosen.select == Select::kRandom) wanted.emplace(key, TensorSpec{Role::kRandom, key, {}, dtype_of(TVMTRAIN_INT64)});
    if (chosen.select == Select::kMagnitude) wanted.emplace(key, TensorSpec{Role::kRandom, key, {chosen.count}, dtype_of(TVMTRAIN_INT32)});
  }
  return wanted;
}

std::string_view view_of(const std::vector<int32_t>& values) { return {reinterpret_cast<const char*>(values.data()), values.size() * sizeof(int32_t)}; }
std::string_view view_of(const int64_t& value) { return {reinterpret_cast<const char*>(&value), sizeof value}; }

// Different channels of the layer, in order: what is compiled reads and writes there.
std::vector<int32_t> checked_channels(const Selection& chosen, const TensorView& stored, const std::string& where) {
  std::vector<int32_t> channels;
  for (size_t i = 0; i < static_cast<size_t>(chosen.count); ++i) {
    const int64_t channel = whole_at(*stored.dtype, stored.bytes, i);
    if (channel < 0 || channel >= chosen.channels || (i && channel <= channels.back())) {
      throw checkpoint_error(where + ": the channels of layer '" + chosen.layer + "' are not different ones of its " + std::to_string(chosen.channels) + ", in order");
    }
    channels.push_back(static_cast<int32_t>(channel));
  }
  return channels;
}

SelectionState stored_selection(const Manifest& manifest, const TensorFile& file, const std::string& where) {
  SelectionState state;
  for (const Selection& chosen : manifest.selections) {
    const std::string key = selection_key(chosen);
    if (chosen.select == Select::kRandom) state.seeds[key] = whole_at(*dtype_of(TVMTRAIN_INT64), file.tensors.at(key).bytes, 0);
    if (chosen.select == Select::kMagnitude) state.largest[key] = checked_channels(chosen, file.tensors.at(key), where);
  }
  return state;
}

// What was freed goes back to the system: the C library would keep it, beside all that running needs.
void give_back() {
#ifdef __GLIBC__
  malloc_trim(0);
#endif
}

class VmStep final : public Step {
 public:
  VmStep(const std::string& folder, int threads);

  double train(const tvmtrain_array* inputs, const tvmtrain_array* targets, double rate) override;
  void predict(const tvmtrain_array* inputs, const tvmtrain_array* outputs) const override;
  double loss(const std::vector<std::string>& outputs, const std::vector<std::string>& targets) const override;
  void save(const std::string& file) const override;
  void restore(const std::string& file) override;
  void read(const std::string& name, const tvmtrain_array& array) const override;
  uint64_t steps() const override { return steps_; }
  int threads() const override { return threads_; }
  std::string output(size_t i) const override { return bytes_of(outputs_.at(i)); }
  const Manifest& manifest() const override { return manifest_; }

 private:
  using Key = std::pair<Role, std::string>;
  using Given = std::map<Key, ffi::Tensor>;
  using Tensors = std::map<std::string, ffi::Tensor>;

  void start(const std::string& library);
  void use_threads() const;
  ffi::Tensor tensor(const Shape& shape, const DType& dtype, std::string_view bytes) const;
  std::string bytes_of(const ffi::Tensor& tensor) const;
  std::vector<ffi::Tensor> run(const Entry& entry, const Given& given, const Tensors& state) const;
  double loss_of(const Entry& entry, const std::vector<ffi::Tensor>& results) const;
  Tensors prepared(Tensors state) const;
  Given batch(const tvmtrain_array* inputs, const tvmtrain_array* targets) const;
  void add_channels(Given& given) const;
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

}  // namespace

Error whole_batch(const TensorSpec& spec, int64_t batch) {
  return input_error(spec.shown() + " of shape " + shown(spec.shape) + " is one for a whole batch; give exactly " + std::to_string(batch) + " samples");
}

VmStep::VmStep(const std::string& folder, int threads) : manifest_(read_manifest(folder)), threads_(threads ? threads : default_threads()) {
  if (threads < 0) throw input_error("threads is " + std::to_string(threads) + "; want 1 or more, or 0 for every physical core");
  processors();
  std::map<std::string, std::string> places;
  for (const auto& [name, file] : manifest_.files) places[name] = locate(folder, name, file);
  Bytes data = read_file(places.at("parameters.safetensors"));
  const TensorFile parameters = read_parameters({reinterpret_cast<const char*>(data.data()), data.size()}, manifest_);
  use_threads();
  start(places.at("lib.so"));
  selection_ = initial_selection(parameters);
  Tensors state;
  for (const auto& [name, view] : parameters.tensors) state[name] = tensor(view.shape, *view.dtype, view.bytes);
  data = Bytes();  // room for the zeros
  for (const std::string& name : manifest_.zeros) {
    const TensorSpec& spec = manifest_.state.at(name);
    state[name] = tensor(spec.shape, *spec.dtype, std::string(spec.bytes(), '\0'));
  }
  tensors_ = prepared(std::move(state));
  give_back();
}

void VmStep::start(const std::string& library) {
  if (manifest_.device.gpu) place_ = load_gpu(manifest_.device.name);
  try {
    const Quiet quiet;
    const ffi::Module module = ffi::Module::LoadFromFile(ffi::String(absolute(library)));
    const auto machine = module->GetFunction("vm_load_executable").value()().cast<ffi::Module>();
    constexpr int kPooled = 2;
    const ffi::Function initialize = machine->GetFunction("vm_initialization").value();
    if (place_.device_type == kDLCPU) {
      initialize(static_cast<int>(kDLCPU), 0, kPooled);
    } else {
      initialize(static_cast<int>(place_.device_type), place_.device_id, kPooled, static_cast<int>(kDLCPU), 0, kPooled);
    }
    for (const Entry& entry : manifest_.entries) functions_.emplace(entry.name, machine->GetFunction(entry.name).value());
    machine_ = machine;
  } catch (const std::exception& error) {  // of TVM: what it says comes without its backtrace
    const auto made = manifest_.versions.find("tvm");
    throw artifact_error("lib.so (TVM " + (made == manifest_.versions.end() ? "unknown" : made->second) + ") cannot be started: " + error.what());
  }
}

void VmStep::use_threads() const {
  thread_local int configured = 0;
  if (configured == threads_) return;
  const std::vector<int>& cpus = processors();
  ffi::Array<ffi::String> places;
  for (size_t i = 0; i < std::max(cpus.size(), static_cast<size_t>(threads_)); ++i) places.push_back(ffi::String(std::to_string(cpus[i % cpus.size()])));
  // -3: workers may run on all the listed processors.
  ffi::Function::GetGlobalRequired("runtime.config_threadpool")(-3, threads_, places);
  configured = threads_;
  const auto got = ffi::Function::GetGlobalRequired("runtime.NumThreads")().cast<int>();
  if (got < threads_) {
    std::fprintf(stderr, "warning: TVM was used in this thread before and keeps to %d threads instead of %d; set TVM_NUM_THREADS=%d\n", got, threads_, threads_);
  }
}

ffi::Tensor VmStep::tensor(const Shape& shape, const DType& dtype, std::string_view bytes) const {
  static const ffi::Function allocate = ffi::Function::GetGlobalRequired("runtime.TVMTensorAllocWithScope");
  static const ffi::Function copy = ffi::Function::GetGlobalRequired("runtime.TVMTensorCopyFromBytes");
  auto made = allocate(ffi::Shape(shape.begin(), shape.end()), data_type(dtype), place_, nullptr).cast<ffi::Tensor>();
  if (!bytes.empty()) copy(made, const_cast<void*>(static_cast<const void*>(bytes.data())), static_cast<int64_t>(bytes.size()));
  return made;
}

std::string VmStep::bytes_of(const ffi::Tensor& tensor) const {
  static const ffi::Function copy = ffi::Function::GetGlobalRequired("runtime.TVMTensorCopyToBytes");
  std::string bytes(ffi::GetDataSize(tensor), '\0');
  if (!bytes.empty()) copy(tensor, static_cast<void*>(bytes.data()), static_cast<int64_t>(bytes.size()));
  return bytes;
}

std::vector<ffi::Tensor> VmStep::run(const Entry& entry, const Given& given, const Tensors& state) const {
  use_threads();
  std::vector<ffi::AnyView> arguments;
  for (const TensorSpec& spec : entry.inputs) {
    const auto found = given.find({spec.role, spec.name});
    arguments.emplace_back(found != given.end() ? found->second : state.at(spec.name));
  }
  ffi::Any result;
  functions_.at(entry.name).CallPacked(arguments.data(), static_cast<int32_t>(arguments.size()), &result);
  std::vector<ffi::Tensor> tensors;
  for (const ffi::Tensor& one : result.cast<ffi::Array<ffi::Tensor>>()) tensors.push_back(one);
  if (tensors.size() != entry.outputs.size()) {
    throw artifact_error("entry '" + entry.name + "' returned " + std::to_string(tensors.size()) + " tensors; the manifest has " + std::to_string(entry.outputs.size()));
  }
  return tensors;
}

double VmStep::loss_of(const Entry& entry, const std::vector<ffi::Tensor>& results) const {
  for (size_t i = 0; i < results.size(); ++i) {
    if (entry.outputs[i].role == Role::kLoss) return float_at(*entry.outputs[i].dtype, bytes_of(results[i]), 0);
  }
  return NAN;
}

// With what the compiled step has of the frozen weights: folded once, here, and not in every step.
VmStep::Tensors VmStep::prepared(Tensors state) const {
  const Entry* entry = manifest_.find("prepare");
  if (!entry) return state;
  const std::vector<ffi::Tensor> made = run(*entry, {}, state);
  for (size_t i = 0; i < made.size(); ++i) state[entry->outputs[i].name] = made[i];
  return state;
}

SelectionState VmStep::initial_selection(const TensorFile& parameters) const {
  SelectionState state;
  for (const Selection& chosen : manifest_.selections) {
    const std::string key = selection_key(chosen);
    if (chosen.select == Select::kRandom) state.seeds[key] = chosen.seed;
    if (chosen.select == Select::kMagnitude) {
      const TensorView& weight = parameters.tensors.at(chosen.weight);
      state.largest[key] = largest_channels(chosen, weight.shape, floats_of(*weight.dtype, weight.bytes));
    }
  }
  return state;
}

VmStep::Given VmStep::batch(const tvmtrain_array* inputs, const tvmtrain_array* targets) const {
  Given given;
  for (Role role : {Role::kInput, Role::kTarget}) {
    const tvmtrain_array* arrays = role == Role::kInput ? inputs : targets;
    const auto wanted = specs("train_step", role);
    if (!wanted.empty() && !arrays) throw input_error(std::string("the ") + role_name(role) + "s are NULL");
    for (size_t i = 0; i < wanted.size(); ++i) {
      check_shape(*wanted[i], shape_of(arrays[i]), manifest_.batch);
      const std::string_view bytes = checked_bytes(*wanted[i], arrays[i]);
      check_all(*wanted[i], bytes, manifest_.loss);
      given[{role, wanted[i]->name}] = tensor(wanted[i]->shape, *wanted[i]->dtype, bytes);
    }
  }
  return given;
}

void VmStep::add_channels(Given& given) const {
  for (const Selection& chosen : manifest_.selections) {
    const std::vector<int32_t> channels = chosen_channels(chosen, steps_, selection_);
    given[{Role::kChannels, chosen.weight}] = tensor({chosen.count}, *dtype_of(TVMTRAIN_INT32), view_of(channels));
  }
}

double VmStep::train(const tvmtrain_array* inputs, const tvmtrain_array* targets, double rate) {
  const Entry& entry = manifest_.entry("train_step");
  const TensorSpec& rate_spec = *specs("train_step", Role::kRate).at(0);
  const std::string rounded = float_bytes(*rate_spec.dtype, rate < 0 ? manifest_.lr : rate);
  if (!std::isfinite(rate) || !std::isfinite(float_at(*rate_spec.dtype, rounded, 0))) {
    throw input_error("lr is " + std::to_string(rate) + "; want a number of 0 or more that is finite in " + rate_spec.dtype->name + ", or a negative one for the optimizer's");
  }
  Given given = batch(inputs, targets);
  add_channels(given);
  given[{Role::kRate, rate_spec.name}] = tensor({}, *rate_spec.dtype, rounded);
  const std::vector<ffi::Tensor> results = run(entry, given, tensors_);
  const double loss = loss_of(entry, results);
  // The state was changed in place and is the old one again: the step saw to that itself.
  if (!std::isfinite(loss)) return loss;
  outputs_.clear();
  for (size_t i = 0; i < results.size(); ++i) {
    if (is_state(entry.outputs[i].role)) tensors_[entry.outputs[i].name] = results[i];
    if (entry.outputs[i].role == Role::kOutput) outputs_.push_back(results[i]);
  }
  ++steps_;
  return loss;
}

void VmStep::predict(const tvmtrain_array* inputs, const tvmtrain_array* outputs) const {
  const Entry& entry = manifest_.entry("predict");
  const int64_t batch = manifest_.batch;
  const auto taken = specs("predict", Role::kInput), made = specs("predict", Role::kOutput);
  if (!inputs || !outputs) throw input_error("inputs or outputs are NULL");
  int64_t count = 0;
  std::vector<std::string_view> bytes;
  for (size_t i = 0; i < taken.size(); ++i) {
    agree(*taken[i], samples_of(*taken[i], shape_of(inputs[i]), batch), &count);
    bytes.push_back(checked_bytes(*taken[i], inputs[i]));
    check_all(*taken[i], bytes.back(), manifest_.loss);
  }
  if (count == 0) count = batch;
  for (size_t i = 0; i < made.size(); ++i) {
    agree(*made[i], samples_of(*made[i], shape_of(outputs[i]), batch), &count);
    checked_bytes(*made[i], outputs[i]);
  }
  for (const TensorSpec* spec : made) {
    if (count != batch && !rows_of(*spec, batch)) throw whole_batch(*spec, batch);
  }
  for (int64_t start = 0; start < count; start += batch) {
    const int64_t size = std::min(batch, count - start);
    Given given;
    for (size_t i = 0; i < taken.size(); ++i) {
      const auto sample = static_cast<size_t>(taken[i]->bytes() / static_cast<uint64_t>(batch));
      const std::string piece = rows_of(*taken[i], batch) ? piece_of(bytes[i], sample, start, size, batch) : std::string(bytes[i]);
      given[{Role::kInput, taken[i]->name}] = tensor(taken[i]->shape, *taken[i]->dtype, piece);
    }
    size_t i = 0;
    const std::vector<ffi::Tensor> results = run(entry, given, tensors_);
    for (size_t j = 0; j < results.size(); ++j) {
      if (entry.outputs[j].role != Role::kOutput) continue;
      const std::string values = bytes_of(results[j]);
      const bool rows = rows_of(entry.outputs[j], batch) > 0;
      const size_t sample = values.size() / static_cast<size_t>(batch), taken = rows ? sample * static_cast<size_t>(size) : values.size();
      if (taken) std::memcpy(static_cast<char*>(outputs[i].data) + static_cast<size_t>(start) * sample, values.data(), taken);
      ++i;
    }
  }
}

double VmStep::loss(const std::vector<std::string>& outputs, const std::vector<std::string>& targets) const {
  const Entry& entry = manifest_.entry("loss");
  Given given;
  const auto add = [&](const std::vector<const TensorSpec*>& specs, const std::vector<std::string>& values) {
    for (size_t i = 0; i < specs.size(); ++i) {
      const std::string& bytes = values.at(i);
      if (bytes.size() != specs[i]->bytes()) throw whole_batch(*specs[i], manifest_.batch);
      given[{specs[i]->role, specs[i]->name}] = tensor(specs[i]->shape, *specs[i]->dtype, bytes);
    }
  };
  add(specs("predict", Role::kOutput), outputs);
  add(specs("train_step", Role::kTarget), targets);
  const std::vector<ffi::Tensor> results = run(entry, given, tensors_);
  return loss_of(entry, results);
}

void VmStep::save(const std::string& file) const {
  std::map<std::string, std::string> kept;
  std::map<std::string, TensorView> state;
  for (const auto& [name, spec] : manifest_.state) {
    const std::string& bytes = kept[name] = bytes_of(tensors_.at(name));
    state[name] = {spec.dtype, spec.shape, bytes};
  }
  for (const auto& [key, seed] : selection_.seeds) state[key] = {dtype_of(TVMTRAIN_INT64), {}, view_of(seed)};
  for (const auto& [key, channels] : selection_.largest) state[key] = {dtype_of(TVMTRAIN_INT32), {static_cast<int64_t>(channels.size())}, view_of(channels)};
  const auto version = manifest_.versions.find("tvmtrain");
  write_checkpoint(file, state, steps_, version == manifest_.versions.end() ? "unknown" : version->second);
}

void VmStep::restore(const std::string& path) {
  const std::string where = "checkpoint " + path;
  Bytes data;
  try {
    data = read_file(path);
  } catch (const std::system_error& error) {
    throw checkpoint_error(where + " cannot be read: " + std::strerror(error.code().value()));
  }
  uint64_t steps;
  const TensorFile file = read_checkpoint({reinterpret_cast<const char*>(data.data()), data.size()}, checkpoint_specs(manifest_), where, &steps);
  SelectionState selection = stored_selection(manifest_, file, where);
  Tensors state;
  for (const auto& [name, spec] : manifest_.state) {
    const TensorView& view = file.tensors.at(name);
    state[name] = tensor(view.shape, *view.dtype, view.bytes);
  }
  tensors_ = prepared(std::move(state));
  selection_ = std::move(selection);
  steps_ = steps;
  data = Bytes();
  give_back();
}

void VmStep::read(const std::string& name, const tvmtrain_array& array) const {
  const auto tied = manifest_.aliases.find(name);
  const auto found = manifest_.state.find(tied == manifest_.aliases.end() ? name : tied->second);
  if (found == manifest_.state.end()) throw input_error("this model has no parameter or buffer '" + name + "'");
  if (shape_of(array) != found->second.shape) throw input_error(found->second.shown() + " has shape " + shown(found->second.shape) + "; the array given for it has " + shown(shape_of(array)));
  checked_bytes(found->second, array);
  const std::string bytes = bytes_of(tensors_.at(found->first));
  if (!bytes.empty()) std::memcpy(array.data, bytes.data(), bytes.size());
}

std::unique_ptr<Step> Step::load(const std::string& folder, int threads) { return std::make_unique<VmStep>(folder, threads); }

std::vector<const TensorSpec*> Step::specs(const char* entry, Role role) const {
  std::vector<const TensorSpec*> found;
  const Entry& one = manifest().entry(entry);
  for (const TensorSpec& spec : role == Role::kOutput ? one.outputs : one.inputs) {
    if (spec.role == role) found.push_back(&spec);
  }
  return found;
}

}  // namespace tt
