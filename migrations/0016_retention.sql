-- The audit log lets entries go once they have been kept as long as the operator's policy says, and never earlier than a month: the
-- policy stands in the transaction's setting `holdfast.audit_kept_seconds`.

create or replace function audit_log_only_grows() returns trigger language plpgsql as $$
begin
    if tg_op = 'DELETE'
       and old.at < now() - interval '30 days'
       and old.at < now() - make_interval(secs => nullif(current_setting('holdfast.audit_kept_seconds', true), '')::double precision) then
        return old;
    end if;
    raise exception 'the audit log only grows';
end $$;

-- What is looked for when things are removed with time.
create index jobs_finished_at on jobs (finished_at) where finished_at is not null;
create index job_events_created_at on job_events using brin (created_at);
create index webhook_deliveries_ended_at on webhook_deliveries (ended_at) where ended_at is not null;
create index jobs_start on jobs (start_job_id, start_step) where start_job_id is not null and finished_at is null;
