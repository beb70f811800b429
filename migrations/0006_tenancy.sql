-- Who may do what, for real: organisations own projects, members own keys, keys have scopes and an end, projects have quotas,
-- and every change a key makes stands in a log that only grows.

create table organizations (
    -- It is a part of every fine-tuned model's name, so it is what the organisation is.
    name text primary key,
    created_at timestamptz not null default now()
);
insert into organizations (name) select distinct organization from projects on conflict do nothing;
insert into organizations (name) values ('holdfast') on conflict do nothing;
alter table projects add constraint projects_organization_known foreign key (organization) references organizations (name);
alter table projects drop constraint projects_name_unique;
alter table projects add constraint projects_name_unique unique (organization, name);

-- What a project may use at most; null is no limit.
alter table projects add column max_stored_bytes bigint check (max_stored_bytes >= 0);
alter table projects add column max_queued_jobs bigint check (max_queued_jobs >= 0);
alter table projects add column max_running_jobs bigint check (max_running_jobs >= 0);
alter table projects add column max_trained_tokens_per_month bigint check (max_trained_tokens_per_month >= 0);

create table members (
    id uuid primary key,
    organization text not null references organizations (name),
    -- What people call them: an address or a login.
    name text not null,
    created_at timestamptz not null default now(),
    removed_at timestamptz
);
create unique index members_name_unique on members (organization, name) where removed_at is null;

alter table api_keys add column name text not null default '';
alter table api_keys add column member_id uuid references members (id);
-- Scopes: every key reads; these two are the others.
alter table api_keys add column can_write boolean not null default true;
alter table api_keys add column expires_at timestamptz;
-- To the minute.
alter table api_keys add column last_used_at timestamptz;
-- Null: the deployment's.
alter table api_keys add column requests_per_minute bigint check (requests_per_minute > 0);

create table audit_log (
    id uuid primary key,
    at timestamptz not null default now(),
    -- The key that called; null for a command on the operator's own machine.
    key_id uuid,
    -- The key's first characters, or who ran the command: rows outlive keys.
    actor text not null,
    project_id uuid,
    -- What was called, as openapi.yaml names it, and on what.
    operation text not null,
    target text not null,
    address text not null,
    request_id text not null,
    -- How it ended: the HTTP status, and the error's code.
    status integer not null,
    code text
);
create index audit_log_by_time on audit_log (at, id);
create index audit_log_by_project on audit_log (project_id, at);
create index audit_log_by_key on audit_log (key_id, at);

create function audit_log_only_grows() returns trigger language plpgsql as $$
begin
    raise exception 'the audit log only grows';
end $$;
create trigger audit_log_no_change before update or delete on audit_log for each row execute function audit_log_only_grows();
create trigger audit_log_no_truncate before truncate on audit_log for each statement execute function audit_log_only_grows();
