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
#include "emulated.h"
#include "error.h"
#include "files.h"
#include "json.h"
#include "losses.h"
#include "machine.h"
#include "memory.h"
#include "random.h"
#include "step.h"
#include "stored.h"
#include "sweeps.h"

namespace {

using tt::Error;

constexpr const char* kHelp = R"(usage: tvmtrain-run ARTIFACT --data FILE [options]

Trains the step in the folder ARTIFACT on FILE, a safetensors file with a tensor for each input and target of the step, by name
(tvmtrain.data.write writes one). Prints a line now and then and one at the end.

training
  --epochs N         passes over the samples, counted from the first step of all (default: 1; 0 with --predict or --eval)
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
  --eval             at the end: the mean loss over all samples of --data, and the accuracy where there are classes
  --eval-data FILE   at the end: these of another file, and not of --data
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
  std::string artifact, data, eval_data, checkpoint, predict, affinity, schedule = "constant";
  int64_t epochs = -1, steps = -1, every = 0, log = 0, warmup = 0, step_size = 1, threads = 0, seed = 0;
  double rate = -1, gamma = 0.1;

  bool trains() const { return steps > 0 || epochs > 0 || (steps < 0 && epochs < 0 && predict.empty() && !eval); }
  bool evaluates() const { return eval || !eval_data.empty(); }

  bool resume = false, eval = false, shuffle = false, json = false, anyway = false;
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
  const std::map<std::string, bool*> flags{{"--resume", &o.resume}, {"--eval", &o.eval}, {"--shuffle", &o.shuffle}, {"--json", &o.json}, {"--anyway", &o.anyway}};
  const std::map<std::string, std::string*> texts{{"--data", &o.data}, {"--eval-data", &o.eval_data}, {"--checkpoint", &o.checkpoint}, {"--predict", &o.predict}, {"--affinity", &o.affinity}, {"--schedule", &o.schedule}};
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
  // test: to evaluate. restored: from the checkpoint.
  Run(const Options& options, tt::Step& step, const tt::Dataset& data, const tt::Dataset& test, bool restored)
      : options_(options), step_(step), data_(data), test_(test), before_(step.steps()), kept_(restored) {
    batch_ = static_cast<uint64_t>(step.manifest().batch);
    per_epoch_ = data.size() / batch_;
    const auto epochs = static_cast<uint64_t>(options.epochs < 0 ? (options.trains() ? 1 : 0) : options.epochs);
    if (per_epoch_ == 0 && options.trains()) {
      throw tt::input_error(std::to_string(data.size()) + " samples to train on, and the step was compiled for " + std::to_string(batch_) + " at a time; give more");
    }
    total_ = options.steps >= 0 ? static_cast<uint64_t>(options.steps) : epochs * per_epoch_;
    if (options.resume && !restored && total_ == 0) {
      throw tt::checkpoint_error("checkpoint " + options.checkpoint + " is missing, and there is nothing to train: want the file that a training has written");
    }
    log_ = options.log ? static_cast<uint64_t>(options.log) : std::max<uint64_t>(1, per_epoch_ / 10);
  }

  void all() {
    if (left_out() && !options_.json) std::printf("%llu of %llu samples are left out of every epoch: training needs whole batches of %llu\n", number_of(left_out()), number_of(data_.size()), number_of(batch_));
    train();
    const tt::Stop stop = [] { return stopped != 0; };
    if (!options_.predict.empty() && tt::predict(step_, data_, options_.predict, stop)) predicted();
    tt::Evaluation evaluation{};
    if (options_.evaluates() && tt::evaluate(step_, test_, stop, &evaluation)) evaluated(evaluation);
    done();
  }

 private:
  static unsigned long long number_of(uint64_t value) { return value; }

  // Samples that no step of an epoch takes.
  uint64_t left_out() const { return before_ < total_ ? data_.size() % batch_ : 0; }

