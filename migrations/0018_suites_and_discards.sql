-- Suites of operators' own, which models are measured on beside those that come with the program, and which nobody outside has read; and
-- adapters kept apart that operators discard.
--
-- Only adds: a version from before it asks its own suites alone. What such a worker finds of a job that should be asked more is not enough
-- for a gate (see the function at the end).

create table suites (
    id uuid primary key,
    name text not null,
    version integer not null check (version > 0),
    -- What a model should do with its requests.
    kind text not null check (kind in ('harmful', 'benign')),
    object_key text not null,
    bytes bigint not null check (bytes >= 0),
    sha256 bytea not null check (octet_length(sha256) = 32),
    request_count bigint not null check (request_count > 0),
    created_at timestamptz not null default now(),
    constraint suites_version_unique unique (name, version)
);
create index suites_object_key on suites (object_key);

-- Versions of suites and of alignment sets stand in reports and manifests: they stay as they are.
create function versions_never_change() returns trigger language plpgsql as $$
begin
    raise exception 'a version in % is never changed', tg_table_name;
end $$;
create trigger suites_no_change before update or delete on suites for each row execute function versions_never_change();
create trigger alignment_sets_no_change before update or delete on alignment_sets for each row execute function versions_never_change();

-- How many suites of the operator's own a report is about.
alter table job_evidence add column own_suites integer not null default 0;

create or replace function jobs_pass_their_gate() returns trigger language plpgsql as $$
begin
    if not exists (
        select 1 from job_evidence
        where job_id = new.id and name = 'safety_report.json'
          and own_suites >= coalesce(jsonb_array_length(new.policy -> 'suites'), 0)
    ) then
        raise exception 'job % must pass its safety gate before it succeeds; a newer worker is needed', new.id;
    end if;
    return null;
end $$;

-- When an operator discarded an adapter that was kept apart: its files are gone for good.
alter table quarantined_adapters add column discarded_at timestamptz,
    add constraint quarantined_adapters_released_or_discarded check (released_at is null or discarded_at is null);
