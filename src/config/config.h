// Reading rehome.yaml.
#pragma once

#include <string>
#include <vector>

#include "config/deployment.h"

namespace rehome {

struct ConfigProblem {
  int line = 0, column = 0;   // from 1
  std::string message;        // what is wrong
  std::string meant;          // what was probably meant; may be empty
};

// Reads `text` (the content of `file`). Every problem is reported, not the first; the Deployment is usable only when
// there is none. Never throws for what the text says.
Deployment read_deployment(const std::string& file, const std::string& text, std::vector<ConfigProblem>& problems);

// The same from disk; problems are thrown as one Error(config) with "file:line:column: message; did you mean ...?" lines.
Deployment load_deployment(const std::string& file);

// The value of a secret: from the environment, a file (first line), or ~/.pgpass for the given connection. Throws
// Error(config) naming where it looked, never what it found.
std::string read_secret(const SecretRef& ref, const std::string& host, int port, const std::string& database,
                        const std::string& user);

}  // namespace rehome
