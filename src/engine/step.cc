#include "engine/step.h"

#include <optional>
#include <thread>

namespace rehome {
namespace {

std::optional<Error> run_one(const Step& step, Journal& journal) {
  auto failed = [&](const Error& e) {
    try {
      journal.set_step(step.id, step.title, StepState::failed, &e);
    } catch (const Error&) {
      // The journal itself is what failed: `started` is there, and resume runs the step again.
    }
    return e.in(step.title);
  };
  try {
    if (journal.step(step.id) == StepState::done) {
      if (!step.still_done || step.still_done()) return std::nullopt;
    }
    journal.set_step(step.id, step.title, StepState::started);
    step.run();
    journal.set_step(step.id, step.title, StepState::done);
    return std::nullopt;
  } catch (const Error& e) {
    return failed(e);
  } catch (const std::exception& e) {
    return failed(Error(Code::internal, e.what()));
  }
}

}  // namespace

void run_steps(const std::vector<Step>& steps, Journal& journal, const std::atomic<bool>& cancelled) {
  for (std::size_t i = 0; i < steps.size();) {
    if (cancelled) throw Error(Code::interrupted, "stopped before: " + steps[i].title, "rehome resume goes on; rehome cancel takes it back");
    std::size_t end = i + 1;
    while (end < steps.size() && !steps[i].group.empty() && steps[end].group == steps[i].group) end++;
    std::vector<std::optional<Error>> failures(end - i);
    if (end == i + 1) {
      failures[0] = run_one(steps[i], journal);
    } else {
      std::vector<std::jthread> threads;
      for (std::size_t k = i; k < end; k++)
        threads.emplace_back([&, k] { failures[k - i] = run_one(steps[k], journal); });
    }
    for (auto& f : failures)
      if (f) throw *f;
    i = end;
  }
}

void undo_steps(const std::vector<Step>& steps, Journal& journal) {
  std::optional<Error> first;
  for (auto step = steps.rbegin(); step != steps.rend(); ++step) {
    StepState state = journal.step(step->id);
    if (state == StepState::none || state == StepState::undone) continue;
    try {
      if (step->undo) step->undo();
      journal.set_step(step->id, step->title, StepState::undone);
    } catch (const Error& e) {
      if (!first) first = e.in("undoing: " + step->title);
      journal.set_step(step->id, step->title, StepState::failed, &e);
    }
  }
  if (first) throw *first;
}

}  // namespace rehome
