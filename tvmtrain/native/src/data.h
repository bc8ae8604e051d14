// Samples to train on: a safetensors file that stays on the disk and is read as batches need it.
//
// For every input and target of the step it has a tensor of that name with one row, or as many rows as the step has per sample,
// for each of N samples: dtype and other sizes are those of the step. Images may be stored as bytes where the step takes float32:
// then a sample is (x / 255 - mean) / std; the metadata "mean" and "std" are lists of numbers as JSON, one or one per channel
// (axis 1), 0 and 1 without them. tvmtrain.data.write writes such files.
#ifndef TVMTRAIN_DATA_H_
#define TVMTRAIN_DATA_H_

#include <cstdint>
#include <optional>
#include <string>
#include <string_view>
#include <vector>

#include "files.h"
#include "manifest.h"
#include "tensors.h"

namespace tt {

class Dataset {
 public:
  // The samples in ``file``, which has to outlive this. Throws an input error that begins with ``where``, and as ``Pieces``.
  Dataset(const Pieces& file, const Manifest& manifest, const std::string& where);

  uint64_t size() const { return *count_; }
  const std::string& where() const { return where_; }

  // Throws an input error for labels of any sample that are out of range, and as ``Pieces``.
  void check_labels() const;

  // Array number ``i`` (inputs, then targets, as the step takes them) of the samples ``rows``. Throws an input error that names the
  // file and the sample for values that no step takes, and as ``Pieces``.
  std::string batch(size_t i, const uint64_t* rows, size_t count) const;

 private:
  struct Column {
    TensorSpec spec;
    Shape shape;               // in the file
    uint64_t start = 0;        // where the first sample lies in the file
    size_t sample = 0;         // bytes of one, as stored; of the whole tensor where all samples share it
    bool shared = false;
    uint64_t taken = 0;        // bytes of one, as the step takes it; of the whole tensor where all samples share it
    std::vector<float> ready;  // of bytes: the value of each, by channel; one row where all channels have the same
  };

  void check(const Column& column, uint64_t row, std::string_view values) const;
  Column column(const TensorSpec& spec, const TensorHeader& header, int64_t batch);
  void append(const Column& column, uint64_t row, std::string& values) const;

  const Pieces& file_;
  std::string where_;
  Loss loss_;
  std::vector<Column> columns_;
  std::optional<uint64_t> count_;  // known with the first column that has rows
};

}  // namespace tt

#endif
