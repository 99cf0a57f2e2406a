#include "site/site.h"

#include "base/text.h"

namespace rehome {

Outcome Site::exec(const Command& command, Deadline deadline) {
  Json env = Json::object();
  for (const auto& [k, v] : command.env) env[k] = v;
  Json args{{"argv", command.argv}, {"env", env}, {"timeout_ms", deadline.left().count()}};
  if (!command.input.empty()) args["input"] = command.input;
  if (!command.user.empty()) args["user"] = command.user;
  if (!command.directory.empty()) args["directory"] = command.directory;
  Json answer = call("exec", std::move(args), Deadline::in(deadline.left() + Millis(5000)));
  return {static_cast<int>(get_int(answer, "status")), get_string(answer, "out", ""), get_string(answer, "err", "")};
}

Outcome Site::exec_ok(const Command& command, Deadline deadline, const char* what) {
  Outcome o = exec(command, deadline);
  if (o.ok()) return o;
  std::string_view err = trim(o.err);
  if (err.size() > 800) err.remove_prefix(err.size() - 800);
  throw Error(Code::store, std::string(what ? what : command.argv.at(0)) + " ended with status " +
                               std::to_string(o.status) + (err.empty() ? "" : ": " + std::string(err)))
      .in(label());
}

}  // namespace rehome
