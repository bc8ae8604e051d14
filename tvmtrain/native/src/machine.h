// The machine at hand: its architecture and features, processors; what a step needs of its memory.
#ifndef TVMTRAIN_MACHINE_H_
#define TVMTRAIN_MACHINE_H_

#include <cstdint>
#include <string>
#include <vector>

#include "manifest.h"

namespace tt {

// Throws an artifact error unless this program runs where the code of ``device`` does: architecture and features of the processor.
void check_machine(const Device& device);

// The processors that this process may use, as they were at the first call: TVM's workers narrow those of the thread that starts them.
const std::vector<int>& processors();

// TVM_NUM_THREADS if set, else the physical cores among ``processors``; hyperthreads of one core count once.
int default_threads();

// Let this process use ``list`` alone, "0,4-7". Before anything else of this library. Throws an input error.
void use_processors(const std::string& list);

// What a run does beside training.
struct Use {
  bool saves = false, resumes = false, predicts = false;  // evaluating predicts
};

// Bytes that training takes at its peak. Loading: the state and, at most, as much again for its file. Running: the state, what
// is made of it once, the entry that takes most, and a copy of the state where it is saved. Resuming: the state, the file, and the new
// state beside the old.
int64_t needed_memory(const Manifest& manifest, int threads, const Use& use = {});

}  // namespace tt

#endif
