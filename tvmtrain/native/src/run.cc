// tvmtrain-run: trains an artifact on a file of samples, and goes on from its last checkpoint after whatever stopped it.
#include <csignal>
#include <cstdio>
#include <cstring>

#include <algorithm>
#include <charconv>
#include <chrono>
#include <cmath>
#include <map>
#include <memory>
#include <string>
#include <system_error>
#include <vector>

#include "data.h"
#include "error.h"
#include "files.h"
#include "json.h"
#include "machine.h"
#include "memory.h"
#include "random.h"
#include "step.h"
#include "stored.h"
#include "values.h"

namespace {

using tt::Error;

constexpr const char* kHelp = R"(usage: tvmtrain-run ARTIFACT --data FILE [options]

Trains the step in the folder ARTIFACT on FILE, a safetensors file with a tensor for each input and target of the step, by name
(tvmtrain.data.write writes one). Prints a line now and then and one at the end.

training
  --epochs N         passes over the samples, counted from the first step of all (default: 1; 0 with --predict)
  --steps N          or: training steps, counted from the first of all
  --lr X             learning rate (default: the artifact's)
  --schedule KIND    constant, cosine or step (default: constant)
  --step-size N      epochs between two drops of "step" (default: 1); --gamma X: factor of a drop (default: 0.1)
  --warmup N         steps until the full rate is reached (default: 0)
  --shuffle          another order in every epoch; --seed N: of that order (default: 0). As `tvmtrain run`.
files
  --checkpoint FILE  all state, written at the end, after every epoch, and on Ctrl-C; a kill at any moment leaves an old or a new one
  --every N          and every N steps
  --resume           go on from --checkpoint if it is there, in the middle of an epoch too; else begin
  --predict FILE     at the end: the model's outputs for all samples of --data, as safetensors
machine
  --threads N        to compute with (default: TVM_NUM_THREADS, else all physical cores)
  --affinity LIST    processors to use, as 4-7 or 0,2 (big or little cores)
  --anyway           begin though there seems to be too little memory
output
  --log N            steps between two lines (default: ten lines in an epoch)
  --json             one JSON object in each line
  --help, --version

Ends with 0; 1 after an error, on stderr; 2 for wrong options; 130 after Ctrl-C or SIGTERM.
)";

struct Usage : std::runtime_error {
  using std::runtime_error::runtime_error;
};

struct Options {
  std::string artifact, data, checkpoint, predict, affinity, schedule = "constant";
  int64_t epochs = -1, steps = -1, every = 0, log = 0, warmup = 0, step_size = 1, threads = 0, seed = 0;
  double rate = -1, gamma = 0.1;
  bool resume = false, shuffle = false, json = false, anyway = false;
};

volatile std::sig_atomic_t stopped = 0;

void stop(int) { stopped = 1; }

int64_t whole(const std::string& option, const std::string& text, int64_t least) {
  int64_t value = 0;
  const auto [end, error] = std::from_chars(text.data(), text.data() + text.size(), value);
  if (error != std::errc() || end != text.data() + text.size() || value < least) throw Usage(option + " is '" + text + "'; want a whole number of " + std::to_string(least) + " or more");
  return value;
}

double number(const std::string& option, const std::string& text) {
  double value = 0;
  if (!tt::to_double(text, &value) || !std::isfinite(value) || value < 0) throw Usage(option + " is '" + text + "'; want a number of 0 or more");
  return value;
}

void check(const Options& options) {
  if (options.artifact.empty() || options.data.empty()) throw Usage("want an artifact and --data FILE");
  if (options.epochs >= 0 && options.steps >= 0) throw Usage("--epochs and --steps: want one of them");
  if ((options.resume || options.every) && options.checkpoint.empty()) throw Usage("--resume and --every need --checkpoint FILE");
  if (options.schedule != "constant" && options.schedule != "cosine" && options.schedule != "step") throw Usage("--schedule is '" + options.schedule + "'; want constant, cosine or step");
}

Options parse(const std::vector<std::string>& words) {
  Options o;
  const std::map<std::string, bool*> flags{{"--resume", &o.resume}, {"--shuffle", &o.shuffle}, {"--json", &o.json}, {"--anyway", &o.anyway}};
  const std::map<std::string, std::string*> texts{{"--data", &o.data}, {"--checkpoint", &o.checkpoint}, {"--predict", &o.predict}, {"--affinity", &o.affinity}, {"--schedule", &o.schedule}};
  const std::map<std::string, std::pair<int64_t*, int64_t>> counts{{"--epochs", {&o.epochs, 0}}, {"--steps", {&o.steps, 0}}, {"--every", {&o.every, 1}}, {"--log", {&o.log, 1}}, {"--warmup", {&o.warmup, 0}}, {"--step-size", {&o.step_size, 1}}, {"--threads", {&o.threads, 1}}, {"--seed", {&o.seed, 0}}};
  const std::map<std::string, double*> numbers{{"--lr", &o.rate}, {"--gamma", &o.gamma}};
  for (size_t i = 0; i < words.size(); ++i) {
    const std::string& word = words[i];
    if (const auto flag = flags.find(word); flag != flags.end()) {
      *flag->second = true;
    } else if (word.rfind("--", 0) != 0) {
      if (!o.artifact.empty()) throw Usage("'" + word + "' is one artifact too many");
      o.artifact = word;
    } else {
      const bool known = texts.count(word) || counts.count(word) || numbers.count(word);
      if (!known) throw Usage("there is no option " + word);
      if (++i == words.size()) throw Usage(word + " needs a value");
      if (texts.count(word)) *texts.at(word) = words[i];
      if (counts.count(word)) *counts.at(word).first = whole(word, words[i], counts.at(word).second);
      if (numbers.count(word)) *numbers.at(word) = number(word, words[i]);
    }
  }
  check(o);
  return o;
}

bool exists(const std::string& path) {
  try {
    uint64_t size;
    tt::open_file(path, &size);
    return true;
  } catch (const std::system_error& error) {
    if (error.code().value() == ENOENT) return false;
    throw tt::checkpoint_error("checkpoint " + path + " cannot be read: " + std::strerror(error.code().value()));
  }
}

std::string shortened(const char* format, double value) {
  char text[64];
  std::snprintf(text, sizeof text, format, value);
  return text;
}

// A line for people, or a JSON object.
class Line {
 public:
  Line(bool json, const std::string& kind) : json_(json), text_(json ? "{\"kind\": " + tt::quoted(kind) : kind) {}
  void add(const std::string& name, const std::string& shown, const std::string& exact) {
    if (json_) {
      text_ += ", " + tt::quoted(name) + ": " + exact;
    } else if (!shown.empty()) {
      text_ += "  " + shown;
    }
  }
  void whole(const std::string& name, uint64_t value) { add(name, name + " " + std::to_string(value), std::to_string(value)); }
  void number(const std::string& name, double value, const char* format) { add(name, shortened(format, value), std::isfinite(value) ? shortened("%.17g", value) : "null"); }
  void print() {
    std::printf("%s%s\n", text_.c_str(), json_ ? "}" : "");
    std::fflush(stdout);
  }

