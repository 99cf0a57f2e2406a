// Phase follow: subscriptions on, how far behind they are, and the limit on the WAL that a slot may keep.
#include <algorithm>

#include "base/text.h"
#include "stores/postgres/postgres.h"

namespace rehome {

void PostgresStore::follow_database(StoreContext& c, const std::string& database) {
  PgFlow f = flow(database, Side::source);
  // A new subscription takes every table for a whole one.
  if (c.recall(key("copied", database)) != true) throw Error(Code::state, "database " + database + " cannot be followed: its copy is not finished", "rehome resume");
  auto s = session(c, Side::source, database);
  if (!slot_stands(*s, f))
    throw Error(Code::state, "database " + database + " cannot be followed: slot " + f.slot + " is gone (it passed the limit of WAL kept, or somebody dropped it)", "rehome resume --recopy copies it again");
  // kill -9 of the copy's walsender leaves the slot active for a moment.
  Deadline deadline = Deadline::in(Millis(15000));
  while (s->value("SELECT coalesce(bool_or(active), false) FROM pg_replication_slots WHERE slot_name = " + pg_literal(f.slot)) == "t" &&
         s->number("SELECT count(*) FROM pg_stat_replication WHERE application_name = " + pg_literal(f.subscription)) == 0 && !deadline.passed())
    system_clock().sleep(Millis(20));
  subscribe(c, database, f, true);
}

void PostgresStore::follow(StoreContext& c) {
  for (const auto& database : databases(c)) follow_database(c, database);
  for (Side side : {Side::source, Side::target}) watch_wal(c, side);
}

// The agent's own watcher at a server that may publish: it needs no controller. It drops our slots, never that server's disk, and
// tells the agent how far behind the other side is ("lag STORE BYTES MS", see agent/children.h).
void PostgresStore::watch_wal(StoreContext& c, Side side) {
  const PostgresServer& pg = server(side);
  const std::string ours = "slot_name LIKE 'rehome\\_" + tag_ + "\\_%'";
  std::string limited = ours;
  for (const auto& database : databases(c)) {
    PgFlow f = flow(database, side);
    if (std::string syncing = synchronising_slots(*session(c, f.subscriber(), database), f); !syncing.empty()) limited += " OR " + syncing;
  }
  std::string script = "\\set QUIET on\n\\pset tuples_only on\n\\pset format unaligned\nSET search_path = pg_catalog;\n"
                       // A follower is back within 0.1 s of its end: dropped in the moment between.
                       "DO $rehome$ DECLARE r record; BEGIN FOR r IN SELECT slot_name, pg_wal_lsn_diff(pg_current_wal_lsn(), restart_lsn) AS kept FROM pg_replication_slots "
                       "WHERE (" + limited + ") AND pg_wal_lsn_diff(pg_current_wal_lsn(), restart_lsn) > " + std::to_string(c.deployment.limits.wal_kept) +
                       " LOOP FOR i IN 1..1000 LOOP PERFORM pg_terminate_backend(active_pid) FROM pg_replication_slots WHERE slot_name = r.slot_name AND active; "
                       "BEGIN PERFORM pg_drop_replication_slot(r.slot_name); RAISE WARNING 'slot % dropped: it kept % bytes', r.slot_name, r.kept; EXIT; "
                       "EXCEPTION WHEN object_in_use THEN PERFORM pg_sleep(0.002); WHEN undefined_object THEN EXIT; END; END LOOP; END LOOP; END $rehome$ \\; "
                       "SELECT format('lag " + config_.name + " %s %s', sum(pg_wal_lsn_diff(pg_current_wal_lsn(), confirmed_flush_lsn))::bigint, "
                       "coalesce(max(extract(epoch FROM r.replay_lag) * 1000), 0)::bigint) FROM pg_replication_slots s LEFT JOIN pg_stat_replication r ON r.pid = s.active_pid WHERE s." + ours +
                       " HAVING count(*) > 0 \\watch 5\n";
  std::string info = "host=" + pg_conninfo_value(pg.host) + " port=" + std::to_string(pg.port) + " user=" + pg_conninfo_value(pg.user) + " dbname=" + pg_conninfo_value(pg.admin_database) + " application_name=rehome_watch";
  std::string password = secret(side, pg.admin_database);
  Site& site = c.at(side);
  if (!password.empty()) {
    std::string file = site.state() + "/credentials/" + config_.name + "." + std::string(side_name(side)) + ".pgpass";
    site.call("put", {{"path", file}, {"content", passfile_line(password)}, {"mode", 0600}});
    info += " passfile=" + pg_conninfo_value(file);
  }
  const std::string& psql = c.deployment.site[side].psql;
  site.call("child.set", {{"name", "wal-limit-" + config_.name}, {"argv", {psql.empty() ? "psql" : psql, "-X", "-q", "-d", info}}, {"input", script}, {"user", pg.os_user}, {"restart_ms", 5000}});
}

FollowStatus PostgresStore::follow_status(StoreContext& c) {
  FollowStatus status;
  status.following = true;
  Json databases_detail = Json::object();
  // Which way it flows is who serves: the subscription that is enabled.
  for (const auto& database : databases(c)) {
    bool found = false;
    for (Side publisher : {Side::source, Side::target}) {
      PgFlow f = flow(database, publisher);
      auto sub = session(c, f.subscriber(), database);
      auto rows = sub->query("SELECT s.subenabled, coalesce(st.pid, 0), st.latest_end_lsn FROM pg_subscription s LEFT JOIN pg_stat_subscription st ON st.subid = s.oid AND st.relid IS NULL "
                             "WHERE s.subname = " + pg_literal(f.subscription));
      if (rows.empty() || *rows[0][0] != "t") continue;
      found = true;
      auto pub = session(c, publisher, database);
      auto slot = pub->query("SELECT active, pg_wal_lsn_diff(pg_current_wal_lsn(), confirmed_flush_lsn)::bigint, wal_status, "
                             "pg_wal_lsn_diff(pg_current_wal_lsn(), restart_lsn)::bigint FROM pg_replication_slots WHERE slot_name = " + pg_literal(f.slot));
      if (slot.empty()) {
        status.following = false;
        status.trouble = database + ": slot " + f.slot + " is gone (it passed the limit of WAL kept, or somebody dropped it): " +
                         (publisher == Side::source ? "it must be copied again" : "there is no way back any more");
        continue;
      }
      const std::string look = "; the log of the " + std::string(side_name(f.subscriber())) + "'s server says why";
      std::int64_t lag = std::stoll(slot[0][1].value_or("0"));
      status.lag_bytes += lag;
      auto oldest = pub->query("SELECT coalesce(max(extract(epoch FROM clock_timestamp() - xact_start) * 1000), 0)::bigint FROM pg_stat_activity WHERE backend_xid IS NOT NULL "
                               "AND datname = current_database() AND application_name NOT LIKE 'rehome%'");
      status.open_write_age_ms = std::max(status.open_write_age_ms, static_cast<std::int64_t>(std::stoll(*oldest[0][0])));
      if (*slot[0][0] != "t") status.trouble = database + ": its follower is not connected" + look;
      auto errors = sub->query("SELECT 1 FROM pg_stat_subscription WHERE subname = " + pg_literal(f.subscription) + " AND pid IS NOT NULL");
      if (errors.empty() && status.trouble.empty()) status.trouble = database + ": the apply worker does not run" + look;
      if (std::string failing = synchronisation_trouble(c, database, f, *pub, *sub); !failing.empty() && status.trouble.empty()) status.trouble = database + ": " + failing;
      databases_detail[database] = {{"lag_bytes", lag}, {"wal_kept", std::stoll(slot[0][3].value_or("0"))}, {"active", *slot[0][0] == "t"}, {"publisher", side_name(publisher)}};
    }
    if (!found) {
      status.following = false;
      if (status.trouble.empty()) status.trouble = database + ": no follower is enabled";
    }
  }
  // Applying was measured at some tens of MB a second on small machines; a lag below a page or two is noise.
  status.lag = Millis(status.lag_bytes / 20'000);
  status.detail = databases_detail;
  return status;
}

}  // namespace rehome
