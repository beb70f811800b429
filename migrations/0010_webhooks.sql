-- News for the outside. A notice is written in the transaction of what it tells, one row for each webhook that wants it, and
-- sent until it is taken or given up.

create table webhooks (
    id uuid primary key,
    project_id uuid not null references projects (id),
    name text not null,
    url text not null,
    -- Signs every notice, so it is kept as it is. For a day after it was changed the one before it may sign as well.
    secret bytea not null,
    old_secret bytea,
    old_secret_until timestamptz,
    types text[] not null check (cardinality(types) > 0),
    enabled boolean not null default true,
    created_at timestamptz not null default now(),
    updated_at timestamptz not null default now()
);
create index webhooks_by_project on webhooks (project_id, id);

create table webhook_deliveries (
    id uuid primary key,
    webhook_id uuid not null references webhooks (id) on delete cascade,
    project_id uuid not null references projects (id),
    -- The same for every webhook that is told of one thing, and for every try.
    notice_id uuid not null,
    type text not null,
    payload text not null,
    state text not null default 'pending' check (state in ('pending', 'delivered', 'dead')),
    tries integer not null default 0,
    next_try_at timestamptz not null default now(),
    -- The last answer: a status, or what went wrong.
    last_status integer,
    last_error text,
    created_at timestamptz not null default now(),
    ended_at timestamptz,
    constraint webhook_deliveries_once unique (webhook_id, notice_id)
);
create index webhook_deliveries_due on webhook_deliveries (webhook_id, next_try_at) where state = 'pending';
create index webhook_deliveries_by_webhook on webhook_deliveries (webhook_id, id);