 private:
  bool json_;
  std::string text_;
};

double median(std::vector<double> values) {
  if (values.empty()) return NAN;
  std::nth_element(values.begin(), values.begin() + static_cast<std::ptrdiff_t>(values.size() / 2), values.end());
  return values[values.size() / 2];
}

class Run {
 public:
  // restored: from the checkpoint.
  Run(const Options& options, tt::Step& step, const tt::Dataset& data, bool restored) : options_(options), step_(step), data_(data), kept_(restored) {
    batch_ = static_cast<uint64_t>(step.manifest().batch);
    per_epoch_ = data.size() / batch_;
    const bool trains = options.predict.empty() || options.steps >= 0 || options.epochs >= 0;
    const auto epochs = static_cast<uint64_t>(options.epochs < 0 ? (trains ? 1 : 0) : options.epochs);
    if (per_epoch_ == 0 && trains) {
      throw tt::input_error(std::to_string(data.size()) + " samples to train on, and the step was compiled for " + std::to_string(batch_) + " at a time; give more");
    }
    total_ = options.steps >= 0 ? static_cast<uint64_t>(options.steps) : epochs * per_epoch_;
    if (options.resume && !restored && total_ == 0) {
      throw tt::checkpoint_error("checkpoint " + options.checkpoint + " is missing, and there is nothing to train: want the file that a training has written");
    }
    log_ = options.log ? static_cast<uint64_t>(options.log) : std::max<uint64_t>(1, per_epoch_ / 10);
  }

