// The memory of the machine at hand, as tvmtrain/runtime.py counts it.
#ifndef TVMTRAIN_MEMORY_H_
#define TVMTRAIN_MEMORY_H_

#include <cstdint>
#include <string>

namespace tt {

// In bytes: all, and what new work can have; 0 where it is not told.
struct Memory {
  int64_t total, available;
};

// This machine's (/proc/meminfo), or that of the group of processes (a container) that this one is limited to. root: before both paths.
Memory memory(const std::string& root = "");

}  // namespace tt

#endif
