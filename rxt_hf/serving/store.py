# Copyright 2026 the rxt_hf authors. Licensed under the Apache License, Version 2.0.
"""Where states are kept between two requests: in SQLite, in Redis for several machines, or in memory for tests."""

import os
import sqlite3
import threading
import time
from collections.abc import Sequence
from typing import Any, NamedTuple, Protocol


class Record(NamedTuple):
    """One value to keep. `ttl_s` of `None` keeps it until it is deleted, or the least used of a full store."""

    tenant: str
    key: str
    value: bytes
    ttl_s: float | None = None


class Usage(NamedTuple):
    """What a tenant, or everybody, keeps."""

    records: int
    num_bytes: int


class StateStore(Protocol):
    """
    Values by tenant and key. Each call is atomic, also between processes and, for a store on a network, machines.

    A key's version is 1 after its first `put` and one more after each further one; 0 means that there is nothing.
    """

    # whether a call may wait for a network, so that an event loop should not make it itself
    is_remote: bool

    def put(self, records: Sequence[Record], expect: tuple[str, str, int] | None = None) -> bool:
        """
        Writes all records or none: none if `expect`, (tenant, key, version), does not name the version that is there
        (compare-and-set). Returns whether they were written.
        """
        ...

    def get(self, tenant: str, key: str) -> tuple[bytes, int] | None:
        """Returns the value and its version; the key counts as used now."""
        ...

    def head(self, tenant: str, keys: Sequence[str]) -> list[int]:
        """Returns the versions alone."""
        ...

    def delete(self, tenant: str, keys: Sequence[str]) -> int:
        """Removes the keys; returns how many there were."""
        ...

    def lease(self, tenant: str, key: str, owner: str, seconds: float) -> bool:
        """
        Says whether `owner` now has the key to itself for so long, among those that ask here; asking again renews.
        """
        ...

    def release(self, tenant: str, key: str, owner: str) -> None:
        """Ends the lease of `owner`."""
        ...

    def sweep(self, max_bytes: int | None = None) -> int:
        """Removes what has expired, then the least recently used until `max_bytes` are left; returns how many."""
        ...

    def usage(self, tenant: str | None = None) -> Usage:
        """Counts what is kept, by one tenant or by all; may count what has expired since the last sweep."""
        ...

    def close(self) -> None:
        """Lets go of files and connections."""
        ...


SCHEMA = """
create table if not exists records(
    tenant text, key text, value blob, version integer, expires real, used real, primary key (tenant, key)
) without rowid;
create index if not exists records_used on records(used);
create index if not exists records_expires on records(expires) where expires is not null;
create table if not exists leases(tenant text, key text, owner text, expires real, primary key (tenant, key));
create table if not exists usage(tenant text primary key, records integer, bytes integer);
create trigger if not exists added after insert on records begin
    insert into usage values (new.tenant, 1, length(new.value))
    on conflict do update set records = records + 1, bytes = bytes + length(new.value);
end;
create trigger if not exists changed after update of value on records begin
    update usage set bytes = bytes + length(new.value) - length(old.value) where tenant = new.tenant;
end;
create trigger if not exists removed after delete on records begin
    update usage set records = records - 1, bytes = bytes - length(old.value) where tenant = old.tenant;
end;
"""
PUT = """insert into records values (?1, ?2, ?3, 1, ?4, ?5) on conflict do update
    set value = ?3, version = case when expires <= ?5 then 1 else version + 1 end, expires = ?4, used = ?5"""
# a read that follows another one this closely does not count as a use of its own: it would cost a write
USED_EVERY_S = 60.0


