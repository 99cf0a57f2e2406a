/* The commit protocol of `switch` and `reverse`: who serves, and how that changes.
 *
 * Two sites, each with an agent (durable record, volatile lease), a gate and two stores; the
 * controller that asks, an old controller that wakes up late, the link, and faults at any point.
 * README.md beside this file says what is abstracted, which properties are checked, and how.
 *
 * Every option of every loop is one indivisible step of its actor. No step can be repeated for
 * ever (a message is sent again only after a reconnection, and faults are counted), so that every
 * run ends: "eventually" is what holds in each state in which nothing is left to do.
 *
 * -DMISTAKE_* puts a mistake in, -DHOLE_* takes one of our mends out; each must be found.
 */

#ifndef FAULTS
#define FAULTS 2            /* how many faults, of any kind, in one run */
#endif
#ifndef ATTEMPTS
#define ATTEMPTS 4          /* how often a switch or a reverse may be tried, in all */
#endif

/* A record's decision; four of the names are also the messages between the agents. */
mtype = { SERVING, ATTEMPT, COMMIT, ABORT, CANCELLED, PREPARED, STORED, OPENED, REFUSED }
mtype:gate_state = { OPEN_LOCAL, OPEN_PEER, HELD, SEALED }
mtype:store_state = { STORE_OPEN, STORE_SOFT, STORE_HARD }
mtype:statement = { NOTHING, FENCE, UNFENCE }
/* The next thing a controller asks for. */
mtype:asks = { IDLE, HOLD, SOFT_DB, SOFT_KV, PROVE, SEAL, HARD_KV, HARD_DB, DECIDE }

#define SOURCE 0
#define TARGET 1
#define DB 0                /* the hard fence is the COMMIT of the session that holds the soft one */
#define KV 1                /* the soft fence has a timer, the hard one is a statement of its own */

typedef Record { mtype decision = SERVING; byte epoch = 0; byte attempt = 0; bit serves = SOURCE }
typedef Stores { mtype:store_state at[2]; mtype:statement inflight[2] }

Record record[2];           /* what a reader of the disk sees */
Record before[2];           /* what is there instead, if power goes before the write is durable */
byte writing[2];            /* 1: written, not yet durable; 2: taken for durable without being */
bit alive[2];               /* the agent's process */
bit lease[2];
byte sent[2];               /* over this connection: 1 PREPARED, 2 COMMIT */
bit owes[2];                /* a COMMIT came over this connection, and has no answer yet */

mtype:gate_state gate[2];
Stores store[2];
bit same_db, same_kv;       /* the soft fence's session, or server, is still the one that was fenced */
#ifdef HOLE_INFLIGHT
Stores late[2];             /* statements of dead sessions that nobody waits for */
#endif

bit link;
#ifdef PERSON
bit off[2];                 /* the host is lost, until it comes back */
bit by_hand;                /* a person has decided */
#ifdef HOLE_EPOCH
#define BY_HAND 1
#else
#define BY_HAND 100         /* past anything that the other side can have reached by itself */
#endif
#define gone(s) off[s]
#define decided_by_hand by_hand
#else
#define gone(s) false
#define decided_by_hand false
#endif
chan to[2] = [1] of { mtype, byte, byte };

mtype:asks asks; byte asks_attempt; bit asks_site;
mtype:asks stale; byte stale_attempt; bit stale_site;
bit knows[2];               /* the agent has been told the generation of the current controller */

/* For the properties only: no actor looks at these, but for `turns`, the person's wish. */
byte faults = FAULTS;
byte turns;                 /* 1: switched, 2: switched and reversed */
bit behind;                 /* a write was acknowledged that the other site has not proven to have */
byte committed, aborted, refused;   /* durable decisions: a bit for each attempt */

