#include "site/site.h"

#include "base/bytes.h"
#include "base/text.h"

namespace rehome {

Outcome Site::exec(const Command& command, Deadline deadline) {
  Json env = Json::object();
  for (const auto& [k, v] : command.env) env[k] = v;
  Json args{{"argv", command.argv}, {"env", env}, {"timeout_ms", deadline.left().count()}};
  if (!command.input.empty()) is_utf8(command.input) ? args["input"] = command.input : args["input_base64"] = to_base64(command.input);
  if (!command.user.empty()) args["user"] = command.user;
  if (!command.directory.empty()) args["directory"] = command.directory;
  Json answer = call("exec", std::move(args), Deadline::in(deadline.left() + Millis(5000)));
  Outcome o = outcome_from_json(answer);
  // Half an answer is none: whoever reads it would take what is missing for not there.
  if (o.truncated)
    throw Error(Code::io, command.argv.at(0) + " printed more than the agent hands on (16 MiB)", "send its output to a file there, and fetch that in pieces").in(label());
  return o;
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