class SQLiteStore:
    """
    One file for any number of processes of one machine; `path` of `None` is a database in the memory of this process.
    What is written survives the death of the process, and a power cut but for its last moments.
    """

    is_remote = False

    def __init__(self, path: str | os.PathLike | None = None):
        self._path = ":memory:" if path is None else os.fspath(path)
        self._lock = threading.Lock()
        if path is not None:
            # states are the conversations of people: nobody else on the machine reads them
            os.close(os.open(self._path, os.O_CREAT | os.O_RDWR, 0o600))
        self._connection = sqlite3.connect(self._path, timeout=30.0, isolation_level=None, check_same_thread=False)
        for pragma in ("journal_mode = wal", "synchronous = normal", "secure_delete = on"):
            self._connection.execute(f"pragma {pragma}")
        self._connection.executescript(SCHEMA)

    def _transaction(self) -> "_Transaction":
        return _Transaction(self._lock, self._connection)

    def put(self, records: Sequence[Record], expect: tuple[str, str, int] | None = None) -> bool:
        now = time.time()
        with self._transaction() as run:
            if expect is not None and self._version(run, *expect[:2]) != expect[2]:
                return False
            for record in records:
                expires = None if record.ttl_s is None else now + record.ttl_s
                run(PUT, (record.tenant, record.key, record.value, expires, now))
        return True

    @staticmethod
    def _version(run: Any, tenant: str, key: str) -> int:
        alive = "select version from records where tenant = ? and key = ? and (expires is null or expires > ?)"
        found = run(alive, (tenant, key, time.time())).fetchone()
        return found[0] if found else 0

    def get(self, tenant: str, key: str) -> tuple[bytes, int] | None:
        now = time.time()
        with self._lock:
            found = self._connection.execute(
                "select value, version, used from records where tenant = ? and key = ? "
                "and (expires is null or expires > ?)",
                (tenant, key, now),
            ).fetchone()
            if found is not None and now - found[2] > USED_EVERY_S:
                self._connection.execute(
                    "update records set used = ? where tenant = ? and key = ?", (now, tenant, key)
                )
        return None if found is None else (found[0], found[1])

    def head(self, tenant: str, keys: Sequence[str]) -> list[int]:
        with self._lock:
            return [self._version(self._connection.execute, tenant, key) for key in keys]

    def delete(self, tenant: str, keys: Sequence[str]) -> int:
        with self._transaction() as run:
            return sum(run("delete from records where tenant = ? and key = ?", (tenant, key)).rowcount for key in keys)

    def lease(self, tenant: str, key: str, owner: str, seconds: float) -> bool:
        now = time.time()
        with self._transaction() as run:
            run("delete from leases where expires <= ?", (now,))
            taken = """insert into leases values (?, ?, ?, ?) on conflict do update
                set expires = excluded.expires where owner = excluded.owner"""
            return run(taken, (tenant, key, owner, now + seconds)).rowcount == 1

    def release(self, tenant: str, key: str, owner: str) -> None:
        with self._transaction() as run:
            run("delete from leases where tenant = ? and key = ? and owner = ?", (tenant, key, owner))

    def sweep(self, max_bytes: int | None = None) -> int:
        with self._transaction() as run:
            removed = run("delete from records where expires <= ?", (time.time(),)).rowcount
            excess = 0 if max_bytes is None else self._usage(run)[1] - max_bytes
            if excess > 0:
                oldest = run("select tenant, key, length(value) from records order by used").fetchall()
                for tenant, key, size in oldest:
                    if excess <= 0:
                        break
                    run("delete from records where tenant = ? and key = ?", (tenant, key))
                    excess, removed = excess - size, removed + 1
        return removed

    def usage(self, tenant: str | None = None) -> Usage:
        with self._lock:
            return self._usage(self._connection.execute, tenant)

    @staticmethod
    def _usage(run: Any, tenant: str | None = None) -> Usage:
        sums = "select coalesce(sum(records), 0), coalesce(sum(bytes), 0) from usage"
        return Usage(*run(f"{sums} where ?1 is null or tenant = ?1", (tenant,)).fetchone())

    def close(self) -> None:
        with self._lock:
            self._connection.close()