  void train() {
    while (step_.steps() < total_ && !stopped) {
      one();
      const bool last = step_.steps() == total_ || step_.steps() % per_epoch_ == 0;
      if (last || step_.steps() % log_ == 0) progress();
      if (last || (options_.every && step_.steps() % static_cast<uint64_t>(options_.every) == 0)) save();
    }
    save();
    done();
  }

  void predict() const;

 private:
  double rate() const {
    const double lr = options_.rate < 0 ? step_.manifest().lr : options_.rate;
    const auto at = static_cast<double>(step_.steps()), warmup = static_cast<double>(options_.warmup);
    if (at < warmup) return lr * (at + 1) / warmup;
    if (options_.schedule == "cosine") {
      const double share = (at - warmup) / std::max(1.0, static_cast<double>(total_) - warmup);
      return lr * 0.5 * (1 + std::cos(M_PI * std::min(share, 1.0)));
    }
    const uint64_t drops = step_.steps() / per_epoch_ / static_cast<uint64_t>(options_.step_size);
    return options_.schedule == "step" ? lr * std::pow(options_.gamma, static_cast<double>(drops)) : lr;
  }

  // The samples of this step: whole batches of the order of this epoch; what is left of an epoch is left out.
  const uint64_t* rows() {
    const uint64_t epoch = step_.steps() / per_epoch_, position = step_.steps() % per_epoch_;
    if (order_.empty() || epoch != epoch_) {
      epoch_ = epoch;
      if (options_.shuffle) {
        order_ = tt::permutation(static_cast<uint64_t>(options_.seed), epoch, data_.size());
      } else if (order_.empty()) {
        for (uint64_t i = 0; i < data_.size(); ++i) order_.push_back(i);
      }
    }
    return order_.data() + position * batch_;
  }

  void one() {
    const auto inputs = step_.specs("train_step", tt::Role::kInput), targets = step_.specs("train_step", tt::Role::kTarget);
    const uint64_t* chosen = rows();
    std::vector<std::string> values;
    std::vector<tvmtrain_array> arrays;
    for (size_t i = 0; i < inputs.size() + targets.size(); ++i) values.push_back(data_.batch(i, chosen, batch_));
    for (size_t i = 0; i < values.size(); ++i) {
      const tt::TensorSpec& spec = *(i < inputs.size() ? inputs[i] : targets[i - inputs.size()]);
      arrays.push_back({values[i].data(), spec.dtype->code, static_cast<int>(spec.shape.size()), spec.shape.data()});
    }
    const auto start = std::chrono::steady_clock::now();
    const double loss = step_.train(arrays.data(), arrays.data() + inputs.size(), lr_ = rate());
    milliseconds_.push_back(std::chrono::duration<double, std::milli>(std::chrono::steady_clock::now() - start).count());
    if (!std::isfinite(loss)) {
      throw Error(TVMTRAIN_NONFINITE_LOSS, "the loss of step " + std::to_string(step_.steps() + 1) + " is " + std::to_string(loss) +
                                               "; the state is that of step " + std::to_string(step_.steps()) + ". Lower the learning rate, set clip_norm, or look at this batch");
    }
    saved_ = false;
    losses_.push_back(loss);
    count_right(*targets.at(0), values[inputs.size()]);
  }

  // Right answers among the labels that count, where there are classes.
  void count_right(const tt::TensorSpec& target, std::string_view labels) {
    const tt::Loss& loss = step_.manifest().loss;
    const auto outputs = output_specs();
    if (loss.name != "cross_entropy" || target.dtype->kind == 'f' || outputs.empty() || outputs[0]->shape.size() < 2) return;
    const tt::TensorSpec& logits = *outputs[0];
    const std::vector<double> values = tt::floats_of(*logits.dtype, step_.output(0));
    const auto classes = static_cast<size_t>(logits.shape[1]);
    const size_t places = values.size() / static_cast<size_t>(logits.shape[0]) / classes;
    for (size_t i = 0; i < labels.size() / target.dtype->bytes; ++i) {
      const int64_t label = tt::whole_at(*target.dtype, labels, i);
      if (label == loss.ignore_index) continue;
      const double* first = values.data() + i / places * classes * places + i % places;
      size_t best = 0;
      for (size_t c = 1; c < classes; ++c) best = first[c * places] > first[best * places] ? c : best;
      right_ += static_cast<int64_t>(best) == label;
      ++labels_;
    }
  }