#define other(s) (1 - (s))
#define bit_of(n) (1 << (n))
#ifdef MISTAKE_REREAD
#define ready(s) (alive[s] && writing[s] != 1)
#else
#define ready(s) (alive[s] && !writing[s])
#endif
#define says(s, d) (record[s].decision == d)
#define is_open(s) (store[s].at[DB] == STORE_OPEN && store[s].at[KV] == STORE_OPEN)
#define is_closed(s) (store[s].at[DB] == STORE_HARD && store[s].at[KV] == STORE_HARD)
#define some_closed(s) (store[s].at[DB] == STORE_HARD || store[s].at[KV] == STORE_HARD)
#define writable(s) (!gone(s) && (store[s].at[DB] == STORE_OPEN || store[s].at[KV] == STORE_OPEN))
#define settled(s, k) (store[s].inflight[k] == NOTHING)
#define connected (link && alive[0] && alive[1])
#define steady_here(s) ((says(s, SERVING) || says(s, OPENED)) && record[s].serves == s)
#define steady_there(s) ((says(s, SERVING) || says(s, PREPARED) || says(s, REFUSED)) && record[s].serves != s)
#define undoes(s) ((says(s, ABORT) || says(s, CANCELLED) || says(s, REFUSED)) && record[s].serves == s)

/* One site serves, its gate lets clients in, the other is closed and sends them there. */
#define serves_alone(s) (is_open(s) && is_closed(other(s)) && gate[s] == OPEN_LOCAL && gate[other(s)] == OPEN_PEER && \
                         record[0].serves == s && record[1].serves == s)
#define served (serves_alone(SOURCE) || serves_alone(TARGET))

/* What must hold after every step that touches a store or a gate. A soft fence counts as accepting
 * writes: it falls by itself. */
inline check()
{
    assert(is_closed(0) || is_closed(1) || gone(0) || gone(1)); /* P1 never both sites accept writes */
    assert(gate[0] != OPEN_LOCAL || !some_closed(0));           /* P5 no gate lets clients in to a closed store */
    assert(gate[1] != OPEN_LOCAL || !some_closed(1));           /* P5 no gate lets clients in to a closed store */
    assert(gate[0] != OPEN_PEER || gate[1] != OPEN_PEER)        /* P6 the gates never send clients in a circle */
}

#define copy(to_record, from_record) \
    to_record.decision = from_record.decision; to_record.epoch = from_record.epoch; \
    to_record.attempt = from_record.attempt; to_record.serves = from_record.serves
#define forget(r) r.decision = SERVING; r.epoch = 0; r.attempt = 0; r.serves = SOURCE

inline write(on, how, number, era, who)
{
#ifdef MISTAKE_REREAD
    if :: writing[on] != 2 -> copy(before[on], record[on]) :: else fi;
#else
    copy(before[on], record[on]);
#endif
    record[on].decision = how; record[on].attempt = number; record[on].epoch = era; record[on].serves = who;
    writing[on] = 1
}

/* The write that was under way is durable: from here on it counts. */
inline became_durable(on)
{
    writing[on] = 0; forget(before[on]);
    if
    :: says(on, COMMIT) ->
        committed = committed | bit_of(record[on].attempt);
        assert(!behind)                                         /* P2 no acknowledged write is lost */
    :: (says(on, ABORT) || says(on, CANCELLED)) -> aborted = aborted | bit_of(record[on].attempt)
    :: says(on, REFUSED) && record[on].serves != on -> refused = refused | bit_of(record[on].attempt)
    :: says(on, OPENED) -> turns++
    :: else
    fi;
    assert((committed & aborted) == 0)                          /* P3 COMMIT and ABORT are never both durable */
}

inline disconnect()
{
    do :: nempty(to[0]) -> to[0]?_,_,_ :: empty(to[0]) -> break od;
    do :: nempty(to[1]) -> to[1]?_,_,_ :: empty(to[1]) -> break od;
#ifndef MISTAKE_RESEND
    sent[0] = 0; sent[1] = 0;
#endif
    owes[0] = 0; owes[1] = 0
}