class _Transaction:
    """A write transaction of one connection, which its threads share; an error takes it back."""

    def __init__(self, lock: threading.Lock, connection: sqlite3.Connection):
        self._lock, self._connection = lock, connection

    def __enter__(self) -> Any:
        self._lock.acquire()
        try:
            self._connection.execute("begin immediate")
        except BaseException:
            self._lock.release()
            raise
        return self._connection.execute

    def __exit__(self, kind: Any, *_: Any) -> None:
        try:
            self._connection.execute("commit" if kind is None else "rollback")
        finally:
            self._lock.release()


# A value is a hash of v (value) and n (version), which Redis itself lets expire. Beside it stand by tenant a hash of
# sizes and their sum, and for all a set ordered by last use, from which the sweep takes.
REDIS_PUT = """
if ARGV[1] ~= '' then
    local found = redis.call('HGET', KEYS[1], 'n') or '0'
    if found ~= ARGV[1] then return 0 end
end
local now = ARGV[2]
for i = 2, #KEYS do
    local tenant, value, ttl = ARGV[3 * i - 3], ARGV[3 * i - 2], ARGV[3 * i - 1]
    redis.call('HSET', KEYS[i], 'v', value)
    redis.call('HINCRBY', KEYS[i], 'n', 1)
    if ttl == '' then redis.call('PERSIST', KEYS[i]) else redis.call('PEXPIRE', KEYS[i], ttl) end
    local size = redis.call('HGET', 'rxt:sizes:' .. tenant, KEYS[i]) or 0
    redis.call('HSET', 'rxt:sizes:' .. tenant, KEYS[i], #value)
    redis.call('INCRBY', 'rxt:bytes:' .. tenant, #value - size)
    redis.call('SADD', 'rxt:tenants', tenant)
    redis.call('ZADD', 'rxt:used', now, KEYS[i])
end
return 1
"""
REDIS_REMOVE = """
local removed = 0
for i, key in ipairs(KEYS) do
    local tenant = ARGV[i]
    local size = redis.call('HGET', 'rxt:sizes:' .. tenant, key) or 0
    redis.call('DECRBY', 'rxt:bytes:' .. tenant, size)
    redis.call('HDEL', 'rxt:sizes:' .. tenant, key)
    redis.call('ZREM', 'rxt:used', key)
    removed = removed + redis.call('DEL', key)
end
return removed
"""
REDIS_LEASE = """
local owner = redis.call('GET', KEYS[1])
if owner and owner ~= ARGV[1] then return 0 end
redis.call('SET', KEYS[1], ARGV[1], 'PX', ARGV[2])
return 1
"""
REDIS_RELEASE = "if redis.call('GET', KEYS[1]) == ARGV[1] then redis.call('DEL', KEYS[1]) end"