  std::vector<const tt::TensorSpec*> output_specs() const { return step_.specs("train_step", tt::Role::kOutput); }

  double mean_loss() const {
    double sum = 0;
    for (double loss : losses_) sum += loss;
    return losses_.empty() ? NAN : sum / static_cast<double>(losses_.size());
  }

  void results(Line& line) const {
    line.number("loss", mean_loss(), "loss %.4f");
    if (labels_) line.number("accuracy", static_cast<double>(right_) / static_cast<double>(labels_), "accuracy %.3f");
    line.number("ms_per_step", median(milliseconds_), "%.1f ms/step");
  }

  // Since the last line.
  void progress() {
    Line line(options_.json, "progress");
    line.whole("epoch", (step_.steps() - 1) / per_epoch_ + 1);
    line.add("step", "step " + std::to_string(step_.steps()) + "/" + std::to_string(total_), std::to_string(step_.steps()));
    line.number("lr", lr_, "lr %.3g");
    results(line);
    line.print();
    all_.insert(all_.end(), milliseconds_.begin(), milliseconds_.end());
    last_loss_ = losses_.back();
    milliseconds_.clear();
    losses_.clear();
    right_ = labels_ = 0;
  }

  void save() {
    if (options_.checkpoint.empty() || saved_) return;
    step_.save(options_.checkpoint);
    saved_ = kept_ = true;
  }

  void done() const {
    Line line(options_.json, stopped ? "stopped" : "done");
    line.add("steps", std::to_string(step_.steps()) + " steps", std::to_string(step_.steps()));
    line.number("loss", losses_.empty() ? last_loss_ : losses_.back(), "last loss %.6f");
    line.number("ms_per_step", median(all_), "%.1f ms/step");
    line.whole("threads", static_cast<uint64_t>(step_.threads()));
    if (kept_) line.add("checkpoint", "saved " + options_.checkpoint, tt::quoted(options_.checkpoint));
    line.print();
  }

