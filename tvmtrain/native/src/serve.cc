// A server for boards without Python: it speaks TVM's RPC, one session at a time, each in a process of its own.
//
//     tvmtrain-serve [--host 127.0.0.1] [--port 9090] [--key KEY] [--tracker HOST:PORT] [--threads N] [--emulated]
//
// It runs code for whoever reaches it and knows the key: bind it to a network that you trust.
#include <arpa/inet.h>
#include <fcntl.h>
#include <ftw.h>
#include <netdb.h>
#include <netinet/tcp.h>
#include <poll.h>
#include <signal.h>
#include <sys/prctl.h>
#include <sys/socket.h>
#include <sys/wait.h>
#include <tvm/ffi/error.h>
#include <tvm/ffi/function.h>
#include <unistd.h>

#include <chrono>
#include <cmath>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <optional>
#include <random>
#include <stdexcept>
#include <string>

#include "session.h"

namespace {

namespace ffi = tvm::ffi;

// TVM's numbers: tvm/rpc/base.py of its Python package.
constexpr int32_t kMagic = 0xff271, kTrackerMagic = 0x2f271, kMismatch = kMagic + 2;
constexpr int kPut = 3, kUpdateInfo = 5, kPendingKeys = 7;
constexpr int32_t kLongestKey = 1024, kLongestAnswer = 1 << 20;
// Milliseconds between two looks at the tracker; looks after which a key that was given away and never used is made anew.
constexpr int kPause = 2000, kUnused = 3;
// Seconds within which a client has to say what it wants.
constexpr int kGreeting = 5;

struct Options {
  std::string host = "127.0.0.1", port = "9090", key, tracker_host, tracker_port;
  tt::Settings board;
};

void Log(const std::string& text) { std::fprintf(stderr, "tvmtrain-serve: %s\n", text.c_str()); }

std::runtime_error Failed(const std::string& what) { return std::runtime_error(what + ": " + std::strerror(errno)); }

// --- Sockets --------------------------------------------------------------------------------------------------------------

using Clock = std::chrono::steady_clock;

// A file descriptor that is closed with its owner.
class Socket {
 public:
  explicit Socket(int fd = -1) : fd_(fd) {}
  Socket(Socket&& other) noexcept : fd_(other.fd_) { other.fd_ = -1; }
  Socket& operator=(Socket&& other) noexcept {
    std::swap(fd_, other.fd_);
    return *this;
  }
  ~Socket() {
    if (fd_ >= 0) close(fd_);
  }
  int fd() const { return fd_; }
  explicit operator bool() const { return fd_ >= 0; }

  void Send(const std::string& data) const {
    for (size_t done = 0; done < data.size();) {
      ssize_t sent = send(fd_, data.data() + done, data.size() - done, MSG_NOSIGNAL);
      if (sent < 0 && errno == EINTR) continue;
      if (sent <= 0) throw Failed("send");
      done += sent;
    }
  }
  void SendInt(int32_t value) const { Send(std::string(reinterpret_cast<char*>(&value), sizeof(value))); }
  // until: when all of it has to be there.
  std::string Receive(size_t size, const Clock::time_point* until = nullptr) const {
    std::string data(size, '\0');
    for (size_t done = 0; done < size;) {
      if (until) Await(*until);
      ssize_t got = recv(fd_, &data[done], size - done, 0);
      if (got < 0 && errno == EINTR) continue;
      if (got < 0) throw Failed("receive");
      if (got == 0) throw std::runtime_error("the other end has closed");
      done += got;
    }
    return data;
  }
  int32_t ReceiveInt(const Clock::time_point* until = nullptr) const {
    int32_t value;
    std::memcpy(&value, Receive(sizeof(value), until).data(), sizeof(value));
    return value;
  }
  // A text whose length comes first.
  std::string ReceiveText(int32_t longest, const Clock::time_point* until = nullptr) const {
    int32_t size = ReceiveInt(until);
    if (size < 0 || size > longest) throw std::runtime_error("got a text of " + std::to_string(size) + " bytes");
    return Receive(size, until);
  }
  void SendText(const std::string& text) const {
    SendInt(static_cast<int32_t>(text.size()));
    Send(text);
  }
  void Patience(int seconds) const {
    timeval limit{seconds, 0};
    setsockopt(fd_, SOL_SOCKET, SO_RCVTIMEO, &limit, sizeof(limit));
    setsockopt(fd_, SOL_SOCKET, SO_SNDTIMEO, &limit, sizeof(limit));
  }
  // The system notices within a minute that the other end has vanished.
  void KeepAlive() const {
    int yes = 1, idle = 20, interval = 10, count = 4;
    setsockopt(fd_, SOL_SOCKET, SO_KEEPALIVE, &yes, sizeof(yes));
    setsockopt(fd_, IPPROTO_TCP, TCP_KEEPIDLE, &idle, sizeof(idle));
    setsockopt(fd_, IPPROTO_TCP, TCP_KEEPINTVL, &interval, sizeof(interval));
    setsockopt(fd_, IPPROTO_TCP, TCP_KEEPCNT, &count, sizeof(count));
  }