/* The statement's effect in the store. */
inline land(on, k)
{
    if
    :: store[on].inflight[k] == FENCE -> store[on].at[k] = STORE_HARD
    :: store[on].inflight[k] == UNFENCE ->
        store[on].at[k] = STORE_OPEN;
        if
        :: record[on].serves == on && says(on, STORED) ->
            assert(decided_by_hand || (committed & bit_of(record[on].attempt))); /* P4 opens after a durable COMMIT only */
            assert(decided_by_hand || !(refused & bit_of(record[on].attempt)))   /* P4 and never after REFUSED */
        :: else -> assert(!says(on, COMMIT) || decided_by_hand)     /* P7 nothing is undone after COMMIT */
        fi
    fi;
    store[on].inflight[k] = NOTHING;
    check()
}

#ifdef HOLE_INFLIGHT
inline orphan(on, k)
{
    if
    :: store[on].inflight[k] != NOTHING -> late[on].inflight[k] = store[on].inflight[k]; store[on].inflight[k] = NOTHING
    :: else
    fi
}
inline land_late(on, k)
{
    if
    :: late[on].inflight[k] == FENCE -> store[on].at[k] = STORE_HARD
    :: late[on].inflight[k] == UNFENCE -> store[on].at[k] = STORE_OPEN
    fi;
    late[on].inflight[k] = NOTHING;
    check()
}
#define cut_sessions(s) orphan(s, DB); orphan(s, KV)
#else
#define cut_sessions(s) skip
#endif

/* A statement whose session is cut: its server may have done it already. */
inline land_or_drop(on, k)
{
    if
    :: store[on].inflight[k] == NOTHING
    :: store[on].inflight[k] != NOTHING -> land(on, k)
    :: store[on].inflight[k] != NOTHING -> store[on].inflight[k] = NOTHING
    fi
}

inline lose_soft(on, k)
{
    if :: store[on].at[k] == STORE_SOFT -> store[on].at[k] = STORE_OPEN :: else fi;
    if :: k == DB -> same_db = 0 :: else -> same_kv = 0 fi
}

#define ask_store(s, k, what) store[s].inflight[k] = what
#define soften(s, k) store[s].at[k] = STORE_SOFT

