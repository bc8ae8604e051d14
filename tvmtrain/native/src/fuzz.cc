// Feeds files to the readers, for a build with sanitizers: tvmtrain-fuzz FILE...
//
// The first letter of a file says what reads the rest: J JSON, M a manifest (its digest is not asked for, which would stop every
// changed one), T tensors, C a checkpoint and D data of the manifest that was read before. An error is the right answer to a wrong file;
// every value of a right one is read. Prints how many were accepted; a crash is a crash.
#include <cstdio>
#include <exception>
#include <optional>
#include <stdexcept>

#include "data.h"
#include "error.h"
#include "files.h"
#include "json.h"
#include "machine.h"
#include "manifest.h"
#include "selection.h"
#include "stored.h"
#include "tensors.h"
#include "values.h"

namespace {

std::optional<tt::Manifest> known;
volatile uint64_t sink;

void touch(std::string_view bytes) {
  uint64_t sum = 0;
  for (char byte : bytes) sum += static_cast<uint8_t>(byte);
  sink = sum;
}

void touch(const tt::TensorFile& file) {
  for (const auto& [name, tensor] : file.tensors) {
    touch(tensor.bytes);
    const tt::TensorSpec spec{tt::Role::kTarget, name, tensor.shape, tensor.dtype};
    try {
      if (tensor.dtype->kind == 'f') tt::check_finite(spec, tensor.bytes);
      if (tensor.dtype->kind != 'f') tt::check_labels(spec, tensor.bytes, {"cross_entropy", 3, -100});
    } catch (const tt::Error&) {
    }
  }
  std::vector<const tt::TensorView*> order;
  touch(tt::tensor_header(file.tensors, file.facts, &order));
}

void read_json(std::string_view text) {
  const tt::Json value = tt::parse_json(text);
  // What was written once is read as the same again.
  const std::string once = tt::canonical(value);
  if (tt::canonical(tt::parse_json(once)) != once) std::abort();
}

void read_manifest(std::string_view text) {
  tt::Manifest manifest = tt::manifest_of(tt::parse_json(text));
  sink = static_cast<uint64_t>(tt::needed_memory(manifest, 4));
  tt::SelectionState state;
  for (const tt::Selection& chosen : manifest.selections) state.seeds[tt::selection_key(chosen)] = chosen.seed;
  for (const tt::Selection& chosen : manifest.selections) {
    if (chosen.channels < 4096 && chosen.select != tt::Select::kMagnitude) sink = tt::chosen_channels(chosen, 7, state).size();
  }
  known = std::move(manifest);
}

void read_data(std::string_view text) {
  if (!known) return;
  const tt::Dataset data(text, *known, "data");
  for (uint64_t row : {uint64_t{0}, data.size() / 2, data.size() - 1}) {
    const std::vector<uint64_t> rows(static_cast<size_t>(known->batch < 64 ? known->batch : 64), row);
    size_t columns = 0;
    for (const tt::TensorSpec& spec : known->entry("train_step").inputs) columns += spec.role == tt::Role::kInput || spec.role == tt::Role::kTarget;
    for (size_t i = 0; i < columns; ++i) touch(data.batch(i, rows.data(), rows.size()));
  }
}

void read_one(char kind, std::string_view text) {
  uint64_t steps;
  if (kind == 'J') read_json(text);
  if (kind == 'M') read_manifest(text);
  if (kind == 'T') touch(tt::parse_tensors(text));
  if (kind == 'C' && known) touch(tt::read_checkpoint(text, known->state, "checkpoint", &steps));
  if (kind == 'D') read_data(text);
}

}  // namespace

int main(int count, char** names) {
  int accepted = 0;
  for (int i = 1; i < count; ++i) {
    const tt::Bytes data = tt::read_file(names[i]);
    if (data.empty()) continue;
    // A block of its own size, so that one byte too far is seen.
    const std::vector<char> text(data.begin() + 1, data.end());
    try {
      read_one(static_cast<char>(data[0]), {text.data(), text.size()});
      ++accepted;
    } catch (const tt::Error&) {
    } catch (const std::invalid_argument&) {
    }
  }
  std::printf("%d of %d accepted\n", accepted, count - 1);
}
