// Whether this processor is emulated.
#ifndef TVMTRAIN_EMULATED_H_
#define TVMTRAIN_EMULATED_H_

#include <string>

namespace tt {

// Why times of this machine mean nothing; "" where it is what it says.
std::string emulated();

}  // namespace tt

#endif
