#include <sys/stat.h>

#include <cstdlib>

#include "base/error.h"
#include "base/text.h"
#include "config/config.h"
#include "sys/fs.h"

namespace rehome {
namespace {

std::string in_home(const std::string& path) {
  if (path.rfind("~/", 0) != 0) return path;
  const char* home = std::getenv("HOME");
  if (!home || !*home) throw Error(Code::config, "HOME is not set, so " + path + " is not known");
  return home + path.substr(1);
}

// A file that only its owner can read, and its content.
std::string read_private(const std::string& path) {
  struct stat st;
  if (::stat(path.c_str(), &st) != 0)
    throw Error(Code::config, "the password file " + path + " cannot be read", "make it, with mode 0600");
  if ((st.st_mode & 077) != 0)
    throw Error(Code::config, "the password file " + path + " can be read by others", "chmod 0600 " + shell_quote(path));
  try {
    return read_file(path, 1u << 20);
  } catch (const Error& e) {
    throw Error(Code::config, e.message);
  }
}

// The fields of one line of a passfile: ':' separates, '\' takes the next character as it is. `wild` says which fields
// are a bare '*': an escaped one stands for itself.
struct PassLine {
  std::vector<std::string> fields;
  std::vector<bool> wild;
};
PassLine pass_line(std::string_view line) {
  PassLine out;
  std::string field;
  bool escaped = false;
  auto push = [&] {
    out.wild.push_back(field == "*" && !escaped);
    out.fields.push_back(std::move(field));
    field.clear();
    escaped = false;
  };
  for (std::size_t i = 0; i < line.size(); i++) {
    if (line[i] == '\\' && i + 1 < line.size()) {
      escaped = true;
      field += line[++i];
    } else if (line[i] == ':' && out.fields.size() < 4) {
      push();
    } else {
      field += line[i];
    }
  }
  push();
  return out;
}

// The rules are those of the PostgreSQL manual, "The Password File": first match wins; a socket directory that is the
// default one is looked up as localhost too.
std::string from_pgpass(const std::string& host, int port, const std::string& database, const std::string& user) {
  const char* given = std::getenv("PGPASSFILE");
  std::string path = given && *given ? given : in_home("~/.pgpass");
  bool socket = !host.empty() && host.front() == '/';
  bool default_socket = socket && (host == "/run/postgresql" || host == "/var/run/postgresql" || host == "/tmp");
  for (const auto& line : split(read_private(path), '\n')) {
    std::string_view text = line;
    if (!text.empty() && text.back() == '\r') text.remove_suffix(1);
    if (text.empty() || text.front() == '#') continue;
    PassLine p = pass_line(text);
    if (p.fields.size() != 5) continue;
    auto matches = [&](std::size_t i, const std::string& value) { return p.wild[i] || p.fields[i] == value; };
    bool host_matches = matches(0, host) || ((default_socket || host.empty()) && p.fields[0] == "localhost");
    if (host_matches && matches(1, std::to_string(port)) && matches(2, database) && matches(3, user)) return p.fields[4];
  }
  throw Error(Code::config,
              path + " has no line for " + host + ":" + std::to_string(port) + ":" + database + ":" + user,
              "add one: host:port:database:user:password");
}

}  // namespace

std::string read_secret(const SecretRef& ref, const std::string& host, int port, const std::string& database,
                        const std::string& user) {
  switch (ref.from) {
    case SecretRef::From::none:
      return {};
    case SecretRef::From::environment: {
      const char* value = std::getenv(ref.name.c_str());
      if (!value || !*value)
        throw Error(Code::config, "the environment variable " + ref.name + " is not set, and rehome.yaml takes a password from it",
                    "set it in the shell that starts rehome");
      return value;
    }
    case SecretRef::From::file: {
      std::string path = in_home(ref.name), text = read_private(path);
      std::string line = text.substr(0, text.find('\n'));
      if (!line.empty() && line.back() == '\r') line.pop_back();
      if (line.empty()) throw Error(Code::config, "the first line of the password file " + path + " is empty");
      return line;
    }
    case SecretRef::From::pgpass:
      return from_pgpass(host, port, database, user);
  }
  REHOME_CHECK(false && "every kind of secret is read");
  return {};
}

}  // namespace rehome