/* What the agents do by themselves. */
proctype Agent(bit me)
{
    mtype what; byte n, e;
end:
    do
    :: atomic { alive[me] && writing[me] == 1 -> became_durable(me) }

    /* The yielding side. The lease is over, or this is a restarted agent, which holds none. */
#ifdef MISTAKE_SLOT
#define slot_is_free(s) (says(s, ATTEMPT) || says(s, COMMIT))
#else
#define slot_is_free(s) says(s, ATTEMPT)
#endif
    :: d_step { ready(me) && slot_is_free(me) && !lease[me] ->
            write(me, ABORT, record[me].attempt, record[me].epoch, me); sent[me] = 0; cut_sessions(me) }

    /* The undo. It touches a store only when no statement of an earlier session is left in it. */
#ifdef MISTAKE_UNDO
#define may_undo(s) (ready(s) && (undoes(s) || (says(s, COMMIT) && !lease[s])))
#else
#define may_undo(s) (ready(s) && undoes(s))
#endif
    :: d_step { may_undo(me) && store[me].at[DB] != STORE_OPEN && settled(me, DB) ->
            same_db = 0;
            if
            :: store[me].at[DB] == STORE_HARD -> ask_store(me, DB, UNFENCE)
            :: else -> store[me].at[DB] = STORE_OPEN
            fi; check() }
    :: d_step { may_undo(me) && store[me].at[DB] == STORE_OPEN && settled(me, DB) &&
                store[me].at[KV] != STORE_OPEN && settled(me, KV) ->
            same_kv = 0;
            if
            :: store[me].at[KV] == STORE_HARD -> ask_store(me, KV, UNFENCE)
            :: else -> store[me].at[KV] = STORE_OPEN
            fi; check() }
    :: d_step { may_undo(me) && is_open(me) && settled(me, DB) && settled(me, KV) &&
                (gate[me] != OPEN_LOCAL || !says(me, CANCELLED)) ->
            same_db = 0; same_kv = 0;
            gate[me] = OPEN_LOCAL;
            if
            :: !says(me, CANCELLED) -> write(me, SERVING, record[me].attempt, record[me].epoch, me)
            :: else
            fi; check() }

    /* The taking-over side: STORED is its point of no return. */
    :: d_step { ready(me) && says(me, STORED) && store[me].at[DB] == STORE_HARD && settled(me, DB) ->
            if
            :: is_closed(me) -> assert(!behind || decided_by_hand)  /* P2 no acknowledged write is lost */
            :: else
            fi;
            ask_store(me, DB, UNFENCE) }
    :: d_step { ready(me) && says(me, STORED) && store[me].at[DB] == STORE_OPEN && settled(me, DB) &&
                store[me].at[KV] == STORE_HARD && settled(me, KV) -> ask_store(me, KV, UNFENCE) }
    :: d_step { ready(me) && says(me, STORED) && is_open(me) && settled(me, DB) && settled(me, KV) ->
            gate[me] = OPEN_LOCAL;
            write(me, OPENED, record[me].attempt, record[me].epoch, me); check() }
    :: d_step { ready(me) && says(me, PREPARED) && faults > 0 ->
            faults--; owes[me] = 1;
            write(me, REFUSED, record[me].attempt, record[me].epoch, other(me)) }
#ifdef HOLE_REFUSE
    :: d_step { ready(me) && says(me, STORED) && is_closed(me) && faults > 0 ->
            faults--; write(me, REFUSED, record[me].attempt, record[me].epoch - 1, other(me)) }
#endif

    /* The gate follows the record: after a power loss it waits, sealed, to be told. */
    :: d_step { ready(me) && steady_here(me) && is_open(me) && gate[me] != OPEN_LOCAL ->
            gate[me] = OPEN_LOCAL; check() }
    :: d_step { ready(me) && steady_there(me) && gate[me] != OPEN_PEER -> gate[me] = OPEN_PEER; check() }

    /* Sent once a connection; a new connection starts again. */
#ifdef HOLE_PREPARED
#define may_prepare(s) (gate[s] == SEALED)
#else
#define may_prepare(s) is_closed(s)
#endif
    :: d_step { ready(me) && says(me, ATTEMPT) && may_prepare(me) && lease[me] && connected &&
                sent[me] == 0 && empty(to[other(me)]) ->
            to[other(me)]!PREPARED(record[me].attempt, record[me].epoch); sent[me] = 1 }
    :: d_step { ready(me) && says(me, COMMIT) && connected && sent[me] < 2 && empty(to[other(me)]) ->
            to[other(me)]!COMMIT(record[me].attempt, record[me].epoch); sent[me] = 2 }
    :: d_step { ready(me) && says(me, OPENED) && connected && owes[me] && empty(to[other(me)]) ->
            to[other(me)]!OPENED(record[me].attempt, record[me].epoch); owes[me] = 0 }
    :: d_step { ready(me) && says(me, REFUSED) && record[me].serves != me && connected && owes[me] &&
                empty(to[other(me)]) ->
            to[other(me)]!REFUSED(record[me].attempt, record[me].epoch); owes[me] = 0 }

    :: atomic { ready(me) && nempty(to[me]) ->
            to[me]?what, n, e;
            if
            :: what == PREPARED ->
                if
                :: steady_there(me) && record[me].attempt < n -> write(me, PREPARED, n, e, other(me))
                :: else
                fi
            :: what == COMMIT ->
                owes[me] = 1;
                if
                :: steady_there(me) && (record[me].attempt < n || (says(me, PREPARED) && record[me].attempt == n)) ->
                    if
                    :: write(me, STORED, n, e, me)
                    :: faults > 0 -> faults--; write(me, REFUSED, n, record[me].epoch, other(me))
                    fi
                :: else     /* known already: answered when the record says how it ended */
                fi
            :: what == OPENED ->
                if
                :: says(me, COMMIT) && record[me].attempt == n ->
                    write(me, SERVING, n, record[me].epoch, other(me)); sent[me] = 0
                :: else
                fi
            :: what == REFUSED ->
                if
                :: says(me, COMMIT) && record[me].attempt == n ->
                    write(me, REFUSED, n, record[me].epoch + 1, me); sent[me] = 0
                :: says(me, ATTEMPT) && record[me].attempt == n -> lease[me] = 0
                :: else
                fi
            fi;
            what = 0; n = 0; e = 0 }
    od
}

