-- Fine-tuning jobs, what happens to them, and what they make.

create table jobs (
    id uuid primary key,
    project_id uuid not null references projects (id),
    base_model_id uuid not null references base_models (id),
    -- Files may be deleted once no job needs them, so these are not foreign keys.
    training_file_id uuid not null,
    validation_file_id uuid,
    alignment_set_id uuid references alignment_sets (id),
    suffix text,
    seed bigint not null check (seed >= 0),
    metadata jsonb not null,
    hyperparameters jsonb not null,
    safety jsonb not null,
    status text not null check (status in ('validating_files', 'queued', 'running', 'succeeded', 'failed', 'cancelled')),
    -- Claims so far, never lowered: every write of a worker names the one it holds, so no two may share a number.
    attempt integer not null default 0 check (attempt >= 0),
    -- Workers whose lease ran out while they held it.
    lost_workers integer not null default 0 check (lost_workers >= 0),
    phase text,
    progress jsonb,
    error jsonb,
    fine_tuned_model text,
    trained_tokens bigint,
    created_at timestamptz not null default now(),
    finished_at timestamptz,
    constraint jobs_succeeded_has_model check (status <> 'succeeded' or (fine_tuned_model is not null and trained_tokens is not null)),
    constraint jobs_failed_has_error check (status <> 'failed' or error is not null),
    constraint jobs_end_has_time check ((status in ('succeeded', 'failed', 'cancelled')) = (finished_at is not null))
);
create index jobs_by_project on jobs (project_id, id);
-- The queue: only what waits or runs is in it, however many jobs have ended.
create index jobs_open on jobs (id) where status in ('validating_files', 'queued', 'running');

-- Who holds a job, and until when by the database's clock. Apart from the jobs, because it is written every few seconds.
create table job_leases (
    job_id uuid primary key references jobs (id),
    attempt integer not null,
    worker text not null,
    expires_at timestamptz not null
);
create index job_leases_expires_at on job_leases (expires_at);

create table job_events (
    id uuid primary key,
    job_id uuid not null references jobs (id),
    level text not null check (level in ('info', 'warn', 'error')),
    type text not null check (type in ('message', 'metrics')),
    message text not null,
    data jsonb,
    created_at timestamptz not null default now()
);
create index job_events_by_job on job_events (job_id, id);

-- Every step of every attempt, many to a row: a row a step would be most of the database.
create table job_metrics (
    job_id uuid not null references jobs (id),
    attempt integer not null,
    first_step bigint not null,
    steps jsonb not null,
    primary key (job_id, attempt, first_step)
);

create table fine_tuned_models (
    name text primary key,
    project_id uuid not null references projects (id),
    job_id uuid not null unique references jobs (id),
    base_model_id uuid not null references base_models (id),
    created_at timestamptz not null default now()
);
create index fine_tuned_models_by_project on fine_tuned_models (project_id, name);

create table adapter_files (
    job_id uuid not null references jobs (id),
    name text not null,
    object_key text not null unique,
    bytes bigint not null check (bytes >= 0),
    sha256 bytea not null check (octet_length(sha256) = 32),
    primary key (job_id, name)
);
