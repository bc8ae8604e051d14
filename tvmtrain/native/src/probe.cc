// Feeds files to the readers, in a build with sanitizers, and shows what they make of them: tvmtrain-probe FILE...
//
// The first letter of a file says what reads the rest: J JSON, M a manifest (its digest is not asked for, which would stop every
// changed one), T tensors, P the parameters, C a checkpoint and D data of the manifest that was read before. An error is the right answer to a wrong
// file, and every value of a right one is read. S prints the channels of a selection, W those of the largest weights, H a sha256, O an
// order of samples, A a manifest as Python writes it, R the memory of a machine whose files lie in a folder, each on a line. The last line says how many were accepted; a crash is a crash.
#include <sys/mman.h>
#include <unistd.h>

#include <cstdio>
#include <cstdlib>
#include <exception>
#include <optional>
#include <stdexcept>

#include "data.h"
#include "error.h"
#include "files.h"
#include "json.h"
#include "machine.h"
#include "manifest.h"
#include "memory.h"
#include "random.h"
#include "selection.h"
#include "sha256.h"
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
      tt::check_values(spec, tensor.bytes, {"cross_entropy", 3, -100}, [&](size_t flat) { return tt::place_in(tensor.shape, flat); });
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
  sink = static_cast<uint64_t>(tt::needed_memory(manifest, 4, {true, true, true}));
  tt::SelectionState state;
  for (const tt::Selection& chosen : manifest.selections) state.seeds[tt::selection_key(chosen)] = chosen.seed;
  for (const tt::Selection& chosen : manifest.selections) {
    if (chosen.channels < 4096 && chosen.select != tt::Select::kMagnitude) sink = tt::chosen_channels(chosen, 7, state).size();
  }
  known = std::move(manifest);
}

void read_data(std::string_view text) {
  if (!known) return;
  // A file of its own, in memory.
  const tt::Handle memory(memfd_create("data", MFD_CLOEXEC));
  const std::string path = "/proc/self/fd/" + std::to_string(memory.number());
  if (!memory.open() || write(memory.number(), text.data(), text.size()) != static_cast<ssize_t>(text.size())) std::abort();
  const tt::Pieces file(path);
  const tt::Dataset data(file, *known, "data");
  data.check_labels();
  for (uint64_t row : {uint64_t{0}, data.size() / 2, data.size() - 1}) {
    const std::vector<uint64_t> rows(static_cast<size_t>(known->batch < 64 ? known->batch : 64), row);
    std::vector<tt::TensorSpec> columns;
    for (tt::Role role : {tt::Role::kInput, tt::Role::kTarget}) {
      for (const tt::TensorSpec& spec : known->entry("train_step").inputs) {
        if (spec.role == role) columns.push_back(spec);
      }
    }
    for (size_t i = 0; i < columns.size(); ++i) {
      const std::string values = data.batch(i, rows.data(), rows.size());
      if (known->batch <= 64 && values.size() != columns[i].bytes()) std::abort();  // what the step reads
      touch(values);
    }
  }
}

void print(const std::vector<int32_t>& channels) {
  for (int32_t channel : channels) std::printf("%d ", channel);
  std::printf("\n");
}

int64_t whole(const tt::Json& object, const char* key) { return std::strtoll(object.fields.at(key).text.c_str(), nullptr, 10); }

tt::Selection selection_of(const tt::Json& object) {
  return {object.fields.at("layer").text, "weight", whole(object, "channels"), whole(object, "count"), static_cast<tt::Select>(whole(object, "select")), whole(object, "seed")};
}

void print_selection(const tt::Json& object) {
  const tt::Selection chosen = selection_of(object);
  print(tt::chosen_channels(chosen, static_cast<uint64_t>(whole(object, "step")), {{{tt::selection_key(chosen), chosen.seed}}, {}}));
}

void print_largest(const tt::Json& object) {
  tt::Shape shape;
  std::vector<double> weight;
  for (const tt::Json& size : object.fields.at("shape").items) shape.push_back(std::strtoll(size.text.c_str(), nullptr, 10));
  for (const tt::Json& value : object.fields.at("weight").items) weight.push_back(std::strtod(value.text.c_str(), nullptr));
  print(tt::largest_channels(selection_of(object), shape, weight));
}

void print_order(const tt::Json& object) {
  const auto number = [&](const char* key) { return static_cast<uint64_t>(whole(object, key)); };
  for (uint64_t row : tt::permutation(number("seed"), number("epoch"), number("count"))) std::printf("%llu ", static_cast<unsigned long long>(row));
  std::printf("\n");
}

void print_memory(const std::string& root) {
  const tt::Memory memory = tt::memory(root);
  std::printf("%lld %lld\n", static_cast<long long>(memory.total), static_cast<long long>(memory.available));
}

void print_digest(std::string_view text) {
  tt::Sha256 digest;
  // In pieces, so that what is left of a block is used.
  for (size_t at = 0, size = 1; at < text.size(); at += size, size = size * 3 % 101) digest.update(text.substr(at, size));
  std::printf("%s\n", digest.hex().c_str());
}

void read_one(char kind, std::string_view text) {
  uint64_t steps;
  if (kind == 'J') read_json(text);
  if (kind == 'M') read_manifest(text);
  if (kind == 'T') touch(tt::parse_tensors(text));
  if (kind == 'P' && known) touch(tt::read_parameters(text, *known));
  if (kind == 'C' && known) touch(tt::read_checkpoint(text, known->state, "checkpoint", &steps));
  if (kind == 'D') read_data(text);
  if (kind == 'S') print_selection(tt::parse_json(text));
  if (kind == 'W') print_largest(tt::parse_json(text));
  if (kind == 'O') print_order(tt::parse_json(text));
  if (kind == 'H') print_digest(text);
  if (kind == 'R') print_memory(std::string(text));
  if (kind == 'A') std::printf("%s\n", tt::canonical(tt::parse_json(text)).c_str());
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