/* One command of a controller, and the agent's answer to it. Whatever is refused or fails ends the
 * attempt: nothing is tried a second time under the same number. */
#define waits_for(a, s) ((a == HARD_DB && !settled(s, KV)) || (a == DECIDE && !settled(s, DB)) || (a == PROVE && !connected))
#ifdef MISTAKE_LEASE
#define may_commit(s) true
#else
#define may_commit(s) lease[s]
#endif
#ifdef HOLE_RESTART
#define kv_unbroken true
#else
#define kv_unbroken same_kv
#endif

inline command(wish, on, number, allowed, gave_up)
{
    gave_up = 0;
    if
    :: !(allowed && says(on, ATTEMPT) && record[on].attempt == number) -> gave_up = 1
    :: else ->
        if
        :: wish == HOLD ->
            if
            :: gate[on] == OPEN_LOCAL -> gate[on] = HELD; wish = SOFT_DB
            :: else -> gave_up = 1
            fi
        :: wish == SOFT_DB ->
            if
            :: store[on].at[DB] == STORE_OPEN && settled(on, DB) -> soften(on, DB); same_db = 1; wish = SOFT_KV
            :: else -> gave_up = 1
            fi
        :: wish == SOFT_KV ->
            if
            :: store[on].at[KV] == STORE_OPEN && settled(on, KV) -> soften(on, KV); same_kv = 1; wish = PROVE
            :: else -> gave_up = 1
            fi
        :: wish == PROVE -> behind = 0; wish = SEAL
        :: wish == SEAL ->
            if
#ifdef MISTAKE_SEAL
            :: gate[on] == HELD -> wish = HARD_KV
#else
            :: gate[on] == HELD -> gate[on] = SEALED; wish = HARD_KV
#endif
            :: else -> gave_up = 1
            fi
        :: wish == HARD_KV ->
            if
            :: kv_unbroken && settled(on, KV) -> ask_store(on, KV, FENCE); wish = HARD_DB
            :: else -> gave_up = 1
            fi
        :: wish == HARD_DB ->
            if
            :: store[on].at[KV] == STORE_HARD && same_db && settled(on, DB) -> ask_store(on, DB, FENCE); wish = DECIDE
            :: else -> gave_up = 1
            fi
        :: wish == DECIDE ->
            if
            :: is_closed(on) && may_commit(on) ->
                write(on, COMMIT, number, record[on].epoch + 1, other(on)); lease[on] = 0; wish = IDLE
            :: else -> gave_up = 1
            fi
        fi
    fi;
    check()
}

/* Opens an attempt only when both records are steady: the one before it is finished on both sides. */
#ifdef HOLE_STEADY
#define other_is_steady(s) true
#else
#define other_is_steady(s) (steady_there(other(s)) && gate[other(s)] == OPEN_PEER)
#endif
#define may_begin(s) (asks == IDLE && knows[0] && knows[1] && ready(0) && ready(1) && steady_here(s) && \
                      other_is_steady(s) && gate[s] == OPEN_LOCAL && is_open(s) && record[s].attempt < ATTEMPTS)