 private:
  void Await(Clock::time_point until) const {
    auto left = std::chrono::duration_cast<std::chrono::milliseconds>(until - Clock::now()).count();
    pollfd ready{fd_, POLLIN, 0};
    if (left <= 0 || poll(&ready, 1, static_cast<int>(left)) == 0) throw std::runtime_error("the other end says too little");
  }

  int fd_;
};

// A socket that listens (or is connected) at host:port.
Socket Open(const std::string& host, const std::string& port, bool listening) {
  addrinfo hints{}, *found = nullptr;
  hints.ai_socktype = SOCK_STREAM;
  hints.ai_flags = listening ? AI_PASSIVE : 0;
  if (int error = getaddrinfo(host.c_str(), port.c_str(), &hints, &found)) {
    throw std::runtime_error(host + ":" + port + ": " + gai_strerror(error));
  }
  Socket result(socket(found->ai_family, SOCK_STREAM | SOCK_CLOEXEC, 0));
  int yes = 1;
  if (listening) setsockopt(result.fd(), SOL_SOCKET, SO_REUSEADDR, &yes, sizeof(yes));
  int status = listening ? bind(result.fd(), found->ai_addr, found->ai_addrlen)
                         : connect(result.fd(), found->ai_addr, found->ai_addrlen);
  freeaddrinfo(found);
  if (status != 0 || (listening && listen(result.fd(), 4) != 0)) throw Failed(host + ":" + port);
  return result;
}

int PortOf(const Socket& socket) {
  sockaddr_storage address{};
  socklen_t size = sizeof(address);
  getsockname(socket.fd(), reinterpret_cast<sockaddr*>(&address), &size);
  return ntohs(address.ss_family == AF_INET6 ? reinterpret_cast<sockaddr_in6*>(&address)->sin6_port
                                             : reinterpret_cast<sockaddr_in*>(&address)->sin_port);
}

// --- The tracker ----------------------------------------------------------------------------------------------------------

// A connection to TVM's tracker, which hands out boards of one kind: this one, by a key that is new for each session.
class Tracker {
 public:
  Tracker(const Options& options, int port) : options_(options), port_(port) {}

  // The key that the next client has to know; offers the board first where it is not on offer.
  const std::string& Offered() {
    if (!socket_) Join();
    if (match_.empty()) Put();
    return match_;
  }
  void Taken() { match_.clear(); }
  void Lost() {
    socket_ = Socket();
    match_.clear();
  }
  // Whether the tracker still lives, and the key that was given away is used: else there is a new one.
  void Look() {
    if (!socket_) return;
    bool pending = Ask("[" + std::to_string(kPendingKeys) + "]").find('"' + match_ + '"') != std::string::npos;
    unused_ = pending ? 0 : unused_ + 1;
    if (unused_ > kUnused) Put();
  }

 private:
  void Join() {
    socket_ = Open(options_.tracker_host, options_.tracker_port, false);
    socket_.Patience(kGreeting);
    socket_.SendInt(kTrackerMagic);
    if (socket_.ReceiveInt() != kTrackerMagic) throw std::runtime_error("what answers is no tracker");
    std::string port = std::to_string(port_);
    Ask("[" + std::to_string(kUpdateInfo) + ", {\"key\": \"server:" + options_.key + "\", \"addr\": [null, " + port + "]}]");
  }
  void Put() {
    std::random_device source;
    std::uniform_real_distribution<double> draw;
    std::string key = options_.key + ":" + std::to_string(draw(source)) + std::to_string(source());
    std::string port = std::to_string(port_);
    Ask("[" + std::to_string(kPut) + ", \"" + options_.key + "\", [" + port + ", \"" + key + "\"], null]");
    match_ = key;
    unused_ = 0;
  }
  std::string Ask(const std::string& question) {
    socket_.SendText(question);
    return socket_.ReceiveText(kLongestAnswer);
  }

