// What can go wrong, as tvmtrain/errors.py has it. Every message says what, got, wanted and what to do.
#ifndef TVMTRAIN_ERROR_H_
#define TVMTRAIN_ERROR_H_

#include <stdexcept>
#include <string>

#include "tvmtrain.h"

namespace tt {

struct Error : std::runtime_error {
  Error(tvmtrain_status status, const std::string& message) : std::runtime_error(message), status(status) {}
  tvmtrain_status status;
};

inline Error artifact_error(const std::string& message) { return Error(TVMTRAIN_ARTIFACT_ERROR, message); }
inline Error checkpoint_error(const std::string& message) { return Error(TVMTRAIN_CHECKPOINT_ERROR, message); }
inline Error input_error(const std::string& message) { return Error(TVMTRAIN_INPUT_ERROR, message); }
inline Error device_error(const std::string& message) { return Error(TVMTRAIN_DEVICE_ERROR, message); }
inline Error storage_error(const std::string& message) { return Error(TVMTRAIN_STORAGE_ERROR, message); }

}  // namespace tt

#endif
