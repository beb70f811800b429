-- The second wall around two more tables, and the project an operator's call acted on.
--
-- Only adds: a version from before it runs beside it.

-- Whose request it was. A call without a project is an operator's.
alter table made_requests add column project_id uuid default current_project();
update made_requests set project_id = k.project_id from api_keys k where k.id = made_requests.key_id;
alter table made_requests enable row level security;
create policy own_project on made_requests to holdfast_tenant
    using (project_id = current_project()) with check (project_id = current_project());

-- Whose object it is stands in its key.
alter table staged_objects enable row level security;
create policy own_project on staged_objects to holdfast_tenant
    using (starts_with(key, 'projects/proj_' || replace(current_project()::text, '-', '') || '/'))
    with check (starts_with(key, 'projects/proj_' || replace(current_project()::text, '-', '') || '/'));

alter table audit_log add column acted_on uuid;
create index audit_log_by_acted_on on audit_log (acted_on, at desc, id desc) where acted_on is not null;
