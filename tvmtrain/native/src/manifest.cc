#include "manifest.h"

#include <algorithm>
#include <charconv>
#include <cmath>
#include <set>
#include <stdexcept>

#include "sha256.h"

namespace tt {
namespace {

using Kind = Json::Kind;

constexpr const char* kRoles[] = {"input", "target", "rate", "channels", "loss", "output", "gradient", "prepared", "parameter", "buffer", "optimizer", "random"};
constexpr const char* kSelects[] = {"first", "magnitude", "random", "rotate"};
constexpr const char* kLosses[] = {"cross_entropy", "mse", "bce_with_logits", "custom"};
constexpr const char* kKinds[] = {"null", "a truth value", "a number", "text", "a list", "an object"};

[[noreturn]] void fail(const std::string& reason) { throw std::invalid_argument(reason); }

template <size_t n>
size_t index_of(const char* const (&names)[n], const std::string& name, const std::string& what) {
  for (size_t i = 0; i < n; ++i) {
    if (name == names[i]) return i;
  }
  std::string known;
  for (const char* one : names) known += (known.empty() ? "" : ", ") + std::string(one);
  fail(what + " is '" + name + "'; want one of " + known);
}

// A JSON object whose fields are read with their kind checked.
class Fields {
 public:
  Fields(const Json& data, std::string where) : data_(data), where_(std::move(where)) {
    if (data.kind != Kind::kObject) fail(where_ + " is " + kKinds[static_cast<int>(data.kind)] + "; want an object");
  }

  const Json& get(const std::string& key, Kind kind) const {
    const auto found = data_.fields.find(key);
    if (found == data_.fields.end()) fail(where_ + " lacks '" + key + "'");
    const Kind got = found->second.kind;
    if (got != kind) fail(where_ + ": '" + key + "' is " + kKinds[static_cast<int>(got)] + "; want " + kKinds[static_cast<int>(kind)]);
    return found->second;
  }

  bool has(const std::string& key) const {
    const auto found = data_.fields.find(key);
    return found != data_.fields.end() && found->second.kind != Kind::kNull;
  }

  std::string text(const std::string& key) const { return get(key, Kind::kString).text; }
  int64_t whole(const std::string& key) const { return whole_number(get(key, Kind::kNumber), where_ + ": '" + key + "'"); }
  std::optional<int64_t> optional(const std::string& key) const { return has(key) ? std::optional(whole(key)) : std::nullopt; }

  double number(const std::string& key) const {
    const std::string& digits = get(key, Kind::kNumber).text;
    double value = 0;
    if (!to_double(digits, &value)) fail(where_ + ": '" + key + "' is " + digits + ", which is no number of 64 bits");
    return value;
  }

  Fields inner(const std::string& key) const { return {get(key, Kind::kObject), where_ + ": " + key}; }

  template <typename Make>
  auto list(const std::string& key, Make make) const {
    std::vector<decltype(make(*this))> values;
    const Json& array = get(key, Kind::kArray);
    for (size_t i = 0; i < array.items.size(); ++i) values.push_back(make(Fields(array.items[i], where_ + ": " + key + "[" + std::to_string(i) + "]")));
    return values;
  }

  std::vector<std::string> names(const std::string& key) const {
    std::vector<std::string> values;
    for (const Json& item : get(key, Kind::kArray).items) {
      if (item.kind != Kind::kString) fail(where_ + ": '" + key + "' holds " + kKinds[static_cast<int>(item.kind)] + "; want text only");
      values.push_back(item.text);
    }
    return values;
  }

  Shape shape(const std::string& key) const {
    Shape sizes;
    for (const Json& item : get(key, Kind::kArray).items) sizes.push_back(whole_number(item, where_ + ": '" + key + "'"));
    return sizes;
  }

  std::map<std::string, std::string> texts(const std::string& key) const {
    std::map<std::string, std::string> values;
    const Fields object = inner(key);
    for (const auto& [name, value] : object.data_.fields) values[name] = object.text(name);
    return values;
  }

  const Json& data() const { return data_; }

 private:
  static int64_t whole_number(const Json& value, const std::string& where) {
    int64_t number = 0;
    const char* end = value.text.data() + value.text.size();
    const auto [stop, error] = std::from_chars(value.text.data(), end, number);
    if (value.kind != Kind::kNumber || error != std::errc() || stop != end) fail(where + " is no whole number of 64 bits");
    return number;
  }

