// What a board tells of itself, and the functions that a session calls: tensors in its memory, and a compiled step on them.
#ifndef TVMTRAIN_SESSION_H_
#define TVMTRAIN_SESSION_H_

#include <string>

namespace tt {

struct Settings {
  int threads = 0;        // of a session that asks for none; 0: every processor that this process may use
  bool emulated = false;  // the person who started the server says so
};

// Register the functions "tvmtrain.*" and those that TVM's own sessions need; files of a session lie in `folder`.
void RegisterFunctions(const Settings& settings, const std::string& folder);

}  // namespace tt

#endif
