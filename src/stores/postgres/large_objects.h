// Large objects, which logical replication does not carry: both sides compared, and what differs brought page by page. Nothing of an
// object goes through this process but the pages that differ, a few megabytes at a time, however large it is.
#pragma once

#include <functional>
#include <string>

#include "base/clock.h"
#include "stores/postgres/session.h"

namespace rehome {

// The rights on a row of pg_largeobject_metadata, called m, as SQL: the same text on two servers where they are the same.
std::string large_object_rights();

// About how many bytes are in a database's large objects, as SQL: from the size of the index of their pages (22 bytes each), since the
// table's own is that of compressed pages.
std::string large_object_bytes();

struct LargeObjectsCarried {
  std::int64_t objects = 0;   // with another content, owner or rights, new ones and removed ones too
  std::int64_t pages = 0;     // brought
};

// Makes the large objects of `to` those of `from`: content with its holes and its exact length, owners, rights. Pages are compared by
// 64-bit hashes made inside the servers, both at once. They are read from and written to pg_largeobject itself, which a superuser may:
// reading takes no lock that a writer's fence has, and lo_put() could neither take a page out of the middle nor leave a hole there.
//
// Both sessions belong to it meanwhile, and are in no transaction. `to` commits after some 64 MB or 500 objects; a failure leaves
// what was committed, and the next call goes on from there. What changes at `from` meanwhile is met by the next call.
// `moved` hears the bytes brought, and may throw.
LargeObjectsCarried carry_large_objects(PgSession& from, PgSession& to, Deadline deadline, const std::function<void(std::int64_t)>& moved = {});

}  // namespace rehome