proctype Controller()
{
    bit gave_up;
end:
    do
    :: d_step { may_begin(SOURCE) && turns == 0 ->
            write(SOURCE, ATTEMPT, record[SOURCE].attempt + 1, record[SOURCE].epoch, SOURCE);
            lease[SOURCE] = 1; asks = HOLD; asks_site = SOURCE; asks_attempt = record[SOURCE].attempt }
    :: d_step { may_begin(TARGET) && turns == 1 ->
            write(TARGET, ATTEMPT, record[TARGET].attempt + 1, record[TARGET].epoch, TARGET);
            lease[TARGET] = 1; asks = HOLD; asks_site = TARGET; asks_attempt = record[TARGET].attempt }
    :: d_step { asks != IDLE && ready(asks_site) && !waits_for(asks, asks_site) ->
            command(asks, asks_site, asks_attempt, knows[asks_site], gave_up);
            if
            :: gave_up && says(asks_site, ATTEMPT) && record[asks_site].attempt == asks_attempt -> lease[asks_site] = 0
            :: else
            fi;
            if :: gave_up -> asks = IDLE :: else fi;
            if :: asks == IDLE -> asks_attempt = 0; asks_site = 0 :: else fi;
            gave_up = 0 }
    /* The pause is longer than max_pause, a check fails: back out, any time before the hard fences. */
    :: d_step { (asks == HOLD || asks == SOFT_DB || asks == SOFT_KV || asks == PROVE || asks == SEAL) && ready(asks_site) ->
            if
            :: says(asks_site, ATTEMPT) && record[asks_site].attempt == asks_attempt -> lease[asks_site] = 0
            :: else
            fi;
            asks = IDLE; asks_attempt = 0; asks_site = 0 }
    /* A new generation, at the source first; each agent closes what the old one had open. */
    :: d_step { !knows[SOURCE] && ready(SOURCE) -> knows[SOURCE] = 1; lease[SOURCE] = 0 }
    :: d_step { knows[SOURCE] && !knows[TARGET] && ready(TARGET) -> knows[TARGET] = 1; lease[TARGET] = 0 }
    od
}

/* The controller that was stopped, and goes on where it was as if nothing had happened. */
proctype StaleController()
{
    bit gave_up;
end:
    do
    :: d_step { stale != IDLE && ready(stale_site) && !waits_for(stale, stale_site) ->
            command(stale, stale_site, stale_attempt, !knows[stale_site], gave_up);
            if :: gave_up -> stale = IDLE :: else fi;
            if :: stale == IDLE -> stale_attempt = 0; stale_site = 0 :: else fi;
            gave_up = 0 }
    od
}

/* It writes again what it reads, before it acts on it: `writing` still stands. */
inline restart_agent(on)
{
    alive[on] = 1;
#ifdef MISTAKE_REREAD
    if :: writing[on] == 1 -> writing[on] = 2 :: else fi
#endif
}

/* Stores and gates, and all that mends itself. */
proctype World()
{
end:
    do
    :: atomic { !settled(0, DB) -> land(0, DB) }
    :: atomic { !settled(0, KV) -> land(0, KV) }
    :: atomic { !settled(1, DB) -> land(1, DB) }
    :: atomic { !settled(1, KV) -> land(1, KV) }
    /* A soft fence falls when nobody keeps it up; one whose COMMIT is under way does not. */
    :: d_step { store[0].at[DB] == STORE_SOFT && !lease[0] && settled(0, DB) -> lose_soft(0, DB) }
    :: d_step { store[1].at[DB] == STORE_SOFT && !lease[1] && settled(1, DB) -> lose_soft(1, DB) }
    :: d_step { store[0].at[KV] == STORE_SOFT && !lease[0] -> store[0].at[KV] = STORE_OPEN }
    :: d_step { store[1].at[KV] == STORE_SOFT && !lease[1] -> store[1].at[KV] = STORE_OPEN }
    /* Applications write wherever a store lets them. */
    :: d_step { !behind && (writable(0) || writable(1)) -> behind = 1 }
    /* The gate's own timer: only while it is held, and its agent dead. */
    :: d_step { gate[0] == HELD && !alive[0] -> gate[0] = OPEN_LOCAL; check() }
    :: d_step { gate[1] == HELD && !alive[1] -> gate[1] = OPEN_LOCAL; check() }
    :: d_step { !alive[0] && !gone(0) -> restart_agent(0) }
    :: d_step { !alive[1] && !gone(1) -> restart_agent(1) }
    :: d_step { !link -> link = 1 }
#ifdef HOLE_INFLIGHT
    :: atomic { late[0].inflight[DB] != NOTHING -> land_late(0, DB) }
    :: atomic { late[0].inflight[KV] != NOTHING -> land_late(0, KV) }
    :: atomic { late[1].inflight[DB] != NOTHING -> land_late(1, DB) }
    :: atomic { late[1].inflight[KV] != NOTHING -> land_late(1, KV) }
#endif
    od
}

