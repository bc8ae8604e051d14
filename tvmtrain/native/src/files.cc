#include "files.h"

#include <fcntl.h>
#include <sys/stat.h>
#include <unistd.h>

#include <cerrno>
#include <climits>
#include <cstdlib>
#include <cstring>
#include <system_error>

#include "error.h"
#include "sha256.h"

namespace tt {
namespace {

[[noreturn]] void fail(int number = errno) { throw std::system_error(number, std::generic_category()); }

size_t read_some(const Handle& file, void* data, size_t size) {
  for (;;) {
    const ssize_t got = read(file.number(), data, size);
    if (got >= 0) return static_cast<size_t>(got);
    if (errno != EINTR) fail();
  }
}

void write_all(const Handle& file, std::string_view part) {
  while (!part.empty()) {
    const ssize_t done = write(file.number(), part.data(), part.size());
    if (done < 0 && errno != EINTR) fail();
    if (done > 0) part.remove_prefix(static_cast<size_t>(done));
  }
}

void sync_folder(const std::string& folder) {
  const Handle handle(open(folder.c_str(), O_RDONLY | O_DIRECTORY | O_CLOEXEC));
  if (!handle.open() || fsync(handle.number()) != 0) fail();
}

// Where ``path`` really is: a link stays a link, and the file that it names is replaced.
std::string real_path(const std::string& path) {
  char buffer[PATH_MAX];
  if (realpath(path.c_str(), buffer)) return buffer;
  return path;
}

void write_new(const std::string& path, const std::vector<std::string_view>& parts) {
  const Handle file(open(path.c_str(), O_WRONLY | O_CREAT | O_TRUNC | O_CLOEXEC, 0666));
  if (!file.open()) fail();
  for (std::string_view part : parts) write_all(file, part);
  if (fsync(file.number()) != 0) fail();
}

void replace(const std::string& path, const std::vector<std::string_view>& parts) {
  struct stat old;
  if (stat(path.c_str(), &old) == 0 && !S_ISREG(old.st_mode)) fail(EINVAL);
  const size_t slash = path.rfind('/');
  const std::string folder = slash == std::string::npos ? "." : slash == 0 ? "/" : path.substr(0, slash);
  const std::string name = slash == std::string::npos ? path : path.substr(slash + 1);
  const std::string aside = folder + "/.new-" + name;
  try {
    write_new(aside, parts);
    sync_folder(folder);
    if (rename(aside.c_str(), path.c_str()) != 0) fail();
  } catch (...) {
    unlink(aside.c_str());
    throw;
  }
  sync_folder(folder);
}

const char* hint(int number) {
  if (number == ENOSPC || number == EDQUOT) return "free some space or choose another place";
  return number == ENOENT ? "make its folder first" : "choose a place that can be written";
}

}  // namespace

Handle::~Handle() {
  if (number_ >= 0) close(number_);
}

Handle open_file(const std::string& path, uint64_t* size) {
  Handle file(open(path.c_str(), O_RDONLY | O_CLOEXEC | O_NONBLOCK));
  struct stat facts;
  if (!file.open() || fstat(file.number(), &facts) != 0) fail();
  if (!S_ISREG(facts.st_mode)) fail(S_ISDIR(facts.st_mode) ? EISDIR : EINVAL);
  *size = static_cast<uint64_t>(facts.st_size);
  return file;
}

Bytes read_file(const std::string& path, uint64_t most) {
  uint64_t size;
  const Handle file = open_file(path, &size);
  if (size > most) fail(EFBIG);
  Bytes data(size);
  size_t at = 0;
  while (at < data.size()) {
    const size_t got = read_some(file, data.data() + at, data.size() - at);
    if (got == 0) break;  // it became shorter meanwhile
    at += got;
  }
  data.resize(at);
  return data;
}

Checksum checksum(const std::string& path) {
  uint64_t size;
  const Handle file = open_file(path, &size);
  Sha256 digest;
  Bytes piece(1 << 16);
  uint64_t total = 0;
  while (const size_t got = read_some(file, piece.data(), piece.size())) {
    digest.update(piece.data(), got);
    total += got;
  }
  return {total, digest.hex()};
}

void Pieces::read(uint64_t start, size_t count, char* values) const {
  for (size_t done = 0; done < count;) {
    const ssize_t got = pread(file_.number(), values + done, count - done, static_cast<off_t>(start + done));
    if (got < 0 && errno != EINTR) throw input_error(path_ + " cannot be read: " + std::strerror(errno));
    if (got == 0) {
      throw input_error(path_ + " has become shorter since it was opened: byte " + std::to_string(start + done) + " of its " + std::to_string(size_) +
                        " is gone; leave it alone while it is in use, and start again");
    }
    if (got > 0) done += static_cast<size_t>(got);
  }
}

void replace_file(const std::string& path, const std::vector<std::string_view>& parts) {
  try {
    replace(real_path(path), parts);
  } catch (const std::system_error& error) {
    const int number = error.code().value();
    throw storage_error("cannot write " + path + ": " + std::strerror(number) + "; what was there before is intact; " + hint(number));
  }
}

}  // namespace tt