  void train() {
    while (step_.steps() < total_ && !stopped) {
      one();
      const bool last = step_.steps() == total_ || step_.steps() % per_epoch_ == 0;
      if (last || step_.steps() % log_ == 0) progress();
      if (last || (options_.every && step_.steps() % static_cast<uint64_t>(options_.every) == 0)) save();
    }
    save();
  }

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
    const auto outputs = step_.specs("train_step", tt::Role::kOutput);
    if (!outputs.empty()) answers_.add(tt::answers(step_.manifest().loss, {*outputs[0], step_.output(0)}, {*targets.at(0), values[inputs.size()]}));
  }

  double mean_loss() const {
    double sum = 0;
    for (double loss : losses_) sum += loss;
    return losses_.empty() ? NAN : sum / static_cast<double>(losses_.size());
  }

  void results(Line& line) const {
    line.number("loss", mean_loss(), "loss %.4f");
    accuracy(line, answers_);
    time(line, milliseconds_);
  }

  // An emulator's times are nobody's.
  void time(Line& line, const std::vector<double>& milliseconds) const {
    if (emulated_) return line.add("ms_per_step", "emulated: no times", "null");
    line.number("ms_per_step", median(milliseconds), "%.1f ms/step");
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
    answers_ = {};
  }

  void save() {
    if (options_.checkpoint.empty() || saved_) return;
    step_.save(options_.checkpoint);
    saved_ = kept_ = true;
  }

  static void samples(Line& line, uint64_t count, const std::string& link, const std::string& file) {
    line.add("samples", std::to_string(count) + " samples " + link + " " + file, std::to_string(count));
    line.add("file", "", tt::quoted(file));
  }

  void predicted() const {
    Line line(options_.json, "predicted");
    samples(line, data_.size(), "to", options_.predict);
    line.print();
  }

  void evaluated(const tt::Evaluation& evaluation) const {
    Line line(options_.json, "evaluated");
    samples(line, evaluation.samples, "of", test_.where());
    line.number("loss", evaluation.tally.mean(), "loss %.6f");
    accuracy(line, evaluation.tally);
    line.print();
  }

  static void accuracy(Line& line, const tt::Tally& tally) {
    if (tally.labels) line.number("accuracy", tally.accuracy(), "accuracy %.3f");
  }

  void done() const {
    Line line(options_.json, stopped ? "stopped" : "done");
    const uint64_t trained = step_.steps() - before_;
    line.add("steps", std::to_string(step_.steps()) + " steps", std::to_string(step_.steps()));
    line.add("trained", trained ? "" : "nothing trained", std::to_string(trained));
    if (trained) {
      line.number("loss", losses_.empty() ? last_loss_ : losses_.back(), "last loss %.6f");
      time(line, all_);
      line.add("left_out", "", std::to_string(left_out()));
    }
    line.whole("threads", static_cast<uint64_t>(step_.threads()));
    if (kept_) line.add("checkpoint", (trained ? "saved " : "restored ") + options_.checkpoint, tt::quoted(options_.checkpoint));
    line.print();
  }

  const Options& options_;
  const bool emulated_ = !tt::emulated().empty();
  tt::Step& step_;
  const tt::Dataset &data_, &test_;
  uint64_t before_;  // steps taken when it began
  uint64_t batch_, per_epoch_, total_, log_, epoch_ = 0;
  std::vector<uint64_t> order_;
  std::vector<double> milliseconds_, all_, losses_;
  double lr_ = 0, last_loss_ = NAN;
  tt::Tally answers_;
  bool saved_ = true;  // false after a step: a run without one leaves the checkpoint as it is
  bool kept_;          // whether the checkpoint has this state
};

void check_memory(const tt::Manifest& manifest, int threads, const tt::Use& use) {
  const int64_t needed = tt::needed_memory(manifest, threads, use), available = tt::memory().available;
  const auto mebibytes = [](int64_t bytes) { return shortened("%.1f MiB", static_cast<double>(bytes) / (1 << 20)); };
  if (available && needed > available) {
    throw tt::device_error("training needs " + mebibytes(needed) + " of memory and this machine has " + mebibytes(available) +
                           " available; end other programs, train less (an update plan, a smaller batch), or try --anyway");
  }
}

// A file of samples, open.
class File {
 public:
  File(const std::string& path, const tt::Manifest& manifest) : pieces_(opened(path)), data(pieces_, manifest, path) {}

 private:
  static tt::Pieces opened(const std::string& path) {
    try {
      return tt::Pieces(path);
    } catch (const std::system_error& error) {
      throw tt::input_error(path + " cannot be read: " + std::strerror(error.code().value()));
    }
  }

  const tt::Pieces pieces_;

 public:
  const tt::Dataset data;
};

int run(const Options& options) {
  if (!options.affinity.empty()) tt::use_processors(options.affinity);
  const int threads = options.threads ? static_cast<int>(options.threads) : tt::default_threads();
  if (!options.anyway) {
    const tt::Use use{!options.checkpoint.empty(), options.resume && exists(options.checkpoint), !options.predict.empty() || options.evaluates()};
    check_memory(tt::read_manifest(options.artifact), threads, use);
  }
  const std::unique_ptr<tt::Step> loaded = tt::Step::load(options.artifact, threads);
  tt::Step& step = *loaded;
  const File file(options.data, step.manifest());
  const std::unique_ptr<const File> other = options.eval_data.empty() ? nullptr : std::make_unique<const File>(options.eval_data, step.manifest());
  const tt::Dataset& test = other ? other->data : file.data;
  // All of them now: one that is found after an hour ends a run.
  if (options.trains()) file.data.check_labels();
  if (options.evaluates()) test.check_labels();
  const bool restored = options.resume && exists(options.checkpoint);
  if (restored) step.restore(options.checkpoint);
  Run(options, step, file.data, test, restored).all();
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
  } catch (const std::length_error&) {  // more than any memory has
    std::fprintf(stderr, "error: there is not enough memory\n");
  } catch (const std::exception& error) {
    std::fprintf(stderr, "error: %s\n", error.what());
  }
  return 1;
}
