// Files: read whole or mapped, and replaced so that a kill at any moment leaves the old one or the new one.
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

// A file as memory, read from the disk as it is touched. It must not be changed meanwhile. Throws std::system_error.
class Mapping {
 public:
  explicit Mapping(const std::string& path);
  Mapping(const Mapping&) = delete;
  Mapping& operator=(const Mapping&) = delete;
  ~Mapping();
  std::string_view bytes() const { return {static_cast<const char*>(data_), size_}; }

 private:
  void* data_ = nullptr;
  size_t size_ = 0;
};

// Replace ``path`` by ``parts``, one after the other: written aside, synced, renamed, the folder synced.
// Throws a storage error; what was there before is intact.
void replace_file(const std::string& path, const std::vector<std::string_view>& parts);

}  // namespace tt

#endif