  const Options& options_;
  int port_, unused_ = 0;
  Socket socket_;
  std::string match_;
};

// --- Sessions -------------------------------------------------------------------------------------------------------------

struct Client {
  Socket socket;
  double timeout = 0;  // seconds after which its session is ended; 0: never
};

// The first words of TVM's protocol: magic, "client:KEY [-timeout=SECONDS]". Throws for one that does not know the key.
Client Greet(Socket socket, const std::string& key, const std::string& name) {
  socket.Patience(kGreeting);
  // One deadline for all of it: a byte now and then would keep others out.
  const Clock::time_point until = Clock::now() + std::chrono::seconds(kGreeting);
  if (socket.ReceiveInt(&until) != kMagic) throw std::runtime_error("it does not speak TVM's RPC");
  std::string said = socket.ReceiveText(kLongestKey, &until);
  if (said.substr(0, said.find(' ')) != "client:" + key) {
    socket.SendInt(kMismatch);
    throw std::runtime_error("it has another key");
  }
  socket.SendInt(kMagic);
  socket.SendText("server:" + name);
  socket.Patience(0);
  socket.KeepAlive();
  size_t at = said.find("-timeout=");
  double timeout = at == std::string::npos ? 0 : std::atof(said.c_str() + at + std::strlen("-timeout="));
  return Client{std::move(socket), timeout};
}

// None for a client that is turned away, which is no reason to leave the tracker: the board stays on offer under the same key.
std::optional<Client> Greeted(Socket socket, const std::string& key, const std::string& name) {
  try {
    return Greet(std::move(socket), key, name);
  } catch (const std::exception& error) {
    Log(std::string("a client is turned away: ") + error.what());
    return std::nullopt;
  }
}

int RemoveOne(const char* path, const struct stat*, int, struct FTW*) { return remove(path); }

void RunSession(const Client& client, const Options& options, const std::string& folder) {
  prctl(PR_SET_PDEATHSIG, SIGKILL);  // nobody else would end it
  if (client.timeout > 0) alarm(static_cast<unsigned>(std::ceil(client.timeout)));
  tt::RegisterFunctions(options.board, folder);
  ffi::Function::GetGlobalRequired("rpc.ServerLoop")(client.socket.fd());
}

void Serve(const Client& client, const Options& options) {
  std::string folder = std::string(std::getenv("TMPDIR") ? std::getenv("TMPDIR") : "/tmp") + "/tvmtrain-XXXXXX";
  if (mkdtemp(&folder[0]) == nullptr) throw Failed(folder);
  pid_t child = fork();
  if (child < 0) throw Failed("fork");
  if (child == 0) {
    int code = 0;
    try {
      RunSession(client, options, folder);
    } catch (const std::exception& error) {
      Log(error.what());
      code = 1;
    }
    _exit(code);
  }
  int status = 0;
  while (waitpid(child, &status, 0) < 0 && errno == EINTR) {
  }
  nftw(folder.c_str(), RemoveOne, 8, FTW_DEPTH | FTW_PHYS);
  if (WIFSIGNALED(status)) {
    Log(std::string("the session was ended by signal ") + std::to_string(WTERMSIG(status)) + " (" + strsignal(WTERMSIG(status)) + ")");
  } else {
    Log("the session has ended");
  }
}

// Wait for a client, telling the tracker now and then that the board is there; none: it was only time to look again.
Socket Accept(const Socket& listening, Tracker* tracker) {
  pollfd ready{listening.fd(), POLLIN, 0};
  if (poll(&ready, 1, tracker ? kPause : -1) > 0) return Socket(accept4(listening.fd(), nullptr, nullptr, SOCK_CLOEXEC));
  if (tracker) tracker->Look();
  return Socket();
}

void Loop(const Options& options) {
  Socket listening = Open(options.host, options.port, true);
  int port = PortOf(listening);
  Tracker connection(options, port);
  Tracker* tracker = options.tracker_host.empty() ? nullptr : &connection;
  Log("listening on " + options.host + ":" + std::to_string(port));
  while (true) {
    try {
      std::string key = tracker ? tracker->Offered() : options.key;
      Socket socket = Accept(listening, tracker);
      if (!socket) continue;
      std::optional<Client> client = Greeted(std::move(socket), key, options.key);
      if (!client) continue;
      if (tracker) tracker->Taken();
      Log("a session begins");
      Serve(*client, options);
    } catch (const std::exception& error) {
      Log(error.what());
      if (tracker) tracker->Lost();
      sleep(tracker ? 1 : 0);
    }
  }
}

// --- Options --------------------------------------------------------------------------------------------------------------

Options Parse(int count, char** words) {
  Options options;
  for (int i = 1; i < count; ++i) {
    std::string name = words[i];
    if (name == "--emulated") {
      options.board.emulated = true;
      continue;
    }
    if (i + 1 == count) throw std::runtime_error(name + ": not known, or its value is missing");
    std::string value = words[++i];
    if (name == "--host") options.host = value;
    else if (name == "--port") options.port = value;
    else if (name == "--key") options.key = value;
    else if (name == "--threads") options.board.threads = std::atoi(value.c_str());
    else if (name == "--tracker" && value.rfind(':') != std::string::npos) {
      options.tracker_host = value.substr(0, value.rfind(':'));
      options.tracker_port = value.substr(value.rfind(':') + 1);
    } else {
      throw std::runtime_error(name + " " + value + ": not known; options are --host, --port, --key, --tracker HOST:PORT, "
                               "--threads, --emulated");
    }
  }
  if (options.key.find_first_of(" :\"\\") != std::string::npos) throw std::runtime_error("--key: no spaces, colons or quotes");
  return options;
}

}  // namespace

int main(int count, char** words) {
  try {
    Options options = Parse(count, words);
    Log("this server runs code for whoever reaches it and knows its key; bind it to a network that you trust");
    Loop(options);
  } catch (const std::exception& error) {
    Log(error.what());
    return 2;
  }
  return 0;
}
