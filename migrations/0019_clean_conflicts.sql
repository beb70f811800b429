-- How often gradients conflict on clean rows, by method: under some they do in half of the steps, under others in more, so what was measured
-- under one says nothing of another. And indexes for what is looked up by training file, and for notices that were given up.
--
-- Only adds. A version from before goes on with `conflict_levels`, which a later one drops; levels are measured anew for this one.

create table clean_conflicts (
    base_model_id uuid not null references base_models (id),
    defense text not null,
    kl_positions text not null,
    -- The share of steps, how far runs were apart in it beyond what chance does, and the steps and jobs it was measured on.
    mean double precision not null check (mean >= 0 and mean <= 1),
    spread double precision not null check (spread >= 0),
    steps bigint not null check (steps > 0),
    jobs bigint not null check (jobs > 0),
    measured_at timestamptz not null default now(),
    primary key (base_model_id, defense, kl_positions)
);

create index jobs_training_file on jobs (training_file_id);
create index webhook_deliveries_dead on webhook_deliveries (id) where state = 'dead';
