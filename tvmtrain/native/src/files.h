// Files: read whole or in pieces, and replaced so that a kill at any moment leaves the old one or the new one.
#ifndef TVMTRAIN_FILES_H_
#define TVMTRAIN_FILES_H_

#include <cstdint>
#include <functional>
#include <string>
#include <string_view>
#include <vector>

namespace tt {

using Bytes = std::vector<uint8_t>;

// A file of the operating system, closed at the end.
class Handle {
 public:
  explicit Handle(int number = -1) : number_(number) {}
  Handle(Handle&& other) noexcept : number_(other.number_) { other.number_ = -1; }
  Handle(const Handle&) = delete;
  Handle& operator=(const Handle&) = delete;
  ~Handle();
  int number() const { return number_; }
  bool open() const { return number_ >= 0; }

 private:
  int number_;
};

// The regular file ``path``, for reading. Throws std::system_error.
Handle open_file(const std::string& path, uint64_t* size);

// All of it. Throws std::system_error, also for more than ``most`` bytes.
Bytes read_file(const std::string& path, uint64_t most = UINT64_MAX);

// Size and sha256 without holding it all. Throws std::system_error.
struct Checksum {
  uint64_t size;
  std::string sha256;
};
Checksum checksum(const std::string& path);

// A file that is read in pieces. Not mapped into memory: where somebody cuts it off meanwhile, that would end the process.
class Pieces {
 public:
  // Throws std::system_error.
  explicit Pieces(const std::string& path) : path_(path), file_(open_file(path, &size_)) {}

  uint64_t size() const { return size_; }

  // Bytes ``start`` .. ``start + count``, to ``values``. Throws an input error that names the file: it cannot be read, or has
  // become shorter.
  void read(uint64_t start, size_t count, char* values) const;

 private:
  std::string path_;
  uint64_t size_ = 0;  // before the file, which sets it
  Handle file_;
};

// Replace ``path`` by ``parts``, one after the other: written aside, synced, renamed, the folder synced.
// Throws a storage error; what was there before is intact.
void replace_file(const std::string& path, const std::vector<std::string_view>& parts);

}  // namespace tt

#endif
