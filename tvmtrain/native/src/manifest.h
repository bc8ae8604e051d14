// What a compiled step is: manifest.json, as tvmtrain/artifact.py writes and checks it.
#ifndef TVMTRAIN_MANIFEST_H_
#define TVMTRAIN_MANIFEST_H_

#include <cstdint>
#include <map>
#include <optional>
#include <set>
#include <string>
#include <string_view>
#include <vector>

#include "json.h"
#include "tensors.h"

namespace tt {

constexpr int kFormat = 5;

enum class Role { kInput, kTarget, kRate, kChannels, kLoss, kOutput, kGradient, kPrepared, kParameter, kBuffer, kOptimizer, kRandom };

// Whether tensors of ``role`` live from step to step and are saved.
inline bool is_state(Role role) { return role >= Role::kParameter; }

const char* role_name(Role role);

struct TensorSpec {
  Role role;
  std::string name;
  Shape shape;
  const DType* dtype;

  bool operator==(const TensorSpec& other) const {
    return role == other.role && name == other.name && shape == other.shape && dtype == other.dtype;
  }
  uint64_t bytes() const;
  std::string shown() const;  // "input 'x'"
};

// Rows of axis 0 per sample; 0 for a tensor that all samples of a batch share.
int64_t rows_of(const TensorSpec& spec, int64_t batch);

// The shape of ``spec`` for ``count`` samples: that of the batch where they share it.
Shape shape_for(const TensorSpec& spec, int64_t count, int64_t batch);

struct Entry {
  std::string name;
  std::vector<TensorSpec> inputs, outputs;
};

struct Loss {
  std::string name;
  std::optional<int64_t> classes, ignore_index;
};

enum class Select { kFirst, kMagnitude, kRandom, kRotate };

// A layer of which a step trains ``count`` of the ``channels`` input channels of ``weight``.
struct Selection {
  std::string layer, weight;
  int64_t channels, count;
  Select select;
  int64_t seed;
};

// Bytes that one entry needs while it runs; workspace: for each core.
struct EntryMemory {
  int64_t arena, results, workspace;
};

struct StoredFile {
  int64_t size;
  std::string sha256;
};

struct Device {
  std::string name, arch;
  bool gpu = false;
  std::vector<std::string> features;  // of the processor, as /proc/cpuinfo has them
};

struct Manifest {
  std::map<std::string, StoredFile> files;
  std::set<std::string> zeros;  // state that is zeros at the start and not in parameters.safetensors
  std::vector<Entry> entries;
  std::map<std::string, std::string> aliases;
  std::vector<std::string> trained;
  Loss loss;
  Device device;
  std::map<std::string, std::string> versions;
  double lr;
  int64_t batch;
  std::map<std::string, EntryMemory> memory;
  std::vector<TensorSpec> unread;
  std::vector<Selection> selections;
  std::map<std::string, TensorSpec> state;  // all that a later step needs, by name

  const Entry* find(std::string_view name) const;
  // An entry that every manifest has.
  const Entry& entry(std::string_view name) const { return *find(name); }
};

// The manifest in ``text``. Throws std::invalid_argument with the reason: another format, a digest that does not fit, parts that are
// missing, of the wrong kind, or that contradict each other.
Manifest parse_manifest(std::string_view text);

// The same of a document that has been read, without its digest being checked.
Manifest manifest_of(const Json& document);

}  // namespace tt

#endif
