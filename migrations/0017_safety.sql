-- What operators demand of jobs, what came of asking their models, and the evidence that is kept of it.
--
-- Only adds: a version from before it runs beside it. What that version creates has no policy and is not evaluated; a job that must pass
-- a gate it cannot end with a model (see the last trigger), so that one is set back until a worker of this version takes it up.

-- Each version of each policy; the newest of a scope counts. Nothing in it is ever changed.
create table safety_policies (
    scope text not null check (scope in ('deployment', 'organization', 'project')),
    -- The organisation's name or the project's id; empty for the deployment.
    subject text not null,
    version integer not null check (version > 0),
    -- Null: from here on the scope has none, and the wider one's counts.
    policy jsonb,
    created_at timestamptz not null default now(),
    primary key (scope, subject, version)
);

create function safety_policies_only_grow() returns trigger language plpgsql as $$
begin
    raise exception 'a version of a safety policy is never changed';
end $$;
create trigger safety_policies_no_change before update or delete on safety_policies
    for each row execute function safety_policies_only_grow();
create trigger safety_policies_no_truncate before truncate on safety_policies
    for each statement execute function safety_policies_only_grow();

-- The policy a job was created under, as it was then.
alter table jobs add column policy jsonb;
-- When the gradients of its steps conflicted more often than clean rows make them.
alter table jobs add column alarmed_at timestamptz;

-- Reports and manifests.
create table job_evidence (
    job_id uuid not null references jobs (id),
    name text not null,
    object_key text not null unique,
    bytes bigint not null check (bytes >= 0),
    sha256 bytea not null check (octet_length(sha256) = 32),
    primary key (job_id, name)
);
alter table job_evidence enable row level security;
create policy own_project on job_evidence for select to holdfast_tenant using (exists (select 1 from jobs parent where parent.id = job_evidence.job_id));
grant select on job_evidence to holdfast_tenant;
-- The texts of rows go with the file they stood in, at its owner's word.
create policy own_texts on job_evidence for delete to holdfast_tenant
    using (name = 'worst_rows.jsonl' and exists (select 1 from jobs parent where parent.id = job_evidence.job_id));
grant delete on job_evidence to holdfast_tenant;

-- Adapters that did not pass the gate. Their files are kept apart from `adapter_files`, where everything is its owner's.
create table quarantined_adapters (
    job_id uuid primary key references jobs (id),
    name text not null,
    created_at timestamptz not null default now(),
    -- Released are also the checkpoints of jobs that have no adapter here.
    released_at timestamptz,
    -- Why the operator released it, for its owner.
    release_reason text,
    constraint quarantined_adapters_release_has_reason check ((released_at is null) = (release_reason is null))
);
create table quarantined_files (
    job_id uuid not null references quarantined_adapters (job_id),
    name text not null,
    object_key text not null unique,
    bytes bigint not null check (bytes >= 0),
    sha256 bytea not null check (octet_length(sha256) = 32),
    primary key (job_id, name)
);

-- What a base answers to a suite, so that it is asked once.
create table base_answers (
    -- A hash over the base, the suite and how it is asked.
    name text primary key,
    object_key text not null unique,
    bytes bigint not null check (bytes >= 0),
    sha256 bytea not null check (octet_length(sha256) = 32),
    created_at timestamptz not null default now()
);

-- How often gradients conflict on rows that the operator knows to be clean, by base model.
create table conflict_levels (
    base_model_id uuid primary key references base_models (id),
    alarm_level double precision not null check (alarm_level > 0 and alarm_level <= 1),
    -- The jobs it was measured on.
    jobs bigint not null check (jobs > 0),
    measured_at timestamptz not null default now()
);

-- The public halves of the keys that workers sign with.
create table signing_keys (
    id text primary key,
    pem text not null,
    created_at timestamptz not null default now()
);
-- That its adapter is kept apart is no secret to its owner; the files are.
alter table quarantined_adapters enable row level security;
create policy own_project on quarantined_adapters to holdfast_tenant
    using (exists (select 1 from jobs parent where parent.id = quarantined_adapters.job_id));
grant select on quarantined_adapters to holdfast_tenant;

-- No job that must pass a gate succeeds without the report of what was found, whoever says so: a worker of a version from before it
-- knows nothing of gates.
create function jobs_pass_their_gate() returns trigger language plpgsql as $$
begin
    if not exists (select 1 from job_evidence where job_id = new.id and name = 'safety_report.json') then
        raise exception 'job % must pass its safety gate before it succeeds; a newer worker is needed', new.id;
    end if;
    return null;
end $$;
create constraint trigger jobs_pass_their_gate after update of status on jobs deferrable initially deferred for each row
    when (new.status = 'succeeded' and new.policy -> 'gate' ->> 'enabled' = 'true') execute function jobs_pass_their_gate();