class RedisStore:
    """
    One Redis for any number of machines (`pip install '.[redis]'`). The scripts use keys that they are not given, so
    it must be one server with its replicas, not a cluster.

    Args:
        url (`str`): such as `redis://host:6379/0`, or `rediss://` for TLS.
    """

    is_remote = True

    def __init__(self, url: str):
        try:
            import redis
        except ImportError:
            raise ImportError("A store on Redis needs the package redis: pip install 'rxt-hf[redis]'.") from None
        self._redis: Any = redis.Redis.from_url(url)
        self._redis.ping()
        self._put = self._redis.register_script(REDIS_PUT)
        self._remover = self._redis.register_script(REDIS_REMOVE)
        self._lease = self._redis.register_script(REDIS_LEASE)
        self._release = self._redis.register_script(REDIS_RELEASE)

    @staticmethod
    def _key(tenant: str, key: str) -> str:
        return f"rxt:state:{tenant}:{key}"

    def put(self, records: Sequence[Record], expect: tuple[str, str, int] | None = None) -> bool:
        keys = ["" if expect is None else self._key(*expect[:2])]
        args: list[Any] = ["" if expect is None else expect[2], time.time()]
        for record in records:
            keys.append(self._key(record.tenant, record.key))
            args += [record.tenant, record.value, "" if record.ttl_s is None else max(1, int(record.ttl_s * 1000))]
        return bool(self._put(keys=keys, args=args))

    def get(self, tenant: str, key: str) -> tuple[bytes, int] | None:
        name = self._key(tenant, key)
        value, version = self._redis.hmget(name, "v", "n")
        if value is None:
            return None
        self._redis.zadd("rxt:used", {name: time.time()}, xx=True)
        return value, int(version)

    def head(self, tenant: str, keys: Sequence[str]) -> list[int]:
        with self._redis.pipeline(transaction=False) as pipe:
            for key in keys:
                pipe.hget(self._key(tenant, key), "n")
            return [int(version or 0) for version in pipe.execute()]

    def delete(self, tenant: str, keys: Sequence[str]) -> int:
        return self._remove([(tenant, self._key(tenant, key)) for key in keys])

    def _remove(self, names: Sequence[tuple[str, str]]) -> int:
        # a script of bounded length, since nothing else runs meanwhile
        return sum(
            int(self._remover(keys=[name for _, name in part], args=[tenant for tenant, _ in part]))
            for part in (names[start : start + 1000] for start in range(0, len(names), 1000))
        )

    def lease(self, tenant: str, key: str, owner: str, seconds: float) -> bool:
        return bool(self._lease(keys=[f"rxt:lease:{tenant}:{key}"], args=[owner, int(seconds * 1000)]))

    def release(self, tenant: str, key: str, owner: str) -> None:
        self._release(keys=[f"rxt:lease:{tenant}:{key}"], args=[owner])

    def _tenants(self) -> list[str]:
        return sorted(tenant.decode() for tenant in self._redis.smembers("rxt:tenants"))

    def sweep(self, max_bytes: int | None = None) -> int:
        sizes = {
            name: (tenant, int(size))
            for tenant in self._tenants()
            for name, size in self._redis.hgetall(f"rxt:sizes:{tenant}").items()
        }
        with self._redis.pipeline(transaction=False) as pipe:
            for name in sizes:
                pipe.exists(name)
            gone = [name for name, is_there in zip(sizes, pipe.execute(), strict=True) if not is_there]
        excess = sum(size for _, size in sizes.values()) - sum(sizes[name][1] for name in gone)
        excess = 0 if max_bytes is None else excess - max_bytes
        kept = iter(self._redis.zrange("rxt:used", 0, -1) if excess > 0 else ())
        while excess > 0 and (name := next(kept, None)) is not None:
            if name in sizes and name not in gone:
                gone.append(name)
                excess -= sizes[name][1]
        self._remove([(sizes[name][0], name) for name in gone])
        return len(gone)

    def usage(self, tenant: str | None = None) -> Usage:
        tenants = self._tenants() if tenant is None else [tenant]
        records = sum(self._redis.hlen(f"rxt:sizes:{each}") for each in tenants)
        return Usage(records, sum(int(self._redis.get(f"rxt:bytes:{each}") or 0) for each in tenants))

    def close(self) -> None:
        self._redis.close()


def open_store(url: str | None) -> StateStore:
    """
    Opens the store that a command line names: a file for SQLite, `redis://...` or `rediss://...`, and `memory` or
    nothing for one that ends with the process.

    Raises: `ValueError` for another address.
    """
    if url is None or url == "memory":
        return SQLiteStore()
    if url.startswith(("redis://", "rediss://")):
        return RedisStore(url)
    if "://" in url:
        raise ValueError(f"There is no store {url!r}: name a file, redis://HOST:PORT, or memory.")
    return SQLiteStore(os.path.expanduser(url))


__all__ = ["Record", "RedisStore", "SQLiteStore", "StateStore", "Usage", "open_store"]