inline crash(on)
{
    alive[on] = 0; lease[on] = 0; disconnect(); cut_sessions(on);
    if :: record[on].serves == on && settled(on, DB) -> same_db = 0 :: else fi
}

inline power_loss(on)
{
    alive[on] = 0; lease[on] = 0; disconnect();
    if
    :: writing[on] -> became_durable(on)
    :: writing[on] -> copy(record[on], before[on]); writing[on] = 0; forget(before[on])
    :: !writing[on]
    fi;
#ifdef HOLE_BOOT
    gate[on] = OPEN_LOCAL;
#else
    gate[on] = SEALED;
#endif
    restart_store(on, DB); restart_store(on, KV)
}

inline restart_store(on, k)
{
    land_or_drop(on, k);
    if :: store[on].at[k] == STORE_SOFT || record[on].serves == on -> lose_soft(on, k) :: else fi;
    check()
}

proctype Faults()
{
    bit s;
end:
    do
    :: d_step { faults > 0 -> faults = 0 }      /* nothing more happens */
    :: atomic { faults > 0 ->
            faults--;
            if :: s = 0 :: s = 1 fi;
            if
            :: alive[s] -> crash(s)
            :: power_loss(s)
            :: store[s].at[DB] == STORE_SOFT || !settled(s, DB) -> restart_store(s, DB)
            :: store[s].at[KV] == STORE_SOFT || !settled(s, KV) -> restart_store(s, KV)
            :: s == 0 && link -> link = 0; disconnect()
            /* The controller stops for longer than its lease; another is started. */
            :: asks != IDLE && asks_site == s ->
                lease[s] = 0;
                stale = asks; stale_site = s; stale_attempt = asks_attempt;
                asks = IDLE; asks_site = 0; asks_attempt = 0; knows[0] = 0; knows[1] = 0
            /* The agent is stopped for longer than the gate's timer, and goes on. */
            :: lease[s] -> lease[s] = 0; if :: gate[s] == HELD -> gate[s] = OPEN_LOCAL :: else fi; check()
            /* The person cancels: it takes the same slot as COMMIT and ABORT. */
            :: s == SOURCE && ready(SOURCE) && turns == 0 && record[SOURCE].serves == SOURCE &&
               (says(SOURCE, ATTEMPT) || says(SOURCE, SERVING)) ->
                lease[SOURCE] = 0; sent[SOURCE] = 0;
                if
                :: says(SOURCE, ATTEMPT) -> write(SOURCE, CANCELLED, record[SOURCE].attempt, record[SOURCE].epoch, SOURCE)
                :: says(SOURCE, SERVING) -> write(SOURCE, CANCELLED, record[SOURCE].attempt + 1, record[SOURCE].epoch, SOURCE)
                fi
            fi;
            s = 0 }
    od
}

#ifdef PERSON
/* A host is lost; the person, who knows that it is off, opens the other; later it comes back, and
 * asks the other agent before it starts anything. */
inline open_by_hand(on)
{
#ifdef HOLE_CLAIM
    assert(!says(on, PREPARED) || !behind);     /* P8 what PREPARED promises */
#else
    assert(!says(on, PREPARED) || !behind || (aborted & bit_of(record[on].attempt))); /* P8 what PREPARED promises */
#endif
    by_hand = 1; turns = 2;
#ifndef HOLE_LOOP
    gate[on] = SEALED;      /* or both gates would send clients to each other, when the lost host comes back first */
#endif
    write(on, STORED, record[on].attempt, record[on].epoch + BY_HAND, on); sent[on] = 0
}

