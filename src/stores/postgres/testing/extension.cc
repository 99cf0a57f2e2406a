#include "stores/postgres/testing/extension.h"

#include <unistd.h>

#include <random>

namespace rehome::testing {

TestExtension::TestExtension(const std::string& word, bool relocatable)
    : name_("rehome_" + word + "_" + std::to_string(::getpid()) + "_" + std::to_string(std::random_device{}())), relocatable_(relocatable) {}

TestExtension::~TestExtension() {
  for (const auto& f : files_) ::unlink(f.c_str());
}

void TestExtension::put(const PgServer& server, const std::string& default_version, const std::map<std::string, std::string>& scripts) {
  const std::string place = server.session("postgres")->value("SELECT setting FROM pg_config WHERE name = 'SHAREDIR'") + "/extension/" + name_;
  auto write = [&](const std::string& file, const std::string& content) {
    files_.insert(file);
    write_durably(file, content, 0644);
  };
  write(place + ".control", "default_version = '" + default_version + "'\nrelocatable = " + (relocatable_ ? "true" : "false") + "\n");
  for (const auto& [version, sql] : scripts) write(place + "--" + version + ".sql", sql);
}

}  // namespace rehome::testing
