#include "emulated.h"

#include <cstdlib>
#include <fstream>

namespace tt {

std::string emulated() {
  std::string command;
  std::getline(std::ifstream("/proc/self/comm"), command);
  if (command.rfind("qemu-", 0) == 0) return "the process is run by qemu";
  for (const char* name : {"QEMU_CPU", "QEMU_LD_PREFIX"}) {
    if (std::getenv(name) != nullptr) return std::string(name) + " is set";
  }
#if !defined(__x86_64__)
  std::ifstream processor("/proc/cpuinfo");
  for (std::string line; std::getline(processor, line);) {
    if (line.rfind("vendor_id", 0) == 0) return "/proc/cpuinfo is of an x86";
  }
#endif
  return "";
}

}  // namespace tt
