-- What a base model says on an alignment set: computed by the first job that needs it, and read by every later one. The name
-- is a hash over the base, the set and the numbers it was computed in, so a row never changes.

create table alignment_references (
    name text primary key,
    object_key text not null,
    bytes bigint not null check (bytes >= 0),
    sha256 bytea not null check (octet_length(sha256) = 32),
    created_at timestamptz not null default now()
);
