// What is computed over all samples of a file, a batch at a time: the model's outputs, and the mean loss.
#ifndef TVMTRAIN_SWEEPS_H_
#define TVMTRAIN_SWEEPS_H_

#include <cstdint>
#include <functional>
#include <string>

#include "data.h"
#include "losses.h"
#include "step.h"

namespace tt {

// Whether somebody asked to stop: looked at before each batch.
using Stop = std::function<bool()>;

// The outputs for all samples, to ``file``, as safetensors. False if it was stopped: then nothing is written.
bool predict(const Step& step, const Dataset& data, const std::string& file, const Stop& stop);

// What TrainStep.evaluate tells. A loss of the user's own is compiled for whole batches: samples that fill none are left out.
struct Evaluation {
  Tally tally;
  uint64_t samples;  // as many as the tally is over
};

// False if it was stopped. Throws an input error where there is nothing to evaluate.
bool evaluate(const Step& step, const Dataset& data, const Stop& stop, Evaluation* result);

}  // namespace tt

#endif