  const Json& data_;
  std::string where_;
};

TensorSpec spec_of(const Fields& fields) {
  TensorSpec spec;
  spec.name = fields.text("name");
  spec.role = static_cast<Role>(index_of(kRoles, fields.text("role"), "the role of tensor '" + spec.name + "'"));
  const std::string dtype = fields.text("dtype");
  spec.dtype = dtype_named(dtype);
  if (!spec.dtype) fail(spec.shown() + " has the unknown dtype '" + dtype + "'");
  spec.shape = fields.shape("shape");
  uint64_t bytes;
  if (!byte_count(spec.shape, *spec.dtype, &bytes)) fail(spec.shown() + " has the shape " + shown(spec.shape) + "; want sizes of 0 or more");
  return spec;
}

Entry entry_of(const Fields& fields) { return {fields.text("name"), fields.list("inputs", spec_of), fields.list("outputs", spec_of)}; }

Selection selection_of(const Fields& fields) {
  const std::string layer = fields.text("layer");
  const auto select = static_cast<Select>(index_of(kSelects, fields.text("select"), "selection of layer '" + layer + "'"));
  return {layer, fields.text("weight"), fields.whole("channels"), fields.whole("count"), select, fields.whole("seed")};
}

Loss loss_of(const Fields& fields) {
  const std::string name = fields.text("name");
  index_of(kLosses, name, "loss");
  return {name, fields.optional("classes"), fields.optional("ignore_index")};
}

Device device_of(const Fields& fields) {
  Device device;
  device.name = fields.has("name") ? fields.text("name") : "?";
  device.arch = fields.has("arch") ? fields.text("arch") : "unknown";
  if (fields.has("target")) {
    const Fields target = fields.inner("target");
    device.gpu = target.has("kind") && target.text("kind") == "cuda";
  }
  return device;
}

std::map<std::string, EntryMemory> memory_of(const Fields& fields) {
  std::map<std::string, EntryMemory> memory;
  const Fields entries = fields.inner("entries");
  for (const auto& [name, value] : entries.data().fields) {
    const Fields one = entries.inner(name);
    const EntryMemory bytes{one.whole("arena"), one.whole("results"), one.whole("workspace")};
    if (std::min({bytes.arena, bytes.results, bytes.workspace}) < 0) fail("memory of entry '" + name + "' is negative");
    memory[name] = bytes;
  }
  return memory;
}

std::map<std::string, StoredFile> files_of(const Fields& fields) {
  std::map<std::string, StoredFile> files;
  const Fields listed = fields.inner("files");
  for (const auto& [name, value] : listed.data().fields) {
    if (name != "lib.so" && name != "parameters.safetensors" && name != "plan.toml") fail("files: '" + name + "' is none of an artifact's");
    const Fields one = listed.inner(name);
    files[name] = {one.whole("size"), one.text("sha256")};
  }
  if (!files.count("lib.so") || !files.count("parameters.safetensors")) fail("files: want lib.so and parameters.safetensors");
  return files;
}

// Every tensor means the same in all entries. State is found by its name alone, whatever its role.
void check_specs(Manifest& manifest) {
  std::map<std::pair<int, std::string>, const TensorSpec*> seen;
  const auto look = [&](const TensorSpec& spec) {
    const int group = is_state(spec.role) ? -1 : static_cast<int>(spec.role);
    const auto& first = *seen.emplace(std::pair(group, spec.name), &spec).first->second;
    if (!(first == spec)) fail("'" + spec.name + "' is " + first.shown() + shown(first.shape) + " in one place and " + spec.shown() + shown(spec.shape) + " in another");
  };
  for (const Entry& entry : manifest.entries) {
    for (const auto* side : {&entry.inputs, &entry.outputs}) std::for_each(side->begin(), side->end(), look);
    for (const TensorSpec& spec : entry.inputs) {
      if (is_state(spec.role)) manifest.state.emplace(spec.name, spec);
    }
  }
  for (const TensorSpec& spec : manifest.unread) {
    look(spec);
    if (is_state(spec.role)) manifest.state.emplace(spec.name, spec);
  }
}

using Keys = std::set<std::pair<Role, std::string>>;

Keys keys(const std::vector<TensorSpec>& specs) {
  Keys found;
  for (const TensorSpec& spec : specs) found.emplace(spec.role, spec.name);
  return found;
}

void check_scalar(const Manifest& manifest, const char* name, Role role) {
  const Entry& entry = manifest.entry(name);
  int count = 0;
  for (const TensorSpec& spec : role == Role::kRate ? entry.inputs : entry.outputs) {
    if (spec.role != role) continue;
    ++count;
    if (!spec.shape.empty() || spec.dtype->kind != 'f') fail(std::string("entry '") + name + "': " + spec.shown() + " is no floating scalar");
  }
  if (count != 1) fail(std::string("entry '") + name + "' has " + std::to_string(count) + " of role " + role_name(role) + "; want one");
}

// What an entry takes exists: data of the roles that it is called with, state, and what "prepare" makes.
void check_inputs(const Entry& entry, const Keys& made) {
  const bool trains = entry.name == "train_step" || entry.name == "gradients", judges = entry.name == "loss";
  for (const TensorSpec& spec : entry.inputs) {
    const bool given = (spec.role == Role::kInput && !judges) || (spec.role == Role::kTarget && (trains || judges)) ||
                       (spec.role == Role::kRate && trains) || (spec.role == Role::kChannels && trains) ||
                       (spec.role == Role::kOutput && judges) || (spec.role == Role::kPrepared && made.count({spec.role, spec.name})) ||
                       is_state(spec.role);
    if (!given) fail("entry '" + entry.name + "' takes " + spec.shown() + ", which nothing gives");
    if (entry.name == "prepare" && !is_state(spec.role)) fail("entry 'prepare' takes " + spec.shown() + "; want parameters and buffers alone");
  }
}

void check_entries(const Manifest& manifest) {
  std::set<std::string> names;
  for (const Entry& entry : manifest.entries) {
    if (!names.insert(entry.name).second) fail("entry '" + entry.name + "' stands twice");
  }
  for (const char* name : {"train_step", "predict", "loss"}) {
    if (!names.count(name)) fail(std::string("there is no entry '") + name + "'");
  }
  const Entry* prepare = manifest.find("prepare");
  const Keys made = prepare ? keys(prepare->outputs) : Keys();
  for (const Entry& entry : manifest.entries) {
    const Keys taken = keys(entry.inputs);
    for (const TensorSpec& spec : entry.outputs) {
      if (is_state(spec.role) && !taken.count({spec.role, spec.name})) fail("entry '" + entry.name + "' returns state that it does not take: " + spec.name);
    }
    check_inputs(entry, made);
  }
  check_scalar(manifest, "train_step", Role::kRate);
  check_scalar(manifest, "train_step", Role::kLoss);
  check_scalar(manifest, "loss", Role::kLoss);
}

void check_settings(const Manifest& manifest) {
  const auto is_parameter = [&](const std::string& name) {
    const auto found = manifest.state.find(name);
    return found != manifest.state.end() && found->second.role == Role::kParameter;
  };
  for (const auto& [tied, name] : manifest.aliases) {
    if (!manifest.state.count(name) || manifest.state.count(tied)) fail("alias '" + tied + "' of '" + name + "': want a new name for existing state");
  }
  for (const std::string& name : manifest.trained) {
    if (!is_parameter(name)) fail("'" + name + "' is trained and no parameter");
  }
  for (const TensorSpec& spec : manifest.entry("loss").inputs) {
    const bool numbers = spec.role == Role::kTarget && (spec.dtype->kind == 'i' || spec.dtype->kind == 'u');
    if (numbers && manifest.loss.name == "cross_entropy" && !manifest.loss.classes) fail("a cross_entropy on class numbers needs loss.classes, the bound of the labels");
  }
  if (manifest.batch < 1 || manifest.loss.classes.value_or(1) < 1 || !std::isfinite(manifest.lr)) fail("batch, classes or lr out of range: want 1 or more, and a finite rate");
}

// The model's own state is always stored.
std::set<std::string> zeros_of(const Fields& fields, const Manifest& manifest) {
  std::set<std::string> zeros;
  for (const std::string& name : fields.names("zeros")) {
    const auto found = manifest.state.find(name);
    const bool left_out = found != manifest.state.end() && (found->second.role == Role::kOptimizer || found->second.role == Role::kRandom);
    if (!left_out || !zeros.insert(name).second) fail("zeros: '" + name + "': want state of the optimizer or of random numbers, each once; all else is stored");
  }
  return zeros;
}

void check_selection(const Manifest& manifest, const Selection& chosen) {
  const std::string where = "selection of layer '" + chosen.layer + "': ";
  if (chosen.count < 1 || chosen.count > chosen.channels) fail(where + std::to_string(chosen.count) + " of " + std::to_string(chosen.channels) + " channels; want 1 or more of them");
  const bool trained = std::count(manifest.trained.begin(), manifest.trained.end(), chosen.weight) > 0;
  const Shape shape = trained ? manifest.state.at(chosen.weight).shape : Shape();
  const bool fits = shape.size() >= 2 && (shape[1] == chosen.channels || (shape[1] == 1 && shape[0] % chosen.channels == 0));
  if (!fits || manifest.state.at(chosen.weight).dtype->kind != 'f') fail(where + "'" + chosen.weight + "' is no trained weight with " + std::to_string(chosen.channels) + " channels");
}

void check_selections(const Manifest& manifest) {
  std::set<std::string> layers;
  std::map<std::string, int64_t> counts;
  for (const Selection& chosen : manifest.selections) {
    check_selection(manifest, chosen);
    if (!layers.insert(chosen.layer).second || !counts.emplace(chosen.weight, chosen.count).second) fail("two selections of layer '" + chosen.layer + "'");
  }
  for (const Entry& entry : manifest.entries) {
    for (const TensorSpec& spec : entry.inputs) {
      if (spec.role != Role::kChannels) continue;
      const auto found = counts.find(spec.name);
      if (found == counts.end() || spec.shape != Shape{found->second} || spec.dtype->code != TVMTRAIN_INT32) fail("entry '" + entry.name + "' takes channels of '" + spec.name + "' that no selection gives");
    }
  }
}

void check_memory(const Manifest& manifest) {
  for (const Entry& entry : manifest.entries) {
    if (!manifest.memory.count(entry.name)) fail("memory of entry '" + entry.name + "' is not told");
  }
}

void check_digest(const Json& document) {
  Json content = document;
  content.fields.erase("digest");
  Sha256 digest;
  digest.update(canonical(content));
  if (Fields(document, "manifest").text("digest") != digest.hex()) {
    fail("its digest does not fit its content: the file is damaged or was edited; build or copy the artifact again");
  }
}

void check_format(const Json& document) {
  const Fields fields(document, "manifest");
  const int64_t found = fields.whole("format");
  if (found == kFormat) return;
  fail("format " + std::to_string(found) + ", and this tvmtrain reads format " + std::to_string(kFormat) + "; build the artifact again, or take the program of the same version");
}

}  // namespace

const char* role_name(Role role) { return kRoles[static_cast<int>(role)]; }

int64_t rows_of(const TensorSpec& spec, int64_t batch) {
  if (spec.shape.empty() || spec.shape[0] % batch || (spec.role == Role::kInput && spec.shape[0] != batch)) return 0;
  return spec.shape[0] / batch;
}

Shape shape_for(const TensorSpec& spec, int64_t count, int64_t batch) {
  Shape shape = spec.shape;
  if (const int64_t rows = rows_of(spec, batch)) shape[0] = rows * count;
  return shape;
}

uint64_t TensorSpec::bytes() const {
  uint64_t bytes = 0;
  byte_count(shape, *dtype, &bytes);
  return bytes;
}

std::string TensorSpec::shown() const { return std::string(role_name(role)) + " '" + name + "'"; }

const Entry* Manifest::find(std::string_view name) const {
  for (const Entry& entry : entries) {
    if (entry.name == name) return &entry;
  }
  return nullptr;
}

Manifest parse_manifest(std::string_view text) {
  const Json document = parse_json(text);
  check_format(document);
  check_digest(document);
  return manifest_of(document);
}

Manifest manifest_of(const Json& document) {
  const Fields fields(document, "manifest");
  Manifest manifest;
  manifest.files = files_of(fields);
  manifest.entries = fields.list("entries", entry_of);
  manifest.aliases = fields.texts("aliases");
  manifest.trained = fields.names("trained");
  manifest.loss = loss_of(fields.inner("loss"));
  manifest.device = device_of(fields.inner("device"));
  manifest.device.features = fields.names("features");
  manifest.versions = fields.texts("versions");
  manifest.lr = fields.number("lr");
  manifest.batch = fields.whole("batch");
  manifest.memory = memory_of(fields.inner("memory"));
  manifest.unread = fields.list("unread", spec_of);
  manifest.selections = fields.list("selections", selection_of);
  check_specs(manifest);
  manifest.zeros = zeros_of(fields, manifest);
  check_entries(manifest);
  check_settings(manifest);
  check_selections(manifest);
  check_memory(manifest);
  return manifest;
}

}  // namespace tt
