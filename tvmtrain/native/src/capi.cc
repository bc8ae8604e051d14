// The functions of tvmtrain.h: what is thrown becomes a status and a message.
#include "tvmtrain.h"

#include <cmath>
#include <exception>
#include <memory>
#include <new>
#include <stdexcept>
#include <string>

#include "error.h"
#include "machine.h"
#include "memory.h"
#include "step.h"
#include "stored.h"

struct tvmtrain {
  std::unique_ptr<tt::Step> body;
};

namespace {

using tt::Error;
using tt::Role;

thread_local std::string last_error;

tvmtrain_status failed(tvmtrain_status status, const char* message) {
  try {
    last_error = message;
  } catch (...) {
    last_error.clear();  // no memory for the message
  }
  return status;
}

template <typename Body>
tvmtrain_status guarded(Body body) {
  try {
    return body();
  } catch (const Error& error) {
    return failed(error.status, error.what());
  } catch (const std::bad_alloc&) {
    return failed(TVMTRAIN_DEVICE_ERROR, "there is not enough memory");
  } catch (const std::length_error&) {  // more than any memory has
    return failed(TVMTRAIN_DEVICE_ERROR, "there is not enough memory");
  } catch (const std::exception& error) {
    return failed(TVMTRAIN_INTERNAL_ERROR, error.what());
  } catch (...) {
    return failed(TVMTRAIN_INTERNAL_ERROR, "unknown error");
  }
}

template <typename T>
T* need(T* pointer, const char* what) {
  if (!pointer) throw tt::input_error(std::string(what) + " is NULL");
  return pointer;
}

int count_of(const tvmtrain* step, const char* entry, Role role) { return step ? static_cast<int>(step->body->specs(entry, role).size()) : 0; }

tvmtrain_status spec_at(const tvmtrain* step, const char* entry, Role role, int number, tvmtrain_spec* spec) {
  return guarded([&] {
    const auto specs = need(step, "step")->body->specs(entry, role);
    if (number < 0 || static_cast<size_t>(number) >= specs.size()) {
      throw tt::input_error(std::string("there is no ") + tt::role_name(role) + " number " + std::to_string(number) + "; there are " + std::to_string(specs.size()));
    }
    const tt::TensorSpec& one = *specs[static_cast<size_t>(number)];
    *need(spec, "spec") = {one.name.c_str(), one.dtype->code, static_cast<int>(one.shape.size()), one.shape.data()};
    return TVMTRAIN_OK;
  });
}

}  // namespace

tvmtrain_status tvmtrain_load(const char* folder, int threads, tvmtrain** step) {
  return guarded([&] {
    *need(step, "step") = nullptr;
    *step = new tvmtrain{tt::Step::load(need(folder, "folder"), threads)};
    return TVMTRAIN_OK;
  });
}

void tvmtrain_free(tvmtrain* step) { delete step; }

tvmtrain_status tvmtrain_step(tvmtrain* step, const tvmtrain_array* inputs, const tvmtrain_array* targets, double lr, double* loss) {
  return guarded([&] {
    const double value = need(step, "step")->body->train(inputs, targets, lr);
    if (loss) *loss = value;
    if (std::isfinite(value)) return TVMTRAIN_OK;
    const std::string taken = std::to_string(step->body->steps()), here = std::to_string(step->body->steps() + 1);
    const std::string message = "the loss of step " + here + " is " + std::to_string(value) + "; the state is that of step " + taken +
                                ". Lower the learning rate, set clip_norm, or look at this batch";
    return failed(TVMTRAIN_NONFINITE_LOSS, message.c_str());
  });
}

tvmtrain_status tvmtrain_predict(tvmtrain* step, const tvmtrain_array* inputs, const tvmtrain_array* outputs) {
  return guarded([&] {
    need(step, "step")->body->predict(inputs, outputs);
    return TVMTRAIN_OK;
  });
}

tvmtrain_status tvmtrain_save(const tvmtrain* step, const char* file) {
  return guarded([&] {
    need(step, "step")->body->save(need(file, "file"));
    return TVMTRAIN_OK;
  });
}

tvmtrain_status tvmtrain_restore(tvmtrain* step, const char* file) {
  return guarded([&] {
    need(step, "step")->body->restore(need(file, "file"));
    return TVMTRAIN_OK;
  });
}

tvmtrain_status tvmtrain_read(const tvmtrain* step, const char* name, const tvmtrain_array* array) {
  return guarded([&] {
    need(step, "step")->body->read(need(name, "name"), *need(array, "array"));
    return TVMTRAIN_OK;
  });
}

const char* tvmtrain_last_error(void) { return last_error.c_str(); }

int64_t tvmtrain_steps(const tvmtrain* step) { return step ? static_cast<int64_t>(step->body->steps()) : 0; }
int64_t tvmtrain_batch(const tvmtrain* step) { return step ? step->body->manifest().batch : 0; }
double tvmtrain_rate(const tvmtrain* step) { return step ? step->body->manifest().lr : 0; }
int tvmtrain_threads(const tvmtrain* step) { return step ? step->body->threads() : 0; }

int tvmtrain_inputs(const tvmtrain* step) { return count_of(step, "train_step", Role::kInput); }
int tvmtrain_targets(const tvmtrain* step) { return count_of(step, "train_step", Role::kTarget); }
int tvmtrain_outputs(const tvmtrain* step) { return count_of(step, "predict", Role::kOutput); }

tvmtrain_status tvmtrain_input(const tvmtrain* step, int number, tvmtrain_spec* spec) { return spec_at(step, "train_step", Role::kInput, number, spec); }
tvmtrain_status tvmtrain_target(const tvmtrain* step, int number, tvmtrain_spec* spec) { return spec_at(step, "train_step", Role::kTarget, number, spec); }
tvmtrain_status tvmtrain_output(const tvmtrain* step, int number, tvmtrain_spec* spec) { return spec_at(step, "predict", Role::kOutput, number, spec); }

tvmtrain_status tvmtrain_memory(const char* folder, int threads, int64_t* needed, int64_t* available) {
  return guarded([&] {
    const tt::Manifest manifest = tt::read_manifest(need(folder, "folder"));
    *need(needed, "needed") = tt::needed_memory(manifest, threads > 0 ? threads : tt::default_threads());
    *need(available, "available") = tt::memory().available;
    return TVMTRAIN_OK;
  });
}

const char* tvmtrain_version(void) { return TVMTRAIN_VERSION; }
