-- Jobs that pause, that begin from an adapter, and whose checkpoints and measurements are kept.

alter table jobs drop constraint jobs_status_check;
alter table jobs add constraint jobs_status_check check (status in
    ('validating_files', 'queued', 'running', 'pausing', 'paused', 'succeeded', 'failed', 'cancelled'));
-- Where a paused job goes on.
alter table jobs add column files_checked boolean not null default false;
update jobs set files_checked = status <> 'validating_files';
-- What the check of its files found, for estimates of its end: {"rows", "tokens", "supervised_tokens"}.
alter table jobs add column dataset jsonb;
-- What the client asked for: the base, or a fine-tuned model or a checkpoint that the job goes on from.
alter table jobs add column model text;
update jobs set model = (select name from base_models m where m.id = base_model_id);
alter table jobs alter column model set not null;
alter table jobs add column start_job_id uuid references jobs (id);
-- Null: that job's last adapter.
alter table jobs add column start_step bigint;
alter table jobs add column result_file_id uuid;
drop index jobs_open;
create index jobs_open on jobs (id) where status in ('validating_files', 'queued', 'running', 'pausing', 'paused');
-- The queue, project by project: the claim takes turns between them, and checks, which are short, come before training.
create index jobs_waiting on jobs (project_id, files_checked, id) where status in ('validating_files', 'queued');
alter table projects add column last_claim_at timestamptz;
-- What a project has used in a month.
create index jobs_by_month on jobs (project_id, created_at);
create index jobs_metadata on jobs using gin (metadata jsonb_path_ops);

-- Events are read in the order in which they were written; their ids come from several clocks.
alter table job_events add column seq bigint generated always as identity;
drop index job_events_by_job;
create unique index job_events_by_job on job_events (job_id, seq);

create table job_checkpoints (
    id uuid primary key,
    job_id uuid not null references jobs (id),
    step bigint not null check (step > 0),
    -- One that was left because the run was stopped is there for the run alone: its adapter is not one to serve.
    settled boolean not null,
    created_at timestamptz not null default now(),
    constraint job_checkpoints_step_unique unique (job_id, step)
);

create table checkpoint_files (
    checkpoint_id uuid not null references job_checkpoints (id) on delete cascade,
    name text not null,
    object_key text not null unique,
    bytes bigint not null check (bytes >= 0),
    sha256 bytea not null check (octet_length(sha256) = 32),
    primary key (checkpoint_id, name)
);

create table job_validations (
    job_id uuid not null references jobs (id),
    step bigint not null,
    loss double precision not null,
    token_accuracy double precision not null,
    primary key (job_id, step)
);

-- How fast workers train, for estimates: the latest run of its kind.
create table training_speeds (
    base_model_id uuid not null references base_models (id),
    device text not null,
    precision text not null,
    defense text not null,
    tokens_per_second double precision not null check (tokens_per_second > 0),
    measured_at timestamptz not null default now(),
    primary key (base_model_id, device, precision, defense)
);

create table workers (
    name text primary key,
    device text not null,
    version text not null,
    job_id uuid,
    started_at timestamptz not null default now(),
    seen_at timestamptz not null default now()
);
