#include "memory.h"

#include <algorithm>
#include <fstream>

namespace tt {
namespace {

// The number after ``name`` in a file of lines "NAME NUMBER ..."; 0 where there is none.
int64_t told(const std::string& path, const std::string& name) {
  std::ifstream file(path);
  int64_t number;
  for (std::string found, rest; file >> found >> number; std::getline(file, rest)) {
    if (found == name) return number;
  }
  return 0;
}

// The number in a file of one; 0 where there is none ("max", or no such file).
int64_t number_in(const std::string& path) {
  std::ifstream file(path);
  int64_t number;
  return file >> number ? number : 0;
}

}  // namespace

Memory memory(const std::string& root) {
  const std::string machine = root + "/proc/meminfo", group = root + "/sys/fs/cgroup/memory.";
  const int64_t total = told(machine, "MemTotal:") * 1024, available = told(machine, "MemAvailable:") * 1024;
  const int64_t limit = number_in(group + "max");
  if (limit <= 0 || (total && limit >= total)) return {total, available};
  // Pages of files that nobody has used for a while are given up where memory is wanted.
  const int64_t used = std::max<int64_t>(0, number_in(group + "current") - told(group + "stat", "inactive_file"));
  return {limit, std::min(available ? available : limit, std::max<int64_t>(1, limit - used))};
}

}  // namespace tt
