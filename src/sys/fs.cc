#include "sys/fs.h"

#include <fcntl.h>
#include <sys/stat.h>

#include <algorithm>
#include <cerrno>
#include <cstdio>
#include <cstdlib>
#include <filesystem>

#include "base/error.h"
#include "base/text.h"

namespace rehome {

std::string read_file(const std::string& path, std::size_t most) {
  Fd fd(::open(path.c_str(), O_RDONLY | O_CLOEXEC));
  if (!fd) throw errno_error(errno, "open", path);
  std::string out;
  char buf[65536];
  while (true) {
    ssize_t n = ::read(fd.get(), buf, sizeof buf);
    if (n < 0 && errno == EINTR) continue;
    if (n < 0) throw errno_error(errno, "read", path);
    if (n == 0) return out;
    out.append(buf, static_cast<std::size_t>(n));
    if (out.size() > most) throw Error(Code::io, "read " + path + ": larger than " + std::to_string(most) + " bytes");
  }
}

bool exists(const std::string& path) {
  struct stat st;
  return ::lstat(path.c_str(), &st) == 0;
}

void write_all(int fd, std::string_view bytes, std::string_view what) {
  while (!bytes.empty()) {
    ssize_t n = ::write(fd, bytes.data(), bytes.size());
    if (n < 0 && errno == EINTR) continue;
    if (n < 0) throw errno_error(errno, "write", what);
    bytes.remove_prefix(static_cast<std::size_t>(n));
  }
}

void fsync_directory(const std::string& path) {
  Fd fd(::open(path.c_str(), O_RDONLY | O_DIRECTORY | O_CLOEXEC));
  if (!fd) throw errno_error(errno, "open", path);
  if (::fsync(fd.get()) != 0) throw errno_error(errno, "fsync", path);
}

std::string parent_path(const std::string& path) {
  auto at = path.find_last_of('/');
  if (at == std::string::npos) return ".";
  return at == 0 ? "/" : path.substr(0, at);
}

void write_durably(const std::string& path, std::string_view content, unsigned mode) {
  std::string temp = path + ".new." + std::to_string(::getpid());
  ::unlink(temp.c_str());
  Fd fd(::open(temp.c_str(), O_WRONLY | O_CREAT | O_EXCL | O_CLOEXEC, mode));
  if (!fd) throw errno_error(errno, "create", temp);
  try {
    // The mode asked for, whatever the umask.
    if (::fchmod(fd.get(), mode) != 0) throw errno_error(errno, "chmod", temp);
    write_all(fd.get(), content, temp);
    if (::fsync(fd.get()) != 0) throw errno_error(errno, "fsync", temp);
    if (::rename(temp.c_str(), path.c_str()) != 0) throw errno_error(errno, "rename to", path);
  } catch (...) {
    ::unlink(temp.c_str());
    throw;
  }
  fsync_directory(parent_path(path));
}

void make_directories(const std::string& path, unsigned mode) {
  if (path.empty() || path == "/" || path == ".") return;
  if (::mkdir(path.c_str(), mode) == 0) return;
  if (errno == ENOENT) {
    make_directories(parent_path(path), mode);
    if (::mkdir(path.c_str(), mode) == 0) return;
  }
  int err = errno;
  struct stat st;
  if (err == EEXIST && ::stat(path.c_str(), &st) == 0 && S_ISDIR(st.st_mode)) return;
  throw errno_error(err, "make directory", path);
}

// A mount of somebody's tree that a killed process left there would be emptied with the rest.
static void refuse_mounts_below(const std::string& path) {
  std::error_code ec;
  const std::string real = std::filesystem::canonical(path, ec).string();
  if (ec) return;   // not there, or not to be looked at: the removal says so
  // As mountinfo writes it.
  std::string prefix;
  for (char c : real + "/") {
    char octal[5];
    std::snprintf(octal, sizeof octal, "\\%03o", static_cast<unsigned>(c));
    prefix += c == ' ' || c == '\t' || c == '\n' || c == '\\' ? std::string(octal) : std::string(1, c);
  }
  for (const auto& line : split(read_file("/proc/self/mountinfo"), '\n')) {
    auto field = split(line, ' ');
    if (field.size() > 4 && field[4].starts_with(prefix))
      throw Error(Code::state, "something is mounted at " + field[4] + ", below " + path + ", which is not removed", "umount " + field[4]);
  }
}

void remove_tree(const std::string& path) {
  refuse_mounts_below(path);
  std::error_code ec;
  std::filesystem::remove_all(path, ec);
  if (ec && ec != std::errc::no_such_file_or_directory)
    throw errno_error(ec.value(), "remove", path);
}

std::vector<std::string> list_directory(const std::string& path) {
  std::vector<std::string> names;
  std::error_code ec;
  std::filesystem::directory_iterator it(path, ec);
  if (ec) throw errno_error(ec.value(), "list", path);
  for (const auto& entry : it) names.push_back(entry.path().filename().string());
  std::sort(names.begin(), names.end());
  return names;
}

TempDir::TempDir(const std::string& prefix) {
  const char* base = std::getenv("TMPDIR");
  std::string pattern = std::string(base && *base ? base : "/tmp") + "/" + prefix + ".XXXXXX";
  if (!::mkdtemp(pattern.data())) throw errno_error(errno, "make directory", pattern);
  path_ = pattern;
}

TempDir::~TempDir() {
  std::error_code ec;
  std::filesystem::remove_all(path_, ec);  // a destructor has nobody to tell; what stays is in the temporary directory
}

}  // namespace rehome