  const Options& options_;
  tt::Step& step_;
  const tt::Dataset& data_;
  uint64_t batch_, per_epoch_, total_, log_, epoch_ = 0;
  std::vector<uint64_t> order_;
  std::vector<double> milliseconds_, all_, losses_;
  double lr_ = 0, last_loss_ = NAN;
  int64_t right_ = 0, labels_ = 0;
  bool saved_ = true;  // false after a step: a run without one leaves the checkpoint as it is
  bool kept_;          // whether the checkpoint has this state
};

// All samples, a batch at a time; the last one is filled up by the step.
void Run::predict() const {
  const auto inputs = step_.specs("predict", tt::Role::kInput), outputs = step_.specs("predict", tt::Role::kOutput);
  std::vector<std::string> all(outputs.size());
  for (uint64_t start = 0; start < data_.size() && !stopped; start += batch_) {
    const uint64_t size = std::min(batch_, data_.size() - start);
    std::vector<uint64_t> rows(size);
    for (uint64_t i = 0; i < size; ++i) rows[i] = start + i;
    std::vector<std::string> values;
    std::vector<tt::Shape> shapes;
    std::vector<tvmtrain_array> given, made;
    const auto shape_of = [&](const tt::TensorSpec& spec) {
      return tt::shape_for(spec, static_cast<int64_t>(size), step_.manifest().batch);
    };
    for (const auto* side : {&inputs, &outputs}) {
      for (const tt::TensorSpec* spec : *side) shapes.push_back(shape_of(*spec));
    }
    for (size_t i = 0; i < inputs.size(); ++i) values.push_back(data_.batch(i, rows.data(), size));
    for (size_t i = 0; i < outputs.size(); ++i) {
      uint64_t bytes = 0;
      tt::byte_count(shapes[inputs.size() + i], *outputs[i]->dtype, &bytes);
      values.emplace_back(bytes, '\0');
    }
    for (size_t i = 0; i < values.size(); ++i) {
      const tt::TensorSpec& spec = *(i < inputs.size() ? inputs[i] : outputs[i - inputs.size()]);
      (i < inputs.size() ? given : made).push_back({values[i].data(), spec.dtype->code, static_cast<int>(shapes[i].size()), shapes[i].data()});
    }
    step_.predict(given.data(), made.data());
    for (size_t i = 0; i < outputs.size(); ++i) {
      if (data_.size() > batch_ && !tt::rows_of(*outputs[i], step_.manifest().batch)) throw tt::whole_batch(*outputs[i], step_.manifest().batch);
      all[i] += values[inputs.size() + i];
    }
  }
  if (stopped) return;
  std::map<std::string, tt::TensorView> tensors;
  for (size_t i = 0; i < outputs.size(); ++i) {
    tensors[outputs[i]->name] = {outputs[i]->dtype, tt::shape_for(*outputs[i], static_cast<int64_t>(data_.size()), step_.manifest().batch), all[i]};
  }
  std::vector<const tt::TensorView*> order;
  const std::string header = tt::tensor_header(tensors, {}, &order);
  std::vector<std::string_view> parts{header};
  for (const tt::TensorView* tensor : order) parts.push_back(tensor->bytes);
  tt::replace_file(options_.predict, parts);
}

void check_memory(const tt::Manifest& manifest, int threads, const tt::Use& use) {
  const int64_t needed = tt::needed_memory(manifest, threads, use), available = tt::memory().available;
  const auto mebibytes = [](int64_t bytes) { return shortened("%.1f MiB", static_cast<double>(bytes) / (1 << 20)); };
  if (available && needed > available) {
    throw tt::device_error("training needs " + mebibytes(needed) + " of memory and this machine has " + mebibytes(available) +
                           " available; end other programs, train less (an update plan, a smaller batch), or try --anyway");
  }
}

int run(const Options& options) {
  if (!options.affinity.empty()) tt::use_processors(options.affinity);
  const int threads = options.threads ? static_cast<int>(options.threads) : tt::default_threads();
  if (!options.anyway) {
    const tt::Use use{!options.checkpoint.empty(), options.resume && exists(options.checkpoint), !options.predict.empty()};
    check_memory(tt::read_manifest(options.artifact), threads, use);
  }
  const std::unique_ptr<tt::Step> loaded = tt::Step::load(options.artifact, threads);
  tt::Step& step = *loaded;
  try {
    const tt::Pieces file(options.data);
    const tt::Dataset data(file, step.manifest(), options.data);
    const bool restored = options.resume && exists(options.checkpoint);
    if (restored) step.restore(options.checkpoint);
    Run run(options, step, data, restored);
    run.train();
    if (!options.predict.empty()) run.predict();
  } catch (const std::system_error& error) {
    throw tt::input_error(options.data + " cannot be read: " + std::strerror(error.code().value()));
  }
  return stopped ? 130 : 0;
}

}  // namespace

int main(int count, char** values) {
  const std::vector<std::string> words(values + 1, values + count);
  if (std::count(words.begin(), words.end(), "--help")) return std::fputs(kHelp, stdout) < 0;
  if (std::count(words.begin(), words.end(), "--version")) return std::puts("tvmtrain-run " TVMTRAIN_VERSION) < 0;
  struct sigaction action = {};
  action.sa_handler = stop;
  action.sa_flags = static_cast<int>(SA_RESETHAND);  // a second Ctrl-C ends at once
  sigaction(SIGINT, &action, nullptr);
  sigaction(SIGTERM, &action, nullptr);
  try {
    return run(parse(words));
  } catch (const Usage& error) {
    std::fprintf(stderr, "error: %s; see --help\n", error.what());
    return 2;
  } catch (const std::bad_alloc&) {
    std::fprintf(stderr, "error: there is not enough memory\n");
  } catch (const std::exception& error) {
    std::fprintf(stderr, "error: %s\n", error.what());
  }
  return 1;
}
