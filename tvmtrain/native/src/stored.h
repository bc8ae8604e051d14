// What lies on disk: the folder of an artifact, and checkpoints.
#ifndef TVMTRAIN_STORED_H_
#define TVMTRAIN_STORED_H_

#include <map>
#include <string>
#include <string_view>

#include "files.h"
#include "manifest.h"
#include "tensors.h"

namespace tt {

using Wanted = std::map<std::string, TensorSpec>;

// The manifest in ``folder``, which must be for this machine. Throws an artifact error.
Manifest read_manifest(const std::string& folder);

// The path of the file ``name``: its own, or still its new one after a kill while the artifact was saved. Its size and sha256 have
// been checked. Throws an artifact error.
std::string locate(const std::string& folder, const std::string& name, const StoredFile& file);

// The initial state but for what ``manifest`` says is zeros, of its very names, shapes and dtypes, in ``data``. Throws an artifact error.
TensorFile read_parameters(std::string_view data, const Manifest& manifest);

// The state in a checkpoint, which must fit ``wanted``, and how many steps it is after. Throws a checkpoint error that begins with ``where``.
TensorFile read_checkpoint(std::string_view data, const Wanted& wanted, const std::string& where, uint64_t* steps);

// Write ``state`` after ``steps`` steps, atomically. Throws a storage error.
void write_checkpoint(const std::string& path, const std::map<std::string, TensorView>& state, uint64_t steps, const std::string& version);

}  // namespace tt

#endif
