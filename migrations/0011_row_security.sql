-- The second wall between tenants. Queries that serve one name its project; they also run as a role that sees no other's rows,
-- whatever a query says. The project stands in the setting `holdfast.project`; without it the role sees nothing.

do $$
begin
    if not exists (select 1 from pg_roles where rolname = 'holdfast_tenant') then
        create role holdfast_tenant nologin;
    end if;
exception
    -- Another database of the same server was migrated at the same time.
    when duplicate_object or unique_violation then null;
    when insufficient_privilege then
        raise exception 'the database user % may not create roles; let an administrator run once: create role holdfast_tenant; grant holdfast_tenant to %', current_user, current_user;
end $$;
do $$
begin
    -- From version 16 on, who makes a role is a member of it and may all the same not take its place.
    if not pg_has_role(current_user, 'holdfast_tenant',
                       case when current_setting('server_version_num')::int >= 160000 then 'SET' else 'MEMBER' end) then
        execute format('grant holdfast_tenant to %I', current_user);
    end if;
end $$;

create function current_project() returns uuid language sql stable as
    $$ select nullif(current_setting('holdfast.project', true), '')::uuid $$;

grant usage on schema public to holdfast_tenant;
grant select on projects, base_models, base_model_files, alignment_sets, training_speeds to holdfast_tenant;
grant update (name) on projects to holdfast_tenant;
grant select, insert, update, delete on
    files, uploads, upload_parts, jobs, job_events, job_metrics, job_validations, job_checkpoints, checkpoint_files,
    fine_tuned_models, adapter_files, webhooks, webhook_deliveries, made_requests, staged_objects, job_leases
    to holdfast_tenant;

do $$
declare
    owned text;
begin
    foreach owned in array array['files', 'uploads', 'jobs', 'fine_tuned_models', 'webhooks', 'webhook_deliveries'] loop
        execute format('alter table %I enable row level security', owned);
        execute format(
            'create policy own_project on %I to holdfast_tenant using (project_id = current_project()) with check (project_id = current_project())',
            owned);
    end loop;
end $$;

alter table projects enable row level security;
create policy own_project on projects to holdfast_tenant using (id = current_project());

-- What belongs to a job, an upload, a checkpoint or a key is seen by who sees that: these look through its own wall.
do $$
declare
    child text[];
begin
    foreach child slice 1 in array array[
        array['upload_parts', 'uploads', 'upload_id'],
        array['job_events', 'jobs', 'job_id'],
        array['job_metrics', 'jobs', 'job_id'],
        array['job_validations', 'jobs', 'job_id'],
        array['job_checkpoints', 'jobs', 'job_id'],
        array['job_leases', 'jobs', 'job_id'],
        array['adapter_files', 'jobs', 'job_id'],
        array['checkpoint_files', 'job_checkpoints', 'checkpoint_id']
    ] loop
        execute format('alter table %I enable row level security', child[1]);
        execute format(
            'create policy own_project on %1$I to holdfast_tenant using (exists (select 1 from %2$I parent where parent.id = %1$I.%3$I))',
            child[1], child[2], child[3]);
    end loop;
end $$;
