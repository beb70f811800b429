-- What became of each time a worker took a job up, and when a job that had a setback may be taken up again.
--
-- Only adds: a version from before it runs beside it.

create table job_attempts (
    job_id uuid not null references jobs (id) on delete cascade,
    attempt integer not null,
    work text not null check (work in ('check', 'training')),
    worker text not null,
    started_at timestamptz not null default now(),
    -- Null while its worker holds the job.
    ended_at timestamptz,
    outcome text check (outcome in ('files_accepted', 'succeeded', 'failed', 'cancelled', 'paused', 'returned', 'set_back', 'delayed')),
    -- For the job's owner.
    reason text,
    primary key (job_id, attempt),
    constraint job_attempts_end_has_outcome check ((ended_at is null) = (outcome is null))
);
alter table job_attempts enable row level security;
create policy own_project on job_attempts to holdfast_tenant using (exists (select 1 from jobs parent where parent.id = job_attempts.job_id));
-- An owner's word ends an attempt.
grant select, update on job_attempts to holdfast_tenant;

-- Until when the job rests.
alter table jobs add column rests_until timestamptz;
-- How often in a row it could not be worked on because something that workers need was not to be had.
alter table jobs add column delays integer not null default 0 check (delays >= 0);
comment on column jobs.lost_workers is 'Attempts that ended in a setback since the job last made progress.';
