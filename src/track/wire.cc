#include "track/wire.h"

#include <poll.h>
#include <sys/socket.h>

#include <bit>
#include <cerrno>
#include <cstring>

#include "base/error.h"

namespace rehome::track {
namespace {

static_assert(std::endian::native == std::endian::little);
constexpr std::size_t largest_frame = 64u << 20;
constexpr std::size_t send_buffer = 256u << 10;

bool wait_for(int fd, short events, Deadline deadline) {
  while (true) {
    pollfd p{fd, events, 0};
    int r = ::poll(&p, 1, static_cast<int>(deadline.left(Millis(60'000)).count()));
    if (r > 0) return true;
    if (r < 0 && errno != EINTR) throw errno_error(errno, "poll", "the connection to the other agent");
    if (deadline.passed()) return false;
  }
}

}  // namespace

std::string_view Unpacker::take(std::size_t n) {
  if (in_.size() < n) throw Error(Code::io, "a frame from the other agent is too short");
  auto out = in_.substr(0, n);
  in_.remove_prefix(n);
  return out;
}

void Channel::send(FrameType type, std::string_view payload, Deadline deadline) {
  REHOME_CHECK(payload.size() < largest_frame);
  auto size = static_cast<std::uint32_t>(payload.size());
  out_.append(reinterpret_cast<const char*>(&size), sizeof size);
  out_ += static_cast<char>(type);
  out_.append(payload);
  if (out_.size() >= send_buffer) flush(deadline);
}

void Channel::flush(Deadline deadline) {
  std::string_view left = out_;
  while (!left.empty()) {
    ssize_t n = ::send(fd_, left.data(), left.size(), MSG_NOSIGNAL | MSG_DONTWAIT);
    if (n > 0) {
      left.remove_prefix(static_cast<std::size_t>(n));
      sent_ += static_cast<std::uint64_t>(n);
    } else if (errno == EAGAIN) {
      if (!wait_for(fd_, POLLOUT, deadline)) throw Error(Code::timeout, "the other agent takes no data", "", true);
    } else if (errno != EINTR) {
      throw Error(Code::unreachable, std::string("the other agent is gone: ") + std::strerror(errno), "", true);
    }
  }
  out_.clear();
}

bool Channel::readable(Millis wait) {
  if (in_.size() > at_) return true;
  pollfd p{fd_, POLLIN, 0};
  return ::poll(&p, 1, static_cast<int>(wait.count())) > 0;
}

bool Channel::fill(Deadline deadline) {
  // What was taken is dropped before more is read, or a long stream would grow the buffer for ever.
  if (at_ > 0) {
    in_.erase(0, at_);
    at_ = 0;
  }
  while (true) {
    if (!wait_for(fd_, POLLIN, deadline)) throw Error(Code::timeout, "no answer from the other agent in time", "", true);
    char buf[65536];
    ssize_t n = ::recv(fd_, buf, sizeof buf, MSG_DONTWAIT);
    if (n > 0) {
      in_.append(buf, static_cast<std::size_t>(n));
      return true;
    }
    if (n == 0) return false;
    if (errno != EINTR && errno != EAGAIN)
      throw Error(Code::unreachable, std::string("the other agent is gone: ") + std::strerror(errno), "", true);
  }
}

Frame Channel::receive(Deadline deadline) {
  Frame f;
  if (!receive_or_end(f, deadline)) throw Error(Code::unreachable, "the other agent closed the connection", "", true);
  return f;
}

bool Channel::receive_or_end(Frame& f, Deadline deadline) {
  auto closed = [] { return Error(Code::unreachable, "the other agent closed in the middle of a frame", "", true); };
  while (in_.size() - at_ < 5) {
    bool some = in_.size() > at_;
    if (!fill(deadline)) {
      if (some) throw closed();
      return false;
    }
  }
  std::uint32_t size;
  std::memcpy(&size, in_.data() + at_, sizeof size);
  f.type = static_cast<FrameType>(in_[at_ + 4]);
  if (size > largest_frame) throw Error(Code::io, "a frame from the other agent is too large");
  while (in_.size() - at_ < 5 + std::size_t{size})
    if (!fill(deadline)) throw closed();
  f.payload.assign(in_, at_ + 5, size);
  at_ += 5 + std::size_t{size};
  return true;
}

}  // namespace rehome::track
