#include "stored.h"

#include <algorithm>
#include <cerrno>
#include <charconv>
#include <cstring>
#include <stdexcept>
#include <system_error>
#include <vector>

#include "error.h"
#include "json.h"
#include "machine.h"
#include "sha256.h"

namespace tt {
namespace {

constexpr const char* kCheckpointFormat = "1";

std::string reason(const std::system_error& error) { return std::strerror(error.code().value()); }

bool exists(const std::string& path) {
  try {
    uint64_t size;
    open_file(path, &size);
    return true;
  } catch (const std::system_error&) {
    return false;
  }
}

bool matches(const std::string& path, const StoredFile& file, uint64_t* size) {
  try {
    open_file(path, size);
    if (*size != static_cast<uint64_t>(file.size)) return false;
    const Checksum found = checksum(path);
    return found.size == *size && found.sha256 == file.sha256;
  } catch (const std::system_error&) {
    return false;
  }
}

// What differs between ``state`` and ``wanted``, a few of many; "" if nothing does.
std::string differences(const std::map<std::string, TensorView>& state, const Wanted& wanted) {
  std::vector<std::string> wrong;
  for (const auto& [name, spec] : wanted) {
    const auto found = state.find(name);
    if (found == state.end()) {
      wrong.push_back(name + " is missing");
    } else if (found->second.shape != spec.shape || found->second.dtype != spec.dtype) {
      wrong.push_back(name + " is " + found->second.dtype->name + shown(found->second.shape) + ", want " + spec.dtype->name + shown(spec.shape));
    }
  }
  for (const auto& [name, tensor] : state) {
    if (!wanted.count(name)) wrong.push_back(name + " is unexpected");
  }
  std::string text;
  for (size_t i = 0; i < wrong.size() && i < 5; ++i) text += (i ? "; " : "") + wrong[i];
  return wrong.size() > 5 ? text + " and " + std::to_string(wrong.size() - 5) + " more" : text;
}

bool begins(const std::string& name, const char* prefix) { return name.rfind(prefix, 0) == 0; }

// Whether ``state`` has all parameters and buffers of ``wanted``, and differs in what depends on how a model is trained.
bool same_model(const std::map<std::string, TensorView>& state, const Wanted& wanted) {
  for (const auto& [name, spec] : wanted) {
    if (spec.role != Role::kParameter && spec.role != Role::kBuffer) continue;
    const auto found = state.find(name);
    if (found == state.end() || found->second.shape != spec.shape || found->second.dtype != spec.dtype) return false;
  }
  return std::all_of(state.begin(), state.end(), [&](const auto& one) {
    return wanted.count(one.first) || begins(one.first, "optimizer:") || begins(one.first, "selection:") || begins(one.first, "random:");
  });
}

// One sha256 over the facts and every tensor: name, dtype, shape, values.
std::string digest_of(const std::map<std::string, std::string>& facts, const std::map<std::string, TensorView>& state) {
  std::string text = "{", between;
  for (const auto& [key, value] : facts) {
    if (key == "digest") continue;
    text += between + quoted(key) + ": " + quoted(value);
    between = ", ";
  }
  Sha256 digest;
  digest.update(text + "}");
  for (const auto& [name, tensor] : state) {
    digest.update("[" + quoted(name) + ", \"" + tensor.dtype->name + "\", " + shown(tensor.shape) + "]");
    digest.update(tensor.bytes);
  }
  return digest.hex();
}

std::string fact(const std::map<std::string, std::string>& facts, const char* name) {
  const auto found = facts.find(name);
  return found == facts.end() ? "" : found->second;
}

uint64_t checked_steps(const TensorFile& file, const std::string& where) {
  if (fact(file.facts, "kind") != "checkpoint") throw checkpoint_error(where + ": it was not written by tvmtrain_save or TrainStep.save; weights alone become a checkpoint where Python is: step.load_state_dict(weights), then step.save(file)");
  if (const std::string format = fact(file.facts, "format"); format != kCheckpointFormat) {
    throw checkpoint_error(where + ": format " + format + ", and this tvmtrain reads format " + kCheckpointFormat);
  }
  if (fact(file.facts, "digest") != digest_of(file.facts, file.tensors)) {
    throw checkpoint_error(where + ": its digest does not fit its content: the file is damaged");
  }
  const std::string text = fact(file.facts, "steps");
  int64_t steps = -1;
  const auto [stop, error] = std::from_chars(text.data(), text.data() + text.size(), steps);
  if (error != std::errc() || stop != text.data() + text.size() || steps < 0) throw checkpoint_error(where + ": '" + text + "' is no number of steps");
  return static_cast<uint64_t>(steps);
}

}  // namespace

Manifest read_manifest(const std::string& folder) {
  const std::string path = folder + "/manifest.json";
  try {
    const Bytes data = read_file(path, kMostJsonBytes);
    Manifest manifest = parse_manifest({reinterpret_cast<const char*>(data.data()), data.size()});
    check_machine(manifest.device);
    return manifest;
  } catch (const std::system_error& error) {
    if (error.code().value() == ENOENT) throw artifact_error(path + ": the file is missing; is this the folder of an artifact?");
    throw artifact_error(path + ": cannot be read: " + reason(error));
  } catch (const std::invalid_argument& error) {
    throw artifact_error(path + ": " + error.what());
  }
}

std::string locate(const std::string& folder, const std::string& name, const StoredFile& file) {
  const std::string path = folder + "/" + name, aside = folder + "/.new-" + name;
  uint64_t size = 0, other;
  if (matches(path, file, &size)) return path;
  if (matches(aside, file, &other)) return aside;
  if (!exists(path)) throw artifact_error(path + ": the file is missing; copy the whole folder again");
  const std::string why = size != static_cast<uint64_t>(file.size)
                              ? "it has " + std::to_string(size) + " bytes and the manifest says " + std::to_string(file.size)
                              : "its sha256 is not the manifest's";
  throw artifact_error(path + ": " + why + "; the file is damaged or foreign; build or copy the artifact again");
}

TensorFile read_parameters(std::string_view data, const Manifest& manifest) {
  try {
    TensorFile file = parse_tensors(data);
    Wanted stored = manifest.state;
    for (const std::string& name : manifest.zeros) stored.erase(name);
    const std::string wrong = differences(file.tensors, stored);
    if (!wrong.empty()) throw artifact_error("parameters.safetensors does not fit this model: " + wrong);
    return file;
  } catch (const std::invalid_argument& error) {
    throw artifact_error(std::string("parameters.safetensors: not a readable safetensors file (") + error.what() + ")");
  }
}

TensorFile read_checkpoint(std::string_view data, const Wanted& wanted, const std::string& where, uint64_t* steps) {
  try {
    TensorFile file = parse_tensors(data);
    *steps = checked_steps(file, where);
    const std::string wrong = differences(file.tensors, wanted);
    if (!wrong.empty() && same_model(file.tensors, wanted)) {
      throw checkpoint_error(where + " does not fit this model: " + wrong + "; it is of this model with another plan or optimizer: compile with the same --plan and --optimizer as the step that wrote it");
    }
    if (!wrong.empty()) throw checkpoint_error(where + " does not fit this model: " + wrong);
    return file;
  } catch (const std::invalid_argument& error) {
    throw checkpoint_error(where + ": not a readable safetensors file (" + error.what() + "); it is truncated or damaged");
  }
}

void write_checkpoint(const std::string& path, const std::map<std::string, TensorView>& state, uint64_t steps, const std::string& version) {
  std::map<std::string, std::string> facts{{"kind", "checkpoint"}, {"format", kCheckpointFormat}, {"tvmtrain", version}, {"steps", std::to_string(steps)}};
  facts["digest"] = digest_of(facts, state);
  std::vector<const TensorView*> order;
  const std::string header = tensor_header(state, facts, &order);
  std::vector<std::string_view> parts{header};
  for (const TensorView* tensor : order) parts.push_back(tensor->bytes);
  replace_file(path, parts);
}

}  // namespace tt