/* It closes where each of the two believes that it serves, or where the other one was opened without its COMMIT. */
#ifdef HOLE_COMMIT
#define overruled(s) (record[s].serves == s)
#else
#define overruled(s) (record[s].serves == s || (says(s, COMMIT) && record[s].attempt != record[other(s)].attempt && \
                                                record[other(s)].epoch >= BY_HAND))
#endif

inline come_back(on)
{
    off[on] = 0;
    if
    :: by_hand && record[other(on)].epoch > record[on].epoch && record[other(on)].serves != on && overruled(on) ->
        store[on].at[DB] = STORE_HARD; store[on].at[KV] = STORE_HARD;
        record[on].decision = SERVING; record[on].epoch = record[other(on)].epoch; record[on].serves = other(on);
        if
        :: record[on].attempt < record[other(on)].attempt -> record[on].attempt = record[other(on)].attempt
        :: else
        fi
    :: else
    fi;
    check()
}

#define may_open_by_hand(s) (ready(s) && gone(other(s)) && !by_hand && (steady_there(s) || says(s, COMMIT)))

proctype Person()
{
end:
    do
    :: atomic { faults > 0 && !off[0] && !off[1] -> faults--; power_loss(0); off[0] = 1 }
    :: atomic { faults > 0 && !off[0] && !off[1] -> faults--; power_loss(1); off[1] = 1 }
    :: d_step { may_open_by_hand(0) -> open_by_hand(0) }
    :: d_step { may_open_by_hand(1) -> open_by_hand(1) }
    :: d_step { off[0] && link && ready(1) -> come_back(0) }
    :: d_step { off[1] && link && ready(0) -> come_back(1) }
    od
}
#endif

#ifdef LIVENESS
ltl served_at_last { <>[] served }
#endif

proctype Watch()
{
end:
    timeout;
#if WITNESS == 1            /* what may be reached: each of these must be found broken */
    assert(!(turns == 2 && serves_alone(SOURCE))) /* witness */
#elif WITNESS == 2
    assert(!(turns == 2 && serves_alone(SOURCE) && refused && aborted)) /* witness */
#elif WITNESS == 3
    assert(!(says(SOURCE, CANCELLED) && serves_alone(SOURCE))) /* witness */
#elif WITNESS == 4
    assert(!(decided_by_hand && serves_alone(TARGET) && (committed & 2))) /* witness */
#elif WITNESS == 5
    assert(!(decided_by_hand && serves_alone(SOURCE) && (committed & 2))) /* witness */
#else
    assert(served)      /* P9 at last one site serves, and the gates are released to it */
#endif
}

init
{
    atomic {
        store[SOURCE].at[DB] = STORE_OPEN; store[SOURCE].at[KV] = STORE_OPEN;
        store[TARGET].at[DB] = STORE_HARD; store[TARGET].at[KV] = STORE_HARD;
        store[0].inflight[DB] = NOTHING; store[0].inflight[KV] = NOTHING;
        store[1].inflight[DB] = NOTHING; store[1].inflight[KV] = NOTHING;
#ifdef HOLE_INFLIGHT
        late[0].inflight[DB] = NOTHING; late[0].inflight[KV] = NOTHING;
        late[1].inflight[DB] = NOTHING; late[1].inflight[KV] = NOTHING;
#endif
        gate[SOURCE] = OPEN_LOCAL; gate[TARGET] = OPEN_PEER;
        alive[0] = 1; alive[1] = 1; link = 1; knows[0] = 1; knows[1] = 1;
        behind = 1; asks = IDLE; stale = IDLE;
        run Agent(SOURCE); run Agent(TARGET); run Controller(); run StaleController();
        run World(); run Faults(); run Watch()
#ifdef PERSON
        ; run Person()
#endif
    }
}
